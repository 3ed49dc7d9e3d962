//! Reading a run's log: all parts in order, from a line or time on, and on as it grows.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use bytes::Bytes;
use jiff::Timestamp;
use joey_api::instance::LogOptions;
use tokio::sync::{mpsc, watch};

use crate::log_write;
use crate::output::LOG_ENDED;

/// Which run's log, and how to learn that it grew or ended.
pub struct Source {
    pub dir: PathBuf,
    pub container: String,
    pub run: u32,
    /// Changes with every write; closed or [`LOG_ENDED`] when the run has ended.
    pub grown: watch::Receiver<u64>,
}

/// The largest chunk sent at once, in bytes.
const CHUNK: usize = 32 << 10;

struct Reader {
    options: LogOptions,
    skip: u64,
    out: Vec<u8>,
    left: u64,
    line_start: bool,
    to: mpsc::Sender<io::Result<Bytes>>,
}

/// Sends the log to `to` until it ends or nobody listens.
pub async fn read(mut source: Source, options: LogOptions, to: mpsc::Sender<io::Result<Bytes>>) {
    let left = options.limit_bytes.unwrap_or(u64::MAX);
    let skip = options.tail.map_or(0, |tail| lines(&source, &options).saturating_sub(tail));
    let mut reader = Reader { options, skip, out: Vec::new(), left, line_start: true, to };
    let Some(mut files) = opened(&mut source, &reader).await else { return };
    while let Some((mut file, inode)) = files.pop_front() {
        loop {
            // Looked at before reading: what is written after the look, and an end after it, make it change once more.
            let ended = *source.grown.borrow_and_update() == LOG_ENDED;
            if !reader.drain(&mut file).await {
                return;
            }
            if !files.is_empty() {
                break;
            }
            if let Some(next) = after(&source, inode) {
                files = next;
                // What was written between the last read and the rotation.
                if !reader.drain(&mut file).await {
                    return;
                }
                break;
            }
            if !reader.options.follow || ended || !grows(&mut source, &reader).await {
                return;
            }
        }
    }
}

/// The parts of the log; a follower waits until there are some. `None`: there never will be, or nobody listens.
async fn opened(source: &mut Source, reader: &Reader) -> Option<VecDeque<(BufReader<File>, u64)>> {
    loop {
        let ended = *source.grown.borrow_and_update() == LOG_ENDED;
        let files = open_all(source);
        if !files.is_empty() {
            return Some(files);
        }
        if !reader.options.follow || ended || !grows(source, reader).await {
            return None;
        }
    }
}

/// Waits for more to read; false: nobody listens any more.
async fn grows(source: &mut Source, reader: &Reader) -> bool {
    tokio::select! {
        changed = source.grown.changed() => changed.is_ok(),
        () = reader.to.closed() => false,
    }
}

impl Reader {
    /// Sends every whole record of the file; false when there is nothing more to do for anybody.
    async fn drain(&mut self, file: &mut BufReader<File>) -> bool {
        let mut record = Vec::new();
        loop {
            record.clear();
            // Records are written by one call each, so a record read is whole; its length is bounded by the writer.
            let more = matches!(file.read_until(b'\n', &mut record), Ok(count) if count > 0);
            if more && let Some(parsed) = Record::parse(&record) {
                self.take(&parsed);
            }
            if (!more || self.left == 0 || self.out.len() >= CHUNK) && !self.out.is_empty() {
                let bytes = Bytes::from(std::mem::take(&mut self.out));
                if self.to.send(Ok(bytes)).await.is_err() {
                    return false;
                }
            }
            if self.left == 0 {
                return false;
            }
            if !more {
                return true;
            }
        }
    }

    fn take(&mut self, record: &Record<'_>) {
        if !record.wanted(&self.options) {
            return;
        }
        if self.skip > 0 {
            self.skip -= u64::from(record.full);
            return;
        }
        let begin = self.out.len();
        if self.options.timestamps && self.line_start {
            self.out.extend_from_slice(record.time.as_bytes());
            self.out.push(b' ');
        }
        self.out.extend_from_slice(record.text);
        if record.full {
            self.out.push(b'\n');
        }
        self.line_start = record.full;
        let fits = usize::try_from(self.left).unwrap_or(usize::MAX).min(self.out.len() - begin);
        self.out.truncate(begin + fits);
        self.left -= fits as u64;
    }
}

struct Record<'a> {
    time: &'a str,
    full: bool,
    text: &'a [u8],
}

impl<'a> Record<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut parts = line.strip_suffix(b"\n")?.splitn(4, |&byte| byte == b' ');
        let time = std::str::from_utf8(parts.next()?).ok()?;
        parts.next()?;
        let full = parts.next()? == b"F";
        Some(Self { time, full, text: parts.next()? })
    }

    fn wanted(&self, options: &LogOptions) -> bool {
        options.since.is_none_or(|since| self.time.parse::<Timestamp>().is_ok_and(|time| time >= since))
    }
}

fn lines(source: &Source, options: &LogOptions) -> u64 {
    let mut count = 0;
    let mut open = false;
    for (mut file, _) in open_all(source) {
        let mut record = Vec::new();
        while matches!(file.read_until(b'\n', &mut record), Ok(read) if read > 0) {
            if let Some(parsed) = Record::parse(&record).filter(|parsed| parsed.wanted(options)) {
                count += u64::from(parsed.full);
                open = !parsed.full;
            }
            record.clear();
        }
    }
    count + u64::from(open)
}

/// The end of the present part of a run's log: at most so many lines and bytes.
pub fn end(dir: &std::path::Path, container: &str, run: u32, lines: usize, bytes: usize) -> Vec<u8> {
    let Ok(whole) = std::fs::read(log_write::path(dir, container, run, 0)) else { return Vec::new() };
    let mut texts = VecDeque::new();
    for record in whole.split_inclusive(|&byte| byte == b'\n').filter_map(Record::parse) {
        texts.push_back([record.text, if record.full { &b"\n"[..] } else { &[] }].concat());
        if texts.len() > lines {
            texts.pop_front();
        }
    }
    let mut kept = texts.into_iter().flatten().collect::<Vec<u8>>();
    kept.drain(..kept.len().saturating_sub(bytes));
    kept
}

/// All parts, oldest first.
fn open_all(source: &Source) -> VecDeque<(BufReader<File>, u64)> {
    let mut files = VecDeque::new();
    for part in 0..1000 {
        let Ok(file) = File::open(log_write::path(&source.dir, &source.container, source.run, part)) else { break };
        let inode = file.metadata().map_or(0, |meta| meta.ino());
        files.push_front((BufReader::new(file), inode));
    }
    files
}

/// The parts newer than the one with this inode, when there are any. One that was rotated away for good is followed by all
/// that are left: what is between is lost to a reader this slow.
fn after(source: &Source, inode: u64) -> Option<VecDeque<(BufReader<File>, u64)>> {
    let mut all = open_all(source);
    if let Some(at) = all.iter().position(|(_, own)| *own == inode) {
        all.drain(..=at);
    }
    (!all.is_empty()).then_some(all)
}
