//! Images made by hand, byte by byte: layers that no sane tool writes, and the manifests around them.

use std::io::Write;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// How a layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// `sha256:…` of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    format!("sha256:{}", hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

/// One entry of a layer; names and targets go into the archive as they are.
#[derive(Debug, Clone)]
pub struct Entry {
    name: String,
    kind: tar::EntryType,
    mode: u32,
    owner: (u64, u64),
    target: String,
    device: (u32, u32),
    bytes: Vec<u8>,
    xattrs: Vec<(String, String)>,
}

impl Entry {
    fn new(name: &str, kind: tar::EntryType, mode: u32) -> Self {
        let (owner, target, device) = ((0, 0), String::new(), (0, 0));
        Self { name: name.to_owned(), kind, mode, owner, target, device, bytes: Vec::new(), xattrs: Vec::new() }
    }

    pub fn file(name: &str, bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_owned(), ..Self::new(name, tar::EntryType::Regular, 0o644) }
    }

    pub fn dir(name: &str) -> Self {
        Self::new(name, tar::EntryType::Directory, 0o755)
    }

    pub fn symlink(name: &str, target: &str) -> Self {
        Self { target: target.to_owned(), ..Self::new(name, tar::EntryType::Symlink, 0o777) }
    }

    pub fn hard_link(name: &str, target: &str) -> Self {
        Self { target: target.to_owned(), ..Self::new(name, tar::EntryType::Link, 0o644) }
    }

    /// A character device.
    pub fn device(name: &str, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::new(name, tar::EntryType::Char, 0o666) }
    }

    pub fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    pub fn owner(self, user: u64, group: u64) -> Self {
        Self { owner: (user, group), ..self }
    }

    pub fn xattr(mut self, name: &str, value: &str) -> Self {
        self.xattrs.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// A layer as a registry keeps it.
#[derive(Debug, Clone)]
pub struct Layer {
    pub bytes: Vec<u8>,
    pub packing: Packing,
    /// Digest of the archive before packing.
    pub diff_id: String,
}

impl Layer {
    pub fn new(entries: &[Entry], packing: Packing) -> Self {
        Self::of_archive(&archive(entries), packing)
    }

    /// The same layer with only the first bytes of what should be sent.
    pub fn cut(mut self, length: usize) -> Self {
        self.bytes.truncate(length);
        self
    }

    /// A layer of any bytes, also such as are no archive.
    pub fn of_archive(archive: &[u8], packing: Packing) -> Self {
        let bytes = match packing {
            Packing::Plain => archive.to_owned(),
            Packing::Gzip => {
                let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                writer.write_all(archive).and_then(|()| writer.finish()).expect("memory takes all bytes")
            }
            Packing::Zstd => zstd::encode_all(archive, 3).expect("memory takes all bytes"),
        };
        Self { bytes, packing, diff_id: digest(archive) }
    }

    /// One file of so many zeros: little to send, much to unpack.
    pub fn of_zeros(name: &str, length: u64) -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o644);
        header.set_size(length);
        raw_name(&mut header, name);
        header.set_cksum();
        let mut hash = Sha256::new();
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut add = |bytes: &[u8]| {
            hash.update(bytes);
            writer.write_all(bytes).expect("memory takes all bytes");
        };
        add(header.as_bytes());
        let zeros = vec![0; 1 << 20];
        let mut left = length.div_ceil(512) * 512 + 1024;
        while left > 0 {
            let step = left.min(zeros.len() as u64);
            add(&zeros[..usize::try_from(step).expect("a step is small")]);
            left -= step;
        }
        let diff_id = format!("sha256:{}", hash.finalize().iter().map(|b| format!("{b:02x}")).collect::<String>());
        let bytes = writer.finish().expect("memory takes all bytes");
        Self { bytes, packing: Packing::Gzip, diff_id }
    }

    /// The lowest layer of hand-made images that must run: the static busybox of the demo image, so that they can look at
    /// themselves.
    pub fn shell() -> Self {
        let busybox = crate::repository().join(".tools/demo-files/root/bin/busybox");
        let busybox = std::fs::read(busybox).expect("demo/build.sh was run");
        let links = ["sh", "cat", "ls", "stat", "sleep", "id", "readlink", "true", "test", "md5sum", "touch"];
        let mut entries = vec![Entry::dir("bin/"), Entry::file("bin/busybox", &busybox).mode(0o755)];
        entries.extend(links.iter().map(|name| Entry::symlink(&format!("bin/{name}"), "busybox")));
        entries.push(Entry::dir("tmp/").mode(0o1777));
        Self::new(&entries, Packing::Gzip)
    }

    pub fn digest(&self) -> String {
        digest(&self.bytes)
    }

    fn media_type(&self) -> &'static str {
        match self.packing {
            Packing::Plain => "application/vnd.oci.image.layer.v1.tar",
            Packing::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Packing::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for entry in entries {
        let pairs = entry.xattrs.iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.as_bytes()));
        let mut pairs: Vec<_> = pairs.collect();
        // What a header has no room for.
        let name = if entry.name.len() > 100 { "too long" } else { &entry.name };
        if name != entry.name {
            pairs.push(("path".to_owned(), entry.name.as_bytes()));
        }
        if !pairs.is_empty() {
            let pairs = pairs.iter().map(|(name, value)| (name.as_str(), *value));
            archive.append_pax_extensions(pairs).expect("memory takes all bytes");
        }
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(entry.kind);
        header.set_mode(entry.mode);
        header.set_uid(entry.owner.0);
        header.set_gid(entry.owner.1);
        header.set_mtime(1_000_000_000);
        header.set_size(entry.bytes.len() as u64);
        header.set_device_major(entry.device.0).expect("a ustar header has device numbers");
        header.set_device_minor(entry.device.1).expect("a ustar header has device numbers");
        raw_name(&mut header, name);
        let target = entry.target.as_bytes();
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target);
        header.set_cksum();
        archive.append(&header, entry.bytes.as_slice()).expect("memory takes all bytes");
    }
    archive.into_inner().expect("memory takes all bytes")
}

/// The tar crate refuses names that a hostile archive has, so the bytes are set as they are.
fn raw_name(header: &mut tar::Header, name: &str) {
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
}

/// An image: its manifest, its configuration and its layers.
#[derive(Debug, Clone)]
pub struct Image {
    pub manifest: Vec<u8>,
    pub config: Vec<u8>,
    pub layers: Vec<Layer>,
}

impl Image {
    /// An image of these layers for `amd64`, with `config` merged into its configuration.
    pub fn new(layers: Vec<Layer>, config: Value) -> Self {
        Self::for_architecture("amd64", layers, config)
    }

    pub fn for_architecture(architecture: &str, layers: Vec<Layer>, config: Value) -> Self {
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let config = json!({
            "architecture": architecture, "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = config.to_string().into_bytes();
        let descriptors: Vec<_> = layers
            .iter()
            .map(|l| json!({"mediaType": l.media_type(), "digest": l.digest(), "size": l.bytes.len()}))
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": descriptors,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest(&config), "size": config.len(),
            },
        });
        Self { manifest: manifest.to_string().into_bytes(), config, layers }
    }

    pub fn digest(&self) -> String {
        digest(&self.manifest)
    }
}

/// An index over images of several architectures.
pub fn index(images: &[(&str, &Image)]) -> Vec<u8> {
    let manifests: Vec<_> = images
        .iter()
        .map(|(architecture, image)| {
            json!({
                "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": image.digest(),
                "size": image.manifest.len(), "platform": {"architecture": architecture, "os": "linux"},
            })
        })
        .collect();
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests,
    });
    index.to_string().into_bytes()
}
