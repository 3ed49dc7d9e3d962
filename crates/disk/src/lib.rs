//! Disks that are files. An instance with a limit on what it leaves on the disk gets one of its own, mounted where its containers
//! write: whatever else is measured, and however fast they write, more does not fit.
//!
//! ```text
//! disk.img   a file with holes, as long as the disk
//! disk/      the ext4 in it, mounted; without a journal, because it ends with the instance
//! ```

mod copy;
mod loop_device;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};

pub use copy::{copy, extents};
pub use loop_device::{Access, attach};

const BLOCK: u64 = 4096;
/// Bytes of the disk for each file it can hold, and what the file system takes for that.
const PER_INODE: u64 = 4096;
const INODE: u64 = 256;
/// Longer is no file of an ext4.
const MOST: u64 = 15 << 40;
/// What it takes besides: its own description, and the directory for what is found when it is mended.
const FIXED: u64 = 1 << 20;
/// Of how many bytes one is taken by the tables of which blocks and inodes are free: a few blocks in 128 MiB.
const GROUPS: u64 = 4096;
/// What ext4 keeps to itself at most, for writing what it has promised room to: a fiftieth otherwise (`s_resv_clusters`).
const KEPT: u64 = 4096 * BLOCK;

/// The place of the file that the disk mounted at `place` is.
fn file_of(place: &Path) -> PathBuf {
    let mut name = place.file_name().map(OsString::from).unwrap_or_default();
    name.push(".img");
    place.with_file_name(name)
}

/// Makes a disk that holds so many bytes, and mounts it at `place`. What was there before is removed.
pub fn make(place: &Path, bytes: u64) -> io::Result<()> {
    remove(place)?;
    let file = file_of(place);
    let made = format(&file, bytes).and_then(|()| {
        fs::create_dir(place)?;
        mount(&file, place)
    });
    if made.is_err() {
        // The error that counts is the first one.
        let _ = remove(place);
    }
    made
}

/// Whether there is a disk, or what is left of one: its file is made first and goes last.
pub fn is_there(place: &Path) -> bool {
    file_of(place).exists()
}

/// Takes a disk away, or what is left of one, and what was not written yet with it.
pub fn remove(place: &Path) -> io::Result<()> {
    forget(place);
    match nix::mount::umount2(place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(error) => return Err(error.into()),
    }
    gone(fs::remove_dir(place))?;
    gone(fs::remove_file(file_of(place)))
}

/// Has the disk at `place` write nothing any more: it would go to a file that is removed, and its end would wait for that.
fn forget(place: &Path) {
    // linux/ext4.h: _IOR('X', 125, __u32).
    const SHUTDOWN: libc::c_ulong = 0x8004_587d;
    let Ok(dir) = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_DIRECTORY).open(place) else {
        return;
    };
    let device = |path: &Path| fs::symlink_metadata(path).map(|meta| meta.dev()).ok();
    // Never the host's own.
    let own = dir.metadata().map(|meta| meta.dev()).ok();
    if own.is_none() || own == place.parent().and_then(device) {
        return;
    }
    let without_log: u32 = 2;
    // SAFETY: reads one integer, which lives through the call. Where it is not known the end takes longer.
    unsafe { libc::ioctl(dir.as_raw_fd(), SHUTDOWN as _, &raw const without_log) };
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// The length of a disk that holds so many bytes.
fn length(bytes: u64) -> u64 {
    let more = FIXED + (bytes / 48).min(KEPT) + bytes / GROUPS;
    let inodes = bytes.saturating_add(more).div_ceil(PER_INODE - INODE);
    inodes.saturating_mul(PER_INODE).min(MOST).next_multiple_of(BLOCK)
}

/// Bytes of the file system that a directory is on, and no more than a disk can have.
pub fn size(dir: &Path) -> io::Result<u64> {
    let found = nix::sys::statvfs::statvfs(dir)?;
    Ok(found.blocks().saturating_mul(found.fragment_size()).min(MOST / 2))
}

/// Makes a file that is an empty disk for so many bytes.
pub fn format(file: &Path, bytes: u64) -> io::Result<()> {
    File::options().write(true).create_new(true).mode(0o600).open(file)?.set_len(length(bytes))?;
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-b", &BLOCK.to_string(), "-i", &PER_INODE.to_string(), "-I", &INODE.to_string()])
        .args(["-m", "0", "-O", "^has_journal,^resize_inode", "-E", "nodiscard,lazy_itable_init=1"])
        .arg(file)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| io::Error::new(error.kind(), format!("mkfs.ext4 (package e2fsprogs): {error}")))?;
    if made.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&made.stderr).trim().to_owned();
    Err(io::Error::other(format!("mkfs.ext4 ended with {}: {said}", made.status)))
}

fn mount(file: &Path, place: &Path) -> io::Result<()> {
    let (device, _open) = attach(file, Access::Write)?;
    let flags = MsFlags::MS_NOATIME | MsFlags::MS_NODEV;
    // The file is all holes: nobody has to write zeros into it.
    let options = Some("noinit_itable,errors=continue");
    Ok(nix::mount::mount(Some(&device), place, Some("ext4"), flags, options)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn is_root() -> bool {
        nix::unistd::geteuid().is_root()
    }

    /// A place for a disk, of which nothing is left also where a test fails.
    struct Place(PathBuf, #[expect(dead_code, reason = "removed with it")] tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            Self(dir.path().join("disk"), dir)
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = remove(&self.0);
        }
    }

    fn is_mounted(place: &Path) -> bool {
        let device = |path: &Path| fs::symlink_metadata(path).map(|meta| meta.dev()).ok();
        device(place).is_some_and(|own| device(place.parent().unwrap()).unwrap() != own)
    }

    #[test]
    fn a_disk_holds_what_it_should_and_no_more() {
        if !is_root() {
            return eprintln!("SKIPPED: needs root");
        }
        let place = Place::new();
        let place = place.0.as_path();
        for bytes in [2u64 << 20, 100 << 20, 3 << 30] {
            make(place, bytes).unwrap();
            assert!(is_mounted(place) && is_there(place));
            let found = nix::sys::statvfs::statvfs(place).unwrap();
            let free = found.blocks_available() as u64 * found.fragment_size() as u64;
            let most = bytes + bytes / 50 + (2 << 20);
            assert!((bytes..=most).contains(&free), "{free} of {bytes}");
            let length = fs::metadata(file_of(place)).unwrap();
            assert!(length.blocks() * 512 < 2 << 20, "it takes no room before it is used");
            remove(place).unwrap();
            assert!(!place.exists() && !is_there(place) && !is_mounted(place));
        }
        remove(place).unwrap();
    }

    #[test]
    fn more_does_not_fit_and_what_was_there_is_gone_when_it_is_made_anew() {
        if !is_root() {
            return eprintln!("SKIPPED: needs root");
        }
        let place = Place::new();
        let place = place.0.as_path();
        make(place, 8 << 20).unwrap();
        let mut file = File::create(place.join("file")).unwrap();
        let part = vec![7u8; 1 << 20];
        let written = (0..64).take_while(|_| file.write_all(&part).is_ok()).count();
        assert!((8..=10).contains(&written), "{written} MiB of 8");
        drop(file);
        make(place, 8 << 20).unwrap();
        assert!(!place.join("file").exists());
        remove(place).unwrap();
    }

    #[test]
    fn what_was_not_written_yet_is_written_for_nobody() {
        if !is_root() {
            return eprintln!("SKIPPED: needs root");
        }
        let place = Place::new();
        let place = place.0.as_path();
        make(place, 1 << 30).unwrap();
        fs::write(place.join("file"), vec![7u8; 16 << 20]).unwrap();
        let image = File::open(file_of(place)).unwrap();
        remove(place).unwrap();
        let blocks = image.metadata().unwrap().blocks();
        assert!(blocks * 512 < 8 << 20, "{blocks} blocks were written");
    }

    #[test]
    fn no_disk_is_longer_than_a_file_can_be() {
        assert_eq!(length(u64::MAX), MOST);
        assert!(length(MOST / 2) < MOST && length(0) > 0);
        assert!(size(Path::new("/")).unwrap() > 0);
    }

    #[test]
    fn what_cannot_be_made_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("absent/disk");
        assert!(make(&place, 1 << 20).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
