//! The agent's program as a sealed file in memory, which nobody can change any more.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// Copies the program and seals the copy against writing, growing and shrinking.
pub(super) fn sealed(program: &Path) -> io::Result<OwnedFd> {
    let mut source = File::open(program)?;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: a C string and flags.
    let fd = unsafe { libc::memfd_create(c"joey-agent".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that belongs to nobody else.
    let mut copy = unsafe { File::from_raw_fd(fd) };
    io::copy(&mut source, &mut copy)?;
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: fcntl with integers on an open descriptor.
    if unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(copy.into())
}
