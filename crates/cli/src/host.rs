//! The pool's view of the host in this process: `joey_pool::Host` over the engine of instances and its images.

use std::io::Write;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use joey_api::diagnosis::{CaptureRequest, CoreSettings, Cores};
use joey_api::image::{ImageSummary, PullEvent, PullRequest};
use joey_api::instance::{ExecRequest, Host as Description, InstanceSpec, InstanceStatus, LogOptions, Usage};
use joey_api::sizes::{self, Sizes};
use joey_image::Images;
use joey_instance::Engine;
use joey_model::{ErrorKind, Fault, ImageRef, InstanceId};
use joey_network::Networks;
use joey_pool::{ByteStream, Frames, Host, HostEvents};
use std::sync::Arc;
use tokio::sync::mpsc;

use crate::classes::Machines;

/// Steps of a pull that a reader may be behind; more are dropped, the last never is.
const PROGRESS: usize = 256;

/// The host in this process.
pub struct LocalHost {
    pub engine: Engine,
    pub images: Images,
    pub network: Arc<Networks>,
    pub name: String,
    /// Sizes that instances may name.
    pub sizes: Sizes,
    /// Crashes of this host come to joey.
    pub core_dumps: bool,
    pub machines: Machines,
}

impl LocalHost {
    fn check_cores(&self, wanted: bool) -> Result<(), Fault> {
        match wanted && !self.core_dumps {
            true => {
                let message = "core dumps are not allowed on this host: joey was started without --core-dumps";
                Err(Fault::new(ErrorKind::Invalid, "CoreDumpsOff", message)
                    .with_hint("its owner allows them with --core-dumps SIZE, such as 1Gi"))
            }
            false => Ok(()),
        }
    }

    /// Gives an instance that names sizes the first one that can be had.
    async fn choose_size(&self, spec: &mut InstanceSpec) -> Result<(), Fault> {
        if spec.use_specs.is_empty() {
            return Ok(());
        }
        let Description { cpu_milli, memory_bytes, .. } = self.describe().await;
        sizes::choose(spec, &self.sizes, sizes::Amount { cpu_milli, memory_bytes })
    }
}

#[async_trait]
impl Host for LocalHost {
    async fn create(&self, id: &InstanceId, mut spec: InstanceSpec) -> Result<(), Fault> {
        self.check_cores(spec.core_pattern.is_some())?;
        self.choose_size(&mut spec).await?;
        self.engine.create(id.clone(), spec).await
    }

    async fn change(&self, id: &InstanceId, mut spec: InstanceSpec) -> Result<(), Fault> {
        self.choose_size(&mut spec).await?;
        self.engine.change(id, spec).await
    }

    async fn delete(&self, id: &InstanceId, grace: Option<u32>) -> Result<(), Fault> {
        self.engine.delete(id, grace).await
    }

    async fn restart(&self, id: &InstanceId) -> Result<(), Fault> {
        self.engine.restart(id)
    }

    async fn renew(&self, id: &InstanceId) -> Result<(), Fault> {
        self.engine.renew(id)
    }

    fn watch(&self) -> (Vec<(InstanceId, InstanceStatus)>, HostEvents) {
        self.engine.watch()
    }

    async fn logs(&self, id: &InstanceId, container: &str, options: LogOptions) -> Result<ByteStream, Fault> {
        self.engine.logs(id, container, &options).await
    }

    async fn exec(
        &self,
        id: &InstanceId,
        container: &str,
        request: ExecRequest,
        input: Frames,
    ) -> Result<ByteStream, Fault> {
        self.engine.exec(id, container, &request, input).await
    }

    async fn attach(
        &self,
        id: &InstanceId,
        container: &str,
        request: ExecRequest,
        input: Frames,
    ) -> Result<ByteStream, Fault> {
        self.engine.attach(id, container, &request, input).await
    }

    async fn forward(&self, id: &InstanceId, port: u16, bytes: Frames) -> Result<ByteStream, Fault> {
        self.engine.forward(id, port, bytes).await
    }

    async fn read_files(&self, id: &InstanceId, container: &str, path: &str) -> Result<ByteStream, Fault> {
        self.engine.read_files(id, container, path).await
    }

    async fn write_files(
        &self,
        id: &InstanceId,
        container: &str,
        path: &str,
        archive: ByteStream,
    ) -> Result<(), Fault> {
        self.engine.write_files(id, container, path, archive).await
    }

    async fn capture(&self, id: &InstanceId, request: CaptureRequest, stop: Frames) -> Result<ByteStream, Fault> {
        self.engine.capture(id, &request, stop).await
    }

    async fn cores(&self, id: &InstanceId, settings: Option<CoreSettings>) -> Result<Cores, Fault> {
        self.check_cores(settings.as_ref().is_some_and(|settings| settings.enabled))?;
        self.engine.cores(id, settings.as_ref()).await
    }

    async fn core(&self, id: &InstanceId, name: &str) -> Result<ByteStream, Fault> {
        self.engine.core(id, name).await
    }

    async fn usage(&self, id: &InstanceId) -> Result<Usage, Fault> {
        self.engine.usage(id).await
    }

    async fn describe(&self) -> Description {
        Description {
            name: self.name.clone(),
            ready: true,
            cpu_milli: std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64) * 1000,
            memory_bytes: memory_bytes(),
            storage_bytes: self.engine.storage_bytes(),
            kernel: nix::sys::utsname::uname()
                .map(|name| name.release().to_string_lossy().into_owned())
                .unwrap_or_default(),
            architecture: match std::env::consts::ARCH {
                "x86_64" => "amd64".to_owned(),
                "aarch64" => "arm64".to_owned(),
                other => other.to_owned(),
            },
            classes: self.engine.classes().into_iter().map(str::to_owned).collect(),
            classes_missing: self.engine.classes_missing(),
            machines: (self.machines)(),
            instances: self.engine.len(),
            address_range: self.network.range().to_string(),
            addresses_free: self.network.free(),
        }
    }

    async fn images(&self) -> Result<Vec<ImageSummary>, Fault> {
        Ok(self.images.list())
    }

    async fn pull(&self, request: PullRequest) -> Result<BoxStream<'static, PullEvent>, Fault> {
        let reference = ImageRef::parse(&request.image)
            .map_err(|error| Fault::new(ErrorKind::Invalid, "InvalidImageName", error.to_string()))?;
        let (sender, events) = mpsc::channel(PROGRESS);
        let images = self.images.clone();
        tokio::spawn(async move {
            let progress = sender.clone();
            let pull = images.pull(&reference, &request.credentials, move |event| {
                // A reader that is slow misses steps.
                let _ = progress.try_send(event);
            });
            let pulled = tokio::select! {
                pulled = pull => pulled,
                // Nobody waits for it any more: given up, and what was downloaded is kept for the next one.
                () = sender.closed() => return,
            };
            let last = match pulled {
                Ok(image) => PullEvent::Done { image: images.summary(&image) },
                Err(error) => PullEvent::Failed { fault: joey_api::error::ErrorBody::from(Fault::from(error)).error },
            };
            let _ = sender.send(last).await;
        });
        Ok(futures::stream::unfold(events, |mut events| async move { Some((events.recv().await?, events)) }).boxed())
    }

    async fn remove_image(&self, name: &str) -> Result<(), Fault> {
        Ok(self.images.remove(name, &self.engine.images_in_use()).await.map(drop)?)
    }

    async fn import_image(&self, reference: &ImageRef, mut archive: ByteStream) -> Result<ImageSummary, Fault> {
        let failed = |error: std::io::Error| {
            tracing::error!(%error, "archive could not be taken in");
            Fault::new(ErrorKind::Internal, "ImportFailed", "the archive could not be stored on the host")
        };
        let mut file = tempfile::Builder::new().prefix("import-").suffix(".tar").tempfile().map_err(failed)?;
        while let Some(part) = archive.next().await {
            file.write_all(&part.map_err(failed)?).map_err(failed)?;
        }
        let image = self.images.import(file.path(), reference).await?;
        Ok(self.images.summary(&image))
    }
}

/// Memory of this machine, in bytes (proc(5), meminfo).
fn memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    total.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}
