//! A pull: reference → manifest of this platform → configuration → layers in parallel → known image.

use std::sync::Arc;

use joey_api::image::{LayerSize, PullEvent, RegistryCredential};
use joey_model::{Digest, ImageRef};

use crate::credentials;
use crate::error::{ImageError, Problem};
use crate::flight::Wanted;
use crate::images::{Image, Images, single};
use crate::oci::{self, Search};
use crate::registry::Registry;

impl Images {
    /// Pulls `reference` whether or not it is stored; layers that are stored are not fetched again. `progress` hears
    /// [`PullEvent::Resolved`] and [`PullEvent::Layer`]; the end is this function's result. Dropping the future gives
    /// the pull up.
    pub async fn pull(
        &self,
        reference: &ImageRef,
        credentials: &[RegistryCredential],
        progress: impl Fn(PullEvent) + Send + Sync,
    ) -> Result<Arc<Image>, ImageError> {
        let result = self.pull_inner(reference, credentials, &progress).await;
        if let Err(problem) = &result {
            tracing::debug!(image = %reference, %problem, "pull failed");
            self.inner.collect().await;
        }
        result.map_err(|problem| problem.of(reference))
    }

    async fn pull_inner(
        &self,
        reference: &ImageRef,
        credentials: &[RegistryCredential],
        progress: &(dyn Fn(PullEvent) + Send + Sync),
    ) -> Result<Arc<Image>, Problem> {
        let inner = &self.inner;
        let name = reference.registry();
        let plain = reference.registry_is_loopback() || inner.config.plain_http_registries.iter().any(|r| r == name);
        let credential = credentials::choose(name, credentials, inner.config.docker_config.as_deref());
        let registry = Arc::new(Registry::new(inner.client()?, reference, plain, credential, inner.tokens.clone()));
        let (manifest_bytes, manifest) = self.resolve(&registry, reference).await?;
        let (config, blobs) = single(&manifest_bytes)?;
        let config_bytes = registry.config(&config).await?;
        let (process, diff_ids) = oci::config(&config_bytes, &oci::host_platform())?;
        if diff_ids.len() != blobs.len() {
            let detail = format!("it has {} layers, its manifest {}", diff_ids.len(), blobs.len());
            return Err(Problem::Malformed { object: "configuration", detail });
        }
        if blobs.iter().fold(0u64, |sum, blob| sum.saturating_add(blob.size)) > inner.config.max_image_bytes {
            return Err(Problem::ImageTooLarge { limit: inner.config.max_image_bytes });
        }
        let sizes = blobs.iter().map(|blob| LayerSize { digest: blob.digest.to_string(), size: blob.size });
        progress(PullEvent::Resolved { digest: manifest.to_string(), layers: sizes.collect() });

        let pins = inner.pin(&diff_ids);
        let limit = inner.config.max_layer_bytes.min(inner.config.max_image_bytes);
        let digests: Vec<_> = blobs.iter().map(|blob| blob.digest.clone()).collect();
        let wanted =
            blobs.into_iter().zip(&diff_ids).map(|(blob, diff_id)| Wanted { blob, diff_id: diff_id.clone(), limit });
        let fetches = wanted.map(|wanted| self.fetch(&registry, wanted, progress));
        let fetched = futures::future::try_join_all(fetches).await;
        if matches!(fetched, Err(Problem::Full { .. })) {
            // What the other layers' downloads had is in the way too; each of them ends a moment after this.
            let layers = inner.layers.clone();
            tokio::spawn(async move {
                for digest in digests {
                    layers.forget(&digest).await;
                }
            });
        }
        fetched?;
        let size = inner.stored_size(&diff_ids)?;
        if size > inner.config.max_image_bytes {
            return Err(Problem::ImageTooLarge { limit: inner.config.max_image_bytes });
        }
        let image = Image {
            reference: reference.clone(),
            id: config.digest,
            manifest,
            config: process,
            layers: diff_ids,
            size,
            pulled_at: jiff::Timestamp::now(),
        };
        // Goes on when the caller does not: disk and memory change together.
        let inner = inner.clone();
        let record = tokio::spawn(async move {
            let _pins = pins;
            inner.record(image, &config_bytes, &manifest_bytes).await
        });
        record.await.unwrap_or_else(|error| Err(Problem::store("write an image", &std::io::Error::other(error))))
    }

    /// The manifest of this platform, through indexes where there are any.
    async fn resolve(&self, registry: &Registry, reference: &ImageRef) -> Result<(Vec<u8>, Digest), Problem> {
        let digest = reference.digest();
        let name = digest.map(Digest::as_str).or(reference.tag()).unwrap_or("latest");
        let mut search = Search::new(oci::host_platform());
        let (mut bytes, mut found) = registry.manifest(name, digest).await?;
        while let Some(chosen) = search.next(&bytes)? {
            (bytes, found) = registry.manifest(chosen.digest.as_str(), Some(&chosen.digest)).await?;
        }
        Ok((bytes, found))
    }

    async fn fetch(
        &self,
        registry: &Arc<Registry>,
        wanted: Wanted,
        progress: &(dyn Fn(PullEvent) + Send + Sync),
    ) -> Result<(), Problem> {
        let inner = &self.inner;
        let (digest, total) = (wanted.blob.digest.to_string(), wanted.blob.size);
        let report = |done, stored| progress(PullEvent::Layer { digest: digest.clone(), done, total, stored });
        if total > inner.config.max_layer_bytes {
            return Err(Problem::LayerTooLarge { layer: wanted.blob.digest, limit: inner.config.max_layer_bytes });
        }
        inner.layers.fetch(registry, &wanted, &report).await?;
        // Layers end one by one: as soon as those that are here are too much, the pull is over.
        let limit = inner.config.max_image_bytes;
        let stored = inner.stored_size(std::slice::from_ref(&wanted.diff_id))?;
        if stored > limit { Err(Problem::ImageTooLarge { limit }) } else { Ok(()) }
    }
}
