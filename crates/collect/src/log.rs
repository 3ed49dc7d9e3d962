//! A log in the CRI format (`TIME STREAM P|F TEXT`), in rotated parts: `PATH`, `PATH.1` …

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::segments::{Bound, MAX_SEGMENTS, Segments};

/// The longest text of one record, in bytes; longer lines become several `P` records.
pub const RECORD: usize = 16 << 10;

/// A log that is written.
pub struct Log {
    path: PathBuf,
    file: File,
    written: u64,
    max_bytes: u64,
    max_files: u32,
    segments: Option<Segments>,
    /// Where in the stream of segments this part begins.
    begin: u64,
    fault: Option<io::Error>,
}

impl Log {
    /// At most `max_files` parts of `max_bytes`; the one being written counts. What is written is kept as `segments` too, unless there
    /// is a [fault](Self::fault): then only those who read the log itself have it.
    pub fn open(path: PathBuf, max_bytes: u64, max_files: u32, segments: Option<Segments>) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        }
        let file = append(&path)?;
        let written = mend(&file)?;
        let max_files = max_files.max(2);
        let mut log = Self { path, file, written, max_bytes, max_files, segments, begin: 0, fault: None };
        if let Err(error) = log.join() {
            (log.segments, log.fault) = (None, Some(error));
        }
        Ok(log)
    }

    /// Why there are no segments although they were asked for; said once.
    pub fn fault(&mut self) -> Option<io::Error> {
        self.fault.take()
    }

    /// Makes the part being written the newest segment.
    fn join(&mut self) -> io::Result<()> {
        let Some(segments) = &self.segments else { return Ok(()) };
        if self.written == 0 {
            self.begin = segments.begin(&self.path, self.bound(), (0, 0))?;
            return Ok(());
        }
        match segments.ends_with(&self.file)? {
            Some(begin) => self.begin = begin,
            // An agent before this one wrote it, and went on elsewhere.
            None => self.rotate((0, 0))?,
        }
        Ok(())
    }

    /// Where in the stream of segments the next record begins.
    pub(crate) fn position(&self) -> u64 {
        self.begin + self.written
    }

    /// Leaves a gap in the stream, by which its reader knows that so many records are lost here.
    pub(crate) fn lose(&mut self, records: u64) -> io::Result<()> {
        self.rotate((1, records))
    }

    /// Writes one line, or with `full` false the beginning of one, of at most [`RECORD`] bytes.
    pub fn record(&mut self, stream: &str, text: &[u8], full: bool) -> io::Result<()> {
        let mut line = format!("{:.9} {stream} {} ", Timestamp::now(), if full { 'F' } else { 'P' }).into_bytes();
        line.extend_from_slice(text);
        line.push(b'\n');
        if self.max_bytes > 0 && self.written > 0 && self.written + line.len() as u64 > self.max_bytes {
            self.rotate((0, 0))?;
        }
        if let Err(error) = self.file.write_all(&line) {
            // No half of a record, so that the next one begins where one begins.
            let _ = self.file.set_len(self.written);
            return Err(error);
        }
        self.written += line.len() as u64;
        Ok(())
    }

    /// Goes on in a new part; what lies between is left out of the stream. Where it fails nothing has changed, and the next record tries
    /// again.
    fn rotate(&mut self, gap: (u64, u64)) -> io::Result<()> {
        let mut next = self.path.as_os_str().to_owned();
        next.push(".next");
        let next = PathBuf::from(next);
        let file = append(&next)?;
        let begin = match &self.segments {
            Some(segments) => segments.begin(&next, self.bound(), gap)?,
            None => 0,
        };
        // The file being written counts among them.
        let rotated = self.max_files - 1;
        let _ = std::fs::remove_file(Self::part(&self.path, rotated));
        for number in (0..rotated).rev() {
            let _ = std::fs::rename(Self::part(&self.path, number), Self::part(&self.path, number + 1));
        }
        std::fs::rename(&next, &self.path)?;
        (self.file, self.written, self.begin) = (file, 0, begin);
        Ok(())
    }

    /// What may be kept of the segments before the newest one: as much as the other parts may hold, in as many segments as runs made of
    /// it. Where a part has no bound, so many segments.
    fn bound(&self) -> Bound {
        let others = self.max_files - 1;
        match self.max_bytes {
            0 => Bound { bytes: u64::MAX, count: others as usize },
            bytes => Bound { bytes: bytes.saturating_mul(others.into()), count: MAX_SEGMENTS - 1 },
        }
    }

    /// The file of a log's part: 0 is the one being written, 1 the one before it.
    pub fn part(path: &Path, number: u32) -> PathBuf {
        let mut name = path.as_os_str().to_owned();
        if number > 0 {
            name.push(format!(".{number}"));
        }
        name.into()
    }
}

/// Cuts off the half of a record that one who was killed left; the length.
fn mend(file: &File) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let begin = length.saturating_sub(2 * RECORD as u64);
    let mut end = vec![0; (length - begin) as usize];
    file.read_exact_at(&mut end, begin)?;
    match end.iter().rposition(|byte| *byte == b'\n') {
        Some(at) if at + 1 < end.len() => {
            let whole = begin + at as u64 + 1;
            file.set_len(whole).map(|()| whole)
        }
        _ => Ok(length),
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn what_cannot_be_a_segment_is_said_and_no_record_goes_where_none_is() {
        let dir = tempfile::tempdir().unwrap();
        let (path, place) = (dir.path().join("logs/0.log"), dir.path().join("segments"));
        // A file in the place of the directory.
        std::fs::write(&place, "").unwrap();
        let open = || Log::open(path.clone(), 100, 3, Some(Segments::at(&place))).unwrap();
        let mut log = open();
        assert!(log.fault().is_some() && log.fault().is_none());
        log.record("stdout", b"shown all the same", true).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("shown all the same\n"));

        std::fs::remove_file(&path).unwrap();
        std::fs::remove_file(&place).unwrap();
        let mut log = open();
        assert!(log.fault().is_none());
        log.record("stdout", &[b'a'; 50], true).unwrap();
        std::fs::rename(&place, dir.path().join("away")).unwrap();
        std::fs::write(&place, "").unwrap();
        for _ in 0..3 {
            assert!(log.record("stdout", &[b'b'; 50], true).is_err());
        }
        assert!(!Log::part(&path, 1).exists(), "it is as it was");
        std::fs::remove_file(&place).unwrap();
        std::fs::rename(dir.path().join("away"), &place).unwrap();
        log.record("stdout", &[b'c'; 50], true).unwrap();
        let all = Segments::at(&place).all().unwrap();
        let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
        assert_eq!(all.len(), 2);
        assert_eq!((inode(&all[0].path), inode(&all[1].path)), (inode(&Log::part(&path, 1)), inode(&path)));
        let length = |path: &Path| std::fs::metadata(path).unwrap().len();
        assert_eq!(log.position(), length(&path) + length(&Log::part(&path, 1)));
    }
}
