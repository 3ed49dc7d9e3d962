//! Directories that a layer leads through but does not list: their owners and modes are those of the layers below.
//!
//! Engines that unpack layers onto each other leave such a directory as it was; in a layer of its own it must be something,
//! and overlayfs shows the topmost one. So an image with such layers gets a further, small layer on top, its cover, which
//! holds these directories alone, with the attributes of the highest layer that lists them. Layers stay shared and named by
//! their contents. Where a lower layer has a link instead, see [`crate::detour`].

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use joey_model::Digest;
use sha2::{Digest as _, Sha256};

use crate::erofs::{self, Blocks};
use crate::looks::Looks;
use crate::persist::Folders;
use crate::stack::{Below, Layer, Says, ask, parents};
use crate::tree::{Kind, Meta, Tree, Xattrs};

/// Most unlisted directories looked up for an image; further ones stay root:root 0755.
const MAX_PATHS: usize = 20_000;

/// The name of the cover for a stack of layers; `None` when each lists every directory it leads through.
pub(crate) fn name(folders: &Folders, layers: &[Digest]) -> Option<Digest> {
    if !layers.iter().any(|layer| folders.unlisted(layer).exists()) {
        return None;
    }
    let mut hash = Sha256::new();
    hash.update(b"cover 2\n");
    layers.iter().for_each(|layer| hash.update(layer.as_str()));
    Some(Digest::from_sha256(&hash.finalize().into()))
}

/// Writes the cover for mounted layers (name and folder, topmost first) into `target`, which stays empty when nothing needs
/// covering.
pub(crate) fn write(folders: &Folders, layers: &[(Digest, PathBuf)], looks: &Looks, target: &Path) -> io::Result<()> {
    let stack: Vec<_> =
        layers.iter().map(|(layer, folder)| Layer::read(folders, layer, folder)).collect::<io::Result<_>>()?;
    let mut found = BTreeMap::new();
    let paths: HashSet<&Vec<u8>> = stack.iter().flat_map(|layer| &layer.unlisted).take(MAX_PATHS).collect();
    for path in paths {
        if let Some(shown) = covered(looks, &stack, path)? {
            found.insert(path.clone(), shown);
        }
    }
    // The way to a covered directory is covered as well, with what shows there now.
    let mut ways: HashSet<Vec<u8>> = HashSet::new();
    for way in found.keys().flat_map(|path| parents(path)) {
        looks.count(way)?;
        if !ways.contains(way) {
            ways.insert(way.to_vec());
        }
    }
    for way in ways {
        if let Entry::Vacant(place) = found.entry(way) {
            let shown = merged(looks, &stack, place.key())?.map_or_else(default, |(shown, _)| shown);
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

/// What a directory is to show where the topmost layer that has it does not list it, and a lower one does.
fn covered(looks: &Looks, stack: &[Layer], path: &[u8]) -> io::Result<Option<(Meta, Xattrs)>> {
    Ok(merged(looks, stack, path)?.filter(|(_, unlisted_above)| *unlisted_above).map(|(shown, _)| shown))
}

/// The attributes of the highest layer that lists `path`, and whether a layer above it has the directory unlisted.
fn merged(looks: &Looks, stack: &[Layer], path: &[u8]) -> io::Result<Option<((Meta, Xattrs), bool)>> {
    let mut unlisted = false;
    for layer in stack {
        let below = match ask(looks, layer, path)? {
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
