//! One layer, from a stream of compressed bytes to an EROFS image: hash, decompress, hash again, read tar, write.
//!
//! Runs on a blocking thread; memory and disk are bounded whatever the stream holds. Nothing is trusted until both digests
//! have matched, so the caller names the result only after this returns.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use joey_model::Digest;
use sha2::{Digest as _, Sha256};

use crate::erofs::{self, Blocks, INLINE_MAX, MAX_XATTRS};
use crate::error::Problem;
use crate::tar_stream::{Entry, TarStream};
use crate::tree::{Kind, Meta, Tree, TreeError, Xattrs, shown};

/// What the layer must turn out to be.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    /// Digest and length of the bytes as they come; `None` for archives that do not say.
    pub blob: Option<(Digest, u64)>,
    /// Digest of the uncompressed archive.
    pub diff_id: Digest,
    /// Most uncompressed bytes.
    pub limit: u64,
}

#[derive(Debug, thiserror::Error)]
#[error("unpacked size exceeds the limit")]
struct OverLimit;

/// Marks a failure of the host's disk, which is not the layer's fault.
#[derive(Debug, thiserror::Error)]
#[error("writing the layer failed: {0}")]
pub(crate) struct WriteFailed(pub io::Error);

/// Marks a failure of the source (download given up, file unreadable), which is not the layer's fault.
#[derive(Debug, thiserror::Error)]
#[error("the source of the layer ended early: {0}")]
pub(crate) struct SourceFailed(pub String);

/// Hashes and counts what passes through.
struct Hashing<R> {
    inner: R,
    hash: Sha256,
    count: u64,
    limit: u64,
}

impl<R: Read> Hashing<R> {
    fn new(inner: R, limit: u64) -> Self {
        Self { inner, hash: Sha256::new(), count: 0, limit }
    }

    fn digest(self) -> (Digest, u64, R) {
        (Digest::from_sha256(&self.hash.finalize().into()), self.count, self.inner)
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.count += count as u64;
        if self.count > self.limit {
            return Err(io::Error::other(OverLimit));
        }
        Ok(count)
    }
}

enum Decoder<R: BufRead> {
    Plain(R),
    Gzip(Box<flate2::bufread::MultiGzDecoder<R>>),
    Zstd(zstd::stream::read::Decoder<'static, R>),
}

impl<R: BufRead> Decoder<R> {
    /// By the first bytes rather than the media type: registries hold layers whose type is wrong.
    fn new(mut input: R) -> io::Result<Self> {
        let start = input.fill_buf()?;
        Ok(if start.starts_with(&[0x1f, 0x8b]) {
            Self::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(input)))
        } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || (start.len() > 3 && start[1..4] == [0x2a, 0x4d, 0x18])
        {
            Self::Zstd(zstd::stream::read::Decoder::with_buffer(input)?)
        } else {
            Self::Plain(input)
        })
    }

    fn into_inner(self) -> R {
        match self {
            Self::Plain(inner) => inner,
            Self::Gzip(decoder) => decoder.into_inner(),
            Self::Zstd(decoder) => decoder.finish(),
        }
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(inner) => inner.read(buffer),
            Self::Gzip(decoder) => decoder.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

/// Converts `source` into the EROFS image `target`, which is made here and holds nothing usable after an error.
/// Returns the directories the layer leads through without listing them.
pub(crate) fn convert(source: impl Read, expected: &Expected, target: &Path) -> Result<Vec<Vec<u8>>, Problem> {
    let diff_id = &expected.diff_id;
    let result = File::create(target).map_err(|error| io::Error::other(WriteFailed(error)));
    result.and_then(|file| stream(source, expected, file)).map_err(|error| explain(error, expected)).and_then(|done| {
        let (blob, unpacked, unlisted) = done;
        if let (Some((digest, size)), (actual, count)) = (&expected.blob, &blob) {
            check(&format!("layer {digest}"), digest, actual)?;
            if size != count {
                let detail = format!("it has {count} bytes where the manifest says {size}");
                return Err(Problem::Layer { layer: digest.clone(), detail });
            }
        }
        check("the unpacked layer", diff_id, &unpacked)?;
        Ok(unlisted)
    })
}

fn check(object: &str, expected: &Digest, actual: &Digest) -> Result<(), Problem> {
    if expected == actual {
        return Ok(());
    }
    Err(Problem::Digest { object: object.to_owned(), expected: expected.clone(), actual: actual.to_string() })
}

/// The compressed bytes' digest and count, the digest of the uncompressed ones, and the directories not listed.
type Sums = ((Digest, u64), Digest, Vec<Vec<u8>>);

fn stream(source: impl Read, expected: &Expected, file: File) -> io::Result<Sums> {
    let compressed = Hashing::new(source, u64::MAX);
    let decoder = Decoder::new(BufReader::with_capacity(128 << 10, compressed))?;
    let unpacked = Hashing::new(decoder, expected.limit);
    let mut tar = TarStream::new(BufReader::with_capacity(128 << 10, unpacked));
    let mut blocks = Blocks::new(file);
    let mut tree = Tree::new();
    let mut logical = 0u64;
    while let Some(entry) = tar.next()? {
        logical = logical.saturating_add(entry.size);
        if logical > expected.limit {
            return Err(io::Error::other(OverLimit));
        }
        add(&mut tree, &mut blocks, &mut tar, entry)?;
    }
    let mut rest = tar.into_inner();
    io::copy(&mut rest, &mut io::sink())?;
    let (diff_id, _, decoder) = rest.into_inner().digest();
    let mut rest = decoder.into_inner();
    io::copy(&mut rest, &mut io::sink())?;
    let (blob, blob_count, _) = rest.into_inner().digest();
    // Both digests are compared by the caller; an image of wrong content never gets its name.
    erofs::finish(&tree, blocks).map_err(|error| io::Error::other(WriteFailed(error)))?;
    Ok(((blob, blob_count), diff_id, tree.unlisted()))
}

fn add<R: Read>(tree: &mut Tree, blocks: &mut Blocks, tar: &mut TarStream<R>, mut entry: Entry) -> io::Result<()> {
    let written = |error| io::Error::other(WriteFailed(error));
    let meta = meta(&entry)?;
    let xattrs = keep_xattrs(&entry)?;
    let path = std::mem::take(&mut entry.path);
    let kind = match entry.kind {
        b'1' => return tree.add_link(&path, &entry.link).map_err(tree_failed),
        0 | b'0' | b'7' if entry.size <= INLINE_MAX => {
            let mut bytes = Vec::with_capacity(entry.size as usize);
            tar.contents(&entry, |piece| {
                bytes.extend_from_slice(piece);
                Ok(())
            })?;
            tree.charge(bytes.len()).map_err(tree_failed)?;
            Kind::Inline(bytes.into())
        }
        0 | b'0' | b'7' => {
            let block = blocks.next().map_err(written)?;
            tar.contents(&entry, |piece| blocks.write(piece).map_err(written))?;
            blocks.pad();
            Kind::Blocks { block, size: entry.size }
        }
        b'2' if entry.link.is_empty() || entry.link.len() >= 4096 || entry.link.contains(&0) => {
            return Err(io::Error::other(format!("symbolic link \"{}\" has an unusable target", shown(&path))));
        }
        b'2' => {
            tree.charge(entry.link.len()).map_err(tree_failed)?;
            Kind::Symlink(entry.link.into())
        }
        b'3' | b'4' if entry.device.0 >= 1 << 12 || entry.device.1 >= 1 << 20 => {
            return Err(io::Error::other(format!("device \"{}\" has an impossible number", shown(&path))));
        }
        b'3' => Kind::Character { major: entry.device.0, minor: entry.device.1 },
        b'4' => Kind::Block { major: entry.device.0, minor: entry.device.1 },
        b'5' => Kind::Directory(BTreeMap::new()),
        b'6' => Kind::Fifo,
        other => {
            let kind = char::from(other).escape_default();
            return Err(io::Error::other(format!("entry \"{}\" has unknown type '{kind}'", shown(&path))));
        }
    };
    tree.add(&path, meta, kind, xattrs).map_err(tree_failed)
}

fn tree_failed(error: TreeError) -> io::Error {
    io::Error::other(error)
}

fn meta(entry: &Entry) -> io::Result<Meta> {
    let id = |value: u64| {
        let id = u32::try_from(value).ok().filter(|&id| id != u32::MAX);
        id.ok_or_else(|| io::Error::other(format!("\"{}\" has an impossible owner", shown(&entry.path))))
    };
    Ok(Meta { mode: (entry.mode & 0o7777) as u16, uid: id(entry.uid)?, gid: id(entry.gid)?, mtime: entry.mtime })
}

/// The attributes that go along: never overlayfs' own, with which a layer could redirect lookups; only kinds EROFS holds.
fn keep_xattrs(entry: &Entry) -> io::Result<Xattrs> {
    let mut kept = Xattrs::new();
    let mut total = 0;
    for (name, value) in &entry.xattrs {
        let is_overlay = name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
        if is_overlay || erofs::split_xattr(name).is_none() {
            continue;
        }
        total += name.len() + value.len() + 8;
        if value.len() > usize::from(u16::MAX) || total > MAX_XATTRS {
            let path = shown(&entry.path);
            return Err(io::Error::other(format!("\"{path}\" has larger extended attributes than can be kept")));
        }
        kept.insert(name.clone(), value.clone());
    }
    Ok(kept)
}

fn explain(error: io::Error, expected: &Expected) -> Problem {
    let layer = expected.blob.as_ref().map_or(&expected.diff_id, |(digest, _)| digest).clone();
    let inner = error.get_ref();
    if inner.is_some_and(|inner| inner.is::<OverLimit>()) {
        return Problem::LayerTooLarge { layer, limit: expected.limit };
    }
    if let Some(WriteFailed(cause)) = inner.and_then(|inner| inner.downcast_ref()) {
        return Problem::store("write a layer", cause);
    }
    let detail = match (error.kind(), inner) {
        (io::ErrorKind::UnexpectedEof, _) => "its compressed data ends early".to_owned(),
        _ => error.to_string(),
    };
    Problem::Layer { layer, detail }
}
