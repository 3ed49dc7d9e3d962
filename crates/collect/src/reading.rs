//! Reading a stream of segments by position.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::segments::Segments;

/// Bytes read at once; no record has as many.
pub const PART: usize = 64 << 10;

/// A place in a stream: the bytes and the records before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Position {
    pub bytes: u64,
    pub lines: u64,
}

/// What was read.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Where it begins; later than what was asked for where something is lost.
    pub begin: Position,
    /// Records that are not there any more.
    pub lost: u64,
    /// Whole records.
    pub bytes: Vec<u8>,
}

/// What follows a position.
pub fn read(dir: &Path, at: Position) -> io::Result<Part> {
    let segments = Segments::at(dir).all()?;
    let mut part = Part { begin: at, ..Part::default() };
    // Rotated away; what is read then begins with the oldest.
    let first = segments.partition_point(|segment| segment.bytes <= at.bytes).saturating_sub(1);
    for segment in &segments[first.min(segments.len())..] {
        if segment.bytes > part.begin.bytes {
            part.lost += segment.lines.saturating_sub(part.begin.lines);
            part.begin = Position { bytes: segment.bytes, lines: segment.lines };
        }
        let file = match File::open(&segment.path) {
            Ok(file) => file,
            // It was rotated away meanwhile: the next look tells.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Part { begin: at, ..Part::default() }),
            Err(error) => return Err(error),
        };
        let mut bytes = vec![0; PART];
        let count = file.read_at(&mut bytes, part.begin.bytes - segment.bytes)?;
        bytes.truncate(count);
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        bytes.truncate(whole);
        if whole > 0 {
            part.bytes = bytes;
            break;
        }
    }
    Ok(part)
}
