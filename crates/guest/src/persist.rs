//! What the cache keeps on disk, version 1, and how it is written.
//!
//! ```text
//! ID/vmlinux                  the uncompressed kernel
//! ID/initramfs                the first file system
//! ID/extra/GROUP/NNN-NAME.ko  further modules, numbered in the order in which they are loaded
//! ID/guest.json               what it is; written last, before the folder gets its name
//! current                     a link to the latest ID
//! .new-…, .old-…              being made, being removed; without meaning when nobody holds the lock
//! .lock                       held by who changes something
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;
pub(crate) const KERNEL: &str = "vmlinux";
pub(crate) const INITRAMFS: &str = "initramfs";
pub(crate) const EXTRA: &str = "extra";
const RECORD: &str = "guest.json";
/// Hexadecimal digits of an id.
pub(crate) const ID_LENGTH: usize = 16;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    pub release: String,
    pub kernel_bytes: u64,
    pub initramfs_bytes: u64,
    pub modules: Vec<String>,
    /// Names of files, by group.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl Record {
    pub(crate) fn new(release: String) -> Self {
        let (modules, extra) = (Vec::new(), BTreeMap::new());
        Self { version: VERSION, release, kernel_bytes: 0, initramfs_bytes: 0, modules, extra }
    }
}

/// What a machine boots. The files stay as they are until the guest is removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// By what it was made from: 16 hexadecimal digits.
    pub id: String,
    /// The kernel's release, `uname -r`.
    pub release: String,
    pub dir: PathBuf,
    /// An uncompressed kernel with a PVH entry.
    pub kernel: PathBuf,
    pub kernel_bytes: u64,
    /// An uncompressed cpio archive: `/init` is the agent, `/modules/NNN-NAME.ko` are loaded in the order of their names.
    pub initramfs: PathBuf,
    pub initramfs_bytes: u64,
    /// Names of the modules in the initramfs, in that order.
    pub modules: Vec<String>,
    /// Further modules by what they are for (`nfs`, `vsock`, `netfilter`, `net`), in the order in which they are loaded.
    /// What the initramfs has is not repeated.
    pub extra: BTreeMap<String, Vec<PathBuf>>,
}

/// Whether this is an id, and so safe as a name of a folder.
pub(crate) fn is_id(text: &str) -> bool {
    text.len() == ID_LENGTH && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The guest in a folder; `None` when there is none, it is not whole, or another version's.
pub(crate) fn read(dir: &Path) -> io::Result<Option<Guest>> {
    let Some(id) = dir.file_name().and_then(|name| name.to_str()).filter(|name| is_id(name)) else { return Ok(None) };
    let Some(bytes) = if_there(fs::read(dir.join(RECORD)))? else { return Ok(None) };
    let Ok(record) = serde_json::from_slice::<Record>(&bytes) else { return Ok(None) };
    let (kernel, initramfs) = (dir.join(KERNEL), dir.join(INITRAMFS));
    let has = |file: &Path, bytes: u64| -> io::Result<bool> {
        Ok(if_there(fs::symlink_metadata(file))?.is_some_and(|meta| meta.is_file() && meta.len() == bytes))
    };
    let is_whole = has(&kernel, record.kernel_bytes)? && has(&initramfs, record.initramfs_bytes)?;
    if record.version != VERSION || !is_whole {
        return Ok(None);
    }
    let mut extra = BTreeMap::new();
    for (group, names) in record.extra {
        let folder = dir.join(EXTRA).join(&group);
        let files: Vec<_> = names.iter().map(|name| folder.join(name)).collect();
        for file in &files {
            if if_there(fs::symlink_metadata(file))?.is_none() {
                return Ok(None);
            }
        }
        extra.insert(group, files);
    }
    Ok(Some(Guest {
        id: id.to_owned(),
        release: record.release,
        dir: dir.to_owned(),
        kernel,
        kernel_bytes: record.kernel_bytes,
        initramfs,
        initramfs_bytes: record.initramfs_bytes,
        modules: record.modules,
        extra,
    }))
}

/// Writes the record of the guest in `dir`, all of whose files are on the disk already.
pub(crate) fn write(dir: &Path, record: &Record) -> io::Result<()> {
    write_synced(&dir.join(RECORD), &serde_json::to_vec_pretty(record)?)?;
    sync(dir)
}

/// Writes a new file, and has it on the disk.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Has the names in a folder on the disk.
pub(crate) fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// `None` for what is not there.
pub(crate) fn if_there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_there_when_all_of_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("0123456789abcdef");
        assert!(read(&place).unwrap().is_none());
        fs::create_dir_all(place.join("extra/nfs")).unwrap();
        assert!(read(&place).unwrap().is_none());
        let mut record = Record::new("6.1".into());
        (record.kernel_bytes, record.initramfs_bytes) = (2, 3);
        record.extra.insert("nfs".into(), vec!["000-nfs.ko".into()]);
        write(&place, &record).unwrap();
        write_synced(&place.join(KERNEL), b"12").unwrap();
        write_synced(&place.join(INITRAMFS), b"123").unwrap();
        assert!(read(&place).unwrap().is_none());
        fs::write(place.join("extra/nfs/000-nfs.ko"), "").unwrap();
        let guest = read(&place).unwrap().unwrap();
        assert_eq!((guest.id.as_str(), guest.release.as_str()), ("0123456789abcdef", "6.1"));
        assert_eq!(guest.extra["nfs"], [place.join("extra/nfs/000-nfs.ko")]);

        fs::write(place.join(KERNEL), "1").unwrap();
        assert!(read(&place).unwrap().is_none());
        fs::write(place.join(KERNEL), "12").unwrap();
        let text = fs::read_to_string(place.join(RECORD)).unwrap();
        for other in [text.replace("\"version\": 1", "\"version\": 2"), String::new(), "{}".into()] {
            fs::write(place.join(RECORD), other).unwrap();
            assert!(read(&place).unwrap().is_none());
        }
    }

    #[test]
    fn ids_are_lower_hexadecimal() {
        assert!(is_id("0123456789abcdef"));
        assert!(!["", "0123456789ABCDEF", "0123456789abcde/", "0123456789abcdef0"].into_iter().any(is_id));
    }
}
