//! What a core says of itself at its beginning: an ELF file whose program headers tell where each piece of memory is in it.

/// How many bytes a core has that begins so, as far as its headers are in there; 0 of what is no ELF file.
pub(crate) fn length(begin: &[u8]) -> u64 {
    length_of(begin).unwrap_or(0)
}

fn length_of(begin: &[u8]) -> Option<u64> {
    let number = |at: u64, bytes: usize| {
        let at = usize::try_from(at).ok()?;
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(begin.get(at..at.checked_add(bytes)?)?);
        Some(u64::from_le_bytes(word))
    };
    // Where the table of headers is, its entries' length and number; and in each of them offset and length in the file.
    let (table, entry, count, places, bytes) = match begin.get(..6)? {
        [0x7f, b'E', b'L', b'F', 2, 1] => (number(32, 8)?, number(54, 2)?, number(56, 2)?, (8, 32), 8),
        [0x7f, b'E', b'L', b'F', 1, 1] => (number(28, 4)?, number(42, 2)?, number(44, 2)?, (4, 16), 4),
        _ => return None,
    };
    let end = |at: u64| {
        let header = table.checked_add(at * entry)?;
        let (offset, length) = (header.checked_add(places.0)?, header.checked_add(places.1)?);
        number(offset, bytes)?.checked_add(number(length, bytes)?)
    };
    (0..count).map_while(end).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_tells_its_length() {
        let word = |to: &mut Vec<u8>, at: usize, bytes: &[u8]| to[at..at + bytes.len()].copy_from_slice(bytes);
        let mut wide = vec![0; 64 + 2 * 56];
        word(&mut wide, 0, b"\x7fELF\x02\x01");
        word(&mut wide, 32, &64u64.to_le_bytes());
        word(&mut wide, 54, &[56, 0, 2, 0]);
        for (at, offset, length) in [(64, 0x1000u64, 0x3000u64), (120, 0x500, 0x100)] {
            word(&mut wide, at + 8, &offset.to_le_bytes());
            word(&mut wide, at + 32, &length.to_le_bytes());
        }
        assert_eq!(length(&wide), 0x4000);
        assert_eq!(length(&wide[..130]), 0x4000, "as far as it is there");
        assert_eq!(length(&wide[..70]), 0);
        word(&mut wide, 32, &u64::MAX.to_le_bytes());
        assert_eq!(length(&wide), 0, "nowhere");
        let mut narrow = vec![0; 52 + 32];
        word(&mut narrow, 0, b"\x7fELF\x01\x01");
        word(&mut narrow, 28, &52u32.to_le_bytes());
        word(&mut narrow, 42, &[32, 0, 1, 0]);
        word(&mut narrow, 52 + 4, &0x100u32.to_le_bytes());
        word(&mut narrow, 52 + 16, &0x20u32.to_le_bytes());
        assert_eq!(length(&narrow), 0x120);
        assert_eq!((length(b"no core"), length(b"")), (0, 0));
    }
}
