//! Starting a monitor in its jail, through the program that makes it (`joey-agent vmm`), and knowing it again: its user and its files.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use joey_api::vmm::{Giving, Interface, Jail};
use joey_process::Process;
use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;

/// How long making a jail may take. It takes milliseconds; this bounds a host in trouble.
const LIMIT: Duration = Duration::from_secs(20);
/// Bytes of what is told when it fails.
const WORDS: u64 = 4096;
/// Bytes that are kept of what a monitor says for people.
const KEPT: usize = 16 << 10;

/// The first of the users that monitors run as; 24 bits of the machine's name are added.
const FIRST_USER: u32 = 0x6a00_0000;

/// What starts a monitor's process.
#[async_trait]
pub trait Starter: Send + Sync {
    /// Starts it in its jail with these descriptors; `errors` gets what is said for people. After an error there is no process.
    async fn start(&self, jail: &Jail, descriptors: &[BorrowedFd<'_>], errors: &Path) -> io::Result<Started>;
}

/// A monitor that was started.
pub struct Started {
    pub process: Process,
    /// The machine's interface, where the jail gives it back.
    pub tap: Option<OwnedFd>,
}

/// The program that makes jails.
#[derive(Debug, Clone)]
pub struct Jailer {
    /// `joey-agent`
    pub program: PathBuf,
}

#[async_trait]
impl Starter for Jailer {
    async fn start(&self, jail: &Jail, descriptors: &[BorrowedFd<'_>], errors: &Path) -> io::Result<Started> {
        start(&self.program, jail, descriptors, errors).await
    }
}

pub(crate) fn record_of(dir: &Path) -> PathBuf {
    dir.join("vmm.pid")
}

pub(crate) fn errors_of(dir: &Path) -> PathBuf {
    dir.join("vmm.err")
}

/// The user of a machine's monitor: nobody else's on a host, as far as 24 bits can tell.
pub(crate) fn user_of(name: &str) -> u32 {
    let hash = Sha256::digest(name);
    FIRST_USER | u32::from_be_bytes([0, hash[0], hash[1], hash[2]])
}

/// Gives a monitor that runs what its machine gets from outside of it.
pub(crate) async fn give(starter: &Path, order: &Giving, process: &Process) -> io::Result<()> {
    let namespace = std::fs::File::open(format!("/proc/{}/ns/net", order.pid))?;
    // The number was its own when the file was opened if it still is.
    if !process.is_there() {
        return Err(io::Error::other("the monitor has ended"));
    }
    let message = serde_json::to_vec(order)?;
    let (near, far) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let mut command = tokio::process::Command::new(starter);
    command.arg0("joey-agent").arg("give").env_clear();
    command.stdin(Stdio::from(far)).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let child = command.spawn()?;
    drop(command);
    send(near.as_fd(), b"fd", Some(namespace.as_fd()))?;
    send(near.as_fd(), &message, None)?;
    let told = tokio::time::timeout(LIMIT, child.wait_with_output()).await;
    let told = told.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    match told.status.success() {
        true => Ok(()),
        false => Err(io::Error::other(String::from_utf8_lossy(&told.stdout).trim().to_owned())),
    }
}

/// Starts the monitor with these descriptors. `starter` is the program; `errors` gets what both say for people.
pub(crate) async fn start(
    starter: &Path,
    jail: &Jail,
    descriptors: &[BorrowedFd<'_>],
    errors: &Path,
) -> io::Result<Started> {
    let message = serde_json::to_vec(jail)?;
    let (near, far) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let (said, log) = std::io::pipe()?;
    keep(said.into(), errors)?;
    let mut command = tokio::process::Command::new(starter);
    command.arg0("joey-agent").arg("vmm").env_clear();
    command.stdin(Stdio::from(far)).stdout(Stdio::piped()).stderr(log).kill_on_drop(true);
    let mut child = command.spawn()?;
    drop(command);
    for descriptor in descriptors {
        send(near.as_fd(), b"fd", Some(*descriptor))?;
    }
    send(near.as_fd(), &message, None)?;
    let words = async {
        let mut words = String::new();
        if let Some(out) = child.stdout.take() {
            out.take(WORDS).read_to_string(&mut words).await?;
        }
        child.wait().await.map(|_| words)
    };
    let words = tokio::time::timeout(LIMIT, words).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if !words.trim().is_empty() {
        return Err(io::Error::other(words.trim().to_owned()));
    }
    let process = Process::recorded(&jail.record)?.ok_or_else(|| io::Error::other(last_words(errors)))?;
    let tap = match jail.interface == Interface::Returned && jail.netns.is_some() {
        true => received(near.as_fd()).inspect_err(|_| process.kill())?,
        false => None,
    };
    Ok(Started { process, tap })
}

/// The descriptor that came back; it was sent before the monitor's process was there.
fn received(socket: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let (mut bytes, mut control) = ([0; 16], cmsg_space!([RawFd; 1]));
    let mut parts = [io::IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let descriptor = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
        _ => None,
    });
    // SAFETY: the descriptor has just arrived and belongs to nobody else.
    Ok(descriptor.map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor) }))
}

/// Keeps the first of what is said, and lets the rest go: who says it may be hostile. A monitor goes on when nobody listens any more.
fn keep(said: OwnedFd, errors: &Path) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut log = std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(errors)?;
    let mut said = tokio::net::unix::pipe::Receiver::from_owned_fd(said)?;
    tokio::spawn(async move {
        let (mut buffer, mut left) = (vec![0; 1024], KEPT);
        while let Ok(count) = said.read(&mut buffer).await {
            if count == 0 {
                return;
            }
            let kept = count.min(left);
            left -= kept;
            // Where the directory is gone nobody reads it.
            let _ = std::io::Write::write_all(&mut log, &buffer[..kept]);
        }
    });
    Ok(())
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let raw = descriptor.map(|fd| [fd.as_raw_fd()]);
    let control: Vec<ControlMessage<'_>> = raw.iter().map(|fds| ControlMessage::ScmRights(fds)).collect();
    let parts = [io::IoSlice::new(bytes)];
    sendmsg::<()>(socket.as_raw_fd(), &parts, &control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// The end of what a monitor wrote for people.
pub(crate) fn last_words(errors: &Path) -> String {
    let bytes = std::fs::read(errors).unwrap_or_default();
    let tail = &bytes[bytes.len().saturating_sub(1024)..];
    match String::from_utf8_lossy(tail).trim() {
        "" => "it ended without a word".to_owned(),
        words => words.to_owned(),
    }
}

/// A socket at a path, to be listened at by a monitor that never sees the path.
pub(crate) fn listener(path: &Path) -> io::Result<OwnedFd> {
    let listener = joey_rpc::bind_unix(path)?;
    // The monitor's own affair.
    listener.set_nonblocking(false)?;
    Ok(listener.into())
}
