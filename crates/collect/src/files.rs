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
use crate::paths::{is_kernels, paths};
use crate::positions::{ANY, OWN, Positions};
use crate::segments::Segments;
use crate::{DIRECTORY, sys};

/// Files of one source that are followed.
const MAX_FILES: usize = 64;
/// Directories and entries of directories that one look is worth, over all sources.
pub(crate) const MAX_ENTRIES: usize = 8192;
/// Bytes read at once.
const PART: usize = 64 << 10;
/// Looks for which a file that is not found any more is followed to see whether its writer goes on; and those after which what could
/// not be read of it is given up.
const QUIET: u32 = 10;
const PATIENCE: u32 = 60;
/// Bytes and files that a source keeps for the collector.
const SEGMENTS: (u64, u32) = (4 << 20, 4);
/// Bytes of a block, of which a file system says how many a file has; and what a short file may have without any.
const BLOCK: u64 = 512;
const SHORT: u64 = 4096;

/// The sources of a container that are files, over its runs.
pub struct Files {
    pub(crate) sources: Vec<Source>,
    /// Whose turn it is: to be looked for first, and to be read first.
    first: usize,
    next: usize,
}

/// The files whose paths fit.
pub(crate) struct Source {
    pub(crate) names: Vec<String>,
    /// What is before these names for the container.
    pub(crate) prefix: PathBuf,
    log: Log,
    /// By device and inode.
    files: BTreeMap<(u64, u64), Followed>,
    /// Files that were followed so far, and the path of the one that was read last.
    count: u64,
    turn: String,
    /// How far files were read by one who is gone, and where that is noted.
    before: Positions,
    note: PathBuf,
    noted: Option<Positions>,
    /// What is looked at is what a sandbox left, from outside. No run follows: nothing waits for the end of its line.
    pub(crate) once: bool,
}

struct Followed {
    /// Held open, so that its inode names no other file.
    file: File,
    /// Where it was found last, and the word for where it was found first.
    place: PathBuf,
    path: String,
    /// Greater than that of those before it.
    number: u64,
    read: u64,
    /// Its length when all of it was read.
    length: Option<u64>,
    /// It goes with the run that wrote it.
    of_run: bool,
    /// The device that its position is noted with.
    device: u64,
    found: bool,
    /// Looks since it was found or gave something.
    quiet: u32,
}

impl Files {
    /// `sources`: names, and paths in whose names `*` and `?` may stand. Their segments are below the directory of an instance. What
    /// was read before is of no account: it was of another sandbox.
    pub fn open(instance: &Path, container: &str, sources: &BTreeMap<String, String>) -> io::Result<Self> {
        let mut files = Self::with(instance, container, sources)?;
        files.note()?;
        Ok(files)
    }

    /// The same for who goes on where another one was killed.
    pub(crate) fn after(instance: &Path, container: &str, sources: &BTreeMap<String, String>) -> io::Result<Self> {
        let mut files = Self::with(instance, container, sources)?;
        for (source, name) in files.sources.iter_mut().zip(sources.keys()) {
            source.before = Positions::read(&source.note, &Segments::of(instance, container, name).all()?)?;
        }
        Ok(files)
    }

    fn with(instance: &Path, container: &str, sources: &BTreeMap<String, String>) -> io::Result<Self> {
        let open = |(name, path): (&String, &String)| {
            let segments = Segments::of(instance, container, name);
            let dir = instance.join(DIRECTORY).join(container).join(name);
            let mut log = Log::open(dir.join("log"), SEGMENTS.0, SEGMENTS.1, Some(segments))?;
            log.fault().map_or(Ok(()), Err)?;
            Ok(Source {
                names: path.split('/').skip(1).map(str::to_owned).collect(),
                prefix: PathBuf::from("/"),
                log,
                files: BTreeMap::new(),
                count: 0,
                turn: String::new(),
                before: Positions::default(),
                note: dir.join("read"),
                noted: None,
                once: false,
            })
        };
        Ok(Self { sources: sources.iter().map(open).collect::<io::Result<_>>()?, first: 0, next: 0 })
    }

    /// Looks which files there are in the container's root.
    pub fn find(&mut self, root: BorrowedFd<'_>) {
        let mut budget = MAX_ENTRIES;
        self.find_within(root, &mut budget);
    }

    pub(crate) fn find_within(&mut self, root: BorrowedFd<'_>, budget: &mut usize) {
        let count = self.sources.len();
        for at in 0..count {
            self.sources[(self.first + at) % count].find(root, budget);
        }
        self.first = (self.first + 1) % count.max(1);
    }

    /// Takes in some of what was found and not read yet: how many bytes, none at the end. With `last` also lines that have no end. Each
    /// source has its turn, so that one in which much is written, or one whose records cannot be, keeps no other one waiting.
    pub fn take(&mut self, last: bool) -> io::Result<usize> {
        let (count, mut failed) = (self.sources.len(), None);
        for _ in 0..count {
            let source = &mut self.sources[self.next % count];
            self.next = (self.next + 1) % count;
            match source.take(last) {
                Ok(0) => {}
                Ok(taken) => return Ok(taken),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(0), Err)
    }

    /// Notes how far files are read, after each look.
    pub fn note(&mut self) -> io::Result<()> {
        let noted: Vec<_> = self.sources.iter_mut().map(Source::note).collect();
        noted.into_iter().collect()
    }

    /// Forgets what went with a run that has ended. What was not read of it is lost: how many bytes; the stream has a gap for it.
    pub fn end_run(&mut self) -> io::Result<u64> {
        let ended: Vec<_> = self.sources.iter_mut().map(Source::end_run).collect();
        ended.into_iter().sum()
    }
}

impl Source {
    fn find(&mut self, root: BorrowedFd<'_>, budget: &mut usize) {
        self.let_go();
        for file in self.files.values_mut() {
            (file.found, file.quiet) = (false, file.quiet.saturating_add(1));
        }
        let (paths, whole) = paths(root, &self.names, budget);
        paths.into_iter().for_each(|path| self.follow(root, path));
        if whole {
            return;
        }
        // Who was not come to is not gone if it still has its place.
        for (key, file) in self.files.iter_mut().filter(|(_, file)| !file.found) {
            let there = regular(root, &file.place).ok().flatten();
            if there.is_some_and(|(_, meta)| (meta.dev(), meta.ino()) == *key) {
                (file.found, file.quiet) = (true, 0);
            }
        }
    }

    /// Forgets files that are gone, once they are read or too much of them is left for too long.
    fn let_go(&mut self) {
        let log = &mut self.log;
        self.files.retain(|_, file| {
            if file.found || file.quiet < QUIET {
                return true;
            }
            let rest = file.rest();
            rest > 0 && (file.quiet < PATIENCE || log.lose(records(rest)).is_err())
        });
    }

    fn follow(&mut self, root: BorrowedFd<'_>, place: PathBuf) {
        // Gone meanwhile, or nothing to read.
        let Ok(Some((there, meta))) = regular(root, &place) else { return };
        if let Some(known) = self.files.get_mut(&(meta.dev(), meta.ino())) {
            (known.found, known.quiet, known.place) = (true, 0, place);
            return;
        }
        if self.files.len() >= MAX_FILES {
            return;
        }
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let open =
            OpenOptions::new().read(true).custom_flags(flags).open(format!("/proc/self/fd/{}", there.as_raw_fd()));
        let Ok(file) = open else { return };
        // Writable layers and empty directories are overlays within, and plain directories of one disk from outside.
        let overlay = sys::filesystem(&there).is_ok_and(|kind| kind == libc::OVERLAYFS_SUPER_MAGIC);
        let of_run = overlay && sys::mount(&there).is_ok_and(|it| sys::mount(&root).is_ok_and(|roots| it == roots));
        let device = if overlay || self.once { OWN } else { meta.dev() };
        let path = escaped(&self.prefix.join(place.strip_prefix("/").unwrap_or(&place)));
        let read = self.before.of(device, meta.ino());
        self.count += 1;
        let number = self.count;
        let followed =
            Followed { file, place, path, number, read, length: None, of_run, device, found: true, quiet: 0 };
        self.files.insert((meta.dev(), meta.ino()), followed);
    }

    /// Paths have their turns. What was renamed away is older than what took its place, and is read before that.
    fn take(&mut self, last: bool) -> io::Result<usize> {
        let mut part = vec![0; PART];
        let mut files: Vec<_> = self.files.values_mut().collect();
        files.sort_by(|one, other| (&one.path, one.number).cmp(&(&other.path, other.number)));
        let behind = files.partition_point(|file| file.path <= self.turn);
        files.rotate_left(behind);
        for file in files {
            let ends = last && (file.of_run || self.once) || !file.found && file.quiet >= QUIET;
            let taken = file.take(&mut self.log, &mut part, ends)?;
            if taken > 0 {
                self.turn.clone_from(&file.path);
                return Ok(taken);
            }
        }
        Ok(0)
    }

    fn note(&mut self) -> io::Result<()> {
        let mut now = Positions { at: self.log.position(), files: self.before.files.clone() };
        for ((_, inode), file) in &self.files {
            now.files.remove(&(ANY, *inode));
            now.files.insert((file.device, *inode), file.read);
        }
        if self.noted.as_ref() != Some(&now) {
            now.write(&self.note)?;
            self.noted = Some(now);
        }
        Ok(())
    }

    fn end_run(&mut self) -> io::Result<u64> {
        let (once, mut lost) = (self.once, 0);
        for file in self.files.values_mut().filter(|file| file.of_run || once) {
            let rest = file.rest();
            lost += rest;
            file.read += rest;
        }
        let told = if lost > 0 { self.log.lose(records(lost)) } else { Ok(()) };
        self.files.retain(|_, file| !file.of_run || once);
        self.note().and(told).map(|()| lost)
    }
}

/// As how many records so many bytes count that nobody has read: at least so many they would be.
fn records(bytes: u64) -> u64 {
    bytes.div_ceil(RECORD as u64)
}

impl Followed {
    /// Bytes that are there and not read.
    fn rest(&self) -> u64 {
        match (self.file.metadata(), sys::next_data(&self.file, self.read)) {
            (Ok(meta), Ok(Some(_))) => {
                meta.len().saturating_sub(self.read).min(meta.blocks().saturating_mul(BLOCK).max(SHORT))
            }
            _ => 0,
        }
    }

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

/// What is at the path, if it is a file like any other. It is looked at before it is opened, so that no pipe has a reader and no device
/// is touched.
fn regular(root: BorrowedFd<'_>, path: &Path) -> io::Result<Option<(File, Metadata)>> {
    let there = sys::open_in_root(root, path, libc::O_PATH)?;
    let meta = there.metadata()?;
    Ok((meta.is_file() && !is_kernels(&there)).then_some((there, meta)))
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

    fn lines(dir: &Path) -> Vec<String> {
        lines_of(dir, "a")
    }

    fn lines_of(dir: &Path, source: &str) -> Vec<String> {
        let segments = Segments::of(dir, "web", source).all().unwrap();
        let text: String = segments.iter().map(|segment| fs::read_to_string(&segment.path).unwrap()).collect();
        text.lines().map(|line| line.splitn(3, ' ').nth(2).unwrap().to_owned()).collect()
    }

    fn look(files: &mut Files, root: &Path, last: bool) {
        // No overlay here that would end.
        files.sources[0].once = true;
        files.find(File::open(root).unwrap().as_fd());
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
        let mut next = Files::after(dir, "web", &sources).unwrap();
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

    fn one(path: &str) -> BTreeMap<String, String> {
        BTreeMap::from([("a".to_owned(), path.to_owned())])
    }

    #[test]
    fn a_file_that_was_idle_is_followed_when_it_is_renamed() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, root) = (dir.path(), dir.path().join("root"));
        fs::create_dir_all(&root).unwrap();
        fs::write(root.join("a.log"), "one\n").unwrap();
        let mut files = Files::open(dir, "web", &one("/a.log")).unwrap();
        (0..2 * QUIET).for_each(|_| look(&mut files, &root, false));
        let mut file = OpenOptions::new().append(true).open(root.join("a.log")).unwrap();
        fs::rename(root.join("a.log"), root.join("a.log.1")).unwrap();
        (0..QUIET / 2).for_each(|_| look(&mut files, &root, false));
        file.write_all(b"late\n").unwrap();
        look(&mut files, &root, false);
        assert_eq!(lines(dir), ["F one", "F late"]);
    }

    #[test]
    fn who_writes_much_keeps_nobody_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, root) = (dir.path(), dir.path().join("root"));
        fs::create_dir_all(&root).unwrap();
        fs::write(root.join("big.log"), "a line of a busy file\n".repeat(50_000)).unwrap();
        fs::write(root.join("small.log"), "small\n").unwrap();
        fs::write(root.join("other"), "other\n").unwrap();
        let sources = [("a", "/*.log"), ("b", "/other")].map(|(name, path)| (name.to_owned(), path.to_owned()));
        let mut files = Files::open(dir, "web", &sources.into()).unwrap();
        files.find(File::open(&root).unwrap().as_fd());
        (0..4).for_each(|_| assert!(files.take(false).unwrap() > 0));
        assert!(lines(dir).contains(&"F small".to_owned()));
        assert_eq!(lines_of(dir, "b"), ["F other"]);

        // Gone before it was read: it is read all the same.
        fs::remove_file(root.join("big.log")).unwrap();
        (0..=QUIET).for_each(|_| files.find(File::open(&root).unwrap().as_fd()));
        while files.take(false).unwrap() > 0 {}
        assert_eq!(lines(dir).len(), 50_001);
    }

    #[test]
    fn what_was_read_is_known_where_its_records_are_not_kept_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, root) = (dir.path(), dir.path().join("root"));
        fs::create_dir_all(&root).unwrap();
        let line = [vec![b'x'; 15_000], b"\n".to_vec()].concat();
        fs::write(root.join("a.log"), line.repeat(1400)).unwrap();
        let mut files = Files::open(dir, "web", &one("/a.log")).unwrap();
        look(&mut files, &root, false);
        files.note().unwrap();
        assert!(Segments::of(dir, "web", "a").all().unwrap()[0].bytes > 0, "the first ones are gone");
        // What is read after the note, by one who is killed before the next.
        let mut file = OpenOptions::new().append(true).open(root.join("a.log")).unwrap();
        file.write_all(b"more\n").unwrap();
        look(&mut files, &root, false);
        let end = files.sources[0].log.position();
        drop(files);
        for _ in 0..2 {
            let mut next = Files::after(dir, "web", &one("/a.log")).unwrap();
            look(&mut next, &root, true);
            next.note().unwrap();
            assert_eq!(next.sources[0].log.position(), end, "nothing comes twice");
        }
    }

    #[test]
    fn what_is_not_read_at_the_end_of_a_run_is_told_as_lost() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, root) = (dir.path(), dir.path().join("root"));
        fs::create_dir_all(&root).unwrap();
        fs::write(root.join("a.log"), "a line of a run\n".repeat(50_000)).unwrap();
        let mut files = Files::open(dir, "web", &one("/a.log")).unwrap();
        files.find(File::open(&root).unwrap().as_fd());
        // No overlay here that would end.
        files.sources[0].files.values_mut().for_each(|file| file.of_run = true);
        assert!(files.take(true).unwrap() > 0);
        let lost = files.end_run().unwrap();
        assert!(lost > 0 && files.sources[0].files.is_empty());
        let all = Segments::of(dir, "web", "a").all().unwrap();
        let (_, told) = crate::measure(&all[0].path).unwrap();
        assert_eq!((all.len(), all[1].lines), (2, told + lost.div_ceil(RECORD as u64)));
    }
}
