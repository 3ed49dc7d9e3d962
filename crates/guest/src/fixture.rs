//! For tests: small kernels, modules and packages, and what becomes of bytes that are changed at random.

use std::fs::File;
use std::io::{Read, Write};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::packing::Packing;

/// Changed copies of some bytes, the same ones each time: cut off, and with bytes and numbers replaced.
pub(crate) fn mutations(bytes: &[u8], count: usize) -> impl Iterator<Item = Vec<u8>> {
    let mut rng = StdRng::seed_from_u64(bytes.len() as u64);
    (0..count).map(move |_| {
        let mut changed = bytes.to_vec();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..changed.len().max(1)).min(changed.len());
            let number: u64 = match rng.random_range(0..5) {
                0 => u64::MAX,
                1 => rng.random_range(0..64),
                2 => bytes.len() as u64 - rng.random_range(0..=bytes.len().min(64)) as u64,
                3 => 1 << rng.random_range(0..64),
                _ => rng.random(),
            };
            let width = [1, 2, 4, 8][rng.random_range(0..4)].min(changed.len() - at);
            changed[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        }
        if rng.random_ratio(1, 8) {
            changed.truncate(rng.random_range(0..=changed.len()));
        }
        changed
    })
}

pub(crate) fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

pub(crate) fn pack(bytes: &[u8], packing: Packing) -> Vec<u8> {
    match packing {
        Packing::Plain => bytes.to_vec(),
        Packing::Gzip => {
            let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            packer.write_all(bytes).unwrap();
            packer.finish().unwrap()
        }
        Packing::Xz => {
            let options = lzma_rust2::XzOptions::with_preset(0);
            let mut packer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
            packer.write_all(bytes).unwrap();
            packer.finish().unwrap()
        }
        Packing::Zstd => zstd::encode_all(bytes, 1).unwrap(),
        Packing::Lz4 => {
            let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
            for block in bytes.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                packed.extend((block.len() as u32).to_le_bytes());
                packed.extend(block);
            }
            packed
        }
    }
}

/// An entry of a table of notes.
pub(crate) fn note(owner: &[u8], kind: u32, text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in [owner.len() as u32, text.len() as u32, kind] {
        bytes.extend(number.to_le_bytes());
    }
    for part in [owner, text] {
        bytes.extend(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// An ELF file of this `e_type`, with these segments (type, contents) and sections.
pub(crate) fn elf(kind: u16, segments: &[(u32, Vec<u8>)], sections: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut body, mut headers, start) = (Vec::new(), Vec::new(), 64 + 56 * segments.len() as u64);
    for (kind, contents) in segments {
        headers.extend(kind.to_le_bytes());
        headers.extend([0; 4]);
        let size = contents.len() as u64;
        for number in [start + body.len() as u64, 0, 0, size, size, 4] {
            headers.extend(number.to_le_bytes());
        }
        body.extend(contents);
    }
    let names: String = sections.iter().map(|(name, _)| format!("{name}\0")).collect();
    let mut table = Vec::new();
    let mut name_at = 0u32;
    for (name, contents) in sections.iter().chain(&[("", names.as_bytes())]) {
        table.extend(name_at.to_le_bytes());
        table.extend([0; 20]);
        table.extend((start + body.len() as u64).to_le_bytes());
        table.extend((contents.len() as u64).to_le_bytes());
        table.extend([0; 24]);
        body.extend(*contents);
        name_at += name.len() as u32 + 1;
    }
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend([kind.to_le_bytes(), 62u16.to_le_bytes()].concat());
    file.extend(1u32.to_le_bytes());
    for number in [0x1000, 64, start + body.len() as u64] {
        file.extend(number.to_le_bytes());
    }
    file.extend([0; 4]);
    for number in [64, 56, segments.len(), 64, sections.len() + 1, sections.len()] {
        file.extend((number as u16).to_le_bytes());
    }
    [file, headers, body, table].concat()
}

/// A kernel that can be started by its PVH entry.
pub(crate) fn vmlinux(release: &str) -> Vec<u8> {
    let banner = format!("Linux version %s\0Linux version {release} (someone@somewhere) #1 SMP\n").into_bytes();
    let notes = [note(b"Linux\0", 1, b"x"), note(b"Xen\0", 18, &[0; 8])].concat();
    elf(2, &[(1, banner), (4, notes)], &[])
}

/// A bzImage of it, with four sectors of setup code.
pub(crate) fn bzimage(kernel: &[u8], packing: Packing) -> Vec<u8> {
    let mut payload = pack(kernel, packing);
    if packing != Packing::Gzip {
        payload.extend((kernel.len() as u32).to_le_bytes());
    }
    let mut image = vec![0; 5 * 512];
    image[0x1f1] = 4;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    image.extend([0; 16]);
    image.extend(payload);
    image
}

/// A module that needs these.
pub(crate) fn module(release: &str, depends: &str, softdep: &str) -> Vec<u8> {
    let info = format!("depends={depends}\0softdep={softdep}\0vermagic={release} SMP mod_unload \0");
    let mut file = elf(1, &[], &[(".text", b"x"), (".modinfo", info.as_bytes())]);
    file.extend(b"~Module signature appended~\n");
    file
}

/// A program that is linked statically.
pub(crate) fn agent() -> Vec<u8> {
    elf(3, &[(1, b"agent".to_vec())], &[])
}

/// An `ar` archive.
pub(crate) fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = b"!<arch>\n".to_vec();
    for (name, contents) in members {
        archive.extend(format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100644, contents.len()).bytes());
        archive.extend(*contents);
        archive.resize(archive.len().next_multiple_of(2), b'\n');
    }
    archive
}

/// A tar archive, with long paths as GNU has them.
pub(crate) fn data<P: AsRef<str>>(files: &[(P, Vec<u8>)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, contents) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, path.as_ref(), contents.as_slice()).unwrap();
    }
    archive.into_inner().unwrap()
}

/// A package of a kernel with a few modules; `packing` is that of its files.
pub(crate) fn deb(release: &str, packing: Packing) -> Vec<u8> {
    let module = |path: &str, depends: &str| {
        let packed = pack(&module(release, depends, "pre: crc32c"), Packing::Xz);
        (format!("./lib/modules/{release}/kernel/{path}.ko.xz"), packed)
    };
    let files = [
        (format!("./boot/config-{release}"), b"CONFIG_PVH=y".to_vec()),
        (format!("./boot/vmlinuz-{release}"), bzimage(&vmlinux(release), Packing::Zstd)),
        module("drivers/virtio/virtio_mmio", ""),
        module("drivers/block/virtio_blk", ""),
        module("drivers/net/virtio_net", "net_failover"),
        module("drivers/net/net_failover", "failover"),
        module("net/core/failover", ""),
        module("drivers/char/hw_random/virtio-rng", ""),
        module("fs/erofs/erofs", "libcrc32c"),
        module("lib/libcrc32c", ""),
        module("fs/overlayfs/overlay", ""),
        module("fs/nfs/nfs", "libcrc32c,sunrpc"),
        module("net/sunrpc/sunrpc", ""),
        (format!("./lib/modules/{release}/modules.builtin"), b"kernel/drivers/char/virtio_console.ko\n".to_vec()),
    ];
    let name = match packing {
        Packing::Plain => "data.tar",
        Packing::Gzip => "data.tar.gz",
        Packing::Xz => "data.tar.xz",
        Packing::Zstd => "data.tar.zst",
        Packing::Lz4 => "data.tar.lz4",
    };
    ar(&[("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (name, &pack(&data(&files), packing))])
}

/// All that a reader has.
pub(crate) fn all(mut reader: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    bytes
}
