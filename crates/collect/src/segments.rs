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

impl Segments {
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Those of a container's source, below the directory of an instance.
    pub fn of(instance: &Path, container: &str, source: &str) -> Self {
        Self::at(instance.join(crate::DIRECTORY).join(container).join(source))
    }

    /// `log`, which is empty, is the next segment; of all of them the newest `kept` stay.
    pub(crate) fn begin(&self, log: &Path, kept: u32) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let mut all = self.all()?;
        let mut next = (0, 0);
        if let Some(newest) = all.pop() {
            let (bytes, lines) = measure(&newest.path)?;
            next = (newest.bytes + bytes, newest.lines + lines);
            match bytes {
                // A run without output: its number goes to this one.
                0 => std::fs::remove_file(&newest.path)?,
                _ => all.push(newest),
            }
        }
        std::fs::hard_link(log, self.path(next.0, next.1))?;
        let surplus = (all.len() + 1).saturating_sub(kept as usize);
        all.drain(..surplus).try_for_each(|old| std::fs::remove_file(old.path))
    }

    /// Whether this file is the newest one.
    pub(crate) fn ends_with(&self, file: &File) -> io::Result<bool> {
        let Some(newest) = self.all()?.pop() else { return Ok(false) };
        Ok(std::fs::metadata(newest.path)?.ino() == file.metadata()?.ino())
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
        assert_eq!((all.len(), &all[..2]), (3, &before[1..]), "the oldest goes");
        for pair in all.windows(2) {
            let (bytes, lines) = measure(&pair[0].path).unwrap();
            assert_eq!(
                (pair[0].bytes + bytes, pair[0].lines + lines),
                (pair[1].bytes, pair[1].lines),
                "no gap: {all:?}"
            );
        }
        assert_eq!((all[2].lines, measure(&all[2].path).unwrap().1), (11, 1), "eleven before the last one");
    }
}
