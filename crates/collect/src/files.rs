//! What a container writes into its own files, line by line into segments.
//!
//! The container is hostile and who reads has rights that it has not. So every path is walked inside the container's root, no link
//! of /proc is followed, only regular files of no kernel's file system are opened, and there is a bound on files and entries.

use std::collections::BTreeMap;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::log::{Log, RECORD};
use crate::segments::{Segment, Segments};
use crate::{DIRECTORY, sys};

/// Files of one source that are followed, and entries of one directory that are looked at.
const MAX_FILES: usize = 64;
const MAX_ENTRIES: usize = 4096;
/// Bytes read at once.
const PART: usize = 64 << 10;
/// Looks for which a file that is not found any more is followed to see whether its writer goes on.
const QUIET: u32 = 10;
/// Bytes and files that a source keeps for the collector.
const SEGMENTS: (u64, u32) = (4 << 20, 4);
/// What the kernel shows of itself: no files to collect. The last one is that of message queues.
const KERNELS: [i64; 6] = [
    libc::PROC_SUPER_MAGIC,
    libc::SYSFS_MAGIC,
    libc::CGROUP_SUPER_MAGIC,
    libc::CGROUP2_SUPER_MAGIC,
    libc::DEVPTS_SUPER_MAGIC,
    0x1980_0202,
];

/// The sources of a container that are files, over its runs.
pub struct Files {
    pub(crate) sources: Vec<Source>,
}

/// The files whose paths fit.
pub(crate) struct Source {
    pub(crate) names: Vec<String>,
    /// What is before these names for the container.
    pub(crate) prefix: PathBuf,
    log: Log,
    /// By device and inode.
    files: BTreeMap<(u64, u64), Followed>,
    /// How far files were read by one who is gone, by inode.
    pub(crate) before: BTreeMap<u64, u64>,
    /// No run follows: nothing waits for the end of its line.
    pub(crate) once: bool,
}

struct Followed {
    /// Held open, so that its inode names no other file.
    file: File,
    path: String,
    read: u64,
    /// Its length when all of it was read.
    length: Option<u64>,
    /// It goes with the run that wrote it.
    of_run: bool,
    found: bool,
    quiet: u32,
}

impl Files {
    /// `sources`: names, and paths in whose names `*` and `?` may stand. Their segments are below the directory of an instance.
    pub fn open(instance: &Path, container: &str, sources: &BTreeMap<String, String>) -> io::Result<Self> {
        let open = |(name, path): (&String, &String)| {
            let segments = Segments::of(instance, container, name);
            let log = instance.join(DIRECTORY).join(container).join(name).join("log");
            Ok(Source {
                names: path.split('/').skip(1).map(str::to_owned).collect(),
                prefix: PathBuf::from("/"),
                log: Log::open(log, SEGMENTS.0, SEGMENTS.1, Some(segments))?,
                files: BTreeMap::new(),
                before: BTreeMap::new(),
                once: false,
            })
        };
        Ok(Self { sources: sources.iter().map(open).collect::<io::Result<_>>()? })
    }

    /// Looks which files there are in the container's root.
    pub fn find(&mut self, root: BorrowedFd<'_>) {
        self.sources.iter_mut().for_each(|source| source.find(root));
    }

    /// Takes in some of what was found and not read yet: how many bytes, none at the end. With `last` also lines that have no end.
    pub fn take(&mut self, last: bool) -> io::Result<usize> {
        for source in &mut self.sources {
            let taken = source.take(last)?;
            if taken > 0 {
                return Ok(taken);
            }
        }
        Ok(0)
    }

    /// Forgets what went with a run that has ended.
    pub fn end_run(&mut self) {
        self.sources.iter_mut().for_each(|source| source.files.retain(|_, file| !file.of_run));
    }
}

impl Source {
    fn find(&mut self, root: BorrowedFd<'_>) {
        self.files.retain(|_, file| file.found || file.quiet < QUIET);
        for file in self.files.values_mut() {
            (file.found, file.quiet) = (false, file.quiet + 1);
        }
        for path in paths(root, &self.names) {
            // Gone meanwhile, or nothing to read.
            let Ok(Some((there, meta))) = regular(root, &path) else { continue };
            let key = (meta.dev(), meta.ino());
            if let Some(known) = self.files.get_mut(&key) {
                known.found = true;
                continue;
            }
            let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
            let place = format!("/proc/self/fd/{}", there.as_raw_fd());
            let Ok(file) = OpenOptions::new().read(true).custom_flags(flags).open(place) else { continue };
            let of_run = sys::filesystem(&there).is_ok_and(|kind| kind == libc::OVERLAYFS_SUPER_MAGIC);
            let path = escaped(&self.prefix.join(path.strip_prefix("/").unwrap_or(&path)));
            let read = self.before.get(&meta.ino()).copied().unwrap_or(0);
            if self.files.len() < MAX_FILES {
                let followed = Followed { file, path, read, length: None, of_run, found: true, quiet: 0 };
                self.files.insert(key, followed);
            }
        }
    }

    fn take(&mut self, last: bool) -> io::Result<usize> {
        let mut part = vec![0; PART];
        // What was renamed away is older than what took its place.
        for found in [false, true] {
            for file in self.files.values_mut().filter(|file| file.found == found) {
                let ends = last && (file.of_run || self.once) || !found && file.quiet >= QUIET;
                let taken = file.take(&mut self.log, &mut part, ends)?;
                if taken > 0 {
                    return Ok(taken);
                }
            }
        }
        Ok(0)
    }

    /// How far the records in its segments go in each file.
    pub(crate) fn read_before(segments: &[Segment]) -> io::Result<BTreeMap<u64, u64>> {
        let mut before = BTreeMap::new();
        for segment in segments {
            for line in std::fs::read(&segment.path)?.split_inclusive(|byte| *byte == b'\n') {
                let Some(line) = line.strip_suffix(b"\n") else { continue };
                let mut words = line.splitn(4, |byte| *byte == b' ').skip(1);
                let (Some(word), Some(flag), Some(text)) = (words.next(), words.next(), words.next()) else { continue };
                let mut numbers =
                    word.split(|byte| *byte == b':').map(|part| std::str::from_utf8(part).ok()?.parse::<u64>().ok());
                if let (Some(Some(inode)), Some(Some(offset))) = (numbers.next(), numbers.next()) {
                    before.insert(inode, offset + text.len() as u64 + u64::from(flag == b"F"));
                }
            }
        }
        Ok(before)
    }
}

impl Followed {
    /// Takes in a part; how much. Of a file that `ends` also a last line without an end.
    fn take(&mut self, log: &mut Log, part: &mut [u8], ends: bool) -> io::Result<usize> {
        let meta = self.file.metadata()?;
        let length = meta.len();
        if length < self.read {
            // It was cut to be written anew.
            (self.read, self.length) = (0, None);
        }
        if self.length == Some(length) && !ends {
            return Ok(0);
        }
        // Holes have no lines.
        self.read = sys::next_data(&self.file, self.read)?.unwrap_or(length);
        let count = self.file.read_at(part, self.read)?;
        let (begin, mut rest) = (self.read, &part[..count]);
        while !rest.is_empty() {
            let line = rest.iter().take(RECORD + 1).position(|byte| *byte == b'\n');
            let (text, full) = match line {
                Some(end) => (&rest[..end], true),
                None if rest.len() > RECORD => (&rest[..RECORD], false),
                None if ends && self.read + rest.len() as u64 >= length => (rest, false),
                None => break,
            };
            log.record(&format!("{}:{}:{}", meta.ino(), self.read, self.path), text, full)?;
            let taken = text.len() + usize::from(full);
            self.read += taken as u64;
            rest = &rest[taken..];
        }
        let taken = (self.read - begin) as usize;
        match taken {
            0 => self.length = Some(length),
            // The end of a line that nobody ends does not mean that somebody goes on.
            _ if ends => {}
            _ => self.quiet = 0,
        }
        Ok(taken)
    }
}

/// The paths that fit, at most [`MAX_FILES`] or, on the way, directories.
fn paths(root: BorrowedFd<'_>, names: &[String]) -> Vec<PathBuf> {
    let mut places = vec![PathBuf::from("/")];
    for name in names {
        if !name.contains(['*', '?']) {
            places.iter_mut().for_each(|place| place.push(name));
            continue;
        }
        let mut next: Vec<PathBuf> = places.iter().flat_map(|place| entries(root, place, name)).collect();
        next.sort();
        next.truncate(MAX_FILES);
        places = next;
    }
    places
}

fn entries(root: BorrowedFd<'_>, place: &Path, pattern: &str) -> Vec<PathBuf> {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NONBLOCK;
    let Some(dir) = sys::open_in_root(root, place, flags).ok().filter(|dir| !is_kernels(dir)) else {
        return Vec::new();
    };
    let list = std::fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    let names = list.into_iter().flatten().take(MAX_ENTRIES).flatten().map(|entry| entry.file_name());
    names.filter(|name| fits(pattern.as_bytes(), name.as_bytes())).map(|name| place.join(name)).collect()
}

fn is_kernels(file: &File) -> bool {
    sys::filesystem(file).map_or(true, |kind| KERNELS.contains(&kind))
}

/// What is at the path, if it is a file like any other. It is looked at before it is opened, so that no pipe has a reader and no device
/// is touched.
fn regular(root: BorrowedFd<'_>, path: &Path) -> io::Result<Option<(File, Metadata)>> {
    let there = sys::open_in_root(root, path, libc::O_PATH)?;
    let meta = there.metadata()?;
    Ok((meta.is_file() && !is_kernels(&there)).then_some((there, meta)))
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

/// A path as one word.
fn escaped(path: &Path) -> String {
    let byte = |byte: &u8| match byte {
        b'!'..=b'~' if *byte != b'%' => char::from(*byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    path.as_os_str().as_bytes().iter().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
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

    fn lines(dir: &Path) -> Vec<String> {
        let segments = Segments::of(dir, "web", "a").all().unwrap();
        let text: String = segments.iter().map(|segment| fs::read_to_string(&segment.path).unwrap()).collect();
        text.lines().map(|line| line.splitn(3, ' ').nth(2).unwrap().to_owned()).collect()
    }

    fn look(files: &mut Files, root: &Path, last: bool) {
        files.find(File::open(root).unwrap().as_fd());
        // No overlay here that would end.
        files.sources[0].once = true;
        while files.take(last).unwrap() > 0 {}
    }

    #[test]
    fn files_are_followed_over_rotation_and_nothing_else_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, root) = (dir.path(), dir.path().join("root"));
        fs::create_dir_all(root.join("var/log")).unwrap();
        let log = |name: &str| root.join("var/log").join(name);
        fs::write(dir.join("secret.log"), "of the host\n").unwrap();
        let out: [(&str, PathBuf); 3] = [
            ("out.log", dir.join("secret.log")),
            ("up.log", "../../../secret.log".into()),
            ("proc.log", "/proc/self/environ".into()),
        ];
        out.iter().for_each(|(name, to)| std::os::unix::fs::symlink(to, log(name)).unwrap());
        // A pipe would block, and a hole of a tebibyte has no lines.
        assert!(std::process::Command::new("mkfifo").arg(log("fifo.log")).status().unwrap().success());
        File::create(log("hole.log")).unwrap().set_len(1 << 40).unwrap();
        fs::write(log("a.log"), "one\ntwo\nthr").unwrap();

        let sources = BTreeMap::from([("a".to_owned(), "/var/*/*.log".to_owned())]);
        let mut files = Files::open(dir, "web", &sources).unwrap();
        look(&mut files, &root, false);
        assert_eq!(lines(dir), ["F one", "F two"], "a line without an end may go on");

        let mut file = OpenOptions::new().append(true).open(log("a.log")).unwrap();
        file.write_all(b"ee\n").unwrap();
        fs::rename(log("a.log"), log("a.log.1")).unwrap();
        fs::write(log("a.log"), "new\n").unwrap();
        file.write_all(b"late\n").unwrap();
        look(&mut files, &root, false);
        assert_eq!(lines(dir)[2..], ["F three", "F late", "F new"], "first what was renamed");
        fs::write(log("a.log"), "x\n").unwrap();
        look(&mut files, &root, false);
        assert_eq!(lines(dir)[5..], ["F x"], "cut and written anew");

        fs::write(log("long.log"), [vec![b'y'; RECORD + 5], b"\nend".to_vec()].concat()).unwrap();
        look(&mut files, &root, false);
        look(&mut files, &root, true);
        let found = lines(dir);
        assert_eq!((found[6].len(), found[7].as_str(), found[8].as_str()), (RECORD + 2, "F yyyyy", "P end"));
        assert_eq!(found.len(), 9);

        // Who comes after one that was killed knows from the segments how far it came.
        let mut next = Files::open(dir, "web", &sources).unwrap();
        next.sources[0].before = Source::read_before(&Segments::of(dir, "web", "a").all().unwrap()).unwrap();
        fs::write(log("b.log"), "more\n").unwrap();
        look(&mut next, &root, true);
        assert_eq!(lines(dir)[9..], ["F more"]);
    }

    #[test]
    fn who_holds_on_to_a_file_that_is_gone_lets_go_after_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, root) = (dir.path(), dir.path().join("root"));
        fs::create_dir_all(&root).unwrap();
        fs::write(root.join("a b"), "end").unwrap();
        let mut files = Files::open(dir, "web", &BTreeMap::from([("a".to_owned(), "/a*".to_owned())])).unwrap();
        look(&mut files, &root, false);
        fs::remove_file(root.join("a b")).unwrap();
        (0..=QUIET).for_each(|_| look(&mut files, &root, false));
        assert_eq!(lines(dir), ["P end"]);
        assert!(files.sources[0].files.is_empty());
    }
}
