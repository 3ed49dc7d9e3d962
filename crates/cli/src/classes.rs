//! The sandbox classes of this host, and why others are not there.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use joey_guest::{Guest, Guests};
use joey_hypervisor::qemu::{self, Qemu};
use joey_hypervisor::{Acceleration, Boot};
use joey_sandbox::{RuncConfig, RundConfig, SandboxClass};

use crate::failure::Failure;
use crate::settings::HostSettings;

/// Where programs are looked for.
const PROGRAMS: [&str; 4] = ["/usr/bin", "/usr/local/bin", "/bin", "/usr/libexec"];

/// What this host can do.
pub struct Classes {
    pub all: Vec<Arc<dyn SandboxClass>>,
    /// What executes virtual machines, where there are any.
    pub machines: Option<String>,
}

impl Classes {
    pub async fn open(settings: &HostSettings) -> Result<Self, Failure> {
        let cgroup_root = settings.place.cgroup_root();
        let runc = joey_sandbox::runc(RuncConfig { agent_binary: settings.agent.clone(), cgroup_root });
        let (hypervisor, boot, machines) = match hypervisor(settings).await {
            Ok((qemu, guest)) => {
                let machines = format!("{} ({}), Linux {}", qemu.told_version(), qemu.acceleration, guest.release);
                (qemu, Ok(boot(&guest)), Some(machines))
            }
            Err(why) => (Qemu::absent(settings.agent.clone()), Err(why), None),
        };
        let rund = joey_sandbox::rund(RundConfig {
            hypervisor: Arc::new(hypervisor),
            boot,
            cgroup_root: settings.place.cgroup_root(),
            dir: settings.place.file("machines"),
        });
        let rund = rund.await.map_err(|error| Failure::caused("class rund", &error))?;
        Ok(Self { all: vec![runc, rund], machines })
    }
}

/// The kernel and what it boots, of a guest.
fn boot(guest: &Guest) -> Boot {
    Boot { id: guest.id.clone(), kernel: guest.kernel.clone(), initramfs: guest.initramfs.clone() }
}

/// What runs machines here, and what they boot; or why there is none.
async fn hypervisor(settings: &HostSettings) -> Result<(Qemu, Guest), String> {
    let guests = Guests::open(settings.place.file("guests")).map_err(|error| error.to_string())?;
    let guest = guests.current().map_err(|error| error.to_string())?;
    let guest = guest.ok_or("it has no guest to boot: make one with joey guest build")?;
    let program =
        program("qemu-system-x86_64").ok_or("qemu-system-x86_64 is missing (Debian's package qemu-system-x86)")?;
    let qemu = Qemu::open(program, settings.agent.clone(), Acceleration::Emulated).await;
    let qemu = qemu.map_err(|error| error.to_string())?;
    if kvm(&qemu, &boot(&guest), settings).await {
        return Ok((qemu.accelerated(Acceleration::Kvm), guest));
    }
    tracing::warn!("virtual machines are emulated, ten times slower and more: KVM does not work on this host");
    Ok((qemu, guest))
}

/// A program of this host.
pub fn program(name: &str) -> Option<PathBuf> {
    PROGRAMS.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.is_file())
}

/// Whether KVM works, found out once until the host boots again or anything changes that it depends on.
async fn kvm(qemu: &Qemu, boot: &Boot, settings: &HostSettings) -> bool {
    let dir = settings.place.file("machines");
    let since = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let key = format!("{} {} {}", since.trim(), boot.id, qemu.told_version());
    let known = dir.join("kvm");
    let said = std::fs::read_to_string(&known).unwrap_or_default();
    if let Some(answer) = said.strip_prefix(&key) {
        return answer.trim() == "works";
    }
    let (probe, cgroup) = (dir.join("probe"), format!("{}/probe", settings.place.cgroup_root()));
    // One that was cut off may have left its machine.
    let _ = joey_process::cgroup::kill_all(&cgroup).await;
    let made = std::fs::remove_dir_all(&probe).or_else(absent).and_then(|()| std::fs::create_dir_all(&probe));
    if let Err(error) = made {
        tracing::warn!(%error, "KVM cannot be tried");
        return false;
    }
    let works = qemu::kvm_works(qemu, boot, &probe, &cgroup).await;
    let _ = joey_process::cgroup::remove(&cgroup).await;
    let _ = std::fs::remove_dir_all(&probe);
    let _ = std::fs::write(known, format!("{key} {}\n", if works { "works" } else { "does not work" }));
    works
}

fn absent(error: std::io::Error) -> std::io::Result<()> {
    match error.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    }
}
