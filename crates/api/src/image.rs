//! Images on the wire: listing, pulling with progress, credentials.

use serde::{Deserialize, Serialize};

/// An image that is whole in the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageSummary {
    /// Digest of the image's configuration: its id.
    pub id: String,
    /// Every complete reference that names it here.
    pub references: Vec<String>,
    pub manifest_digest: String,
    /// Bytes on disk of its layers; layers shared with other images count in full.
    pub size: u64,
    pub layers: usize,
    pub pulled_at: jiff::Timestamp,
}

/// Asks the host to pull. Answered by a stream of [`PullEvent`], a JSON object a line.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PullRequest {
    pub image: String,
    #[serde(default)]
    pub credentials: Vec<RegistryCredential>,
}

/// A user and password for one registry.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RegistryCredential {
    /// Host with optional port, as in an image reference; `docker.io` for the default.
    pub registry: String,
    pub username: String,
    pub password: String,
}

impl std::fmt::Debug for RegistryCredential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryCredential").field("registry", &self.registry).finish_non_exhaustive()
    }
}

/// A step of a pull.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "type")]
pub enum PullEvent {
    /// The manifest is known; these layers make the image, in order, with their compressed sizes in bytes.
    #[serde(rename_all = "camelCase")]
    Resolved { digest: String, layers: Vec<LayerSize> },
    /// `done` of the layer's compressed bytes are here. `done == total` and `stored`: it is in the store.
    #[serde(rename_all = "camelCase")]
    Layer { digest: String, done: u64, total: u64, stored: bool },
    /// The end of a pull that worked.
    #[serde(rename_all = "camelCase")]
    Done { image: ImageSummary },
    /// The end of a pull that failed.
    #[serde(rename_all = "camelCase")]
    Failed { fault: crate::error::WireFault },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LayerSize {
    pub digest: String,
    pub size: u64,
}
