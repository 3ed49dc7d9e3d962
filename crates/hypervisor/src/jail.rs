//! Starting a monitor in its jail, through the program that makes it (`joey-agent jail`), and knowing it again: its user and its files.

use std::fs::File;
use std::io::{self, PipeReader};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use joey_api::vmm::{Giving, Interface, Jail, Order};
use joey_process::Process;
use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;
use tokio::process::Child;

/// How long making a jail may take. It takes milliseconds; this bounds a host in trouble.
const LIMIT: Duration = Duration::from_secs(20);
/// How long a start has the processors before the next one is prepared for.
const AFTER: Duration = Duration::from_millis(300);
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
    async fn start(&self, jail: Jail, descriptors: &[BorrowedFd<'_>], errors: &Path) -> io::Result<Started>;
}

/// A monitor that was started.
pub struct Started {
    pub process: Process,
    /// The machine's interface, where the jail gives it back.
    pub tap: Option<OwnedFd>,
}

/// The program that makes jails. One of it waits for the next order, so that who gives that one does not wait until it is there.
#[derive(Debug, Clone)]
pub struct Jailer {
    /// `joey-agent`
    program: PathBuf,
    waiting: Arc<Mutex<Option<Called>>>,
}

/// One that waits for an order; it ends with this.
#[derive(Debug)]
struct Called {
    process: Child,
    orders: OwnedFd,
    /// What it says for people, and the monitor after it.
    said: PipeReader,
}

impl Called {
    fn new(program: &Path) -> io::Result<Self> {
        let (orders, far) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let (said, log) = std::io::pipe()?;
        let mut command = tokio::process::Command::new(program);
        command.arg0("joey-agent").arg("jail").env_clear();
        command.stdin(Stdio::from(far)).stdout(Stdio::piped()).stderr(log).kill_on_drop(true);
        Ok(Self { process: command.spawn()?, orders, said })
    }

    /// Tells it what is to be done.
    fn tell(&self, order: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        for descriptor in descriptors {
            send(self.orders.as_fd(), b"fd", Some(*descriptor))?;
        }
        send(self.orders.as_fd(), order, None)
    }
}

impl Jailer {
    pub fn new(program: PathBuf) -> Self {
        Self { program, waiting: Arc::default() }
    }

    fn waiting(&self) -> MutexGuard<'_, Option<Called>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has an order done, to which these descriptors belong; `errors` gets what is said for people. The socket that it went by.
    async fn order(&self, order: &Order, descriptors: &[BorrowedFd<'_>], errors: Option<&Path>) -> io::Result<OwnedFd> {
        let (message, log) = (serde_json::to_vec(order)?, errors.map(log).transpose()?);
        let waiting = self.waiting().take();
        let mut called = match waiting {
            // It may have ended meanwhile.
            Some(called) if called.tell(&message, descriptors).is_ok() => called,
            _ => {
                let called = Called::new(&self.program)?;
                called.tell(&message, descriptors)?;
                called
            }
        };
        if let Some(log) = log {
            keep(called.said.into(), log)?;
        }
        let words = async {
            let mut words = String::new();
            if let Some(out) = called.process.stdout.take() {
                out.take(WORDS).read_to_string(&mut words).await?;
            }
            called.process.wait().await.map(|status| (words, status))
        };
        let told = tokio::time::timeout(LIMIT, words).await;
        let (words, status) = told.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        self.call_ahead();
        match words.trim() {
            "" if status.success() => Ok(called.orders),
            "" => Err(io::Error::other(format!("the program that makes jails ended: {status}"))),
            words => Err(io::Error::other(words.to_owned())),
        }
    }

    /// Has one wait for the next order, when the processors have done what the last one was about.
    pub(crate) fn call_ahead(&self) {
        let jailer = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(AFTER).await;
            let is_there = jailer.waiting().is_some();
            // Where it cannot be called now, whoever has an order calls it.
            if !is_there && let Ok(called) = Called::new(&jailer.program) {
                jailer.waiting().replace(called);
            }
        });
    }

    /// Gives a monitor that runs what its machine gets from outside of it.
    pub(crate) async fn give(&self, giving: Giving, process: &Process) -> io::Result<()> {
        let namespace = File::open(format!("/proc/{}/ns/net", giving.pid))?;
        // The number was its own when the file was opened if it still is.
        if !process.is_there() {
            return Err(io::Error::other("the monitor has ended"));
        }
        self.order(&Order::Give(giving), &[namespace.as_fd()], None).await.map(drop)
    }
}

#[async_trait]
impl Starter for Jailer {
    async fn start(&self, jail: Jail, descriptors: &[BorrowedFd<'_>], errors: &Path) -> io::Result<Started> {
        let (record, is_returned) =
            (jail.record.clone(), jail.interface == Interface::Returned && jail.netns.is_some());
        let orders = self.order(&Order::Start(Box::new(jail)), descriptors, Some(errors)).await.inspect_err(|_| {
            // Who was to start it may have ended right after that.
            if let Ok(Some(process)) = Process::recorded(&record) {
                process.kill();
            }
        })?;
        let process = Process::recorded(&record)?.ok_or_else(|| io::Error::other(last_words(errors)))?;
        let tap = match is_returned {
            true => received(orders.as_fd()).inspect_err(|_| process.kill())?,
            false => None,
        };
        Ok(Started { process, tap })
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

/// Where what is said is kept.
fn log(errors: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().create(true).append(true).mode(0o600).open(errors)
}

/// Keeps the first of what is said, and lets the rest go: who says it may be hostile. A monitor goes on when nobody listens any more.
fn keep(said: OwnedFd, mut log: File) -> io::Result<()> {
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
