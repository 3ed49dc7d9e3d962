//! What servers of NFS have, mounted by the machine's kernel: in a process of its own, since a server that is not there keeps who asks
//! waiting, and who waits can be ended.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use joey_api::agent::AgentNfs;
use joey_kernel::sys;
use libc::{MS_NODEV, MS_NOSUID, MS_RDONLY};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;

/// Where servers listen (RFC 7530, 3.1).
const PORT: u16 = 2049;
/// How long a server may take to take a connection, and then to answer all that a mount asks.
const CONNECT: Duration = Duration::from_secs(5);
const MOUNT: Duration = Duration::from_secs(15);
/// How long the rest of what was written may take to reach the server at the end.
const UNMOUNT: Duration = Duration::from_secs(1);
/// From the newest on, without 4.2: nfs-ganesha 4.3 answers its READ_PLUS, which kernels ask for then, with zeros.
const VERSIONS: [&str; 2] = ["4.1", "4.0"];

/// Whether something is mounted there.
pub fn is_mounted(place: &Path) -> bool {
    let device = |place: &Path| std::fs::metadata(place).map(|meta| meta.dev()).ok();
    device(place) != place.parent().and_then(device)
}

/// Mounts it; the error says what a person can do something about.
pub async fn mount(nfs: &AgentNfs, place: &Path) -> io::Result<()> {
    let asked = tokio::time::timeout(CONNECT, TcpStream::connect((nfs.address, PORT))).await;
    let asked = asked.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
    let own = asked?.local_addr()?.ip();
    let source = format!("{}:{}", nfs.server, nfs.path);
    let flags = MS_NOSUID | MS_NODEV | if nfs.read_only { MS_RDONLY } else { 0 };
    let mount = || {
        let mut failed = io::Error::from_raw_os_error(libc::EPROTONOSUPPORT);
        for version in VERSIONS {
            let options = format!("vers={version},addr={},clientaddr={own},proto=tcp,hard,sec=sys", nfs.address);
            match sys::mount(&source, place, "nfs4", flags, &options) {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::EINVAL)) => {
                    failed = error
                }
                done => return done,
            }
        }
        Err(failed)
    };
    apart(mount, MOUNT).await
}

/// Unmounts it when everything that was written has reached the server, or when there is no time left for that.
pub async fn unmount(place: &Path) {
    let unmount = |flags| {
        let path = sys::c(place)?;
        // SAFETY: a C string that lives through the call, and an integer.
        sys::check(unsafe { libc::umount2(path.as_ptr(), flags) }.into()).map(drop)
    };
    if apart(|| unmount(0), UNMOUNT).await.is_err() {
        let _ = unmount(libc::MNT_FORCE | libc::MNT_DETACH);
    }
}

/// Does it in a child, which is ended after so long.
async fn apart(work: impl FnOnce() -> io::Result<()>, limit: Duration) -> io::Result<()> {
    let (pid, pidfd) = match sys::clone(0, None)? {
        sys::Cloned::Parent { pid, pidfd } => {
            // SAFETY: an OwnedFd names the same open descriptor for as long as it lives.
            let watched = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
            (pid, watched.map_err(io::Error::from)?)
        }
        sys::Cloned::Child => {
            sys::default_signals();
            let code = work().map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0);
            sys::exit_now(code);
        }
    };
    let ended = async {
        loop {
            let mut ready = pidfd.readable().await?;
            match sys::reap(pid)? {
                Some((code, None)) => return Ok(code),
                Some((_, Some(_))) => return Ok(libc::EINTR),
                None => ready.clear_ready(),
            }
        }
    };
    let mut ended = std::pin::pin!(ended);
    let code: io::Result<i32> = match tokio::time::timeout(limit, &mut ended).await {
        Ok(code) => code,
        Err(_) => {
            let _ = sys::kill(pid, libc::SIGKILL);
            let _ = tokio::time::timeout(UNMOUNT, ended).await;
            Ok(libc::ETIMEDOUT)
        }
    };
    match code? {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}
