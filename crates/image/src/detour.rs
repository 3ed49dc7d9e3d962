//! Layers that lead through a directory they do not list, where the layers below have a symbolic link: `lib/x` on `lib → usr/lib`.
//!
//! Engines that unpack layers onto each other follow the link inside the image's root, so that the file is `usr/lib/x` and the
//! link stays. In a layer of its own `lib` can only be a directory, which on top would replace the link. So such a layer gets a
//! further one right above it, its detour, which shows the link again and holds what the layer has behind it where the link
//! leads. It is made for the layers of one image up to that one, while the layers themselves stay shared.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use joey_model::Digest;
use sha2::{Digest as _, Sha256};

use crate::erofs::{self, Blocks, INLINE_MAX};
use crate::looks::{self, Looks, Refused};
use crate::persist::Folders;
use crate::stack::{self, Layer, Shown};
use crate::tree::{Kind, OPAQUE, Tree};

/// The name of the detour of the topmost of `layers` (lowest first); `None` when it lists every directory or lies on nothing.
pub(crate) fn name(folders: &Folders, layers: &[Digest]) -> Option<Digest> {
    let (top, below) = layers.split_last()?;
    if below.is_empty() || !folders.unlisted(top).exists() {
        return None;
    }
    let mut hash = Sha256::new();
    hash.update(b"detour\n");
    layers.iter().for_each(|layer| hash.update(layer.as_str()));
    Some(Digest::from_sha256(&hash.finalize().into()))
}

/// Writes the detour of the first of mounted layers (name and folder, topmost first) into `target`, which stays empty where
/// there is no link in the way, with files of `room` bytes at most. Returns the directories the detour does not list.
pub(crate) fn write(
    folders: &Folders,
    layers: &[(Digest, PathBuf)],
    looks: &Looks,
    room: u64,
    target: &Path,
) -> io::Result<Vec<Vec<u8>>> {
    let stack: Vec<_> =
        layers.iter().map(|(layer, folder)| Layer::read(folders, layer, folder)).collect::<io::Result<_>>()?;
    let file = File::create(target)?;
    let Some((top, below)) = stack.split_first() else { return Ok(Vec::new()) };
    let mut paths: Vec<&Vec<u8>> = top.unlisted.iter().collect();
    paths.sort();
    let mut copy = Copy { top, looks, room, tree: Tree::new(), blocks: Blocks::new(file), files: HashMap::new() };
    let mut moved: HashSet<&[u8]> = HashSet::new();
    let mut lost: Vec<&Vec<u8>> = Vec::new();
    for path in paths {
        looks.count(path)?;
        // What lies behind a link has gone with it.
        if stack::parents(path).any(|parent| moved.contains(parent)) || top.hides(looks, stack::parent(path))? {
            continue;
        }
        let Shown::Link(link, meta) = stack::look(looks, below, path)? else { continue };
        let Some(goal) = stack::resolve(looks, &stack, path)? else {
            lost.push(path);
            continue;
        };
        copy.directory(path, &goal)?;
        copy.tree.add(path, meta, Kind::Symlink(link.into()), Default::default()).map_err(io::Error::other)?;
        moved.insert(path);
    }
    if let Some(first) = lost.first() {
        tracing::warn!(path = %crate::tree::shown(first), links = lost.len(), "links in an image lead nowhere and are replaced");
    }
    if moved.is_empty() {
        return Ok(Vec::new());
    }
    erofs::finish(&copy.tree, copy.blocks)?;
    Ok(copy.tree.unlisted())
}

/// Copies parts of a layer to other paths, whiteouts and opaque directories included.
struct Copy<'a> {
    top: &'a Layer,
    looks: &'a Looks,
    /// Bytes of files it may still take.
    room: u64,
    tree: Tree,
    blocks: Blocks,
    /// Files of several names by their inodes: where they have gone.
    files: HashMap<u64, Vec<u8>>,
}

impl Copy<'_> {
    /// What lies in the layer's directory `from` is to lie in `to`.
    fn directory(&mut self, from: &[u8], to: &[u8]) -> io::Result<()> {
        let mut waiting = vec![(from.to_vec(), to.to_vec())];
        while let Some((from, to)) = waiting.pop() {
            let folder = self.top.folder.join(OsStr::from_bytes(&from));
            self.looks.count(&from)?;
            let metadata = fs::symlink_metadata(&folder)?;
            if !self.top.unlisted.contains(&from) {
                let xattrs = self.looks.attributes(&folder)?;
                self.add(&to, &metadata, Kind::Directory(Default::default()), xattrs)?;
            }
            if looks::has_attribute(&folder, OPAQUE.0)? {
                self.whiteout(&to, b".wh..wh..opq")?;
            }
            for entry in fs::read_dir(&folder)? {
                let entry = entry?;
                let name = entry.file_name();
                let (from, target) = (join(&from, name.as_bytes()), join(&to, name.as_bytes()));
                self.looks.count(&from)?;
                let metadata = fs::symlink_metadata(entry.path())?;
                if metadata.is_dir() {
                    waiting.push((from, target));
                } else if stack::is_whiteout(&metadata) {
                    self.whiteout(&to, &[b".wh.", name.as_bytes()].concat())?;
                } else {
                    self.file(&entry.path(), &metadata, target)?;
                }
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, metadata: &fs::Metadata, to: Vec<u8>) -> io::Result<()> {
        if metadata.nlink() > 1 {
            if let Some(first) = self.files.get(&metadata.ino()) {
                return self.tree.add_link(&to, first).map_err(io::Error::other);
            }
            self.files.insert(metadata.ino(), to.clone());
        }
        let kind = metadata.file_type();
        let (major, minor) = (nix::sys::stat::major(metadata.rdev()), nix::sys::stat::minor(metadata.rdev()));
        let (major, minor) = (u32::try_from(major).unwrap_or(0), u32::try_from(minor).unwrap_or(0));
        let kind = match kind {
            _ if kind.is_symlink() => {
                let target = fs::read_link(path)?;
                self.tree.charge(target.as_os_str().len()).map_err(io::Error::other)?;
                Kind::Symlink(target.as_os_str().as_bytes().into())
            }
            _ if kind.is_char_device() => Kind::Character { major, minor },
            _ if kind.is_block_device() => Kind::Block { major, minor },
            _ if kind.is_fifo() => Kind::Fifo,
            _ => self.contents(path, metadata.len())?,
        };
        self.add(&to, metadata, kind, self.looks.attributes(path)?)
    }

    fn contents(&mut self, path: &Path, size: u64) -> io::Result<Kind> {
        let mut file = File::open(path)?;
        if size <= INLINE_MAX {
            let mut bytes = Vec::new();
            file.take(INLINE_MAX).read_to_end(&mut bytes)?;
            self.tree.charge(bytes.len()).map_err(io::Error::other)?;
            return Ok(Kind::Inline(bytes.into()));
        }
        // Told before the bytes are copied.
        self.room = self.room.checked_sub(size.next_multiple_of(4096)).ok_or(Refused::TooLarge)?;
        let block = self.blocks.next()?;
        let mut buffer = vec![0; 64 << 10];
        let mut written = 0;
        loop {
            let count = file.read(&mut buffer)?;
            if count == 0 {
                self.blocks.pad();
                return Ok(Kind::Blocks { block, size: written });
            }
            self.looks.count(&[])?;
            self.blocks.write(&buffer[..count])?;
            written += count as u64;
        }
    }

    fn add(&mut self, to: &[u8], metadata: &fs::Metadata, kind: Kind, xattrs: crate::tree::Xattrs) -> io::Result<()> {
        self.tree.add(to, stack::meta(metadata), kind, xattrs).map_err(io::Error::other)
    }

    fn whiteout(&mut self, folder: &[u8], name: &[u8]) -> io::Result<()> {
        let entry = Kind::Inline(Box::default());
        self.tree.add(&join(folder, name), Default::default(), entry, Default::default()).map_err(io::Error::other)
    }
}

fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() { name.to_vec() } else { [folder, b"/", name].concat() }
}
