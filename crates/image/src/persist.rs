//! What the image store keeps on disk, version 1, and how it is written.
//!
//! ```text
//! index.json           which references name which images (replaced whole: tmp, fsync, rename, fsync of the folder)
//! blobs/HEX            manifests and configurations
//! layers/HEX.erofs     layers, by the digest of their uncompressed archive
//! layers/HEX.unlisted  directories such a layer does not list, each ended by a zero byte; absent when there are none
//! partial/HEX.partial  downloads that broke off, by the digest of the compressed blob; kept for a week
//! tmp/                 being written; emptied at start
//! ```

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use joey_model::Digest;
use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;
/// Downloads that nobody has gone on with for so long are removed at the start.
const KEEP_PARTIAL: Duration = Duration::from_secs(7 * 24 * 3600);

#[derive(Debug, Serialize, Deserialize)]
struct Index {
    version: u32,
    images: Vec<Record>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub id: String,
    pub manifest: String,
    /// Empty: the references have moved on to other images.
    pub references: Vec<String>,
    pub pulled_at: jiff::Timestamp,
}

#[derive(Debug, Clone)]
pub(crate) struct Folders {
    root: PathBuf,
}

impl Folders {
    /// Makes the folders and removes half-written files.
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        let folders = Self { root: root.to_owned() };
        let temporary = root.join("tmp");
        match fs::remove_dir_all(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        for name in ["blobs", "layers", "partial", "tmp"] {
            fs::create_dir_all(root.join(name))?;
        }
        fs::set_permissions(root, Permissions::from_mode(0o700))?;
        for entry in fs::read_dir(root.join("partial"))? {
            let entry = entry?;
            let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
            if age > KEEP_PARTIAL {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(folders)
    }

    pub(crate) fn layer(&self, diff_id: &Digest) -> PathBuf {
        self.root.join("layers").join(format!("{}.erofs", diff_id.hex()))
    }

    /// The list of directories a layer leads through without listing them.
    pub(crate) fn unlisted(&self, layer: &Digest) -> PathBuf {
        self.root.join("layers").join(format!("{}.unlisted", layer.hex()))
    }

    /// Written before the layer gets its name, so that no layer is ever without its list.
    pub(crate) fn write_unlisted(&self, layer: &Digest, paths: &[Vec<u8>]) -> io::Result<()> {
        let file = self.unlisted(layer);
        if paths.is_empty() {
            return match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        let bytes: Vec<u8> = paths.iter().flat_map(|path| path.iter().chain(&[0])).copied().collect();
        self.replace(&file, &bytes)
    }

    pub(crate) fn read_unlisted(&self, layer: &Digest) -> io::Result<HashSet<Vec<u8>>> {
        match fs::read(self.unlisted(layer)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(HashSet::new()),
            other => Ok(other?.split(|&byte| byte == 0).filter(|path| !path.is_empty()).map(<[u8]>::to_vec).collect()),
        }
    }

    /// Removes a layer from the store.
    pub(crate) fn remove_layer(&self, layer: &Digest) -> io::Result<()> {
        fs::remove_file(self.layer(layer))?;
        self.write_unlisted(layer, &[])
    }

    /// The layers that are whole.
    pub(crate) fn layers(&self) -> io::Result<Vec<Digest>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.root.join("layers"))? {
            let name = entry?.file_name();
            let hex = name.to_str().and_then(|name| name.strip_suffix(".erofs")).unwrap_or_default();
            found.extend(Digest::parse(&format!("sha256:{hex}")).ok());
        }
        Ok(found)
    }

    pub(crate) fn partial(&self, blob: &Digest) -> PathBuf {
        self.root.join("partial").join(format!("{}.partial", blob.hex()))
    }

    pub(crate) fn temporary(&self, name: &str) -> PathBuf {
        self.root.join("tmp").join(name)
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.hex())
    }

    pub(crate) fn read_blob(&self, digest: &Digest) -> io::Result<Vec<u8>> {
        fs::read(self.blob(digest))
    }

    pub(crate) fn write_blob(&self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        let path = self.blob(digest);
        if path.exists() { Ok(()) } else { self.replace(&path, bytes) }
    }

    /// Removes the blobs that `needed` does not hold.
    pub(crate) fn keep_blobs(&self, needed: &HashSet<Digest>) -> io::Result<()> {
        for entry in fs::read_dir(self.root.join("blobs"))? {
            let entry = entry?;
            let digest = Digest::parse(&format!("sha256:{}", entry.file_name().to_string_lossy()));
            if !digest.is_ok_and(|digest| needed.contains(&digest)) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    pub(crate) fn read_index(&self) -> io::Result<Vec<Record>> {
        let bytes = match fs::read(self.root.join("index.json")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let index: Index = serde_json::from_slice(&bytes)?;
        if index.version != VERSION {
            return Err(io::Error::other(format!("version {} of its index is unknown", index.version)));
        }
        Ok(index.images)
    }

    pub(crate) fn write_index(&self, images: Vec<Record>) -> io::Result<()> {
        let bytes = serde_json::to_vec(&Index { version: VERSION, images })?;
        self.replace(&self.root.join("index.json"), &bytes)?;
        joey_model::checkpoint::reached("image-index-written");
        Ok(())
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = self.temporary(&format!("{name}.{:?}", std::thread::current().id()));
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().create(true).write(true).truncate(true).open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, path)
        };
        write().inspect_err(|_| drop(fs::remove_file(&temporary)))?;
        sync_parent(path)
    }
}

/// Makes a rename durable.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}
