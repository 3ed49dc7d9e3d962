//! The process's mappings (proc_pid_maps(5)): a line for each, `BEGIN-END rwxp OFFSET MAJOR:MINOR INODE NAME`; all numbers but the inode
//! are hexadecimal.

use crate::host::{File, Identity};

#[derive(Clone, Copy, Default)]
pub struct Mapping {
    pub begin: usize,
    pub end: usize,
    pub rights: [u8; 4],
    /// Where in the file, and in which; all of it is 0 for memory alone.
    pub offset: usize,
    pub file: Identity,
}

impl Mapping {
    pub fn length(&self) -> usize {
        self.end.saturating_sub(self.begin)
    }

    /// Whether it is the process's own to write, and of no file.
    pub fn is_memory(&self) -> bool {
        self.is_private() && self.file.inode == 0
    }

    /// Whether it is the process's own to write.
    pub fn is_private(&self) -> bool {
        self.rights == *b"rw-p"
    }
}

/// Tells of each mapping.
pub fn each(mut tell: impl FnMut(Mapping)) {
    let (maps, mut buffer, mut line) = (File::open(c"/proc/self/maps"), [0_u8; 4096], Line::default());
    loop {
        let count = maps.read(&mut buffer);
        if count == 0 {
            return;
        }
        for byte in &buffer[..count] {
            if let Some(mapping) = line.take(*byte) {
                tell(mapping);
            }
        }
    }
}

/// As much of a line as was read.
#[derive(Default)]
struct Line {
    mapping: Mapping,
    /// Of the parts of the line, and in that one.
    part: usize,
    at: usize,
}

impl Line {
    /// The mapping that the line tells of, when it ends.
    fn take(&mut self, byte: u8) -> Option<Mapping> {
        if byte == b'\n' {
            return Some(core::mem::take(self).mapping);
        }
        let mapping = &mut self.mapping;
        match (byte, self.part) {
            (b'-', 0) | (b' ', _) | (b':', 4) => (self.part, self.at) = (self.part + 1, 0),
            (_, 0) => mapping.begin = with_digit(mapping.begin, byte, 16),
            (_, 1) => mapping.end = with_digit(mapping.end, byte, 16),
            (_, 2) if self.at < mapping.rights.len() => {
                mapping.rights[self.at] = byte;
                self.at += 1;
            }
            (_, 3) => mapping.offset = with_digit(mapping.offset, byte, 16),
            (_, 4 | 5) => {
                let part = &mut mapping.file.device[self.part - 4];
                *part = with_digit(*part, byte, 16);
            }
            (_, 6) => mapping.file.inode = with_digit(mapping.file.inode, byte, 10),
            _ => {}
        }
        None
    }
}

fn with_digit(number: usize, byte: u8, base: u32) -> usize {
    let digit = char::from(byte).to_digit(base).unwrap_or(0);
    number.wrapping_mul(base as usize).wrapping_add(digit as usize)
}
