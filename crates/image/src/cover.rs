//! Directories that a layer leads through but does not list: their owners and modes are those of the layers below.
//!
//! Engines that unpack layers onto each other leave such a directory as it was; in a layer of its own it must be something,
//! and overlayfs shows the topmost one. So an image with such layers gets a further, small layer on top, its cover, which
//! holds these directories alone, with the attributes of the highest layer that lists them. Layers stay shared and named by
//! their contents. Not made good: a directory passed through where a lower layer has a symbolic link replaces the link.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use joey_model::Digest;
use sha2::{Digest as _, Sha256};

use crate::erofs::{self, Blocks};
use crate::persist::Folders;
use crate::tree::{Kind, Meta, OPAQUE, Tree, Xattrs};

/// Most unlisted directories looked up for an image; further ones stay root:root 0755.
const MAX_PATHS: usize = 20_000;

/// A mounted layer and the directories it does not list.
struct Layer {
    folder: PathBuf,
    unlisted: HashSet<Vec<u8>>,
}

/// What one layer says of a directory.
#[derive(Debug)]
enum Says {
    /// Nothing; `Below` says whether lower layers are still asked.
    Nothing(Below),
    Unlisted(Below),
    Listed(Box<(Meta, Xattrs)>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Below {
    Shows,
    Hidden,
}

/// The name of the cover for a stack of layers; `None` when each lists every directory it leads through.
pub(crate) fn name(folders: &Folders, layers: &[Digest]) -> Option<Digest> {
    if !layers.iter().any(|layer| folders.unlisted(layer).exists()) {
        return None;
    }
    let mut hash = Sha256::new();
    hash.update(b"cover\n");
    layers.iter().for_each(|layer| hash.update(layer.as_str()));
    Some(Digest::from_sha256(&hash.finalize().into()))
}

/// Writes the cover for mounted layers (name and folder, topmost first) into `target`, which stays empty when nothing needs
/// covering.
pub(crate) fn write(folders: &Folders, layers: &[(Digest, PathBuf)], target: &Path) -> io::Result<()> {
    let mut stack = Vec::new();
    for (layer, folder) in layers {
        stack.push(Layer { folder: folder.clone(), unlisted: folders.read_unlisted(layer)? });
    }
    let mut found = BTreeMap::new();
    let paths: HashSet<&Vec<u8>> = stack.iter().flat_map(|layer| &layer.unlisted).take(MAX_PATHS).collect();
    for path in paths {
        if let Some(shown) = covered(&stack, path)? {
            found.insert(path.clone(), shown);
        }
    }
    // The way to a covered directory is covered as well, with what shows there now.
    let ways: HashSet<Vec<u8>> = found.keys().flat_map(|path| parents(path)).map(<[u8]>::to_vec).collect();
    for way in ways {
        if let Entry::Vacant(place) = found.entry(way) {
            let shown = merged(&stack, place.key())?.map_or_else(default, |(shown, _)| shown);
            place.insert(shown);
        }
    }
    let file = File::create(target)?;
    if found.is_empty() {
        return file.sync_all();
    }
    let mut tree = Tree::new();
    // Ordered by name, so that a directory comes before what lies in it.
    for (path, (meta, xattrs)) in found {
        tree.add(&path, meta, Kind::Directory(BTreeMap::new()), xattrs).map_err(io::Error::other)?;
    }
    erofs::finish(&tree, Blocks::new(file)).map(drop)
}

fn default() -> (Meta, Xattrs) {
    (Meta { mode: 0o755, ..Meta::default() }, Xattrs::new())
}

/// `a` and `a/b` of `a/b/c`.
fn parents(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| &path[..at])
}

/// What a directory is to show where the topmost layer that has it does not list it, and a lower one does.
fn covered(stack: &[Layer], path: &[u8]) -> io::Result<Option<(Meta, Xattrs)>> {
    Ok(merged(stack, path)?.filter(|(_, unlisted_above)| *unlisted_above).map(|(shown, _)| shown))
}

/// The attributes of the highest layer that lists `path`, and whether a layer above it has the directory unlisted.
fn merged(stack: &[Layer], path: &[u8]) -> io::Result<Option<((Meta, Xattrs), bool)>> {
    let mut unlisted = false;
    for layer in stack {
        let below = match ask(layer, path)? {
            Says::Listed(shown) => return Ok(Some((*shown, unlisted))),
            Says::Unlisted(below) => {
                unlisted = true;
                below
            }
            Says::Nothing(below) => below,
        };
        if below == Below::Hidden {
            break;
        }
    }
    Ok(None)
}

fn ask(layer: &Layer, path: &[u8]) -> io::Result<Says> {
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
    let meta = Meta {
        mode: (metadata.mode() & 0o7777) as u16,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), u32::try_from(metadata.mtime_nsec()).unwrap_or(0)),
    };
    Ok(Says::Listed(Box::new((meta, attributes(&folder)?))))
}

/// The extended attributes of a directory without overlayfs' own.
fn attributes(path: &Path) -> io::Result<Xattrs> {
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

fn attribute(path: &Path, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
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
