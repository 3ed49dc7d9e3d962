//! Class `rund`: a virtual machine with a kernel of its own, in which the agent is the first process.
//!
//! ```text
//! DIR/vm/        the machine's: sockets, the record of its monitor, and what follows
//! DIR/vm/disk    what the containers write, as long as that may get
//! DIR/state.json what the agent told last; it cannot write it itself
//! ```
//!
//! A machine is a copy of a template of its shape where there is one ([`templates`]), and boots where there is none.

mod collect;
mod disk;
mod loss;
mod modules;
mod pool;
mod sandbox;
mod shape;
mod source;
mod state;
mod templates;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::Method;
use jiff::Timestamp;
use joey_api::agent::{AgentConfig, VERSION};
use joey_api::guest::{self, LAYERS};
use joey_api::instance::Resources;
use joey_hypervisor::{Boot, DiskKey, Given, Hypervisor, HypervisorError, Machine, Shape, Template, Vm, parts};
use joey_model::{InstanceId, checkpoint};
use joey_process::cgroup;
use joey_rpc::{Client, RpcError};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::{AgentClient, CreateRequest, Layer, Loss, Sandbox, SandboxClass, SandboxError};
use pool::{Pool, Warm};
use sandbox::{RundSandbox, slots_of};
use source::{Failure, Phases, Source};
use templates::{Copied, Templates};

/// How long a machine may take until its agent has taken in what it is for: a boot by emulation on a busy host.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to read a template that is kept on the disk.
const LOAD_LIMIT: Duration = Duration::from_secs(2);
/// How long an agent may take to end when it is asked to.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How long killed processes may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Bytes of an answer or a state: whoever took over the machine's kernel says what they like.
const LONGEST: usize = 1 << 20;
/// Attempts to remove a directory that others write into.
const ATTEMPTS: usize = 16;
/// Threads of a monitor: one for each processor, and those that read and write files for it.
const THREADS: u64 = 256;
/// Bytes of a packet (the customary length on Ethernet, as the host's side of the interface has it).
const MTU: u32 = 1500;

pub struct RundConfig {
    pub hypervisor: Arc<dyn Hypervisor>,
    pub guest: CurrentGuest,
    /// The cgroup below which every instance has one: `/joey`.
    pub cgroup_root: String,
    /// Where templates and empty disks are kept.
    pub dir: PathBuf,
    /// Most bytes of a core of what crashes in a machine; without it there are none.
    pub core_bytes: Option<u64>,
}

/// What machines boot.
#[derive(Debug, Clone)]
pub struct Guest {
    pub boot: Boot,
    /// Modules of its kernel for volumes of NFS, in the order in which they are loaded.
    pub nfs_modules: Vec<PathBuf>,
}

/// Tells what machines boot now, which may change; or why this host makes none.
pub type CurrentGuest = Arc<dyn Fn() -> Result<Guest, String> + Send + Sync>;

/// The class on this host.
pub async fn rund(config: RundConfig) -> io::Result<Arc<dyn SandboxClass>> {
    let disks = Arc::new(disk::Disks::open(&config.dir)?);
    let templates = Templates::open(&config, &disks)?;
    templates.clear_left().await;
    let pool = Pool::open(&config, &templates, &disks)?;
    pool.begin().await?;
    let booting = Semaphore::new(std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
    Ok(Arc::new(Rund { templates, disks, pool, booting, config, open: Mutex::default() }))
}

/// The talk with the agent in a machine.
fn client(vm: &Arc<dyn Vm>, name: &str) -> Client {
    let machine = vm.clone();
    let client = Client::from_connector(format!("agent of {name}"), move || {
        let machine = machine.clone();
        async move { machine.connect().await }
    });
    client.with_limit(LONGEST).with_patience(Some(START_LIMIT))
}

/// Has a machine without an instance run a container of nothing.
async fn rehearse(client: &Client) -> Result<(), String> {
    let asked = client.call::<(), ()>(Method::PUT, "/v1/rehearsal", None);
    let asked = tokio::time::timeout(START_LIMIT, asked).await;
    asked.map_err(|_| "the rehearsal takes too long".to_owned())?.map_err(|error| said(&error))
}

/// Ends what is in the cgroup, and removes that and the machine's directory.
async fn clear(dir: &Path, cgroup: &str) -> Result<(), String> {
    let failed = |error: io::Error| error.to_string();
    let ended = tokio::time::timeout(KILL_LIMIT, cgroup::kill_all(cgroup)).await;
    ended.map_err(|_| format!("the processes of cgroup {cgroup} do not end"))?.map_err(failed)?;
    cgroup::remove(cgroup).await.map_err(failed)?;
    remove(dir).map_err(failed)
}

struct Rund {
    config: RundConfig,
    /// Those that are talked with: a machine has one talker at a time.
    open: Mutex<HashMap<InstanceId, Arc<RundSandbox>>>,
    templates: Arc<Templates>,
    disks: Arc<disk::Disks>,
    pool: Arc<Pool>,
    /// A turn for each machine that may boot at a time, one for each processor: each needs one, and a template that is being made would
    /// otherwise be the last.
    booting: Semaphore,
}

/// What is in the slots of layers.
type Slots = BTreeMap<u32, Vec<PathBuf>>;

/// What a machine finds on its disks when it starts.
struct Contents {
    layers: Vec<(u32, Vec<Layer>)>,
    modules: Option<guest::ModuleDisk>,
    slots: Slots,
}

#[async_trait]
impl SandboxClass for Rund {
    fn name(&self) -> &'static str {
        "rund"
    }

    fn missing(&self) -> Option<String> {
        (self.config.guest)().err()
    }

    fn mounts_itself(&self) -> Option<&'static str> {
        Some(LAYERS)
    }

    fn prepare(&self) {
        self.pool.prepare();
    }

    async fn create(&self, request: CreateRequest) -> Result<Arc<dyn Sandbox>, SandboxError> {
        let guest = (self.config.guest)();
        let guest = &guest.map_err(|message| SandboxError::Agent { instance: request.instance.clone(), message })?;
        let boot = &guest.boot;
        let shape = self.shape(&request);
        let contents = self.contents(&request, guest)?;
        let mut remark = None;
        // From before one is taken: the next one is not made at its expense.
        let starting = self.pool.starting();
        let usual = disk::is_usual(request.disk_bytes) && !request.encrypted_disk;
        let warm = usual.then(|| self.pool.take(shape, boot)).flatten();
        let mut turn = None;
        let (template, _starting) = match self.templates.get(shape, boot) {
            None if warm.is_none() => {
                drop(starting);
                (self.template_or_turn(shape, boot, &mut turn).await, self.pool.starting())
            }
            known => (known, starting),
        };
        let sources = [warm.map(Source::Warm), template.map(Source::Copy), Some(Source::Boot)];
        let mut last = self.silent(&request.instance, "no machine could be made for it").error;
        for source in sources.into_iter().flatten() {
            let (limit, failed) = (source.limit(), source.failed());
            let copied_of = source.template();
            if matches!(source, Source::Boot) && turn.is_none() {
                turn = self.booting.acquire().await.ok();
            }
            let made = self.make(&request, &contents, boot, source, remark.take());
            let made = tokio::time::timeout(limit, made).await;
            let made = made.unwrap_or_else(|_| Err(self.silent(&request.instance, "it did not answer in time")));
            let copied = made.as_ref().map_or_else(|failure| failure.copied, |_| Some(Copied::Answered));
            if let (Some(template), Some(copied)) = (copied_of, copied) {
                self.templates.copied(&template, shape, boot, copied);
            }
            let error = match made {
                Ok(sandbox) => return Ok(sandbox),
                Err(failure) => failure.error,
            };
            tracing::warn!(instance = %request.instance, ?error, "a machine was not made");
            remark = Some(format!("{failed}: {error}"));
            last = error;
            if let Err(error) = self.clear(&request.instance, &request.dir).await {
                tracing::warn!(instance = %request.instance, %error, "a half-made sandbox could not be taken down");
                break;
            }
            state::forget(&request.dir);
        }
        Err(last)
    }

    async fn adopt(&self, instance: &InstanceId, dir: &Path) -> Result<Option<Arc<dyn Sandbox>>, SandboxError> {
        Ok(self.adopted(instance, dir).await?.map(|sandbox| sandbox as Arc<dyn Sandbox>))
    }

    fn loss(&self, instance: &InstanceId, dir: &Path) -> Option<Loss> {
        loss::of(&vm_dir(dir), &vmm_of(&self.cgroup(instance, dir)))
    }

    async fn destroy(&self, instance: &InstanceId, dir: &Path) -> Result<(), SandboxError> {
        if let Some(sandbox) = self.adopted(instance, dir).await? {
            sandbox.collecting.last().await;
            // Asked first: those who follow a log get the rest of it.
            let asked = async {
                if AgentClient::new(sandbox.agent().clone()).shutdown().await.is_ok() {
                    sandbox.exited().await;
                }
            };
            let _ = tokio::time::timeout(END_LIMIT, asked).await;
        }
        self.clear(instance, dir).await
    }
}

/// Removes a machine's directory, into which who watches the machine may write a last word meanwhile.
fn remove(dir: &Path) -> io::Result<()> {
    for _ in 0..ATTEMPTS {
        match std::fs::remove_dir_all(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            removed => return removed,
        }
    }
    Err(io::ErrorKind::DirectoryNotEmpty.into())
}

fn vm_dir(dir: &Path) -> PathBuf {
    dir.join("vm")
}

impl Rund {
    fn open(&self) -> MutexGuard<'_, HashMap<InstanceId, Arc<RundSandbox>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine of an instance, taken over where an earlier daemon made it.
    async fn adopted(&self, instance: &InstanceId, dir: &Path) -> Result<Option<Arc<RundSandbox>>, SandboxError> {
        let known = self.open().get(instance).cloned();
        if let Some(known) = known {
            return Ok((!known.has_ended()).then_some(known));
        }
        let found = self.config.hypervisor.adopt(instance.as_str(), &vm_dir(dir)).await;
        let found = found.map_err(|source| SandboxError::Machine { instance: instance.clone(), source })?;
        let Some(vm) = found else { return Ok(None) };
        let client = client(&vm, instance.as_str());
        if state::is_unused(&client, dir, &vm_dir(dir)).await {
            // Its maker ended before it was anything.
            self.clear(instance, dir).await?;
            return Ok(None);
        }
        let room = self.config.hypervisor.room();
        let slots = slots_of(dir, &room);
        let sandbox = Arc::new(RundSandbox::new(instance.clone(), vm, client, room, dir, slots, true));
        self.open().insert(instance.clone(), sandbox.clone());
        Ok(Some(sandbox))
    }

    /// Ends what an instance has here, and removes it.
    async fn clear(&self, instance: &InstanceId, dir: &Path) -> Result<(), SandboxError> {
        let host = |operation| move |source| SandboxError::Host { instance: instance.clone(), operation, source };
        let name = self.cgroup(instance, dir);
        let emptied = tokio::time::timeout(KILL_LIMIT, cgroup::kill_all(&name)).await;
        emptied
            .map_err(|_| SandboxError::Unkillable { instance: instance.clone() })?
            .map_err(host("end the processes"))?;
        cgroup::remove(&name).await.map_err(host("remove the cgroups"))?;
        self.open().remove(instance);
        remove(&vm_dir(dir)).map_err(host("remove the machine's files"))
    }

    fn shape(&self, request: &CreateRequest) -> Shape {
        shape::of(&request.config, self.config.hypervisor.acceleration())
    }

    /// What the machine of an instance finds on its disks.
    fn contents(&self, request: &CreateRequest, guest: &Guest) -> Result<Contents, SandboxError> {
        let (instance, room) = (&request.instance, self.config.hypervisor.room());
        let full = || SandboxError::Full { instance: instance.clone(), layers: request.layers.len() };
        let layers = room.spread_at_start(request.layers.clone()).ok_or_else(full)?;
        let mut slots: Slots = layers.iter().map(|(slot, layers)| (*slot, images(layers))).collect();
        let modules = modules::put(&request.config, &guest.nfs_modules, &room, &mut slots);
        let operation = "give the machine its modules";
        let modules = modules.map_err(|source| SandboxError::Host { instance: instance.clone(), operation, source })?;
        Ok(Contents { layers, modules, slots })
    }

    /// The template that is on its way; or a turn to boot, whichever is there first. One that is kept on the disk is there sooner than
    /// any machine boots.
    async fn template_or_turn<'a>(
        &'a self,
        shape: Shape,
        boot: &Boot,
        turn: &mut Option<SemaphorePermit<'a>>,
    ) -> Option<Arc<Template>> {
        let coming = || self.templates.coming(shape, boot);
        if self.templates.is_kept(shape, boot)
            && let Ok(Some(template)) = tokio::time::timeout(LOAD_LIMIT, coming()).await
        {
            return Some(template);
        }
        tokio::select! {
            biased;
            // Closed never: it lives as long as the class.
            permit = self.booting.acquire() => { *turn = permit.ok(); None }
            Some(template) = coming() => Some(template),
        }
    }

    fn silent(&self, instance: &InstanceId, message: &str) -> Failure {
        let error = SandboxError::Agent { instance: instance.clone(), message: message.to_owned() };
        Failure { error, copied: Some(Copied::Failed) }
    }

    /// Makes the sandbox out of this, with what there is to say of that.
    async fn make(
        &self,
        request: &CreateRequest,
        contents: &Contents,
        boot: &Boot,
        source: Source,
        remark: Option<String>,
    ) -> Result<Arc<dyn Sandbox>, Failure> {
        let mut phases = Phases::begin();
        let instance = &request.instance;
        let host = |operation| move |source| SandboxError::Host { instance: instance.clone(), operation, source };
        let machine = |source| SandboxError::Machine { instance: instance.clone(), source };
        let uncopied = |source| {
            let copied = (!matches!(source, HypervisorError::Host { .. })).then_some(Copied::Failed);
            Failure { copied, error: machine(source) }
        };
        let (room, slots) = (self.config.hypervisor.room(), &contents.slots);
        let phase = source.phase();
        let (vm, client) = match source {
            Source::Warm(warm) => {
                if warm.uncopied().is_some() {
                    // What it is given is made ready while it runs to where it answers.
                    if let Err(source) = warm.go_on().await {
                        warm.end().await;
                        return Err(uncopied(source));
                    }
                    phases.done("copy");
                }
                let given = match self.given(request, &warm, slots).await {
                    Ok(given) => given,
                    Err(source) => {
                        warm.end().await;
                        return Err(host("prepare the machine")(source).into());
                    }
                };
                // What goes wrong from here on is the instance's: its directory is.
                let (vm, client) = warm.keep();
                phases.done("files");
                vm.give(given).await.map_err(machine)?;
                (vm, client)
            }
            Source::Copy(_) | Source::Boot => {
                let template = if let Source::Copy(template) = source { Some(template) } else { None };
                let made = self.machine(request, boot, template, slots).await.map_err(host("prepare the machine"))?;
                phases.done("files");
                let vm = self.config.hypervisor.start(made).await.map_err(uncopied)?;
                let client = client(&vm, instance.as_str());
                (vm, client)
            }
        };
        phases.done(phase);
        let mut sandbox = RundSandbox::new(instance.clone(), vm, client, room, &request.dir, slots.clone(), false);
        sandbox.keep_slots().map_err(host("record the disks"))?;
        checkpoint::reached("machine.made");
        let begun = tokio::select! {
            begun = self.told(&sandbox, request, contents, &mut phases) => begun?,
            _ = sandbox.vm.ended() => return Err(self.silent(instance, "the machine ended")),
        };
        checkpoint::reached("machine.told");
        phases.done("guest");
        let inside = begun.phases.into_iter().map(|(name, micros)| (format!("guest.{name}"), micros));
        (sandbox.phases, sandbox.remark) = (phases.done.into_iter().chain(inside).collect(), remark);
        let sandbox = Arc::new(sandbox);
        self.open().insert(instance.clone(), sandbox.clone());
        Ok(sandbox)
    }

    /// Tells the agent of a machine what it is for, when it can be spoken to.
    async fn told(
        &self,
        sandbox: &RundSandbox,
        request: &CreateRequest,
        contents: &Contents,
        phases: &mut Phases,
    ) -> Result<guest::Begun, Failure> {
        let instance = &request.instance;
        let host = |operation| move |source| SandboxError::Host { instance: instance.clone(), operation, source };
        let failed = |error: RpcError| match &error {
            RpcError::Remote(fault) => {
                Failure { copied: Some(Copied::Answered), ..self.silent(instance, &fault.message) }
            }
            other => self.silent(instance, &other.to_string()),
        };
        // A machine that boots takes its time until then, and is told what time it is afterwards.
        sandbox.client.connected().await.map_err(failed)?;
        phases.done("answer");
        state::tells(&vm_dir(&request.dir)).map_err(host("record the machine"))?;
        let mut plan = plan(request, &contents.layers).map_err(host("plan the machine"))?;
        (plan.core_bytes, plan.modules) = (self.config.core_bytes, contents.modules.clone());
        sandbox.client.call(Method::PUT, "/v1/sandbox", Some(&plan)).await.map_err(failed)
    }

    fn limits(&self, request: &CreateRequest) -> Resources {
        let shape = self.shape(request);
        Resources {
            memory_bytes: Some(shape.memory_bytes + self.config.hypervisor.overhead_bytes(shape)),
            cpu_milli: shape::cpu_limit_of_machine(&request.config),
            pids: Some(THREADS),
            ..Resources::default()
        }
    }

    /// Makes the machine's directory the instance's, with the disk that the instance writes.
    async fn given(&self, request: &CreateRequest, warm: &Warm, slots: &Slots) -> io::Result<Given> {
        let dir = vm_dir(&request.dir);
        // First of all: from when the directory is the instance's, its cgroup is found there.
        keep(&warm.dir, &warm.cgroup, &warm.boot)?;
        std::fs::rename(&warm.dir, &dir)?;
        let disk = dir.join("disk");
        std::fs::remove_file(&disk)?;
        self.disk(request, &disk, "given").await?;
        Ok(Given {
            name: request.instance.to_string(),
            dir,
            cgroup: vmm_of(&warm.cgroup),
            limits: self.limits(request),
            disk,
            layers: slots.clone(),
            network: network(request),
        })
    }

    /// Makes the disk that the instance writes; the key to it, where it is encrypted. It has another name until it is whole: one that
    /// was given up may still be being made when the next one is.
    async fn disk(&self, request: &CreateRequest, place: &Path, attempt: &str) -> io::Result<Option<DiskKey>> {
        let new = place.with_extension(attempt);
        let (disks, made) = (self.disks.clone(), new.clone());
        let (bytes, encrypted) = (request.disk_bytes, request.encrypted_disk);
        let made = tokio::task::spawn_blocking(move || {
            let key = encrypted.then(DiskKey::new).transpose()?;
            disks.copy(&made, bytes, key.as_ref()).map(|()| key)
        });
        let key = made.await.map_err(io::Error::other)??;
        std::fs::rename(new, place).map(|()| key)
    }

    async fn machine(
        &self,
        request: &CreateRequest,
        boot: &Boot,
        template: Option<Arc<Template>>,
        slots: &Slots,
    ) -> io::Result<Machine> {
        use std::os::unix::fs::DirBuilderExt;
        let dir = vm_dir(&request.dir);
        std::fs::DirBuilder::new().mode(0o700).create(&dir)?;
        let disk = dir.join("disk");
        let attempt = if template.is_some() { "copied" } else { "booted" };
        let disk_key = self.disk(request, &disk, attempt).await?;
        let cgroup = format!("{}/{}", self.config.cgroup_root, request.instance);
        keep(&dir, &cgroup, &boot.id)?;
        let (name, vmm) = (request.instance.to_string(), vmm_of(&cgroup));
        Ok(Machine {
            limits: self.limits(request),
            template,
            disk: Some(disk),
            disk_key,
            layers: slots.clone(),
            network: network(request),
            ..Machine::new(name, dir, vmm, self.shape(request), boot.clone())
        })
    }

    /// The cgroup of an instance's machine, which may have been made before the instance was.
    fn cgroup(&self, instance: &InstanceId, dir: &Path) -> String {
        let own = || format!("{}/{instance}", self.config.cgroup_root);
        std::fs::read_to_string(vm_dir(dir).join(CGROUP)).unwrap_or_else(|_| own())
    }
}

/// The files in a machine's directory that name its cgroup, and what it booted.
const CGROUP: &str = "cgroup";
const GUEST: &str = "guest";

fn keep(vm_dir: &Path, cgroup: &str, guest: &str) -> io::Result<()> {
    std::fs::write(vm_dir.join(CGROUP), cgroup)?;
    std::fs::write(vm_dir.join(GUEST), guest)
}

/// Where the monitor is.
fn vmm_of(cgroup: &str) -> String {
    format!("{cgroup}/vmm")
}

fn network(request: &CreateRequest) -> Option<joey_hypervisor::Network> {
    let network = request.network.as_ref()?;
    Some(joey_hypervisor::Network { netns: network.netns.clone(), mac: network.mac })
}

/// What the guest is told.
fn plan(request: &CreateRequest, disks: &[(u32, Vec<Layer>)]) -> io::Result<guest::Sandbox> {
    let mut entropy = [0; 64];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut entropy)?;
    let layers = disks.iter().map(|(slot, layers)| layer_disk(*slot, layers)).collect::<io::Result<_>>()?;
    let network = request.network.as_ref().map(|network| guest::Interface {
        mac: network.mac,
        address: network.address,
        gateway: network.gateway,
        gateway_mac: network.gateway_mac,
        mtu: MTU,
    });
    Ok(guest::Sandbox {
        version: VERSION,
        now: Timestamp::now(),
        entropy: STANDARD.encode(entropy),
        network,
        layers,
        modules: None,
        core_bytes: None,
        config: AgentConfig { cgroup: guest::CGROUP.to_owned(), ..request.config.clone() },
    })
}

fn images(layers: &[Layer]) -> Vec<PathBuf> {
    layers.iter().map(|layer| layer.image.clone()).collect()
}

fn layer_disk(slot: u32, layers: &[Layer]) -> io::Result<guest::LayerDisk> {
    let places = parts(&images(layers))?;
    let named = layers.iter().zip(places).map(|(layer, part)| guest::Layer {
        name: layer.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        offset: part.offset,
        length: part.length,
    });
    Ok(guest::LayerDisk { slot, layers: named.collect() })
}

fn said(error: &RpcError) -> String {
    match error {
        RpcError::Remote(fault) => fault.message.clone(),
        other => other.to_string(),
    }
}
