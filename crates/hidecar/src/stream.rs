//! What of a stream of segments is carried, and what is given up.

use std::fs::File;
use std::io;
use std::path::Path;

use joey_collect::{Position, Segments, measure, read};

/// Whether everything before `at` is all there is.
pub(crate) fn ends_at(dir: &Path, at: Position) -> io::Result<bool> {
    let Some(last) = Segments::at(dir).all()?.pop() else { return Ok(true) };
    let length = std::fs::metadata(&last.path)?.len();
    // A record that its writer never ended is none.
    Ok(last.bytes + length <= at.bytes || last.bytes <= at.bytes && read(dir, at)?.bytes.is_empty())
}

/// Bytes on the disk.
pub(crate) fn size(dir: &Path) -> io::Result<u64> {
    Segments::at(dir).all()?.iter().map(|segment| Ok(std::fs::metadata(&segment.path)?.len())).sum()
}

/// Gives up what the segments hold: what is left is where they ended, so that the next read tells how much is lost.
pub(crate) fn give_up(dir: &Path) -> io::Result<()> {
    let all = Segments::at(dir).all()?;
    let Some(newest) = all.last() else { return Ok(()) };
    let (bytes, lines) = measure(&newest.path)?;
    let last = Segments::at(dir).path(newest.bytes + bytes, newest.lines + lines);
    File::create(&last)?;
    all.iter().filter(|segment| segment.path != last).try_for_each(|segment| std::fs::remove_file(&segment.path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(bytes: u64, lines: u64) -> Position {
        Position { bytes, lines }
    }

    #[test]
    fn a_stream_is_read_over_its_segments_and_gaps_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let all = |at| {
            let (mut at, mut text, mut lost) = (at, String::new(), 0);
            loop {
                let part = read(dir, at).unwrap();
                lost += part.lost;
                at = part.begin;
                if part.bytes.is_empty() {
                    return (text, lost, at);
                }
                at.bytes += part.bytes.len() as u64;
                at.lines += part.bytes.iter().filter(|byte| **byte == b'\n').count() as u64;
                text.push_str(std::str::from_utf8(&part.bytes).unwrap());
            }
        };
        assert_eq!(all(position(0, 0)), (String::new(), 0, position(0, 0)), "nothing is there yet");
        let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
        write("0000000000000000.0", "a\nb\n");
        write("0000000000000004.2", "c\nhalf a reco");
        write("log", "the log itself is no segment\n");
        assert_eq!(all(position(0, 0)), ("a\nb\nc\n".to_owned(), 0, position(6, 3)));
        assert!(ends_at(dir, position(6, 3)).unwrap(), "half a record is none");
        write("0000000000000011.3", "d\n");
        assert_eq!(all(position(2, 1)), ("b\nc\nd\n".to_owned(), 0, position(0x13, 4)), "it was torn and never told");
        assert!(!ends_at(dir, position(6, 3)).unwrap());
        std::fs::remove_file(dir.join("0000000000000000.0")).unwrap();
        std::fs::remove_file(dir.join("0000000000000004.2")).unwrap();
        assert_eq!(all(position(2, 1)), ("d\n".to_owned(), 2, position(0x13, 4)));
        assert_eq!(size(dir).unwrap(), 2);
        give_up(dir).unwrap();
        assert_eq!(all(position(2, 1)), (String::new(), 3, position(0x13, 4)));
        assert!(ends_at(dir, position(0x13, 4)).unwrap() && !ends_at(dir, position(2, 1)).unwrap());
    }
}
