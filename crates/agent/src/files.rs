//! Files out of a container and into it, as tar, whatever its image holds.
//!
//! A child of the agent does the work inside the container's mount namespace, whose root is the container's: no path and no link
//! leads out of it. The container does not see the child, and the child may do no more than root of the container with its files.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;

use bytes::Bytes;
use futures::StreamExt;
use http::{Response, StatusCode};
use hyper::body::Incoming;
use joey_archive::{Wrong, pack, unpack};
use joey_model::{ErrorKind, Fault};
use joey_rpc::{Body, empty_answer, into_stream};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::identity::{Identity, become_identity, capability_bits};
use crate::life::Life;
use crate::stream::Pipe;
use crate::supervisor::Agent;
use crate::{launch, sys};

/// Enough to read and write the files of every user.
const CAPABILITIES: [&str; 4] = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID"];
/// Bytes read at once.
const PART: usize = 32 << 10;

fn fault(words: &[u8]) -> Fault {
    let text = String::from_utf8_lossy(words.get(1..).unwrap_or_default()).into_owned();
    match words.first() {
        Some(b'm') => Fault::new(ErrorKind::NotFound, "NoSuchFile", text),
        Some(_) => Fault::new(ErrorKind::Invalid, "FilesNotCopied", text),
        None => Fault::new(ErrorKind::Retryable, "FilesNotCopied", "copying was broken off"),
    }
}

/// The archive of what is at `path`.
pub async fn read(agent: &Agent, life: &Life, path: &str) -> Result<Response<Body>, Fault> {
    let path = absolute(path)?;
    let (reader, writer) = io::pipe().map_err(host)?;
    let mut child = Child::start(agent, life, writer.as_fd().as_raw_fd(), move || {
        let from = path.clone();
        pack(io::BufWriter::with_capacity(PART, File::from(OwnedFd::from(writer))), &from)
    })?;
    let pipe = Pipe::reader(reader.into()).map_err(host)?;
    let mut first = vec![0; PART];
    let count = pipe.read(&mut first).await.map_err(host)?;
    first.truncate(count);
    if count == 0 {
        child.ended().await?;
    }
    let (to, answer) = super::server::answers();
    tokio::spawn(async move {
        let mut part = first;
        while !part.is_empty() && to.send(Ok(Bytes::from(part))).await.is_ok() {
            part = vec![0; PART];
            let count = pipe.read(&mut part).await.unwrap_or(0);
            part.truncate(count);
        }
        // A caller that went away ends the child, which writes to nobody any more.
        drop(pipe);
        if count > 0
            && let Err(fault) = child.ended().await
        {
            let _ = to.send(Err(io::Error::other(fault.message))).await;
        }
    });
    Ok(answer)
}

/// Unpacks the archive that the caller sends.
pub async fn write(agent: &Agent, life: &Life, path: &str, body: Incoming) -> Result<Response<Body>, Fault> {
    let into_directory = path.ends_with('/');
    let path = absolute(path)?;
    let (reader, writer) = io::pipe().map_err(host)?;
    let mut child = Child::start(agent, life, reader.as_fd().as_raw_fd(), move || {
        unpack(io::BufReader::with_capacity(PART, File::from(OwnedFd::from(reader))), &path, into_directory)
    })?;
    let pipe = Pipe::writer(writer.into()).map_err(host)?;
    let mut body = into_stream(body);
    while let Some(part) = body.next().await {
        let Ok(part) = part else {
            child.kill();
            let _ = child.ended().await;
            return Err(fault(b""));
        };
        if pipe.write_all(&part).await.is_err() {
            // It has ended and says why.
            break;
        }
    }
    drop(pipe);
    child.ended().await?;
    Ok(empty_answer(StatusCode::NO_CONTENT))
}

fn host(error: io::Error) -> Fault {
    Fault::new(ErrorKind::Internal, "FilesNotCopied", format!("files cannot be copied: {error}"))
}

fn absolute(path: &str) -> Result<PathBuf, Fault> {
    match path.starts_with('/') && !path.contains('\0') {
        true => Ok(PathBuf::from(path)),
        false => {
            let message = format!("path \"{path}\" must begin with a slash");
            Err(Fault::new(ErrorKind::Invalid, "InvalidPath", message))
        }
    }
}

/// The process that does the work.
struct Child {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    words: Option<Pipe>,
}

impl Child {
    /// Starts `work` in the container; it keeps the descriptor `kept`.
    fn start(agent: &Agent, life: &Life, kept: i32, work: impl FnOnce() -> Result<(), Wrong>) -> Result<Self, Fault> {
        let gone = || Fault::new(ErrorKind::Conflict, "ContainerNotRunning", "container is not running");
        let init = life.running().ok_or_else(gone)?;
        let cgroup = agent.cgroup_of(&life.container().name);
        let mounts = File::open(format!("/proc/{init}/ns/mnt")).map_err(|_| gone())?;
        let entrance = cgroup.entrance().map_err(host)?;
        let root = agent.apart.as_ref().and_then(|apart| apart.root(init));
        let (words, said) = io::pipe().map_err(host)?;
        match sys::clone(0, entrance.as_ref().map(File::as_fd)).map_err(host)? {
            sys::Cloned::Child => {
                let entered = sys::close_all_but(&[kept, mounts.as_raw_fd(), said.as_raw_fd()]).and_then(|()| {
                    if entrance.is_none() {
                        cgroup.join()?;
                    }
                    sys::setns(mounts.as_fd(), libc::CLONE_NEWNS)?;
                    if let Some(root) = root {
                        // What the host sees of a container that is apart: its root is below the agent's.
                        std::env::set_current_dir(root)?;
                        std::os::unix::fs::chroot(".")?;
                    }
                    let names = CAPABILITIES.map(str::to_owned);
                    let root = Identity { uid: 0, gid: 0, groups: Vec::new(), home: String::new() };
                    become_identity(&root, capability_bits(&names))
                });
                let done = match entered {
                    // A panic must not run on into the copy of the agent that this process is.
                    Ok(()) => std::panic::catch_unwind(AssertUnwindSafe(work))
                        .unwrap_or_else(|_| Err(Wrong::Other("the archive cannot be worked on".to_owned()))),
                    Err(error) => Err(Wrong::Other(format!("cannot enter the container: {error}"))),
                };
                if let Err(wrong) = &done {
                    let bytes = wrong.to_bytes();
                    let _ = File::from(OwnedFd::from(said)).write_all(&bytes[..bytes.len().min(2048)]);
                }
                sys::exit_now(i32::from(done.is_err()))
            }
            sys::Cloned::Parent { pid, pidfd } => {
                drop((work, said));
                sys::set_nonblocking(pidfd.as_fd()).map_err(host)?;
                // SAFETY: an OwnedFd names the same open descriptor for as long as it lives.
                let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
                let pidfd = pidfd.map_err(|error| host(io::Error::from(error)))?;
                Ok(Self { pid, pidfd, words: Pipe::reader(words.into()).ok() })
            }
        }
    }

    fn kill(&self) {
        let _ = sys::kill(self.pid, libc::SIGKILL);
    }

    /// Waits for the end of the work.
    async fn ended(&mut self) -> Result<(), Fault> {
        let mut words = vec![0; 2048];
        let count = match self.words.take() {
            Some(pipe) => pipe.read(&mut words).await.unwrap_or(0),
            None => 0,
        };
        match launch::ended(&self.pidfd, self.pid).await {
            (0, _) => Ok(()),
            _ => Err(fault(&words[..count])),
        }
    }
}
