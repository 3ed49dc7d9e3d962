//! The supplements of an image: what makes its layers look on each other as if they had been unpacked onto each other.
//!
//! They are made at an image's first use, belong to its chain of layers, count as part of its size and go with it. Making one
//! holds up nothing but other uses of the same: what it stands on is pinned meanwhile, not locked.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use joey_model::Digest;

use crate::error::Problem;
use crate::images::Inner;
use crate::locks::Held;
use crate::looks::{self, Looks, MAX_LOOKS, Refused};
use crate::persist::Folders;
use crate::tree::OPAQUE;
use crate::{cover, detour};

/// Layers and where they are mounted, topmost first.
pub(crate) type Stack = Vec<(Digest, PathBuf)>;

#[derive(Clone, Copy)]
enum Which {
    Detour,
    Cover,
}

/// Tells the work that nobody waits for it any more.
struct GiveUp(Arc<AtomicBool>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The names of what layers may be supplemented with.
pub(crate) fn names(folders: &Folders, layers: &[Digest]) -> Vec<Digest> {
    let detours = (0..layers.len()).filter_map(|at| detour::name(folders, &layers[..=at]));
    detours.chain(cover::name(folders, layers)).collect()
}

/// Bytes of the supplements made so far.
pub(crate) fn size(folders: &Folders, layers: &[Digest]) -> u64 {
    let size = |name| std::fs::metadata(folders.layer(name)).map_or(0, |metadata| metadata.len());
    names(folders, layers).iter().map(size).sum()
}

impl Inner {
    /// What makes up an image whose layers are mounted, topmost first: the layers and their supplements.
    pub(crate) async fn supplement(self: &Arc<Self>, layers: &[Digest]) -> Result<Stack, Problem> {
        let failed = |error| Problem::store("stack the layers", &error);
        let mut stack = Stack::new();
        for (at, layer) in layers.iter().enumerate() {
            let folder = self.mounts.path(layer);
            if looks::has_attribute(&folder, OPAQUE.0).map_err(failed)? {
                // Overlayfs does not ask the root of a layer whether it hides what is below.
                stack.clear();
            }
            // A layer that comes twice: overlayfs takes each folder once, and the upper one hides the lower.
            stack.retain(|(other, _)| other != layer);
            stack.insert(0, (layer.clone(), folder));
            if let Some(name) = detour::name(&self.folders, &layers[..=at]) {
                stack.splice(0..0, self.made(Which::Detour, name, layers, &stack).await?);
            }
        }
        if let Some(name) = cover::name(&self.folders, layers) {
            stack.splice(0..0, self.made(Which::Cover, name, layers, &stack).await?);
        }
        Ok(stack)
    }

    /// A supplement for `stack`, made at first use and mounted; `None` where none is needed.
    async fn made(
        self: &Arc<Self>,
        which: Which,
        name: Digest,
        layers: &[Digest],
        stack: &Stack,
    ) -> Result<Option<(Digest, PathBuf)>, Problem> {
        let failed = |error| Problem::store("stack the layers", &error);
        let file = self.folders.layer(&name);
        if !file.exists() {
            let held = self.making.lock(&name).await;
            self.make(held, which, &name, layers, stack).await?;
        }
        if std::fs::metadata(&file).map_err(failed)?.len() == 0 {
            return Ok(None);
        }
        self.mounts.mount(vec![(name.clone(), file)]).await.map_err(failed)?;
        let folder = self.mounts.path(&name);
        Ok(Some((name, folder)))
    }

    /// Writes a supplement on a thread of its own, which holds the name's lock and the layers until it has ended.
    async fn make(
        self: &Arc<Self>,
        held: Held,
        which: Which,
        name: &Digest,
        layers: &[Digest],
        stack: &Stack,
    ) -> Result<(), Problem> {
        let needed: Vec<Digest> = stack.iter().map(|(layer, _)| layer).chain([name]).cloned().collect();
        let pins = self.pin_stored(&needed).await;
        // Before the pins were set the image may have been removed.
        if stack.iter().any(|(layer, _)| !self.mounts.is_mounted(layer)) {
            return Err(Problem::NotStored);
        }
        let limit = self.config.max_image_bytes;
        let taken = self.stored_size(layers)?.saturating_add(size(&self.folders, layers));
        let room = limit.saturating_sub(taken);
        let give_up = GiveUp(Arc::default());
        let (folders, name, stack, given_up) = (self.folders.clone(), name.clone(), stack.clone(), give_up.0.clone());
        let work = move || {
            let _keep = (held, pins);
            let looks = Looks::new(MAX_LOOKS, given_up);
            write(&folders, which, &name, &stack, &looks, room)
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(|error| explain(&error, limit))
    }
}

fn write(folders: &Folders, which: Which, name: &Digest, stack: &Stack, looks: &Looks, room: u64) -> io::Result<()> {
    let file = folders.layer(name);
    if file.exists() {
        return Ok(());
    }
    let temporary = folders.temporary(&format!("{}.supplement", name.hex()));
    let write = |target: &Path| -> io::Result<()> {
        let unlisted = match which {
            Which::Detour => detour::write(folders, stack, looks, room, target)?,
            Which::Cover => cover::write(folders, stack, looks, target).map(|()| Vec::new())?,
        };
        if std::fs::metadata(target)?.len() > room {
            return Err(Refused::TooLarge.into());
        }
        folders.write_unlisted(name, &unlisted)?;
        std::fs::rename(target, &file)
    };
    write(&temporary).inspect_err(|_| drop(std::fs::remove_file(&temporary)))
}

fn explain(error: &io::Error, limit: u64) -> Problem {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Refused>()) {
        Some(Refused::TooLarge) => Problem::ImageTooLarge { limit },
        Some(refused @ Refused::TooManyLooks) => Problem::Tangled { detail: refused.to_string() },
        _ => Problem::store("stack the layers", error),
    }
}
