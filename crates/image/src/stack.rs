//! Mounted layers that lie on each other, asked one by one: what is shown at a path, and with which attributes.
//!
//! The host's kernel could merge them, but what is asked here is also which layer says it and whether that layer lists it. No
//! link is ever followed by the host: a link in an image leads within that image.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use joey_model::Digest;

use crate::looks::{Looks, has_attribute};
use crate::persist::Folders;
use crate::tree::{Meta, OPAQUE, Xattrs};

/// Most links followed for one path, as in the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// A mounted layer and the directories it does not list.
pub(crate) struct Layer {
    pub folder: PathBuf,
    pub unlisted: HashSet<Vec<u8>>,
    known: RefCell<HashMap<Vec<u8>, Way>>,
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
        Ok(Self { folder: folder.to_owned(), unlisted: folders.read_unlisted(layer)?, known: RefCell::default() })
    }
}

/// What shows at `path`, whose parents must be directories, in layers given topmost first. A directory that a layer does not
/// list counts as what the layers below it say.
pub(crate) fn look(looks: &Looks, stack: &[Layer], path: &[u8]) -> io::Result<Shown> {
    let mut otherwise = Shown::Nothing;
    for layer in stack {
        let below = match ask(looks, layer, path)? {
            Says::Listed(_) => return Ok(Shown::Directory),
            Says::Unlisted(below) => {
                otherwise = Shown::Directory;
                below
            }
            Says::Nothing(Below::Hidden) => return other(looks, layer, path, otherwise),
            Says::Nothing(below) => below,
        };
        if below == Below::Hidden {
            break;
        }
    }
    Ok(otherwise)
}

/// What is no directory at `path` of a layer that hides what lies below.
fn other(looks: &Looks, layer: &Layer, path: &[u8], otherwise: Shown) -> io::Result<Shown> {
    if !matches!(layer.way(looks, parent(path))?, Way::Directory(_)) {
        return Ok(otherwise);
    }
    looks.count(path)?;
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

pub(crate) fn is_whiteout(metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

/// The path that `path` leads to when the links on its way are followed, as a process inside would: an absolute target starts
/// at the image's root, and nothing is above that. `None`: it leads through a file, or through links without end.
pub(crate) fn resolve(looks: &Looks, stack: &[Layer], path: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut links = 0;
    let mut done: Vec<Vec<u8>> = Vec::new();
    let mut todo: VecDeque<Vec<u8>> = path.split(|&byte| byte == b'/').map(<[u8]>::to_vec).collect();
    while let Some(part) = todo.pop_front() {
        looks.count(&[])?;
        match &part[..] {
            b"" | b"." => continue,
            b".." => {
                done.pop();
                continue;
            }
            _ => done.push(part),
        }
        match look(looks, stack, &done.join(&b'/'))? {
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

/// `a/b` of `a/b/c`.
pub(crate) fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|&byte| byte == b'/').map_or(&[], |at| &path[..at])
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

/// Where the way to something in a layer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Directory(Below),
    Missing(Below),
    /// A file is in the way, also a whiteout; a link is never followed, it would lead to the host's files.
    Blocked,
}

impl Layer {
    /// Where the way through the directories of `path` leads in this layer; each is looked at once.
    fn way(&self, looks: &Looks, path: &[u8]) -> io::Result<Way> {
        if path.is_empty() {
            return Ok(Way::Directory(Below::Shows));
        }
        let ends: Vec<usize> = parents(path).map(<[u8]>::len).chain([path.len()]).collect();
        let mut known = self.known.borrow_mut();
        let (mut way, mut from) = (Way::Directory(Below::Shows), 0);
        for (at, &end) in ends.iter().enumerate().rev() {
            looks.count(&path[..end])?;
            if let Some(found) = known.get(&path[..end]) {
                (way, from) = (*found, at + 1);
                break;
            }
        }
        for &end in &ends[from..] {
            let Way::Directory(below) = way else { break };
            way = self.step(looks, &path[..end], below)?;
            if looks.may_keep(end) {
                known.insert(path[..end].to_vec(), way);
            }
        }
        Ok(way)
    }

    fn step(&self, looks: &Looks, path: &[u8], below: Below) -> io::Result<Way> {
        looks.count(path)?;
        let folder = self.folder.join(OsStr::from_bytes(path));
        match fs::symlink_metadata(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Way::Missing(below)),
            Err(error) => Err(error),
            Ok(metadata) if !metadata.is_dir() => Ok(Way::Blocked),
            Ok(_) if has_attribute(&folder, OPAQUE.0)? => Ok(Way::Directory(Below::Hidden)),
            Ok(_) => Ok(Way::Directory(below)),
        }
    }

    /// Whether the layer itself hides what the layers below have in the directory `path`.
    pub(crate) fn hides(&self, looks: &Looks, path: &[u8]) -> io::Result<bool> {
        Ok(self.way(looks, path)? == Way::Directory(Below::Hidden))
    }
}

/// What `layer` says of a directory at `path`.
pub(crate) fn ask(looks: &Looks, layer: &Layer, path: &[u8]) -> io::Result<Says> {
    let below = match layer.way(looks, parent(path))? {
        Way::Directory(below) => below,
        Way::Missing(below) => return Ok(Says::Nothing(below)),
        Way::Blocked => return Ok(Says::Nothing(Below::Hidden)),
    };
    looks.count(path)?;
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
    Ok(Says::Listed(Box::new((meta(&metadata), looks.attributes(&folder)?))))
}
