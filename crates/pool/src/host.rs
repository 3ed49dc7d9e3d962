//! What the service needs of a host: lifecycle verbs, what runs there, streams, images. No host lives here.

use std::io;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use joey_api::diagnosis::{CaptureRequest, CoreSettings, Cores};
use joey_api::image::{ImageSummary, PullEvent, PullRequest};
use joey_api::instance::{ExecRequest, Host as HostDescription, InstanceSpec, InstanceStatus, LogOptions, Usage};
use joey_model::{Fault, ImageRef, InstanceId};

/// Bytes as they arrive.
pub type ByteStream = BoxStream<'static, io::Result<Bytes>>;
/// What a caller of exec and attach sends: frames of `joey_api::frame`, split anywhere.
pub type Frames = BoxStream<'static, Bytes>;
/// Changes on a host; `None`: the instance is gone with everything it owned. Ends when the reader fell behind: watch again.
pub type HostEvents = BoxStream<'static, (InstanceId, Option<InstanceStatus>)>;

/// A machine that runs instances. Every verb may be called again after a restart of either side.
#[async_trait]
pub trait Host: Send + Sync + 'static {
    /// Accepts an instance; durable when it returns, running later. Called again with the same id it does nothing.
    async fn create(&self, id: &InstanceId, spec: InstanceSpec) -> Result<(), Fault>;

    /// Brings an instance to a changed specification (`joey_api::change`); durable when it returns, in force soon after. The
    /// same again changes nothing. `NotFound`: it is not here (any more).
    async fn change(&self, id: &InstanceId, spec: InstanceSpec) -> Result<(), Fault>;

    /// Begins the end: SIGTERM, SIGKILL after `grace` seconds (the instance's own when not given). Durable intent; the event
    /// `None` follows. Called again, the shorter grace counts. `NotFound`: it is not here (any more).
    async fn delete(&self, id: &InstanceId, grace: Option<u32>) -> Result<(), Fault>;

    /// Ends every container and starts it again.
    async fn restart(&self, id: &InstanceId) -> Result<(), Fault>;

    /// Ends the containers with their grace and makes the sandbox anew.
    async fn renew(&self, id: &InstanceId) -> Result<(), Fault>;

    /// Everything that is here, and the changes after that moment.
    fn watch(&self) -> (Vec<(InstanceId, InstanceStatus)>, HostEvents);

    async fn logs(&self, id: &InstanceId, container: &str, options: LogOptions) -> Result<ByteStream, Fault>;

    /// Runs a command; frames both ways, ended by a status frame.
    async fn exec(
        &self,
        id: &InstanceId,
        container: &str,
        request: ExecRequest,
        input: Frames,
    ) -> Result<ByteStream, Fault>;

    /// Joins a container's main process; frames both ways.
    async fn attach(
        &self,
        id: &InstanceId,
        container: &str,
        request: ExecRequest,
        input: Frames,
    ) -> Result<ByteStream, Fault>;

    /// A connection to a port on loopback of the instance; bytes both ways.
    async fn forward(&self, id: &InstanceId, port: u16, bytes: Frames) -> Result<ByteStream, Fault>;

    /// What is at a path of a container, as tar.
    async fn read_files(&self, id: &InstanceId, container: &str, path: &str) -> Result<ByteStream, Fault>;

    /// Unpacks an archive into a directory of a container, or as that path.
    async fn write_files(&self, id: &InstanceId, container: &str, path: &str, archive: ByteStream)
    -> Result<(), Fault>;

    /// Packets of the instance as pcapng; any byte of `stop` ends the capture in order, with what was lost at the end.
    async fn capture(&self, id: &InstanceId, request: CaptureRequest, stop: Frames) -> Result<ByteStream, Fault>;

    /// What is done with cores of processes that crash, changed first where `settings` are given, and those that are kept.
    async fn cores(&self, id: &InstanceId, settings: Option<CoreSettings>) -> Result<Cores, Fault>;

    /// The bytes of a core that is kept.
    async fn core(&self, id: &InstanceId, name: &str) -> Result<ByteStream, Fault>;

    async fn usage(&self, id: &InstanceId) -> Result<Usage, Fault>;

    async fn describe(&self) -> HostDescription;

    async fn images(&self) -> Result<Vec<ImageSummary>, Fault>;

    /// Pulls; the last event is `Done` or `Failed`. Goes on when the reader goes away.
    async fn pull(&self, request: PullRequest) -> Result<BoxStream<'static, PullEvent>, Fault>;

    /// Removes an image by reference or id. `Conflict`: an instance uses it.
    async fn remove_image(&self, name: &str) -> Result<(), Fault>;

    /// Takes in an archive (`docker save` or OCI layout, as tar) under a name.
    async fn import_image(&self, reference: &ImageRef, archive: ByteStream) -> Result<ImageSummary, Fault>;
}
