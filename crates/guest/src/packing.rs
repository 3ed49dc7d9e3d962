//! What packages, kernels and modules are compressed with, told by their first bytes, and unpacked with bounded memory.

use std::io::{self, BufReader, Cursor, Read};

use crate::bytes::bad;

/// Memory of an xz or zstd decoder, with which the longest windows in use (128 MiB, those of kernels) can be unpacked.
const XZ_MEMORY_KIB: u32 = 192 << 10;
const ZSTD_WINDOW_LOG: u32 = 27;
/// lz4's legacy format: blocks that unpack to so much at most, and what such a block takes if it cannot be compressed.
const LZ4_BLOCK: usize = 8 << 20;
const LZ4_PACKED: usize = LZ4_BLOCK + LZ4_BLOCK / 255 + 16;
const LZ4_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Xz,
    Zstd,
    /// The legacy frames, which is what kernels have.
    Lz4,
}

impl Packing {
    /// As many first bytes as [`Packing::of`] needs.
    const MAGIC: u64 = 6;

    /// How something with these first bytes is packed.
    pub(crate) fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [first, second, third, fourth, ..] if [*first, *second, *third, *fourth] == LZ4_MAGIC => Self::Lz4,
            _ => Self::Plain,
        }
    }
}

/// What `packed` unpacks to; itself, if it is not packed.
pub(crate) fn unpacked<'a>(mut packed: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut start = Vec::new();
    packed.by_ref().take(Packing::MAGIC).read_to_end(&mut start)?;
    let packing = Packing::of(&start);
    let all = BufReader::with_capacity(64 << 10, Cursor::new(start).chain(packed));
    Ok(match packing {
        Packing::Plain => Box::new(all),
        Packing::Gzip => Box::new(flate2::bufread::GzDecoder::new(all)),
        Packing::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(all, true, XZ_MEMORY_KIB)),
        Packing::Zstd => {
            let mut decoder = zstd::Decoder::with_buffer(all)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
        Packing::Lz4 => Box::new(Lz4 { input: all, block: Vec::new(), read: 0, at_end: false }),
    })
}

/// All of `input`, of which there may be `limit` bytes.
pub(crate) fn read_all(input: impl Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit { Err(bad(format!("it has more than {limit} bytes"))) } else { Ok(bytes) }
}

struct Lz4<R> {
    input: R,
    block: Vec<u8>,
    read: usize,
    at_end: bool,
}

impl<R: Read> Lz4<R> {
    /// Unpacks the next block; `false` at the end. A length of zero ends it too, and a magic number begins another frame.
    fn next(&mut self) -> io::Result<bool> {
        let mut length = Vec::new();
        loop {
            length.clear();
            self.input.by_ref().take(4).read_to_end(&mut length)?;
            match <[u8; 4]>::try_from(length.as_slice()) {
                Ok(LZ4_MAGIC) => {}
                Ok([0, 0, 0, 0]) => return Ok(false),
                Ok(length) => return self.unpack(u32::from_le_bytes(length) as usize).map(|()| true),
                Err(_) if length.is_empty() => return Ok(false),
                Err(_) => return Err(bad("its last block is cut off")),
            }
        }
    }

    fn unpack(&mut self, length: usize) -> io::Result<()> {
        if length > LZ4_PACKED {
            return Err(bad(format!("a block has {length} bytes")));
        }
        let packed = read_all(self.input.by_ref().take(length as u64), LZ4_PACKED as u64)?;
        if packed.len() < length {
            return Err(bad("its last block is cut off"));
        }
        self.block.resize(LZ4_BLOCK, 0);
        let count = lz4_flex::block::decompress_into(&packed, &mut self.block)
            .map_err(|error| bad(format!("a block is broken: {error}")))?;
        self.block.truncate(count);
        self.read = 0;
        Ok(())
    }
}

impl<R: Read> Read for Lz4<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.read == self.block.len() {
            if self.at_end || !self.next()? {
                self.at_end = true;
                return Ok(0);
            }
        }
        let count = (&self.block[self.read..]).read(buffer)?;
        self.read += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{mutations, pack};

    const ALL: [Packing; 5] = [Packing::Plain, Packing::Gzip, Packing::Xz, Packing::Zstd, Packing::Lz4];

    fn text() -> Vec<u8> {
        (0..200_000u32).flat_map(|number| number.to_le_bytes()).collect()
    }

    #[test]
    fn what_was_packed_comes_out() {
        for packing in ALL {
            let packed = pack(&text(), packing);
            assert_eq!(Packing::of(&packed), packing);
            assert!(read_all(unpacked(packed.as_slice()).unwrap(), 1 << 20).unwrap() == text(), "{packing:?}");
            assert!(read_all(unpacked(packed.as_slice()).unwrap(), 1 << 10).is_err(), "{packing:?} has a bound");
        }
        assert_eq!(read_all(unpacked(&b""[..]).unwrap(), 9).unwrap(), b"");
    }

    #[test]
    fn frames_of_lz4_follow_each_other_and_end_at_zero() {
        let one = pack(b"one", Packing::Lz4);
        let two = [one.clone(), pack(b"two", Packing::Lz4), vec![0; 4], vec![9; 9]].concat();
        assert_eq!(read_all(unpacked(two.as_slice()).unwrap(), 99).unwrap(), b"onetwo");
        let cut = &one[..one.len() - 1];
        assert!(read_all(unpacked(cut).unwrap(), 99).unwrap_err().to_string().contains("cut off"));
        let long = [&LZ4_MAGIC[..], &[0xff; 8]].concat();
        assert!(read_all(unpacked(long.as_slice()).unwrap(), 99).is_err());
    }

    #[test]
    fn what_is_cut_off_or_changed_is_an_error_or_bounded() {
        let text = &text()[..10_000];
        for packing in ALL {
            let packed = pack(text, packing);
            for changed in mutations(&packed, 300) {
                let read = unpacked(changed.as_slice()).and_then(|input| read_all(input, 1 << 20));
                assert!(read.is_err() || read.unwrap().len() <= 1 << 20);
            }
            if packing != Packing::Plain {
                let cut = unpacked(&packed[..packed.len() / 2]).and_then(|input| read_all(input, 1 << 20));
                assert!(cut.is_err(), "{packing:?}");
            }
        }
    }
}
