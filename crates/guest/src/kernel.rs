//! From a kernel image to the uncompressed kernel: an ELF file, of which a machine starts the PVH entry.
//!
//! A bzImage is taken apart by the boot protocol (the kernel's `Documentation/arch/x86/boot.rst`, fields of version 2.08).

use std::fs::File;
use std::io::{self, BufReader, Read};

use crate::bytes::{Bytes, Piece, bad, u16_at, u32_at};
use crate::elf::{self, Elf, Kind};
use crate::packing::{Packing, unpacked};

/// Most bytes of an uncompressed kernel.
const MOST: u64 = 512 << 20;
/// The boot protocol's header, up to the field `payload_length`.
const HEADER: u64 = 0x250;
/// `XEN_ELFNOTE_PHYS32_ENTRY`, by which a kernel names its PVH entry.
const PVH_ENTRY: u32 = 18;
/// A release has 64 bytes at most: `__NEW_UTS_LEN`.
const LONGEST_RELEASE: usize = 64;
const BANNER: &[u8] = b"Linux version ";

/// Writes the uncompressed kernel of `image` to `to`, which is empty.
pub(crate) fn write_vmlinux(image: Piece<'_>, mut to: &File) -> io::Result<()> {
    let start = image.table(0, HEADER.min(image.len()), HEADER)?;
    let (count, told) = if start.starts_with(elf::MAGIC) {
        (io::copy(&mut image.take(MOST + 1), &mut to)?, None)
    } else {
        let (payload, told) = payload(&image, &start)?;
        if told > MOST {
            return Err(bad(format!("it says that it unpacks to {told} bytes")));
        }
        (io::copy(&mut unpacked(payload)?.take(MOST + 1), &mut to)?, Some(told))
    };
    if count > MOST {
        return Err(bad(format!("it has more than {MOST} bytes uncompressed")));
    }
    if told.is_some_and(|told| told != count) {
        return Err(bad("it does not unpack to as many bytes as it says"));
    }
    match Elf::read(&Piece::whole(to)?)?.kind {
        Kind::Program => Ok(()),
        Kind::Relocatable | Kind::Other => Err(bad("it is no program")),
    }
}

/// The packed kernel in a bzImage, and how many bytes it should unpack to.
fn payload<'a>(image: &Piece<'a>, start: &[u8]) -> io::Result<(Piece<'a>, u64)> {
    if start.len() < HEADER as usize || u16_at(start, 0x1fe) != 0xaa55 || start[0x202..0x206] != *b"HdrS" {
        return Err(bad("it is neither a bzImage nor an ELF file"));
    }
    if u16_at(start, 0x206) < 0x208 {
        return Err(bad("its boot protocol is older than 2.08"));
    }
    let sectors = match start[0x1f1] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let (offset, length) = (u64::from(u32_at(start, 0x248)), u64::from(u32_at(start, 0x24c)));
    let whole = image.part((sectors + 1) * 512 + offset, length)?;
    // Its last four bytes tell the unpacked length, and are appended to all packings but gzip, which ends with them.
    let Some(end) = length.checked_sub(4) else { return Err(bad("it holds no packed kernel")) };
    let told = whole.table(end, 4, 4)?;
    let packed = match Packing::of(&whole.table(0, 6.min(length), 6)?) {
        Packing::Plain => {
            return Err(bad("its kernel is packed in a way that is not known (zstd, gzip, xz and lz4 are)"));
        }
        Packing::Gzip => whole,
        Packing::Xz | Packing::Zstd | Packing::Lz4 => whole.part(0, end)?,
    };
    Ok((packed, u64::from(u32_at(&told, 0))))
}

/// Whether a machine can start it without firmware and boot loader (`CONFIG_PVH`).
pub(crate) fn has_pvh_entry(vmlinux: &File) -> io::Result<bool> {
    Elf::read(&Piece::whole(vmlinux)?)?.has_note(b"Xen", PVH_ENTRY)
}

/// Whether a kernel can call itself so; such a name is also safe in paths.
pub(crate) fn is_release(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._+~-".contains(&byte);
    name.len() <= LONGEST_RELEASE
        && name.starts_with(|first: char| first.is_ascii_digit())
        && name.bytes().all(is_allowed)
}

/// The release in an uncompressed kernel's banner, "Linux version RELEASE (…".
pub(crate) fn release(vmlinux: &File) -> io::Result<Option<String>> {
    let mut input = BufReader::new(Piece::whole(vmlinux)?);
    let mut window = Vec::new();
    // A banner may lie across two reads: this much of one is looked at again.
    let kept = BANNER.len() + LONGEST_RELEASE + 1;
    loop {
        let read = input.by_ref().take(1 << 20).read_to_end(&mut window)?;
        if let Some(found) = banner(&window) {
            return Ok(Some(found));
        }
        if read == 0 {
            return Ok(None);
        }
        window.drain(..window.len().saturating_sub(kept));
    }
}

fn banner(window: &[u8]) -> Option<String> {
    let starts = window.windows(BANNER.len()).enumerate().filter(|(_, part)| *part == BANNER);
    starts.map(|(at, _)| &window[at + BANNER.len()..]).find_map(|rest| {
        let end = rest.iter().take(LONGEST_RELEASE + 1).position(|&byte| byte == b' ')?;
        let name = std::str::from_utf8(&rest[..end]).ok()?;
        is_release(name).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::fixture::{bzimage, elf, file, mutations, vmlinux};

    fn written(image: &[u8]) -> io::Result<Vec<u8>> {
        let (from, to) = (file(image), tempfile::tempfile().unwrap());
        write_vmlinux(Piece::whole(&from).unwrap(), &to)?;
        let mut bytes = Vec::new();
        Piece::whole(&to).unwrap().read_to_end(&mut bytes).unwrap();
        Ok(bytes)
    }

    #[test]
    fn every_packing_of_a_bzimage_is_unpacked() {
        let kernel = vmlinux("6.12.1-test");
        assert!(written(&kernel).unwrap() == kernel);
        for packing in [Packing::Gzip, Packing::Xz, Packing::Zstd, Packing::Lz4] {
            assert!(written(&bzimage(&kernel, packing)).unwrap() == kernel, "{packing:?}");
        }
        let error = written(&bzimage(&kernel, Packing::Plain)).unwrap_err();
        assert!(error.to_string().contains("packed in a way"), "{error}");
    }

    #[test]
    fn four_sectors_of_setup_are_what_none_means() {
        let kernel = vmlinux("6.12.1-test");
        let mut image = bzimage(&kernel, Packing::Zstd);
        assert_eq!(image[0x1f1], 4);
        image[0x1f1] = 0;
        assert!(written(&image).unwrap() == kernel);
    }

    #[test]
    fn what_is_no_kernel_is_refused_in_words() {
        let kernel = vmlinux("6.12.1-test");
        let says = |image: &[u8], words: &str| {
            let error = written(image).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        says(b"", "neither");
        says(&[0; 4096], "neither");
        says(&kernel[..40], "no ELF");
        says(&elf(1, &[], &[]), "no program");
        says(&bzimage(b"something else", Packing::Zstd), "no ELF");
        let image = bzimage(&kernel, Packing::Zstd);
        says(&image[..image.len() - 9], "ends before");
        let mut old = image.clone();
        old[0x206] = 7;
        says(&old, "older");
        let mut lies = image.clone();
        let end = lies.len();
        lies[end - 1] = 0x7f;
        says(&lies, "says that it unpacks to");
        lies[end - 1] = 0;
        lies[end - 4] ^= 1;
        says(&lies, "as many bytes");
    }

    #[test]
    fn the_entry_and_the_release_are_found() {
        let kernel = file(&vmlinux("6.12.1+x-cloud-amd64"));
        assert!(has_pvh_entry(&kernel).unwrap());
        assert_eq!(release(&kernel).unwrap().unwrap(), "6.12.1+x-cloud-amd64");
        let other = file(&elf(2, &[(1, b"Linux version %s".to_vec())], &[]));
        assert!(!has_pvh_entry(&other).unwrap() && release(&other).unwrap().is_none());
    }

    #[test]
    fn a_banner_is_found_wherever_it_lies() {
        for at in (1 << 20) - 40..(1 << 20) + 3 {
            let mut long = file(&vec![b'L'; at]);
            long.write_all(b"Linux version 6.1.0-9 (x) and more").unwrap();
            assert_eq!(release(&long).unwrap().as_deref(), Some("6.1.0-9"), "{at}");
        }
        assert!(["6.1", "6.12.117+deb12-cloud-amd64"].into_iter().all(is_release));
        assert!(!["", "..", "x6", "6/1", "6 1"].into_iter().any(is_release) && !is_release(&"6".repeat(65)));
    }

    #[test]
    fn whatever_is_changed_in_an_image_is_survived() {
        let kernel = vmlinux("6.12.1-test");
        for packing in [Packing::Gzip, Packing::Xz, Packing::Zstd, Packing::Lz4] {
            for changed in mutations(&bzimage(&kernel, packing)[0x1f0..], 300) {
                let _ = written(&[&[0; 0x1f0][..], &changed].concat());
            }
        }
    }
}
