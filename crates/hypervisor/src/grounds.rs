//! A machine's directory for a monitor that opens files by their names and makes its sockets itself, which it sees in its jail as
//!
//! ```text
//! DIR/run     /run       its own: the socket it is asked on, and the one that leads into the machine
//! DIR/slots   /slots     disks by their slots; the host puts them in, also while the machine runs
//! DIR/saved   /saved     its own, and there for a machine without a disk alone: what it is saved into
//! ```
//!
//! What it may write is bounded file by file alone (`longestFile`): one that was taken over can fill the file system of its directory.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use joey_api::vmm::{Bind, Interface, Jail};

use crate::Machine;
use crate::jail::{record_of, user_of};

/// Places in the jail.
pub(crate) const KERNEL: &str = "/boot/kernel";
pub(crate) const INITRAMFS: &str = "/boot/initramfs";
pub(crate) const DISK: &str = "/disk";
pub(crate) const API: &str = "/run/api.sock";
pub(crate) const VSOCK: &str = "/run/vsock.sock";
pub(crate) const SAVED: &str = "/saved";

/// Bytes of a state that is read: Firecracker's has some ten thousand, Cloud Hypervisor's some hundred thousand.
pub(crate) const LONGEST_STATE: u64 = 16 << 20;

/// The place of a slot's disk in the jail.
pub(crate) fn slot(number: u32) -> String {
    format!("/slots/{number}")
}

pub(crate) fn api_of(dir: &Path) -> PathBuf {
    dir.join("run/api.sock")
}

pub(crate) fn vsock_of(dir: &Path) -> PathBuf {
    dir.join("run/vsock.sock")
}

pub(crate) fn saved_of(dir: &Path, name: &str) -> PathBuf {
    dir.join("saved").join(name)
}

/// Makes the directories and fills the slots; each layer is one file.
pub(crate) fn prepare(machine: &Machine) -> io::Result<()> {
    if machine.disk_key.is_some() {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "this monitor has no encrypted disks"));
    }
    let user = user_of(&machine.name);
    let make = |name: &str, own: bool| {
        let place = machine.dir.join(name);
        DirBuilder::new().mode(0o755).create(&place)?;
        if own { chown(place, Some(user), Some(user)) } else { Ok(()) }
    };
    make("run", true)?;
    make("slots", false)?;
    if machine.to_be_saved {
        make("saved", true)?;
    }
    if let Some(disk) = &machine.disk {
        chown(disk, Some(user), Some(user))?;
    }
    for (number, files) in &machine.layers {
        fill(&machine.dir, *number, one(files)?)?;
    }
    Ok(())
}

/// The only file of a slot.
pub(crate) fn one(files: &[PathBuf]) -> io::Result<&Path> {
    match files {
        [file] => Ok(file),
        files => Err(io::Error::other(format!("a disk of this monitor holds one layer, and not {}", files.len()))),
    }
}

/// Puts a file into a slot: under another name, or as a copy where its file system is another one.
pub(crate) fn fill(dir: &Path, number: u32, file: &Path) -> io::Result<()> {
    let place = dir.join("slots").join(number.to_string());
    match fs::remove_file(&place) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if fs::hard_link(file, &place).is_ok() {
        return Ok(());
    }
    let copy = File::options().write(true).create_new(true).mode(0o644).open(place)?;
    joey_disk::copy(&File::open(file)?, &copy)
}

/// The jail of a monitor with these arguments; all that both monitors have in it.
pub(crate) fn jail(machine: &Machine, program: &Path, interface: Interface, args: &[&str]) -> Jail {
    let Machine { dir, boot, disk, network, .. } = machine;
    let mut files = Vec::new();
    let mut bind = |from: PathBuf, to: &str, writable| files.push(Bind { from, to: PathBuf::from(to), writable });
    bind(boot.kernel.clone(), KERNEL, false);
    bind(boot.initramfs.clone(), INITRAMFS, false);
    bind(dir.join("run"), "/run", true);
    bind(dir.join("slots"), "/slots", false);
    if machine.to_be_saved {
        bind(dir.join("saved"), SAVED, true);
    }
    if let Some(disk) = disk {
        bind(disk.clone(), DISK, true);
    }
    let longest = disk.as_ref().and_then(|disk| fs::metadata(disk).ok()).map_or(0, |meta| meta.len());
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    Jail {
        title: format!("{name} {}", machine.name),
        record: record_of(dir),
        cgroup: machine.cgroup.clone(),
        limits: machine.limits,
        user: user_of(&machine.name),
        netns: network.as_ref().map(|network| network.netns.clone()),
        mac: network.as_ref().map(|network| network.mac),
        interface,
        files,
        kvm: true,
        shared_memory: machine.template.is_some(),
        longest_file: longest.max(machine.longest_disk).max(machine.shape.memory_bytes),
        program: program.to_owned(),
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        env: Vec::new(),
    }
}

/// As the monitors write it.
pub(crate) fn mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
