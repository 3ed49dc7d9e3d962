//! Virtual machines: the [`Hypervisor`] trait, a driver for each monitor that implements it, and the jail that monitors run in.
//!
//! Must never know what runs in a machine: it is given a kernel, disks, an interface and a port, and gives back a stream of bytes.
//!
//! ```text
//! Boot, Shape ──start──► machine ──save──► Template ──start──► machine, machine, …      each a copy that shares what it does not change
//! ```

pub mod cloud_hypervisor;
mod disk_key;
mod error;
pub mod firecracker;
mod grounds;
mod guarded;
mod jail;
mod layout;
mod monitor;
pub mod qemu;
mod qmp;
mod quiet;
mod rest;
mod room;
mod template;
mod vsock;

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use joey_api::instance::Resources;
use joey_rpc::client::Io;

pub use disk_key::DiskKey;
pub use error::HypervisorError;
pub use jail::{Jailer, Started, Starter};
pub use joey_process::Ended;
pub use layout::{Part, parts};
pub use quiet::quiet;
pub use room::Room;
pub use template::{Template, remove as remove_template};

/// What executes a machine's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceleration {
    /// The processor, under the kernel's control.
    Kvm,
    /// A program: ten times slower and more.
    Emulated,
}

impl fmt::Display for Acceleration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Emulated => "emulated",
        })
    }
}

/// What copies of one template have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Shape {
    pub cpus: u32,
    /// A multiple of 2 MiB.
    pub memory_bytes: u64,
}

/// What a machine boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boot {
    /// Changes with the contents of the two files.
    pub id: String,
    /// An uncompressed kernel with an entry for PVH.
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

/// A machine that is to be.
#[derive(Debug)]
pub struct Machine {
    /// What it is called in errors and in the list of processes.
    pub name: String,
    /// A directory of its own, mode 0700, made and removed by the caller.
    pub dir: PathBuf,
    /// The monitor's cgroup, and the limits of it.
    pub cgroup: String,
    pub limits: Resources,
    pub shape: Shape,
    pub boot: Boot,
    /// What it is a copy of; it boots where there is none.
    pub template: Option<Arc<Template>>,
    /// The disk that it writes.
    pub disk: Option<PathBuf>,
    /// The key of that disk, where it is encrypted.
    pub disk_key: Option<DiskKey>,
    /// Files that its disks of layers hold one behind the other, by their slots; as the monitor has [`Hypervisor::room`] for them.
    pub layers: BTreeMap<u32, Vec<PathBuf>>,
    pub network: Option<Network>,
    /// Whether it is to be a template: it boots, and what it has is in the place of what its copies will have.
    pub to_be_saved: bool,
    /// Whether it waits with what it copies until it is to go on ([`Vm::go_on`]): its monitor has begun and takes memory for itself alone.
    /// Where machines can be given what makes them an instance's ([`Hypervisor::gives`]).
    pub waits: bool,
    /// Bytes of the longest disk that it is given while it runs ([`Vm::give`]); none where it has what it is for from the start.
    pub longest_disk: u64,
}

impl Machine {
    /// One that boots, with nothing but that and without limits.
    pub fn new(name: String, dir: PathBuf, cgroup: String, shape: Shape, boot: Boot) -> Self {
        Self {
            name,
            dir,
            cgroup,
            limits: Resources::default(),
            shape,
            boot,
            template: None,
            disk: None,
            disk_key: None,
            layers: BTreeMap::new(),
            network: None,
            to_be_saved: false,
            waits: false,
            longest_disk: 0,
        }
    }

    /// Whether it is nobody's yet.
    pub(crate) fn is_to_be_given(&self) -> bool {
        self.longest_disk > 0
    }
}

/// What makes a machine that was started for nobody an instance's.
#[derive(Debug, Clone)]
pub struct Given {
    /// What it is called from now on, and where its directory is now.
    pub name: String,
    pub dir: PathBuf,
    /// The cgroup that it is in, and its limits from now on.
    pub cgroup: String,
    pub limits: Resources,
    pub disk: PathBuf,
    pub layers: BTreeMap<u32, Vec<PathBuf>>,
    pub network: Option<Network>,
}

/// The namespace that a machine's interface takes the place of `eth0` of.
#[derive(Debug, Clone)]
pub struct Network {
    pub netns: PathBuf,
    pub mac: [u8; 6],
}

/// A monitor.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// `qemu`, `cloud-hypervisor`, `firecracker`
    fn name(&self) -> &'static str;

    fn acceleration(&self) -> Acceleration;

    /// Bytes that a machine's monitor takes beside the machine's memory, at most.
    fn overhead_bytes(&self, shape: Shape) -> u64;

    /// The identity of what templates depend on: one that was saved by another is not taken.
    fn version(&self) -> String;

    /// Where layers go.
    fn room(&self) -> Room;

    /// Whether a machine that runs can be given all that makes it an instance's ([`Vm::give`]). What it had is not looked at before
    /// that, so one that is to be saved may have a disk as well.
    fn gives(&self) -> bool {
        false
    }

    /// Starts a machine; returns when it runs, or waits where it is to. Whether what is in it answers is the caller's to find out. On an
    /// error nothing is left.
    async fn start(&self, machine: Machine) -> Result<Arc<dyn Vm>, HypervisorError>;

    /// Makes a template of a machine that was to be saved and has booted, and is frozen after that.
    async fn save(&self, machine: &dyn Vm) -> Result<Template, HypervisorError> {
        let (memory, state) = machine.freeze().await?;
        Template::new(memory, state).map_err(|source| HypervisorError::Host {
            machine: "template".to_owned(),
            operation: "seal the memory",
            source,
        })
    }

    /// Takes over a machine of an earlier process, by its directory. `None`: it has ended.
    async fn adopt(&self, name: &str, dir: &Path) -> Result<Option<Arc<dyn Vm>>, HypervisorError>;
}

/// A machine that runs, or has ended. Dropping the handle changes nothing for the machine.
#[async_trait]
pub trait Vm: Send + Sync {
    /// A connection with the agent in it; resolves when that answers, and the caller sets the bound. One at a time: a further one may
    /// wait until the one before is closed.
    async fn connect(&self) -> std::io::Result<Box<dyn Io>>;

    /// Puts a disk into a slot that is empty: these files one behind the other.
    /// The slots before it are taken.
    async fn insert(&self, slot: u32, files: Vec<PathBuf>) -> Result<(), HypervisorError>;

    /// Gives a machine that has no layers and no network what an instance has, where its monitor can ([`Hypervisor::gives`]).
    async fn give(&self, given: Given) -> Result<(), HypervisorError> {
        let (machine, operation) = (given.name, "give an instance's disks and network");
        Err(HypervisorError::Monitor {
            machine,
            operation,
            message: "its monitor takes them from the start".to_owned(),
        })
    }

    /// Resolves with the monitor's answer: one that hangs has none.
    async fn answers(&self) -> Result<(), HypervisorError>;

    /// Resolves when the monitor has ended; with how it did, where this process is the one to know.
    async fn ended(&self) -> Option<Ended>;

    fn kill(&self);

    /// The monitor's process.
    fn pid(&self) -> u32;

    /// A copy of the memory of a machine that is to be a template, and the state of its devices; it runs no more until it is to go on.
    async fn freeze(&self) -> Result<(OwnedFd, Vec<u8>), HypervisorError>;

    /// Has a machine run that waits or was frozen, where its monitor can ([`Hypervisor::gives`]).
    async fn go_on(&self) -> Result<(), HypervisorError> {
        Err(HypervisorError::Monitor {
            machine: "template".to_owned(),
            operation: "go on",
            message: "what was saved ends".to_owned(),
        })
    }
}
