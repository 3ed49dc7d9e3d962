//! Layers on their way into the store: one download per layer however many pulls want it, resumed where it broke off.
//!
//! ```text
//! registry ─► channel ─► partial/HEX (kept when the download breaks) ─► convert ─► tmp/… ─► layers/HEX.erofs
//! ```
//! The task that downloads ends when nobody waits for it any more; what it had stays in `partial/`.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use joey_model::Digest;
use tokio::sync::{Semaphore, mpsc, watch};

use crate::convert::{Expected, SourceFailed, WriteFailed, convert};
use crate::error::Problem;
use crate::locks::{Held, Locks};
use crate::oci::Descriptor;
use crate::persist::Folders;
use crate::registry::{Failure, Registry, TRIES, backoff, broken};

/// Most connections for one layer; each must have brought something.
const MAX_CONNECTIONS: u32 = 64;

/// Progress and end of one layer's download.
#[derive(Clone, Default)]
struct Flight {
    done: u64,
    result: Option<Result<(), Problem>>,
}

pub(crate) struct Layers {
    folders: Folders,
    /// Senders, not receivers: whoever receives is somebody who waits.
    flights: Mutex<HashMap<Digest, Arc<watch::Sender<Flight>>>>,
    slots: Semaphore,
    /// By the digests of compressed blobs: one writer of each partial file, also one whose pull was given up.
    writers: Locks,
    serial: AtomicU64,
}

/// A layer as a manifest and a configuration describe it.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub blob: Descriptor,
    pub diff_id: Digest,
    pub limit: u64,
}

impl Layers {
    pub(crate) fn new(folders: Folders, parallel: usize) -> Self {
        let slots = Semaphore::new(parallel.max(1));
        Self { folders, flights: Mutex::default(), slots, writers: Locks::default(), serial: AtomicU64::new(0) }
    }

    pub(crate) fn in_flight(&self, layer: &Digest) -> bool {
        self.flights.lock().expect("no holder panics").contains_key(layer)
    }

    /// Brings the layer into the store, or waits for whoever is doing so. `progress`: compressed bytes, stored.
    pub(crate) async fn fetch(
        self: &Arc<Self>,
        registry: &Arc<Registry>,
        wanted: &Wanted,
        progress: &(dyn Fn(u64, bool) + Sync),
    ) -> Result<(), Problem> {
        loop {
            let Some((mut flight, own)) = self.join(registry, wanted) else {
                progress(wanted.blob.size, true);
                return Ok(());
            };
            let result = loop {
                let now = flight.borrow_and_update().clone();
                match now.result {
                    Some(result) => break result,
                    None => progress(now.done.min(wanted.blob.size), false),
                }
                if flight.changed().await.is_err() {
                    let last = flight.borrow().result.clone();
                    break last.unwrap_or_else(|| Err(gone()));
                }
            };
            match result {
                Ok(()) => {
                    progress(wanted.blob.size, true);
                    return Ok(());
                }
                // Another pull's failure may be due to its credentials or its caller going away.
                Err(_) if !own => {}
                Err(problem) => return Err(problem),
            }
        }
    }

    /// Removes what there is of a download that broke off, once nobody writes it any more.
    pub(crate) async fn forget(&self, blob: &Digest) {
        let _writer = self.writers.lock(blob).await;
        let _ = fs::remove_file(self.folders.partial(blob));
    }

    /// The layer's flight and whether it was started here; `None`: the layer is stored.
    fn join(self: &Arc<Self>, registry: &Arc<Registry>, wanted: &Wanted) -> Option<(watch::Receiver<Flight>, bool)> {
        let mut flights = self.flights.lock().expect("no holder panics");
        if let Some(flight) = flights.get(&wanted.diff_id) {
            return Some((flight.subscribe(), false));
        }
        if self.folders.layer(&wanted.diff_id).exists() {
            return None;
        }
        let (sender, receiver) = watch::channel(Flight::default());
        let sender = Arc::new(sender);
        flights.insert(wanted.diff_id.clone(), sender.clone());
        drop(flights);
        let (layers, registry, wanted) = (self.clone(), registry.clone(), wanted.clone());
        tokio::spawn(async move {
            let (inner, name, report) = (layers.clone(), wanted.diff_id.clone(), sender.clone());
            let run = tokio::spawn(async move {
                tokio::select! {
                    result = inner.run(&registry, &wanted, &report) => result,
                    () = report.closed() => Err(gone()),
                }
            });
            let result = run.await.unwrap_or_else(|_| Err(gone()));
            layers.flights.lock().expect("no holder panics").remove(&name);
            sender.send_modify(|flight| flight.result = Some(result));
        });
        Some((receiver, true))
    }

    async fn run(&self, registry: &Registry, wanted: &Wanted, report: &watch::Sender<Flight>) -> Result<(), Problem> {
        let writer = Arc::new(self.writers.lock(&wanted.blob.digest).await);
        let _slot = self.slots.acquire().await.map_err(|_| gone())?;
        let partial = self.folders.partial(&wanted.blob.digest);
        // A pull that was given up may have had all it needed.
        if self.folders.layer(&wanted.diff_id).exists() {
            let _ = fs::remove_file(&partial);
            return Ok(());
        }
        let had = fs::metadata(&partial).map_or(0, |metadata| metadata.len());
        let result = self.download(registry, wanted, report, (&partial, &writer)).await;
        let is_wrong = matches!(result, Err(Problem::Digest { .. } | Problem::Layer { .. }));
        if is_wrong {
            let _ = fs::remove_file(&partial);
        }
        // Wrong bytes may be those of an earlier, disturbed download: once more from the start.
        if is_wrong && had > 0 {
            return self.download(registry, wanted, report, (&partial, &writer)).await.inspect_err(|_| {
                let _ = fs::remove_file(&partial);
            });
        }
        // On a full disk what others wait for comes before what may be wanted again.
        if matches!(result, Ok(()) | Err(Problem::LayerTooLarge { .. } | Problem::Full { .. })) {
            let _ = fs::remove_file(&partial);
        }
        result
    }

    async fn download(
        &self,
        registry: &Registry,
        wanted: &Wanted,
        report: &watch::Sender<Flight>,
        (partial, writer): (&PathBuf, &Arc<Held>),
    ) -> Result<(), Problem> {
        let failed = |error: io::Error| Problem::store("write a download", &error);
        let mut have = fs::metadata(partial).map_or(0, |metadata| metadata.len());
        if have > wanted.blob.size {
            fs::remove_file(partial).map_err(failed)?;
            have = 0;
        }
        let copy = OpenOptions::new().create(true).append(true).open(partial).map_err(failed)?;
        let before = File::open(partial).map_err(failed)?.take(have);
        let (sender, receiver) = mpsc::channel(32);
        let reader = before.chain(Incoming { receiver, current: Bytes::new(), copy, _writer: writer.clone() });
        let stored = self.store(reader, Some(&wanted.blob), &wanted.diff_id, wanted.limit);
        let fed = async move {
            let result = feed(registry, &wanted.blob, have, &sender, report).await;
            if let Err(problem) = &result {
                let _ = sender.send(Err(problem.to_string())).await;
            }
            result
        };
        // A download that broke explains a conversion that ended early, and not the other way round.
        let (stored, fed) = tokio::join!(stored, fed);
        fed.and(stored)
    }

    /// Converts `source` on a blocking thread and gives the result its name in the store.
    pub(crate) async fn store(
        &self,
        source: impl Read + Send + 'static,
        blob: Option<&Descriptor>,
        diff_id: &Digest,
        limit: u64,
    ) -> Result<(), Problem> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let target = self.folders.temporary(&format!("{}.{serial}", diff_id.hex()));
        let name = self.folders.layer(diff_id);
        let (folders, layer) = (self.folders.clone(), diff_id.clone());
        let blob = blob.map(|blob| (blob.digest.clone(), blob.size));
        let expected = Expected { blob, diff_id: diff_id.clone(), limit };
        let work = move || {
            let finish = |unlisted: &[Vec<u8>]| {
                folders.write_unlisted(&layer, unlisted)?;
                fs::rename(&target, &name)?;
                crate::persist::sync_parent(&name)
            };
            let result = convert(source, &expected, &target)
                .and_then(|unlisted| finish(&unlisted).map_err(|error| Problem::store("name a layer", &error)));
            if result.is_err() {
                let _ = fs::remove_file(&target);
            } else {
                joey_model::checkpoint::reached("image-layer-stored");
            }
            result
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(gone()))
    }
}

fn gone() -> Problem {
    Problem::Store { operation: "fetch a layer", detail: "the work was given up".to_owned() }
}

/// Downloads the rest of a blob into the channel, reconnecting where it broke off.
async fn feed(
    registry: &Registry,
    blob: &Descriptor,
    mut offset: u64,
    sender: &mpsc::Sender<Result<Bytes, String>>,
    report: &watch::Sender<Flight>,
) -> Result<(), Problem> {
    let (mut failures, mut connections) = (0, 0);
    while offset < blob.size {
        let before = offset;
        let mut wait = None;
        let reason = match registry.blob(&blob.digest, offset).await {
            Ok((mut response, mut start)) => loop {
                let chunk = match response.chunk().await {
                    Ok(Some(chunk)) => chunk,
                    Ok(None) if offset >= blob.size => break String::new(),
                    Ok(None) => break "the answer ended early".to_owned(),
                    Err(error) => break broken(error),
                };
                let known = (offset - start).min(chunk.len() as u64);
                start += known;
                let fresh = chunk.slice(known as usize..);
                if offset + fresh.len() as u64 > blob.size {
                    let detail = format!("the registry sends more than the {} bytes of the manifest", blob.size);
                    return Err(Problem::Layer { layer: blob.digest.clone(), detail });
                }
                offset += fresh.len() as u64;
                start += fresh.len() as u64;
                if !fresh.is_empty() && sender.send(Ok(fresh)).await.is_err() {
                    // The conversion has ended; it knows why.
                    return Ok(());
                }
                report.send_modify(|flight| flight.done = offset);
            },
            Err(Failure::Final(problem)) => return Err(problem),
            Err(Failure::Again { detail, after }) => {
                wait = after;
                detail
            }
        };
        if offset >= blob.size {
            break;
        }
        connections += 1;
        failures = if offset > before { 1 } else { failures + 1 };
        if failures >= TRIES || connections >= MAX_CONNECTIONS {
            let detail = format!("layer {} broke off at {offset} of {} bytes: {reason}", blob.digest, blob.size);
            return Err(registry.unavailable(detail));
        }
        tokio::time::sleep(backoff(failures, wait)).await;
    }
    Ok(())
}

/// The bytes of a running download, copied to the partial file as they are taken.
struct Incoming {
    receiver: mpsc::Receiver<Result<Bytes, String>>,
    current: Bytes,
    copy: File,
    _writer: Arc<Held>,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(Ok(bytes)) => {
                    self.copy.write_all(&bytes).map_err(|error| io::Error::other(WriteFailed(error)))?;
                    self.current = bytes;
                }
                Some(Err(reason)) => return Err(io::Error::other(SourceFailed(reason))),
                None => return Ok(0),
            }
        }
        let count = self.current.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.current.split_to(count));
        Ok(count)
    }
}
