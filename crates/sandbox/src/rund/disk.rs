//! Disks for machines: an empty file system is made once for each size, and copied.

use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use joey_hypervisor::DiskKey;

/// Bytes of a disk where nothing is said: a file with holes, which takes what is written.
pub(super) const USUAL: u64 = 16 << 30;

/// Bytes of a disk on which nothing is kept.
const REHEARSAL: u64 = 64 << 20;

fn whole(bytes: Option<u64>) -> u64 {
    bytes.map_or(USUAL, |bytes| bytes.saturating_add(bytes / 20))
}

/// Whether such a disk is none longer than most.
pub(super) fn is_usual(bytes: Option<u64>) -> bool {
    whole(bytes) <= USUAL
}

pub(super) struct Disks {
    dir: PathBuf,
    /// One is made at a time.
    making: Mutex<()>,
}

impl Disks {
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let dir = dir.join("disks");
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        Ok(Self { dir, making: Mutex::new(()) })
    }

    /// Makes an empty disk for a rehearsal.
    pub(super) fn rehearsal(&self, place: &Path) -> io::Result<()> {
        self.copy(place, Some(REHEARSAL), None)
    }

    /// Makes an empty disk on which so many bytes may be written, larger by a twentieth, as the one of an instance on the host is;
    /// encrypted where there is a key.
    pub(super) fn copy(&self, place: &Path, bytes: Option<u64>, key: Option<&DiskKey>) -> io::Result<()> {
        let bytes = whole(bytes).min(joey_disk::size(&self.dir)?);
        let empty = self.dir.join(format!("{bytes}.ext4"));
        if !empty.exists() {
            let _making = self.making.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if !empty.exists() {
                let new = self.dir.join(format!(".{bytes}.new"));
                let _ = std::fs::remove_file(&new);
                joey_disk::format(&new, bytes)?;
                std::fs::rename(new, &empty)?;
            }
        }
        if let Some(key) = key {
            return key.encrypt(&empty, place);
        }
        let copy = File::options().write(true).create_new(true).mode(0o600).open(place)?;
        joey_disk::copy(&File::open(empty)?, &copy)
    }
}
