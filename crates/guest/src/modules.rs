//! Kernel modules: where they are, what they say of themselves, and which of them a guest gets in which order.
//!
//! A package does not hold `modules.dep`: what a module needs is in its own section `.modinfo` (`depends`, `softdep`).

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::bytes::{Piece, bad};
use crate::elf::{Elf, Kind};
use crate::error::{GuestError, Result};
use crate::package::Place;
use crate::packing::{read_all, unpacked};

/// Most bytes of one module unpacked, and of all that a guest gets.
const MOST: u64 = 64 << 20;
const MOST_TOGETHER: u64 = 256 << 20;
/// The kernel's `MODULE_NAME_LEN` on 64 bits.
const LONGEST_NAME: usize = 56;
/// Most steps from a module to what it needs in the end.
const DEEPEST: usize = 32;
/// Of a directory of modules.
const MOST_MODULES: usize = 20_000;
const MOST_FOLDERS: usize = 16;

/// What every guest loads at its start, in this order: its disks, its network and its agent's port, and file systems. Some are
/// built into kernels that are made for virtual machines.
const BASE: [&str; 11] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "erofs",
    "overlay",
    "virtio_balloon",
    "virtio_rng",
    "virtio_console",
    "vmw_vsock_virtio_transport",
    "ext4",
];
/// Without these there is no guest.
const NEEDED: [&str; 5] = ["virtio_mmio", "virtio_blk", "virtio_net", "erofs", "overlay"];

/// What a guest may be given later, by what it is for.
#[rustfmt::skip]
const EXTRA: [(&str, &[&str]); 3] = [
    ("nfs", &["nfs", "nfsv4", "nfsv3"]),
    ("netfilter", &[
        "nf_tables", "nf_conntrack", "nft_chain_nat", "nft_ct", "nft_nat", "nft_masq", "nft_redir", "nft_compat", "nft_log",
        "nft_limit", "nft_reject_inet", "nft_fib_inet", "nft_numgen",
        "xt_addrtype", "xt_comment", "xt_connmark", "xt_conntrack", "xt_hashlimit", "xt_limit", "xt_LOG", "xt_mark",
        "xt_MASQUERADE", "xt_multiport", "xt_nat", "xt_owner", "xt_recent", "xt_REDIRECT", "xt_socket", "xt_state",
        "xt_statistic", "xt_tcpudp", "xt_TPROXY",
        "ip_tables", "iptable_filter", "iptable_mangle", "iptable_nat", "iptable_raw", "ipt_REJECT",
        "ip6_tables", "ip6table_filter", "ip6table_mangle", "ip6table_nat", "ip6table_raw", "ip6t_REJECT",
    ]),
    ("net", &[
        "tun", "veth", "bridge", "dummy", "sch_ingress", "sch_htb", "sch_tbf", "sch_netem", "cls_u32", "cls_bpf",
        "cls_matchall", "act_mirred",
    ]),
];

/// A module's name as the kernel has it: `-` is `_` there.
fn normal(name: &str) -> Option<String> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    let is_name = !name.is_empty() && name.len() < LONGEST_NAME && name.bytes().all(is_allowed);
    is_name.then(|| name.replace('-', "_"))
}

/// The name of the module that a file is.
pub(crate) fn module_name(file: &str) -> Option<String> {
    let packed = [".xz", ".zst", ".gz"].into_iter().find_map(|end| file.strip_suffix(end));
    normal(packed.unwrap_or(file).strip_suffix(".ko")?)
}

/// The names in a file `modules.builtin`, which has a path a line.
pub(crate) fn builtin_names(list: &[u8]) -> HashSet<String> {
    let lines = list.split(|&byte| byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    lines.filter_map(|line| module_name(line.rsplit('/').next()?.trim_end())).collect()
}

/// A module, unpacked; a signature at its end stays there.
#[derive(Debug)]
pub(crate) struct Module {
    pub name: String,
    pub bytes: Vec<u8>,
    /// The kernel it was built for.
    release: Option<String>,
    depends: Vec<String>,
    /// What is loaded before it if it is there.
    before: Vec<String>,
}

impl Module {
    fn read(name: &str, bytes: Vec<u8>) -> io::Result<Self> {
        let elf = Elf::read(&bytes)?;
        let info = elf.section(b".modinfo")?.filter(|_| elf.kind == Kind::Relocatable);
        let info = info.ok_or_else(|| bad("it is no kernel module"))?;
        let (mut release, mut depends, mut before) = (None, Vec::new(), Vec::new());
        for field in info.split(|&byte| byte == 0).filter_map(|field| std::str::from_utf8(field).ok()) {
            match field.split_once('=') {
                Some(("depends", names)) => {
                    for name in names.split(',').filter(|name| !name.is_empty()) {
                        depends.push(normal(name).ok_or_else(|| bad("it depends on what is no name of a module"))?);
                    }
                }
                Some(("softdep", text)) => before.extend(loaded_before(text).filter_map(normal)),
                Some(("vermagic", text)) => release = text.split(' ').next().map(str::to_owned),
                _ => {}
            }
        }
        Ok(Self { name: name.to_owned(), bytes, release, depends, before })
    }
}

/// The names after `pre:` in a soft dependency, `pre: a b post: c`.
fn loaded_before(text: &str) -> impl Iterator<Item = &str> {
    let mut is_before = false;
    text.split_ascii_whitespace().filter(move |word| {
        if word.ends_with(':') {
            is_before = *word == "pre:";
        }
        is_before && !word.ends_with(':')
    })
}

#[derive(Debug)]
enum Shelf {
    Directory(BTreeMap<String, PathBuf>),
    Package { spool: File, places: BTreeMap<String, Place> },
}

/// The modules of one kernel.
#[derive(Debug)]
pub(crate) struct Library {
    shelf: Shelf,
    /// `None`: not known, and so all that is asked for.
    builtin: Option<HashSet<String>>,
}

impl Library {
    /// That of a kernel in which everything is built in.
    pub(crate) fn none() -> Self {
        Self { shelf: Shelf::Directory(BTreeMap::new()), builtin: None }
    }

    /// A directory `lib/modules/RELEASE`.
    pub(crate) fn of_directory(path: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        walk(path, 0, &mut files)?;
        let list = path.join("modules.builtin");
        let builtin = match fs::read(&list) {
            Ok(bytes) => builtin_names(&bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => HashSet::new(),
            Err(error) => return Err(GuestError::host("read", &list)(error)),
        };
        Ok(Self { shelf: Shelf::Directory(files), builtin: Some(builtin) })
    }

    pub(crate) fn of_package(spool: File, places: BTreeMap<String, Place>, builtin: HashSet<String>) -> Self {
        Self { shelf: Shelf::Package { spool, places }, builtin: Some(builtin) }
    }

    pub(crate) fn is_built_in(&self, name: &str) -> bool {
        self.builtin.as_ref().is_none_or(|names| names.contains(name))
    }

    pub(crate) fn holds(&self, name: &str) -> bool {
        match &self.shelf {
            Shelf::Directory(files) => files.contains_key(name),
            Shelf::Package { places, .. } => places.contains_key(name),
        }
    }

    /// Reads a module; `None` if there is no such file.
    pub(crate) fn load(&self, name: &str) -> io::Result<Option<Module>> {
        let bytes = match &self.shelf {
            Shelf::Directory(files) => {
                let Some(path) = files.get(name) else { return Ok(None) };
                read_all(unpacked(File::open(path)?)?, MOST)?
            }
            Shelf::Package { spool, places } => {
                let Some(&(start, length)) = places.get(name) else { return Ok(None) };
                read_all(unpacked(Piece::whole(spool)?.part(start, length)?)?, MOST)?
            }
        };
        Module::read(name, bytes).map(Some)
    }
}

/// Finds the modules below a directory. Links are not followed: `build` and `source` lead to the kernel's sources.
fn walk(folder: &Path, depth: usize, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let failed = || GuestError::host("list", folder);
    let mut entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(failed())?;
    // Of two with one name the same is taken each time.
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let kind = entry.file_type().map_err(failed())?;
        if kind.is_dir() && depth < MOST_FOLDERS {
            walk(&entry.path(), depth + 1, files)?;
        } else if let Some(name) = entry.file_name().to_str().and_then(module_name).filter(|_| kind.is_file()) {
            files.entry(name).or_insert_with(|| entry.path());
        }
        if files.len() > MOST_MODULES {
            let detail = format!("it has more than {MOST_MODULES} modules");
            return Err(GuestError::Malformed { path: folder.to_owned(), detail });
        }
    }
    Ok(())
}

/// The modules of a guest, each list in the order in which they are loaded.
#[derive(Debug)]
pub(crate) struct Selection {
    pub base: Vec<Module>,
    /// None of these is in the base.
    pub extra: Vec<(&'static str, Vec<Module>)>,
}

impl Selection {
    /// All of them, each with the name of its group.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&str, &Module)> {
        let extra = self.extra.iter().flat_map(|(group, modules)| modules.iter().map(|module| (*group, module)));
        self.base.iter().map(|module| ("base", module)).chain(extra)
    }

    /// Checks that all were built for this kernel.
    pub(crate) fn check_release(&self, release: &str, kernel: &Path) -> Result<()> {
        let other = self.all().find_map(|(_, module)| match &module.release {
            Some(built_for) if built_for != release => Some((&module.name, built_for)),
            _ => None,
        });
        let Some((name, built_for)) = other else { return Ok(()) };
        let detail = format!("it is of release {release}, and its module {name} of {built_for}");
        Err(GuestError::Malformed { path: kernel.to_owned(), detail })
    }
}

/// Chooses from a library, which is that of `kernel`, what a guest gets.
pub(crate) fn select(library: &Library, kernel: &Path) -> Result<Selection> {
    let absent: Vec<_> = NEEDED.into_iter().filter(|name| !library.holds(name) && !library.is_built_in(name)).collect();
    if !absent.is_empty() {
        let what = format!("{}, built in or as modules", absent.join(", "));
        return Err(GuestError::Lacks { kernel: kernel.to_owned(), what });
    }
    let mut chosen = Choice { library, kernel, placed: HashSet::new(), order: Vec::new(), room: MOST_TOGETHER };
    let base = chosen.group(&BASE)?;
    let of_base = chosen.placed.clone();
    let mut extra = Vec::new();
    for (group, wanted) in EXTRA {
        chosen.placed = of_base.clone();
        let modules = chosen.group(wanted)?;
        if !modules.is_empty() {
            extra.push((group, modules));
        }
    }
    Ok(Selection { base, extra })
}

struct Choice<'a> {
    library: &'a Library,
    kernel: &'a Path,
    placed: HashSet<String>,
    order: Vec<Module>,
    /// How many bytes more may be chosen.
    room: u64,
}

impl Choice<'_> {
    /// The wanted modules that are there, each after what it needs.
    fn group(&mut self, wanted: &[&str]) -> Result<Vec<Module>> {
        for name in wanted {
            self.place(name, &mut Vec::new())?;
        }
        Ok(std::mem::take(&mut self.order))
    }

    /// Puts a module into the order, after what it needs, and says whether there is such a one, as a file or built in.
    /// `path`: the modules that led here.
    fn place(&mut self, name: &str, path: &mut Vec<String>) -> Result<bool> {
        if self.placed.contains(name) || !self.library.holds(name) && self.library.is_built_in(name) {
            return Ok(true);
        }
        if path.len() == DEEPEST || path.iter().any(|open| open == name) {
            return Err(self.broken(format!("its modules need each other in a ring or too deep, at {name}")));
        }
        let read = self.library.load(name).map_err(|error| match error.raw_os_error() {
            Some(_) => GuestError::host("read a module of", self.kernel)(error),
            None => self.broken(format!("its module {name}: {error}")),
        })?;
        let Some(module) = read else { return Ok(false) };
        self.room = self
            .room
            .checked_sub(module.bytes.len() as u64)
            .ok_or_else(|| self.broken(format!("its modules have more than {MOST_TOGETHER} bytes together")))?;
        path.push(name.to_owned());
        for before in &module.before {
            // Not there: it is built in under another name, or does without.
            self.place(before, path)?;
        }
        for needed in &module.depends {
            if !self.place(needed, path)? {
                return Err(self.broken(format!("its module {name} needs {needed}, which is not there")));
            }
        }
        path.pop();
        self.placed.insert(name.to_owned());
        self.order.push(module);
        Ok(true)
    }

    fn broken(&self, detail: String) -> GuestError {
        GuestError::Malformed { path: self.kernel.to_owned(), detail }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{module, mutations, pack};
    use crate::packing::Packing;

    const RELEASE: &str = "6.12.1-test";

    /// A directory with these modules (name, depends, softdep), and these built in.
    fn directory(modules: &[(&str, &str, &str)], builtin: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("kernel/drivers")).unwrap();
        for (name, depends, soft) in modules {
            let path = dir.path().join("kernel/drivers").join(format!("{name}.ko.xz"));
            fs::write(path, pack(&module(RELEASE, depends, soft), Packing::Xz)).unwrap();
        }
        fs::write(dir.path().join("modules.builtin"), builtin).unwrap();
        dir
    }

    const BUILTIN: &str = "kernel/virtio_mmio.ko\nkernel/virtio-blk.ko\nkernel/virtio_net.ko\nkernel/fs/overlay.ko\n";

    fn selected(modules: &[(&str, &str, &str)], builtin: &str) -> Result<Selection> {
        let dir = directory(modules, builtin);
        select(&Library::of_directory(dir.path()).unwrap(), Path::new("/kernel"))
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn modules_come_after_what_they_need() {
        let modules = [
            ("erofs", "lib-a,lib_b", ""),
            ("lib-a", "lib_b", "pre: early absent-alias post: late"),
            ("lib_b", "", ""),
            ("early", "", ""),
            ("late", "", ""),
            ("virtio-rng", "", ""),
            ("nfs", "sunrpc,lib_b,virtio_blk", ""),
            ("nfsv4", "nfs,sunrpc", ""),
            ("sunrpc", "", ""),
            ("veth", "", ""),
        ];
        let found = selected(&modules, BUILTIN).unwrap();
        assert_eq!(names(&found.base), ["early", "lib_b", "lib_a", "erofs", "virtio_rng"]);
        let groups: Vec<_> = found.extra.iter().map(|(group, modules)| (*group, names(modules))).collect();
        assert_eq!(groups, [("nfs", vec!["sunrpc", "nfs", "nfsv4"]), ("net", vec!["veth"])]);
        assert_eq!(found.all().count(), 9);
        found.check_release(RELEASE, Path::new("/kernel")).unwrap();
        let error = found.check_release("6.1", Path::new("/kernel")).unwrap_err().to_string();
        assert!(error.contains("of release 6.1") && error.contains(RELEASE), "{error}");
    }

    #[test]
    fn what_a_guest_cannot_do_without_is_missed() {
        let error = selected(&[("overlay", "", "")], "kernel/virtio_mmio.ko\n").unwrap_err();
        assert_eq!(error.to_string(), "kernel /kernel lacks virtio_blk, virtio_net, erofs, built in or as modules");
        let none = select(&Library::none(), Path::new("/kernel")).unwrap();
        assert!(none.base.is_empty() && none.extra.is_empty());
    }

    #[test]
    fn what_does_not_fit_together_is_refused_in_words() {
        let says = |modules: &[(&str, &str, &str)], words: &str| {
            let error = selected(modules, BUILTIN).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        says(&[("erofs", "absent", "")], "erofs needs absent");
        says(&[("erofs", "other", ""), ("other", "erofs", "")], "in a ring");
        says(&[("erofs", "../x", "")], "no name of a module");
        let chain: Vec<_> = (0..40).map(|n| (format!("m{n}"), format!("m{}", n + 1))).collect();
        let mut deep: Vec<_> = chain.iter().map(|(name, needs)| (name.as_str(), needs.as_str(), "")).collect();
        deep.push(("erofs", "m0", ""));
        says(&deep, "too deep");
    }

    #[test]
    fn names_are_those_of_the_kernel() {
        assert_eq!(module_name("virtio-rng.ko.zst").unwrap(), "virtio_rng");
        assert_eq!(module_name("xt_LOG.ko").unwrap(), "xt_LOG");
        for other in ["x", ".ko", "x.ko.bz2", "a/b.ko", "..ko", &format!("{}.ko", "x".repeat(56))] {
            assert_eq!(module_name(other), None, "{other}");
        }
        assert!(builtin_names(b"kernel/a-b.ko\n\nkernel/c.txt\n\xff\nd.ko").len() == 2);
    }

    #[test]
    fn links_in_a_directory_are_not_followed() {
        let dir = directory(&[("erofs", "", "")], BUILTIN);
        std::os::unix::fs::symlink(dir.path(), dir.path().join("kernel/build")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", dir.path().join("kernel/zero.ko")).unwrap();
        let library = Library::of_directory(dir.path()).unwrap();
        assert!(library.holds("erofs") && !library.holds("zero"));
    }

    #[test]
    fn whatever_is_changed_in_a_module_is_survived() {
        assert!(Module::read("x", b"no module".to_vec()).is_err());
        for changed in mutations(&module(RELEASE, "a,b", "pre: c"), 20_000) {
            let _ = Module::read("x", changed);
        }
    }
}
