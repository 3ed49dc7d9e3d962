//! Files with holes: what there is in them, and copies.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Bytes copied at once.
const PIECE: u64 = 1 << 20;

/// Copies what there is in a file, and leaves holes where there is nothing. `to` is empty.
pub fn copy(from: &File, to: &File) -> io::Result<()> {
    to.set_len(from.metadata()?.len())?;
    let mut buffer = vec![0; PIECE as usize];
    for Range { start: mut at, end } in extents(from)? {
        while at < end {
            let count = from.read_at(&mut buffer[..(end - at).min(PIECE) as usize], at)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            to.write_all_at(&buffer[..count], at)?;
            at += count as u64;
        }
    }
    Ok(())
}

/// Where there is something in a file, in its order.
pub fn extents(file: &File) -> io::Result<Vec<Range<u64>>> {
    let length = file.metadata()?.len();
    let seek = |at: u64, whence| -> io::Result<Option<u64>> {
        let at = libc::off_t::try_from(at).map_err(io::Error::other)?;
        // SAFETY: an open descriptor and integers.
        match u64::try_from(unsafe { libc::lseek(file.as_raw_fd(), at, whence) }) {
            Ok(found) => Ok(Some(found)),
            Err(_) => match io::Error::last_os_error() {
                // Nothing more than holes.
                error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                error => Err(error),
            },
        }
    };
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some(start) = seek(at, libc::SEEK_DATA)? {
        at = seek(start, libc::SEEK_HOLE)?.unwrap_or(length);
        found.push(start..at);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn holes_stay_holes() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            File::options().read(true).write(true).create(true).truncate(true).open(dir.path().join(name)).unwrap()
        };
        let (from, to) = (open("from"), open("to"));
        from.set_len(64 << 20).unwrap();
        from.write_all_at(b"first", 0).unwrap();
        from.write_all_at(&[7; 3 << 20], 40 << 20).unwrap();
        copy(&from, &to).unwrap();
        let meta = to.metadata().unwrap();
        assert!(meta.len() == 64 << 20 && meta.blocks() * 512 < 5 << 20, "{meta:?}");
        let mut bytes = vec![0; 3 << 20];
        to.read_exact_at(&mut bytes, 40 << 20).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 7));
    }
}
