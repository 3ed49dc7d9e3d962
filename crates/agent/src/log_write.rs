//! A run's log: where it is, and streams cut into its records. Reading is in `log_read`.

use std::io;
use std::path::{Path, PathBuf};

use joey_collect::{Log, RECORD};

/// The file of a run, and of its rotated parts: 0 is the one being written, 1 the one before it.
pub fn path(dir: &Path, container: &str, run: u32, part: u32) -> PathBuf {
    Log::part(&dir.join("logs").join(container).join(format!("{run}.log")), part)
}

/// Removes the log of a run with all its parts.
pub fn remove(dir: &Path, container: &str, run: u32) {
    let _ = (0..).try_for_each(|part| std::fs::remove_file(path(dir, container, run, part)));
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
    pub fn push(&mut self, log: &mut Log, stream: &str, mut bytes: &[u8]) -> io::Result<()> {
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
    pub fn finish(&mut self, log: &mut Log, stream: &str) -> io::Result<()> {
        let full = !self.mark.is_empty();
        if self.open.is_empty() { Ok(()) } else { log.record(stream, &std::mem::take(&mut self.open), full) }
    }

    fn fill(&mut self, log: &mut Log, stream: &str, bytes: &[u8]) -> io::Result<()> {
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
