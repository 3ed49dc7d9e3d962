//! Reads a tar stream of strangers with bounded memory: ustar, GNU (long names, sparse) and PAX.
//!
//! Formats: POSIX.1-2017 `pax`, GNU tar manual ("Basic Tar Format", "Storing Sparse Files"). The tar crate decodes header
//! fields; the walk over entries is here because that crate reads extension records of any size into memory.

use std::io::{self, Read};

use tar::Header;

use crate::tree::Xattrs;

const BLOCK: usize = 512;
/// Most bytes of one extension record (long name, PAX header).
const MAX_EXTENSION: u64 = 1 << 20;
const MAX_SPARSE: usize = 65_536;

/// One entry; for files with contents [`TarStream::contents`] must be read before the next.
#[derive(Debug, Default, Clone)]
pub(crate) struct Entry {
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: u8,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub mtime: (i64, u32),
    /// Bytes of the file, holes included.
    pub size: u64,
    pub device: (u32, u32),
    pub xattrs: Xattrs,
    /// Stored bytes and where they belong: offset and length. `None`: all of the file.
    sparse: Option<Vec<(u64, u64)>>,
    stored: u64,
}

pub(crate) struct TarStream<R> {
    input: R,
    /// Bytes of the current entry not yet read, and its padding.
    left: u64,
    padding: u64,
    position: u64,
}

fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl<R: Read> TarStream<R> {
    pub(crate) fn new(input: R) -> Self {
        Self { input, left: 0, padding: 0, position: 0 }
    }

    /// Where the current entry's stored bytes begin in the stream.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.input.read(&mut buffer[filled..]) {
                // Unlike an error of that kind, which is the packing's.
                Ok(0) => return Err(bad("the archive ends in the middle of an entry")),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.position += buffer.len() as u64;
        Ok(())
    }

    fn skip_rest(&mut self) -> io::Result<()> {
        let mut rest = self.left + self.padding;
        (self.left, self.padding) = (0, 0);
        let mut buffer = [0; 8192];
        while rest > 0 {
            let now = rest.min(buffer.len() as u64) as usize;
            self.fill(&mut buffer[..now])?;
            rest -= now as u64;
        }
        Ok(())
    }

    /// The next header block; `None` at the end of the archive.
    fn header(&mut self) -> io::Result<Option<Header>> {
        self.skip_rest()?;
        let mut header = Header::new_old();
        let bytes = header.as_mut_bytes();
        // An archive may end without the two blocks of zeros that should close it.
        let first = loop {
            match self.input.read(&mut bytes[..1]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if first == 0 {
            return Ok(None);
        }
        self.position += 1;
        self.fill(&mut bytes[1..])?;
        if bytes.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let sum: u32 =
            bytes.iter().enumerate().map(|(at, &b)| if (148..156).contains(&at) { 32 } else { u32::from(b) }).sum();
        if header.cksum().ok() != Some(sum) {
            return Err(bad("a header's checksum is wrong"));
        }
        let size = natural(&header.as_bytes()[124..136])?;
        self.left = size;
        self.padding =
            size.next_multiple_of(BLOCK as u64).checked_sub(size).ok_or_else(|| bad("an entry is too large"))?;
        Ok(Some(header))
    }

    fn extension(&mut self) -> io::Result<Vec<u8>> {
        if self.left > MAX_EXTENSION {
            return Err(bad("an extended header is larger than 1 MiB"));
        }
        let mut bytes = vec![0; self.left as usize];
        self.left = 0;
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// The next entry, its extension records applied; `None` at the end.
    pub(crate) fn next(&mut self) -> io::Result<Option<Entry>> {
        let (mut long_path, mut long_link, mut pax) = (None, None, Vec::new());
        loop {
            let Some(header) = self.header()? else {
                if long_path.is_some() || long_link.is_some() || !pax.is_empty() {
                    return Err(bad("the archive ends after an extended header"));
                }
                return Ok(None);
            };
            let kind = header.as_bytes()[156];
            match kind {
                b'L' => long_path = Some(until_zero(self.extension()?)),
                b'K' => long_link = Some(until_zero(self.extension()?)),
                b'x' => pax = self.extension()?,
                b'g' | b'V' => self.skip_rest()?,
                _ => {
                    let mut entry = self.plain_entry(&header, kind)?;
                    if let Some(path) = long_path {
                        entry.path = path;
                    }
                    if let Some(link) = long_link {
                        entry.link = link;
                    }
                    self.apply_pax(&mut entry, &pax)?;
                    // These have no contents whatever their size says, to every reader of archives that counts.
                    if matches!(entry.kind, b'1'..=b'6') {
                        (entry.size, entry.stored, self.left, self.padding) = (0, 0, 0, 0);
                    }
                    if kind == b'S' {
                        self.gnu_sparse(&mut entry, &header)?;
                    }
                    return Ok(Some(entry));
                }
            }
        }
    }

    fn plain_entry(&self, header: &Header, kind: u8) -> io::Result<Entry> {
        let (path, bytes) = (header.path_bytes().into_owned(), header.as_bytes());
        // Other fields of the oldest form, and of entries that are no devices, may hold anything.
        let has_device = matches!(kind, b'3' | b'4') && bytes[257..].starts_with(b"ustar");
        let device = if has_device { (natural(&bytes[329..337])?, natural(&bytes[337..345])?) } else { (0, 0) };
        let is_old_directory = matches!(kind, 0 | b'0') && path.ends_with(b"/");
        Ok(Entry {
            link: header.link_name_bytes().map_or_else(Vec::new, |link| link.into_owned()),
            kind: if is_old_directory { b'5' } else { kind },
            mode: natural(&bytes[100..108])?,
            uid: natural(&bytes[108..116])?,
            gid: natural(&bytes[116..124])?,
            mtime: (number(&bytes[136..148])?, 0),
            size: self.left,
            stored: self.left,
            device,
            path,
            ..Entry::default()
        })
    }

    fn apply_pax(&mut self, entry: &mut Entry, records: &[u8]) -> io::Result<()> {
        let mut sparse_map = None;
        let (mut sparse_major, mut real_size, mut sparse_name) = (None, None, None);
        for record in pax_records(records) {
            let (key, value) = record?;
            // An empty value takes a record back (POSIX); an attribute's may be empty.
            if value.is_empty() && !key.starts_with(b"SCHILY.xattr.") {
                continue;
            }
            match key {
                b"path" => entry.path = value.to_vec(),
                b"linkpath" => entry.link = value.to_vec(),
                b"size" => {
                    let size = decimal(value)?;
                    (entry.size, entry.stored, self.left) = (size, size, size);
                    let whole = size.checked_next_multiple_of(BLOCK as u64);
                    self.padding = whole.ok_or_else(|| bad("an entry is too large"))? - size;
                }
                b"uid" => entry.uid = decimal(value)?,
                b"gid" => entry.gid = decimal(value)?,
                b"mtime" => entry.mtime = pax_time(value)?,
                b"GNU.sparse.major" => sparse_major = Some(decimal(value)?),
                b"GNU.sparse.name" => sparse_name = Some(value.to_vec()),
                b"GNU.sparse.size" | b"GNU.sparse.realsize" => real_size = Some(decimal(value)?),
                b"GNU.sparse.map" => sparse_map = Some(sparse_list(value.split(|&byte| byte == b','))?),
                b"GNU.sparse.offset" => return Err(bad("sparse files of PAX version 0.0 are not supported")),
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        entry.xattrs.insert(name.into(), value.into());
                    }
                }
            }
        }
        if sparse_major == Some(1) {
            sparse_map = Some(self.pax_sparse_map(entry)?);
        }
        if let Some(map) = sparse_map {
            entry.path = sparse_name.unwrap_or_else(|| std::mem::take(&mut entry.path));
            entry.size = real_size.ok_or_else(|| bad("a sparse file does not tell its size"))?;
            entry.set_sparse(map)?;
        }
        Ok(())
    }

    /// PAX 1.0: the map is the first blocks of the contents: a count, then offsets and lengths, a line each.
    fn pax_sparse_map(&mut self, entry: &mut Entry) -> io::Result<Vec<(u64, u64)>> {
        let mut text = Vec::new();
        let mut lines = 0;
        let mut wanted = None;
        loop {
            if self.left < BLOCK as u64 || text.len() > MAX_EXTENSION as usize {
                return Err(bad("a sparse file's map is broken"));
            }
            let mut block = [0; BLOCK];
            self.fill(&mut block)?;
            self.left -= BLOCK as u64;
            entry.stored -= BLOCK as u64;
            lines += block.iter().filter(|&&byte| byte == b'\n').count() as u64;
            text.extend_from_slice(&block);
            if wanted.is_none()
                && let Some(end) = text.iter().position(|&byte| byte == b'\n')
            {
                wanted = Some(decimal(&text[..end])?.saturating_mul(2).saturating_add(1));
            }
            if wanted.is_some_and(|wanted| lines >= wanted) {
                let count = wanted.unwrap_or(1) as usize - 1;
                return sparse_list(text.split(|&byte| byte == b'\n').skip(1).take(count));
            }
        }
    }

    /// Old GNU format: the map starts in the header and goes on in blocks of its own.
    fn gnu_sparse(&mut self, entry: &mut Entry, header: &Header) -> io::Result<()> {
        let bytes = header.as_bytes();
        let mut map = Vec::new();
        let mut take = |slots: &[u8]| -> io::Result<()> {
            for slot in slots.chunks_exact(24).take_while(|slot| slot[0] != 0) {
                map.push((natural(&slot[..12])?, natural(&slot[12..])?));
            }
            if map.len() > MAX_SPARSE { Err(bad("a sparse file has too many pieces")) } else { Ok(()) }
        };
        take(&bytes[386..482])?;
        let mut more = bytes[482] != 0;
        while more {
            let mut block = [0; BLOCK];
            self.fill(&mut block)?;
            take(&block[..504])?;
            more = block[504] != 0;
        }
        entry.kind = b'0';
        entry.size = natural(&bytes[483..495])?;
        entry.set_sparse(map)
    }

    /// Hands the file's bytes to `sink` in pieces, holes as zeros.
    pub(crate) fn contents(&mut self, entry: &Entry, mut sink: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        const ZEROS: [u8; 8192] = [0; 8192];
        let mut buffer = vec![0; entry.size.clamp(512, 65_536) as usize];
        let whole = [(0, entry.stored)];
        let mut at = 0;
        let zeros = |from: u64, to: u64, sink: &mut dyn FnMut(&[u8]) -> io::Result<()>| -> io::Result<()> {
            let mut left = to.saturating_sub(from);
            while left > 0 {
                let now = left.min(ZEROS.len() as u64);
                sink(&ZEROS[..now as usize])?;
                left -= now;
            }
            Ok(())
        };
        for &(offset, length) in entry.sparse.as_deref().unwrap_or(&whole) {
            zeros(at, offset, &mut sink)?;
            let mut left = length;
            while left > 0 {
                let now = left.min(buffer.len() as u64) as usize;
                self.fill(&mut buffer[..now])?;
                self.left -= now as u64;
                left -= now as u64;
                sink(&buffer[..now])?;
            }
            at = offset + length;
        }
        zeros(at, entry.size, &mut sink)
    }

    /// Gives the stream back, for what follows the archive.
    pub(crate) fn into_inner(self) -> R {
        self.input
    }
}

impl Entry {
    /// Checks the map: ascending, within the file, and as long as what is stored.
    fn set_sparse(&mut self, map: Vec<(u64, u64)>) -> io::Result<()> {
        let (mut end, mut stored) = (0u64, 0u64);
        for &(offset, length) in &map {
            let stop = offset.checked_add(length).filter(|&stop| offset >= end && stop <= self.size);
            end = stop.ok_or_else(|| bad("a sparse file's map is not in order"))?;
            stored += length;
        }
        if stored != self.stored {
            return Err(bad("a sparse file's map does not match its contents"));
        }
        self.sparse = Some(map);
        Ok(())
    }
}

fn until_zero(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

fn decimal(text: &[u8]) -> io::Result<u64> {
    std::str::from_utf8(text).ok().and_then(|text| text.trim().parse().ok()).ok_or_else(|| bad("a number is not one"))
}

/// A number of a header: octal between spaces and zero bytes, nothing for 0, or base 256 where the first bit is set.
fn number(field: &[u8]) -> io::Result<i64> {
    let too_large = || bad("a number is too large");
    if field[0] & 0x80 != 0 {
        // The first bit only marks the form, the second is the sign; numbers have twelve bytes at most.
        let first = i128::from(field[0] & 0x3f) - i128::from(field[0] & 0x40);
        let value = field[1..].iter().fold(first, |value, &byte| (value << 8) | i128::from(byte));
        return i64::try_from(value).map_err(|_| too_large());
    }
    let is_blank = |byte: &u8| matches!(byte, b' ' | 0);
    let digits = field.iter().skip_while(|byte| is_blank(byte)).take_while(|byte| !is_blank(byte));
    digits.copied().try_fold(0i64, |value, byte| match byte {
        b'0'..=b'7' => Ok((value << 3) | i64::from(byte - b'0')),
        _ => Err(bad("an octal number is not one")),
    })
}

/// A number that is none of those below 0, nor larger than its use allows.
fn natural<T: TryFrom<i64>>(field: &[u8]) -> io::Result<T> {
    T::try_from(number(field)?).map_err(|_| bad("a number is negative or too large"))
}

fn sparse_list<'a>(mut numbers: impl Iterator<Item = &'a [u8]>) -> io::Result<Vec<(u64, u64)>> {
    let mut map = Vec::new();
    while let Some(offset) = numbers.next() {
        let length = numbers.next().ok_or_else(|| bad("a sparse file's map is broken"))?;
        map.push((decimal(offset)?, decimal(length)?));
        if map.len() > MAX_SPARSE {
            return Err(bad("a sparse file has too many pieces"));
        }
    }
    Ok(map)
}

/// `SECONDS[.FRACTION]`, also before the epoch.
fn pax_time(value: &[u8]) -> io::Result<(i64, u32)> {
    let wrong = || bad("a time is not one");
    let text = std::str::from_utf8(value).map_err(|_| wrong())?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().map_err(|_| wrong())?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanos: u32 = digits.parse().map_err(|_| wrong())?;
    if text.starts_with('-') && nanos > 0 {
        return Ok((seconds.checked_sub(1).ok_or_else(wrong)?, 1_000_000_000 - nanos));
    }
    Ok((seconds, nanos))
}

type Record<'a> = io::Result<(&'a [u8], &'a [u8])>;

/// `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record; values may hold any byte.
fn pax_records(mut bytes: &[u8]) -> impl Iterator<Item = Record<'_>> {
    std::iter::from_fn(move || {
        if bytes.iter().all(|&byte| byte == 0) {
            return None;
        }
        let parse = || -> Option<(&[u8], &[u8], &[u8])> {
            let space = bytes.iter().take(20).position(|&byte| byte == b' ')?;
            let length = decimal(&bytes[..space]).ok()? as usize;
            let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|&byte| byte == b'=')?;
            Some((&record[..equals], &record[equals + 1..], &bytes[length..]))
        };
        let Some((key, value, rest)) = parse() else {
            bytes = &[];
            return Some(Err(bad("a PAX record is broken")));
        };
        bytes = rest;
        Some(Ok((key, value)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_headers() {
        let octal = |field: &[u8]| natural::<u64>(field);
        assert_eq!(octal(b"0000644\0").unwrap(), 0o644);
        assert_eq!(octal(b"   12 \0\0").unwrap(), 0o12);
        assert_eq!(octal(&[0; 8]).unwrap(), 0);
        assert_eq!(octal(&[0x80, 0, 0, 0, 0, 0, 1, 2]).unwrap(), 258);
        assert!(octal(b"0000689\0").is_err());
        assert_eq!(natural::<u32>(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xfe]).unwrap(), u32::MAX - 1);
        assert!(natural::<u32>(&[0x80, 0, 0, 1, 0, 0, 0, 0]).is_err());
        // 2⁶⁴ and 2⁶³ in the twelve bytes of a size, not 0 and less; -1 as a size; -1 and -2⁶⁴ as times.
        assert!(octal(&[0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]).is_err());
        assert!(octal(&[0x80, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0]).is_err());
        assert!(octal(&[0xff; 12]).is_err());
        assert_eq!(number(&[0xff; 12]).unwrap(), -1);
        assert!(number(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]).is_err());
    }

    #[test]
    fn times_before_and_after_the_epoch() {
        assert_eq!(pax_time(b"12.5").unwrap(), (12, 500_000_000));
        assert_eq!(pax_time(b"-1.25").unwrap(), (-2, 750_000_000));
        assert!(pax_time(b"x").is_err());
    }

    #[test]
    fn broken_records_and_huge_extensions_are_refused() {
        assert!(pax_records(b"999 path=x\n").next().unwrap().is_err());
        let mut header = Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(1 << 40);
        header.set_cksum();
        let error = TarStream::new(&header.as_bytes()[..]).next().unwrap_err();
        assert!(error.to_string().contains("1 MiB"), "{error}");
    }

    #[test]
    fn sparse_files_get_their_holes_back() {
        let records =
            [&b"22 GNU.sparse.major=1\n"[..], b"22 GNU.sparse.minor=0\n", b"31 GNU.sparse.realsize=1000000\n"];
        let pax: Vec<u8> = records.concat();
        let mut archive = Vec::new();
        let mut push = |kind: u8, data: &[u8]| {
            let mut header = Header::new_ustar();
            header.set_path("f").unwrap();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.as_mut_bytes()[156] = kind;
            header.set_cksum();
            archive.extend_from_slice(header.as_bytes());
            archive.extend_from_slice(data);
            archive.resize(archive.len().next_multiple_of(BLOCK), 0);
        };
        push(b'x', &pax);
        let mut data = b"1\n500\n3\n".to_vec();
        data.resize(BLOCK, 0);
        data.extend_from_slice(b"abc");
        push(b'0', &data);
        let mut stream = TarStream::new(&archive[..]);
        let entry = stream.next().unwrap().unwrap();
        let mut contents = Vec::new();
        stream
            .contents(&entry, |piece| {
                contents.extend_from_slice(piece);
                Ok(())
            })
            .unwrap();
        assert_eq!((contents.len(), &contents[500..503]), (1_000_000, &b"abc"[..]));
        assert!(stream.next().unwrap().is_none());
    }
}
