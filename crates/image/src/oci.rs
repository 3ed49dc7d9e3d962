//! Manifests, indexes and configurations as registries serve them, read into what a pull needs.
//!
//! Formats: OCI image specification 1.1 (manifest, index, config) and Docker image manifest version 2, schema 2.

use std::collections::BTreeMap;

use joey_model::Digest;
use serde::Deserialize;

use crate::error::Problem;

/// What the registry is asked for: single manifests and indexes, OCI's and Docker's.
pub(crate) const MANIFEST_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";

/// Largest manifest or configuration read, in bytes (the distribution specification asks for at least 4 MiB).
pub(crate) const MAX_DOCUMENT: u64 = 4 << 20;

/// Most layers of an image: overlayfs stacks at most 500 (`OVL_MAX_STACK`); one is the writable layer.
const MAX_LAYERS: usize = 499;

/// The parts of an image's configuration that say how its process is run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `NAME=value`, in order.
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty is root.
    pub user: String,
    pub working_dir: String,
    pub stop_signal: Option<String>,
    /// `PORT/PROTOCOL`, sorted.
    pub exposed_ports: Vec<String>,
}

/// A pointer to content: digest, size and type.
#[derive(Debug, Clone)]
pub(crate) struct Descriptor {
    pub digest: Digest,
    pub size: u64,
}

pub(crate) enum Document {
    Manifest { config: Descriptor, layers: Vec<Descriptor> },
    Index(Vec<IndexEntry>),
}

pub(crate) struct IndexEntry {
    pub descriptor: Descriptor,
    /// Names an index in turn.
    pub is_index: bool,
    /// `os/architecture[/variant]`; empty when the index does not say.
    pub platform: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: u32,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<RawPlatform>,
}

#[derive(Deserialize)]
struct RawPlatform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    config: Option<RawProcess>,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(default)]
    diff_ids: Option<Vec<String>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawProcess {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
}

/// The platform whose images run here, in the words of image indexes (Go's names).
pub(crate) fn host_platform() -> String {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    };
    format!("linux/{architecture}")
}

fn descriptor(raw: &RawDescriptor) -> Result<Descriptor, Problem> {
    let digest = Digest::parse(&raw.digest).map_err(|error| malformed("manifest", error))?;
    Ok(Descriptor { digest, size: raw.size })
}

fn malformed(object: &'static str, detail: impl ToString) -> Problem {
    Problem::Malformed { object, detail: detail.to_string() }
}

/// Reads a manifest or an index.
pub(crate) fn document(bytes: &[u8]) -> Result<Document, Problem> {
    let raw: RawDocument = serde_json::from_slice(bytes).map_err(|error| malformed("manifest", error))?;
    if raw.schema_version != 2 {
        return Err(malformed("manifest", format!("schema version {} is not supported", raw.schema_version)));
    }
    if let Some(manifests) = raw.manifests {
        let entry = |raw: &RawDescriptor| {
            let platform = raw.platform.as_ref().map_or_else(String::new, |p| {
                let variant = p.variant.as_ref().map_or_else(String::new, |v| format!("/{v}"));
                format!("{}/{}{variant}", p.os, p.architecture)
            });
            let is_index = raw.media_type.contains("image.index") || raw.media_type.contains("manifest.list");
            Ok(IndexEntry { descriptor: descriptor(raw)?, is_index, platform })
        };
        return Ok(Document::Index(manifests.iter().map(entry).collect::<Result<_, Problem>>()?));
    }
    let (Some(config), Some(layers)) = (raw.config, raw.layers) else {
        return Err(malformed("manifest", "it names neither a configuration and layers nor other manifests"));
    };
    if layers.len() > MAX_LAYERS {
        return Err(malformed("manifest", format!("{} layers are more than {MAX_LAYERS}", layers.len())));
    }
    for layer in &layers {
        let kind = &layer.media_type;
        let is_tar = kind.contains(".tar") || kind.contains("rootfs.diff") || kind.is_empty();
        if !is_tar || kind.contains("encrypted") || kind.contains("foreign") {
            return Err(malformed("manifest", format!("layer type \"{}\" is not supported", kind.escape_default())));
        }
    }
    let layers = layers.iter().map(descriptor).collect::<Result<_, _>>()?;
    Ok(Document::Manifest { config: descriptor(&config)?, layers })
}

/// Chooses where to look for `wanted` (`os/architecture`), the most fitting first: the entry without a variant, else that of
/// the lowest variant, else the indexes that do not say what they hold.
pub(crate) fn choose<'a>(entries: &'a [IndexEntry], wanted: &str) -> Result<Vec<&'a Descriptor>, Problem> {
    let prefix = format!("{wanted}/");
    let fits = |entry: &&IndexEntry| entry.platform == wanted || entry.platform.starts_with(&prefix);
    if let Some(entry) = entries.iter().filter(fits).min_by(|a, b| a.platform.cmp(&b.platform)) {
        return Ok(vec![&entry.descriptor]);
    }
    let is_only = entries.len() == 1;
    let silent = entries.iter().filter(|entry| entry.platform.is_empty() && (entry.is_index || is_only));
    let silent: Vec<_> = silent.map(|entry| &entry.descriptor).collect();
    if !silent.is_empty() {
        return Ok(silent);
    }
    let mut available: Vec<String> = entries
        .iter()
        .map(|entry| entry.platform.escape_default().to_string())
        .filter(|platform| !platform.is_empty() && !platform.starts_with("unknown/"))
        .take(32)
        .collect();
    available.sort();
    available.dedup();
    Err(Problem::Platform { wanted: wanted.to_owned(), available })
}

/// A search for the manifest of one platform through indexes that may lie in one another.
pub(crate) struct Search {
    wanted: String,
    waiting: Vec<Descriptor>,
    available: Vec<String>,
    documents: usize,
}

/// Most manifests and indexes read for one image.
const MAX_DOCUMENTS: usize = 16;

impl Search {
    pub(crate) fn new(wanted: String) -> Self {
        Self { wanted, waiting: Vec::new(), available: Vec::new(), documents: 0 }
    }

    /// Takes the document that was read last; says which to read next, or that this one is the manifest (`None`).
    pub(crate) fn next(&mut self, bytes: &[u8]) -> Result<Option<Descriptor>, Problem> {
        let Document::Index(entries) = document(bytes)? else { return Ok(None) };
        match choose(&entries, &self.wanted) {
            Ok(chosen) => self.waiting.extend(chosen.into_iter().rev().cloned()),
            Err(Problem::Platform { available, .. }) => self.available.extend(available),
            Err(problem) => return Err(problem),
        }
        self.documents += 1;
        if self.documents == MAX_DOCUMENTS {
            return Err(malformed("index", format!("more than {MAX_DOCUMENTS} indexes lie in it")));
        }
        let none = || Problem::Platform { wanted: self.wanted.clone(), available: std::mem::take(&mut self.available) };
        self.waiting.pop().ok_or_else(none).map(Some)
    }
}

/// Reads a configuration: how the process runs, and the uncompressed digest of each layer, lowest first.
pub(crate) fn config(bytes: &[u8], wanted: &str) -> Result<(ImageConfig, Vec<Digest>), Problem> {
    let raw: RawConfig = serde_json::from_slice(bytes).map_err(|error| malformed("configuration", error))?;
    let platform = format!("{}/{}", raw.os, raw.architecture);
    if platform != "/" && platform != wanted {
        let available = vec![platform.escape_default().to_string()];
        return Err(Problem::Platform { wanted: wanted.to_owned(), available });
    }
    let process = raw.config.unwrap_or_default();
    let diff_ids = raw.rootfs.diff_ids.unwrap_or_default();
    let layers = diff_ids
        .iter()
        .map(|text| Digest::parse(text).map_err(|error| malformed("configuration", error)))
        .collect::<Result<_, _>>()?;
    let config = ImageConfig {
        entrypoint: process.entrypoint.unwrap_or_default(),
        cmd: process.cmd.unwrap_or_default(),
        env: process.env.unwrap_or_default(),
        user: process.user.unwrap_or_default(),
        working_dir: process.working_dir.unwrap_or_default(),
        stop_signal: process.stop_signal.filter(|signal| !signal.is_empty()),
        exposed_ports: process.exposed_ports.unwrap_or_default().into_keys().collect(),
    };
    Ok((config, layers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_platform_names_those_available() {
        let digest = format!("sha256:{}", "1".repeat(64));
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[
            {{"digest":"{digest}","size":1,"platform":{{"os":"linux","architecture":"s390x"}}}},
            {{"digest":"{digest}","size":1,"platform":{{"os":"linux","architecture":"arm","variant":"v7"}}}},
            {{"digest":"{digest}","size":1,"platform":{{"os":"unknown","architecture":"unknown"}}}}]}}"#
        );
        let Ok(Document::Index(entries)) = document(index.as_bytes()) else { panic!("not an index") };
        let error = choose(&entries, "linux/amd64").unwrap_err();
        assert_eq!(error.to_string(), "no variant for linux/amd64; available: linux/arm/v7, linux/s390x");
        assert!(choose(&entries, "linux/arm").is_ok());
    }

    #[test]
    fn indexes_in_indexes_are_searched_with_a_bound() {
        let digest = |number: u8| format!("sha256:{}", format!("{number:02x}").repeat(32));
        let index = |entries: &[(u8, &str)]| {
            let entry = |(number, more): &(u8, &str)| format!(r#"{{"digest":"{}","size":1,{more}}}"#, digest(*number));
            let entries: Vec<_> = entries.iter().map(entry).collect();
            format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","))
        };
        const NESTED: &str = r#""mediaType":"application/vnd.oci.image.index.v1+json""#;
        let (arm, amd) = (
            r#""platform":{"os":"linux","architecture":"arm64"}"#,
            r#""platform":{"os":"linux","architecture":"amd64"}"#,
        );
        let amd_v3 = r#""platform":{"os":"linux","architecture":"amd64","variant":"v3"}"#;
        let mut search = Search::new("linux/amd64".to_owned());
        let named = |found: Option<Descriptor>| found.unwrap().digest.to_string();
        assert_eq!(named(search.next(index(&[(1, NESTED), (2, NESTED)]).as_bytes()).unwrap()), digest(1));
        assert_eq!(named(search.next(index(&[(3, arm)]).as_bytes()).unwrap()), digest(2));
        assert_eq!(named(search.next(index(&[(4, amd_v3), (5, amd)]).as_bytes()).unwrap()), digest(5));
        let manifest = format!(r#"{{"schemaVersion":2,"config":{{"digest":"{}","size":1}},"layers":[]}}"#, digest(6));
        assert!(search.next(manifest.as_bytes()).unwrap().is_none());

        let mut search = Search::new("linux/amd64".to_owned());
        search.next(index(&[(1, NESTED)]).as_bytes()).unwrap();
        let error = search.next(index(&[(3, arm)]).as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "no variant for linux/amd64; available: linux/arm64");
        let mut search = Search::new("linux/amd64".to_owned());
        let endless = index(&[(1, NESTED), (1, NESTED)]);
        let error = (0..100).find_map(|_| search.next(endless.as_bytes()).err()).unwrap();
        assert!(matches!(error, Problem::Malformed { .. }), "{error}");
    }

    #[test]
    fn null_fields_of_a_configuration_are_empty() {
        let text = br#"{"architecture":"amd64","os":"linux","config":{"Cmd":null,"Env":["A=b"],"User":"7"},
            "rootfs":{"type":"layers","diff_ids":[]}}"#;
        let (config, layers) = config(text, "linux/amd64").unwrap();
        assert_eq!((config.env, config.user, layers), (vec!["A=b".to_owned()], "7".to_owned(), vec![]));
    }
}
