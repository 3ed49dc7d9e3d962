//! System calls that the standard library does not have, each as a safe function.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Opens `path` with `dir` as the root of all its links, and through no link of /proc (openat2(2): RESOLVE_IN_ROOT,
/// RESOLVE_NO_MAGICLINKS).
pub(crate) fn open_in_root(dir: BorrowedFd<'_>, path: &Path, flags: libc::c_int) -> io::Result<File> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let how: [u64; 3] = [(flags | libc::O_CLOEXEC) as u64, 0, 0x10 | 0x02];
    // SAFETY: the three words are `struct open_how`; path and structure live through the call.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_openat2, dir.as_raw_fd(), path.as_ptr(), how.as_ptr(), std::mem::size_of_val(&how))
    })?;
    // SAFETY: a new descriptor that belongs to nobody else.
    Ok(unsafe { File::from_raw_fd(fd as RawFd) })
}

/// The type of the file system that an open file is on, as in statfs(2).
pub(crate) fn filesystem(file: &File) -> io::Result<i64> {
    // SAFETY: the zeroed structure lives through the call, which fills it.
    unsafe {
        let mut found: libc::statfs = std::mem::zeroed();
        check(libc::fstatfs(file.as_raw_fd(), &mut found).into())?;
        Ok(found.f_type as i64)
    }
}

/// The number of the mount by which a file was opened, as in proc_pid_fdinfo(5).
pub(crate) fn mount(file: &impl AsRawFd) -> io::Result<u64> {
    let told = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let number = told.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    number.and_then(|number| number.trim().parse().ok()).ok_or_else(|| io::Error::other("a file without a mount"))
}

/// Where in a file there is something from `from` on; `None`: nowhere.
pub(crate) fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    let from = i64::try_from(from).map_err(io::Error::other)?;
    // SAFETY: an open descriptor and integers.
    match check(unsafe { libc::lseek(file.as_raw_fd(), from, libc::SEEK_DATA) }) {
        Ok(at) => Ok(Some(at as u64)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}
