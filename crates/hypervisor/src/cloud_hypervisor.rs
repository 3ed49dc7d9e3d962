//! Cloud Hypervisor, to its API 0.3.0 as its release 53 has it (`vmm/src/api/openapi/cloud-hypervisor.yaml`, `docs/snapshot_restore.md`,
//! `docs/memory.md`, `docs/vsock.md`). **No machine of it has ever run here**: the driver is tested against a server that plays the
//! document.
//!
//! ```text
//! boot    vm.create ─► vm.add-net ─► vm.boot
//! save    vm.pause ─► vm.snapshot
//! copy    config.json edited ─► vm.restore ─► vm.resume ─► vm.add-disk, each slot in turn ─► vm.add-net
//! ```
//!
//! Slots are disks in the order in which they come. Devices can be added to a running machine (by ACPI, on PCI), so one that is saved has
//! no disk and no interface, and a copy gets its own ones when it runs; the agent waits until they are seen. Descriptors cannot be named
//! in a request: that of the interface goes along with it on the socket.
//!
//! The memory of a machine that may be saved is a file with a name, which the monitor then does not write into what it saves; a copy's is
//! a private mapping of the template's. `memory_restore_mode` would copy it (`Copy`), or fill it page by page (`OnDemand`); `CopyOnWrite`
//! does what is done here, and no release had it when this was written. Memory that a copy gives back stays in the file, as the jail has it
//! (`sharedMemory`).
//!
//! A guest that restarts begins anew in the same process; it is told to switch itself off instead ([`joey_api::guest::POWER_OFF`]).

mod config;

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use joey_api::vmm::{Bind, Interface};
use joey_process::Ended;
use joey_rpc::client::Io;
use serde_json::{Value, json};

use crate::grounds::{self, LONGEST_STATE, SAVED, saved_of};
use crate::jail::{Starter, errors_of, user_of};
use crate::monitor::{Monitor, version};
use crate::rest::Ask;
use crate::{Acceleration, Hypervisor, HypervisorError, Machine, Network, Room, Shape, Vm, guarded, template};
use config::{MEMORY, SLOTS, Saved, TEMPLATE};

/// What it takes for itself.
const OVERHEAD: u64 = 64 << 20;

/// The program, and what starts it.
#[derive(Clone)]
pub struct CloudHypervisor {
    program: PathBuf,
    starter: Arc<dyn Starter>,
    version: String,
}

impl CloudHypervisor {
    /// Finds out what the program is; refuses where there is no KVM.
    pub async fn open(program: PathBuf, starter: Arc<dyn Starter>) -> io::Result<Self> {
        let version = version(&program, "cloud-hypervisor", Path::new("/dev/kvm")).await?;
        Ok(Self::known(program, starter, version))
    }

    /// One whose version is known: `cloud-hypervisor v53.0`.
    pub fn known(program: PathBuf, starter: Arc<dyn Starter>, version: String) -> Self {
        Self { program, starter, version }
    }

    /// What it says of itself.
    pub fn told_version(&self) -> &str {
        &self.version
    }

    /// Puts the memory of one that may be saved, or what a copy is made from, where it is opened.
    fn prepare(machine: &Machine) -> io::Result<()> {
        grounds::prepare(machine)?;
        if machine.to_be_saved {
            let (place, user) = (machine.dir.join("memory"), user_of(&machine.name));
            fs::File::create_new(&place)?.set_len(machine.shape.memory_bytes)?;
            std::os::unix::fs::chown(place, Some(user), Some(user))?;
        }
        if let Some(template) = &machine.template {
            let dir = machine.dir.join("template");
            fs::create_dir(&dir)?;
            let saved = Saved::read(template.state_bytes())?;
            fs::write(dir.join("config.json"), serde_json::to_vec(&saved.config_of_copy()?)?)?;
            fs::write(dir.join("state.json"), &saved.state)?;
        }
        Ok(())
    }

    async fn launch(&self, machine: &Machine) -> io::Result<(Monitor, Option<OwnedFd>)> {
        let api = format!("path={}", grounds::API);
        let mut jail = grounds::jail(machine, &self.program, Interface::Returned, &["--api-socket", &api]);
        let mut bind = |name: &str, to: &str, writable| {
            jail.files.push(Bind { from: machine.dir.join(name), to: PathBuf::from(to), writable });
        };
        if machine.to_be_saved {
            bind("memory", MEMORY, true);
        }
        if machine.template.is_some() {
            bind("template", TEMPLATE, false);
        }
        let descriptors: Vec<BorrowedFd<'_>> = machine.template.iter().map(|template| template.memory()).collect();
        let started = self.starter.start(jail, &descriptors, &errors_of(&machine.dir)).await?;
        if machine.network.is_some() && started.tap.is_none() {
            started.process.kill();
            return Err(io::Error::other("the machine's interface did not come back"));
        }
        Ok((Monitor::new(&machine.name, &machine.dir, started.process), started.tap))
    }
}

#[async_trait]
impl Hypervisor for CloudHypervisor {
    fn name(&self) -> &'static str {
        "cloud-hypervisor"
    }

    fn acceleration(&self) -> Acceleration {
        Acceleration::Kvm
    }

    fn overhead_bytes(&self, _shape: Shape) -> u64 {
        OVERHEAD
    }

    fn version(&self) -> String {
        format!("{} {}", self.version, config::FORM)
    }

    fn room(&self) -> Room {
        Room { slots: 1..SLOTS, at_start: SLOTS as usize - 1, files: 1 }
    }

    async fn start(&self, machine: Machine) -> Result<Arc<dyn Vm>, HypervisorError> {
        let host = |operation| {
            let machine = machine.name.clone();
            move |source| HypervisorError::Host { machine, operation, source }
        };
        let disks = config::disks(&machine).map_err(host("plan the disks"))?;
        Self::prepare(&machine).map_err(host("prepare the files"))?;
        let (monitor, tap) = self.launch(&machine).await.map_err(host("start the monitor"))?;
        let vm = CloudVm { monitor };
        let interface = machine.network.as_ref().zip(tap);
        let begun = match &machine.template {
            Some(_) => vm.copy(disks, interface).await,
            None => vm.boot(config::boot(&machine, disks), interface).await,
        };
        if begun.is_err() {
            vm.kill();
            vm.ended().await;
        }
        begun.map(|()| Arc::new(vm) as Arc<dyn Vm>)
    }

    async fn adopt(&self, name: &str, dir: &Path) -> Result<Option<Arc<dyn Vm>>, HypervisorError> {
        let found = Monitor::recorded(name, dir)?;
        Ok(found.map(|monitor| Arc::new(CloudVm { monitor }) as Arc<dyn Vm>))
    }
}

struct CloudVm {
    monitor: Monitor,
}

type Link<'a> = Option<(&'a Network, OwnedFd)>;

impl CloudVm {
    async fn put(&self, operation: &'static str, path: &str, body: Option<Value>) -> Result<Value, HypervisorError> {
        self.monitor.ask(operation, Ask::put(path, body)).await
    }

    async fn boot(&self, config: Value, interface: Link<'_>) -> Result<(), HypervisorError> {
        let operation = "start";
        self.monitor.ready(operation).await?;
        self.put(operation, "/api/v1/vm.create", Some(config)).await?;
        self.add_interface(operation, interface).await?;
        self.put(operation, "/api/v1/vm.boot", None).await.map(drop)
    }

    async fn copy(&self, disks: Vec<Value>, interface: Link<'_>) -> Result<(), HypervisorError> {
        let operation = "copy the template";
        self.monitor.ready(operation).await?;
        let source = json!({ "source_url": format!("file://{TEMPLATE}") });
        self.put(operation, "/api/v1/vm.restore", Some(source)).await?;
        self.put(operation, "/api/v1/vm.resume", None).await?;
        for disk in disks {
            self.put(operation, "/api/v1/vm.add-disk", Some(disk)).await?;
        }
        self.add_interface(operation, interface).await
    }

    async fn add_interface(&self, operation: &'static str, interface: Link<'_>) -> Result<(), HypervisorError> {
        let Some((network, tap)) = interface else { return Ok(()) };
        let ask = Ask::put("/api/v1/vm.add-net", config::interface(network)).with(tap);
        self.monitor.ask(operation, ask).await.map(drop)
    }
}

#[async_trait]
impl Vm for CloudVm {
    async fn connect(&self) -> io::Result<Box<dyn Io>> {
        self.monitor.connect().await
    }

    async fn insert(&self, slot: u32, files: Vec<PathBuf>) -> Result<(), HypervisorError> {
        let (operation, monitor) = ("insert a disk", &self.monitor);
        let info = monitor.ask(operation, Ask::get("/api/v1/vm.info")).await?;
        let there = info.pointer("/config/disks").and_then(Value::as_array).map_or(0, Vec::len);
        if there as u64 != u64::from(slot) {
            let why = format!("the next disk is in slot {there}, and not in {slot}");
            return Err(monitor.host(operation)(io::Error::other(why)));
        }
        let filled = grounds::one(&files).and_then(|file| grounds::fill(&monitor.dir, slot, file));
        filled.map_err(monitor.host(operation))?;
        self.put(operation, "/api/v1/vm.add-disk", Some(config::layer(slot))).await.map(drop)
    }

    async fn answers(&self) -> Result<(), HypervisorError> {
        self.monitor.ask("answer", Ask::get("/api/v1/vmm.ping")).await.map(drop)
    }

    async fn ended(&self) -> Option<Ended> {
        self.monitor.ended().await
    }

    fn kill(&self) {
        self.monitor.kill();
    }

    fn pid(&self) -> u32 {
        self.monitor.pid()
    }

    async fn freeze(&self) -> Result<(OwnedFd, Vec<u8>), HypervisorError> {
        let (operation, monitor) = ("save the template", &self.monitor);
        let host = |error: io::Error| monitor.host(operation)(error);
        if !monitor.dir.join("saved").exists() {
            return Err(host(io::Error::other("it has a disk, or is a copy itself")));
        }
        self.put(operation, "/api/v1/vm.pause", None).await?;
        let destination = json!({ "destination_url": format!("file://{SAVED}") });
        monitor.ask_at_length(operation, Ask::put("/api/v1/vm.snapshot", destination)).await?;
        let memory_elsewhere = fs::symlink_metadata(saved_of(&monitor.dir, "memory-ranges"));
        if memory_elsewhere.is_ok_and(|found| found.len() > 0) {
            return Err(host(io::Error::other("the monitor copied the memory that it was to leave in its file")));
        }
        let read = |name: &str| guarded::read(&saved_of(&monitor.dir, name), monitor.user, LONGEST_STATE);
        let (config, state) = read("config.json").and_then(|config| Ok((config, read("state.json")?))).map_err(host)?;
        let state = Saved::new(&config, state).and_then(|saved| saved.write()).map_err(host)?;
        let place = monitor.dir.join("memory");
        let memory = tokio::task::spawn_blocking(move || template::memory_from(&fs::File::open(place)?));
        let memory = memory.await.map_err(io::Error::other).flatten().map_err(host)?;
        Ok((memory, state))
    }
}
