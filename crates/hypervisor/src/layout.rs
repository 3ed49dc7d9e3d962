//! Files one behind the other on one disk: a machine has few places for disks, and an image may have a hundred layers.

use std::fmt::Write;
use std::io;
use std::path::PathBuf;

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// A file on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub offset: u64,
    pub length: u64,
}

/// Where each of the files is: each begins with a sector.
pub fn parts(files: &[PathBuf]) -> io::Result<Vec<Part>> {
    let mut offset = 0;
    files
        .iter()
        .map(|file| {
            let length = std::fs::metadata(file)?.len();
            if length == 0 {
                return Err(io::Error::other(format!("{} is empty", file.display())));
            }
            let part = Part { offset, length };
            offset += length.next_multiple_of(SECTOR);
            Ok(part)
        })
        .collect()
}

/// The disk as a text that QEMU reads (VMware Virtual Disk Format 1.1, a disk of several flat extents). `name` gives what the monitor
/// calls a file. It has no empty lines: QEMU takes one for the extent that follows, once more.
pub(crate) fn descriptor(parts: &[Part], name: impl Fn(usize) -> String) -> String {
    let mut text = String::from(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentFlat\"\n",
    );
    for (number, part) in parts.iter().enumerate() {
        let _ = writeln!(text, "RW {} FLAT \"{}\" 0", part.length.div_ceil(SECTOR), name(number));
    }
    text.push_str("ddb.virtualHWVersion = \"4\"\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_follow_each_other() {
        let dir = std::env::temp_dir().join(format!("joey-layout-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let files = [4096usize, 512, 8192].map(|length| {
            let file = dir.join(length.to_string());
            std::fs::write(&file, vec![0; length]).unwrap();
            file
        });
        let found = parts(&files).unwrap();
        assert_eq!(found.iter().map(|part| part.offset).collect::<Vec<_>>(), [0, 4096, 4608]);
        let text = descriptor(&found, |number| format!("/layers/{number}"));
        assert!(
            text.contains("RW 8 FLAT \"/layers/0\" 0\nRW 1 FLAT \"/layers/1\" 0\nRW 16 FLAT \"/layers/2\" 0\n"),
            "{text}"
        );
        std::fs::write(&files[1], b"odd").unwrap();
        let odd = parts(&files).unwrap();
        assert_eq!((odd[1].length, odd[2].offset), (3, 4608), "the rest of its sector is nobody's");
        std::fs::write(&files[1], b"").unwrap();
        assert!(parts(&files).is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
