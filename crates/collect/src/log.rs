//! A log in the CRI format (`TIME STREAM P|F TEXT`), in rotated parts: `PATH`, `PATH.1` …

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::segments::Segments;

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
}

impl Log {
    /// At most `max_files` parts of `max_bytes`; the one being written counts. What is written is kept as `segments` too.
    pub fn open(path: PathBuf, max_bytes: u64, max_files: u32, segments: Option<Segments>) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        }
        let file = append(&path)?;
        let written = mend(&file)?;
        let mut log = Self { path, file, written, max_bytes, max_files: max_files.max(2), segments };
        match (log.written, &log.segments) {
            (0, Some(segments)) => segments.begin(&log.path, log.max_files)?,
            // An agent before this one wrote it, and went on elsewhere.
            (_, Some(segments)) if !segments.ends_with(&log.file)? => log.rotate()?,
            _ => {}
        }
        Ok(log)
    }

    /// Writes one line, or with `full` false the beginning of one, of at most [`RECORD`] bytes.
    pub fn record(&mut self, stream: &str, text: &[u8], full: bool) -> io::Result<()> {
        let mut line = format!("{:.9} {stream} {} ", Timestamp::now(), if full { 'F' } else { 'P' }).into_bytes();
        line.extend_from_slice(text);
        line.push(b'\n');
        if self.max_bytes > 0 && self.written > 0 && self.written + line.len() as u64 > self.max_bytes {
            self.rotate()?;
        }
        if let Err(error) = self.file.write_all(&line) {
            // No half of a record, so that the next one begins where one begins.
            let _ = self.file.set_len(self.written);
            return Err(error);
        }
        self.written += line.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        // The file being written counts among them.
        let rotated = self.max_files - 1;
        let _ = std::fs::remove_file(Self::part(&self.path, rotated));
        for number in (0..rotated).rev() {
            let _ = std::fs::rename(Self::part(&self.path, number), Self::part(&self.path, number + 1));
        }
        self.file = append(&self.path)?;
        self.written = 0;
        self.segments.as_ref().map_or(Ok(()), |segments| segments.begin(&self.path, self.max_files))
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
