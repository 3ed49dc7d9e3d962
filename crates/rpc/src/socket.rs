//! Unix sockets at paths of any length. The kernel takes 107 bytes; longer paths go through `/proc/self/fd`.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

/// Longest path of a socket's address, in bytes (`sun_path` of unix(7), less its final zero).
const LONGEST: usize = 107;
/// `O_PATH`, as open(2) numbers it on every architecture Linux has.
const O_PATH: i32 = 0o10000000;

/// Connects to the socket at `path`.
pub async fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    let (_directory, short) = shorten(path)?;
    UnixStream::connect(short.as_deref().unwrap_or(path)).await
}

/// Listens at `path`, mode 0600, taking the place of a socket that nobody listens at any more.
///
/// Whoever calls this holds a lock of its own over the directory: a living listener is displaced too.
pub fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    UnixListener::from_std(bind_unix(path)?)
}

/// As [`listen_unix`], before there is a runtime to wait in.
pub fn bind_unix(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let (_directory, short) = shorten(path)?;
    let listener = std::os::unix::net::UnixListener::bind(short.as_deref().unwrap_or(path))?;
    listener.set_nonblocking(true)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// A short name of the same socket, and the open directory that keeps it true.
fn shorten(path: &Path) -> io::Result<(Option<File>, Option<PathBuf>)> {
    if path.as_os_str().len() <= LONGEST {
        return Ok((None, None));
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let directory = OpenOptions::new().read(true).custom_flags(O_PATH).open(parent)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    Ok((Some(directory), Some(short)))
}
