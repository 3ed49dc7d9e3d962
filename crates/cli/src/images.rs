//! `joey image`: list, pull with progress, import, remove.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::process::ExitCode;

use bytes::Bytes;
use futures::StreamExt;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use joey_api::error::ErrorBody;
use joey_api::image::{ImageSummary, PullEvent, PullRequest};
use joey_model::Fault;
use joey_model::quantity::human_bytes;
use joey_pool::PoolClient;
use tokio::io::AsyncReadExt;

use crate::args::Image;
use crate::failure::Failure;
use crate::output::{self, Format, age};

pub async fn image(service: &PoolClient, command: Image) -> Result<ExitCode, Failure> {
    match command {
        Image::Ls(output) => list(service, output.format()).await,
        Image::Pull { image, output } => pull(service, image, output.format()).await,
        Image::Import { file, image, output } => import(service, &file, &image, output.format()).await,
        Image::Rm { images } => remove(service, &images).await,
    }
}

async fn list(service: &PoolClient, format: Format) -> Result<ExitCode, Failure> {
    let images = service.images().await?;
    output::print(format, &images, |wide| {
        let mut heads = vec!["IMAGE", "ID", "SIZE", "LAYERS", "PULLED"];
        heads.extend(wide.then_some("MANIFEST"));
        let mut rows = vec![heads.into_iter().map(str::to_owned).collect::<Vec<_>>()];
        for image in &images {
            let id = image.id.trim_start_matches("sha256:").chars().take(12).collect();
            // An image whose tags have moved on to others is still there, and is removed by its id.
            let nameless = ["<none>".to_owned()];
            for reference in if image.references.is_empty() { &nameless[..] } else { &image.references } {
                let mut row = vec![reference.clone(), String::clone(&id), human_bytes(image.size)];
                row.extend([image.layers.to_string(), age(image.pulled_at)]);
                row.extend(wide.then(|| image.manifest_digest.clone()));
                rows.push(row);
            }
        }
        rows
    })
}

/// Removes each image, also when another cannot be removed.
async fn remove(service: &PoolClient, images: &[String]) -> Result<ExitCode, Failure> {
    let mut failures = Vec::new();
    for image in images {
        match service.remove_image(image).await {
            Ok(()) => output::write(format!("{image}\n").as_bytes())?,
            Err(error) => failures.push(error.into()),
        }
    }
    Failure::all(failures).map_or(Ok(ExitCode::SUCCESS), Err)
}

/// An image that is here now: its names, or everything about it.
fn tell(image: &ImageSummary, format: Format) -> Result<ExitCode, Failure> {
    match format {
        Format::Table | Format::Wide => {
            output::write(format!("{}\n", image.references.join(" ")).as_bytes())?;
            Ok(ExitCode::SUCCESS)
        }
        other => output::print(other, image, |_| Vec::new()),
    }
}

async fn pull(service: &PoolClient, image: String, format: Format) -> Result<ExitCode, Failure> {
    let mut events = service.pull(&PullRequest { image, credentials: Vec::new() }).await?;
    let mut progress = Progress::new();
    while let Some(event) = events.next().await {
        // What broke it off is the daemon's end, which the hint is about.
        let Ok(event) = event else { break };
        match event {
            PullEvent::Done { image } => {
                progress.end();
                return tell(&image, format);
            }
            PullEvent::Failed { fault } => {
                progress.end();
                return Err(Fault::from(ErrorBody { error: fault }).into());
            }
            event => progress.show(event),
        }
    }
    progress.end();
    Err(Failure::new("the pull broke off").with_hint("try again: what was downloaded is kept"))
}

/// Bars on a terminal, a line for every layer elsewhere; both on stderr.
struct Progress {
    bars: Option<MultiProgress>,
    layers: HashMap<String, ProgressBar>,
}

impl Progress {
    fn new() -> Self {
        Self { bars: std::io::stderr().is_terminal().then(MultiProgress::new), layers: HashMap::new() }
    }

    fn show(&mut self, event: PullEvent) {
        match event {
            PullEvent::Resolved { digest, layers } => {
                if self.bars.is_none() {
                    eprintln!("{digest}: {} layers", layers.len());
                }
                layers.into_iter().for_each(|layer| drop(self.layer(&layer.digest, layer.size)));
            }
            PullEvent::Layer { digest, done, total, stored } => {
                let bar = self.layer(&digest, total);
                bar.set_position(done);
                if stored && !bar.is_finished() {
                    bar.finish();
                    if self.bars.is_none() {
                        eprintln!("{digest}: {}", human_bytes(total));
                    }
                }
            }
            PullEvent::Done { .. } | PullEvent::Failed { .. } => {}
        }
    }

    fn layer(&mut self, digest: &str, total: u64) -> ProgressBar {
        let bars = &self.bars;
        let make = || {
            let bar = match bars {
                Some(bars) => bars.add(ProgressBar::new(total)),
                None => ProgressBar::hidden(),
            };
            let style = ProgressStyle::with_template("{prefix} {bar:40} {bytes:>10} of {total_bytes}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(digest.trim_start_matches("sha256:").chars().take(12).collect::<String>());
            bar
        };
        self.layers.entry(digest.to_owned()).or_insert_with(make).clone()
    }

    fn end(&mut self) {
        self.layers.drain().for_each(|(_, bar)| bar.finish());
    }
}

async fn import(
    service: &PoolClient,
    file: &std::path::Path,
    image: &str,
    format: Format,
) -> Result<ExitCode, Failure> {
    let archive = tokio::fs::File::open(file)
        .await
        .map_err(|error| Failure::new(format!("archive {} cannot be read: {error}", file.display())))?;
    let parts = futures::stream::unfold(Some(archive), |archive| async move {
        let mut archive = archive?;
        let mut part = bytes::BytesMut::with_capacity(64 << 10);
        match archive.read_buf(&mut part).await {
            Ok(0) => None,
            Ok(_) => Some((Ok(Bytes::from(part)), Some(archive))),
            Err(error) => Some((Err(error), None)),
        }
    });
    tell(&service.import_image(image, parts).await?, format)
}
