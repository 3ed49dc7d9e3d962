//! The paths that a source stands for: `*` and `?` may stand in each of its names, and what is found on the way is a hostile
//! container's.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::sys;

/// Paths of one source, or directories on the way to them; of more the first ones by name.
pub(crate) const MAX_PATHS: usize = 64;
/// What the kernel shows of itself: no files to collect. The last one is that of message queues.
const KERNELS: [i64; 6] = [
    libc::PROC_SUPER_MAGIC,
    libc::SYSFS_MAGIC,
    libc::CGROUP_SUPER_MAGIC,
    libc::CGROUP2_SUPER_MAGIC,
    libc::DEVPTS_SUPER_MAGIC,
    0x1980_0202,
];

/// The paths that fit, and whether all there is was seen: each directory and each of its entries takes one off the budget.
pub(crate) fn paths(root: BorrowedFd<'_>, names: &[String], budget: &mut usize) -> (BTreeSet<PathBuf>, bool) {
    let (mut places, mut whole) = (BTreeSet::from([PathBuf::from("/")]), true);
    for (at, name) in names.iter().enumerate() {
        if !name.contains(['*', '?']) {
            places = places.into_iter().map(|place| place.join(name)).collect();
            continue;
        }
        let (last, mut next) = (at + 1 == names.len(), BTreeSet::new());
        for place in &places {
            whole &= enter(root, place, (name, last), budget, &mut next);
        }
        places = next;
    }
    (places, whole)
}

/// Adds what fits in a directory; false: the budget was not enough. What a pattern stands for on the way is a directory and no link,
/// which would only be one more way to the same files.
fn enter(
    root: BorrowedFd<'_>,
    place: &Path,
    (pattern, last): (&str, bool),
    budget: &mut usize,
    next: &mut BTreeSet<PathBuf>,
) -> bool {
    if *budget == 0 {
        return false;
    }
    *budget -= 1;
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NONBLOCK;
    let Some(dir) = sys::open_in_root(root, place, flags).ok().filter(|dir| !is_kernels(dir)) else { return true };
    let Ok(list) = std::fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd())) else { return true };
    for entry in list {
        if *budget == 0 {
            return false;
        }
        *budget -= 1;
        let Ok(entry) = entry else { return true };
        let name = entry.file_name();
        let wanted = || last || entry.file_type().is_ok_and(|kind| kind.is_dir());
        if fits(pattern.as_bytes(), name.as_bytes()) && wanted() {
            next.insert(place.join(name));
            if next.len() > MAX_PATHS {
                next.pop_last();
            }
        }
    }
    true
}

pub(crate) fn is_kernels(file: &File) -> bool {
    sys::filesystem(file).map_or(true, |kind| KERNELS.contains(&kind))
}

/// `*` stands for any bytes, `?` for one; a name that begins with a dot must be asked for with one.
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    if name.first() == Some(&b'.') && pattern.first() != Some(&b'.') {
        return false;
    }
    let (mut p, mut n) = (0, 0);
    // Where to go on when the last star takes one byte more: no more steps than the product of the lengths.
    let mut star = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(byte) if *byte == b'?' || *byte == name[n] => (p, n) = (p + 1, n + 1),
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, n) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn names_fit_patterns() {
        for (pattern, name, expected) in [
            ("*.log", "a.log", true),
            ("*.log", ".log", false),
            (".*", ".log", true),
            ("a?c*", "abcdef", true),
            ("a?c", "ac", false),
            ("*a*b", "xaxxbxb", true),
            ("*a*b", "xaxxbxc", false),
            ("*", "", true),
            ("a*a*a*a*a*a*a*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", false),
        ] {
            assert_eq!(fits(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn what_a_look_costs_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        for at in 0..100 {
            let deep = dir.path().join(format!("{at:02}/deep"));
            fs::create_dir_all(&deep).unwrap();
            fs::write(deep.join("a.log"), "").unwrap();
        }
        // Directories that lead into each other would be ways without end.
        for at in 0..3 {
            std::os::unix::fs::symlink("/", dir.path().join(format!("0-link{at}"))).unwrap();
        }
        let root = File::open(dir.path()).unwrap();
        let names = |path: &str| path.split('/').skip(1).map(str::to_owned).collect::<Vec<_>>();
        let look = |path: &str, mut budget: usize| {
            let (found, whole) = paths(root.as_fd(), &names(path), &mut budget);
            (found.into_iter().map(|path| path.display().to_string()).collect::<Vec<_>>(), whole, budget)
        };
        let (found, whole, left) = look("/*/*/a.log", 1000);
        let wanted: Vec<String> = (0..MAX_PATHS).map(|at| format!("/{at:02}/deep/a.log")).collect();
        assert_eq!((found, whole), (wanted, true), "the first ones by name, and no links");
        // The root with its entries, and 64 directories with one each.
        assert_eq!(left, 1000 - 104 - 2 * MAX_PATHS);
        assert_eq!(look("/0?/deep/a.log", 1000).0.len(), 10);
        let (found, whole, left) = look("/*/*/*.log", 120);
        assert!(found.is_empty() && !whole && left == 0, "no more than what is left: {found:?}");
        assert_eq!(look("/0-link0/00/deep/*", 1000).0, ["/0-link0/00/deep/a.log"], "a link that the path names is one");
    }
}
