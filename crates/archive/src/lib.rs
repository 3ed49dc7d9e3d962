//! Files of a container as tar, out of it and into it: for a process whose root is the container's, so that no path and no link leads
//! elsewhere. It knows nothing of containers.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use tar::{EntryType, Header};

/// What the kernel shows of itself: no files to copy.
const KERNELS: [&str; 3] = ["/proc", "/sys", "/dev"];

/// What went wrong, for the caller.
#[derive(Debug)]
pub enum Wrong {
    Missing(String),
    Other(String),
}

impl Wrong {
    pub fn at(path: &Path) -> impl Fn(io::Error) -> Self {
        move |error| {
            let message = format!("{}: {error}", path.display());
            match error.kind() {
                io::ErrorKind::NotFound => Self::Missing(message),
                _ => Self::Other(message),
            }
        }
    }

    /// A letter for the kind, and the words.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (kind, message) = match self {
            Self::Missing(message) => (b'm', message),
            Self::Other(message) => (b'o', message),
        };
        [&[kind][..], message.as_bytes()].concat()
    }
}

/// Writes the archive of `from`: its own links are followed, those below it are kept.
pub fn pack(out: impl Write, from: &Path) -> Result<(), Wrong> {
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
pub fn unpack(from: impl Read, to: &Path, into_directory: bool) -> Result<(), Wrong> {
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
