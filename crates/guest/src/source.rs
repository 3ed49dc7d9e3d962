//! Where a guest's kernel and modules are from: hashed first, unpacked only when no guest was made of them before.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::bytes::Piece;
use crate::error::{GuestError, Result};
use crate::modules::{Library, Selection, select};
use crate::package::{self, Place};

/// Where the kernel is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kernel {
    /// A Debian package of a kernel image, `linux-image-*-cloud-amd64_*.deb`.
    Package(PathBuf),
    /// A bzImage or an uncompressed `vmlinux`, and its modules: a directory `lib/modules/RELEASE`, or none when all that
    /// a guest needs is built in.
    Files { kernel: PathBuf, modules: Option<PathBuf> },
}

impl Kernel {
    /// The file that holds the kernel.
    pub fn path(&self) -> &Path {
        match self {
            Self::Package(path) | Self::Files { kernel: path, .. } => path,
        }
    }
}

/// A kernel that is open: what is hashed is what is unpacked.
#[derive(Debug)]
pub(crate) struct Source<'a> {
    path: &'a Path,
    file: File,
    /// `None`: in the package.
    modules: Option<Selection>,
}

/// What a guest is made of.
#[derive(Debug)]
pub(crate) struct Unpacked {
    image: File,
    place: Place,
    /// `None`: to be found in the image.
    pub release: Option<String>,
    pub modules: Selection,
}

impl Unpacked {
    /// The kernel image as it came.
    pub(crate) fn image(&self) -> io::Result<Piece<'_>> {
        Piece::whole(&self.image)?.part(self.place.0, self.place.1)
    }
}

impl<'a> Source<'a> {
    pub(crate) fn open(kernel: &'a Kernel) -> Result<Self> {
        let path = kernel.path();
        let file = File::open(path).map_err(GuestError::host("open", path))?;
        let modules = match kernel {
            Kernel::Package(_) => None,
            Kernel::Files { modules: None, .. } => Some(select(&Library::none(), path)?),
            Kernel::Files { modules: Some(folder), .. } => Some(select(&Library::of_directory(folder)?, path)?),
        };
        Ok(Self { path, file, modules })
    }

    /// Adds all of it to `hasher`, each part with its length, so that no two sources add the same.
    pub(crate) fn hash(&self, hasher: &mut Sha256) -> Result<()> {
        let hashed = Piece::whole(&self.file).and_then(|mut all| {
            hasher.update(all.len().to_le_bytes());
            io::copy(&mut all, hasher)
        });
        hashed.map_err(GuestError::host("read", self.path))?;
        hasher.update([u8::from(self.modules.is_some())]);
        for (group, module) in self.modules.iter().flat_map(Selection::all) {
            for part in [group.as_bytes(), module.name.as_bytes(), &module.bytes] {
                hasher.update((part.len() as u64).to_le_bytes());
                hasher.update(part);
            }
        }
        Ok(())
    }

    /// Unpacks it, with a file without a name in `dir` for what takes room.
    pub(crate) fn unpack(self, dir: &Path) -> Result<Unpacked> {
        let failed = GuestError::source("unpack", self.path);
        let all = Piece::whole(&self.file).map_err(&failed)?;
        if let Some(modules) = self.modules {
            let place = (0, all.len());
            return Ok(Unpacked { image: self.file, place, release: None, modules });
        }
        let spool = tempfile::tempfile_in(dir).map_err(GuestError::host("make a file in", dir))?;
        let image = spool.try_clone().map_err(GuestError::host("make a file in", dir))?;
        let package = package::read(all, spool).map_err(failed)?;
        let modules = select(&package.library, self.path)?;
        Ok(Unpacked { image, place: package.image, release: Some(package.release), modules })
    }
}
