//! Writes a layer's tree as an EROFS image: file contents as they stream in, metadata at the end.
//!
//! On-disk format: the kernel's `Documentation/filesystems/erofs.rst` and `fs/erofs/erofs_fs.h`. Used of it: 4 KiB blocks,
//! extended inodes (64 bytes), plain contents with inline tails, inline extended attributes, the superblock's checksum.
//! Not used: compression, chunks, shared attributes, devices.
//!
//! ```text
//! block 0        1 …               …                 meta_blkaddr …
//! superblock     file contents     directory blocks  inodes, each with its attributes and inline tail; the root first
//! ```
//! The same tree and contents give the same bytes. Blocks of zeros are left as holes of the image file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::tree::{Kind, Meta, Node, ROOT, Tree, Xattrs};

const BLOCK: u64 = 4096;
const BLOCK_SIZE: usize = BLOCK as usize;
/// Files up to this size go into their inode's block.
pub(crate) const INLINE_MAX: u64 = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const INODE: usize = 64;
const SLOT: u64 = 32;
/// The root's inode: its slot must fit in 16 bits, and inode number 0 confuses `readdir`.
const ROOT_OFFSET: u64 = 64;
const BUFFER: usize = 1 << 20;

/// Appends blocks to the image; knows nothing of trees.
pub(crate) struct Blocks {
    file: File,
    /// Where `buffer` goes; always at a block's start.
    base: u64,
    buffer: Vec<u8>,
}

impl Blocks {
    /// Starts behind the superblock's block.
    pub(crate) fn new(file: File) -> Self {
        Self { file, base: BLOCK, buffer: Vec::with_capacity(BUFFER) }
    }

    /// The next free block.
    pub(crate) fn next(&self) -> io::Result<u32> {
        let at = self.base + self.buffer.len() as u64;
        u32::try_from(at / BLOCK).map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, "layer over 16 TiB"))
    }

    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = BUFFER - self.buffer.len();
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == BUFFER {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Fills the current block with zeros.
    pub(crate) fn pad(&mut self) {
        let full = self.buffer.len().next_multiple_of(BLOCK_SIZE);
        self.buffer.resize(full, 0);
    }

    fn flush(&mut self) -> io::Result<()> {
        const ZEROS: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];
        self.pad();
        let is_zero = |block: usize| self.buffer[block * BLOCK_SIZE..(block + 1) * BLOCK_SIZE] == ZEROS;
        let count = self.buffer.len() / BLOCK_SIZE;
        let mut from = 0;
        while from < count {
            let to = (from..count).find(|&block| is_zero(block)).unwrap_or(count);
            let bytes = &self.buffer[from * BLOCK_SIZE..to * BLOCK_SIZE];
            self.file.write_all_at(bytes, self.base + (from * BLOCK_SIZE) as u64)?;
            from = (to..count).find(|&block| !is_zero(block)).unwrap_or(count);
        }
        self.base += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

/// Where an inode's metadata and contents go.
struct Place {
    /// Of the inode, from the start of the metadata blocks.
    offset: u64,
    /// First block of contents outside the inode's block.
    block: u32,
    size: u64,
    /// Bytes of contents that follow the inode; the layout is "inline" when there are any.
    tail: usize,
    /// Bytes of the attributes as they are written.
    xattrs: usize,
    links: u32,
    parent: usize,
}

type Places = Vec<Option<Place>>;

/// Writes directories, inodes and the superblock; the image is complete and durable afterwards. Returns its bytes.
pub(crate) fn finish(tree: &Tree, mut blocks: Blocks) -> io::Result<u64> {
    blocks.pad();
    let mut places: Places = Vec::new();
    places.resize_with(tree.nodes.len(), || None);
    let order = walk(tree, &mut places);
    let meta_block = place(tree, &order, &mut places, blocks.next()?)?;
    for &node in &order {
        let data = contents(tree, node, &places);
        let outside = data.len() - found(&places, node).tail;
        if outside > 0 {
            blocks.write(&data[..outside])?;
            blocks.pad();
        }
    }
    debug_assert_eq!(blocks.next()?, meta_block);
    let mut written = 0;
    for &node in &order {
        let at = found(&places, node);
        let gap = usize::try_from(at.offset - written).map_err(io::Error::other)?;
        blocks.write(&vec![0; gap])?;
        let bytes = inode(tree, node, &places);
        blocks.write(&bytes)?;
        written = at.offset + bytes.len() as u64;
    }
    blocks.flush()?;
    let total = blocks.base;
    blocks.file.write_all_at(&superblock(total, meta_block, order.len() as u64), 0)?;
    blocks.file.set_len(total)?;
    blocks.file.sync_all()?;
    Ok(total)
}

fn found(places: &Places, node: usize) -> &Place {
    places[node].as_ref().expect("every node of the order was placed by the walk")
}

/// The nodes that have a name, each once, the root first; counts their links.
fn walk(tree: &Tree, places: &mut Places) -> Vec<usize> {
    let new = |parent| Place { offset: 0, block: 0, size: 0, tail: 0, xattrs: 0, links: 0, parent };
    let mut order = Vec::new();
    let mut waiting = vec![ROOT];
    places[ROOT] = Some(new(ROOT));
    while let Some(node) = waiting.pop() {
        order.push(node);
        let Kind::Directory(children) = &tree.nodes[node].kind else { continue };
        let mut links = 2;
        for &child in children.values().rev() {
            let is_directory = matches!(tree.nodes[child].kind, Kind::Directory(_));
            links += u32::from(is_directory);
            if places[child].is_none() {
                waiting.push(child);
            }
            let place = places[child].get_or_insert_with(|| new(node));
            place.links += u32::from(!is_directory);
        }
        if let Some(place) = &mut places[node] {
            place.links = links;
        }
    }
    order
}

/// Decides where everything goes; returns the block at which inodes start.
fn place(tree: &Tree, order: &[usize], places: &mut Places, first: u32) -> io::Result<u32> {
    let mut next_block = u64::from(first);
    let mut offset = ROOT_OFFSET;
    for &node in order {
        let Node { kind, xattrs, .. } = &tree.nodes[node];
        let xattrs = encode_xattrs(xattrs).len();
        let head = INODE + xattrs;
        let (size, mut tail) = match kind {
            Kind::Directory(children) => {
                let size = directory_size(children);
                (size, (size % BLOCK) as usize)
            }
            Kind::Inline(bytes) | Kind::Symlink(bytes) => (bytes.len() as u64, bytes.len() % BLOCK_SIZE),
            Kind::Blocks { size, .. } => (*size, 0),
            _ => (0, 0),
        };
        if head + tail > BLOCK_SIZE {
            tail = 0;
        }
        let room = BLOCK_SIZE - (offset % BLOCK) as usize;
        if room < INODE || (tail > 0 && head + tail > room) {
            offset = offset.next_multiple_of(BLOCK);
        }
        let Some(place) = &mut places[node] else { continue };
        place.block = match kind {
            Kind::Blocks { block, .. } => *block,
            _ => u32::try_from(next_block).map_err(io::Error::other)?,
        };
        if !matches!(kind, Kind::Blocks { .. }) {
            next_block += (size - tail as u64).div_ceil(BLOCK);
        }
        (place.offset, place.size, place.tail, place.xattrs) = (offset, size, tail, xattrs);
        offset = (offset + (head + tail) as u64).next_multiple_of(SLOT);
    }
    u32::try_from(next_block).map_err(io::Error::other)
}

/// A directory's names with `.` and `..`, in the order of their bytes, which lookups rely on.
fn names(children: &BTreeMap<Box<[u8]>, usize>) -> impl Iterator<Item = (&[u8], Option<usize>)> {
    let before = children.range::<[u8], _>((std::ops::Bound::Unbounded, std::ops::Bound::Excluded(&b"."[..])));
    let between =
        children.range::<[u8], _>((std::ops::Bound::Excluded(&b"."[..]), std::ops::Bound::Excluded(&b".."[..])));
    let after = children.range::<[u8], _>((std::ops::Bound::Excluded(&b".."[..]), std::ops::Bound::Unbounded));
    before
        .map(|(name, &node)| (&**name, Some(node)))
        .chain([(&b"."[..], None)])
        .chain(between.map(|(name, &node)| (&**name, Some(node))))
        .chain([(&b".."[..], None)])
        .chain(after.map(|(name, &node)| (&**name, Some(node))))
}

const DIRENT: usize = 12;

fn directory_size(children: &BTreeMap<Box<[u8]>, usize>) -> u64 {
    let (mut full, mut used) = (0, 0);
    for (name, _) in names(children) {
        if used + DIRENT + name.len() > BLOCK_SIZE {
            full += BLOCK;
            used = 0;
        }
        used += DIRENT + name.len();
    }
    full + used as u64
}

/// The bytes of what is not streamed: directory entries, link targets, small files.
fn contents(tree: &Tree, node: usize, places: &Places) -> Vec<u8> {
    match &tree.nodes[node].kind {
        Kind::Directory(children) => directory_data(tree, node, children, places),
        Kind::Inline(bytes) | Kind::Symlink(bytes) => bytes.to_vec(),
        _ => Vec::new(),
    }
}

fn directory_data(tree: &Tree, node: usize, children: &BTreeMap<Box<[u8]>, usize>, places: &Places) -> Vec<u8> {
    let mut data = Vec::new();
    let mut pending: Vec<(&[u8], usize)> = Vec::new();
    let mut used = 0;
    for (name, child) in names(children) {
        let child = child.unwrap_or(if name == b"." { node } else { found(places, node).parent });
        if used + DIRENT + name.len() > BLOCK_SIZE {
            directory_block(tree, &pending, places, &mut data);
            data.resize(data.len().next_multiple_of(BLOCK_SIZE), 0);
            pending.clear();
            used = 0;
        }
        used += DIRENT + name.len();
        pending.push((name, child));
    }
    directory_block(tree, &pending, places, &mut data);
    data
}

fn directory_block(tree: &Tree, entries: &[(&[u8], usize)], places: &Places, data: &mut Vec<u8>) {
    let mut name_offset = entries.len() * DIRENT;
    for (name, child) in entries {
        data.extend_from_slice(&(found(places, *child).offset / SLOT).to_le_bytes());
        data.extend_from_slice(&(name_offset as u16).to_le_bytes());
        data.extend_from_slice(&[file_type(&tree.nodes[*child].kind), 0]);
        name_offset += name.len();
    }
    for (name, _) in entries {
        data.extend_from_slice(name);
    }
}

/// `EROFS_FT_*`, which are those of ext2.
fn file_type(kind: &Kind) -> u8 {
    match kind {
        Kind::Inline(_) | Kind::Blocks { .. } => 1,
        Kind::Directory(_) => 2,
        Kind::Character { .. } => 3,
        Kind::Block { .. } => 4,
        Kind::Fifo => 5,
        Kind::Symlink(_) => 7,
    }
}

/// The inode with its attributes and inline tail (`struct erofs_inode_extended`).
fn inode(tree: &Tree, node: usize, places: &Places) -> Vec<u8> {
    let Node { meta, kind, xattrs, .. } = &tree.nodes[node];
    let at = found(places, node);
    let type_bits: u16 = match kind {
        Kind::Inline(_) | Kind::Blocks { .. } => 0o100_000,
        Kind::Directory(_) => 0o040_000,
        Kind::Symlink(_) => 0o120_000,
        Kind::Character { .. } => 0o020_000,
        Kind::Block { .. } => 0o060_000,
        Kind::Fifo => 0o010_000,
    };
    let location = match kind {
        // The kernel's `new_encode_dev`.
        Kind::Character { major, minor } | Kind::Block { major, minor } => {
            (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
        }
        _ => at.block,
    };
    let format: u16 = if at.tail > 0 { 1 | (2 << 1) } else { 1 };
    let xattr_count = if at.xattrs == 0 { 0 } else { ((at.xattrs - XATTR_HEADER) / 4 + 1) as u16 };
    let Meta { mode, uid, gid, mtime } = *meta;
    let mut bytes = Vec::with_capacity(INODE + at.xattrs + at.tail);
    bytes.extend_from_slice(&format.to_le_bytes());
    bytes.extend_from_slice(&xattr_count.to_le_bytes());
    bytes.extend_from_slice(&(type_bits | (mode & 0o7777)).to_le_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&at.size.to_le_bytes());
    bytes.extend_from_slice(&location.to_le_bytes());
    bytes.extend_from_slice(&((at.offset / SLOT) as u32).to_le_bytes());
    bytes.extend_from_slice(&uid.to_le_bytes());
    bytes.extend_from_slice(&gid.to_le_bytes());
    bytes.extend_from_slice(&mtime.0.to_le_bytes());
    bytes.extend_from_slice(&mtime.1.to_le_bytes());
    bytes.extend_from_slice(&at.links.to_le_bytes());
    bytes.extend_from_slice(&[0; 16]);
    bytes.extend_from_slice(&encode_xattrs(xattrs));
    if at.tail > 0 {
        let data = contents(tree, node, places);
        bytes.extend_from_slice(&data[data.len() - at.tail..]);
    }
    bytes
}

const XATTR_HEADER: usize = 12;
/// Most bytes of an inode's attributes: their count of four-byte units is 16 bits wide.
pub(crate) const MAX_XATTRS: usize = 4 * 60_000;

/// The index of a name's prefix and the rest of the name; `None`: EROFS cannot hold it.
pub(crate) fn split_xattr(name: &[u8]) -> Option<(u8, &[u8])> {
    const PREFIXES: [(u8, &[u8]); 5] = [
        (2, b"system.posix_acl_access"),
        (3, b"system.posix_acl_default"),
        (1, b"user."),
        (4, b"trusted."),
        (6, b"security."),
    ];
    PREFIXES.iter().find_map(|(index, prefix)| {
        let rest = name.strip_prefix(*prefix)?;
        let whole = matches!(index, 2 | 3);
        (rest.is_empty() == whole && rest.len() <= 255).then_some((*index, rest))
    })
}

fn encode_xattrs(xattrs: &Xattrs) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in xattrs {
        let Some((index, rest)) = split_xattr(name) else { continue };
        if bytes.is_empty() {
            bytes.resize(XATTR_HEADER, 0);
        }
        bytes.extend_from_slice(&[rest.len() as u8, index]);
        bytes.extend_from_slice(&(value.len() as u16).to_le_bytes());
        bytes.extend_from_slice(rest);
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// The first block: 1,024 bytes for boot loaders, then `struct erofs_super_block`.
fn superblock(total: u64, meta_block: u32, inodes: u64) -> Vec<u8> {
    const AT: usize = 1024;
    const CHECKSUM: u32 = 1;
    const MTIME: u32 = 2;
    let mut block = vec![0; BLOCK_SIZE];
    let mut put = |offset: usize, bytes: &[u8]| block[AT + offset..AT + offset + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC.to_le_bytes());
    put(8, &(CHECKSUM | MTIME).to_le_bytes());
    put(12, &[12, 0]);
    put(14, &((ROOT_OFFSET / SLOT) as u16).to_le_bytes());
    put(16, &inodes.to_le_bytes());
    put(36, &((total / BLOCK) as u32).to_le_bytes());
    put(40, &meta_block.to_le_bytes());
    put(64, b"joey");
    let checksum = crc32c(&block[AT..]);
    block[AT + 4..AT + 8].copy_from_slice(&checksum.to_le_bytes());
    block
}

/// CRC-32C over a superblock, without the final inversion, as the kernel's `crc32c(~0, …)`.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}
