//! Files out of a container and into it, as tar, whatever its image holds.
//!
//! A child of the agent does the work inside the container's mount namespace, whose root is the container's: no path and no link
//! leads out of it. The container does not see the child, and the child may do no more than root of the container with its files.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::panic::AssertUnwindSafe;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use futures::StreamExt;
use http::{Response, StatusCode};
use hyper::body::Incoming;
use joey_model::{ErrorKind, Fault};
use joey_rpc::{Body, empty_answer, into_stream};
use tar::{EntryType, Header};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::identity::{Identity, become_identity, capability_bits};
use crate::life::Life;
use crate::stream::Pipe;
use crate::supervisor::Agent;
use crate::{launch, sys};

/// Enough to read and write the files of every user.
const CAPABILITIES: [&str; 4] = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID"];
/// What the kernel shows of itself: no files to copy.
const KERNELS: [&str; 3] = ["/proc", "/sys", "/dev"];
/// Bytes read at once.
const PART: usize = 32 << 10;

/// What went wrong, for the caller.
enum Wrong {
    Missing(String),
    Other(String),
}

impl Wrong {
    fn at(path: &Path) -> impl Fn(io::Error) -> Self {
        move |error| {
            let message = format!("{}: {error}", path.display());
            match error.kind() {
                io::ErrorKind::NotFound => Self::Missing(message),
                _ => Self::Other(message),
            }
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let (kind, message) = match self {
            Self::Missing(message) => (b'm', message),
            Self::Other(message) => (b'o', message),
        };
        [&[kind][..], message.as_bytes()].concat()
    }
}

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
        let cgroup = agent.cgroup.child(&life.container().name);
        let mounts = File::open(format!("/proc/{init}/ns/mnt")).map_err(|_| gone())?;
        let entrance = cgroup.entrance().map_err(host)?;
        let (words, said) = io::pipe().map_err(host)?;
        match sys::clone(0, entrance.as_ref().map(File::as_fd)).map_err(host)? {
            sys::Cloned::Child => {
                let entered = sys::close_all_but(&[kept, mounts.as_raw_fd(), said.as_raw_fd()]).and_then(|()| {
                    if entrance.is_none() {
                        cgroup.join()?;
                    }
                    sys::setns(mounts.as_fd(), libc::CLONE_NEWNS)?;
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

/// Writes the archive of `from`: its own links are followed, those below it are kept.
fn pack(out: impl Write, from: &Path) -> Result<(), Wrong> {
    let from = from.canonicalize().map_err(Wrong::at(from))?;
    let mut archive = tar::Builder::new(out);
    let top = from.file_name().map_or_else(|| PathBuf::from("root"), PathBuf::from);
    let mut left = vec![(from, top)];
    while let Some((path, name)) = left.pop() {
        let meta = fs::symlink_metadata(&path).map_err(Wrong::at(&path))?;
        let mut header = Header::new_gnu();
        header.set_metadata(&meta);
        let kind = meta.file_type();
        let added = if kind.is_dir() {
            if KERNELS.iter().any(|kernels| path == Path::new(kernels)) {
                continue;
            }
            let mut below = Vec::new();
            for entry in fs::read_dir(&path).map_err(Wrong::at(&path))? {
                let entry = entry.map_err(Wrong::at(&path))?;
                below.push((entry.path(), name.join(entry.file_name())));
            }
            below.sort_by(|a, b| b.cmp(a));
            left.append(&mut below);
            header.set_size(0);
            archive.append_data(&mut header, &name, io::empty())
        } else if kind.is_symlink() {
            header.set_size(0);
            fs::read_link(&path).and_then(|target| archive.append_link(&mut header, &name, target))
        } else if kind.is_file() {
            append(&mut archive, header, &path, &name)
        } else {
            debug_assert!(kind.is_socket() || kind.is_fifo() || kind.is_block_device() || kind.is_char_device());
            continue;
        };
        match added {
            // It went away while its directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.map_err(Wrong::at(&path))?,
        }
    }
    let mut out = archive.into_inner().map_err(Wrong::at(Path::new("archive")))?;
    out.flush().map_err(Wrong::at(Path::new("archive")))
}

fn append(archive: &mut tar::Builder<impl Write>, mut header: Header, path: &Path, name: &Path) -> io::Result<()> {
    // What took the file's place meanwhile is neither followed nor waited for.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::ErrorKind::NotFound.into());
    }
    header.set_metadata(&meta);
    // A file that grows or shrinks while it is read still fills exactly the place that its header takes.
    archive.append_data(&mut header, name, file.chain(io::repeat(0)).take(meta.len()))
}

/// Unpacks into the directory `to`, or as `to` where there is none.
fn unpack(from: impl Read, to: &Path, into_directory: bool) -> Result<(), Wrong> {
    let (base, renamed) = match fs::metadata(to) {
        Ok(meta) if meta.is_dir() => (to.to_owned(), None),
        Ok(_) if into_directory => return Err(Wrong::Other(format!("{}: it is no directory", to.display()))),
        Err(error) if into_directory => return Err(Wrong::at(to)(error)),
        _ => match (to.parent(), to.file_name()) {
            (Some(parent), Some(name)) if parent.is_dir() => (parent.to_owned(), Some(name.to_owned())),
            (Some(parent), _) => {
                return Err(Wrong::Missing(format!("{}: there is no such directory", parent.display())));
            }
            _ => return Err(Wrong::Other(format!("{}: it cannot be written", to.display()))),
        },
    };
    let mut archive = tar::Archive::new(from);
    let broken = Wrong::at(Path::new("archive"));
    for entry in archive.entries().map_err(&broken)? {
        let mut entry = entry.map_err(&broken)?;
        let name = entry.path().map_err(&broken)?.into_owned();
        let parts = name.components().filter(|part| *part != Component::CurDir);
        let mut parts: Vec<_> = parts.collect();
        if parts.iter().any(|part| !matches!(part, Component::Normal(_))) {
            return Err(Wrong::Other(format!("{}: a name in an archive must not lead out of it", name.display())));
        }
        if parts.is_empty() {
            continue;
        }
        let first = parts.remove(0);
        let first = renamed.as_deref().unwrap_or(first.as_os_str());
        let place = parts.iter().fold(base.join(first), |place, part| place.join(part));
        put(&mut entry, &place)?;
    }
    Ok(())
}

fn put(entry: &mut tar::Entry<'_, impl Read>, place: &Path) -> Result<(), Wrong> {
    let mode = entry.header().mode().unwrap_or(0o644) & 0o7777;
    let wrong = Wrong::at(place);
    match entry.header().entry_type() {
        EntryType::Directory => {
            match fs::create_dir(place) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && place.is_dir() => return Ok(()),
                other => other.map_err(&wrong)?,
            }
            fs::set_permissions(place, fs::Permissions::from_mode(mode)).map_err(&wrong)
        }
        EntryType::Regular | EntryType::Continuous => {
            // What is there and no file is not written through.
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
            let open = || OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(place);
            let mut file = match open() {
                Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ETXTBSY)) => {
                    fs::remove_file(place).map_err(&wrong)?;
                    open().map_err(&wrong)?
                }
                other => other.map_err(&wrong)?,
            };
            if !file.metadata().map_err(&wrong)?.is_file() {
                return Err(Wrong::Other(format!("{}: it is no file", place.display())));
            }
            io::copy(entry, &mut file).map_err(&wrong)?;
            file.set_permissions(fs::Permissions::from_mode(mode)).map_err(&wrong)
        }
        EntryType::Symlink => {
            let target = entry.link_name().map_err(&wrong)?.unwrap_or_default().into_owned();
            if fs::symlink_metadata(place).is_ok_and(|meta| !meta.is_dir()) {
                fs::remove_file(place).map_err(&wrong)?;
            }
            std::os::unix::fs::symlink(target, place).map_err(&wrong)
        }
        EntryType::XGlobalHeader => Ok(()),
        other => Err(Wrong::Other(format!("{}: entries of kind {other:?} are not taken", place.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(done: Result<(), Wrong>) -> String {
        match done {
            Ok(()) => String::new(),
            Err(Wrong::Missing(message) | Wrong::Other(message)) => message,
        }
    }

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("joey-files-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn there_and_back() {
        let dir = scratch("back");
        fs::create_dir_all(dir.join("a/b")).unwrap();
        fs::write(dir.join("a/b/file"), vec![7; 100_000]).unwrap();
        fs::set_permissions(dir.join("a/b/file"), fs::Permissions::from_mode(0o751)).unwrap();
        std::os::unix::fs::symlink("b/file", dir.join("a/link")).unwrap();
        let mut archive = Vec::new();
        assert_eq!(message(pack(&mut archive, &dir.join("a"))), "");
        fs::create_dir(dir.join("into")).unwrap();
        assert_eq!(message(unpack(&archive[..], &dir.join("into"), false)), "");
        assert_eq!(message(unpack(&archive[..], &dir.join("new"), false)), "");
        for copy in ["into/a", "new"] {
            let file = dir.join(copy).join("b/file");
            assert_eq!(fs::read(&file).unwrap(), vec![7; 100_000], "{copy}");
            assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o751);
            assert_eq!(fs::read_link(dir.join(copy).join("link")).unwrap(), Path::new("b/file"));
        }
        assert!(message(unpack(&archive[..], &dir.join("none/new"), false)).contains("no such directory"));
        assert!(message(unpack(&archive[..], &dir.join("none/"), true)).contains("No such file"));
        assert!(matches!(pack(Vec::new(), &dir.join("none")), Err(Wrong::Missing(_))));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn names_do_not_lead_out() {
        let dir = scratch("out");
        for name in ["../x", "/x", "a/../../x"] {
            let mut header = Header::new_ustar();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_size(0);
            header.set_mode(0o644);
            header.set_cksum();
            let mut archive = tar::Builder::new(Vec::new());
            archive.append(&header, io::empty()).unwrap();
            let archive = archive.into_inner().unwrap();
            assert!(message(unpack(&archive[..], &dir, false)).contains("lead out"), "{name}");
        }
        fs::remove_dir_all(dir).unwrap();
    }
}
