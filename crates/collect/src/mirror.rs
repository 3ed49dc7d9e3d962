//! Segments that lie elsewhere, had here: a stream of records that somebody else numbers, appended to segments of this host, from which
//! they are carried like those of any other. Where the stream goes on is what the segments themselves say, so whoever is killed
//! meanwhile neither loses a record nor has one twice.
//!
//! Who tells the records may be hostile: what is no record, or not in its place, is refused.

use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;

use jiff::Timestamp;

use crate::reading::Position;
use crate::segments::{MAX_SEGMENTS, Segment, Segments, measure};

/// Bytes of a segment, after which the next one begins.
const SEGMENT: u64 = 1 << 20;
/// The longest record: a text, the name of its file with every byte escaped, and the time.
const LONGEST: usize = 48 << 10;
/// No stream comes to as many bytes or records.
const END: u64 = 1 << 60;

/// What was told is no part of a stream of records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused(pub &'static str);

/// The segments of one stream.
pub struct Mirror {
    segments: Segments,
    /// Bytes that are kept, in full segments.
    most: u64,
    newest: Option<(File, u64)>,
    end: Position,
}

impl Mirror {
    /// Goes on with the segments in `dir`, of which at most so many bytes are kept. The half of a record that somebody who was killed
    /// left is taken away.
    pub fn open(dir: PathBuf, most: u64) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let segments = Segments::at(dir);
        let mut mirror = Self { segments, most, newest: None, end: Position::default() };
        if let Some(Segment { bytes, lines, path }) = mirror.segments.all()?.pop() {
            let all = std::fs::read(&path)?;
            let whole = all.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at as u64 + 1);
            let file = File::options().append(true).open(&path)?;
            file.set_len(whole)?;
            mirror.end = Position { bytes: bytes + whole, lines: lines + measure(&path)?.1 };
            mirror.newest = Some((file, whole));
        }
        Ok(mirror)
    }

    /// What comes next.
    pub fn end(&self) -> Position {
        self.end
    }

    /// Appends whole records that begin here; what lies before `begin` and was not there to be appended is lost.
    pub fn append(&mut self, begin: Position, records: &[u8]) -> io::Result<Result<(), Refused>> {
        let lines = match check(self.end, begin, records) {
            Ok(lines) => lines,
            Err(refused) => return Ok(Err(refused)),
        };
        let full = self.newest.as_ref().is_none_or(|(_, length)| *length >= SEGMENT);
        if full || begin != self.end {
            self.next(begin)?;
        }
        let Some((file, length)) = &mut self.newest else { return Err(io::ErrorKind::NotFound.into()) };
        if let Err(error) = file.write_all(records) {
            // It comes again.
            file.set_len(*length)?;
            return Err(error);
        }
        *length += records.len() as u64;
        self.end = Position { bytes: begin.bytes + records.len() as u64, lines: begin.lines + lines };
        Ok(Ok(()))
    }

    /// Begins a segment, and lets go of the oldest ones.
    fn next(&mut self, begin: Position) -> io::Result<()> {
        let place = self.segments.path(begin.bytes, begin.lines);
        let file = File::options().append(true).create(true).mode(0o600).open(place)?;
        file.set_len(0)?;
        (self.newest, self.end) = (Some((file, 0)), begin);
        let all = self.segments.all()?;
        let old = &all[..all.len().saturating_sub(1)];
        let sizes = old.iter().map(|old| Ok(std::fs::metadata(&old.path)?.len())).collect::<io::Result<Vec<u64>>>()?;
        let (mut total, mut count) = (sizes.iter().sum::<u64>(), old.len());
        for (old, size) in old.iter().zip(sizes) {
            if total <= self.most && count < MAX_SEGMENTS {
                break;
            }
            std::fs::remove_file(&old.path)?;
            (total, count) = (total - size, count - 1);
        }
        Ok(())
    }
}

/// How many records these are.
fn check(end: Position, begin: Position, records: &[u8]) -> Result<u64, Refused> {
    if begin.bytes < end.bytes || begin.lines < end.lines || begin.bytes == end.bytes && begin.lines != end.lines {
        return Err(Refused("they are not behind what was told before"));
    }
    if begin.bytes > END || begin.lines > END {
        return Err(Refused("their place is beyond any stream"));
    }
    let mut lines = 0;
    for line in records.split_inclusive(|byte| *byte == b'\n') {
        if !is_record(line) {
            return Err(Refused("they are no records"));
        }
        lines += 1;
    }
    Ok(lines)
}

/// `TIME STREAM P|F TEXT`, as [`crate::Log`] writes it.
fn is_record(line: &[u8]) -> bool {
    let Some(record) = line.strip_suffix(b"\n").filter(|record| record.len() < LONGEST) else { return false };
    let mut words = record.splitn(4, |byte| *byte == b' ');
    let time = words.next().and_then(|time| std::str::from_utf8(time).ok());
    let timed = time.is_some_and(|time| time.len() <= 40 && time.parse::<Timestamp>().is_ok());
    let (stream, flag, text) = (words.next(), words.next(), words.next());
    timed && stream.is_some_and(|word| !word.is_empty()) && matches!(flag, Some(b"P" | b"F")) && text.is_some()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{Log, read};

    fn record(text: &str) -> Vec<u8> {
        format!("2026-11-21T09:00:00.000000001Z stdout F {text}\n").into_bytes()
    }

    /// Everything of a stream, as who carries it reads it, and how much of it is lost.
    fn all(dir: &Path) -> (String, u64) {
        let (mut at, mut text, mut lost) = (Position::default(), String::new(), 0);
        loop {
            let part = read(dir, at).unwrap();
            (at, lost) = (part.begin, lost + part.lost);
            if part.bytes.is_empty() {
                return (text, lost);
            }
            at.bytes += part.bytes.len() as u64;
            at.lines += part.bytes.iter().filter(|byte| **byte == b'\n').count() as u64;
            text.push_str(std::str::from_utf8(&part.bytes).unwrap());
        }
    }

    #[test]
    fn what_is_fetched_is_there_once_whoever_is_killed() {
        let (there, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let segments = Segments::at(there.path());
        let mut log = Log::open(there.path().join("log"), 300, 3, Some(Segments::at(there.path()))).unwrap();
        for number in 0..200 {
            log.record("stdout", format!("line {number}").as_bytes(), true).unwrap();
            if number % 3 > 0 {
                continue;
            }
            // Opened anew each time, as one that was killed; now and then in the middle of a record.
            let mut mirror = Mirror::open(here.path().to_owned(), u64::MAX).unwrap();
            let part = read(there.path(), mirror.end()).unwrap();
            mirror.append(part.begin, &part.bytes).unwrap().unwrap();
            segments.remove_before(mirror.end().bytes).unwrap();
            if number % 2 == 0 {
                let newest = Segments::at(here.path()).all().unwrap().pop().unwrap();
                File::options().append(true).open(newest.path).unwrap().write_all(b"2026-11-21T0").unwrap();
            }
        }
        let (text, lost) = all(here.path());
        let seen: Vec<&str> = text.lines().map(|line| line.rsplit_once("line ").unwrap().1).collect();
        // The last one that was fetched is the 199th; a read ends with its segment.
        let wanted: Vec<String> = (0..seen.len()).map(|number| number.to_string()).collect();
        assert!(lost == 0 && seen.len() > 180 && seen == wanted, "{lost} {}", seen.len());
        assert!(segments.all().unwrap().len() <= 3);
    }

    #[test]
    fn it_is_bounded_and_what_goes_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let mut mirror = Mirror::open(dir.path().to_owned(), 2 * SEGMENT).unwrap();
        let line = record(&"x".repeat(10_000));
        for _ in 0..800 {
            mirror.append(mirror.end(), &line).unwrap().unwrap();
        }
        let kept: u64 =
            Segments::at(dir.path()).all().unwrap().iter().map(|it| it.path.metadata().unwrap().len()).sum();
        assert!(kept <= 4 * SEGMENT, "{kept}");
        let end = mirror.end();
        mirror.append(Position { bytes: end.bytes + 9, lines: end.lines + 5 }, &record("late")).unwrap().unwrap();
        let (text, lost) = all(dir.path());
        assert_eq!(text.lines().count() as u64 + lost, 806, "with five that were lost elsewhere");
        assert_eq!(Mirror::open(dir.path().to_owned(), 0).unwrap().end(), mirror.end());
    }

    #[test]
    fn what_is_no_stream_of_records_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut mirror = Mirror::open(dir.path().to_owned(), SEGMENT).unwrap();
        mirror.append(Position::default(), &record("one")).unwrap().unwrap();
        let end = mirror.end();
        let position = |bytes, lines| Position { bytes, lines };
        for begin in
            [position(0, 0), position(end.bytes, 0), position(end.bytes, end.lines + 1), position(u64::MAX, u64::MAX)]
        {
            assert!(mirror.append(begin, &record("two")).unwrap().is_err(), "{begin:?}");
        }
        let long = record(&"x".repeat(LONGEST));
        let torn = record("torn");
        for wrong in
            [b"\n".as_slice(), b"a line\n", b"2026-11-21T09:00:00Z stdout X a\n", &long, &torn[..torn.len() - 1]]
        {
            assert!(mirror.append(end, wrong).unwrap().is_err());
        }
        assert_eq!(mirror.end(), end);
        assert_eq!(all(dir.path()), (String::from_utf8(record("one")).unwrap(), 0));
    }
}
