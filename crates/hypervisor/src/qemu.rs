//! QEMU's machine `microvm`, with the kernel's help or by emulation.
//!
//! What a machine has is always the same, in this order, so that every copy of a template finds the devices where they were:
//!
//! ```text
//! virtio-serial ─ port joey.agent │ slots 0..4: virtio-blk │ virtio-net │ virtio-balloon
//! ```
//!
//! A slot is a node `slotN` whose contents are put below it, also while the machine runs; the guest gives the device a driver only
//! when it is told that there is something.

mod arguments;
mod clock;
mod lean;
mod library;
mod machine;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use joey_api::vmm::{Bind, Interface, Jail};
use joey_process::Process;

use crate::jail::{errors_of, record_of, user_of};
use crate::{
    Acceleration, DiskKey, Hypervisor, HypervisorError, Jailer, Machine, Room, Shape, Starter, Vm, jail, layout,
    template,
};
use arguments::Sent;
use lean::Lean;
use library::Library;
use machine::QemuVm;

/// How long a monitor may take until it answers, and a copy to run.
const LIMIT: Duration = Duration::from_secs(20);
/// What a monitor takes for itself: its heap, its stacks, and what it translates the machine's instructions into.
const OVERHEAD: u64 = 64 << 20;
const OVERHEAD_EMULATED: u64 = 128 << 20;
/// Has GLib give back what it frees (before its version 2.76, which has no other way).
const FREE_MEMORY: &str = "G_SLICE=always-malloc";

/// The program, and what starts it in its jail.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// `qemu-system-x86_64`
    pub program: PathBuf,
    starter: Jailer,
    pub acceleration: Acceleration,
    /// What the program says of itself.
    version: String,
    /// Thousands of cycles a second of the counter that machines tell the time by.
    tsc_khz: u64,
    /// Which kind of processor it runs on: copies of what was saved on another one would tell the time wrongly, or execute what there is
    /// not.
    processor: String,
    /// Where the program takes it.
    lean: Option<Lean>,
    /// Instead of libraries that are never called.
    stand_ins: Vec<(Sent, Library)>,
}

impl Qemu {
    /// Finds out what the program is.
    pub async fn open(program: PathBuf, starter: Jailer, acceleration: Acceleration) -> io::Result<Self> {
        let mut command = tokio::process::Command::new(&program);
        command.arg("--version").env_clear().stdin(std::process::Stdio::null()).kill_on_drop(true);
        let told = tokio::time::timeout(LIMIT, command.output());
        let (told, tsc_khz, lean, stand_ins) =
            tokio::join!(told, clock::tsc_khz(), Lean::open(&program), library::stand_ins(&program));
        let told = told??;
        let version = String::from_utf8_lossy(&told.stdout).lines().next().unwrap_or_default().to_owned();
        if !told.status.success() || !version.starts_with("QEMU emulator version ") {
            return Err(io::Error::other(format!("{} is no QEMU: it says \"{version}\"", program.display())));
        }
        starter.call_ahead();
        let processor = clock::processor(&std::fs::read_to_string("/proc/cpuinfo")?, tsc_khz);
        Ok(Self { program, starter, acceleration, version, tsc_khz, processor, lean, stand_ins })
    }

    /// One that starts nothing, for a host that has none: machines of before are found and ended all the same.
    pub fn absent(starter: Jailer) -> Self {
        let (program, version, processor) = (PathBuf::from("qemu-system-x86_64"), String::new(), String::new());
        let (acceleration, lean, stand_ins) = (Acceleration::Emulated, None, Vec::new());
        Self { program, starter, acceleration, version, tsc_khz: 0, processor, lean, stand_ins }
    }

    /// The same, its machines executed by this.
    pub fn accelerated(&self, acceleration: Acceleration) -> Self {
        Self { acceleration, ..self.clone() }
    }

    /// What it says of itself: `QEMU emulator version 7.2.22`.
    pub fn told_version(&self) -> &str {
        &self.version
    }

    /// The plugin of a machine that something translates for. QEMU 7.2 lets go of a plugin's calls, when it is reset, while another
    /// processor may be in one: only machines with one processor have it.
    fn lean(&self, shape: Shape) -> Option<&Lean> {
        self.lean.as_ref().filter(|_| self.acceleration == Acceleration::Emulated && shape.cpus == 1)
    }

    /// Whether its threads are those that the plugin knows, which looks through a machine's memory while none but them is there.
    fn has_known_threads(&self) -> bool {
        self.version.starts_with("QEMU emulator version 7.2.")
    }

    fn jail(&self, machine: &Machine, sent: &[Sent]) -> Jail {
        let Machine { dir, boot, template, disk, layers, network, .. } = machine;
        let mut files = Vec::new();
        let mut bind = |from: &Path, to: String, writable| {
            files.push(Bind { from: from.to_owned(), to: PathBuf::from(to), writable });
        };
        if template.is_none() {
            bind(&boot.kernel, arguments::KERNEL.to_owned(), false);
            bind(&boot.initramfs, arguments::INITRAMFS.to_owned(), false);
        }
        if let Some(disk) = disk {
            bind(disk, arguments::DISK.to_owned(), true);
        }
        if !layers.is_empty() {
            bind(&descriptor_of(dir), arguments::DESCRIPTOR.to_owned(), false);
        }
        for (number, layer) in layers.values().flatten().enumerate() {
            bind(layer, arguments::layer(number), false);
        }
        let longest = disk.as_ref().and_then(|disk| std::fs::metadata(disk).ok()).map_or(0, |meta| meta.len());
        let mut env = vec![FREE_MEMORY.to_owned()];
        let stand_ins = self.stand_ins.iter().filter_map(|(what, _)| arguments::opened(*what, sent));
        env.push(library::instead(stand_ins));
        Jail {
            title: format!("qemu {}", machine.name),
            record: record_of(dir),
            cgroup: machine.cgroup.clone(),
            limits: machine.limits,
            user: user_of(&machine.name),
            netns: network.as_ref().map(|network| network.netns.clone()),
            mac: network.as_ref().map(|network| network.mac),
            interface: Interface::Descriptor,
            files,
            kvm: self.acceleration == Acceleration::Kvm,
            shared_memory: machine.template.is_some(),
            longest_file: longest.max(machine.longest_disk).max(machine.shape.memory_bytes),
            program: self.program.clone(),
            args: arguments::of(self, machine, sent),
            env,
        }
    }

    /// Puts what the monitor opens by itself where it can be opened.
    fn prepare(&self, machine: &Machine) -> io::Result<()> {
        let user = user_of(&machine.name);
        if let Some(disk) = &machine.disk {
            std::os::unix::fs::chown(disk, Some(user), Some(user))?;
        }
        if !machine.layers.is_empty() {
            let files: Vec<PathBuf> = machine.layers.values().flatten().cloned().collect();
            let parts = layout::parts(&files)?;
            let place = descriptor_of(&machine.dir);
            std::fs::write(&place, layout::descriptor(&parts, arguments::layer))?;
            std::os::unix::fs::chown(place, Some(user), Some(user))?;
        }
        Ok(())
    }
}

pub(crate) fn qmp_of(dir: &Path) -> PathBuf {
    dir.join("qmp.sock")
}

pub(crate) fn port_of(dir: &Path) -> PathBuf {
    dir.join("port.sock")
}

fn descriptor_of(dir: &Path) -> PathBuf {
    dir.join("layers.vmdk")
}

#[async_trait]
impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn acceleration(&self) -> Acceleration {
        self.acceleration
    }

    fn overhead_bytes(&self, _shape: Shape) -> u64 {
        match self.acceleration {
            Acceleration::Kvm => OVERHEAD,
            Acceleration::Emulated => OVERHEAD_EMULATED,
        }
    }

    fn version(&self) -> String {
        format!("{} {} {} {}", self.version, self.acceleration, arguments::FORM, self.processor)
    }

    fn room(&self) -> Room {
        // A partition table of 255 is the guest's bound.
        Room { slots: 1..arguments::SLOTS, at_start: 1, files: 255 }
    }

    fn gives(&self) -> bool {
        true
    }

    async fn start(&self, machine: Machine) -> Result<Arc<dyn Vm>, HypervisorError> {
        let name = machine.name.clone();
        let host = |operation| {
            let machine = name.clone();
            move |source| HypervisorError::Host { machine, operation, source }
        };
        self.prepare(&machine).map_err(host("prepare the files"))?;
        let qmp = jail::listener(&qmp_of(&machine.dir)).map_err(host("listen for the monitor"))?;
        let port = jail::listener(&port_of(&machine.dir)).map_err(host("listen for the port"))?;
        let own = match &machine.template {
            Some(_) => None,
            None => Some(template::memory(machine.shape.memory_bytes).map_err(host("make the memory"))?),
        };
        let state = machine.template.as_ref().map(|template| template.state()).transpose();
        let state = state.map_err(host("pass the template"))?;
        let lean = self.lean(machine.shape);
        let (waits, held) = std::io::pipe().map_err(host("make a pipe"))?;
        let sent = [
            (Sent::Qmp, Some(qmp.as_fd())),
            (Sent::Port, Some(port.as_fd())),
            (
                Sent::Memory,
                own.as_ref().map(AsFd::as_fd).or(machine.template.as_ref().map(|template| template.memory())),
            ),
            (Sent::State, state.as_ref().map(AsFd::as_fd)),
            (Sent::Key, machine.disk_key.as_ref().map(DiskKey::descriptor)),
            (Sent::Lean, lean.map(Lean::descriptor)),
            (Sent::Held, lean.filter(|_| machine.is_to_be_given()).map(|_| waits.as_fd())),
        ];
        let sent = sent.into_iter().filter_map(|(what, fd)| Some((what, fd?)));
        let stand_ins = self.stand_ins.iter().map(|(what, library)| (*what, library.descriptor()));
        let (names, descriptors): (Vec<Sent>, Vec<BorrowedFd<'_>>) = sent.chain(stand_ins).unzip();
        let process = self.starter.start(self.jail(&machine, &names), &descriptors, &errors_of(&machine.dir)).await;
        let process = process.map_err(host("start the monitor"))?;
        let vm = QemuVm::new(self.starter.clone(), machine.name.clone(), machine.dir.clone(), process.process, own);
        if machine.is_to_be_given() {
            vm.hold(held.into());
        }
        vm.is_to_copy(arguments::number(Sent::State, &names));
        let started = if machine.waits { vm.answers().await } else { vm.begin().await };
        if started.is_err() {
            vm.kill();
            vm.ended().await;
        }
        started.map(|()| Arc::new(vm) as Arc<dyn Vm>)
    }

    async fn adopt(&self, name: &str, dir: &Path) -> Result<Option<Arc<dyn Vm>>, HypervisorError> {
        let found = Process::recorded(&record_of(dir)).map_err(|source| HypervisorError::Host {
            machine: name.to_owned(),
            operation: "read the record",
            source,
        })?;
        let vm = |process| QemuVm::new(self.starter.clone(), name.to_owned(), dir.to_owned(), process, None);
        Ok(found.map(|process| Arc::new(vm(process)) as Arc<dyn Vm>))
    }
}

/// Whether the kernel's virtual machines work here: a machine with nothing in it is made and answers, or it does not. That there is
/// a file `/dev/kvm` says little.
pub async fn kvm_works(qemu: &Qemu, boot: &crate::Boot, dir: &Path, cgroup: &str) -> bool {
    let probe = qemu.accelerated(Acceleration::Kvm);
    if !Path::new("/dev/kvm").exists() {
        return false;
    }
    let shape = Shape { cpus: 1, memory_bytes: 128 << 20 };
    let machine = Machine::new("probe".to_owned(), dir.to_owned(), cgroup.to_owned(), shape, boot.clone());
    let Ok(vm) = probe.start(machine).await else { return false };
    let works = matches!(tokio::time::timeout(PROBE, vm.connect()).await, Ok(Ok(_)));
    vm.kill();
    vm.ended().await;
    works
}

/// How long a machine may take to boot where the processor executes it.
const PROBE: Duration = Duration::from_secs(5);
