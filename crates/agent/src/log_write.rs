//! A run's log in the CRI format (`TIME stdout|stderr P|F text`), with rotation. Reading is in `log_read`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;

/// The longest text of one record, in bytes; longer lines become several `P` records.
const RECORD: usize = 16 << 10;

/// The file of a run, and of its rotated parts: 0 is the one being written, 1 the one before it.
pub fn path(dir: &Path, container: &str, run: u32, part: u32) -> PathBuf {
    let name = if part == 0 { format!("{run}.log") } else { format!("{run}.log.{part}") };
    dir.join("logs").join(container).join(name)
}

/// Removes the log of a run with all its parts.
pub fn remove(dir: &Path, container: &str, run: u32) {
    let _ = (0..).try_for_each(|part| std::fs::remove_file(path(dir, container, run, part)));
}

pub struct LogWriter {
    dir: PathBuf,
    container: String,
    run: u32,
    file: File,
    written: u64,
    max_bytes: u64,
    max_files: u32,
}

impl LogWriter {
    pub fn open(dir: &Path, container: &str, run: u32, max_bytes: u64, max_files: u32) -> io::Result<Self> {
        let place = path(dir, container, run, 0);
        if let Some(parent) = place.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        }
        let file = append(&place)?;
        let written = file.metadata()?.len();
        let (dir, container) = (dir.to_owned(), container.to_owned());
        Ok(Self { dir, container, run, file, written, max_bytes, max_files })
    }

    fn record(&mut self, stream: &str, text: &[u8], full: bool) -> io::Result<()> {
        let mut line = format!("{:.9} {stream} {} ", Timestamp::now(), if full { 'F' } else { 'P' }).into_bytes();
        line.extend_from_slice(text);
        line.push(b'\n');
        if self.max_bytes > 0 && self.written > 0 && self.written + line.len() as u64 > self.max_bytes {
            self.rotate()?;
        }
        self.written += line.len() as u64;
        self.file.write_all(&line)
    }

    fn rotate(&mut self) -> io::Result<()> {
        let part = |number| path(&self.dir, &self.container, self.run, number);
        // The file being written counts among them.
        let rotated = self.max_files.max(2) - 1;
        let _ = std::fs::remove_file(part(rotated));
        for number in (0..rotated).rev() {
            let _ = std::fs::rename(part(number), part(number + 1));
        }
        self.file = append(&part(0))?;
        self.written = 0;
        Ok(())
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// One stream's unfinished line.
pub struct LineSplitter {
    open: Vec<u8>,
    /// What each line begins with.
    mark: &'static str,
    /// The line has begun.
    within: bool,
}

impl LineSplitter {
    /// Each line begins with `mark`.
    pub fn marked(mark: &'static str) -> Self {
        Self { open: Vec::new(), mark, within: false }
    }

    /// Writes what is complete and keeps the rest, at most a record of it.
    pub fn push(&mut self, log: &mut LogWriter, stream: &str, mut bytes: &[u8]) -> io::Result<()> {
        while let Some(at) = bytes.iter().position(|&byte| byte == b'\n') {
            self.fill(log, stream, &bytes[..at])?;
            log.record(stream, &self.open, true)?;
            self.open.clear();
            self.within = false;
            bytes = &bytes[at + 1..];
        }
        if bytes.is_empty() { Ok(()) } else { self.fill(log, stream, bytes) }
    }

    /// The stream ended: what is left is a line without an end, but for what others write behind it.
    pub fn finish(&mut self, log: &mut LogWriter, stream: &str) -> io::Result<()> {
        let full = !self.mark.is_empty();
        if self.open.is_empty() { Ok(()) } else { log.record(stream, &std::mem::take(&mut self.open), full) }
    }

    fn fill(&mut self, log: &mut LogWriter, stream: &str, bytes: &[u8]) -> io::Result<()> {
        if !std::mem::replace(&mut self.within, true) {
            self.open.extend_from_slice(self.mark.as_bytes());
        }
        for piece in bytes.chunks(RECORD) {
            if self.open.len() + piece.len() > RECORD {
                log.record(stream, &self.open, false)?;
                self.open.clear();
            }
            self.open.extend_from_slice(piece);
        }
        Ok(())
    }
}
