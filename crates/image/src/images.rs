//! The host's images: what is stored under which reference, and what holds layers in the store.
//!
//! ```text
//! pull/import:  pin layers → store layers → write blobs → write index → known     (failure: unpin, collect)
//! remove:       write index without it → forget → collect what no image and no pull needs
//! ```

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use joey_api::image::ImageSummary;
use joey_model::{Digest, ImageRef};

use crate::error::{ImageError, Problem};
use crate::flight::Layers;
use crate::locks::Locks;
use crate::mount::Mounts;
use crate::oci::{self, Document, ImageConfig};
use crate::persist::{Folders, Record};
use crate::supplement;
use crate::tokens::Tokens;

/// How images are kept and fetched.
#[derive(Debug, Clone)]
pub struct Config {
    /// Folder of the store.
    pub root: PathBuf,
    /// Folder of the layers' mount points.
    pub mounts: PathBuf,
    /// Registries (`HOST[:PORT]`) spoken to in plain http; those on loopback always are.
    pub plain_http_registries: Vec<String>,
    /// Most bytes of one layer, uncompressed.
    pub max_layer_bytes: u64,
    /// Most bytes of all layers of an image, as stored, and of what is made to stack them.
    pub max_image_bytes: u64,
    /// Layers downloaded at the same time, over all pulls.
    pub parallel_downloads: usize,
    /// A docker configuration file whose `auths` are used where a pull brings no credentials.
    pub docker_config: Option<PathBuf>,
    /// Longest wait for a registry's next bytes.
    pub idle_timeout: Duration,
    /// How often the token services of registries are called.
    pub token_guard: joey_guard::Limits,
}

impl Config {
    /// 16 GiB a layer, 64 GiB an image, four downloads, 30 s of silence.
    pub fn new(root: impl Into<PathBuf>, mounts: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            mounts: mounts.into(),
            plain_http_registries: Vec::new(),
            max_layer_bytes: 16 << 30,
            max_image_bytes: 64 << 30,
            parallel_downloads: 4,
            docker_config: None,
            idle_timeout: Duration::from_secs(30),
            token_guard: joey_guard::Limits::default(),
        }
    }
}

/// An image that is whole in the store.
#[derive(Debug, Clone)]
pub struct Image {
    /// The reference it was found, pulled or imported under.
    pub reference: ImageRef,
    /// Digest of the configuration.
    pub id: Digest,
    /// Digest of the manifest of this platform.
    pub manifest: Digest,
    pub config: ImageConfig,
    /// Digests of the uncompressed layers, lowest first.
    pub layers: Vec<Digest>,
    /// Bytes of its layers as stored; layers shared with other images count in full.
    pub size: u64,
    pub pulled_at: jiff::Timestamp,
}

#[derive(Default)]
struct State {
    /// By id; `reference` in here is the first one.
    images: BTreeMap<Digest, Arc<Image>>,
    references: HashMap<String, Arc<Image>>,
    /// Layers that pulls and imports under way need, counted.
    pins: HashMap<Digest, usize>,
}

pub(crate) struct Inner {
    pub config: Config,
    pub folders: Folders,
    pub layers: Arc<Layers>,
    pub mounts: Mounts,
    /// By the names of supplements, while they are made.
    pub making: Locks,
    pub tokens: Arc<Tokens>,
    client: OnceLock<reqwest::Client>,
    state: Mutex<State>,
    /// Held while the index on disk and the state change together, and while layers are collected.
    changing: tokio::sync::Mutex<()>,
}

/// The host's image store. Cheap to clone.
#[derive(Clone)]
pub struct Images {
    pub(crate) inner: Arc<Inner>,
}

/// Keeps layers from being collected until dropped.
pub(crate) struct Pins {
    inner: Arc<Inner>,
    layers: Vec<Digest>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut state = self.inner.state.lock().expect("no holder panics");
        for layer in &self.layers {
            if let Some(count) = state.pins.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    state.pins.remove(layer);
                }
            }
        }
    }
}

/// A layer that is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    pub name: Digest,
    /// Where it is mounted.
    pub folder: PathBuf,
    /// The EROFS image that is mounted there.
    pub file: PathBuf,
}

impl Images {
    /// Opens the store and recovers: half-written files go, downloads that broke off stay for resumption, mounts of
    /// an earlier process are found again.
    pub async fn open(config: Config) -> Result<Self, ImageError> {
        // Fails when a provider is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let open = move || -> std::io::Result<Inner> {
            let folders = Folders::open(&config.root)?;
            let mounts = Mounts::open(&config.mounts)?;
            let layers = Arc::new(Layers::new(folders.clone(), config.parallel_downloads));
            let mut state = State::default();
            for record in folders.read_index()? {
                restore(&folders, &mut state, &record);
            }
            let (client, state, changing) = (OnceLock::new(), Mutex::new(state), tokio::sync::Mutex::new(()));
            let (tokens, making) = (Arc::new(Tokens::new(config.token_guard)), Locks::default());
            Ok(Inner { config, folders, layers, mounts, making, tokens, client, state, changing })
        };
        let inner = tokio::task::spawn_blocking(open).await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        let inner = inner.map_err(|error| Problem::store("open", &error).of("store"))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The image stored under `reference`; a lookup in memory.
    pub async fn find(&self, reference: &ImageRef) -> Option<Arc<Image>> {
        self.inner.state.lock().expect("no holder panics").references.get(&reference.to_string()).cloned()
    }

    /// Every image, by id.
    pub fn list(&self) -> Vec<ImageSummary> {
        let images: Vec<_> = self.inner.state.lock().expect("no holder panics").images.values().cloned().collect();
        images.iter().map(|image| self.summary(image)).collect()
    }

    /// `image` as it is listed: its size is that of its layers and of what was made to stack them.
    pub fn summary(&self, image: &Image) -> ImageSummary {
        let supplements = supplement::size(&self.inner.folders, &image.layers);
        let references = references(&self.inner.state.lock().expect("no holder panics"), image);
        ImageSummary {
            id: image.id.to_string(),
            references,
            manifest_digest: image.manifest.to_string(),
            size: image.size.saturating_add(supplements),
            layers: image.layers.len(),
            pulled_at: image.pulled_at,
        }
    }

    /// Removes a reference, or an image by its id (`sha256:…` or at least 12 digits of it) with all its references.
    /// An image whose id is in `in_use` keeps its last reference: that is refused. Returns the ids of removed images.
    pub async fn remove(&self, name: &str, in_use: &[Digest]) -> Result<Vec<Digest>, ImageError> {
        let changing = self.inner.changing.lock().await;
        let mut records = self.inner.records();
        let hex = name.strip_prefix("sha256:").unwrap_or(name);
        let by_id = hex.len() >= 12 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        let mut ids: Vec<String> = Vec::new();
        if by_id {
            ids.extend(
                records.iter().map(|record| record.id.clone()).filter(|id| id["sha256:".len()..].starts_with(hex)),
            );
            if ids.len() > 1 {
                return Err(Problem::InvalidName("several images have an id that starts so".to_owned()).of(name));
            }
        }
        if ids.is_empty() {
            let reference = ImageRef::parse(name).map_err(|error| Problem::InvalidName(error.to_string()).of(name))?;
            let text = reference.to_string();
            let record = records.iter_mut().find(|record| record.references.contains(&text));
            let record = record.ok_or_else(|| Problem::NotStored.of(&reference))?;
            record.references.retain(|other| *other != text);
            if record.references.is_empty() {
                ids.push(record.id.clone());
            }
        }
        if ids.iter().any(|id| in_use.iter().any(|used| used.as_str() == id)) {
            return Err(Problem::InUse.of(name));
        }
        records.retain(|record| !ids.contains(&record.id));
        self.inner.commit(records).await.map_err(|problem| problem.of(name))?;
        drop(changing);
        self.inner.collect().await;
        Ok(ids.iter().filter_map(|id| Digest::parse(id).ok()).collect())
    }

    /// Makes the image's layers available as folders, topmost first, each mounted once per host; idempotent. When all
    /// are mounted this looks into memory only.
    pub async fn mount(&self, image: &Image) -> Result<Vec<Layer>, ImageError> {
        let inner = &self.inner;
        let layers = image.layers.iter().map(|layer| (layer.clone(), inner.folders.layer(layer))).collect();
        let mounted = inner.mounts.mount(layers).await;
        mounted.map_err(|error| Problem::store("mount a layer", &error).of(&image.reference))?;
        let supplements = inner.supplement(&image.layers).await;
        // One that was being made while the image was removed has nobody who would remove it later.
        if !inner.knows(&image.id) {
            inner.collect().await;
        }
        let stack = supplements.map_err(|problem| problem.of(&image.reference))?;
        let layer = |(name, folder): (Digest, PathBuf)| Layer { file: inner.folders.layer(&name), name, folder };
        Ok(stack.into_iter().map(layer).collect())
    }

    /// Takes every mount of layers away, in use or not; what stands on them keeps working until it ends.
    pub async fn unmount_all(&self) -> Result<(), ImageError> {
        self.inner.mounts.unmount_all().await.map_err(|error| Problem::store("unmount layers", &error).of("all"))
    }
}

impl Inner {
    /// The client for registries, made at first use: it reads the host's CA certificates.
    pub(crate) fn client(&self) -> Result<reqwest::Client, Problem> {
        if let Some(client) = self.client.get() {
            return Ok(client.clone());
        }
        let made = crate::registry::client(self.config.idle_timeout)
            .map_err(|detail| Problem::Store { operation: "set up TLS", detail })?;
        Ok(self.client.get_or_init(|| made).clone())
    }

    pub(crate) fn pin(self: &Arc<Self>, layers: &[Digest]) -> Pins {
        let mut state = self.state.lock().expect("no holder panics");
        for layer in layers {
            *state.pins.entry(layer.clone()).or_default() += 1;
        }
        Pins { inner: self.clone(), layers: layers.to_vec() }
    }

    /// As [`Self::pin`], and no collection that began before is still under way.
    pub(crate) async fn pin_stored(self: &Arc<Self>, layers: &[Digest]) -> Pins {
        let _changing = self.changing.lock().await;
        self.pin(layers)
    }

    fn knows(&self, image: &Digest) -> bool {
        self.state.lock().expect("no holder panics").images.contains_key(image)
    }

    /// Bytes of stored layers.
    pub(crate) fn stored_size(&self, layers: &[Digest]) -> Result<u64, Problem> {
        let size = |layer| std::fs::metadata(self.folders.layer(layer)).map(|metadata| metadata.len());
        layers.iter().map(size).sum::<std::io::Result<u64>>().map_err(|error| Problem::store("read a layer", &error))
    }

    /// Makes `image`, whose layers are stored and pinned, known under its reference.
    pub(crate) async fn record(&self, image: Image, config: &[u8], manifest: &[u8]) -> Result<Arc<Image>, Problem> {
        let _changing = self.changing.lock().await;
        let failed = |error: std::io::Error| Problem::store("write an image", &error);
        self.folders.write_blob(&image.id, config).map_err(failed)?;
        self.folders.write_blob(&image.manifest, manifest).map_err(failed)?;
        let mut records = self.records();
        let text = image.reference.to_string();
        for record in &mut records {
            record.references.retain(|reference| *reference != text);
        }
        let id = image.id.to_string();
        match records.iter_mut().find(|record| record.id == id) {
            Some(record) => {
                record.references.push(text.clone());
                record.manifest = image.manifest.to_string();
                record.pulled_at = image.pulled_at;
            }
            None => records.push(Record {
                id,
                manifest: image.manifest.to_string(),
                references: vec![text.clone()],
                pulled_at: image.pulled_at,
            }),
        }
        self.commit(records).await?;
        let found = self.state.lock().expect("no holder panics").references.get(&text).cloned();
        found.ok_or_else(|| Problem::Store { operation: "write an image", detail: "a layer is missing".to_owned() })
    }

    fn records(&self) -> Vec<Record> {
        let state = self.state.lock().expect("no holder panics");
        let record = |image: &Arc<Image>| Record {
            id: image.id.to_string(),
            manifest: image.manifest.to_string(),
            references: references(&state, image),
            pulled_at: image.pulled_at,
        };
        state.images.values().map(record).collect()
    }

    /// Writes the index, then makes memory agree with it. The caller holds `changing`.
    async fn commit(&self, records: Vec<Record>) -> Result<(), Problem> {
        let (folders, written) = (self.folders.clone(), records.clone());
        let write = tokio::task::spawn_blocking(move || folders.write_index(written)).await;
        write
            .unwrap_or_else(|error| Err(std::io::Error::other(error)))
            .map_err(|error| Problem::store("write the index", &error))?;
        let mut fresh = State::default();
        for record in &records {
            restore(&self.folders, &mut fresh, record);
        }
        let mut state = self.state.lock().expect("no holder panics");
        (state.images, state.references) = (fresh.images, fresh.references);
        Ok(())
    }

    /// Removes layers that no image has and no pull needs.
    pub(crate) async fn collect(&self) {
        let _changing = self.changing.lock().await;
        let blobs: HashSet<Digest> = {
            let state = self.state.lock().expect("no holder panics");
            state.images.values().flat_map(|image| [image.id.clone(), image.manifest.clone()]).collect()
        };
        if let Err(error) = self.folders.keep_blobs(&blobs) {
            tracing::warn!(%error, "blobs cannot be removed");
        }
        let supplements: HashSet<Digest> = {
            let state = self.state.lock().expect("no holder panics");
            state.images.values().flat_map(|image| supplement::names(&self.folders, &image.layers)).collect()
        };
        for layer in self.folders.layers().unwrap_or_default() {
            let needed = supplements.contains(&layer) || {
                let state = self.state.lock().expect("no holder panics");
                state.pins.contains_key(&layer) || state.images.values().any(|image| image.layers.contains(&layer))
            };
            if needed || self.layers.in_flight(&layer) {
                continue;
            }
            let unmounted = self.mounts.unmount(&layer).await;
            if let Err(error) = unmounted.and_then(|()| self.folders.remove_layer(&layer)) {
                tracing::warn!(%layer, %error, "layer cannot be removed");
            }
        }
    }
}

fn references(state: &State, image: &Image) -> Vec<String> {
    let named = state.references.iter().filter(|(_, other)| other.id == image.id);
    let mut references: Vec<String> = named.map(|(reference, _)| reference.clone()).collect();
    references.sort();
    references
}

/// Brings one record of the index into memory; one whose files are gone is forgotten.
fn restore(folders: &Folders, state: &mut State, record: &Record) {
    let Some(image) = read(folders, record) else {
        tracing::warn!(image = %record.id, "image is incomplete in the store and is forgotten");
        return;
    };
    for text in &record.references {
        if let Ok(reference) = ImageRef::parse(text) {
            state.references.insert(text.clone(), Arc::new(Image { reference, ..image.clone() }));
        }
    }
    state.images.insert(image.id.clone(), Arc::new(image));
}

fn read(folders: &Folders, record: &Record) -> Option<Image> {
    let (id, manifest) = (Digest::parse(&record.id).ok()?, Digest::parse(&record.manifest).ok()?);
    let (config, layers) = oci::config(&folders.read_blob(&id).ok()?, &oci::host_platform()).ok()?;
    let sizes = layers.iter().map(|layer| std::fs::metadata(folders.layer(layer)).map(|metadata| metadata.len()));
    let size = sizes.sum::<std::io::Result<u64>>().ok()?;
    // An image without references keeps its own digest as its name.
    let text = record.references.first().cloned().unwrap_or_else(|| format!("localhost/none@{manifest}"));
    let reference = ImageRef::parse(&text).ok()?;
    Some(Image { reference, id, manifest, config, layers, size, pulled_at: record.pulled_at })
}

/// Reads a manifest of one image; an index is refused.
pub(crate) fn single(bytes: &[u8]) -> Result<(oci::Descriptor, Vec<oci::Descriptor>), Problem> {
    match oci::document(bytes)? {
        Document::Manifest { config, layers } => Ok((config, layers)),
        Document::Index(_) => {
            Err(Problem::Malformed { object: "manifest", detail: "an index names another index".to_owned() })
        }
    }
}
