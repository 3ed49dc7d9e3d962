//! The file format of captures, as much of it as is written here (draft-ietf-opsawg-pcapng): a section, its interfaces, packets,
//! and at the end what was counted.

use std::time::Duration;

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;
const PACKET: u32 = 6;
/// Options: an interface's name and the resolution of its times; packets that came, were lost, were captured.
const NAME: u16 = 2;
const RESOLUTION: u16 = 9;
const RECEIVED: u16 = 4;
const LOST: u16 = 5;
const CAPTURED: u16 = 8;
/// LINKTYPE_ETHERNET.
const ETHERNET: u16 = 1;

/// What was counted, for the end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    /// Packets that passed the filter, lost ones among them, and each both as sent and as received on loopback.
    pub(crate) received: u64,
    pub(crate) lost: u64,
    /// Packets in the file.
    pub(crate) captured: u64,
}

fn block(out: &mut Vec<u8>, kind: u32, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let padding = length.next_multiple_of(4) - length;
    let total = (length + padding + 12) as u32;
    out.extend(kind.to_le_bytes());
    out.extend(total.to_le_bytes());
    parts.iter().for_each(|part| out.extend_from_slice(part));
    out.extend(std::iter::repeat_n(0, padding));
    out.extend(total.to_le_bytes());
}

fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    out.extend(code.to_le_bytes());
    out.extend((value.len() as u16).to_le_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// The beginning: a section with these interfaces, which packets name by their place here.
pub(crate) fn begin(out: &mut Vec<u8>, interfaces: &[&str], snap_length: u32) {
    // Byte order, version 1.0, a section of unknown length.
    let mut fixed = 0x1a2b_3c4d_u32.to_le_bytes().to_vec();
    fixed.extend([1, 0, 0, 0]);
    fixed.extend(u64::MAX.to_le_bytes());
    block(out, SECTION, &[&fixed]);
    for name in interfaces {
        let mut fixed = u32::from(ETHERNET).to_le_bytes().to_vec();
        fixed.extend(snap_length.to_le_bytes());
        option(&mut fixed, NAME, name.as_bytes());
        option(&mut fixed, RESOLUTION, &[9]);
        option(&mut fixed, 0, &[]);
        block(out, INTERFACE, &[&fixed]);
    }
}

fn time(at: Duration) -> [u8; 8] {
    let nanoseconds = at.as_nanos() as u64;
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&((nanoseconds >> 32) as u32).to_le_bytes());
    bytes[4..].copy_from_slice(&(nanoseconds as u32).to_le_bytes());
    bytes
}

/// A packet that came at a time since 1970 and was `whole` bytes long on the wire.
pub(crate) fn packet(out: &mut Vec<u8>, interface: u32, at: Duration, bytes: &[u8], whole: u32) {
    let lengths = [(bytes.len() as u32).to_le_bytes(), whole.to_le_bytes()].concat();
    block(out, PACKET, &[&interface.to_le_bytes(), &time(at), &lengths, bytes]);
}

/// The end. What was counted is that of all interfaces: the kernel does not tell them apart.
pub(crate) fn end(out: &mut Vec<u8>, at: Duration, counted: Counted) {
    let mut fixed = [&0u32.to_le_bytes()[..], &time(at)].concat();
    option(&mut fixed, RECEIVED, &counted.received.to_le_bytes());
    option(&mut fixed, LOST, &counted.lost.to_le_bytes());
    option(&mut fixed, CAPTURED, &counted.captured.to_le_bytes());
    option(&mut fixed, 0, &[]);
    block(out, STATISTICS, &[&fixed]);
}

/// Bytes of [`end`].
pub(crate) const END: usize = 12 + 12 + 3 * 12 + 4;

/// What a file says that was written here to its end: packets captured and lost. `tail` is its last bytes.
pub fn counted(tail: &[u8]) -> Option<(u64, u64)> {
    let last = tail.get(tail.len().checked_sub(END)?..)?;
    let number = |at: usize| last.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
    let is_end = last[..8] == [STATISTICS.to_le_bytes(), (END as u32).to_le_bytes()].concat();
    Some((number(48)?, number(36)?)).filter(|_| is_end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_blocks_of_their_own_length() {
        let mut file = Vec::new();
        begin(&mut file, &["lo", "eth0"], 96);
        packet(&mut file, 1, Duration::new(1_700_000_000, 5), &[1, 2, 3, 4, 5], 1500);
        assert_eq!(counted(&file), None);
        let before = file.len();
        end(&mut file, Duration::new(1_700_000_001, 0), Counted { received: 9, lost: 2, captured: 7 });
        assert_eq!(file.len() - before, END);
        assert_eq!(counted(&file), Some((7, 2)));
        assert_eq!(counted(&file[file.len() - END..]), Some((7, 2)));
        let (mut at, mut kinds) = (0, Vec::new());
        let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
        while at < file.len() {
            let length = word(at + 4) as usize;
            assert_eq!((length % 4, word(at + length - 4) as usize), (0, length));
            kinds.push(word(at));
            at += length;
        }
        assert_eq!(kinds, [SECTION, INTERFACE, INTERFACE, PACKET, STATISTICS]);
    }
}
