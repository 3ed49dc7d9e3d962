//! How far the files of a source were read, noted beside its log after each look: for the host, which goes on where an agent that was
//! killed stopped, also where the records themselves are not kept any more.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use crate::segments::Segment;

/// The device of files on the disk of the instance itself: from outside they have another one than by the overlays within.
pub(crate) const OWN: u64 = 0;
/// The device of files of which only records tell.
pub(crate) const ANY: u64 = u64::MAX;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Positions {
    /// Records before this place of the stream are counted in.
    pub(crate) at: u64,
    /// By device and inode.
    pub(crate) files: BTreeMap<(u64, u64), u64>,
}

impl Positions {
    /// What was noted at `path`, and what records tell that were written afterwards. Without a note all of them count.
    pub(crate) fn read(path: &Path, segments: &[Segment]) -> io::Result<Self> {
        let noted = std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let (at, list): (u64, Vec<(u64, u64, u64)>) = noted.unwrap_or_default();
        let mut files: BTreeMap<_, _> = list.into_iter().map(|(device, inode, read)| ((device, inode), read)).collect();
        for segment in segments {
            if segment.bytes + std::fs::metadata(&segment.path)?.len() <= at {
                continue;
            }
            let mut next = segment.bytes;
            for line in std::fs::read(&segment.path)?.split_inclusive(|byte| *byte == b'\n') {
                let begin = next;
                next += line.len() as u64;
                if let Some((inode, read)) = end_of(line).filter(|_| begin >= at) {
                    files.insert((ANY, inode), read);
                }
            }
        }
        Ok(Self { at, files })
    }

    /// How far this file was read.
    pub(crate) fn of(&self, device: u64, inode: u64) -> u64 {
        let told = self.files.get(&(ANY, inode));
        told.or_else(|| self.files.get(&(device, inode))).copied().unwrap_or(0)
    }

    /// Replaces the note. After a loss of power it may be an older one, which repeats records and loses none.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let list: Vec<_> = self.files.iter().map(|((device, inode), read)| (*device, *inode, *read)).collect();
        let new = path.with_extension("new");
        std::fs::write(&new, serde_json::to_vec(&(self.at, list))?)?;
        std::fs::rename(new, path)
    }
}

/// The inode that a record is of, and where in the file it ends.
fn end_of(line: &[u8]) -> Option<(u64, u64)> {
    let mut words = line.strip_suffix(b"\n")?.splitn(4, |byte| *byte == b' ').skip(1);
    let (word, flag, text) = (words.next()?, words.next()?, words.next()?);
    let mut numbers = word.split(|byte| *byte == b':').map(|part| std::str::from_utf8(part).ok()?.parse::<u64>().ok());
    let (inode, offset) = (numbers.next()??, numbers.next()??);
    Some((inode, offset + text.len() as u64 + u64::from(flag == b"F")))
}
