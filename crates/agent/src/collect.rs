//! The looking at a container's files while it runs, once in [`PAUSE`], and once more after its end. What may be looked at, and what
//! becomes of it, is in `joey_collect`.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use joey_collect::Files;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::life::Life;
use crate::supervisor::lock;

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
