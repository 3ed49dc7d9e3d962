//! What the agent sees of the host's files: its own directory, the layers, /proc and the cgroups, on a small file system in
//! memory that also holds what it makes for all containers ([`ETC`], [`SHM`]). Nothing else is mounted in its namespace: a copy of
//! every mount of the host in every agent would grow with the square of the Pods, and each container begins with a copy of this.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use joey_api::agent::AgentConfig;

use crate::sys;

/// Where the containers' `hosts`, `resolv.conf` and `hostname` are.
pub const ETC: &str = "/etc";
/// Where the memory files that the containers share are.
pub const SHM: &str = "/shm";

/// Where the agent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// Beside the sandbox, on the host.
    Beside,
    /// The first process of a machine, which also finds disks that come later.
    Guest,
}

impl View {
    /// What of the kernel's is seen, and whether with what is mounted in it.
    fn of_kernel(self) -> &'static [(&'static str, bool)] {
        match self {
            Self::Beside => &[("/proc", false), ("/sys/fs/cgroup", true)],
            Self::Guest => &[("/proc", false), ("/sys", true), ("/dev", true)],
        }
    }
}

/// The layers that are there when a sandbox begins.
pub fn layers(config: &AgentConfig) -> BTreeSet<&str> {
    let of_containers = config.containers.iter().flat_map(|container| &container.layers);
    let of_volumes = config.volumes.iter().flat_map(|volume| &volume.layers);
    of_containers.chain(of_volumes).map(String::as_str).collect()
}

/// Leaves the other files behind; what stays keeps its path, and `files` are seen at the places beside them. The caller has a mount
/// namespace of its own.
pub fn narrow(dir: &Path, layers: BTreeSet<&str>, files: &[(&Path, &Path)], view: View) -> io::Result<()> {
    sys::mount("none", "/", "", libc::MS_REC | libc::MS_PRIVATE, "")?;
    let top = std::fs::File::open("/")?;
    // Before it is covered, and with what the host mounted in it.
    let own = sys::clone_mount(top.as_fd(), dir, true)?;
    // Any place will do: with the old root it goes out of sight.
    let base = dir;
    sys::mount("tmpfs", base, "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, "mode=755,size=4m")?;
    let place = |path: &Path| -> io::Result<std::fs::File> {
        let place: PathBuf = base.join(path.strip_prefix("/").unwrap_or(path));
        std::fs::create_dir_all(&place)?;
        std::fs::File::open(place)
    };
    sys::attach_mount(own.as_fd(), place(dir)?.as_fd())?;
    let of_kernel = view.of_kernel().iter().copied();
    for (path, recursive) in of_kernel.chain(layers.into_iter().map(|layer| (layer, false))) {
        let seen = sys::clone_mount(top.as_fd(), Path::new(path), recursive)?;
        sys::attach_mount(seen.as_fd(), place(Path::new(path))?.as_fd())?;
    }
    for (path, seen_at) in files {
        let file = base.join(seen_at.strip_prefix("/").unwrap_or(seen_at));
        file.parent().map_or(Ok(()), std::fs::create_dir_all)?;
        let seen = sys::clone_mount(top.as_fd(), path, false)?;
        sys::attach_mount(seen.as_fd(), std::fs::File::create(file)?.as_fd())?;
    }
    std::env::set_current_dir(base)?;
    drop(top);
    match view {
        View::Beside => sys::pivot_to_working_dir(),
        // The first file system of all cannot be left: it is covered.
        View::Guest => {
            sys::mount(".", "/", "", libc::MS_MOVE, "")?;
            std::os::unix::fs::chroot(".")?;
            std::env::set_current_dir("/")
        }
    }
}
