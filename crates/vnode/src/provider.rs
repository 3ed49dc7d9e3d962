//! What a virtual node needs from whoever runs its Pods: lifecycle verbs and streams. No Kubernetes in it.

use std::io;
use std::pin::Pin;

use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;
use joey_api::change::InstanceChange;
use joey_api::instance::{ExecRequest, Instance, InstanceSpec, LogOptions, Usage, WatchEvent};
use joey_model::Fault;

/// Bytes as they arrive.
pub type ByteStream = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;
/// What the caller of exec and attach sends: frames of `joey_api::frame`, split anywhere.
pub type Frames = Pin<Box<dyn Stream<Item = Bytes> + Send>>;
/// Changes of instances; ends or fails when the provider goes away.
pub type InstanceEvents = Pin<Box<dyn Stream<Item = Result<WatchEvent, Fault>> + Send>>;

/// What the provider can hold in all.
#[derive(Debug, Clone, PartialEq)]
pub struct Capacity {
    pub cpu_milli: u64,
    pub memory_bytes: u64,
    pub pods: u64,
    /// Bytes of disk for images and writable roots; 0: not told.
    pub storage_bytes: u64,
    /// As `uname -r` says.
    pub kernel: String,
    /// As Go names it: `amd64`, `arm64`.
    pub architecture: String,
}

/// Runs instances. Every verb may be called again after an error or a restart of either side.
#[async_trait]
pub trait Provider: Send + Sync + 'static {
    /// Idempotent by `spec.client_token`: a second call returns the instance of the first. Returns once it is durable, not once
    /// it runs. `Conflict`: the name is taken by another, perhaps one that is just ending.
    async fn create(&self, spec: InstanceSpec) -> Result<Instance, Fault>;

    /// Changes what may change of a living instance; the same again changes nothing.
    async fn change(&self, id: &str, change: &InstanceChange) -> Result<Instance, Fault>;

    /// Begins the end: SIGTERM, then SIGKILL after `grace` seconds (its own grace when not given). Idempotent; called again, the
    /// shorter grace counts. `NotFound`: it is gone already.
    async fn delete(&self, id: &str, grace: Option<u32>) -> Result<(), Fault>;

    /// The instance by id or name.
    async fn get(&self, id: &str) -> Result<Instance, Fault>;

    async fn list(&self) -> Result<Vec<Instance>, Fault>;

    /// Every instance that is there, `Synced`, then changes. With `after`, only changes after that revision where they are
    /// still known.
    async fn watch(&self, after: Option<u64>) -> Result<InstanceEvents, Fault>;

    /// The log of one container.
    async fn logs(&self, id: &str, container: &str, options: &LogOptions) -> Result<ByteStream, Fault>;

    /// Runs a command in a container; frames both ways, ended by a status frame.
    async fn exec(&self, id: &str, container: &str, request: &ExecRequest, input: Frames) -> Result<ByteStream, Fault>;

    /// Joins the main process of a container; frames both ways.
    async fn attach(
        &self,
        id: &str,
        container: &str,
        request: &ExecRequest,
        input: Frames,
    ) -> Result<ByteStream, Fault>;

    /// A connection to a port on loopback of the instance; bytes both ways, each with its own end.
    async fn forward(&self, id: &str, port: u16, input: Frames) -> Result<ByteStream, Fault>;

    async fn usage(&self, id: &str) -> Result<Usage, Fault>;

    async fn capacity(&self) -> Result<Capacity, Fault>;
}
