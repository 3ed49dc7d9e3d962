//! Reads ELF files for x86-64 (System V ABI, gABI chapters 4 and 5): headers, notes, sections by name. Nothing is trusted.

use std::io;

use crate::bytes::{Bytes, bad, u16_at, u32_at, u64_at};

pub(crate) const MAGIC: &[u8] = b"\x7fELF";
const HEADER: u64 = 64;
const SEGMENT: u64 = 56;
const SECTION: u64 = 64;
const X86_64: u16 = 62;
/// Most bytes of a table of headers, which count in 16 bits, and of notes and sections.
const MOST: u64 = 4 << 20;

pub(crate) const INTERPRETER: u32 = 3;
const NOTES: u32 = 4;

/// `e_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Relocatable,
    /// At fixed addresses, or anywhere.
    Program,
    Other,
}

#[derive(Debug)]
pub(crate) struct Elf<'a, B> {
    bytes: &'a B,
    pub kind: Kind,
    /// Where it starts; 0: nowhere.
    pub entry: u64,
    /// Type, offset and size of each.
    segments: Vec<(u32, u64, u64)>,
    /// Offset and number of section headers, and which names them.
    sections: (u64, u16, u16),
}

impl<'a, B: Bytes> Elf<'a, B> {
    pub(crate) fn read(bytes: &'a B) -> io::Result<Self> {
        let header = bytes.table(0, HEADER, HEADER).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => bad("it is no ELF file"),
            _ => error,
        })?;
        if !header.starts_with(MAGIC) {
            return Err(bad("it is no ELF file"));
        }
        // 64 bits, little-endian.
        if header[4..6] != [2, 1] || u16_at(&header, 18) != X86_64 {
            return Err(bad("it is not for x86-64"));
        }
        let (phentsize, phnum) = (u16_at(&header, 54), u16_at(&header, 56));
        let (shentsize, shnum) = (u16_at(&header, 58), u16_at(&header, 60));
        if phnum > 0 && u64::from(phentsize) != SEGMENT || shnum > 0 && u64::from(shentsize) != SECTION {
            return Err(bad("its headers have a size that no ELF file of 64 bits has"));
        }
        let table = bytes.table(u64_at(&header, 32), u64::from(phnum) * SEGMENT, MOST)?;
        let segments = table.chunks_exact(SEGMENT as usize);
        Ok(Self {
            bytes,
            kind: match u16_at(&header, 16) {
                1 => Kind::Relocatable,
                2 | 3 => Kind::Program,
                _ => Kind::Other,
            },
            entry: u64_at(&header, 24),
            segments: segments.map(|one| (u32_at(one, 0), u64_at(one, 8), u64_at(one, 32))).collect(),
            sections: (u64_at(&header, 40), shnum, u16_at(&header, 62)),
        })
    }

    pub(crate) fn has_segment(&self, kind: u32) -> bool {
        self.segments.iter().any(|segment| segment.0 == kind)
    }

    /// Whether one of its notes has this owner and type, and says something.
    pub(crate) fn has_note(&self, owner: &[u8], kind: u32) -> io::Result<bool> {
        for &(_, offset, size) in self.segments.iter().filter(|segment| segment.0 == NOTES) {
            let notes = self.bytes.table(offset, size, MOST)?;
            let mut rest = notes.as_slice();
            while rest.len() >= 12 {
                let (name, described) = (u32_at(rest, 0) as usize, u32_at(rest, 4) as usize);
                let found = u32_at(rest, 8) == kind && described > 0;
                if found && rest[12..].get(..name).and_then(|name| name.strip_suffix(b"\0")) == Some(owner) {
                    return Ok(true);
                }
                let next = 12 + name.next_multiple_of(4) + described.next_multiple_of(4);
                rest = rest.get(next..).unwrap_or_default();
            }
        }
        Ok(false)
    }

    /// The contents of the section with this name.
    pub(crate) fn section(&self, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let (offset, count, names) = self.sections;
        let table = self.bytes.table(offset, u64::from(count) * SECTION, MOST)?;
        let headers: Vec<&[u8]> = table.chunks_exact(SECTION as usize).collect();
        let contents = |header: &[u8]| self.bytes.table(u64_at(header, 24), u64_at(header, 32), MOST);
        let Some(names) = headers.get(usize::from(names)) else { return Ok(None) };
        let names = contents(names)?;
        let is_named = |header: &&&[u8]| {
            let text = names.get(u32_at(header, 0) as usize..).unwrap_or_default();
            text.strip_prefix(name).is_some_and(|rest| rest.starts_with(b"\0"))
        };
        headers.iter().find(is_named).map(|header| contents(header)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{elf, mutations, note};

    #[test]
    fn notes_and_sections_are_found_by_name() {
        let notes = [note(b"GNU\0", 18, b"1234"), note(b"Linux\0", 1, b"x"), note(b"Xen\0", 18, b"12345678")].concat();
        let file = elf(2, &[(1, b"code".to_vec()), (NOTES, notes)], &[(".text", b"t"), (".modinfo", b"a=b\0")]);
        let read = Elf::read(&file).unwrap();
        assert_eq!((read.kind, read.entry), (Kind::Program, 0x1000));
        assert!(read.has_note(b"Xen", 18).unwrap() && read.has_note(b"Linux", 1).unwrap());
        assert!(!read.has_note(b"Xen", 17).unwrap() && !read.has_note(b"Xe", 18).unwrap());
        assert!(read.has_segment(1) && !read.has_segment(INTERPRETER));
        assert_eq!(read.section(b".modinfo").unwrap().unwrap(), b"a=b\0");
        assert!(read.section(b".mod").unwrap().is_none());
    }

    #[test]
    fn what_is_for_other_machines_is_refused() {
        let file = elf(2, &[], &[]);
        for (at, value) in [(0, 0), (4, 1), (5, 2), (18, 183)] {
            let mut other = file.clone();
            other[at] = value;
            assert!(Elf::read(&other).is_err());
        }
        assert!(Elf::read(&Vec::new()).unwrap_err().to_string().contains("no ELF"));
        assert!(Elf::read(&file[..63].to_vec()).is_err());
    }

    #[test]
    fn whatever_is_changed_in_a_file_is_survived() {
        let notes = [note(b"Linux\0", 1, b"x"), note(b"Xen\0", 18, b"12345678")].concat();
        let file = elf(2, &[(NOTES, notes)], &[(".text", b"t"), (".modinfo", b"a=b\0")]);
        for changed in mutations(&file, 10_000) {
            if let Ok(read) = Elf::read(&changed) {
                let _ = (read.has_note(b"Xen", 18), read.section(b".modinfo"));
            }
        }
    }
}
