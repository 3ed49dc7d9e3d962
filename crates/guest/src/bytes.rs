//! Bytes that are read at places: of a file, of a part of one, or in memory.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

/// An error of data that is not what it should be.
pub(crate) fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

pub(crate) trait Bytes {
    /// Fills `buffer` from `offset` on; less than that is an error.
    fn fill(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// So many bytes from `offset` on, of which there may be `limit`.
    fn table(&self, offset: u64, length: u64, limit: u64) -> io::Result<Vec<u8>> {
        if length > limit {
            return Err(bad(format!("a table in it has {length} bytes")));
        }
        let mut buffer = vec![0; length as usize];
        self.fill(offset, &mut buffer)?;
        Ok(buffer)
    }
}

fn ends_early() -> io::Error {
    bad("it ends before something it names")
}

impl Bytes for Vec<u8> {
    fn fill(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| ends_early())?;
        let end = start.checked_add(buffer.len()).ok_or_else(ends_early)?;
        buffer.copy_from_slice(self.get(start..end).ok_or_else(ends_early)?);
        Ok(())
    }
}

/// A part of a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece<'a> {
    file: &'a File,
    start: u64,
    length: u64,
}

impl<'a> Piece<'a> {
    pub(crate) fn whole(file: &'a File) -> io::Result<Self> {
        Ok(Self { file, start: 0, length: file.metadata()?.len() })
    }

    pub(crate) fn len(&self) -> u64 {
        self.length
    }

    /// A part of this part.
    pub(crate) fn part(&self, offset: u64, length: u64) -> io::Result<Self> {
        let fits = offset.checked_add(length).is_some_and(|end| end <= self.length);
        if fits { Ok(Self { file: self.file, start: self.start + offset, length }) } else { Err(ends_early()) }
    }
}

impl Bytes for Piece<'_> {
    fn fill(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let part = self.part(offset, buffer.len() as u64)?;
        part.file.read_exact_at(buffer, part.start)
    }
}

/// Reads it from its beginning on.
impl Read for Piece<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = self.length.min(buffer.len() as u64) as usize;
        let count = self.file.read_at(&mut buffer[..wanted], self.start)?;
        self.start += count as u64;
        self.length -= count as u64;
        Ok(count)
    }
}

/// Little-endian fields of a header that was read whole.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |field| u16::from_le_bytes([field[0], field[1]]))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_piece_is_no_more_than_its_part() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let piece = Piece::whole(&file).unwrap().part(2, 5).unwrap();
        let mut text = String::new();
        piece.clone().read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), piece.len()), ("23456", 5));
        assert_eq!(piece.part(1, 2).unwrap().table(0, 2, 9).unwrap(), b"34");
        assert!(piece.table(4, 2, 9).is_err() && piece.part(u64::MAX, 2).is_err() && piece.table(0, 5, 4).is_err());
    }

    #[test]
    fn memory_is_read_within_its_bounds() {
        let bytes = b"0123".to_vec();
        assert_eq!(bytes.table(1, 3, 9).unwrap(), b"123");
        assert!(bytes.table(2, 3, 9).is_err() && bytes.table(u64::MAX, 1, 9).is_err());
    }

    #[test]
    fn fields_are_little_endian() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!((u16_at(&bytes, 1), u32_at(&bytes, 0)), (0x0302, 0x0403_0201));
        assert_eq!(u64_at(&bytes, 0), 0x0807_0605_0403_0201);
    }
}
