//! Class `rund`: a virtual machine with a kernel of its own, in which the agent is the first process.
//!
//! ```text
//! DIR/vm/        the machine's: sockets, the record of its monitor, and what follows
//! DIR/vm/disk    what the containers write, as long as that may get
//! DIR/state.json what the agent told last; it cannot write it itself
//! ```
//!
//! A machine is a copy of a template of its shape where there is one ([`templates`]), and boots where there is none.

mod disk;
mod loss;
mod shape;
mod state;
mod templates;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::Method;
use jiff::Timestamp;
use joey_api::agent::{AgentConfig, VERSION};
use joey_api::guest::{self, LAYERS};
use joey_api::instance::Resources;
use joey_hypervisor::{Boot, Hypervisor, HypervisorError, Machine, Room, Template, Vm, parts};
use joey_model::InstanceId;
use joey_process::cgroup;
use joey_rpc::{Client, RpcError};
use tokio::sync::watch;

use crate::{AgentClient, CreateRequest, Layer, Loss, Network, Sandbox, SandboxClass, SandboxError};
use templates::Templates;

/// How long a machine may take until its agent has taken in what it is for: a boot by emulation on a busy host.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a copy may take, before a boot is tried instead.
const COPY_LIMIT: Duration = Duration::from_secs(10);
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
    /// What machines boot; or why this host makes none.
    pub boot: Result<Boot, String>,
    /// The cgroup below which every instance has one: `/joey`.
    pub cgroup_root: String,
    /// Where templates and empty disks are kept.
    pub dir: PathBuf,
}

/// The class on this host.
pub async fn rund(config: RundConfig) -> io::Result<Arc<dyn SandboxClass>> {
    let (templates, disks) = (Templates::open(&config)?, disk::Disks::open(&config.dir)?);
    templates.clear_left().await.map_err(io::Error::other)?;
    Ok(Arc::new(Rund { templates, disks, config, open: Mutex::default() }))
}

struct Rund {
    config: RundConfig,
    /// Those that are talked with: a machine has one talker at a time.
    open: Mutex<HashMap<InstanceId, Arc<RundSandbox>>>,
    templates: Arc<Templates>,
    disks: disk::Disks,
}

/// What is in the slots of layers.
type Slots = BTreeMap<u32, Vec<PathBuf>>;

struct RundSandbox {
    instance: InstanceId,
    vm: Arc<dyn Vm>,
    client: Client,
    /// True when the machine has ended and it is known how.
    over: watch::Receiver<bool>,
    room: Room,
    slots: Mutex<Slots>,
    /// Held while disks are put in: some monitors take them in the order of their slots alone.
    providing: tokio::sync::Mutex<()>,
    record: PathBuf,
    phases: Vec<(String, u64)>,
    remark: Option<String>,
}

#[async_trait]
impl SandboxClass for Rund {
    fn name(&self) -> &'static str {
        "rund"
    }

    fn missing(&self) -> Option<String> {
        self.config.boot.as_ref().err().cloned()
    }

    fn mounts_itself(&self) -> Option<&'static str> {
        Some(LAYERS)
    }

    async fn create(&self, request: CreateRequest) -> Result<Arc<dyn Sandbox>, SandboxError> {
        let boot = self
            .config
            .boot
            .as_ref()
            .map_err(|why| SandboxError::Agent { instance: request.instance.clone(), message: why.clone() })?;
        let shape = shape::of(&request.config, self.config.hypervisor.acceleration());
        let made = match self.templates.get(shape, boot) {
            Some(template) => match tokio::time::timeout(COPY_LIMIT, self.make(&request, boot, Ok(template))).await {
                Ok(Ok(made)) => Ok(made),
                failed => {
                    let error = failed.err().map_or_else(|| "it failed".to_owned(), |_| "it took too long".to_owned());
                    tracing::warn!(instance = %request.instance, %error, "no copy of the template, the machine is booted");
                    self.templates.forget(shape);
                    self.destroy(&request.instance, &request.dir).await?;
                    let remark = format!("no copy of a template could be made: {error}; the machine is booted");
                    self.make(&request, boot, Err(Some(remark))).await
                }
            },
            None => self.make(&request, boot, Err(None)).await,
        };
        if made.is_err()
            && let Err(error) = self.destroy(&request.instance, &request.dir).await
        {
            tracing::warn!(instance = %request.instance, %error, "a half-made sandbox could not be taken down");
        }
        made
    }

    async fn adopt(&self, instance: &InstanceId, dir: &Path) -> Result<Option<Arc<dyn Sandbox>>, SandboxError> {
        let known = self.open().get(instance).cloned();
        if let Some(known) = known {
            return Ok((!known.has_ended()).then_some(known));
        }
        let found = self.config.hypervisor.adopt(instance.as_str(), &vm_dir(dir)).await;
        let found = found.map_err(|source| SandboxError::Machine { instance: instance.clone(), source })?;
        let Some(vm) = found else { return Ok(None) };
        let slots = slots_of(dir).unwrap_or_default();
        let room = self.config.hypervisor.room();
        let sandbox = Arc::new(RundSandbox::new(instance.clone(), vm, room, dir, slots, true));
        self.open().insert(instance.clone(), sandbox.clone());
        Ok(Some(sandbox))
    }

    fn loss(&self, instance: &InstanceId, dir: &Path) -> Option<Loss> {
        loss::of(&vm_dir(dir), &format!("{}/{instance}/vmm", self.config.cgroup_root))
    }

    async fn destroy(&self, instance: &InstanceId, dir: &Path) -> Result<(), SandboxError> {
        let host = |operation| move |source| SandboxError::Host { instance: instance.clone(), operation, source };
        if let Some(sandbox) = self.adopt(instance, dir).await? {
            // Asked first: those who follow a log get the rest of it.
            let asked = async {
                if AgentClient::new(sandbox.agent().clone()).shutdown().await.is_ok() {
                    sandbox.exited().await;
                }
            };
            let _ = tokio::time::timeout(END_LIMIT, asked).await;
        }
        let name = format!("{}/{instance}", self.config.cgroup_root);
        let emptied = tokio::time::timeout(KILL_LIMIT, cgroup::kill_all(&name)).await;
        emptied
            .map_err(|_| SandboxError::Unkillable { instance: instance.clone() })?
            .map_err(host("end the processes"))?;
        cgroup::remove(&name).await.map_err(host("remove the cgroups"))?;
        self.open().remove(instance);
        remove(&vm_dir(dir)).map_err(host("remove the machine's files"))
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

    /// Makes the sandbox as a copy of the template, or boots it: then with what there is to say of that.
    async fn make(
        &self,
        request: &CreateRequest,
        boot: &Boot,
        template: Result<Arc<Template>, Option<String>>,
    ) -> Result<Arc<dyn Sandbox>, SandboxError> {
        let (template, remark) = match template {
            Ok(template) => (Some(template), None),
            Err(remark) => (None, remark),
        };
        let (began, mut phases) = (Instant::now(), Vec::new());
        let done = |phases: &mut Vec<(String, u64)>, name: &str| {
            let before: u64 = phases.iter().map(|(_, micros)| micros).sum();
            let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            phases.push((name.to_owned(), micros.saturating_sub(before)));
        };
        let instance = &request.instance;
        let host = |operation| move |source| SandboxError::Host { instance: instance.clone(), operation, source };
        let machine = |source| SandboxError::Machine { instance: instance.clone(), source };
        let limit = if template.is_some() { COPY_LIMIT } else { START_LIMIT };
        let copied = template.is_some();
        let room = self.config.hypervisor.room();
        let full = || SandboxError::Full { instance: instance.clone(), layers: request.layers.len() };
        let disks = room.spread(request.layers.clone(), std::iter::empty()).ok_or_else(full)?;
        let slots: Slots = disks.iter().map(|(slot, layers)| (*slot, images(layers))).collect();
        let vm = self.machine(request, boot, template, &slots).map_err(host("prepare the machine"))?;
        done(&mut phases, "files");
        let vm = self.config.hypervisor.start(vm).await.map_err(machine)?;
        done(&mut phases, if copied { "copy" } else { "start" });
        let mut sandbox = RundSandbox::new(instance.clone(), vm, room, &request.dir, slots, false);
        sandbox.keep_slots().map_err(host("record the disks"))?;
        let plan = plan(request, &disks).map_err(host("plan the machine"))?;
        // The first answer of all: a machine that boots has none before.
        let begun = async {
            let begun: guest::Begun = sandbox.client.call(Method::PUT, "/v1/sandbox", Some(&plan)).await?;
            Ok::<_, RpcError>(begun)
        };
        let message = tokio::select! {
            begun = tokio::time::timeout(limit, begun) => match begun {
                Ok(Ok(begun)) => {
                    done(&mut phases, "guest");
                    phases.extend(begun.phases.into_iter().map(|(name, micros)| (format!("guest.{name}"), micros)));
                    (sandbox.phases, sandbox.remark) = (phases, remark);
                    let sandbox = Arc::new(sandbox);
                    self.open().insert(instance.clone(), sandbox.clone());
                    return Ok(sandbox);
                }
                Ok(Err(error)) => said(&error),
                Err(_) => "it did not answer in time".to_owned(),
            },
            _ = sandbox.vm.ended() => "the machine ended".to_owned(),
        };
        Err(SandboxError::Agent { instance: instance.clone(), message })
    }

    fn machine(
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
        self.disks.copy(&disk, request.disk_bytes)?;
        let hypervisor = &self.config.hypervisor;
        let shape = shape::of(&request.config, hypervisor.acceleration());
        Ok(Machine {
            name: request.instance.to_string(),
            dir,
            cgroup: format!("{}/{}/vmm", self.config.cgroup_root, request.instance),
            limits: Resources {
                memory_bytes: Some(shape.memory_bytes + hypervisor.overhead_bytes(shape)),
                cpu_milli: shape::cpu_limit(&request.config),
                pids: Some(THREADS),
                ..Resources::default()
            },
            shape,
            boot: boot.clone(),
            template,
            disk: Some(disk),
            layers: slots.clone(),
            network: request
                .network
                .as_ref()
                .map(|Network { netns, mac, .. }| joey_hypervisor::Network { netns: netns.clone(), mac: *mac }),
        })
    }
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

/// What was put into the slots of a machine.
fn slots_of(dir: &Path) -> Option<Slots> {
    serde_json::from_slice(&std::fs::read(vm_dir(dir).join("slots.json")).ok()?).ok()
}

impl RundSandbox {
    /// `begun`: its agent has been told of the instance.
    fn new(instance: InstanceId, vm: Arc<dyn Vm>, room: Room, dir: &Path, slots: Slots, begun: bool) -> Self {
        let machine = vm.clone();
        let client = Client::from_connector(format!("agent of {instance}"), move || {
            let machine = machine.clone();
            async move { machine.connect().await }
        });
        let client = client.with_limit(LONGEST);
        state::keep(&client, &vm, dir, begun);
        let over = loss::watch(&instance, &vm, &vm_dir(dir));
        let record = vm_dir(dir).join("slots.json");
        let (slots, providing) = (Mutex::new(slots), tokio::sync::Mutex::default());
        Self { instance, vm, client, over, room, slots, providing, record, phases: Vec::new(), remark: None }
    }

    /// Whether the machine has ended, as far as it was noticed.
    fn has_ended(&self) -> bool {
        *self.over.borrow()
    }

    fn keep_slots(&self) -> io::Result<()> {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        std::fs::write(&self.record, serde_json::to_vec(&*slots)?)
    }
}

#[async_trait]
impl Sandbox for RundSandbox {
    fn agent(&self) -> &Client {
        &self.client
    }

    async fn exited(&self) {
        // An error means that the watcher is gone, which it is only after it saw the end.
        let _ = self.over.clone().wait_for(|over| *over).await;
    }

    fn remark(&self) -> Option<String> {
        self.remark.clone()
    }

    fn phases(&self) -> Vec<(String, u64)> {
        self.phases.clone()
    }

    async fn provide(&self, layers: Vec<Layer>) -> Result<(), SandboxError> {
        let host = |operation| move |source| SandboxError::Host { instance: self.instance.clone(), operation, source };
        let _turn = self.providing.lock().await;
        let disks = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            let known: Vec<&PathBuf> = slots.values().flatten().collect();
            let wanted: Vec<Layer> = layers.into_iter().filter(|layer| !known.contains(&&layer.image)).collect();
            if wanted.is_empty() {
                return Ok(());
            }
            let full = SandboxError::Full { instance: self.instance.clone(), layers: wanted.len() };
            let disks = self.room.spread(wanted, slots.keys().copied()).ok_or(full)?;
            slots.extend(disks.iter().map(|(slot, layers)| (*slot, images(layers))));
            disks
        };
        // Recorded before it is done: what may be in a slot is not put there again.
        self.keep_slots().map_err(host("record the disks"))?;
        let machine = |source: HypervisorError| SandboxError::Machine { instance: self.instance.clone(), source };
        for (slot, layers) in disks {
            self.vm.insert(slot, images(&layers)).await.map_err(machine)?;
            let disk = layer_disk(slot, &layers).map_err(host("plan the layers"))?;
            let told = self.client.call::<_, ()>(Method::PUT, "/v1/layers", Some(&disk)).await;
            told.map_err(|error| SandboxError::Agent { instance: self.instance.clone(), message: said(&error) })?;
        }
        Ok(())
    }

    fn pid(&self) -> Option<u32> {
        Some(self.vm.pid())
    }
}
