//! Firecracker, to its API as its release 1.16 has it (`src/firecracker/swagger/firecracker.yaml`, `docs/snapshotting`, `docs/vsock.md`).
//! An older one refuses what it does not know in words. **No machine of it has ever run here**: the driver is tested against a server
//! that plays the document.
//!
//! ```text
//! boot    machine-config, boot-source, drives, network-interfaces, vsock, balloon ─► actions InstanceStart
//! save    vm Paused ─► snapshot/create
//! copy    snapshot/load, which resumes it
//! ```
//!
//! No device can be added to a machine on virtio-mmio, so it begins with all its slots; one with nothing in it has a file of zeros. What
//! was saved names files by their paths in the jail: every copy has its own ones there, and their sizes are found anew. The interface is
//! named `tap` in every network namespace. An address that a copy's interface bears is set by the guest: the saved one had none.
//!
//! The memory of a copy is a private mapping of the template's, which the copy cannot write.

mod requests;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use joey_api::vmm::{Bind, Interface};
use joey_process::Ended;
use joey_rpc::client::Io;
use serde_json::json;

use crate::grounds::{self, LONGEST_STATE, saved_of};
use crate::jail::{Starter, errors_of, user_of};
use crate::monitor::{Monitor, version};
use crate::rest::Ask;
use crate::{Acceleration, Hypervisor, HypervisorError, Machine, Room, Shape, Vm, guarded, template};
use requests::{FIRST, SLOTS};

/// What it takes for itself: 5 MiB are promised for a machine of 128 MiB (its `SPECIFICATION.md`), and disks have buffers.
const OVERHEAD: u64 = 24 << 20;

/// The program, and what starts it.
#[derive(Clone)]
pub struct Firecracker {
    program: PathBuf,
    starter: Arc<dyn Starter>,
    version: String,
}

impl Firecracker {
    /// Finds out what the program is; refuses where there is no KVM.
    pub async fn open(program: PathBuf, starter: Arc<dyn Starter>) -> io::Result<Self> {
        let version = version(&program, "Firecracker", Path::new("/dev/kvm")).await?;
        Ok(Self::known(program, starter, version))
    }

    /// One whose version is known: `Firecracker v1.16.0`.
    pub fn known(program: PathBuf, starter: Arc<dyn Starter>, version: String) -> Self {
        Self { program, starter, version }
    }

    /// What it says of itself.
    pub fn told_version(&self) -> &str {
        &self.version
    }

    /// Puts a file of zeros where a slot has nothing in it.
    fn prepare(machine: &Machine) -> io::Result<()> {
        grounds::prepare(machine)?;
        let user = user_of(&machine.name);
        let empty = empty_of(&machine.dir);
        File::create_new(&empty)?.set_len(FIRST)?;
        std::os::unix::fs::chown(&empty, Some(user), Some(user))?;
        for slot in (1..SLOTS).filter(|slot| !machine.layers.contains_key(slot)) {
            grounds::fill(&machine.dir, slot, &empty)?;
        }
        Ok(())
    }

    async fn launch(&self, machine: &Machine) -> io::Result<Monitor> {
        let mut jail = grounds::jail(machine, &self.program, Interface::Named, &["--api-sock", grounds::API]);
        if machine.disk.is_none() {
            let to = PathBuf::from(grounds::DISK);
            jail.files.push(Bind { from: empty_of(&machine.dir), to, writable: true });
        }
        let state = machine.template.as_ref().map(|template| template.state()).transpose()?;
        let mut descriptors: Vec<BorrowedFd<'_>> = Vec::new();
        descriptors.extend(machine.template.as_ref().map(|template| template.memory()));
        descriptors.extend(state.as_ref().map(AsFd::as_fd));
        let started = self.starter.start(jail, &descriptors, &errors_of(&machine.dir)).await?;
        Ok(Monitor::new(&machine.name, &machine.dir, started.process))
    }
}

fn empty_of(dir: &Path) -> PathBuf {
    dir.join("empty")
}

#[async_trait]
impl Hypervisor for Firecracker {
    fn name(&self) -> &'static str {
        "firecracker"
    }

    fn acceleration(&self) -> Acceleration {
        Acceleration::Kvm
    }

    fn overhead_bytes(&self, _shape: Shape) -> u64 {
        OVERHEAD
    }

    fn version(&self) -> String {
        format!("{} {}", self.version, requests::FORM)
    }

    fn room(&self) -> Room {
        Room { slots: 1..SLOTS, at_start: SLOTS as usize - 1, files: 1 }
    }

    async fn start(&self, machine: Machine) -> Result<Arc<dyn Vm>, HypervisorError> {
        let host = |operation| {
            let machine = machine.name.clone();
            move |source| HypervisorError::Host { machine, operation, source }
        };
        requests::check(&machine).and_then(|()| Self::prepare(&machine)).map_err(host("prepare the files"))?;
        let monitor = self.launch(&machine).await.map_err(host("start the monitor"))?;
        let vm = FirecrackerVm { monitor };
        let begun = vm.begin(&machine).await;
        if begun.is_err() {
            vm.kill();
            vm.ended().await;
        }
        begun.map(|()| Arc::new(vm) as Arc<dyn Vm>)
    }

    async fn adopt(&self, name: &str, dir: &Path) -> Result<Option<Arc<dyn Vm>>, HypervisorError> {
        let found = Monitor::recorded(name, dir)?;
        Ok(found.map(|monitor| Arc::new(FirecrackerVm { monitor }) as Arc<dyn Vm>))
    }
}

struct FirecrackerVm {
    monitor: Monitor,
}

impl FirecrackerVm {
    async fn begin(&self, machine: &Machine) -> Result<(), HypervisorError> {
        let copy = machine.template.is_some();
        let operation = if copy { "copy the template" } else { "start" };
        self.monitor.ready(operation).await?;
        let requests = if copy { vec![requests::load()] } else { requests::boot(machine) };
        for (path, body) in requests {
            self.monitor.ask(operation, Ask::put(&path, body)).await?;
        }
        Ok(())
    }
}

#[async_trait]
impl Vm for FirecrackerVm {
    async fn connect(&self) -> io::Result<Box<dyn Io>> {
        self.monitor.connect().await
    }

    async fn insert(&self, slot: u32, files: Vec<PathBuf>) -> Result<(), HypervisorError> {
        let operation = "insert a disk";
        let filled = grounds::one(&files).and_then(|file| grounds::fill(&self.monitor.dir, slot, file));
        filled.map_err(self.monitor.host(operation))?;
        // The same path: it is opened anew, and the guest, which has not looked at the device, will find the new size.
        let id = requests::drive_id(slot);
        let body = json!({ "drive_id": id, "path_on_host": grounds::slot(slot) });
        self.monitor.ask(operation, Ask::patch(&format!("/drives/{id}"), body)).await.map(drop)
    }

    async fn answers(&self) -> Result<(), HypervisorError> {
        self.monitor.ask("answer", Ask::get("/")).await.map(drop)
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
        if !monitor.dir.join("saved").exists() {
            return Err(monitor.host(operation)(io::Error::other("it has a disk, or is a copy itself")));
        }
        monitor.ask(operation, Ask::patch("/vm", json!({ "state": "Paused" }))).await?;
        let (path, body) = requests::save();
        monitor.ask_at_length(operation, Ask::put(&path, body)).await?;
        let read = |name: &str| guarded::read(&saved_of(&monitor.dir, name), monitor.user, LONGEST_STATE);
        let state = read("state").map_err(monitor.host(operation))?;
        let (place, user) = (saved_of(&monitor.dir, "memory"), monitor.user);
        let memory = tokio::task::spawn_blocking(move || template::memory_from(&guarded::file(&place, user)?));
        let memory = memory.await.map_err(io::Error::other).flatten().map_err(monitor.host(operation))?;
        Ok((memory, state))
    }
}
