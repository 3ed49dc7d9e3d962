//! The looking at a container's files while it runs, once in [`PAUSE`], and once more after its end; and what is collected, for a host that
//! does not see it on its own disk. What may be looked at, and what becomes of it, is in `joey_collect`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Response;
use joey_api::agent::{CollectedStream, Place};
use joey_collect::{Files, Position, Segments};
use joey_model::{ErrorKind, Fault};
use joey_rpc::{Body, json_answer, parse_query, stream_answer};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::life::Life;
use crate::supervisor::{Agent, lock};

/// Between two looks: nothing that a container writes makes the agent work more often.
const PAUSE: Duration = Duration::from_secs(1);
/// Bytes taken in at one look; a file that grows faster is behind.
const BUDGET: usize = 4 << 20;
/// How long the look after a container's end may take in what is there.
const LAST: Duration = Duration::from_secs(2);

/// The files of a container as it sees them, also when no process of it is left.
pub struct Inside {
    pub root: OwnedFd,
    /// Keeps its mounts together.
    pub _mounts: OwnedFd,
}

/// The looking of one run.
pub struct Following {
    over: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// Follows the files of a run of this container, where it has sources of that kind.
pub fn follow(dir: &Path, life: &Arc<Life>, inside: Option<Inside>) -> Option<Following> {
    let (inside, container) = (inside?, life.container());
    let before = lock(&life.files).take();
    let opened = before.map_or_else(|| Files::open(dir, &container.name, &container.collected.files), Ok);
    let mut files = match opened {
        Ok(files) => files,
        Err(error) => {
            eprintln!("cannot collect the files of {}: {error}", container.name);
            return None;
        }
    };
    let (life, (over, mut ended)) = (life.clone(), oneshot::channel());
    let task = tokio::spawn(async move {
        loop {
            let last = tokio::time::timeout(PAUSE, &mut ended).await.is_ok();
            look(&mut files, &inside, last).await;
            if last {
                break;
            }
        }
        match files.end_run() {
            Ok(0) => {}
            Ok(lost) => eprintln!("{lost} bytes that a container wrote last into its files are not collected"),
            Err(error) => eprintln!("cannot note what is collected of a container's files: {error}"),
        }
        *lock(&life.files) = Some(files);
    });
    Some(Following { over, task })
}

async fn look(files: &mut Files, inside: &Inside, last: bool) {
    files.find(inside.root.as_fd());
    let (mut budget, end) = (if last { usize::MAX } else { BUDGET }, Instant::now() + LAST);
    while budget > 0 && Instant::now() < end {
        match files.take(last) {
            Ok(0) => break,
            Ok(taken) => budget = budget.saturating_sub(taken),
            // What cannot be written now, for want of room, is read again.
            Err(error) => {
                eprintln!("cannot collect a file: {error}");
                break;
            }
        }
        // Others have their turn.
        tokio::task::yield_now().await;
    }
    if let Err(error) = files.note() {
        eprintln!("cannot note what is collected of a container's files: {error}");
    }
}

impl Following {
    /// Takes in what the run wrote last, as far as there is time.
    pub async fn end(self) {
        let Self { over, task } = self;
        let _ = over.send(());
        if let Err(error) = task.await {
            eprintln!("cannot collect what a container wrote last into its files: {error}");
        }
    }
}

/// Answers `GET /v1/collected`, or with a container and a source of its what follows a place.
pub fn answer(agent: &Agent, stream: &[&str], query: &str) -> Result<Response<Body>, Fault> {
    let failed = |error: io::Error| Fault::new(ErrorKind::Internal, "NotCollected", format!("segments: {error}"));
    let containers: Vec<_> = agent.lives().iter().map(|life| life.container()).collect();
    let streams = containers.iter().flat_map(|one| one.collected.streams().map(|source| (one.name.as_str(), source)));
    match stream {
        [] => Ok(json_answer(&ends(&agent.dir, streams).map_err(failed)?)),
        [container, source] if streams.into_iter().any(|known| known == (*container, *source)) => {
            let Place { bytes, lines } = parse_query(query)?;
            let segments = Segments::of(&agent.dir, container, source);
            segments.remove_before(bytes).map_err(failed)?;
            let part = joey_collect::read(segments.dir(), Position { bytes, lines }).map_err(failed)?;
            let begin = format!("{:x}.{:x}\n", part.begin.bytes, part.begin.lines);
            Ok(stream_answer(futures::stream::iter([Ok(begin.into()), Ok(part.bytes.into())])))
        }
        _ => Err(Fault::new(ErrorKind::NotFound, "NotFound", "nothing of that name is collected")),
    }
}

fn ends<'a>(dir: &Path, streams: impl Iterator<Item = (&'a str, &'a str)>) -> io::Result<Vec<CollectedStream>> {
    let mut all = Vec::new();
    for (container, source) in streams {
        let newest = Segments::of(dir, container, source).all()?.pop();
        let end = newest.map(|newest| Ok::<_, io::Error>(newest.bytes + newest.path.metadata()?.len())).transpose()?;
        let (container, source) = (container.to_owned(), source.to_owned());
        all.push(CollectedStream { container, source, bytes: end.unwrap_or(0) });
    }
    Ok(all)
}
