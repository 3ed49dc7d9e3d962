//! The sandbox classes of this host, and why others are not there.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use joey_guest::{Guest, Guests};
use joey_hypervisor::qemu::{self, Qemu};
use joey_hypervisor::{Acceleration, Boot, Jailer};
use joey_sandbox::{RuncConfig, RundConfig, Runtime, SandboxClass};

use crate::failure::Failure;
use crate::settings::HostSettings;

/// Where programs are looked for.
const PROGRAMS: [&str; 4] = ["/usr/local/bin", "/usr/bin", "/bin", "/usr/libexec"];

/// What this host can do.
pub struct Classes {
    pub all: Vec<Arc<dyn SandboxClass>>,
    pub machines: Machines,
}

/// Tells what executes virtual machines now, where there are any.
pub type Machines = Arc<dyn Fn() -> Option<String> + Send + Sync>;

impl Classes {
    pub async fn open(settings: &HostSettings) -> Result<Self, Failure> {
        let cgroup_root = settings.place.cgroup_root();
        let runc = joey_sandbox::runc(RuncConfig { agent_binary: settings.agent.clone(), cgroup_root });
        let guests = Guests::open(settings.place.file("guests"));
        let guests = guests.map_err(|error| Failure::caused("guests cannot be looked after", &error))?;
        let found = hypervisor(settings, &guests).await;
        let hypervisor =
            found.as_ref().map_or_else(|_| Qemu::absent(Jailer::new(settings.agent.clone())), Clone::clone);
        // Asked again for each machine: a guest that is made while this runs is taken up at once.
        let current = move || found.as_ref().map_err(Clone::clone).and_then(|_| current(&guests));
        let (boots, told) = (Arc::new(current), hypervisor.clone());
        let machines = {
            let boots = boots.clone();
            move || {
                let guest = boots().ok()?;
                Some(format!("{} ({}), Linux {}", told.told_version(), told.acceleration, guest.release))
            }
        };
        let rund = joey_sandbox::rund(RundConfig {
            hypervisor: Arc::new(hypervisor),
            guest: Arc::new(move || {
                let guest = boots()?;
                let nfs_modules = guest.extra.get("nfs").cloned().unwrap_or_default();
                Ok(joey_sandbox::Guest { boot: boot(&guest), nfs_modules })
            }),
            cgroup_root: settings.place.cgroup_root(),
            dir: settings.place.file("machines"),
            core_bytes: settings.core_dumps,
        });
        let (rund, runtime) = tokio::join!(rund, runtime(settings));
        let rund = rund.map_err(|error| Failure::caused("class rund", &error))?;
        let gvisor = joey_sandbox::gvisor(
            RuncConfig { agent_binary: settings.agent.clone(), cgroup_root: settings.place.cgroup_root() },
            runtime,
        );
        Ok(Self { all: vec![runc, rund, gvisor], machines: Arc::new(machines) })
    }
}

/// What runs containers of class gvisor here, with the platform that works; or why nothing does.
async fn runtime(settings: &HostSettings) -> Result<Runtime, String> {
    let runsc = program("runsc").ok_or("runsc is missing: install Debian's package runsc, and start joey again")?;
    let inside = settings.agent.clone();
    let dir = settings.place.file("gvisor");
    std::fs::create_dir_all(&dir).map_err(|error| format!("its platforms cannot be tried: {error}"))?;
    let made = std::fs::metadata(&runsc).and_then(|meta| meta.modified()).map(jiff::Timestamp::try_from);
    let made = made.ok().and_then(Result::ok).map(|at| at.to_string()).unwrap_or_default();
    let key = format!("{} {} {made}", since_boot(), inside.display());
    let known = dir.join("platform");
    let said = std::fs::read_to_string(&known).unwrap_or_default();
    if let Some(platform) = said.strip_prefix(&key) {
        return Ok(Runtime { program: runsc, platform: platform.trim().to_owned(), inside });
    }
    let (tried, seen) = (runsc.clone(), inside.clone());
    let choice = tokio::task::spawn_blocking(move || joey_sandbox::choose(&tried, &seen, &dir.join("probe"))).await;
    let choice = choice.map_err(|error| error.to_string()).flatten();
    let platform = choice.map_err(|why| format!("no platform of runsc works: {why}"))?;
    let _ = std::fs::write(known, format!("{key} {platform}\n"));
    Ok(Runtime { program: runsc, platform, inside })
}

/// What is another one after each boot of the host.
fn since_boot() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// The kernel and what it boots, of a guest.
fn boot(guest: &Guest) -> Boot {
    Boot { id: guest.id.clone(), kernel: guest.kernel.clone(), initramfs: guest.initramfs.clone() }
}

/// What machines boot now.
fn current(guests: &Guests) -> Result<Guest, String> {
    let guest = guests.current().map_err(|error| error.to_string())?;
    guest.ok_or_else(|| "it has no guest to boot: make one with joey guest build".to_owned())
}

/// What runs machines here; or why there is none.
async fn hypervisor(settings: &HostSettings, guests: &Guests) -> Result<Qemu, String> {
    let program = program("qemu-system-x86_64")
        .ok_or("qemu-system-x86_64 is missing: install Debian's package qemu-system-x86, and start joey again")?;
    let qemu = Qemu::open(program, Jailer::new(settings.agent.clone()), Acceleration::Emulated).await;
    let qemu = qemu.map_err(|error| error.to_string())?;
    // Where there is no guest yet, there is nothing to try it with.
    let guest = current(guests).map_err(|why| format!("{why}, and start joey again"))?;
    if kvm(&qemu, &boot(&guest), settings).await {
        return Ok(qemu.accelerated(Acceleration::Kvm));
    }
    tracing::warn!("virtual machines are emulated, ten times slower and more: KVM does not work on this host");
    Ok(qemu)
}

/// A program of this host.
pub fn program(name: &str) -> Option<PathBuf> {
    PROGRAMS.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.is_file())
}

/// Whether KVM works, found out once until the host boots again or anything changes that it depends on.
async fn kvm(qemu: &Qemu, boot: &Boot, settings: &HostSettings) -> bool {
    let dir = settings.place.file("machines");
    let key = format!("{} {} {}", since_boot(), boot.id, qemu.told_version());
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
