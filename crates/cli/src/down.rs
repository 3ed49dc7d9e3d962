//! `joey down`: ends a running `up`, every instance, and everything made outside the data directory.

use std::time::Duration;

use joey_model::Fault;
use joey_store::Op;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::failure::Failure;
use crate::roles::{HostRole, Lock, store};
use crate::settings::HostSettings;

/// How long a running `up` may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How long instances may take to end, killed at once.
const END_LIMIT: Duration = Duration::from_secs(120);

pub async fn down(settings: &HostSettings, purge: bool) -> Result<(), Failure> {
    let place = &settings.place;
    if !place.data_dir.exists() {
        println!("nothing to end: there is no {}", place.data_dir.display());
        return Ok(());
    }
    if let Some(holder) = Lock::holder(place) {
        stop(holder).await?;
    }
    let _lock = Lock::take(place)?;
    let host = HostRole::open(settings).await?;
    let ended = host.engine.len();
    host.engine.end_all(END_LIMIT).await?;
    forget_instances(settings).await?;
    host.network.down().await.map_err(Fault::from)?;
    host.images.unmount_all().await.map_err(Fault::from)?;
    for name in ["joey.sock", "kubeconfig"] {
        match std::fs::remove_file(place.file(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    // Shared with other data directories: it goes when it is empty.
    let _ = std::fs::remove_dir("/run/joey");
    if purge {
        std::fs::remove_dir_all(&place.data_dir)?;
    }
    let noun = if ended == 1 { "instance" } else { "instances" };
    println!("ended {ended} {noun}; nothing is left running");
    Ok(())
}

/// Stops the `up` that holds the directory; its pid is known by the lock it holds.
async fn stop(holder: i32) -> Result<(), Failure> {
    let pid = Pid::from_raw(holder);
    let watched = pidfd(holder)?;
    kill(pid, Signal::SIGTERM)
        .map_err(|error| Failure::new(format!("joey with pid {holder} cannot be stopped: {error}")))?;
    let ended = tokio::time::timeout(STOP_LIMIT, watched.readable()).await;
    match ended {
        Ok(_) => Ok(()),
        Err(_) => {
            Err(Failure::new(format!("joey with pid {holder} does not stop")).with_hint(format!("kill -9 {holder}")))
        }
    }
}

/// A descriptor that is readable once the process has ended.
fn pidfd(pid: i32) -> Result<tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>, Failure> {
    use std::os::fd::FromRawFd;
    // SAFETY: pidfd_open takes two integers and gives a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(std::io::Error::last_os_error)?;
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let fd = unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) };
    // SAFETY: an OwnedFd names the same open descriptor for as long as it lives.
    let watched = unsafe { tokio::io::unix::AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE) };
    Ok(watched.map_err(std::io::Error::from)?)
}

/// Removes the pool's records: a later `up` must not make the instances again.
async fn forget_instances(settings: &HostSettings) -> Result<(), Failure> {
    let store = store(&settings.place)?;
    loop {
        let found = store.range("/pool/", None, 256).await.map_err(Fault::from)?;
        let ops = found.entries.into_iter().map(|entry| Op::Delete { key: entry.key }).collect();
        store.transact(Vec::new(), ops).await.map_err(Fault::from)?;
        if !found.more {
            return Ok(());
        }
    }
}
