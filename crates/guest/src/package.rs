//! A Debian package of a kernel: an `ar` archive (deb(5)) whose member `data.tar` holds the image and its modules.
//!
//! It is read in one pass. What may be needed is kept, still compressed, in a file without a name; all else is passed by.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read};

use tar::EntryType;

use crate::bytes::bad;
use crate::kernel::is_release;
use crate::modules::{Library, builtin_names, module_name};
use crate::packing::{read_all, unpacked};

const MAGIC: &[u8] = b"!<arch>\n";
const MEMBER: usize = 60;
/// Most bytes of the package unpacked, and of the files in it that are kept.
const MOST_UNPACKED: u64 = 2 << 30;
const MOST_IMAGE: u64 = 256 << 20;
const MOST_MODULE: u64 = 64 << 20;
const MOST_LIST: u64 = 1 << 20;
const MOST_MODULES: usize = 20_000;
/// Longer is no path.
const MOST_PATH: u64 = 4096;

/// Where something lies in a file: its offset and its length.
pub(crate) type Place = (u64, u64);

#[derive(Debug)]
pub(crate) struct Package {
    pub release: String,
    pub image: Place,
    pub library: Library,
}

/// Reads a package; what is kept goes to `spool`.
pub(crate) fn read(package: impl Read, spool: File) -> io::Result<Package> {
    let data = data_member(package)?;
    let data = BufReader::with_capacity(64 << 10, unpacked(data)?.take(MOST_UNPACKED));
    let mut found = Found::new(spool);
    let mut archive = tar::Archive::new(data);
    // A path that does not fit into the next entry's header. Read here, because that crate reads it whatever its length.
    let mut long = None;
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        match entry.header().entry_type() {
            EntryType::GNULongName => long = Some(read_all(&mut entry, MOST_PATH)?),
            EntryType::GNULongLink => {}
            kind => {
                let path = long.take().unwrap_or_else(|| entry.path_bytes().into_owned());
                if kind == EntryType::Regular {
                    found.take(&path, &mut entry)?;
                }
            }
        }
    }
    found.finish()
}

/// The member of the `ar` archive that holds the files.
fn data_member(mut package: impl Read) -> io::Result<impl Read> {
    let mut magic = Vec::new();
    package.by_ref().take(MAGIC.len() as u64).read_to_end(&mut magic)?;
    if magic != MAGIC {
        return Err(bad("it is no Debian package"));
    }
    loop {
        let mut header = Vec::new();
        package.by_ref().take(MEMBER as u64).read_to_end(&mut header)?;
        if header.is_empty() {
            return Err(bad("it is a package without files"));
        }
        let size = header.get(48..58).and_then(|field| std::str::from_utf8(field).ok()?.trim_end().parse::<u64>().ok());
        let (Some(size), Some(b"`\n")) = (size, header.get(58..MEMBER)) else {
            return Err(bad("a member of its archive is broken"));
        };
        if header.starts_with(b"data.tar") {
            return Ok(package.take(size));
        }
        // Members begin at even places.
        let size = size.checked_next_multiple_of(2).ok_or_else(|| bad("a member of its archive is too large"))?;
        io::copy(&mut package.by_ref().take(size), &mut io::sink())?;
    }
}

/// What a file of the package is to us.
#[derive(Debug, PartialEq, Eq)]
enum Part<'a> {
    Image { release: &'a str },
    Module { release: &'a str, name: String },
    Builtin { release: &'a str },
}

impl<'a> Part<'a> {
    /// By its path, which is not used for anything else.
    fn of(path: &'a [u8]) -> Option<Self> {
        let path = std::str::from_utf8(path).ok()?.trim_end_matches('\0');
        let path = path.trim_start_matches("./").trim_start_matches('/');
        let path = path.strip_prefix("usr/").unwrap_or(path);
        let part = match path.split('/').collect::<Vec<_>>()[..] {
            ["boot", file] => Self::Image { release: file.strip_prefix("vmlinuz-")? },
            ["lib", "modules", release, "modules.builtin"] => Self::Builtin { release },
            ["lib", "modules", release, .., file] => Self::Module { release, name: module_name(file)? },
            _ => return None,
        };
        is_release(part.release()).then_some(part)
    }

    fn release(&self) -> &'a str {
        match self {
            Self::Image { release } | Self::Module { release, .. } | Self::Builtin { release } => release,
        }
    }
}

/// What was seen of a package so far.
struct Found {
    spool: Spool,
    release: Option<String>,
    image: Option<Place>,
    modules: BTreeMap<String, Place>,
    builtin: HashSet<String>,
}

impl Found {
    fn new(spool: File) -> Self {
        let spool = Spool { file: BufWriter::new(spool), end: 0 };
        Self { spool, release: None, image: None, modules: BTreeMap::new(), builtin: HashSet::new() }
    }

    fn take(&mut self, path: &[u8], contents: &mut impl Read) -> io::Result<()> {
        let Some(part) = Part::of(path) else { return Ok(()) };
        let release = self.release.get_or_insert_with(|| part.release().to_owned());
        if release != part.release() {
            return Err(bad(format!("it is of more than one kernel: {release} and {}", part.release())));
        }
        match part {
            Part::Image { .. } => self.image = Some(self.spool.keep(contents, MOST_IMAGE)?),
            Part::Builtin { .. } => self.builtin = builtin_names(&read_all(contents, MOST_LIST)?),
            Part::Module { name, .. } => {
                if self.modules.len() == MOST_MODULES {
                    return Err(bad(format!("it has more than {MOST_MODULES} modules")));
                }
                let place = self.spool.keep(contents, MOST_MODULE)?;
                self.modules.entry(name).or_insert(place);
            }
        }
        Ok(())
    }

    fn finish(self) -> io::Result<Package> {
        let (Some(release), Some(image)) = (self.release, self.image) else {
            return Err(bad("it holds no kernel (boot/vmlinuz-RELEASE)"));
        };
        if self.modules.is_empty() {
            return Err(bad("it holds no modules (lib/modules/RELEASE)"));
        }
        let spool = self.spool.finish()?;
        Ok(Package { release, image, library: Library::of_package(spool, self.modules, self.builtin) })
    }
}

/// A file that grows by what is kept.
struct Spool {
    file: BufWriter<File>,
    end: u64,
}

impl Spool {
    fn keep(&mut self, contents: &mut impl Read, limit: u64) -> io::Result<Place> {
        let count = io::copy(&mut contents.take(limit + 1), &mut self.file)?;
        if count > limit {
            return Err(bad(format!("a file in it has more than {limit} bytes")));
        }
        let start = self.end;
        self.end += count;
        Ok((start, count))
    }

    fn finish(self) -> io::Result<File> {
        self.file.into_inner().map_err(io::IntoInnerError::into_error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{ar, data, deb, mutations, pack, vmlinux};
    use crate::packing::Packing;

    fn of(bytes: &[u8]) -> io::Result<Package> {
        read(bytes, tempfile::tempfile().unwrap())
    }

    #[test]
    fn image_modules_and_what_is_built_in_are_found() {
        for packing in [Packing::Xz, Packing::Zstd, Packing::Gzip, Packing::Plain] {
            let package = of(&deb("6.12.1-test", packing)).unwrap();
            assert_eq!(package.release, "6.12.1-test");
            assert!(package.image.1 > 0);
            assert!(package.library.load("erofs").unwrap().is_some());
            assert!(package.library.load("virtio_rng").unwrap().is_some());
            assert!(package.library.is_built_in("virtio_console") && !package.library.is_built_in("erofs"));
        }
    }

    #[test]
    fn a_path_tells_what_a_file_is_and_nothing_else() {
        let module = Part::Module { release: "6.1", name: "virtio_rng".into() };
        for path in ["./lib/modules/6.1/kernel/drivers/virtio-rng.ko.xz", "usr/lib/modules/6.1/virtio_rng.ko"] {
            assert_eq!(Part::of(path.as_bytes()).as_ref(), Some(&module));
        }
        assert_eq!(Part::of(b"./boot/vmlinuz-6.1"), Some(Part::Image { release: "6.1" }));
        assert_eq!(Part::of(b"/lib/modules/6.1/modules.builtin"), Some(Part::Builtin { release: "6.1" }));
        for path in [
            "./boot/config-6.1",
            "./boot/vmlinuz-..",
            "./lib/modules/../../x.ko",
            "./lib/modules/6.1/kernel/.ko",
            "./lib/modules/6.1/kernel/a b.ko",
            "./lib/modules/6.1/kernel/x.txt",
            "",
        ] {
            assert_eq!(Part::of(path.as_bytes()), None, "{path}");
        }
    }

    #[test]
    fn what_is_no_package_of_a_kernel_is_refused_in_words() {
        let says = |bytes: &[u8], words: &str| {
            let error = of(bytes).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        let image = ("./boot/vmlinuz-6.1", vmlinux("6.1"));
        let module = |release: &str| (format!("./lib/modules/{release}/kernel/a.ko"), vec![1]);
        says(b"", "no Debian package");
        says(b"!<arch>\n", "without files");
        says(b"!<arch>\ndebian-binary", "broken");
        says(&ar(&[("debian-binary", b"2.0\n"), ("control.tar", b"x")]), "without files");
        says(&ar(&[("data.tar", &data::<&str>(&[]))]), "no kernel");
        says(&ar(&[("data.tar.gz", &pack(&data(std::slice::from_ref(&image)), Packing::Gzip))]), "no modules");
        let (path, contents) = module("6.2");
        says(&ar(&[("data.tar", &data(&[image, (&path, contents)]))]), "more than one kernel");
        let whole = deb("6.1", Packing::Zstd);
        assert!(of(&whole[..whole.len() / 2]).is_err());
    }

    #[test]
    fn a_long_path_is_read_with_a_bound() {
        let path = format!("./lib/modules/6.1/{}/erofs.ko", "x/".repeat(150));
        let image = ("./boot/vmlinuz-6.1", vec![1]);
        let package = of(&ar(&[("data.tar", &data(&[image.clone(), (&path, vec![2])]))])).unwrap();
        assert!(package.library.holds("erofs"));
        let path = format!("./lib/modules/6.1/{}/erofs.ko", "x/".repeat(5000));
        assert!(of(&ar(&[("data.tar", &data(&[image, (&path, vec![2])]))])).is_err());
    }

    #[test]
    fn whatever_is_changed_in_a_package_is_survived() {
        for packing in [Packing::Plain, Packing::Xz] {
            for changed in mutations(&deb("6.1", packing), 500) {
                let _ = of(&changed);
            }
        }
    }
}
