//! A machine that was saved when it had booted: its memory, which copies share until they write to it, and the state of its devices.
//!
//! ```text
//! DIR/memory   as long as the machine's memory, with holes
//! DIR/state    of the devices
//! DIR/key      what it was made from, and in a second line the SHA-256 of the other two
//! ```
//!
//! It has another name (`.unfinished`) until all of it is there.
//!
//! Copies get the memory as a sealed file: nobody, and no monitor that was taken over, can change what the others begin with.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;

use sha2::{Digest, Sha256};

/// Bytes of a page of memory.
const PAGE: usize = 4096;
/// How the name of a directory ends in which not all is there yet.
const UNFINISHED: &str = "unfinished";

/// A machine's memory and state.
#[derive(Debug)]
pub struct Template {
    memory: OwnedFd,
    state: Vec<u8>,
}

impl Template {
    /// Takes memory that nobody writes to any more.
    pub(crate) fn new(memory: OwnedFd, state: Vec<u8>) -> io::Result<Self> {
        seal(memory.as_fd())?;
        Ok(Self { memory, state })
    }

    pub(crate) fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// The state, to be read from its start.
    pub(crate) fn state(&self) -> io::Result<OwnedFd> {
        let mut file = File::from(memory_file(c"joey-state", 0)?);
        file.write_all(&self.state)?;
        io::Seek::rewind(&mut file)?;
        Ok(file.into())
    }

    /// The same as it is.
    pub(crate) fn state_bytes(&self) -> &[u8] {
        &self.state
    }

    /// Keeps it in a directory for later processes, in the place of what that holds.
    pub fn store(&self, dir: &Path, key: &str) -> io::Result<()> {
        let unfinished = dir.with_extension(UNFINISHED);
        remove(&unfinished)?;
        // On a disk that is full, what is there of it is in the way.
        self.write(&unfinished, key).inspect_err(|_| drop(remove(&unfinished)))?;
        remove(dir)?;
        fs::rename(unfinished, dir)
    }

    fn write(&self, dir: &Path, key: &str) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let new = |name: &str| File::options().write(true).create_new(true).mode(0o600).open(dir.join(name));
        joey_disk::copy(&self.opened_anew()?, &new("memory")?)?;
        new("state")?.write_all(&self.state)?;
        new("key")?.write_all(format!("{key}\n{}", self.digest()?).as_bytes())?;
        ["memory", "state", "key"].iter().try_for_each(|name| File::open(dir.join(name))?.sync_all())
    }

    /// Removes what was being stored below this directory when its process ended.
    pub fn clear_unfinished(dir: &Path) -> io::Result<()> {
        let entries = fs::read_dir(dir)?.flatten().map(|entry| entry.path());
        entries.filter(|path| path.extension().is_some_and(|end| end == UNFINISHED)).try_for_each(|path| remove(&path))
    }

    /// Whether something was stored under this key.
    pub fn is_stored(dir: &Path, key: &str) -> bool {
        matches!(stored_digest(dir, key), Ok(Some(_)))
    }

    /// What was stored under this key; `None`: nothing whole.
    pub fn load(dir: &Path, key: &str) -> io::Result<Option<Self>> {
        let Some(digest) = stored_digest(dir, key)? else { return Ok(None) };
        let mut state = Vec::new();
        File::open(dir.join("state"))?.read_to_end(&mut state)?;
        let found = Self::new(copy(&File::open(dir.join("memory"))?)?, state)?;
        let whole = found.digest()? == digest;
        if !whole {
            tracing::warn!(dir = %dir.display(), "a template that was kept is damaged, and another one is made");
        }
        Ok(Some(found).filter(|_| whole))
    }

    /// The memory, with a position of its own.
    fn opened_anew(&self) -> io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.memory.as_raw_fd()))
    }

    /// Of the state, and of what there is in the memory, page by page.
    fn digest(&self) -> io::Result<String> {
        let memory = self.opened_anew()?;
        let (mut hash, mut page) = (Sha256::new_with_prefix(&self.state), [0; PAGE]);
        for extent in joey_disk::extents(&memory)? {
            for at in extent.step_by(PAGE) {
                memory.read_exact_at(&mut page, at)?;
                // Whether there is a hole in its place is the file system's affair.
                if page != [0; PAGE] {
                    hash.update(at.to_le_bytes());
                    hash.update(page);
                }
            }
        }
        Ok(format!("{:x}", hash.finalize()))
    }
}

/// The digest of what was stored under this key.
fn stored_digest(dir: &Path, key: &str) -> io::Result<Option<String>> {
    match fs::read_to_string(dir.join("key")) {
        Ok(found) => {
            Ok(found.split_once('\n').filter(|(stored, _)| *stored == key).map(|(_, digest)| digest.to_owned()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes what is stored there.
pub fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Memory for a machine that is to be a template.
pub(crate) fn memory(bytes: u64) -> io::Result<OwnedFd> {
    let fd = memory_file(c"joey-memory", libc::MFD_ALLOW_SEALING)?;
    let file = File::from(fd);
    file.set_len(bytes)?;
    Ok(file.into())
}

/// The same as in this file of memory, and with its holes.
pub(crate) fn copy(memory_of: &File) -> io::Result<OwnedFd> {
    let copy = File::from(memory(memory_of.metadata()?.len())?);
    joey_disk::copy(memory_of, &copy)?;
    Ok(copy.into())
}

/// Memory out of a file that a monitor wrote it into, with holes where there is nothing.
pub(crate) fn memory_from(file: &File) -> io::Result<OwnedFd> {
    let memory = File::from(memory(file.metadata()?.len())?);
    let (mut page, mut at) = (vec![0; PAGE], 0);
    loop {
        match file.read_at(&mut page, at)? {
            0 => return Ok(memory.into()),
            count => {
                if page[..count].iter().any(|byte| *byte != 0) {
                    memory.write_all_at(&page[..count], at)?;
                }
                at += count as u64;
            }
        }
    }
}

pub(crate) fn memory_file(name: &std::ffi::CStr, flags: libc::c_uint) -> io::Result<OwnedFd> {
    // SAFETY: a C string and flags; the descriptor is new and nobody else's.
    unsafe {
        match libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags) {
            fd if fd >= 0 => Ok(OwnedFd::from_raw_fd(fd)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

pub(crate) fn seal(memory: BorrowedFd<'_>) -> io::Result<()> {
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: an open descriptor and integers.
    match unsafe { libc::fcntl(memory.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn what_is_stored_comes_back_and_cannot_be_changed() {
        let dir = std::env::temp_dir().join(format!("joey-template-{}", std::process::id()));
        let raw = File::from(memory(64 << 20).unwrap());
        raw.write_all_at(b"kernel", 40 << 20).unwrap();
        let template = Template::new(raw.into(), b"devices".to_vec()).unwrap();
        template.store(&dir, "one").unwrap();
        assert!(fs::metadata(dir.join("memory")).unwrap().blocks() * 512 < 1 << 20, "holes stay holes");
        assert!(Template::load(&dir, "two").unwrap().is_none());
        let back = Template::load(&dir, "one").unwrap().expect("it is whole");
        let path = format!("/proc/self/fd/{}", back.memory().as_raw_fd());
        let again = File::options().read(true).write(true).open(path).unwrap();
        let mut bytes = [0; 6];
        again.read_exact_at(&mut bytes, 40 << 20).unwrap();
        assert_eq!((&bytes, again.metadata().unwrap().len()), (b"kernel", 64 << 20));
        assert!(again.write_all_at(b"x", 0).is_err(), "it is sealed");
        // SAFETY: an open descriptor and integers.
        let punched = unsafe { libc::fallocate(again.as_raw_fd(), libc::FALLOC_FL_PUNCH_HOLE | 1, 0, 4096) };
        assert_eq!(punched, -1, "nobody takes it away either");
        let mut state = String::new();
        File::from(back.state().unwrap()).read_to_string(&mut state).unwrap();
        assert_eq!(state, "devices");
        for (name, at) in [("memory", 40 << 20), ("memory", 50 << 20), ("state", 2)] {
            template.store(&dir, "one").unwrap();
            File::options().write(true).open(dir.join(name)).unwrap().write_all_at(b"X", at).unwrap();
            assert!(Template::load(&dir, "one").unwrap().is_none(), "{name} is damaged at {at}");
        }
        template.store(&dir, "one").unwrap();
        assert!(Template::load(&dir, "one").unwrap().is_some());
        fs::remove_file(dir.join("key")).unwrap();
        assert!(Template::load(&dir, "one").unwrap().is_none(), "one that was cut off is none");
        remove(&dir).unwrap();
    }

    #[test]
    fn memory_out_of_a_file_has_holes_where_there_is_nothing() {
        let mut file = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; (1 << 20) + 100];
        bytes[700_000] = 9;
        *bytes.last_mut().unwrap() = 8;
        file.write_all(&bytes).unwrap();
        let memory = File::from(memory_from(&file).unwrap());
        let mut found = vec![0; bytes.len() + 1];
        assert_eq!(memory.read_at(&mut found, 0).unwrap(), bytes.len());
        assert!(found[..bytes.len()] == bytes);
        assert_eq!(memory.metadata().unwrap().blocks() * 512, 2 * PAGE as u64);
    }
}
