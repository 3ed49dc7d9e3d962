//! Disks for machines: an empty file system is made once for each size, and copied.

use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Bytes of a disk where nothing is said: a file with holes, which takes what is written.
const UNSAID: u64 = 16 << 30;

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

    /// Makes an empty disk on which so many bytes may be written, larger by a twentieth, as the one of an instance on the host is.
    pub(super) fn copy(&self, place: &Path, bytes: Option<u64>) -> io::Result<()> {
        let bytes = bytes.map_or(UNSAID, |bytes| bytes.saturating_add(bytes / 20)).min(joey_disk::size(&self.dir)?);
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
        let copy = File::options().write(true).create_new(true).mode(0o600).open(place)?;
        joey_disk::copy(&File::open(empty)?, &copy)
    }
}
