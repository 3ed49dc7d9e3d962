//! The file tree of one layer, in memory, as its entries arrive: metadata only, file contents are elsewhere.
//!
//! Rules (OCI image specification, layer.md; overlayfs documentation):
//! - Paths are below the layer's root: leading `/` and `.` components mean nothing, `..` is refused.
//! - A path that leads through something that is not a directory of the same layer (a symbolic link above all) is
//!   refused, so what an entry names never depends on link targets.
//! - A later entry replaces an earlier one of the same name; a directory over a directory only changes its metadata.
//! - `.wh.NAME` hides NAME of lower layers only: with NAME in the same layer, NAME stays (a directory becomes opaque).

use std::collections::BTreeMap;

/// Most entries of a layer; with [`MAX_METADATA`] this bounds the memory a conversion takes.
pub(crate) const MAX_ENTRIES: usize = 1_000_000;
/// Most bytes of names, link targets, extended attributes and small contents a layer may hold in memory.
pub(crate) const MAX_METADATA: usize = 192 << 20;
/// Most unlisted directories that are remembered of a layer, and most bytes of their paths; further ones stay root:root 0755.
const MAX_UNLISTED: (usize, usize) = (20_000, 8 << 20);
/// Longest path, in bytes (`PATH_MAX`), and longest name (`NAME_MAX`).
const MAX_PATH: usize = 4096;
const MAX_NAME: usize = 255;

pub(crate) const ROOT: usize = 0;
pub(crate) const OPAQUE: (&[u8], &[u8]) = (b"trusted.overlay.opaque", b"y");

/// Extended attributes: full names and values.
pub(crate) type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permission bits with setuid, setgid and sticky; no type bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since the epoch and nanoseconds.
    pub mtime: (i64, u32),
}

#[derive(Debug)]
pub(crate) enum Kind {
    Directory(BTreeMap<Box<[u8]>, usize>),
    /// A small file, held here until it goes into its inode's block.
    Inline(Box<[u8]>),
    /// A file whose `size` bytes lie in consecutive blocks from `block`.
    Blocks {
        block: u32,
        size: u64,
    },
    Symlink(Box<[u8]>),
    Character {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    Fifo,
}

#[derive(Debug)]
pub(crate) struct Node {
    pub meta: Meta,
    pub kind: Kind,
    pub xattrs: Xattrs,
    whiteout: bool,
    /// A directory some path leads through, of which the layer itself says nothing.
    unlisted: bool,
}

/// Why an entry cannot be part of a layer. Paths are escaped: they come from strangers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TreeError {
    #[error("path \"{0}\" leads out of the root")]
    Escapes(String),
    #[error("path \"{0}\" leads through a symbolic link or a file")]
    NotADirectory(String),
    #[error("path \"{0}\" leads through a mark that hides files")]
    ThroughWhiteout(String),
    #[error("path \"{0}\" is longer than 4096 bytes, or a name in it longer than 255, or it holds a zero byte")]
    BadPath(String),
    #[error("hard link \"{path}\" names \"{target}\", which is not a file of this layer")]
    BadLink { path: String, target: String },
    #[error("the root would be something else than a directory")]
    BadRoot,
    #[error("more than {MAX_ENTRIES} entries")]
    TooMany,
    #[error("more than {MAX_METADATA} bytes of names, link targets and attributes")]
    TooMuchMetadata,
}

#[derive(Debug)]
pub(crate) struct Tree {
    pub nodes: Vec<Node>,
    metadata: usize,
}

/// Up to 128 bytes of a stranger's path, printable.
pub(crate) fn shown(path: &[u8]) -> String {
    let cut = &path[..path.len().min(128)];
    format!("{}{}", cut.escape_ascii(), if cut.len() < path.len() { "…" } else { "" })
}

fn components(path: &[u8]) -> Result<Vec<&[u8]>, TreeError> {
    if path.len() > MAX_PATH || path.contains(&0) {
        return Err(TreeError::BadPath(shown(path)));
    }
    let mut parts = Vec::new();
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(TreeError::Escapes(shown(path))),
            long if long.len() > MAX_NAME => return Err(TreeError::BadPath(shown(path))),
            name => parts.push(name),
        }
    }
    Ok(parts)
}

impl Tree {
    pub(crate) fn new() -> Self {
        let mut tree = Self { nodes: Vec::new(), metadata: 0 };
        tree.nodes.push(Node::implied_directory());
        tree
    }

    /// Counts `bytes` kept in memory.
    pub(crate) fn charge(&mut self, bytes: usize) -> Result<(), TreeError> {
        self.metadata = self.metadata.saturating_add(bytes);
        if self.metadata > MAX_METADATA { Err(TreeError::TooMuchMetadata) } else { Ok(()) }
    }

    fn push(&mut self, node: Node) -> Result<usize, TreeError> {
        if self.nodes.len() >= MAX_ENTRIES {
            return Err(TreeError::TooMany);
        }
        self.charge(node.xattrs.iter().map(|(name, value)| name.len() + value.len() + 64).sum())?;
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }

    fn children(&mut self, node: usize) -> Option<&mut BTreeMap<Box<[u8]>, usize>> {
        match &mut self.nodes[node].kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// The directory that `parts` name, made where it is missing (root:root 0755).
    fn directory(&mut self, parts: &[&[u8]], path: &[u8]) -> Result<usize, TreeError> {
        if parts.iter().any(|part| part.starts_with(b".wh.")) {
            return Err(TreeError::ThroughWhiteout(shown(path)));
        }
        let mut at = ROOT;
        for part in parts {
            let children = self.children(at).ok_or_else(|| TreeError::NotADirectory(shown(path)))?;
            at = match children.get(*part).copied() {
                Some(child) if self.nodes[child].whiteout => {
                    let mut made = Node::implied_directory();
                    made.make_opaque();
                    // New in this layer: no lower one has a say.
                    made.unlisted = false;
                    self.link(at, part, made)?
                }
                Some(child) => child,
                None => self.link(at, part, Node::implied_directory())?,
            };
        }
        if self.children(at).is_none() {
            return Err(TreeError::NotADirectory(shown(path)));
        }
        Ok(at)
    }

    fn link(&mut self, parent: usize, name: &[u8], node: Node) -> Result<usize, TreeError> {
        let child = self.push(node)?;
        self.name(parent, name, child)?;
        Ok(child)
    }

    fn name(&mut self, parent: usize, name: &[u8], child: usize) -> Result<(), TreeError> {
        self.charge(name.len() + 64)?;
        if let Some(children) = self.children(parent) {
            children.insert(name.into(), child);
        }
        Ok(())
    }

    /// The directories, the root aside, that are here only because paths lead through them; a bounded part of them where a
    /// layer has uncommonly many.
    pub(crate) fn unlisted(&self) -> Vec<Vec<u8>> {
        let (mut found, mut bytes) = (Vec::new(), 0);
        let children = |node: usize| match &self.nodes[node].kind {
            Kind::Directory(children) => Some(children.iter()),
            _ => None,
        };
        // The way down, and one path for all of it: paths are long and directories many where a layer is hostile.
        let mut way: Vec<_> = children(ROOT).into_iter().map(|below| (below, 0)).collect();
        let mut path: Vec<u8> = Vec::new();
        while let Some((below, length)) = way.last_mut() {
            let length = *length;
            path.truncate(length);
            let Some((name, &child)) = below.next() else {
                way.pop();
                continue;
            };
            let Some(next) = children(child) else { continue };
            path.extend_from_slice(if length == 0 { b"" } else { b"/" });
            path.extend_from_slice(name);
            if self.nodes[child].unlisted {
                bytes += path.len();
                if found.len() == MAX_UNLISTED.0 || bytes > MAX_UNLISTED.1 {
                    break;
                }
                found.push(path.clone());
            }
            way.push((next, path.len()));
        }
        found
    }

    /// Adds an entry that is not a hard link.
    pub(crate) fn add(&mut self, path: &[u8], meta: Meta, kind: Kind, xattrs: Xattrs) -> Result<(), TreeError> {
        let parts = components(path)?;
        let Some((name, parents)) = parts.split_last() else {
            return self.set_root(meta, kind, xattrs);
        };
        if parents.iter().any(|part| is_leftover(part)) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return self.hide(parents, hidden, path);
        }
        let parent = self.directory(parents, path)?;
        let existing = self.children(parent).and_then(|children| children.get(*name).copied());
        let mut node = Node { meta, kind, xattrs, whiteout: false, unlisted: false };
        if let (Some(old), Kind::Directory(_)) = (existing, &node.kind) {
            if matches!(self.nodes[old].kind, Kind::Directory(_)) {
                self.charge(node.xattrs.iter().map(|(n, v)| n.len() + v.len() + 64).sum())?;
                let opaque = self.nodes[old].xattrs.contains_key(OPAQUE.0);
                self.nodes[old].meta = node.meta;
                self.nodes[old].xattrs = node.xattrs;
                self.nodes[old].unlisted = false;
                if opaque {
                    self.nodes[old].make_opaque();
                }
                return Ok(());
            }
            if self.nodes[old].whiteout {
                node.make_opaque();
            }
        }
        self.link(parent, name, node)?;
        Ok(())
    }

    fn set_root(&mut self, meta: Meta, kind: Kind, xattrs: Xattrs) -> Result<(), TreeError> {
        if !matches!(kind, Kind::Directory(_)) {
            return Err(TreeError::BadRoot);
        }
        let opaque = self.nodes[ROOT].xattrs.contains_key(OPAQUE.0);
        self.nodes[ROOT].meta = meta;
        self.nodes[ROOT].xattrs = xattrs;
        if opaque {
            self.nodes[ROOT].make_opaque();
        }
        Ok(())
    }

    fn hide(&mut self, parents: &[&[u8]], hidden: &[u8], path: &[u8]) -> Result<(), TreeError> {
        match hidden {
            b".wh..opq" => {
                let directory = self.directory(parents, path)?;
                self.nodes[directory].make_opaque();
                return self.charge(64);
            }
            other if other.starts_with(b".wh.") => return Ok(()),
            b"" | b"." | b".." => return Err(TreeError::Escapes(shown(path))),
            _ => {}
        }
        let parent = self.directory(parents, path)?;
        let existing = self.children(parent).and_then(|children| children.get(hidden).copied());
        match existing {
            Some(node) => {
                if matches!(self.nodes[node].kind, Kind::Directory(_)) {
                    self.nodes[node].make_opaque();
                    self.nodes[node].unlisted = false;
                }
                Ok(())
            }
            None => self.link(parent, hidden, Node::whiteout()).map(drop),
        }
    }

    /// Adds `path` as a further name of the file at `target`.
    pub(crate) fn add_link(&mut self, path: &[u8], target: &[u8]) -> Result<(), TreeError> {
        let bad = || TreeError::BadLink { path: shown(path), target: shown(target) };
        let mut node = ROOT;
        for part in components(target)? {
            node = self.children(node).and_then(|children| children.get(part).copied()).ok_or_else(bad)?;
        }
        if matches!(self.nodes[node].kind, Kind::Directory(_)) || self.nodes[node].whiteout {
            return Err(bad());
        }
        let parts = components(path)?;
        let (name, parents) = parts.split_last().ok_or(TreeError::BadRoot)?;
        if name.starts_with(b".wh.") {
            return Err(bad());
        }
        // A tar of only links must not grow without bound either.
        let parent = self.directory(parents, path)?;
        self.name(parent, name, node)
    }
}

/// Leftovers of aufs (`.wh..wh.plnk`, `.wh..wh.aufs`) say nothing about the image.
fn is_leftover(name: &[u8]) -> bool {
    name.starts_with(b".wh..wh.") && name != b".wh..wh..opq"
}

impl Node {
    fn implied_directory() -> Self {
        let meta = Meta { mode: 0o755, ..Meta::default() };
        Self { meta, kind: Kind::Directory(BTreeMap::new()), xattrs: BTreeMap::new(), whiteout: false, unlisted: true }
    }

    /// What overlayfs reads as "not here": a character device 0/0.
    fn whiteout() -> Self {
        let kind = Kind::Character { major: 0, minor: 0 };
        Self { meta: Meta::default(), kind, xattrs: BTreeMap::new(), whiteout: true, unlisted: false }
    }

    fn make_opaque(&mut self) {
        self.xattrs.insert(OPAQUE.0.into(), OPAQUE.1.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(tree: &mut Tree, path: &str) -> Result<(), TreeError> {
        tree.add(path.as_bytes(), Meta::default(), Kind::Inline([].into()), BTreeMap::new())
    }

    fn directory(tree: &mut Tree, path: &str) -> Result<(), TreeError> {
        tree.add(path.as_bytes(), Meta::default(), Kind::Directory(BTreeMap::new()), BTreeMap::new())
    }

    fn at<'a>(tree: &'a Tree, path: &str) -> Option<&'a Node> {
        let mut node = ROOT;
        for part in path.split('/') {
            let Kind::Directory(children) = &tree.nodes[node].kind else { return None };
            node = *children.get(part.as_bytes())?;
        }
        Some(&tree.nodes[node])
    }

    #[test]
    fn no_path_leaves_the_root() {
        let mut tree = Tree::new();
        for bad in ["../x", "a/../../x", "/..", "a/.."] {
            assert!(matches!(file(&mut tree, bad), Err(TreeError::Escapes(_))), "{bad}");
        }
        file(&mut tree, "//etc/./passwd").unwrap();
        assert!(at(&tree, "etc/passwd").is_some());
        tree.add(b"out", Meta::default(), Kind::Symlink((*b"/etc").into()), BTreeMap::new()).unwrap();
        assert!(matches!(file(&mut tree, "out/shadow"), Err(TreeError::NotADirectory(_))));
        assert!(matches!(tree.add_link(b"l", b"../../etc/shadow"), Err(TreeError::Escapes(_))));
        assert!(matches!(tree.add_link(b"l", b"out/shadow"), Err(TreeError::BadLink { .. })));
        assert!(matches!(tree.add_link(b"l", b"etc"), Err(TreeError::BadLink { .. })));
        assert!(matches!(file(&mut tree, &"a/".repeat(2100)), Err(TreeError::BadPath(_))));
        assert!(matches!(file(&mut tree, &"a".repeat(256)), Err(TreeError::BadPath(_))));
    }

    #[test]
    fn whiteouts_touch_lower_layers_only() {
        for order in [["d", "d/.wh..wh..opq"], ["d/.wh..wh..opq", "d"]] {
            let mut tree = Tree::new();
            for path in order {
                if path == "d" { directory(&mut tree, path).unwrap() } else { file(&mut tree, path).unwrap() }
            }
            assert!(at(&tree, "d").unwrap().xattrs.contains_key(OPAQUE.0), "{order:?}");
        }
        let mut tree = Tree::new();
        file(&mut tree, ".wh.gone").unwrap();
        assert!(at(&tree, "gone").unwrap().whiteout);
        file(&mut tree, ".wh.both").unwrap();
        directory(&mut tree, "both").unwrap();
        assert!(at(&tree, "both").unwrap().xattrs.contains_key(OPAQUE.0));
        file(&mut tree, "kept").unwrap();
        file(&mut tree, ".wh.kept").unwrap();
        assert!(!at(&tree, "kept").unwrap().whiteout);
        assert!(file(&mut tree, ".wh...").is_err());
        // Nothing is named like a mark, least of all a folder: copied elsewhere it would hide what is there.
        for through in ["d/.wh..wh..opq/x", ".wh.gone/x"] {
            assert!(matches!(file(&mut tree, through), Err(TreeError::ThroughWhiteout(_))), "{through}");
        }
        file(&mut tree, ".wh..wh.plnk/7.8").unwrap();
        assert!(at(&tree, ".wh..wh.plnk").is_none());
    }
}
