//! Layers mounted once per host: `LAYERS/HEX`, read-only EROFS, found again after a restart.
//!
//! Set-user-id bits work in these mounts; what a container may do with them is its sandbox's business.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use joey_disk::Access;
use joey_model::Digest;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};

pub(crate) struct Mounts {
    root: PathBuf,
    mounted: Mutex<HashSet<Digest>>,
    /// One change at a time.
    changing: tokio::sync::Mutex<()>,
}

impl Mounts {
    /// Finds the mounts an earlier process left.
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        let root = root.canonicalize()?;
        let table = fs::read_to_string("/proc/self/mountinfo")?;
        let mounted = table.lines().filter_map(|line| layer_of(line, &root)).collect();
        Ok(Self { root, mounted: Mutex::new(mounted), changing: tokio::sync::Mutex::new(()) })
    }

    pub(crate) fn path(&self, layer: &Digest) -> PathBuf {
        self.root.join(layer.hex())
    }

    pub(crate) fn is_mounted(&self, layer: &Digest) -> bool {
        self.mounted.lock().expect("no holder panics").contains(layer)
    }

    /// Mounts those of `layers` (digest and image file) that are not; idempotent.
    pub(crate) async fn mount(&self, layers: Vec<(Digest, PathBuf)>) -> io::Result<()> {
        if layers.iter().all(|(layer, _)| self.is_mounted(layer)) {
            return Ok(());
        }
        let _changing = self.changing.lock().await;
        for (layer, image) in layers {
            if self.is_mounted(&layer) {
                continue;
            }
            let target = self.path(&layer);
            tokio::task::spawn_blocking(move || mount(&image, &target)).await.map_err(io::Error::other)??;
            self.mounted.lock().expect("no holder panics").insert(layer);
        }
        Ok(())
    }

    /// Takes the mount of `layer` away; overlays that stand on it keep working.
    pub(crate) async fn unmount(&self, layer: &Digest) -> io::Result<()> {
        let _changing = self.changing.lock().await;
        if !self.is_mounted(layer) {
            return Ok(());
        }
        let target = self.path(layer);
        match nix::mount::umount2(&target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
        self.mounted.lock().expect("no holder panics").remove(layer);
        let _ = fs::remove_dir(&target);
        Ok(())
    }

    pub(crate) async fn unmount_all(&self) -> io::Result<()> {
        let layers: Vec<Digest> = self.mounted.lock().expect("no holder panics").iter().cloned().collect();
        for layer in layers {
            self.unmount(&layer).await?;
        }
        Ok(())
    }
}

/// The layer a line of mountinfo (proc(5)) shows mounted directly below `root`.
fn layer_of(line: &str, root: &Path) -> Option<Digest> {
    let (before, after) = line.split_once(" - ")?;
    let point = unescape(before.split(' ').nth(4)?);
    let name = Path::new(&point).strip_prefix(root).ok()?.to_str()?.to_owned();
    (after.split(' ').next() == Some("erofs")).then(|| Digest::parse(&format!("sha256:{name}")).ok())?
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    ["\\040 ", "\\011\t", "\\012\n", "\\134\\"]
        .iter()
        .fold(text.to_owned(), |text, rule| text.replace(&rule[..4], &rule[4..]))
}

fn mount(image: &Path, target: &Path) -> io::Result<()> {
    fs::create_dir_all(target)?;
    match mount_erofs(image, target) {
        // Kernels before 6.12 mount only block devices.
        Err(Errno::ENOTBLK) => {
            let (device, _open) = joey_disk::attach(image, Access::Read)?;
            Ok(mount_erofs(&device, target)?)
        }
        other => Ok(other?),
    }
}

fn mount_erofs(source: &Path, target: &Path) -> Result<(), Errno> {
    nix::mount::mount(Some(source), target, Some("erofs"), MsFlags::MS_RDONLY | MsFlags::MS_NOATIME, None::<&str>)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_ours_are_recognised() {
        let hex = "ab".repeat(32);
        let root = Path::new("/var/lib/jo ey/layers");
        let line = format!(r"36 35 0:52 / /var/lib/jo\040ey/layers/{hex} ro,noatime shared:1 - erofs none ro");
        assert_eq!(layer_of(&line, root).unwrap().hex(), hex);
        assert_eq!(layer_of(&line.replace("erofs", "ext4"), root), None);
        assert_eq!(layer_of(&line, Path::new("/var/lib/other")), None);
    }
}
