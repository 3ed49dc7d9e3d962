//! Further layers for a sandbox that runs: its agent sees nothing of the host but what it was shown, so that they are mounted
//! into its mount namespace from here.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns, unshare};

/// Shows `layers`, mounted on this host, at the same paths to the process `pid`. What is shown already stays.
pub(super) fn show(pid: u32, layers: Vec<PathBuf>) -> io::Result<()> {
    // A thread of its own: it never comes back out of the namespace that it enters.
    let shown = std::thread::Builder::new().name("layers".to_owned()).spawn(move || enter_and_mount(pid, &layers))?;
    shown.join().map_err(|_| io::Error::other("the thread that mounts layers has panicked"))?
}

fn enter_and_mount(pid: u32, layers: &[PathBuf]) -> io::Result<()> {
    let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
    let mounts = layers.iter().map(|layer| Ok((open_tree(layer)?, layer))).collect::<io::Result<Vec<_>>>()?;
    unshare(CloneFlags::CLONE_FS)?;
    setns(namespace.as_fd(), CloneFlags::CLONE_NEWNS)?;
    for (mount, place) in mounts {
        let known = std::fs::read_dir(place).is_ok_and(|mut entries| entries.next().is_some());
        if !known {
            std::fs::create_dir_all(place)?;
            move_mount(&mount, place)?;
        }
    }
    Ok(())
}

fn c(path: &Path) -> io::Result<std::ffi::CString> {
    std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// A new mount, attached nowhere, that shows what is at `path`.
fn open_tree(path: &Path) -> io::Result<OwnedFd> {
    let path = c(path)?;
    // OPEN_TREE_CLONE is 1.
    let flags = 1 | libc::O_CLOEXEC;
    // SAFETY: a C string that lives through the call, and integers.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    match i32::try_from(fd) {
        // SAFETY: a new descriptor that belongs to nobody else.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn move_mount(mount: &OwnedFd, place: &Path) -> io::Result<()> {
    let place = c(place)?;
    // MOVE_MOUNT_F_EMPTY_PATH is 4.
    let (fd, empty, flags) = (mount.as_raw_fd(), c"".as_ptr(), 4);
    // SAFETY: an open descriptor and C strings that live through the call.
    let done = unsafe { libc::syscall(libc::SYS_move_mount, fd, empty, libc::AT_FDCWD, place.as_ptr(), flags) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
