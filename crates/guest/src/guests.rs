//! The cache of guests: made once from the same things, whole or not there, whoever is killed when.
//!
//! ```text
//!  build: lock ─► clear what was left ─► hash ─► there? ──────────────────────────► current ─► done
//!                                                  └─► .new-… ─► fsync ─► rename ────┘
//! ```

use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::error::{GuestError, Result};
use crate::initramfs::{self, numbered, read_agent};
use crate::kernel;
use crate::persist::{self, Guest, Record, if_there, is_id};
use crate::source::{Kernel, Source, Unpacked};

/// Changed whenever the same sources make another guest, so that those of before are not taken for it.
const FORMAT: &[u8] = b"joey guest 1\n";
const LOCK: &str = ".lock";
const CURRENT: &str = "current";
const NEW: &str = ".new-";
const OLD: &str = ".old-";

/// What a guest is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub kernel: Kernel,
    /// A program for x86-64 that is linked statically.
    pub agent: PathBuf,
}

/// A guest that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    pub guest: Guest,
    /// Whether it was made just now.
    pub fresh: bool,
}

/// The guests of a host, in a directory that several processes may use.
#[derive(Debug, Clone)]
pub struct Guests {
    dir: PathBuf,
}

impl Guests {
    /// Those in `dir`, which is made if it is not there.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self> {
        let dir = dir.into();
        fs::create_dir_all(&dir).map_err(GuestError::host("make", &dir))?;
        Ok(Self { dir })
    }

    /// Makes the guest, if it is not there, and makes it the current one. Blocks, and waits for another that makes one.
    pub fn build(&self, request: &Request) -> Result<Built> {
        let _lock = self.lock()?;
        self.clear()?;
        let agent = read_agent(&request.agent)?;
        let source = Source::open(&request.kernel)?;
        let id = id(&source, &agent)?;
        let place = self.dir.join(&id);
        let found = self.look(&id)?;
        let fresh = found.is_none();
        if fresh {
            self.discard(&place)?;
            self.make(&place, source, &agent, request.kernel.path())?;
        }
        self.point_to(&id)?;
        let guest = match found {
            Some(guest) => guest,
            None => self.look(&id)?.ok_or(GuestError::NotFound { id })?,
        };
        Ok(Built { guest, fresh })
    }

    /// The guest that was built last; `None` too when it is not whole.
    pub fn current(&self) -> Result<Option<Guest>> {
        let link = self.dir.join(CURRENT);
        let target = if_there(fs::read_link(&link)).map_err(GuestError::host("read", &link))?;
        match target.as_deref().and_then(Path::to_str) {
            Some(id) => self.look(id),
            None => Ok(None),
        }
    }

    /// All guests that are whole, by id.
    pub fn list(&self) -> Result<Vec<Guest>> {
        let mut found = Vec::new();
        for name in self.names()? {
            found.extend(self.look(&name)?);
        }
        Ok(found)
    }

    /// Removes a guest that is not the current one. Machines that run keep what they have opened.
    pub fn remove(&self, id: &str) -> Result<()> {
        let _lock = self.lock()?;
        self.clear()?;
        let place = self.dir.join(id);
        if !is_id(id) || !place.exists() {
            return Err(GuestError::NotFound { id: id.to_owned() });
        }
        if self.current()?.is_some_and(|current| current.id == id) {
            return Err(GuestError::InUse { id: id.to_owned() });
        }
        self.discard(&place)
    }

    fn look(&self, id: &str) -> Result<Option<Guest>> {
        if !is_id(id) {
            return Ok(None);
        }
        let place = self.dir.join(id);
        persist::read(&place).map_err(GuestError::host("read", &place))
    }

    /// Held until it is dropped; the kernel drops it for who is killed.
    fn lock(&self) -> Result<File> {
        let path = self.dir.join(LOCK);
        let locked = File::options().create(true).truncate(false).write(true).open(&path).and_then(|file| {
            loop {
                match file.lock() {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    locked => break locked.map(|()| file),
                }
            }
        });
        locked.map_err(GuestError::host("lock", &path))
    }

    /// The names in the directory, in order.
    fn names(&self) -> Result<Vec<String>> {
        let read = fs::read_dir(&self.dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let entries = read.map_err(GuestError::host("list", &self.dir))?;
        let mut names: Vec<_> = entries.iter().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        Ok(names)
    }

    /// Removes what those who were killed have left. Only with the lock: nobody else is at work then.
    fn clear(&self) -> Result<()> {
        for name in self.names()?.iter().filter(|name| name.starts_with(NEW) || name.starts_with(OLD)) {
            let path = self.dir.join(name);
            let is_folder = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir());
            let removed = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(GuestError::host("remove", &path))?;
        }
        Ok(())
    }

    /// Removes a guest, or what is left of one, such that it is gone at once.
    fn discard(&self, place: &Path) -> Result<()> {
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        let aside = self.dir.join(format!("{OLD}{name}"));
        let moved = if_there(fs::rename(place, &aside)).map_err(GuestError::host("remove", place))?;
        match moved {
            Some(()) => fs::remove_dir_all(&aside).map_err(GuestError::host("remove", &aside)),
            None => Ok(()),
        }
    }

    fn make(&self, place: &Path, source: Source<'_>, agent: &[u8], kernel: &Path) -> Result<()> {
        // Removed where the making of it fails.
        let new = tempfile::Builder::new()
            .prefix(&format!("{NEW}{}-", std::process::id()))
            .permissions(Permissions::from_mode(0o755))
            .tempdir_in(&self.dir)
            .map_err(GuestError::host("make a folder in", &self.dir))?;
        let unpacked = source.unpack(new.path())?;
        let mut record = Record::new(write_kernel(&new, &unpacked, kernel)?);
        record.kernel_bytes = length(&new.path().join(persist::KERNEL))?;
        let failed = || GuestError::host("write a guest to", new.path());
        write_initramfs(new.path(), agent, &unpacked, &mut record).map_err(failed())?;
        write_extra(new.path(), &unpacked, &mut record).map_err(failed())?;
        persist::write(new.path(), &record).map_err(failed())?;
        fs::rename(new.path(), place).map_err(GuestError::host("make", place))?;
        let _ = new.keep();
        persist::sync(&self.dir).map_err(GuestError::host("write", &self.dir))
    }

    /// Makes a guest the current one, in one step.
    fn point_to(&self, id: &str) -> Result<()> {
        let link = self.dir.join(CURRENT);
        if fs::read_link(&link).is_ok_and(|target| target == Path::new(id)) {
            return Ok(());
        }
        let new = self.dir.join(format!("{NEW}{CURRENT}"));
        let moved = symlink(id, &new).and_then(|()| fs::rename(&new, &link)).and_then(|()| persist::sync(&self.dir));
        moved.map_err(GuestError::host("replace", &link))
    }
}

/// By what a guest is made from.
fn id(source: &Source<'_>, agent: &[u8]) -> Result<String> {
    let mut hasher = Sha256::new();
    hasher.update(FORMAT);
    hasher.update((agent.len() as u64).to_le_bytes());
    hasher.update(agent);
    source.hash(&mut hasher)?;
    let digest = hasher.finalize();
    Ok(digest[..persist::ID_LENGTH / 2].iter().map(|byte| format!("{byte:02x}")).collect())
}

fn length(path: &Path) -> Result<u64> {
    fs::metadata(path).map(|meta| meta.len()).map_err(GuestError::host("read", path))
}

/// Writes the kernel and says its release.
fn write_kernel(new: &TempDir, unpacked: &Unpacked, kernel: &Path) -> Result<String> {
    let path = new.path().join(persist::KERNEL);
    let failed = GuestError::source("unpack", kernel);
    let options = File::options().read(true).write(true).create_new(true).open(&path);
    let file = options.map_err(GuestError::host("make", &path))?;
    unpacked.image().and_then(|image| kernel::write_vmlinux(image, &file)).map_err(&failed)?;
    if !kernel::has_pvh_entry(&file).map_err(&failed)? {
        let what = "a PVH entry (CONFIG_PVH), by which it is started without firmware".to_owned();
        return Err(GuestError::Lacks { kernel: kernel.to_owned(), what });
    }
    let release = match &unpacked.release {
        Some(release) => release.clone(),
        None => kernel::release(&file).map_err(&failed)?.ok_or_else(|| GuestError::Malformed {
            path: kernel.to_owned(),
            detail: "it does not tell its release (\"Linux version …\")".into(),
        })?,
    };
    unpacked.modules.check_release(&release, kernel)?;
    file.sync_all().map_err(GuestError::host("write", &path))?;
    Ok(release)
}

fn write_initramfs(new: &Path, agent: &[u8], unpacked: &Unpacked, record: &mut Record) -> io::Result<()> {
    let mut file = File::create_new(new.join(persist::INITRAMFS))?;
    initramfs::write(agent, &unpacked.modules.base, BufWriter::new(&mut file))?;
    file.sync_all()?;
    record.initramfs_bytes = file.metadata()?.len();
    record.modules = unpacked.modules.base.iter().map(|module| module.name.clone()).collect();
    Ok(())
}

fn write_extra(new: &Path, unpacked: &Unpacked, record: &mut Record) -> io::Result<()> {
    let all = new.join(persist::EXTRA);
    fs::create_dir(&all)?;
    for (group, modules) in &unpacked.modules.extra {
        let folder = all.join(group);
        fs::create_dir(&folder)?;
        let mut names = Vec::new();
        for (place, module) in modules.iter().enumerate() {
            let name = numbered(place, module);
            persist::write_synced(&folder.join(&name), &module.bytes)?;
            names.push(name);
        }
        persist::sync(&folder)?;
        record.extra.insert((*group).to_owned(), names);
    }
    persist::sync(&all)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::fixture::{all, bzimage, deb, elf, module, vmlinux};
    use crate::packing::Packing;

    const RELEASE: &str = "6.12.1-test";

    /// A directory with a package, an agent and a cache.
    struct Place(TempDir);

    impl Place {
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            place.put("kernel.deb", &deb(RELEASE, Packing::Xz));
            place.put("agent", &crate::fixture::agent());
            place
        }

        fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
            let path = self.0.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, bytes).unwrap();
            path
        }

        fn request(&self) -> Request {
            let path = |name: &str| self.0.path().join(name);
            Request { kernel: Kernel::Package(path("kernel.deb")), agent: path("agent") }
        }

        fn guests(&self) -> Guests {
            Guests::open(self.0.path().join("guests")).unwrap()
        }
    }

    /// Name, mode, device and contents of an entry.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    fn listed(guest: &Guest) -> Vec<Entry> {
        let mut rest: Box<dyn io::Read> = Box::new(File::open(&guest.initramfs).unwrap());
        let mut found = Vec::new();
        loop {
            let mut reader = cpio::NewcReader::new(rest).unwrap();
            let entry = reader.entry();
            if entry.is_trailer() {
                return found;
            }
            let (name, device) = (entry.name().to_owned(), (entry.rdev_major(), entry.rdev_minor()));
            let mode = entry.mode();
            assert_eq!((entry.mtime(), entry.uid(), entry.gid(), entry.ino()), (0, 0, 0, found.len() as u32 + 1));
            let contents = all(&mut reader);
            found.push((name, mode, device, contents));
            rest = reader.finish().unwrap();
        }
    }

    #[test]
    fn a_package_becomes_a_guest_once() {
        let place = Place::new();
        let guests = place.guests();
        assert!(guests.current().unwrap().is_none() && guests.list().unwrap().is_empty());
        let built = guests.build(&place.request()).unwrap();
        let guest = &built.guest;
        assert!(built.fresh && is_id(&guest.id) && guest.release == RELEASE);
        assert!(fs::read(&guest.kernel).unwrap() == vmlinux(RELEASE));
        let modules = ["virtio_mmio", "virtio_blk", "failover", "net_failover", "virtio_net", "libcrc32c", "erofs"];
        assert_eq!(guest.modules, [&modules[..], &["overlay", "virtio_rng"]].concat());
        let nfs: Vec<_> = guest.extra["nfs"].iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(nfs, ["000-sunrpc.ko", "001-nfs.ko"]);
        assert!(fs::read(&guest.extra["nfs"][1]).unwrap() == module(RELEASE, "libcrc32c,sunrpc", "pre: crc32c"));

        let entries = listed(guest);
        let names: Vec<_> = entries.iter().map(|entry| entry.0.as_str()).collect();
        assert_eq!(names[..6], FOLDERS);
        assert_eq!(names[6..9], ["dev/console", "dev/null", "init"]);
        assert_eq!((names[9], names[17]), ("modules/000-virtio_mmio.ko", "modules/008-virtio_rng.ko"));
        assert_eq!((entries[0].1, entries[6].1, entries[6].2), (0o040_755, 0o020_600, (5, 1)));
        assert_eq!((entries[7].1, entries[7].2, entries[8].1), (0o020_666, (1, 3), 0o100_755));
        assert!(entries[8].3 == crate::fixture::agent());

        let again = guests.build(&place.request()).unwrap();
        assert!(!again.fresh && again.guest == built.guest);
        assert_eq!(guests.current().unwrap().as_ref(), Some(guest));
        assert_eq!(guests.list().unwrap(), std::slice::from_ref(guest));
    }

    const FOLDERS: [&str; 6] = ["dev", "modules", "proc", "run", "sys", "tmp"];

    #[test]
    fn the_same_sources_make_the_same_bytes() {
        let place = Place::new();
        let one = place.guests().build(&place.request()).unwrap().guest;
        let other = Guests::open(place.0.path().join("other")).unwrap().build(&place.request()).unwrap().guest;
        assert_eq!(one.id, other.id);
        assert!(fs::read(one.initramfs).unwrap() == fs::read(other.initramfs).unwrap());
    }

    #[test]
    fn another_agent_is_another_guest_and_the_former_can_go() {
        let place = Place::new();
        let guests = place.guests();
        let first = guests.build(&place.request()).unwrap().guest;
        let mut agent = crate::fixture::agent();
        agent.push(0);
        place.put("agent", &agent);
        let second = guests.build(&place.request()).unwrap().guest;
        assert_ne!(first.id, second.id);
        assert_eq!(guests.list().unwrap().len(), 2);
        assert!(matches!(guests.remove(&second.id), Err(GuestError::InUse { .. })));
        assert!(matches!(guests.remove("../guests"), Err(GuestError::NotFound { .. })));
        guests.remove(&first.id).unwrap();
        assert!(matches!(guests.remove(&first.id), Err(GuestError::NotFound { .. })));
        assert_eq!(guests.list().unwrap(), [second]);
    }

    #[test]
    fn files_become_a_guest_with_and_without_modules() {
        let place = Place::new();
        let guests = place.guests();
        let kernel = place.put("bzImage", &bzimage(&vmlinux(RELEASE), Packing::Lz4));
        let request = |kernel: &Path, modules: Option<PathBuf>| Request {
            kernel: Kernel::Files { kernel: kernel.to_owned(), modules },
            agent: place.request().agent,
        };
        let bare = guests.build(&request(&kernel, None)).unwrap().guest;
        assert_eq!((bare.release.as_str(), bare.modules.len(), bare.extra.len()), (RELEASE, 0, 0));

        let folder = place.0.path().join("modules");
        for name in ["virtio_mmio", "virtio_blk", "virtio_net", "erofs", "overlay"] {
            place.put(&format!("modules/kernel/{name}.ko"), &module(RELEASE, "", ""));
        }
        let full = guests.build(&request(&kernel, Some(folder.clone()))).unwrap().guest;
        assert_eq!(full.modules.len(), 5);
        assert_ne!(full.id, bare.id);
        let plain = place.put("vmlinux", &vmlinux(RELEASE));
        assert_ne!(guests.build(&request(&plain, Some(folder.clone()))).unwrap().guest.id, full.id);
        assert!(!guests.build(&request(&kernel, None)).unwrap().fresh);
        assert_eq!(guests.current().unwrap(), Some(bare));

        place.put("modules/kernel/erofs.ko", &module("6.1", "", ""));
        let error = guests.build(&request(&kernel, Some(folder))).unwrap_err().to_string();
        assert!(error.contains("module erofs of 6.1"), "{error}");
    }

    #[test]
    fn what_cannot_be_used_is_refused_in_words_and_leaves_nothing() {
        let place = Place::new();
        let guests = place.guests();
        let says = |words: &str| {
            let error = guests.build(&place.request()).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
            assert!(error.hint().is_some());
            assert_eq!(guests.names().unwrap(), [LOCK]);
        };
        place.put("agent", &elf(3, &[(crate::elf::INTERPRETER, b"/lib/ld.so".to_vec())], &[]));
        says("linked dynamically");
        place.put("agent", b"#!/bin/sh");
        says("no ELF");
        place.put("agent", &crate::fixture::agent());
        place.put("kernel.deb", b"!<arch>\n");
        says("without files");
        let deb = deb(RELEASE, Packing::Plain);
        let without = |name: &str| {
            let at = deb.windows(name.len()).position(|part| part == name.as_bytes()).unwrap();
            [&deb[..at], &vec![b'x'; name.len()], &deb[at + name.len()..]].concat()
        };
        // The header's checksum no longer holds.
        place.put("kernel.deb", &without("overlay.ko.xz"));
        says("not usable");
    }

    #[test]
    fn a_kernel_without_an_entry_for_machines_is_refused() {
        let place = Place::new();
        let kernel = place.put("vmlinux", &elf(2, &[(1, b"Linux version 6.1 (x)".to_vec())], &[]));
        let request = Request { kernel: Kernel::Files { kernel, modules: None }, agent: place.request().agent };
        let error = place.guests().build(&request).unwrap_err();
        assert!(error.to_string().contains("lacks a PVH entry (CONFIG_PVH)"), "{error}");
        assert_eq!(place.guests().names().unwrap(), [LOCK]);
    }

    #[test]
    fn what_killed_builds_left_is_removed_and_what_is_not_whole_made_again() {
        let place = Place::new();
        let guests = place.guests();
        let guest = guests.build(&place.request()).unwrap().guest;
        place.put("guests/.new-1-abc/vmlinux", b"half");
        place.put("guests/.old-0123456789abcdef/extra/x", b"half");
        symlink("nowhere", place.0.path().join("guests/.new-current")).unwrap();
        assert!(!guests.build(&place.request()).unwrap().fresh);
        assert_eq!(guests.names().unwrap(), [LOCK, &guest.id, CURRENT]);

        for broken in ["guest.json", "initramfs", "extra/nfs/001-nfs.ko"] {
            fs::remove_file(guest.dir.join(broken)).unwrap();
            assert!(guests.current().unwrap().is_none() && guests.list().unwrap().is_empty());
            let again = guests.build(&place.request()).unwrap();
            assert!(again.fresh && again.guest == guest);
        }
    }

    #[test]
    fn two_who_build_at_once_make_one() {
        let place = Place::new();
        let start = Barrier::new(4);
        let built: Vec<_> = std::thread::scope(|scope| {
            let build = || {
                start.wait();
                place.guests().build(&place.request()).unwrap()
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(build)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(built.iter().filter(|built| built.fresh).count(), 1);
        assert!(built.iter().all(|one| one.guest == built[0].guest));
    }

    #[test]
    fn a_full_disk_leaves_nothing_and_is_told_as_such() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("SKIPPED: needs root, for a small file system");
        }
        let place = Place::new();
        let small = place.0.path().join("guests");
        fs::create_dir(&small).unwrap();
        nix::mount::mount(Some("small"), &small, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=8k")).unwrap();
        let (guests, error) = {
            let guests = place.guests();
            (guests.names(), guests.build(&place.request()).map(drop))
        };
        let left = place.guests().names();
        nix::mount::umount(&small).unwrap();
        let error = error.unwrap_err();
        assert_eq!(error.kind(), joey_model::ErrorKind::Exhausted, "{error}");
        assert!(guests.unwrap().is_empty());
        assert_eq!(left.unwrap(), [LOCK]);
    }
}
