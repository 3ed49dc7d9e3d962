//! Images from files: an OCI layout (folder or tar) or a docker-archive tar (`docker save`).
//!
//! Formats: OCI image layout 1.0 (`index.json`, `blobs/sha256/HEX`); docker-archive (`manifest.json`). A folder's links are
//! not followed; a tar's members are read where they lie.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use joey_model::{Digest, ImageRef};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::error::{ImageError, Problem};
use crate::images::{Image, Images, single};
use crate::oci::{self, Descriptor, MAX_DOCUMENT, Search};
use crate::tar_stream::TarStream;

/// Where members are read from.
enum Archive {
    Folder(PathBuf),
    /// Offset and length of each member, by its name without leading `./`; links by their targets.
    Tar {
        path: PathBuf,
        members: HashMap<String, (u64, u64)>,
        links: HashMap<String, String>,
    },
}

#[derive(Deserialize)]
struct DockerManifest {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "Layers")]
    layers: Vec<String>,
    #[serde(rename = "RepoTags", default)]
    tags: Option<Vec<String>>,
}

/// An image found in an archive.
struct Found {
    manifest: Vec<u8>,
    config: Vec<u8>,
    /// Member name of each layer, and its digest where the archive has one.
    layers: Vec<(String, Option<Descriptor>)>,
}

fn malformed(detail: impl ToString) -> Problem {
    Problem::Malformed { object: "archive", detail: detail.to_string() }
}

impl Images {
    /// Stores the image in `path` under `reference`. An archive of several images must hold one of that name.
    pub async fn import(&self, path: impl Into<PathBuf>, reference: &ImageRef) -> Result<Arc<Image>, ImageError> {
        let result = self.import_inner(path.into(), reference).await;
        if result.is_err() {
            self.inner.collect().await;
        }
        result.map_err(|problem| problem.of(reference))
    }

    async fn import_inner(&self, path: PathBuf, reference: &ImageRef) -> Result<Arc<Image>, Problem> {
        let name = reference.clone();
        let open = move || -> Result<(Archive, Found), Problem> {
            let archive = Archive::open(path)?;
            let found = archive.find(&name)?;
            Ok((archive, found))
        };
        let opened = tokio::task::spawn_blocking(open).await;
        let (archive, found) = opened.unwrap_or_else(|error| Err(malformed(error)))?;
        let (config, diff_ids) = oci::config(&found.config, &oci::host_platform())?;
        if diff_ids.len() != found.layers.len() {
            return Err(malformed(format!("{} layers where {} are configured", found.layers.len(), diff_ids.len())));
        }
        let _pins = self.inner.pin(&diff_ids);
        let limit = self.inner.config.max_layer_bytes.min(self.inner.config.max_image_bytes);
        for (diff_id, (member, blob)) in diff_ids.iter().zip(&found.layers) {
            if !self.inner.folders.layer(diff_id).exists() {
                let source = archive.member(member)?;
                self.inner.layers.store(source, blob.as_ref(), diff_id, limit).await?;
            }
            let bytes =
                self.inner.stored_size(&diff_ids[..=diff_ids.iter().position(|d| d == diff_id).unwrap_or(0)])?;
            if bytes > self.inner.config.max_image_bytes {
                return Err(Problem::ImageTooLarge { limit: self.inner.config.max_image_bytes });
            }
        }
        let size = self.inner.stored_size(&diff_ids)?;
        let image = Image {
            reference: reference.clone(),
            id: digest_of(&found.config),
            manifest: digest_of(&found.manifest),
            config,
            layers: diff_ids,
            size,
            pulled_at: jiff::Timestamp::now(),
        };
        self.inner.record(image, &found.config, &found.manifest).await
    }
}

fn digest_of(bytes: &[u8]) -> Digest {
    Digest::from_sha256(&Sha256::digest(bytes).into())
}

impl Archive {
    fn open(path: PathBuf) -> Result<Self, Problem> {
        let metadata = fs::metadata(&path).map_err(|error| malformed(format!("it cannot be opened: {error}")))?;
        if metadata.is_dir() {
            return Ok(Self::Folder(path));
        }
        let (mut members, mut links) = (HashMap::new(), HashMap::new());
        let file = File::open(&path).map_err(malformed)?;
        let mut tar = TarStream::new(BufReader::with_capacity(1 << 20, file));
        while let Some(entry) = tar.next().map_err(|error| malformed(format!("it is not a plain tar: {error}")))? {
            let name = String::from_utf8_lossy(&entry.path).trim_start_matches("./").to_owned();
            if members.len() + links.len() > 100_000 {
                return Err(malformed("it has too many members"));
            }
            match entry.kind {
                0 | b'0' => drop(members.insert(name, (tar.position(), entry.size))),
                b'1' | b'2' => {
                    let target = String::from_utf8_lossy(&entry.link).into_owned();
                    let target = if entry.kind == b'2' { resolve(&name, &target) } else { target };
                    links.insert(name, target);
                }
                _ => {}
            }
        }
        Ok(Self::Tar { path, members, links })
    }

    fn member(&self, name: &str) -> Result<Box<dyn Read + Send>, Problem> {
        let missing = || malformed(format!("it lacks \"{}\"", name.escape_default()));
        match self {
            Self::Folder(root) => {
                let relative = Path::new(name);
                let plain = relative.components().all(|part| matches!(part, std::path::Component::Normal(_)));
                let mut options = OpenOptions::new();
                options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
                let file = options.open(root.join(relative)).map_err(|_| missing())?;
                let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
                if plain && is_file { Ok(Box::new(file)) } else { Err(missing()) }
            }
            Self::Tar { path, members, links } => {
                let target = links.get(name).map_or(name, String::as_str);
                let &(offset, size) = members.get(target).ok_or_else(missing)?;
                let open = || -> io::Result<File> {
                    let mut file = File::open(path)?;
                    file.seek(SeekFrom::Start(offset))?;
                    Ok(file)
                };
                Ok(Box::new(open().map_err(malformed)?.take(size)))
            }
        }
    }

    fn document(&self, name: &str) -> Result<Vec<u8>, Problem> {
        let mut bytes = Vec::new();
        let read = self.member(name)?.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes);
        match read.map_err(malformed)? as u64 {
            0..=MAX_DOCUMENT => Ok(bytes),
            _ => Err(malformed(format!("\"{}\" is over {MAX_DOCUMENT} bytes", name.escape_default()))),
        }
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Problem> {
        let bytes = self.document(&blob_name(&descriptor.digest))?;
        let actual = digest_of(&bytes);
        if actual == descriptor.digest {
            return Ok(bytes);
        }
        let expected = descriptor.digest.clone();
        Err(Problem::Digest { object: "archived document".into(), expected, actual: actual.to_string() })
    }

    fn find(&self, reference: &ImageRef) -> Result<Found, Problem> {
        if let Ok(index) = self.document("index.json") {
            return self.find_in_layout(&index, reference);
        }
        let manifest =
            self.document("manifest.json").map_err(|_| malformed("it has no index.json and no manifest.json"))?;
        let images: Vec<DockerManifest> = serde_json::from_slice(&manifest).map_err(malformed)?;
        let named = |image: &&DockerManifest| {
            let mut tags = image.tags.iter().flatten();
            tags.any(|tag| ImageRef::parse(tag).is_ok_and(|tag| tag == *reference))
        };
        let image = match &images[..] {
            [image] => image,
            several => {
                several.iter().find(named).ok_or_else(|| malformed("it holds several images, none of this name"))?
            }
        };
        let config = self.document(&image.config)?;
        let layers = image.layers.iter().map(|layer| (layer.clone(), None)).collect();
        Ok(Found { manifest, config, layers })
    }

    fn find_in_layout(&self, index: &[u8], reference: &ImageRef) -> Result<Found, Problem> {
        let mut index = index.to_vec();
        // A layout's index names images by annotation, and each of these may be an index of platforms.
        if let Some(digest) = named_in_layout(&index, reference)? {
            index = self.document(&blob_name(&digest))?;
            if digest_of(&index) != digest {
                return Err(malformed(format!("blob {digest} has another digest")));
            }
        }
        let mut search = Search::new(oci::host_platform());
        while let Some(chosen) = search.next(&index)? {
            index = self.blob(&chosen)?;
        }
        let (config, layers) = single(&index)?;
        let config = self.blob(&config)?;
        let layers = layers.into_iter().map(|layer| (blob_name(&layer.digest), Some(layer))).collect();
        Ok(Found { manifest: index, config, layers })
    }
}

/// The one manifest of a layout's index, or the one whose name annotation is the reference or its tag.
fn named_in_layout(index: &[u8], reference: &ImageRef) -> Result<Option<Digest>, Problem> {
    #[derive(Deserialize)]
    struct Index {
        #[serde(default)]
        manifests: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        digest: String,
        #[serde(default)]
        annotations: Option<HashMap<String, String>>,
    }
    let index: Index = serde_json::from_slice(index).map_err(malformed)?;
    let whole = reference.to_string();
    let is_named = |entry: &&Entry| {
        let annotations = entry.annotations.iter().flatten();
        annotations.into_iter().any(|(key, value)| {
            let names = key == "org.opencontainers.image.ref.name" || key == "io.containerd.image.name";
            names
                && (Some(value.as_str()) == reference.tag()
                    || ImageRef::parse(value).is_ok_and(|r| r.to_string() == whole))
        })
    };
    let entry = match &index.manifests[..] {
        [only] => Some(only),
        several => several.iter().find(is_named),
    };
    entry.map(|entry| Digest::parse(&entry.digest).map_err(malformed)).transpose()
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// The member a symbolic link names, both inside the archive.
fn resolve(link: &str, target: &str) -> String {
    let mut parts: Vec<&str> = link.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "" | "." => {}
            name => parts.push(name),
        }
    }
    parts.join("/")
}
