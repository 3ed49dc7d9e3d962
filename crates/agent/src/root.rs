//! A container's root and mounts, made by its first process in its own mount namespace, so that all ends with it.
//!
//! Every target is opened inside the root with openat2, so a link in an image never leads out of it. Nothing but the
//! device nodes bound into /dev lies on a mount where devices work: mknod makes files that cannot be opened.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use joey_api::agent::{AgentConfig, AgentContainer};
use libc::{MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_RDONLY, MS_REC};

use crate::launch::Failure;
use crate::{last_words, sys, view, volumes};

/// How paths are walked: within the root and never through the links of /proc.
const IN_ROOT: u64 = 0x10 | 0x02;
const NO_SYMLINKS: u64 = 0x04;

/// Attributes of mounts.
const RDONLY: u64 = 1;
const NOSUID: u64 = 2;
const NODEV: u64 = 4;
const NOEXEC: u64 = 8;

/// Paths hidden from containers, and paths they may read only: as containerd and Docker have them.
const MASKED: [&str; 12] = [
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
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

fn told<T>(what: &str, result: io::Result<T>) -> Result<T, String> {
    result.map_err(|error| format!("cannot {what}: {error}"))
}

/// Mounts everything and makes it this process's root. `upper` holds `data`, `work` and `root`.
pub fn enter(config: &AgentConfig, container: &AgentContainer, dir: &Path, upper: &Path) -> Result<(), Failure> {
    let root = build(config, container, dir, upper, true)?;
    told("enter the root", sys::fchdir(root.as_fd()))?;
    Ok(told("enter the root", sys::pivot_to_working_dir())?)
}

/// Mounts everything at `upper/root`; what the kernel supplies where it is `of_kernel`.
///
/// What the kernel and the agent supply is in place and closed before anything is mounted that a container can write to,
/// so that no container of the Pod can lead these mounts elsewhere.
pub fn build(
    config: &AgentConfig,
    container: &AgentContainer,
    dir: &Path,
    upper: &Path,
    of_kernel: bool,
) -> Result<OwnedFd, Failure> {
    told("detach the mounts", sys::mount("none", "/", "", MS_REC | MS_PRIVATE, ""))?;
    let base = upper.join("root");
    told("mount the root", overlay(container, upper, &base))?;
    let made: OwnedFd = told("open the root", File::open(&base))?.into();
    let root = made.as_fd();
    if of_kernel {
        kernel_mounts(root)?;
        devices(root)?;
        mask(root)?;
    }
    volumes(config, container, dir, root)?;
    for file in ["hosts", "resolv.conf", "hostname"] {
        let mounted = target(root, &Path::new("/etc").join(file), true, IN_ROOT)
            .and_then(|target| bind(root, &Path::new(view::ETC).join(file), &target, NOSUID | NODEV));
        told(&format!("mount /etc/{file}"), mounted)?;
    }
    let words = &container.last_words.path;
    let mounted = target(root, Path::new(words), true, IN_ROOT)
        .and_then(|target| bind(root, &last_words::place(upper), &target, NOSUID | NODEV | NOEXEC));
    told(&format!("mount {words}"), mounted)?;
    if container.read_only_root {
        told("make the root read-only", sys::close_mount(root, RDONLY, false))?;
    }
    Ok(made)
}

/// Shows what is at `path` of a root, with what is mounted in it, at `place` as well: a path on which no link lies that is not ours.
/// `follow`: links within the root lead to it.
pub fn show_aside(root: BorrowedFd<'_>, path: &Path, follow: bool, place: &Path) -> io::Result<()> {
    let seen = sys::openat2(root, path, libc::O_PATH, if follow { IN_ROOT } else { IN_ROOT | NO_SYMLINKS })?;
    let made = match std::fs::metadata(format!("/proc/self/fd/{}", seen.as_raw_fd()))?.is_dir() {
        true => std::fs::create_dir(place).and_then(|()| File::open(place))?,
        false => File::create(place)?,
    };
    sys::attach_mount(sys::clone_mount(seen.as_fd(), Path::new(""), true)?.as_fd(), made.as_fd())
}

/// The layers with a fresh writable one on top. It ends with the container, so nothing of it needs to reach the disk:
/// `volatile` keeps fsync and the end of the mount from waiting for that.
fn overlay(container: &AgentContainer, upper: &Path, base: &Path) -> io::Result<()> {
    let layers: Vec<&str> = container.layers.iter().map(String::as_str).collect();
    stack(&layers, &upper.join("l"), base, MS_NODEV, ",upperdir=../data,workdir=../work,volatile")
}

/// Mounts layers, topmost first, one upon the other, with `more` options.
///
/// They are named by short links in `links`, which go again: a container sees the names in its table of mounts, where they are
/// to say nothing of the host, and a page is all of them that mount(2) passes on.
pub fn stack(layers: &[&str], links: &Path, place: &Path, flags: libc::c_ulong, more: &str) -> io::Result<()> {
    std::fs::create_dir_all(links)?;
    for (number, layer) in layers.iter().enumerate() {
        std::os::unix::fs::symlink(layer, links.join(number.to_string()))?;
    }
    let numbers: Vec<String> = (0..layers.len()).map(|number| number.to_string()).collect();
    std::env::set_current_dir(links)?;
    sys::mount("overlay", place, "overlay", flags, &format!("lowerdir={}{more}", numbers.join(":")))?;
    std::env::set_current_dir("/")?;
    std::fs::remove_dir_all(links)
}

fn kernel_mounts(root: BorrowedFd<'_>) -> Result<(), String> {
    let closed = MS_NOSUID | MS_NOEXEC | MS_NODEV;
    for (path, kind, flags, data) in [
        ("/proc", "proc", closed, ""),
        // Devices work here until `devices` has made its own.
        ("/dev", "tmpfs", MS_NOSUID, "mode=755,size=65536k"),
        ("/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        ("/dev/mqueue", "mqueue", closed, ""),
        ("/sys", "sysfs", closed | MS_RDONLY, ""),
    ] {
        let mounted = own(root, path, false).and_then(|target| sys::mount(kind, place(&target), kind, flags, data));
        told(&format!("mount {path}"), mounted)?;
    }
    let shared = own(root, "/dev/shm", false)
        .and_then(|target| bind(root, Path::new(view::SHM), &target, NOSUID | NODEV | NOEXEC));
    told("mount /dev/shm", shared)?;
    cgroups(root, closed | MS_RDONLY)
}

/// The container's own view of its cgroups, read-only.
fn cgroups(root: BorrowedFd<'_>, flags: libc::c_ulong) -> Result<(), String> {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        let mounted =
            own(root, "/sys/fs/cgroup", false).and_then(|t| sys::mount("cgroup", place(&t), "cgroup2", flags, ""));
        return told("mount /sys/fs/cgroup", mounted);
    }
    let top = told("mount /sys/fs/cgroup", own(root, "/sys/fs/cgroup", false))?;
    let closed = flags & !MS_RDONLY;
    told("mount /sys/fs/cgroup", sys::mount("tmpfs", place(&top), "tmpfs", closed, "mode=755,size=64k"))?;
    for name in ["memory", "cpu", "cpuacct", "pids"] {
        // Hosts mount hierarchies together as they like; what cannot be mounted alone is left out.
        if let Ok(target) = own(root, &format!("/sys/fs/cgroup/{name}"), false) {
            let _ = sys::mount("cgroup", place(&target), "cgroup", flags, name);
        }
    }
    let top = told("mount /sys/fs/cgroup", own(root, "/sys/fs/cgroup", false))?;
    told("close /sys/fs/cgroup", sys::close_mount(top.as_fd(), RDONLY, false))
}

/// Device nodes of the container's own: their modes and owners are its to change, and no other container's. Each is mounted
/// on itself, and what is around them is closed to devices afterwards.
fn devices(root: BorrowedFd<'_>) -> Result<(), String> {
    let dev = told("open /dev", own(root, "/dev", false))?;
    for (name, major, minor) in DEVICES {
        let open = || sys::openat2(dev.as_fd(), Path::new(name), libc::O_PATH, IN_ROOT | NO_SYMLINKS);
        let made = sys::device(dev.as_fd(), name, major, minor).and_then(|()| {
            let mount = sys::clone_mount(dev.as_fd(), Path::new(name), false)?;
            sys::close_mount(mount.as_fd(), NOEXEC, false)?;
            sys::attach_mount(mount.as_fd(), open()?.as_fd())
        });
        told(&format!("make /dev/{name}"), made)?;
    }
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
    told("close /dev", sys::close_mount(dev.as_fd(), NODEV | NOEXEC, false))
}

/// No volume has a mount within itself, and each is shown by itself alone: read-only is read-only all the way down.
fn volumes(config: &AgentConfig, container: &AgentContainer, dir: &Path, root: BorrowedFd<'_>) -> Result<(), Failure> {
    for mount in &container.mounts {
        let Some(volume) = config.volumes.iter().find(|volume| volume.name == mount.volume) else {
            return Err(Failure::Start(format!("volume \"{}\" does not exist", mount.volume)));
        };
        let read_only = mount.read_only || volumes::is_read_only(volume);
        // Programs of a foreign image are not the container's.
        let foreign = if volume.layers.is_empty() { 0 } else { NOEXEC };
        let attributes = NOSUID | NODEV | foreign | if read_only { RDONLY } else { 0 };
        let shown = volumes::open(dir, volume, mount).map_err(|error| {
            let path = mount.sub_path.as_deref().unwrap_or_default();
            let (volume, container) = (&mount.volume, &container.name);
            Failure::Config(format!(
                "failed to prepare subPath \"{path}\" for volumeMount \"{volume}\" of container \"{container}\": {error}"
            ))
        })?;
        let bound = std::fs::metadata(place(&shown))
            .and_then(|meta| target(root, Path::new(&mount.path), !meta.is_dir(), IN_ROOT))
            .and_then(|target| attach(root, clone_of(&shown)?, &target, attributes));
        told(&format!("mount volume \"{}\" at {}", mount.volume, mount.path), bound)?;
    }
    Ok(())
}

fn mask(root: BorrowedFd<'_>) -> Result<(), String> {
    let find = |path: &str| match sys::openat2(root, Path::new(path), libc::O_PATH, IN_ROOT | NO_SYMLINKS) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        found => found.map(Some),
    };
    // All hidden directories are one empty one.
    let mut empty = None;
    let mut hide = |path: &str| -> io::Result<()> {
        let Some(target) = find(path)? else { return Ok(()) };
        if !std::fs::metadata(place(&target))?.is_dir() {
            let null = sys::clone_mount(root, Path::new("dev/null"), false)?;
            return sys::attach_mount(null.as_fd(), target.as_fd());
        }
        match &empty {
            Some(empty) => sys::attach_mount(clone_of(empty)?.as_fd(), target.as_fd()),
            None => {
                let flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC;
                sys::mount("tmpfs", place(&target), "tmpfs", flags, "size=0,mode=555")?;
                empty = find(path)?;
                Ok(())
            }
        }
    };
    MASKED.iter().try_for_each(|path| told(&format!("mask {path}"), hide(path)))?;
    let close = |path: &str| -> io::Result<()> {
        let Some(target) = find(path)? else { return Ok(()) };
        let mount = sys::clone_mount(target.as_fd(), Path::new(""), true)?;
        sys::close_mount(mount.as_fd(), RDONLY | NOSUID | NODEV | NOEXEC, true)?;
        sys::attach_mount(mount.as_fd(), target.as_fd())
    };
    READ_ONLY.iter().try_for_each(|path| told(&format!("close {path}"), close(path)))
}

fn clone_of(mounted: &OwnedFd) -> io::Result<OwnedFd> {
    sys::clone_mount(mounted.as_fd(), Path::new(""), false)
}

/// Shows `source`, a path of the agent's, at a place of the container's.
fn bind(root: BorrowedFd<'_>, source: &Path, target: &OwnedFd, attributes: u64) -> io::Result<()> {
    attach(root, sys::clone_mount(root, source, false)?, target, attributes)
}

/// Puts a mount to a place of the container's. What the kernel shows of itself is never covered: its files are how the
/// container is held.
fn attach(root: BorrowedFd<'_>, mount: OwnedFd, target: &OwnedFd, attributes: u64) -> io::Result<()> {
    let at_root = {
        use std::os::unix::fs::MetadataExt;
        let (root, target) = (std::fs::metadata(format!("/proc/self/fd/{}", root.as_raw_fd()))?, place(target));
        let target = std::fs::metadata(target)?;
        (root.dev(), root.ino()) == (target.dev(), target.ino())
    };
    let kernels = matches!(sys::filesystem(target.as_fd())?, libc::PROC_SUPER_MAGIC | libc::SYSFS_MAGIC);
    if at_root || kernels {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "nothing may be mounted there"));
    }
    sys::close_mount(mount.as_fd(), attributes, false)?;
    sys::attach_mount(mount.as_fd(), target.as_fd())
}

fn place(target: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", target.as_raw_fd()))
}

/// A place that the kernel's mounts go to: no link of the image may stand in for it.
fn own(root: BorrowedFd<'_>, path: &str, file: bool) -> io::Result<OwnedFd> {
    target(root, Path::new(path), file, IN_ROOT | NO_SYMLINKS)
}

/// Opens `path` inside the root, making what is missing: directories on the way, and a directory or file at the end. Links
/// are followed within the root, also those that lead to what is not there yet.
fn target(root: BorrowedFd<'_>, path: &Path, file: bool, resolve: u64) -> io::Result<OwnedFd> {
    if let Ok(found) = sys::openat2(root, path, libc::O_PATH, resolve) {
        return Ok(found);
    }
    let names = |path: &Path| -> Vec<PathBuf> {
        let named = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::ParentDir);
        path.components().rev().filter(|part| named(*part)).map(|part| PathBuf::from(part.as_os_str())).collect()
    };
    // `at` holds no links, so that its parent is the directory before it.
    let (mut at, mut left, mut links) = (PathBuf::from("/"), names(path), 0);
    while let Some(name) = left.pop() {
        if name == Path::new("..") {
            at.pop();
            continue;
        }
        let next = at.join(&name);
        match sys::openat2(root, &next, libc::O_PATH | libc::O_NOFOLLOW, IN_ROOT) {
            Ok(found) => {
                // Only a link can be read.
                let Ok(leads_to) = sys::read_link(found.as_fd()) else {
                    at = next;
                    continue;
                };
                links += 1;
                if links > 40 || resolve & NO_SYMLINKS != 0 {
                    return Err(io::Error::from_raw_os_error(libc::ELOOP));
                }
                if leads_to.is_absolute() {
                    at = PathBuf::from("/");
                }
                left.extend(names(&leads_to));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = sys::openat2(root, &at, libc::O_PATH | libc::O_DIRECTORY, IN_ROOT | NO_SYMLINKS)?;
                match left.is_empty() && file {
                    true => drop(sys::touchat(parent.as_fd(), &name)?),
                    false => sys::mkdirat(parent.as_fd(), &name)?,
                }
                at = next;
            }
            Err(error) => return Err(error),
        }
    }
    sys::openat2(root, &at, libc::O_PATH, IN_ROOT | NO_SYMLINKS)
}
