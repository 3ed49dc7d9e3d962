//! Sockets and files that a monitor made, opened by the host without going where the monitor would have it: no link is followed, and
//! what is not the monitor's own is not touched. The directories that lead there are the host's.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use tokio::net::UnixStream;

/// Connects to a socket of this user's.
pub(crate) async fn connect(path: &Path, owner: u32) -> io::Result<UnixStream> {
    let place = File::options().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)?;
    let found = place.metadata()?;
    if !found.file_type().is_socket() || found.uid() != owner {
        return Err(foreign(path));
    }
    // By the descriptor: the name may be another's by now.
    UnixStream::connect(PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()))).await
}

/// Opens a file of this user's to be read.
pub(crate) fn file(path: &Path, owner: u32) -> io::Result<File> {
    // What is no file may wait for somebody else to open it.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    let found = file.metadata()?;
    match found.file_type().is_file() && found.uid() == owner {
        true => Ok(file),
        false => Err(foreign(path)),
    }
}

/// Reads a file of this user's that is no longer than so many bytes.
pub(crate) fn read(path: &Path, owner: u32, longest: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file(path, owner)?.take(longest + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > longest {
        true => Err(io::Error::other(format!("{} has more than {longest} bytes", path.display()))),
        false => Ok(bytes),
    }
}

fn foreign(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, format!("{} is not the monitor's own", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn links_and_what_is_others_are_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let own = std::fs::metadata(dir.path()).unwrap().uid();
        let at = |name: &str| dir.path().join(name);
        let _listener = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        std::fs::write(at("file"), b"state").unwrap();
        std::os::unix::fs::symlink(at("socket"), at("to-socket")).unwrap();
        std::os::unix::fs::symlink(at("file"), at("to-file")).unwrap();
        assert!(connect(&at("socket"), own).await.is_ok());
        assert!(connect(&at("socket"), own + 1).await.is_err());
        assert!(connect(&at("to-socket"), own).await.is_err());
        assert!(connect(&at("file"), own).await.is_err());
        assert_eq!(read(&at("file"), own, 5).unwrap(), b"state");
        assert!(read(&at("file"), own, 4).is_err());
        assert!(read(&at("file"), own + 1, 5).is_err());
        assert!(file(&at("to-file"), own).is_err());
        assert!(file(dir.path(), own).is_err());
    }
}
