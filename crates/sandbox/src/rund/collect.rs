//! What an agent in a machine collects, had on this host: fetched as it grows, and once more before the machine is ended. Who carries
//! it finds the same segments as those of an agent beside its Pod.
//!
//! ```text
//! guest: collect/CONTAINER/SOURCE ─► agent protocol ─► DIR/collect/CONTAINER/SOURCE
//! DIR/vm/collected.json  where in the streams here those of this machine begin: a machine counts anew, the streams go on
//! ```
//!
//! Names are the configuration's, never the agent's.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::StreamExt;
use http::Method;
use joey_api::agent::{AgentConfig, AgentState, CollectedStream, OUTPUT, Place};
use joey_api::instance::ContainerState;
use joey_collect::{DIRECTORY, Mirror, PART, Position};
use joey_hypervisor::Vm;
use joey_rpc::{Client, RpcError};

use crate::AgentClient;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// How long containers that were told to end, and then the rest of what they wrote, are waited for.
const LAST: Duration = Duration::from_secs(5);
/// How long an agent may take to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// Bytes that are fetched at one look: nobody writes onto the host's disk as fast as it can.
const BUDGET: usize = 16 << 20;
/// Bytes that are kept of each source of files; of outputs as many as of their logs.
const FILES: u64 = 16 << 20;
/// The line before the records.
const HEAD: usize = 64;
const BEGINNINGS: &str = "collected.json";

/// The fetching of one machine.
pub(super) struct Collecting {
    client: Client,
    /// The instance's directory, and the machine's.
    dir: PathBuf,
    vm_dir: PathBuf,
    known: tokio::sync::Mutex<Known>,
    /// The last look is done: nothing is written any more.
    over: AtomicBool,
}

/// Why a part of a stream is not here.
enum Failed {
    /// The machine is gone or does not answer: it is asked again.
    Unheard,
    /// It is no part of a stream, and nothing of that stream is taken any more.
    Refused(&'static str),
}

/// A container, and a source of its.
type Stream = (String, String);

#[derive(Default)]
struct Known {
    /// The streams of the configuration, as it was changed last, and how much is kept of each.
    streams: BTreeMap<Stream, u64>,
    changed: Option<SystemTime>,
    mirrors: BTreeMap<Stream, Mirror>,
    beginnings: BTreeMap<String, Place>,
    /// Those of which something was told that cannot be.
    refused: BTreeSet<Stream>,
}

/// Looks until the machine has ended.
pub(super) fn begin(client: &Client, vm: &Arc<dyn Vm>, dir: &Path, vm_dir: &Path) -> Arc<Collecting> {
    let collecting = Arc::new(Collecting::open(client.clone(), dir, vm_dir));
    let (task, vm) = (collecting.clone(), vm.clone());
    tokio::spawn(async move {
        let looking = async {
            loop {
                tokio::time::sleep(LOOK).await;
                match task.look().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return,
                    Err(error) => tracing::warn!(dir = %task.dir.display(), %error, "what is collected cannot be had"),
                }
            }
        };
        tokio::select! {
            _ = vm.ended() => {}
            () = looking => {}
        }
    });
    collecting
}

impl Collecting {
    fn open(client: Client, dir: &Path, vm_dir: &Path) -> Self {
        let (dir, vm_dir) = (dir.to_owned(), vm_dir.to_owned());
        Self { client, dir, vm_dir, known: tokio::sync::Mutex::default(), over: AtomicBool::new(false) }
    }

    /// Ends what runs and fetches the rest, as far as there is time. Afterwards nothing is written any more.
    pub(super) async fn last(&self) {
        if self.dir.join(DIRECTORY).exists() {
            let all = async {
                self.stopped().await?;
                loop {
                    match self.look().await {
                        Ok(Some(true)) => {}
                        Ok(_) => return Ok::<_, RpcError>(()),
                        Err(error) => {
                            tracing::warn!(%error, "what is collected cannot be had");
                            return Ok(());
                        }
                    }
                }
            };
            if !matches!(tokio::time::timeout(LAST, all).await, Ok(Ok(()))) {
                tracing::warn!(dir = %self.dir.display(), "what its containers wrote last may not be collected");
            }
        }
        self.over.store(true, Ordering::Relaxed);
    }

    /// Resolves when no container runs any more.
    async fn stopped(&self) -> Result<(), RpcError> {
        let agent = AgentClient::new(self.client.clone());
        agent.stop(0).await?;
        let mut states = agent.watch().await?;
        let runs =
            |state: &AgentState| state.containers.iter().any(|one| matches!(one.state, ContainerState::Running { .. }));
        while let Some(state) = states.next().await {
            let state = state?;
            if state.stopping && !runs(&state) {
                break;
            }
        }
        Ok(())
    }

    /// Fetches what is new, as much as one look may; whether there was anything. `None`: it is over.
    async fn look(&self) -> io::Result<Option<bool>> {
        let mut known = self.known.lock().await;
        if self.over.load(Ordering::Relaxed) {
            return Ok(None);
        }
        if !self.dir.join(DIRECTORY).exists() {
            return Ok(Some(false));
        }
        self.read_configuration(&mut known)?;
        let asked = self.client.call::<(), Vec<CollectedStream>>(Method::GET, "/v1/collected", None);
        // It has no instance yet, or is gone.
        let Ok(Ok(told)) = tokio::time::timeout(ANSWER, asked).await else { return Ok(Some(false)) };
        let ends: BTreeMap<Stream, u64> =
            told.into_iter().map(|told| ((told.container, told.source), told.bytes)).collect();
        let (mut budget, mut any) = (BUDGET, false);
        for stream in known.streams.keys().cloned().collect::<Vec<_>>() {
            let Some(end) = ends.get(&stream).filter(|_| !known.refused.contains(&stream)) else { continue };
            while budget > 0 {
                match self.fetch_into(&mut known, &stream, *end).await? {
                    Ok(0) => break,
                    Ok(count) => (any, budget) = (true, budget.saturating_sub(count)),
                    Err(Failed::Unheard) => return Ok(Some(any)),
                    Err(Failed::Refused(why)) => {
                        let (container, source) = &stream;
                        tracing::warn!(dir = %self.dir.display(), container, source, why, "records of a guest are refused");
                        known.refused.insert(stream.clone());
                        break;
                    }
                }
            }
        }
        Ok(Some(any))
    }

    /// Fetches the next part of a stream that goes as far as `end`; how many bytes.
    async fn fetch_into(&self, known: &mut Known, stream: &Stream, end: u64) -> io::Result<Result<usize, Failed>> {
        let mut mirror = known.mirror(&self.dir, stream)?;
        let begin = self.beginning(known, stream, mirror.end())?;
        let here = mirror.end();
        let at = Place { bytes: here.bytes.saturating_sub(begin.bytes), lines: here.lines.saturating_sub(begin.lines) };
        let part = match at.bytes < end {
            true => tokio::time::timeout(ANSWER, self.fetch(stream, at)).await.unwrap_or(Err(Failed::Unheard)),
            false => Ok((at, Bytes::new())),
        };
        let done = match part {
            Ok((_, records)) if records.is_empty() || self.over.load(Ordering::Relaxed) => Ok(0),
            Ok((place, records)) => {
                let from = Position {
                    bytes: place.bytes.saturating_add(begin.bytes),
                    lines: place.lines.saturating_add(begin.lines),
                };
                let written = tokio::task::spawn_blocking(move || {
                    let done = mirror.append(from, &records);
                    (mirror, done.map(|done| done.map(|()| records.len()).map_err(|why| Failed::Refused(why.0))))
                });
                let (back, done) = written.await.map_err(io::Error::other)?;
                mirror = back;
                done?
            }
            Err(failed) => Err(failed),
        };
        known.mirrors.insert(stream.clone(), mirror);
        Ok(done)
    }

    /// Which streams there are.
    fn read_configuration(&self, known: &mut Known) -> io::Result<()> {
        let place = self.dir.join("agent.json");
        let changed = std::fs::metadata(&place)?.modified()?;
        if known.changed == Some(changed) {
            return Ok(());
        }
        let config: AgentConfig = serde_json::from_slice(&std::fs::read(place)?)?;
        let output = config.log_max_bytes.saturating_mul(config.log_max_files.into());
        let of_containers = config.containers.iter().flat_map(|container| {
            let kept = move |source: &str| if source == OUTPUT { output } else { FILES };
            container.collected.streams().map(move |source| ((container.name.clone(), source.to_owned()), kept(source)))
        });
        known.streams = of_containers.collect();
        match std::fs::read(self.vm_dir.join(BEGINNINGS)) {
            Ok(bytes) => known.beginnings = serde_json::from_slice(&bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        known.changed = Some(changed);
        Ok(())
    }

    /// Where the stream of this machine begins here: where that of the machine before it ended. Noted before the first record of it.
    fn beginning(&self, known: &mut Known, stream: &Stream, end: Position) -> io::Result<Place> {
        let key = format!("{}/{}", stream.0, stream.1);
        if let Some(begin) = known.beginnings.get(&key) {
            return Ok(*begin);
        }
        let begin = Place { bytes: end.bytes, lines: end.lines };
        known.beginnings.insert(key, begin);
        let (place, bytes) = (self.vm_dir.join(BEGINNINGS), serde_json::to_vec(&known.beginnings)?);
        let new = place.with_extension("new");
        std::fs::write(&new, bytes)?;
        std::fs::rename(new, place)?;
        Ok(begin)
    }

    /// What follows a place, and where that is.
    async fn fetch(&self, (container, source): &Stream, at: Place) -> Result<(Place, Bytes), Failed> {
        let path = format!("/v1/collected/{container}/{source}?{}", joey_rpc::query(&at));
        let unheard = |_| Failed::Unheard;
        let mut answer = self.client.bytes(Method::GET, &path).await.map_err(unheard)?;
        let mut all = Vec::new();
        while let Some(part) = answer.next().await {
            all.extend_from_slice(&part.map_err(|_| Failed::Unheard)?);
            if all.len() > HEAD + PART {
                return Err(Failed::Refused("they are more than can be asked for"));
            }
        }
        let number = |digits| u64::from_str_radix(digits, 16).ok();
        let begin = all.iter().position(|byte| *byte == b'\n').and_then(|end| {
            let (bytes, lines) = std::str::from_utf8(&all[..end]).ok()?.split_once('.')?;
            Some((end + 1, Place { bytes: number(bytes)?, lines: number(lines)? }))
        });
        let (head, begin) = begin.ok_or(Failed::Refused("they do not say where they begin"))?;
        Ok((begin, Bytes::from(all).slice(head..)))
    }
}

impl Known {
    /// Taken out while it is written to.
    fn mirror(&mut self, dir: &Path, stream: &Stream) -> io::Result<Mirror> {
        match self.mirrors.remove(stream) {
            Some(mirror) => Ok(mirror),
            None => {
                let place = dir.join(DIRECTORY).join(&stream.0).join(&stream.1);
                Mirror::open(place, self.streams.get(stream).copied().unwrap_or(0))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Mutex;

    use http::Request;
    use hyper::body::Incoming;
    use joey_api::agent::Collected;
    use joey_collect::Segments;
    use joey_rpc::{json_answer, stream_answer};

    use super::*;
    use crate::conformance::Bench;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("joey-collect-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        let bench = Bench {
            class: crate::fake::fake(),
            dir: dir.clone(),
            layers: Vec::new(),
            further: Vec::new(),
            on_linux: true,
            cgroup_root: String::new(),
        };
        let mut request = bench.request(1, "");
        request.config.containers[0].collected = Collected { output: true, ..Collected::default() };
        for part in ["vm", DIRECTORY] {
            std::fs::create_dir_all(dir.join(part)).unwrap();
        }
        std::fs::write(dir.join("agent.json"), serde_json::to_vec(&request.config).unwrap()).unwrap();
        dir
    }

    fn collecting(dir: &Path, answer: impl Fn(&str) -> joey_rpc::Body + Send + Sync + 'static) -> Collecting {
        let answer = Arc::new(answer);
        let service = tower::service_fn(move |request: Request<Incoming>| {
            let answer = answer.clone();
            async move {
                let uri = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
                Ok::<_, Infallible>(http::Response::new(answer(&uri)))
            }
        });
        Collecting::open(Client::in_process("agent", service), dir, &dir.join("vm"))
    }

    fn record(number: usize) -> String {
        format!("2026-11-21T09:00:00Z stdout F line {number}\n")
    }

    fn all(dir: &Path) -> String {
        let segments = Segments::of(dir, "main", OUTPUT).all().unwrap();
        segments.iter().map(|segment| std::fs::read_to_string(&segment.path).unwrap()).collect()
    }

    fn told(streams: &[(&str, &str, u64)]) -> joey_rpc::Body {
        let stream = |(container, source, bytes): &(&str, &str, u64)| CollectedStream {
            container: (*container).to_owned(),
            source: (*source).to_owned(),
            bytes: *bytes,
        };
        json_answer(&streams.iter().map(stream).collect::<Vec<_>>()).into_body()
    }

    #[tokio::test]
    async fn a_stream_goes_on_over_daemons_and_machines() {
        let dir = scratch("goes-on");
        let mut wanted = String::new();
        for machine in 0..3 {
            let written = Arc::new(Mutex::new(String::new()));
            for daemon in 0..3 {
                let line = record(machine * 10 + daemon);
                written.lock().unwrap().push_str(&line);
                wanted.push_str(&line);
                let written = written.clone();
                let collecting = collecting(&dir, move |uri| {
                    let text = written.lock().unwrap().clone();
                    let Some((_, query)) = uri.split_once('?') else {
                        return told(&[("main", OUTPUT, text.len() as u64)]);
                    };
                    let Place { bytes, lines } = joey_rpc::parse_query(query).unwrap();
                    joey_rpc::full(format!("{bytes:x}.{lines:x}\n{}", &text[bytes as usize..]))
                });
                assert_eq!(collecting.look().await.unwrap(), Some(true));
                assert_eq!(collecting.look().await.unwrap(), Some(false));
                assert_eq!(all(&dir), wanted, "machine {machine}, daemon {daemon}");
            }
            std::fs::remove_dir_all(dir.join("vm")).unwrap();
            std::fs::create_dir_all(dir.join("vm")).unwrap();
        }
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[tokio::test]
    async fn nothing_is_taken_that_cannot_be() {
        let names =
            || told(&[("main", "../../up", 9), ("..", OUTPUT, 9), ("other", OUTPUT, 9), ("main", OUTPUT, u64::MAX)]);
        type Answer = fn() -> joey_rpc::Body;
        let wrong: [(&str, Answer); 5] = [
            ("no-head", || joey_rpc::full("no head")),
            ("no-record", || joey_rpc::full("0.0\na line that is no record\n")),
            ("place", || joey_rpc::full(format!("ffffffffffffffff.ffffffffffffffff\n{}", record(1)))),
            ("half", || joey_rpc::full("0.0\n2026-11-21T09:00:00Z stdout F no end")),
            ("endless", || {
                stream_answer(futures::stream::repeat_with(|| Ok(Bytes::from_static(&[b'\n'; 4096])))).into_body()
            }),
        ];
        for (name, answer) in wrong {
            let dir = scratch(name);
            let collecting = collecting(&dir, move |uri| if uri.contains('?') { answer() } else { names() });
            for _ in 0..2 {
                assert_eq!(collecting.look().await.unwrap(), Some(false), "{name}");
            }
            assert_eq!(collecting.known.lock().await.refused.len(), 1, "{name}");
            assert_eq!(all(&dir), "", "{name}");
            let there: Vec<_> = std::fs::read_dir(dir.join(DIRECTORY)).unwrap().flatten().collect();
            assert_eq!(there.len(), 1, "{name}: {there:?}");
            std::fs::remove_dir_all(dir).unwrap();
        }
        // One that never comes to an end of valid records is told no more than a look may have.
        let dir = scratch("much");
        let collecting = collecting(&dir, move |uri| match uri.split_once('?') {
            None => names(),
            Some((_, query)) => {
                let Place { bytes, lines } = joey_rpc::parse_query(query).unwrap();
                joey_rpc::full(format!("{bytes:x}.{lines:x}\n{}", record(1).repeat(1000)))
            }
        });
        assert_eq!(collecting.look().await.unwrap(), Some(true));
        let size: u64 = Segments::of(&dir, "main", OUTPUT)
            .all()
            .unwrap()
            .iter()
            .map(|one| one.path.metadata().unwrap().len())
            .sum();
        // Of which the bound of the log, 3 MiB here, is kept, and the segment that is written.
        assert!(size <= (5 << 20), "{size}");
        std::fs::remove_dir_all(dir).unwrap();
    }
}
