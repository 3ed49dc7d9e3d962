//! The key of a machine's disk that is encrypted (LUKS, as QEMU has it): random, and nowhere but in the memory of who makes the disk and of
//! the machine's monitor, which get it by a descriptor. With the machine it is gone, and the disk is noise.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::template::memory_file;

/// Makes disks. It and QEMU are of one source.
const PROGRAM: &str = "qemu-img";
const BYTES: usize = 32;
/// What the first descriptor of a program is called there.
const KEY: &str = "secret,id=key,file=/proc/self/fd/0";
/// Milliseconds for making guesses of a password slow: there is nothing to guess in 32 random bytes.
const GUESSES: &str = "key-secret=key,cipher-alg=aes-256,cipher-mode=xts,iter-time=10";

/// What it says where the time that the processor took for its first guesses, some milliseconds, was counted as none: the kernel samples
/// that, and QEMU 7.2 hits it in one of three to eight runs.
const UNMEASURED: &str = "Unable to get accurate CPU usage";
/// How often it is asked again then.
const AGAIN: usize = 30;

/// A key, as a file in memory.
#[derive(Debug)]
pub struct DiskKey(OwnedFd);

impl DiskKey {
    /// A new one.
    pub fn new() -> io::Result<Self> {
        let mut random = [0; BYTES];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        // Passwords are text.
        let mut text = String::with_capacity(2 * BYTES);
        for byte in random {
            write!(text, "{byte:02x}").map_err(io::Error::other)?;
        }
        let mut file = File::from(memory_file(c"joey-key", 0)?);
        file.write_all(text.as_bytes())?;
        Ok(Self(file.into()))
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Makes the disk `place`, with what `empty` holds. Where that has nothing the disk reads as noise.
    pub fn encrypt(&self, empty: &Path, place: &Path) -> io::Result<()> {
        let bytes = empty.metadata()?.len().to_string();
        let (from, to) = (named("raw", "", empty)?, named("luks", "key-secret=key,", place)?);
        let place = place.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let create = || self.run(&["create", "-q", "-f", "luks", "--object", KEY, "-o", GUESSES, place, &bytes]);
        let is_measured =
            |made: &io::Result<()>| !made.as_ref().is_err_and(|error| error.to_string().contains(UNMEASURED));
        (0..AGAIN).map(|_| create()).find(is_measured).unwrap_or_else(create)?;
        let target = ["--image-opts", &from, "--target-image-opts", &to];
        self.run(&[&["convert", "-n", "--target-is-zero", "--object", KEY], &target[..]].concat())
    }

    fn run(&self, args: &[&str]) -> io::Result<()> {
        let mut command = Command::new(PROGRAM);
        command
            .args(args)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::from(self.0.try_clone()?));
        let done = command.output().map_err(|error| {
            io::Error::new(error.kind(), format!("{PROGRAM} (Debian's package qemu-utils): {error}"))
        })?;
        if done.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        Err(io::Error::other(format!("{PROGRAM} ended with {}: {said}", done.status)))
    }
}

/// A file as QEMU's options name it, in which a comma is written twice.
fn named(driver: &str, options: &str, file: &Path) -> io::Result<String> {
    let name = file.to_str().ok_or(io::ErrorKind::InvalidInput)?.replace(',', ",,");
    Ok(format!("driver={driver},{options}file.driver=file,file.filename={name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_made_however_qemu_measures() {
        if Command::new(PROGRAM).arg("--version").output().is_err() {
            eprintln!("SKIPPED: needs Debian's qemu-utils");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty");
        File::create(&empty).unwrap().set_len(1 << 20).unwrap();
        // One in three to eight runs of the program fails.
        for number in 0..6 {
            let place = dir.path().join(number.to_string());
            DiskKey::new().unwrap().encrypt(&empty, &place).unwrap();
            let mut magic = [0; 4];
            File::open(&place).unwrap().read_exact(&mut magic).unwrap();
            assert_eq!(&magic, b"LUKS");
        }
        let error = DiskKey::new().unwrap().encrypt(&empty, &dir.path().join("none/disk")).unwrap_err();
        assert!(error.to_string().contains("none/disk"), "{error}");
    }
}
