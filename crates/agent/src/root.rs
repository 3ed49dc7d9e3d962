//! A container's root and mounts, made by its first process in its own mount namespace, so that all ends with it.
//!
//! Every target is opened inside the root with openat2, so a link in an image never leads out of it. Nothing but the
//! device nodes bound into /dev lies on a mount where devices work: mknod makes files that cannot be opened.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use joey_api::agent::{AgentConfig, AgentContainer};
use libc::{MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_RDONLY, MS_REC, MS_REMOUNT};

use crate::sys;

const IN_ROOT: u64 = 0x10;
const NO_SYMLINKS: u64 = 0x04;

/// Paths hidden from containers, and paths they may read only: as containerd has them.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

fn told<T>(what: &str, result: io::Result<T>) -> Result<T, String> {
    result.map_err(|error| format!("cannot {what}: {error}"))
}

/// Mounts everything and makes it this process's root. `upper` holds `data` and `work`.
pub fn enter(config: &AgentConfig, container: &AgentContainer, dir: &Path, upper: &Path) -> Result<(), String> {
    told("detach the mounts", sys::mount("none", "/", "", MS_REC | MS_PRIVATE, ""))?;
    let base = upper.join("root");
    told("mount the root", overlay(container, upper, &base))?;
    let root: OwnedFd = told("open the root", File::open(&base))?.into();
    kernel_mounts(root.as_fd())?;
    devices(root.as_fd())?;
    volumes(config, container, dir, root.as_fd())?;
    for file in ["hosts", "resolv.conf", "hostname"] {
        let target = told("make a file of /etc", target(root.as_fd(), &Path::new("/etc").join(file), true, IN_ROOT))?;
        told("mount a file of /etc", bind(&dir.join("etc").join(file), &target, false))?;
    }
    told("enter the root", std::env::set_current_dir(&base))?;
    drop(root);
    told("enter the root", sys::pivot_to_working_dir())?;
    mask()?;
    if container.read_only_root {
        told("make the root read-only", sys::mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NODEV, ""))?;
    }
    Ok(())
}

/// The layers with a fresh writable one on top.
fn overlay(container: &AgentContainer, upper: &Path, base: &Path) -> io::Result<()> {
    let escape = |path: &str| path.replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,");
    let layers: Vec<String> = container.layers.iter().map(|layer| escape(layer)).collect();
    let plain = |name: &str| escape(&upper.join(name).display().to_string());
    let options = format!("lowerdir={},upperdir={},workdir={}", layers.join(":"), plain("data"), plain("work"));
    if options.len() < 4000 {
        return sys::mount("overlay", base, "overlay", MS_NODEV, &options);
    }
    // A page is all that mount(2) passes on; longer lists go in piece by piece (Linux 6.8).
    many_layers(container, upper, base)
}

fn many_layers(container: &AgentContainer, upper: &Path, base: &Path) -> io::Result<()> {
    use std::os::fd::FromRawFd;
    let place = sys::c(base)?;
    // SAFETY: C strings live through their calls; descriptors are new and owned at once. fsconfig's commands are
    // 1 (set string) and 6 (create), fsmount's attribute 4 is nodev, move_mount's flag 4 is an empty source path.
    unsafe {
        let fd = sys::check(libc::syscall(libc::SYS_fsopen, c"overlay".as_ptr(), 1))?;
        let context = OwnedFd::from_raw_fd(fd as i32);
        let set = |key: &std::ffi::CStr, value: &Path| -> io::Result<()> {
            let value = sys::c(value)?;
            let (key, value) = (key.as_ptr(), value.as_ptr());
            sys::check(libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), 1, key, value, 0)).map(drop)
        };
        for layer in &container.layers {
            set(c"lowerdir+", Path::new(layer))?;
        }
        set(c"upperdir", &upper.join("data"))?;
        set(c"workdir", &upper.join("work"))?;
        let none = std::ptr::null::<libc::c_char>();
        sys::check(libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), 6, none, none, 0))?;
        let fd = sys::check(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 4))?;
        let mount = OwnedFd::from_raw_fd(fd as i32);
        let empty = c"".as_ptr();
        let at = libc::AT_FDCWD;
        sys::check(libc::syscall(libc::SYS_move_mount, mount.as_raw_fd(), empty, at, place.as_ptr(), 4)).map(drop)
    }
}

fn kernel_mounts(root: BorrowedFd<'_>) -> Result<(), String> {
    let closed = MS_NOSUID | MS_NOEXEC | MS_NODEV;
    for (path, kind, flags, data) in [
        ("/proc", "proc", closed, ""),
        ("/dev", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=65536k"),
        ("/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        ("/dev/shm", "tmpfs", closed, "mode=1777,size=65536k"),
        ("/dev/mqueue", "mqueue", closed, ""),
        ("/sys", "sysfs", closed | MS_RDONLY, ""),
    ] {
        let mounted = target(root, Path::new(path), false, IN_ROOT | NO_SYMLINKS)
            .and_then(|target| sys::mount(kind, place(&target), kind, flags, data));
        told(&format!("mount {path}"), mounted)?;
    }
    cgroups(root, closed | MS_RDONLY)
}

/// The container's own view of its cgroups, read-only.
fn cgroups(root: BorrowedFd<'_>, flags: libc::c_ulong) -> Result<(), String> {
    let at = |path: &str| target(root, Path::new(path), false, IN_ROOT | NO_SYMLINKS);
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        let mounted = at("/sys/fs/cgroup").and_then(|t| sys::mount("cgroup", place(&t), "cgroup2", flags, ""));
        return told("mount /sys/fs/cgroup", mounted);
    }
    let top = told("mount /sys/fs/cgroup", at("/sys/fs/cgroup"))?;
    let closed = flags & !MS_RDONLY;
    told("mount /sys/fs/cgroup", sys::mount("tmpfs", place(&top), "tmpfs", closed, "mode=755,size=64k"))?;
    for name in ["memory", "cpu", "cpuacct", "pids"] {
        // Hosts mount hierarchies together as they like; what cannot be mounted alone is left out.
        if let Ok(target) = at(&format!("/sys/fs/cgroup/{name}")) {
            let _ = sys::mount("cgroup", place(&target), "cgroup", flags, name);
        }
    }
    let top = told("mount /sys/fs/cgroup", at("/sys/fs/cgroup"))?;
    told("close /sys/fs/cgroup", sys::mount("none", place(&top), "", MS_REMOUNT | MS_BIND | flags, ""))
}

fn devices(root: BorrowedFd<'_>) -> Result<(), String> {
    for name in DEVICES {
        let path = Path::new("/dev").join(name);
        let bound = target(root, &path, true, IN_ROOT | NO_SYMLINKS)
            .and_then(|target| sys::mount(&path, place(&target), "", MS_BIND, ""));
        told(&format!("make /dev/{name}"), bound)?;
    }
    let dev = told("open /dev", target(root, Path::new("/dev"), false, IN_ROOT | NO_SYMLINKS))?;
    for (name, leads_to) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
        ("core", "/proc/kcore"),
    ] {
        told(&format!("make /dev/{name}"), std::os::unix::fs::symlink(leads_to, place(&dev).join(name)))?;
    }
    Ok(())
}

fn volumes(config: &AgentConfig, container: &AgentContainer, dir: &Path, root: BorrowedFd<'_>) -> Result<(), String> {
    for mount in &container.mounts {
        if !config.volumes.iter().any(|volume| volume.name == mount.volume) {
            return Err(format!("volume \"{}\" does not exist", mount.volume));
        }
        let bound = target(root, Path::new(&mount.path), false, IN_ROOT)
            .and_then(|target| bind(&dir.join("volumes").join(&mount.volume), &target, mount.read_only));
        told(&format!("mount volume \"{}\" at {}", mount.volume, mount.path), bound)?;
    }
    Ok(())
}

fn mask() -> Result<(), String> {
    for path in MASKED {
        let masked = match std::fs::symlink_metadata(path) {
            Ok(meta) if meta.is_dir() => sys::mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NODEV, "size=0"),
            Ok(_) => sys::mount("/dev/null", path, "", MS_BIND, ""),
            Err(_) => Ok(()),
        };
        told(&format!("mask {path}"), masked)?;
    }
    for path in READ_ONLY.iter().filter(|path| Path::new(path).exists()) {
        let flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC;
        let closed =
            sys::mount(path, path, "", MS_BIND | MS_REC, "").and_then(|()| sys::mount("", path, "", flags, ""));
        told(&format!("close {path}"), closed)?;
    }
    Ok(())
}

fn bind(source: &Path, target: &OwnedFd, read_only: bool) -> io::Result<()> {
    sys::mount(source, place(target), "", MS_BIND, "")?;
    let flags = MS_REMOUNT | MS_BIND | MS_NODEV | MS_NOSUID | if read_only { MS_RDONLY } else { 0 };
    // The descriptor names what is below the new mount; the path through /proc is walked anew to the mount on top.
    let path = std::fs::read_link(place(target))?;
    sys::mount("", path, "", flags, "")
}

fn place(target: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", target.as_raw_fd()))
}

/// Opens `path` inside the root, making what is missing: directories on the way, and a directory or file at the end.
fn target(root: BorrowedFd<'_>, path: &Path, file: bool, resolve: u64) -> io::Result<OwnedFd> {
    if let Ok(found) = sys::openat2(root, path, libc::O_PATH, resolve) {
        return Ok(found);
    }
    let names: Vec<&std::ffi::OsStr> = path
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    let mut so_far = PathBuf::from("/");
    let mut parent = sys::openat2(root, &so_far, libc::O_PATH | libc::O_DIRECTORY, resolve)?;
    for (at, name) in names.iter().enumerate() {
        let last = at + 1 == names.len();
        so_far.push(name);
        let kind = if last { 0 } else { libc::O_DIRECTORY };
        parent = match sys::openat2(root, &so_far, libc::O_PATH | kind, resolve) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match last && file {
                    true => drop(sys::touchat(parent.as_fd(), Path::new(name))?),
                    false => sys::mkdirat(parent.as_fd(), Path::new(name))?,
                }
                sys::openat2(root, &so_far, libc::O_PATH | kind, resolve)?
            }
            Err(error) => return Err(error),
        };
    }
    Ok(parent)
}
