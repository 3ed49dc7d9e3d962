//! A fake host for tests: instances run at once and end when they are told to; nothing real happens.

use std::collections::BTreeMap;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use joey_api::diagnosis::{CaptureRequest, CoreSettings, Cores};
use joey_api::image::{ImageSummary, PullEvent, PullRequest};
use joey_api::instance::{
    ExecRequest, Host as HostDescription, InstanceSpec, InstanceStatus, LogOptions, Usage, WirePhase,
};
use joey_model::{ErrorKind, Fault, ImageRef, InstanceId};
use tokio::sync::broadcast;

use crate::host::{ByteStream, Frames, Host, HostEvents};

type Change = (InstanceId, Option<InstanceStatus>);

/// The fake host. With `hold_deletions` it accepts deletions and never finishes them.
pub struct FakeHost {
    instances: Mutex<BTreeMap<InstanceId, (InstanceSpec, InstanceStatus)>>,
    changes: broadcast::Sender<Change>,
    pub hold_deletions: std::sync::atomic::AtomicBool,
}

impl Default for FakeHost {
    fn default() -> Self {
        let (changes, _) = broadcast::channel(1024);
        Self { instances: Mutex::default(), changes, hold_deletions: false.into() }
    }
}

impl FakeHost {
    /// The specifications it was given and still has.
    pub fn instances(&self) -> BTreeMap<InstanceId, InstanceSpec> {
        self.lock().iter().map(|(id, (spec, _))| (id.clone(), spec.clone())).collect()
    }

    /// Sets a status, as a real host would after something happened.
    pub fn set(&self, id: &InstanceId, status: InstanceStatus) {
        if let Some(entry) = self.lock().get_mut(id) {
            entry.1 = status.clone();
        }
        let _ = self.changes.send((id.clone(), Some(status)));
    }

    /// Loses or ends an instance.
    pub fn vanish(&self, id: &InstanceId) {
        self.lock().remove(id);
        let _ = self.changes.send((id.clone(), None));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<InstanceId, (InstanceSpec, InstanceStatus)>> {
        self.instances.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn known(&self, id: &InstanceId) -> Result<(), Fault> {
        match self.lock().contains_key(id) {
            true => Ok(()),
            false => Err(Fault::new(ErrorKind::NotFound, "NotFound", format!("instance \"{id}\" is not here"))),
        }
    }
}

#[async_trait]
impl Host for FakeHost {
    async fn create(&self, id: &InstanceId, spec: InstanceSpec) -> Result<(), Fault> {
        let status = InstanceStatus { phase: WirePhase::Running, ..InstanceStatus::default() };
        self.lock().entry(id.clone()).or_insert_with(|| (spec, status.clone()));
        let _ = self.changes.send((id.clone(), Some(status)));
        Ok(())
    }

    async fn change(&self, id: &InstanceId, spec: InstanceSpec) -> Result<(), Fault> {
        self.known(id)?;
        if let Some(entry) = self.lock().get_mut(id) {
            entry.0 = spec;
        }
        Ok(())
    }

    async fn delete(&self, id: &InstanceId, _grace: Option<u32>) -> Result<(), Fault> {
        self.known(id)?;
        if !self.hold_deletions.load(std::sync::atomic::Ordering::Relaxed) {
            self.vanish(id);
        }
        Ok(())
    }

    async fn restart(&self, id: &InstanceId) -> Result<(), Fault> {
        self.known(id)
    }

    async fn renew(&self, id: &InstanceId) -> Result<(), Fault> {
        self.known(id)
    }

    fn watch(&self) -> (Vec<(InstanceId, InstanceStatus)>, HostEvents) {
        let present = self.lock();
        let changes = self.changes.subscribe();
        let events = futures::stream::unfold(changes, |mut changes| async move {
            changes.recv().await.ok().map(|change| (change, changes))
        });
        (present.iter().map(|(id, (_, status))| (id.clone(), status.clone())).collect(), events.boxed())
    }

    async fn logs(&self, id: &InstanceId, container: &str, _options: LogOptions) -> Result<ByteStream, Fault> {
        self.known(id)?;
        let line = Bytes::from(format!("{container} says hello\n"));
        Ok(futures::stream::iter([Ok(line)]).boxed())
    }

    /// Sends back what it is sent.
    async fn exec(
        &self,
        id: &InstanceId,
        _container: &str,
        _request: ExecRequest,
        input: Frames,
    ) -> Result<ByteStream, Fault> {
        self.known(id)?;
        Ok(input.map(Ok).boxed())
    }

    async fn attach(
        &self,
        id: &InstanceId,
        container: &str,
        request: ExecRequest,
        input: Frames,
    ) -> Result<ByteStream, Fault> {
        self.exec(id, container, request, input).await
    }

    /// Sends back what it is sent.
    async fn forward(&self, id: &InstanceId, _port: u16, bytes: Frames) -> Result<ByteStream, Fault> {
        self.known(id)?;
        Ok(bytes.map(Ok).boxed())
    }

    async fn read_files(&self, id: &InstanceId, _container: &str, path: &str) -> Result<ByteStream, Fault> {
        self.known(id)?;
        Err(Fault::new(ErrorKind::NotFound, "NoSuchFile", format!("{path}: there are no files here")))
    }

    async fn write_files(
        &self,
        id: &InstanceId,
        _container: &str,
        _path: &str,
        mut archive: ByteStream,
    ) -> Result<(), Fault> {
        self.known(id)?;
        while archive.next().await.is_some() {}
        Ok(())
    }

    async fn capture(&self, id: &InstanceId, _request: CaptureRequest, stop: Frames) -> Result<ByteStream, Fault> {
        self.forward(id, 0, stop).await
    }

    async fn cores(&self, id: &InstanceId, settings: Option<CoreSettings>) -> Result<Cores, Fault> {
        self.known(id).map(|()| Cores { settings: settings.unwrap_or_default(), dumps: Vec::new() })
    }

    async fn core(&self, id: &InstanceId, name: &str) -> Result<ByteStream, Fault> {
        self.read_files(id, "", name).await
    }

    async fn usage(&self, id: &InstanceId) -> Result<Usage, Fault> {
        self.known(id).map(|()| Usage::default())
    }

    async fn describe(&self) -> HostDescription {
        HostDescription {
            name: "fake".to_owned(),
            ready: true,
            cpu_milli: 2000,
            memory_bytes: 1 << 30,
            kernel: "0".to_owned(),
            architecture: "x86_64".to_owned(),
            classes: vec!["runc".to_owned()],
            instances: self.lock().len(),
            address_range: "10.0.0.0/24".to_owned(),
            storage_bytes: 0,
            addresses_free: 254,
            classes_missing: Default::default(),
            machines: None,
        }
    }

    async fn images(&self) -> Result<Vec<ImageSummary>, Fault> {
        Ok(Vec::new())
    }

    async fn pull(&self, request: PullRequest) -> Result<BoxStream<'static, PullEvent>, Fault> {
        let message = format!("image \"{}\" does not exist", request.image);
        let fault = joey_api::error::ErrorBody::from(Fault::new(ErrorKind::NotFound, "ErrImagePull", message)).error;
        Ok(futures::stream::iter([PullEvent::Failed { fault }]).boxed())
    }

    async fn remove_image(&self, name: &str) -> Result<(), Fault> {
        Err(Fault::new(ErrorKind::NotFound, "NotFound", format!("image \"{name}\" does not exist")))
    }

    async fn import_image(&self, reference: &ImageRef, _archive: ByteStream) -> Result<ImageSummary, Fault> {
        Err(Fault::new(ErrorKind::Invalid, "InvalidArchive", format!("image \"{reference}\" cannot be read")))
    }
}
