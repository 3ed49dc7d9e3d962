//! The first file system of a guest, as a cpio archive: the agent, the modules that are loaded first, and the nodes that the kernel
//! opens before the agent runs. The format is in the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use cpio::newc::{self, ModeFileType};

use crate::bytes::bad;
use crate::elf::{Elf, INTERPRETER, Kind};
use crate::error::{GuestError, Result};
use crate::modules::Module;
use crate::packing::read_all;

const MOST_AGENT: u64 = 256 << 20;
const FOLDERS: [&str; 6] = ["dev", "modules", "proc", "run", "sys", "tmp"];
/// Character devices: name, mode, major and minor number.
const NODES: [(&str, u32, u32, u32); 2] = [("dev/console", 0o600, 5, 1), ("dev/null", 0o666, 1, 3)];

/// Reads the agent, which must run without anything beside it.
pub(crate) fn read_agent(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(GuestError::host("open", path))?;
    let read = read_all(file, MOST_AGENT).and_then(|bytes| is_static(&bytes).map(|()| bytes));
    read.map_err(|error| match error.raw_os_error() {
        Some(_) => GuestError::host("read", path)(error),
        None => GuestError::Agent { path: path.to_owned(), detail: error.to_string() },
    })
}

fn is_static(program: &Vec<u8>) -> io::Result<()> {
    let elf = Elf::read(program)?;
    if elf.has_segment(INTERPRETER) {
        return Err(bad("it is linked dynamically, and a guest has no libraries"));
    }
    if elf.kind != Kind::Program || elf.entry == 0 {
        return Err(bad("it is no program"));
    }
    Ok(())
}

/// The name of a module that is loaded at this place, counted from 0.
pub(crate) fn numbered(place: usize, module: &Module) -> String {
    format!("{place:03}-{}.ko", module.name)
}

/// Writes the archive: the same bytes for the same contents.
pub(crate) fn write(agent: &[u8], modules: &[Module], to: impl Write) -> io::Result<()> {
    let mut archive = Archive { to, inode: 0 };
    for name in FOLDERS {
        archive.entry(name, ModeFileType::Directory, 0o755, &[])?;
    }
    for (name, mode, major, minor) in NODES {
        archive.node(name, mode, major, minor)?;
    }
    archive.entry("init", ModeFileType::Regular, 0o755, agent)?;
    for (place, module) in modules.iter().enumerate() {
        archive.entry(&format!("modules/{}", numbered(place, module)), ModeFileType::Regular, 0o644, &module.bytes)?;
    }
    newc::trailer(archive.to)?.flush()
}

struct Archive<W> {
    to: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    fn builder(&mut self, name: &str, kind: ModeFileType, mode: u32) -> newc::Builder {
        self.inode += 1;
        newc::Builder::new(name).ino(self.inode).mode(mode).set_mode_file_type(kind)
    }

    fn entry(&mut self, name: &str, kind: ModeFileType, mode: u32, contents: &[u8]) -> io::Result<()> {
        let size = u32::try_from(contents.len()).map_err(|_| bad("a file is too large for an initramfs"))?;
        let mut writer = self.builder(name, kind, mode).write(&mut self.to, size);
        writer.write_all(contents)?;
        writer.finish().map(drop)
    }

    fn node(&mut self, name: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        let builder = self.builder(name, ModeFileType::Char, mode).rdev_major(major).rdev_minor(minor);
        builder.write(&mut self.to, 0).finish().map(drop)
    }
}
