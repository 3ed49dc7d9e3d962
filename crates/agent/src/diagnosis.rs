//! Core dumps and captures, as the agent answers for them. How the kernel gives them is `joey_diagnosis`'s.
//!
//! ```text
//! DIR/cores/settings.json   what the kernel's handler of crashes shall do; it reads them at each crash
//! DIR/cores/….core          what is kept; ….core.cut where not all of it is there, ….unfinished until it is known
//! ```

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use joey_api::agent::AgentConfig;
use joey_api::diagnosis::{CaptureRequest, CoreDump, CoreSettings, CoreWritten, Cores, Crash, check_core_pattern};
use joey_diagnosis::capture::Capture;
use joey_diagnosis::core_handler::UNFINISHED;
use joey_diagnosis::core_pattern;
use joey_model::{ErrorKind, Fault};
use joey_rpc::{Body, empty_answer, into_stream, json_answer, parse_query, read_json, stream_answer};

use crate::server::{self, BODY, answers};
use crate::supervisor::{Agent, lock};

/// Cores that are kept; a further one takes the place of the oldest.
const KEPT: usize = 4;
const SETTINGS: &str = "settings.json";
/// What a core ends in that is not all there.
const CUT: &str = ".cut";
/// Bytes read at once.
const PART: usize = 64 << 10;
/// So many crashes are told of in so long a time; one who crashes all the time fills nobody's list of events.
const TOLD: (u32, Duration) = (10, Duration::from_secs(60));

static PACE: Mutex<Pace> = Mutex::new(Pace { since: None, told: 0, untold: 0 });

/// How many were told lately, and how many were not since the last one that was.
struct Pace {
    since: Option<Instant>,
    told: u32,
    untold: u32,
}

impl Pace {
    /// Whether one more is told of; then with how many that were not.
    fn next(&mut self, now: Instant) -> Option<u32> {
        if self.since.is_none_or(|since| now.duration_since(since) >= TOLD.1) {
            (self.since, self.told) = (Some(now), 0);
        }
        if self.told >= TOLD.0 {
            self.untold = self.untold.saturating_add(1);
            return None;
        }
        self.told += 1;
        Some(std::mem::take(&mut self.untold))
    }
}

/// Answers a call below `/v1/capture` or `/v1/cores`.
pub async fn answer(agent: &Arc<Agent>, request: Request<Incoming>) -> Result<Response<Body>, Fault> {
    let (head, body) = request.into_parts();
    let query = head.uri.query().unwrap_or_default();
    let parts: Vec<&str> = head.uri.path().trim_matches('/').split('/').collect();
    match (&head.method, &parts[1..]) {
        (&Method::POST, ["capture"]) => capture(&parse_query(query)?, body),
        (&Method::GET, ["cores"]) => Ok(json_answer(&cores(&agent.dir).map_err(failed)?)),
        (&Method::PUT, ["cores"]) => {
            let settings: CoreSettings = read_json(body, BODY).await?;
            let checked = settings.pattern.as_deref().map_or(Ok(()), check_core_pattern);
            checked.map_err(|why| Fault::new(ErrorKind::Invalid, "InvalidCorePattern", why))?;
            set(&agent.dir, &settings).map_err(failed)?;
            Ok(json_answer(&cores(&agent.dir).map_err(failed)?))
        }
        (&Method::POST, ["cores"]) => {
            let crash: Crash = parse_query(query)?;
            // In a task of its own: the handler may be killed before it can say how it went.
            let told = tokio::spawn(crashed(agent.clone(), crash, body));
            told.await.unwrap_or_else(|error| Err(failed(io::Error::other(error))))
        }
        (&Method::GET, ["cores", name]) => read(&agent.dir, name),
        _ => Err(Fault::new(ErrorKind::NotFound, "NotFound", format!("no such call: {}", head.uri.path()))),
    }
}

/// In a machine: has its kernel bring crashes to this program, and listens to what that tells.
pub fn take_crashes(agent: &Arc<Agent>, most: u64) -> io::Result<()> {
    let listener = joey_rpc::listen_unix(&agent.dir.join("agent.sock"))?;
    core_pattern::take_in_guest(most)?;
    let agent = agent.clone();
    let service = tower::service_fn(move |request| server::answer(agent.clone(), request));
    tokio::spawn(joey_rpc::serve_unix(listener, service, std::future::pending()));
    Ok(())
}

fn failed(error: io::Error) -> Fault {
    Fault::new(ErrorKind::Internal, "CoresFailed", format!("cores cannot be looked after: {error}"))
}

fn capture(request: &CaptureRequest, body: Incoming) -> Result<Response<Body>, Fault> {
    let capture = Capture::open(request)?;
    let (to, answer) = answers();
    let stop = async move {
        // A caller that only says nothing more, or has gone, has not asked for the end.
        match into_stream(body).next().await {
            Some(Ok(_)) => {}
            _ => std::future::pending().await,
        }
    };
    tokio::spawn(capture.run(stop, to));
    Ok(answer)
}

/// Cores are written from the start where the configuration says where; what was set later stays.
pub fn prepare(dir: &Path, config: &AgentConfig) -> io::Result<()> {
    for entry in fs::read_dir(dir.join("cores")).into_iter().flatten().flatten() {
        // Of an agent before this one, with all that it ran.
        if entry.file_name().to_string_lossy().ends_with(UNFINISHED) {
            fs::remove_file(entry.path())?;
        }
    }
    match &config.core_pattern {
        Some(pattern) if !dir.join("cores").join(SETTINGS).exists() => {
            set(dir, &CoreSettings { enabled: true, pattern: Some(pattern.clone()) })
        }
        _ => Ok(()),
    }
}

fn set(dir: &Path, settings: &CoreSettings) -> io::Result<()> {
    let cores = dir.join("cores");
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&cores)?;
    let new = cores.join("settings.new");
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec(settings)?)?;
    file.sync_all()?;
    fs::rename(new, cores.join(SETTINGS))?;
    File::open(cores)?.sync_all()
}

fn cores(dir: &Path) -> io::Result<Cores> {
    let cores = dir.join("cores");
    let settings = match fs::read(cores.join(SETTINGS)) {
        Ok(bytes) => serde_json::from_slice(&bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Cores::default()),
        Err(error) => return Err(error),
    };
    let mut dumps = Vec::new();
    for entry in fs::read_dir(cores)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // One may be put away at this moment.
        let Ok(meta) = entry.metadata() else { continue };
        if is_kept(&name) {
            let at = meta.modified().ok().and_then(|at| at.try_into().ok()).unwrap_or_default();
            dumps.push(CoreDump { name, bytes: meta.len(), at });
        }
    }
    dumps.sort_by(|one, other| other.at.cmp(&one.at).then_with(|| one.name.cmp(&other.name)));
    Ok(Cores { settings, dumps })
}

fn is_kept(name: &str) -> bool {
    name.strip_suffix(CUT).unwrap_or(name).ends_with(".core") && !name.contains('/')
}

fn read(dir: &Path, name: &str) -> Result<Response<Body>, Fault> {
    let missing = || {
        Fault::new(ErrorKind::NotFound, "NoSuchCore", format!("there is no core \"{name}\""))
            .with_hint("joey diagnose core ls shows those that are kept")
    };
    let known = Some(name).filter(|name| is_kept(name)).ok_or_else(missing)?;
    let file = File::open(dir.join("cores").join(known)).map_err(|_| missing())?;
    Ok(stream_answer(futures::stream::try_unfold(file, |mut file| async move {
        let mut part = vec![0; PART];
        let count = file.read(&mut part)?;
        part.truncate(count);
        Ok((count > 0).then(|| (Bytes::from(part), file)))
    })))
}

/// Waits until a core is written, puts it in order and tells of it.
async fn crashed(agent: Arc<Agent>, crash: Crash, body: Incoming) -> Result<Response<Body>, Fault> {
    let broken = |_| CoreWritten { problem: Some("writing was broken off".to_owned()), ..CoreWritten::default() };
    let written: CoreWritten = read_json(body, BODY).await.unwrap_or_else(broken);
    let place = match crash.kept {
        true => finish(&agent.dir, &crash.place, &written).map_err(failed)?,
        false => Some(crash.place.clone()).filter(|_| written.bytes > 0),
    };
    let life = agent.find(&crash.container);
    let life = life.ok_or_else(|| Fault::new(ErrorKind::NotFound, "NotFound", "there is no such container"))?;
    let Some(untold) = lock(&PACE).next(Instant::now()) else { return Ok(empty_answer(StatusCode::NO_CONTENT)) };
    let Crash { program, pid, signal, .. } = &crash;
    let core = match &place {
        Some(place) => format!("its core of {} bytes is {place}", written.bytes),
        None => format!("its core could not be written to {}", crash.place),
    };
    let cut = if written.cut { ", cut at the host's limit" } else { "" };
    let problem = written.problem.map_or_else(String::new, |problem| format!(": {problem}"));
    let untold = if untold > 0 { format!("; {untold} crashes before it were not told of") } else { String::new() };
    let message = format!("{program} (process {pid}) was ended by {signal}; {core}{cut}{problem}{untold}");
    agent.event(true, "CoreDumped", message, &life.container());
    Ok(empty_answer(StatusCode::NO_CONTENT))
}

/// Gives a core that is kept its name, or puts away what came to nothing; then the oldest ones go.
fn finish(dir: &Path, name: &str, written: &CoreWritten) -> io::Result<Option<String>> {
    if !is_kept(name) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let all = dir.join("cores");
    let unfinished = all.join(format!("{name}{UNFINISHED}"));
    let bytes = fs::metadata(&unfinished).map_or(0, |meta| meta.len());
    if bytes == 0 {
        let _ = fs::remove_file(unfinished);
        return Ok(None);
    }
    let whole = !written.cut && written.problem.is_none();
    let name = if whole { name.to_owned() } else { format!("{name}{CUT}") };
    fs::rename(unfinished, all.join(&name))?;
    for old in cores(dir)?.dumps.iter().skip(KEPT) {
        fs::remove_file(all.join(&old.name))?;
    }
    Ok(Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_cores_are_kept() {
        let dir = std::env::temp_dir().join(format!("joey-cores-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        assert_eq!(cores(&dir).unwrap(), Cores::default());
        let settings = CoreSettings { enabled: true, pattern: None };
        set(&dir, &settings).unwrap();
        let names: Vec<String> = (0..6).map(|number| format!("web.sh.{number}.SIGABRT.0.core")).collect();
        for (name, at) in names.iter().zip(1u64..) {
            let file = File::create(dir.join("cores").join(format!("{name}{UNFINISHED}"))).unwrap();
            file.set_len(10).unwrap();
            file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(at)).unwrap();
            assert!(cores(&dir).unwrap().dumps.iter().all(|dump| dump.name != *name), "it is not there yet");
            let written = CoreWritten { bytes: 10, cut: at == 6, problem: None };
            assert!(finish(&dir, name, &written).unwrap().is_some_and(|kept| kept.starts_with(name)));
        }
        let found = cores(&dir).unwrap();
        let found_names: Vec<&str> = found.dumps.iter().map(|dump| dump.name.as_str()).collect();
        let cut = format!("{}.cut", names[5]);
        assert_eq!(found_names, [&cut, &names[4], &names[3], &names[2]]);
        assert_eq!(found.settings, settings);
        assert!(read(&dir, &names[2]).is_ok());
        for wrong in ["settings.json", "../core", "absent.core", ""] {
            assert!(read(&dir, wrong).is_err(), "{wrong}");
        }
        let written = CoreWritten { bytes: 0, cut: false, problem: Some("no space".to_owned()) };
        assert_eq!(finish(&dir, "none.core", &written).unwrap(), None);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn who_crashes_all_the_time_is_told_of_now_and_then() {
        let (mut pace, begin) = (Pace { since: None, told: 0, untold: 0 }, Instant::now());
        let told = (0..50).filter(|_| pace.next(begin) == Some(0)).count();
        assert_eq!(told, TOLD.0 as usize);
        assert_eq!(pace.next(begin + TOLD.1), Some(40));
        assert_eq!(pace.next(begin + TOLD.1), Some(0));
    }
}
