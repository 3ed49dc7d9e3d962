//! `joey cp`: files out of a container and into it. What comes out of a container is not trusted: only plain files and
//! directories are made, below the place that was named, and nothing is followed.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

use bytes::Bytes;
use futures::StreamExt;
use joey_pool::PoolClient;
use tokio::sync::mpsc;

use crate::args::Cp;
use crate::failure::Failure;
use crate::instances::one_container;
use crate::output::printable;

/// Parts of an archive on their way.
const QUEUE: usize = 8;
const PART: usize = 64 << 10;

/// `NAME:PATH`, or a path here.
enum Place {
    Inside { name: String, path: String },
    Here(PathBuf),
}

impl Place {
    fn of(text: &str) -> Self {
        match text.split_once(':') {
            Some((name, path)) if !name.is_empty() && !name.contains('/') => {
                let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
                Self::Inside { name: name.to_owned(), path }
            }
            _ => Self::Here(PathBuf::from(text)),
        }
    }
}

pub async fn cp(service: &PoolClient, cp: Cp) -> Result<ExitCode, Failure> {
    match (Place::of(&cp.from), Place::of(&cp.to)) {
        (Place::Inside { name, path }, Place::Here(to)) => {
            let container = one_container(&service.get(&name).await?, cp.container)?;
            out(service, (&name, &container, &path), to).await
        }
        (Place::Here(from), Place::Inside { name, path }) => {
            let container = one_container(&service.get(&name).await?, cp.container)?;
            into(service, from, (&name, &container, &path)).await
        }
        _ => Err(Failure::usage("one of the two places must be in an instance, as NAME:PATH, and the other one here")),
    }
}

async fn out(
    service: &PoolClient,
    (name, container, path): (&str, &str, &str),
    to: PathBuf,
) -> Result<ExitCode, Failure> {
    let mut bytes = service.read_files(name, container, path).await?;
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(QUEUE);
    let unpacking = tokio::task::spawn_blocking(move || unpack(Incoming { parts: receiver, part: Bytes::new() }, &to));
    while let Some(part) = bytes.next().await {
        let broken = part.is_err();
        if sender.send(part).await.is_err() || broken {
            break;
        }
    }
    drop(sender);
    let skipped = unpacking.await.map_err(|error| Failure::new(error.to_string()))??;
    for name in &skipped {
        eprintln!("warning: {} is neither file nor directory and was left out", printable(&name.display().to_string()));
    }
    Ok(ExitCode::SUCCESS)
}

async fn into(
    service: &PoolClient,
    from: PathBuf,
    (name, container, path): (&str, &str, &str),
) -> Result<ExitCode, Failure> {
    let meta = fs::metadata(&from).map_err(|error| Failure::new(format!("{}: {error}", from.display())))?;
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(QUEUE);
    let packing = tokio::task::spawn_blocking(move || {
        let packed = pack(io::BufWriter::with_capacity(PART, Outgoing(sender.clone())), &from, meta.is_dir());
        if packed.is_err() {
            // What is sent so far must not pass for the whole.
            let _ = sender.blocking_send(Err(io::ErrorKind::Interrupted.into()));
        }
        packed
    });
    let parts =
        futures::stream::unfold(receiver, |mut parts| async move { parts.recv().await.map(|part| (part, parts)) });
    let sent = service.write_files(name, container, path, parts).await;
    match packing.await.map_err(|error| Failure::new(error.to_string()))? {
        // The other side's refusal ends the sending; it is the cause.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(Failure::from(error)),
        _ => {}
    }
    sent?;
    Ok(ExitCode::SUCCESS)
}

/// The archive as it arrives, for a thread that reads.
struct Incoming {
    parts: mpsc::Receiver<io::Result<Bytes>>,
    part: Bytes,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.part.is_empty() {
            match self.parts.blocking_recv() {
                Some(part) => self.part = part?,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.part.len());
        buffer[..count].copy_from_slice(&self.part.split_to(count));
        Ok(count)
    }
}

struct Outgoing(mpsc::Sender<io::Result<Bytes>>);

impl Write for Outgoing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Ok(Bytes::copy_from_slice(bytes)));
        sent.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes the archive of a file or directory here; its first name is the path's last.
fn pack(out: impl Write, from: &Path, directory: bool) -> io::Result<()> {
    let mut archive = tar::Builder::new(out);
    archive.follow_symlinks(false);
    let whole = from.canonicalize()?;
    let name = whole.file_name().map_or_else(|| PathBuf::from("root"), PathBuf::from);
    match directory {
        true => archive.append_dir_all(&name, &whole)?,
        false => archive.append_path_with_name(&whole, &name)?,
    }
    archive.into_inner()?.flush()
}

/// Unpacks below `to`, or as `to` where there is nothing; names what was left out.
fn unpack(from: impl Read, to: &Path) -> Result<Vec<PathBuf>, Failure> {
    let failed = |place: &Path, error: io::Error| Failure::new(format!("{}: {error}", place.display()));
    let into = to.is_dir();
    if !into && to.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(Failure::new(format!("{}: there is no such directory", to.display())));
    }
    let mut archive = tar::Archive::new(from);
    let mut left_out = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path()?.into_owned();
        let parts: Vec<_> = name.components().filter(|part| *part != Component::CurDir).collect();
        if parts.iter().any(|part| !matches!(part, Component::Normal(_))) {
            return Err(Failure::new(format!("a name in the container leads elsewhere: {}", name.display())));
        }
        let Some((first, rest)) = parts.split_first() else { continue };
        let base = if into { to.join(first) } else { to.to_owned() };
        let place = rest.iter().fold(base, |place, part| place.join(part));
        // No bits that raise whoever runs it here.
        let mode = entry.header().mode().unwrap_or(0o644) & 0o777;
        match entry.header().entry_type() {
            tar::EntryType::Directory => match fs::create_dir(&place) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_directory(&place) => {}
                other => other.map_err(|error| failed(&place, error))?,
            },
            tar::EntryType::Regular => {
                let mut options = OpenOptions::new();
                options.write(true).create(true).truncate(true).custom_flags(libc::O_NOFOLLOW);
                let mut file = options.open(&place).map_err(|error| failed(&place, error))?;
                io::copy(&mut entry, &mut file).map_err(|error| failed(&place, error))?;
                file.set_permissions(fs::Permissions::from_mode(mode)).map_err(|error| failed(&place, error))?;
            }
            _ => left_out.push(name),
        }
    }
    Ok(left_out)
}

/// A directory itself, not a link to one.
fn is_directory(place: &Path) -> bool {
    fs::symlink_metadata(place).is_ok_and(|meta| meta.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        assert!(
            matches!(Place::of("web:/etc/hosts"), Place::Inside { name, path } if name == "web" && path == "/etc/hosts")
        );
        assert!(matches!(Place::of("web:etc"), Place::Inside { path, .. } if path == "/etc"));
        for here in ["/tmp/a:b", "./a:b", "file", ":x"] {
            assert!(matches!(Place::of(here), Place::Here(_)), "{here}");
        }
    }

    #[test]
    fn what_comes_out_makes_no_links() {
        let dir = tempfile::tempdir().unwrap();
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        archive.append_link(&mut header, "a", "/etc").unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(2);
        header.set_mode(0o4755);
        archive.append_data(&mut header, "b", &b"hi"[..]).unwrap();
        let bytes = archive.into_inner().unwrap();
        let left_out = unpack(&bytes[..], dir.path()).unwrap_or_default();
        assert_eq!(left_out, [PathBuf::from("a")]);
        assert!(fs::symlink_metadata(dir.path().join("a")).is_err());
        let made = fs::metadata(dir.path().join("b")).unwrap();
        assert_eq!(made.permissions().mode() & 0o7777, 0o755, "no setuid");
        // A link that is here already is not written through.
        std::os::unix::fs::symlink(dir.path().join("target"), dir.path().join("c")).unwrap();
        assert!(unpack(&bytes_named("c")[..], dir.path()).is_err());
        assert!(!dir.path().join("target").exists());
    }

    fn bytes_named(name: &str) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(2);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, &b"hi"[..]).unwrap();
        archive.into_inner().unwrap()
    }
}
