//! A log as one stream of bytes with growing numbers: each part has a further name (a hard link), `BYTES.LINES`, which says in
//! hexadecimal digits how many bytes and records were written before it. So neither the rotation of the parts nor the end of a run
//! changes what is found, and a gap says how much is lost.

use std::fs::{DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The segments of one source.
pub struct Segments {
    dir: PathBuf,
}

/// One of them, and what was written before it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Segment {
    pub bytes: u64,
    pub lines: u64,
    pub path: PathBuf,
}

/// The most segments of a source, however short the runs that made them.
pub(crate) const MAX_SEGMENTS: usize = 256;

/// How much stays of those before the newest one.
pub(crate) struct Bound {
    pub(crate) bytes: u64,
    pub(crate) count: usize,
}

impl Segments {
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Those of a container's source, below the directory of an instance.
    pub fn of(instance: &Path, container: &str, source: &str) -> Self {
        Self::at(instance.join(crate::DIRECTORY).join(container).join(source))
    }

    /// `log`, which is empty, is the next segment, `gap` bytes and records behind the one before it; returns how many bytes of the
    /// stream are before it. The oldest ones go as far as the bound asks for it.
    pub(crate) fn begin(&self, log: &Path, bound: Bound, gap: (u64, u64)) -> io::Result<u64> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let (mut all, mut next, mut empty) = (self.all()?, gap, None);
        if let Some(newest) = all.pop() {
            let (bytes, lines) = measure(&newest.path)?;
            next = (newest.bytes + bytes + gap.0, newest.lines + lines + gap.1);
            match bytes {
                // A run without output: its number goes to this one.
                0 => empty = Some(newest.path),
                _ => all.push(newest),
            }
        }
        // There is always a newest one: a name takes the place of another.
        let (new, place) = (self.dir.join("new"), self.path(next.0, next.1));
        let _ = std::fs::remove_file(&new);
        std::fs::hard_link(log, &new)?;
        std::fs::rename(&new, &place)?;
        // It is still there where both were names of the same file.
        let _ = std::fs::remove_file(&new);
        if let Some(empty) = empty.filter(|empty| *empty != place) {
            std::fs::remove_file(empty)?;
        }
        let sizes = all.iter().map(|old| Ok(std::fs::metadata(&old.path)?.len()));
        let sizes = sizes.collect::<io::Result<Vec<u64>>>()?;
        let (mut total, mut count) = (sizes.iter().sum::<u64>(), all.len());
        for (old, size) in all.iter().zip(sizes) {
            if total <= bound.bytes && count <= bound.count {
                break;
            }
            std::fs::remove_file(&old.path)?;
            (total, count) = (total - size, count - 1);
        }
        Ok(next.0)
    }

    /// Where this file begins, if it is the newest one.
    pub(crate) fn ends_with(&self, file: &File) -> io::Result<Option<u64>> {
        let Some(newest) = self.all()?.pop() else { return Ok(None) };
        let same = std::fs::metadata(newest.path)?.ino() == file.metadata()?.ino();
        Ok(same.then_some(newest.bytes))
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn path(&self, bytes: u64, lines: u64) -> PathBuf {
        self.dir.join(format!("{bytes:016x}.{lines:x}"))
    }

    /// Oldest first; none where there is no directory yet.
    pub fn all(&self) -> io::Result<Vec<Segment>> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let segment = |entry: std::fs::DirEntry| {
            let name = entry.file_name();
            let (bytes, lines) = name.to_str()?.split_once('.')?;
            let number = |text| u64::from_str_radix(text, 16).ok();
            Some(Segment { bytes: number(bytes)?, lines: number(lines)?, path: entry.path() })
        };
        let mut all: Vec<_> = entries.flatten().filter_map(segment).collect();
        all.sort();
        Ok(all)
    }

    /// Removes those that end before this place of the stream, but for the newest one, by which the numbers go on.
    pub fn remove_before(&self, bytes: u64) -> io::Result<()> {
        let all = self.all()?;
        let old = all.windows(2).filter(|pair| pair[1].bytes <= bytes);
        old.into_iter().try_for_each(|pair| std::fs::remove_file(&pair[0].path))
    }
}

/// Bytes and records of a segment.
pub fn measure(segment: &Path) -> io::Result<(u64, u64)> {
    let (mut file, mut part, mut total) = (File::open(segment)?, vec![0; 64 << 10], (0, 0));
    loop {
        let count = file.read(&mut part)?;
        if count == 0 {
            return Ok(total);
        }
        total.0 += count as u64;
        total.1 += part[..count].iter().filter(|byte| **byte == b'\n').count() as u64;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::Log;

    #[test]
    fn numbers_go_on_over_rotation_runs_and_agents() {
        let dir = tempfile::tempdir().unwrap();
        let segments = || Segments::of(dir.path(), "web", "a");
        let open =
            |run: u32| Log::open(dir.path().join(format!("logs/web/{run}.log")), 200, 3, Some(segments())).unwrap();
        let mut log = open(0);
        (0..9)
            .for_each(|n| log.record("stdout", format!("line {n} of a log that is rotated").as_bytes(), true).unwrap());
        // The next agent goes on in the same log, after the half of a record that the one before it left. Then come a run that says
        // nothing, one more, and the first run of one more agent.
        std::fs::OpenOptions::new()
            .append(true)
            .open(dir.path().join("logs/web/0.log"))
            .unwrap()
            .write_all(b"hal")
            .unwrap();
        open(0).record("stdout", b"again", true).unwrap();
        open(1);
        open(2).record("stderr", b"late", true).unwrap();
        let before = segments().all().unwrap();
        open(0).record("stderr", b"last", true).unwrap();
        let all = segments().all().unwrap();
        let kept = all.len() - 1;
        assert_eq!(all[..kept], before[before.len() - kept..]);
        let total: u64 = all.iter().map(|segment| std::fs::metadata(&segment.path).unwrap().len()).sum();
        assert!(before[0].bytes > 0 && total <= 600, "the oldest goes: {total}");
        for pair in all.windows(2) {
            let (bytes, lines) = measure(&pair[0].path).unwrap();
            assert_eq!(
                (pair[0].bytes + bytes, pair[0].lines + lines),
                (pair[1].bytes, pair[1].lines),
                "no gap: {all:?}"
            );
        }
        assert_eq!((all[kept].lines, measure(&all[kept].path).unwrap().1), (11, 1), "eleven before the last one");
    }

    #[test]
    fn short_runs_lose_nothing_and_long_ones_stay_within_their_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let segments = || Segments::of(dir.path(), "web", "a");
        let run = |run: u32, text: &[u8]| {
            let path = dir.path().join(format!("logs/{run}.log"));
            Log::open(path, 20_000, 3, Some(segments())).unwrap().record("stdout", text, true).unwrap();
        };
        (0..40).for_each(|number| run(number, b"crashed at once"));
        let all = segments().all().unwrap();
        assert_eq!((all.len(), all[0].bytes), (40, 0), "little of each run: nothing goes");
        (40..300).for_each(|number| run(number, b""));
        assert_eq!(segments().all().unwrap().len(), MAX_SEGMENTS);
        (300..310).for_each(|number| run(number, &[b'x'; 15_000]));
        let all = segments().all().unwrap();
        let total: u64 = all.iter().map(|segment| std::fs::metadata(&segment.path).unwrap().len()).sum();
        assert!((all.len(), total <= 60_000) == (3, true), "{total}: {all:?}");
    }

    #[test]
    fn a_gap_says_how_many_records_are_lost() {
        let dir = tempfile::tempdir().unwrap();
        let segments = Segments::of(dir.path(), "web", "a");
        let path = dir.path().join("log");
        let mut log = Log::open(path.clone(), 20_000, 3, Some(Segments::of(dir.path(), "web", "a"))).unwrap();
        log.lose(3).unwrap();
        log.record("1:0:/a", b"one", true).unwrap();
        log.lose(4).unwrap();
        let lines: Vec<u64> = segments.all().unwrap().iter().map(|segment| segment.lines).collect();
        assert_eq!(lines, [3, 8]);
        assert_eq!(log.position(), segments.all().unwrap()[1].bytes);
        drop(log);
        let log = Log::open(path, 20_000, 3, Some(Segments::of(dir.path(), "web", "a"))).unwrap();
        assert_eq!(log.position(), segments.all().unwrap()[1].bytes, "it stays where nothing was written since");
    }
}
