//! Mounted layers that lie on each other, asked one by one: what is shown at a path, and with which attributes.
//!
//! The host's kernel could merge them, but what is asked here is also which layer says it and whether that layer lists it. No
//! link is ever followed by the host: a link in an image leads within that image.

use std::collections::{HashSet, VecDeque};
use std::ffi::{CString, OsStr};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use joey_model::Digest;

use crate::erofs;
use crate::persist::Folders;
use crate::tree::{Meta, OPAQUE, Xattrs};

/// Most links followed for one path, as in the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// A mounted layer and the directories it does not list.
pub(crate) struct Layer {
    pub folder: PathBuf,
    pub unlisted: HashSet<Vec<u8>>,
}

/// What one layer says of a directory.
#[derive(Debug)]
pub(crate) enum Says {
    /// Nothing; `Below` says whether lower layers are still asked.
    Nothing(Below),
    Unlisted(Below),
    Listed(Box<(Meta, Xattrs)>),
}

/// What the layers together show at a path.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    Nothing,
    Directory,
    /// A symbolic link, its target and attributes.
    Link(Vec<u8>, Meta),
    Other,
}

impl Layer {
    pub(crate) fn read(folders: &Folders, layer: &Digest, folder: &Path) -> io::Result<Self> {
        Ok(Self { folder: folder.to_owned(), unlisted: folders.read_unlisted(layer)? })
    }
}

/// What shows at `path`, whose parents must be directories, in layers given topmost first. A directory that a layer does not
/// list counts as what the layers below it say.
pub(crate) fn look(stack: &[Layer], path: &[u8]) -> io::Result<Shown> {
    let mut otherwise = Shown::Nothing;
    for layer in stack {
        let below = match ask(layer, path)? {
            Says::Listed(_) => return Ok(Shown::Directory),
            Says::Unlisted(below) => {
                otherwise = Shown::Directory;
                below
            }
            Says::Nothing(Below::Hidden) => return other(layer, path, otherwise),
            Says::Nothing(below) => below,
        };
        if below == Below::Hidden {
            break;
        }
    }
    Ok(otherwise)
}

/// What is no directory at `path` of a layer that hides what lies below.
fn other(layer: &Layer, path: &[u8], otherwise: Shown) -> io::Result<Shown> {
    if !parents(path).all(|parent| is_directory(layer, parent)) {
        return Ok(otherwise);
    }
    let file = layer.folder.join(OsStr::from_bytes(path));
    match fs::symlink_metadata(&file) {
        Ok(metadata) if metadata.is_symlink() => {
            Ok(Shown::Link(fs::read_link(&file)?.as_os_str().as_bytes().to_vec(), meta(&metadata)))
        }
        Ok(metadata) if is_whiteout(&metadata) => Ok(otherwise),
        Ok(_) => Ok(Shown::Other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(otherwise),
        Err(error) => Err(error),
    }
}

fn is_directory(layer: &Layer, path: &[u8]) -> bool {
    fs::symlink_metadata(layer.folder.join(OsStr::from_bytes(path))).is_ok_and(|metadata| metadata.is_dir())
}

pub(crate) fn is_whiteout(metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

/// The path that `path` leads to when the links on its way are followed, as a process inside would: an absolute target starts
/// at the image's root, and nothing is above that. `None`: it leads through a file, or through links without end.
pub(crate) fn resolve(stack: &[Layer], path: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut links = 0;
    let mut done: Vec<Vec<u8>> = Vec::new();
    let mut todo: VecDeque<Vec<u8>> = path.split(|&byte| byte == b'/').map(<[u8]>::to_vec).collect();
    while let Some(part) = todo.pop_front() {
        match &part[..] {
            b"" | b"." => continue,
            b".." => {
                done.pop();
                continue;
            }
            _ => done.push(part),
        }
        match look(stack, &done.join(&b'/'))? {
            Shown::Nothing | Shown::Directory => {}
            Shown::Other => return Ok(None),
            Shown::Link(target, _) => {
                links += 1;
                if links > MAX_LINKS {
                    return Ok(None);
                }
                done.pop();
                if target.starts_with(b"/") {
                    done.clear();
                }
                target.split(|&byte| byte == b'/').rev().for_each(|part| todo.push_front(part.to_vec()));
            }
        }
    }
    Ok(Some(done.join(&b'/')))
}

/// `a` and `a/b` of `a/b/c`.
pub(crate) fn parents(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| &path[..at])
}

pub(crate) fn meta(metadata: &Metadata) -> Meta {
    Meta {
        mode: (metadata.mode() & 0o7777) as u16,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), u32::try_from(metadata.mtime_nsec()).unwrap_or(0)),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Below {
    Shows,
    Hidden,
}

/// What `layer` says of a directory at `path`.
pub(crate) fn ask(layer: &Layer, path: &[u8]) -> io::Result<Says> {
    let mut below = Below::Shows;
    for parent in parents(path) {
        let folder = layer.folder.join(OsStr::from_bytes(parent));
        match fs::symlink_metadata(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Says::Nothing(below)),
            Err(error) => return Err(error),
            // Also a whiteout; and a link is never followed, it would lead to the host's files.
            Ok(metadata) if !metadata.is_dir() => return Ok(Says::Nothing(Below::Hidden)),
            Ok(_) if attribute(&folder, OPAQUE.0)?.is_some() => below = Below::Hidden,
            Ok(_) => {}
        }
    }
    let folder = layer.folder.join(OsStr::from_bytes(path));
    let metadata = match fs::symlink_metadata(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Says::Nothing(below)),
        other => other?,
    };
    if !metadata.is_dir() {
        return Ok(Says::Nothing(Below::Hidden));
    }
    if layer.unlisted.contains(path) {
        return Ok(Says::Unlisted(below));
    }
    Ok(Says::Listed(Box::new((meta(&metadata), attributes(&folder)?))))
}

/// The extended attributes of a file without overlayfs' own.
pub(crate) fn attributes(path: &Path) -> io::Result<Xattrs> {
    let name = c_path(path)?;
    // Both calls give at most 64 KiB (XATTR_LIST_MAX, XATTR_SIZE_MAX).
    let mut names = vec![0u8; 64 << 10];
    // SAFETY: the path ends in a zero byte and the buffer is as long as said; both live through the call.
    let length = unsafe { libc::llistxattr(name.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let length = match usize::try_from(length) {
        Ok(length) => length,
        Err(_) => return unsupported_is(Xattrs::new()),
    };
    let mut found = Xattrs::new();
    for name in names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        if name.starts_with(b"trusted.overlay.") || erofs::split_xattr(name).is_none() {
            continue;
        }
        if let Some(value) = attribute(path, name)? {
            found.insert(name.into(), value.into());
        }
    }
    Ok(found)
}

pub(crate) fn attribute(path: &Path, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let (path, name) = (c_path(path)?, CString::new(name)?);
    let mut value = vec![0u8; 64 << 10];
    // SAFETY: both names end in zero bytes and the buffer is as long as said; all live through the call.
    let length = unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    let Ok(length) = usize::try_from(length) else { return unsupported_is(None) };
    value.truncate(length);
    Ok(Some(value))
}

/// The last call's error, or `value` where it only says that there are no attributes.
fn unsupported_is<T>(value: T) -> io::Result<T> {
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENODATA | libc::EOPNOTSUPP) => Ok(value),
        _ => Err(error),
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}
