//! The instances of a host: accepts, finds, forwards, recovers. Transitions of one instance are in [`crate::life`].

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use joey_api::diagnosis::{CaptureRequest, CoreSettings, Cores};
use joey_api::instance::{ExecRequest, InstanceEvent, InstanceSpec, InstanceStatus, LogOptions, Usage};
use joey_hidecar::Carrier;
use joey_image::Images;
use joey_model::{Digest, ErrorKind, Fault, InstanceId, checkpoint};
use joey_network::Networks;
use joey_sandbox::{AgentClient, Sandbox, SandboxClass};
use tokio::sync::{Semaphore, broadcast, mpsc};
use tokio_stream::wrappers::BroadcastStream;

use crate::life::{Command, Life};
use crate::persist::Record;
use crate::{cgroups, own_kernel, start, status};

/// Changes a watcher may be behind before it is cut off.
const BACKLOG: usize = 4096;

/// Bytes as they arrive.
pub type ByteStream = BoxStream<'static, io::Result<Bytes>>;
/// Changes; `None`: the instance is gone. Ends when the reader fell behind: watch again.
pub type StatusEvents = BoxStream<'static, (InstanceId, Option<InstanceStatus>)>;

#[derive(Debug, Clone)]
pub struct Config {
    /// Directory of instances.
    pub dir: PathBuf,
    /// This host's name, told in every status.
    pub host_name: String,
    /// Cgroup of all instances: `/joey`. The classes must use the same.
    pub cgroup_root: String,
    /// The host's resolver configuration.
    pub resolv_conf: PathBuf,
    /// Largest log file of a container before rotation in bytes, and how many files a run has, the one being written among them.
    pub log_max_bytes: u64,
    pub log_max_files: u32,
    /// Sandboxes made at the same time.
    pub parallel_starts: usize,
}

impl Config {
    /// 10 MiB and 5 files of log (the kubelet's defaults), 8 starts at once.
    pub fn new(dir: impl Into<PathBuf>, host_name: impl Into<String>, cgroup_root: impl Into<String>) -> Self {
        Self {
            dir: dir.into(),
            host_name: host_name.into(),
            cgroup_root: cgroup_root.into(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            log_max_bytes: 10 << 20,
            log_max_files: 5,
            parallel_starts: 8,
        }
    }
}

/// What recovery found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Recovered {
    /// Running sandboxes that go on.
    pub adopted: usize,
    /// Half-made or lost ones that are made again.
    pub remade: usize,
    /// Deletions that go on.
    pub deleting: usize,
    /// Leftovers that nobody owns, removed.
    pub removed: usize,
}

/// The instances of this host. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) images: Images,
    pub(crate) network: Arc<Networks>,
    pub(crate) carrier: Carrier,
    pub(crate) starts: Arc<Semaphore>,
    classes: Vec<Arc<dyn SandboxClass>>,
    instances: Mutex<HashMap<InstanceId, Handle>>,
    changes: broadcast::Sender<(InstanceId, Option<InstanceStatus>)>,
}

struct Handle {
    commands: mpsc::UnboundedSender<Command>,
    status: InstanceStatus,
    agent: Option<AgentClient>,
    images: Vec<Digest>,
    containers: Vec<String>,
    /// Its own grace, in seconds.
    grace: u32,
    /// Held while the record is changed or removed: nothing is written into a directory that goes away.
    recording: Arc<tokio::sync::Mutex<()>>,
}

impl Engine {
    /// Opens the directory; nothing is adopted before [`Engine::recover`].
    pub fn open(
        config: Config,
        images: Images,
        network: Arc<Networks>,
        classes: Vec<Arc<dyn SandboxClass>>,
        carrier: Carrier,
    ) -> Result<Self, Fault> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&config.dir)
            .map_err(|error| start::host_fault("make the directory of instances", &error))?;
        let starts = Arc::new(Semaphore::new(config.parallel_starts.max(1)));
        let (changes, _) = broadcast::channel(BACKLOG);
        let instances = Mutex::default();
        Ok(Self { shared: Arc::new(Shared { config, images, network, carrier, starts, classes, instances, changes }) })
    }

    /// Takes over what an earlier daemon left: adopts what runs, makes again or finishes what was half done, removes what nobody
    /// owns. Called once, before anything else.
    pub async fn recover(&self) -> Result<Recovered, Fault> {
        let shared = &self.shared;
        let mut recovered = Recovered::default();
        let mut records = Vec::new();
        for id in directories(&shared.config.dir)? {
            match Record::read(&shared.dir(&id)) {
                Ok(Some(record)) => records.push((id, record)),
                Ok(None) => {
                    shared.remove_leftover(&id).await?;
                    recovered.removed += 1;
                }
                Err(error) => {
                    // Written by a newer program or damaged: it is not ours to destroy what it names.
                    tracing::error!(instance = %id, %error, "record cannot be read, the instance is left alone");
                }
            }
        }
        let known: Vec<InstanceId> = directories(&shared.config.dir)?;
        for id in cgroups::owners(&shared.config.cgroup_root) {
            if !known.contains(&id) {
                shared.remove_leftover(&id).await?;
                recovered.removed += 1;
            }
        }
        shared.network.adopt(&known).await?;
        let adopted = futures::stream::iter(records).map(|(id, record)| async move {
            let sandbox = shared.adopt(&id, &record).await;
            (id, record, sandbox)
        });
        let mut adopted = adopted.buffer_unordered(16);
        while let Some((id, record, sandbox)) = adopted.next().await {
            match (&record.deleting, &sandbox) {
                (Some(_), _) => recovered.deleting += 1,
                (None, Some(_)) => recovered.adopted += 1,
                (None, None) => recovered.remade += 1,
            }
            shared.begin(id, record, sandbox);
        }
        Ok(recovered)
    }

    /// Accepts an instance; durable when it returns, running later. An id that is here already is left as it is.
    pub async fn create(&self, id: InstanceId, spec: InstanceSpec) -> Result<(), Fault> {
        joey_api::validate::instance(&spec)?;
        let class = self.shared.class(&spec.class)?;
        if let Some(why) = class.missing() {
            let message = format!("this host makes no sandboxes of class \"{}\": {why}", spec.class);
            return Err(Fault::new(ErrorKind::Invalid, "ClassMissing", message));
        }
        if let Some(fault) = class.refuses(&spec) {
            return Err(fault);
        }
        own_kernel::check(&spec, &*self.shared.class(&spec.class)?)?;
        if self.shared.instances().contains_key(&id) {
            return Ok(());
        }
        let (record, dir) = (Record::new(spec), self.shared.dir(&id));
        let written = record.clone();
        start::blocking("write its record", move || written.write(&dir)).await?;
        checkpoint::reached("instance-recorded");
        self.shared.begin(id, record, None);
        Ok(())
    }

    /// Brings an instance to a changed specification: durable when it returns, in force soon after. The same again changes
    /// nothing; what may differ is judged by the caller.
    pub async fn change(&self, id: &InstanceId, spec: InstanceSpec) -> Result<(), Fault> {
        joey_api::validate::instance(&spec)?;
        let recording = self.shared.recording(id).await.ok_or_else(|| not_found(id))?;
        let (dir, wanted) = (self.shared.dir(id), spec.clone());
        let written = start::blocking("write its record", move || {
            let Some(mut record) = Record::read(&dir)?.filter(|record| record.spec != wanted) else { return Ok(false) };
            record.spec = wanted;
            record.write(&dir).map(|()| true)
        });
        let written = written.await?;
        drop(recording);
        if !written {
            return Ok(());
        }
        checkpoint::reached("instance-change-recorded");
        if let Some(handle) = self.shared.instances().get_mut(id) {
            handle.containers = spec.containers.iter().map(|container| container.name.clone()).collect();
            handle.grace = spec.termination_grace_period_seconds;
        }
        self.tell(id, Command::Change)
    }

    /// Begins the end: durable when it returns. The change to `None` follows. A later call with a shorter grace counts.
    pub async fn delete(&self, id: &InstanceId, grace: Option<u32>) -> Result<(), Fault> {
        let own = self.shared.instances().get(id).map(|handle| handle.grace).ok_or_else(|| not_found(id))?;
        let grace = grace.unwrap_or(own);
        let recording = self.shared.recording(id).await;
        let dir = self.shared.dir(id);
        let kept = start::blocking("write its record", move || {
            let Some(mut record) = Record::read(&dir)? else { return Ok(()) };
            record.deleting = Some(record.deleting.map_or(grace, |before| before.min(grace)));
            record.write(&dir)
        });
        kept.await?;
        drop(recording);
        checkpoint::reached("instance-deletion-recorded");
        self.tell(id, Command::Delete { grace })
    }

    /// Ends every container and starts it again, without back-off.
    pub fn restart(&self, id: &InstanceId) -> Result<(), Fault> {
        self.tell(id, Command::Restart)
    }

    /// Ends the containers with their grace and makes the sandbox anew, of what sandboxes are made of now.
    pub fn renew(&self, id: &InstanceId) -> Result<(), Fault> {
        self.tell(id, Command::Renew)
    }

    pub fn get(&self, id: &InstanceId) -> Option<InstanceStatus> {
        self.shared.instances().get(id).map(|handle| handle.status.clone())
    }

    /// Everything that is here, and the changes after that moment.
    pub fn watch(&self) -> (Vec<(InstanceId, InstanceStatus)>, StatusEvents) {
        let instances = self.shared.instances();
        let changes = BroadcastStream::new(self.shared.changes.subscribe());
        let now = instances.iter().map(|(id, handle)| (id.clone(), handle.status.clone())).collect();
        (
            now,
            changes
                .take_while(|change| std::future::ready(change.is_ok()))
                .filter_map(|change| async { change.ok() })
                .boxed(),
        )
    }

    /// Ids of images that instances here were started from.
    pub fn images_in_use(&self) -> Vec<Digest> {
        self.shared.instances().values().flat_map(|handle| handle.images.clone()).collect()
    }

    /// Classes that sandboxes can be made of.
    pub fn classes(&self) -> Vec<&'static str> {
        self.shared.classes.iter().filter(|class| class.missing().is_none()).map(|class| class.name()).collect()
    }

    /// Classes that this host does not have, and why.
    pub fn classes_missing(&self) -> BTreeMap<String, String> {
        let missing = self.shared.classes.iter().filter_map(|class| Some((class.name().to_owned(), class.missing()?)));
        missing.collect()
    }

    /// Bytes of the file system that its instances are on; 0 where that cannot be found out.
    pub fn storage_bytes(&self) -> u64 {
        joey_disk::size(&self.shared.config.dir).unwrap_or(0)
    }

    pub fn len(&self) -> usize {
        self.shared.instances().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub async fn logs(&self, id: &InstanceId, container: &str, options: &LogOptions) -> Result<ByteStream, Fault> {
        Ok(self.agent(id, Some(container))?.logs(container, options).await?)
    }

    pub async fn exec(
        &self,
        id: &InstanceId,
        container: &str,
        request: &ExecRequest,
        frames: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<ByteStream, Fault> {
        Ok(self.agent(id, Some(container))?.exec(container, request, frames).await?)
    }

    pub async fn attach(
        &self,
        id: &InstanceId,
        container: &str,
        request: &ExecRequest,
        frames: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<ByteStream, Fault> {
        Ok(self.agent(id, Some(container))?.attach(container, request, frames).await?)
    }

    /// A connection to a port on loopback of the instance; bytes both ways.
    pub async fn forward(
        &self,
        id: &InstanceId,
        port: u16,
        bytes: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<ByteStream, Fault> {
        Ok(self.agent(id, None)?.forward(port, bytes).await?)
    }

    /// What is at a path of a container, as tar.
    pub async fn read_files(&self, id: &InstanceId, container: &str, path: &str) -> Result<ByteStream, Fault> {
        Ok(self.agent(id, Some(container))?.read_files(container, path).await?)
    }

    /// Unpacks an archive into a container.
    pub async fn write_files(
        &self,
        id: &InstanceId,
        container: &str,
        path: &str,
        archive: ByteStream,
    ) -> Result<(), Fault> {
        Ok(self.agent(id, Some(container))?.write_files(container, path, archive).await?)
    }

    /// Packets as pcapng, until a byte of `stop` comes.
    pub async fn capture(
        &self,
        id: &InstanceId,
        request: &CaptureRequest,
        stop: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<ByteStream, Fault> {
        Ok(self.agent(id, None)?.capture(request, stop).await?)
    }

    /// What is done with cores, changed first where `settings` are given, and those that are kept.
    pub async fn cores(&self, id: &InstanceId, settings: Option<&CoreSettings>) -> Result<Cores, Fault> {
        Ok(self.agent(id, None)?.cores(settings).await?)
    }

    /// The bytes of a core that is kept.
    pub async fn core(&self, id: &InstanceId, name: &str) -> Result<ByteStream, Fault> {
        Ok(self.agent(id, None)?.core(name).await?)
    }

    pub async fn usage(&self, id: &InstanceId) -> Result<Usage, Fault> {
        Ok(self.agent(id, None)?.usage().await?)
    }

    /// Ends every instance now and waits until all are gone, at most `limit`.
    pub async fn end_all(&self, limit: Duration) -> Result<(), Fault> {
        let (now, mut changes) = self.watch();
        for (id, _) in &now {
            match self.delete(id, Some(0)).await {
                Err(fault) if fault.kind != ErrorKind::NotFound => return Err(fault),
                _ => {}
            }
        }
        let all_gone = async {
            while !self.is_empty() {
                if changes.next().await.is_none() {
                    changes = self.watch().1;
                }
            }
        };
        tokio::time::timeout(limit, all_gone).await.map_err(|_| {
            Fault::new(ErrorKind::Retryable, "StillRunning", format!("{} instances did not end in time", self.len()))
                .with_hint("call it again; the host's log says what holds them")
        })?;
        cgroups::remove(&self.shared.config.cgroup_root);
        Ok(())
    }

    fn tell(&self, id: &InstanceId, command: Command) -> Result<(), Fault> {
        let instances = self.shared.instances();
        let handle = instances.get(id).ok_or_else(|| not_found(id))?;
        // A closed queue belongs to an instance that ends at this moment.
        handle.commands.send(command).map_err(|_| not_found(id))
    }

    fn agent(&self, id: &InstanceId, container: Option<&str>) -> Result<AgentClient, Fault> {
        let instances = self.shared.instances();
        let handle = instances.get(id).ok_or_else(|| not_found(id))?;
        if let Some(container) = container.filter(|name| !handle.containers.iter().any(|known| known == name)) {
            let message = format!("instance {id} has no container \"{container}\"");
            return Err(Fault::new(ErrorKind::NotFound, "ContainerNotFound", message)
                .with_hint(format!("its containers are: {}", handle.containers.join(", "))));
        }
        handle.agent.clone().ok_or_else(|| {
            let message = format!("instance {id} has no running sandbox now");
            Fault::new(ErrorKind::Conflict, "NotRunning", message).with_hint("its events say why")
        })
    }
}

impl Shared {
    pub(crate) fn dir(&self, id: &InstanceId) -> PathBuf {
        self.config.dir.join(id.as_str())
    }

    pub(crate) fn class(&self, name: &str) -> Result<Arc<dyn SandboxClass>, Fault> {
        self.classes.iter().find(|class| class.name() == name).cloned().ok_or_else(|| {
            let names: Vec<_> = self.classes.iter().map(|class| class.name()).collect();
            Fault::new(ErrorKind::Invalid, "UnknownClass", format!("this host has no sandbox class \"{name}\""))
                .with_hint(format!("choose one of: {}", names.join(", ")))
        })
    }

    pub(crate) fn agent(&self, id: &InstanceId) -> Option<AgentClient> {
        self.instances().get(id).and_then(|handle| handle.agent.clone())
    }

    pub(crate) fn agent_is(&self, id: &InstanceId, agent: Option<AgentClient>) {
        if let Some(handle) = self.instances().get_mut(id) {
            handle.agent = agent;
        }
    }

    /// Carries the logs of an instance, if it has a plan of what is collected.
    pub(crate) fn carry_logs(self: &Arc<Self>, id: &InstanceId) {
        let (shared, own) = (Arc::downgrade(self), id.clone());
        let tell = move |event: InstanceEvent| {
            let Some(shared) = shared.upgrade() else { return };
            if let Some(handle) = shared.instances().get(&own) {
                // One whose queue is closed is gone, and nobody asks what happened to it.
                let _ = handle.commands.send(Command::Told(event));
            }
        };
        self.carrier.follow(id.as_str(), self.dir(id).join(joey_collect::DIRECTORY), Arc::new(tell));
    }

    /// Alone with the record of an instance, until the guard is dropped.
    pub(crate) async fn recording(&self, id: &InstanceId) -> Option<tokio::sync::OwnedMutexGuard<()>> {
        let recording = self.instances().get(id).map(|handle| handle.recording.clone());
        match recording {
            Some(recording) => Some(recording.lock_owned().await),
            None => None,
        }
    }

    pub(crate) fn images_are(&self, id: &InstanceId, images: Vec<Digest>) {
        if let Some(handle) = self.instances().get_mut(id) {
            handle.images = images;
        }
    }

    /// One more image that an instance uses.
    pub(crate) fn image_used(&self, id: &InstanceId, image: Digest) {
        if let Some(handle) = self.instances().get_mut(id)
            && !handle.images.contains(&image)
        {
            handle.images.push(image);
        }
    }

    pub(crate) fn publish(&self, id: &InstanceId, status: &InstanceStatus) {
        // The lock is held while sending, so that a new watcher sees each change in its snapshot or in its stream.
        let mut instances = self.instances();
        if let Some(handle) = instances.get_mut(id)
            && handle.status != *status
        {
            handle.status = status.clone();
            let _ = self.changes.send((id.clone(), Some(status.clone())));
        }
    }

    pub(crate) fn gone(&self, id: &InstanceId) {
        let mut instances = self.instances();
        instances.remove(id);
        let _ = self.changes.send((id.clone(), None));
    }

    fn instances(&self) -> MutexGuard<'_, HashMap<InstanceId, Handle>> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: &Arc<Self>, id: InstanceId, record: Record, sandbox: Option<Arc<dyn Sandbox>>) {
        let (commands, queue) = mpsc::unbounded_channel();
        let handle = Handle {
            commands,
            status: status::waiting(&record, &self.config.host_name, "ContainerCreating", ""),
            agent: sandbox.as_ref().map(|sandbox| AgentClient::new(sandbox.agent().clone())),
            images: Vec::new(),
            containers: record.spec.containers.iter().map(|container| container.name.clone()).collect(),
            grace: record.spec.termination_grace_period_seconds,
            recording: Arc::default(),
        };
        {
            let mut instances = self.instances();
            // Two calls at once with one id: the first one stands.
            if instances.contains_key(&id) {
                return;
            }
            let _ = self.changes.send((id.clone(), Some(handle.status.clone())));
            instances.insert(id.clone(), handle);
        }
        let life = Life::new(id, record, self.clone(), queue);
        tokio::spawn(life.run(sandbox));
    }

    async fn adopt(&self, id: &InstanceId, record: &Record) -> Option<Arc<dyn Sandbox>> {
        let class = self.class(&record.spec.class).ok()?;
        match class.adopt(id, &self.dir(id)).await {
            Ok(sandbox) => sandbox,
            Err(error) => {
                tracing::warn!(instance = %id, %error, "sandbox cannot be adopted and is made again");
                None
            }
        }
    }

    /// Removes everything named from an id that has no record.
    async fn remove_leftover(&self, id: &InstanceId) -> Result<(), Fault> {
        tracing::warn!(instance = %id, "leftovers without a record are removed");
        let dir = self.dir(id);
        for class in &self.classes {
            class.destroy(id, &dir).await?;
        }
        self.network.release(id).await?;
        start::blocking("remove a leftover directory", move || {
            joey_disk::remove(&dir.join(start::DISK))?;
            match std::fs::remove_dir_all(&dir) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                result => result,
            }
        })
        .await
    }
}

fn directories(dir: &Path) -> Result<Vec<InstanceId>, Fault> {
    let entries = std::fs::read_dir(dir).map_err(|error| start::host_fault("list its instances", &error))?;
    let name = |entry: std::fs::DirEntry| InstanceId::parse(entry.file_name().to_str()?).ok();
    Ok(entries.flatten().filter_map(name).collect())
}

fn not_found(id: &InstanceId) -> Fault {
    Fault::new(ErrorKind::NotFound, "InstanceNotFound", format!("instance {id} is not on this host"))
}
