//! What instances that are gone left behind: `LEFT/ID/`, carried like that of the others, removed once all of it is taken, given up
//! when it is too much or too old. What is given up is told as lost as soon as its sink can be told.

use std::io;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use crate::carrier::{Followed, Shared};
use crate::plan::Plan;
use crate::stream;

/// Between two looks at what is too much or too old.
const LOOK: Duration = Duration::from_secs(10);
/// Instances whose losses are still to be told; beyond that they are told to the host's log alone.
const MOST: usize = 4096;
/// Its time of change is when the instance was gone. No container has a dot in its name.
const NOTE: &str = "left.at";

/// Notes that the instance whose segments are here is gone now.
pub(crate) fn note(dir: &Path) {
    // Without it what is here seems a little older than it is.
    if let Err(error) = std::fs::write(dir.join(NOTE), b"") {
        tracing::warn!(dir = %dir.display(), %error, "time cannot be noted");
    }
}

/// Those that left something behind.
pub(crate) fn instances(dir: &Path) -> io::Result<Vec<String>> {
    Ok(std::fs::read_dir(dir)?.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

fn since(dir: &Path) -> io::Result<SystemTime> {
    std::fs::metadata(dir.join(NOTE)).or_else(|_| std::fs::metadata(dir))?.modified()
}

/// Removes what nobody can carry, because there is no plan that says what it is, once it is too old.
pub(crate) fn give_up_unplanned(dir: &Path, keep: Duration) -> bool {
    let old = since(dir).is_ok_and(|since| since.elapsed().is_ok_and(|age| age > keep));
    if !old || matches!(Plan::read(dir), Ok(Some(_))) {
        return false;
    }
    tracing::warn!(dir = %dir.display(), "logs without a plan are given up untold");
    if let Err(error) = std::fs::remove_dir_all(dir) {
        tracing::warn!(dir = %dir.display(), %error, "logs without a plan cannot be removed");
    }
    true
}

/// Removes what is carried.
pub(crate) fn clear(shared: &Shared) {
    let all = shared.followed().clone();
    let done = |followed: &&Arc<Followed>| followed.is_done().unwrap_or(false);
    for followed in all.iter().filter(|followed| followed.left().is_some()).filter(done) {
        forget(shared, followed);
    }
}

fn forget(shared: &Shared, followed: &Followed) {
    shared.followed().retain(|known| known.id != followed.id);
    if let Some(dir) = followed.left()
        && let Err(error) = std::fs::remove_dir_all(&dir)
    {
        tracing::warn!(instance = followed.id, %error, "carried logs cannot be removed");
    }
}

/// Keeps it within its bounds, until the carrier is gone.
pub(crate) async fn watch(shared: Weak<Shared>) {
    while let Some(strong) = shared.upgrade() {
        let _ = tokio::task::spawn_blocking(move || bound(&strong)).await;
        tokio::time::sleep(LOOK).await;
    }
}

/// Gives up the oldest.
fn bound(shared: &Shared) {
    let mut all: Vec<_> = shared
        .followed()
        .iter()
        .filter_map(|followed| {
            let dir = followed.left()?;
            let since = since(&dir).unwrap_or_else(|_| SystemTime::now());
            Some((since, dir, followed.clone()))
        })
        .collect();
    all.sort_by_key(|(since, _, _)| *since);
    let size = |dir: &Path, followed: &Followed| -> u64 {
        followed.plan.streams.iter().map(|of_it| stream::size(&of_it.dir(dir)).unwrap_or(0)).sum()
    };
    let sizes: Vec<u64> = all.iter().map(|(_, dir, followed)| size(dir, followed)).collect();
    let mut total: u64 = sizes.iter().sum();
    let surplus = all.len().saturating_sub(MOST);
    for (at, ((since, dir, followed), size)) in all.iter().zip(sizes).enumerate() {
        if at < surplus {
            tracing::warn!(instance = followed.id, "what it left behind is given up untold");
            forget(shared, followed);
            total -= size;
            continue;
        }
        let old = since.elapsed().is_ok_and(|age| age > shared.settings.keep);
        if size == 0 || !old && total <= shared.settings.keep_bytes {
            continue;
        }
        tracing::warn!(instance = followed.id, bytes = size, old, "logs that it left behind are given up");
        for of_it in &followed.plan.streams {
            if let Err(error) = stream::give_up(&of_it.dir(dir)) {
                tracing::warn!(instance = followed.id, %error, "logs cannot be given up");
            }
        }
        total -= size;
    }
}

#[cfg(test)]
mod tests {
    use joey_api::logs::{LogSource, Logs};

    use super::*;

    #[test]
    fn what_has_no_plan_goes_when_it_is_old() {
        let dir = tempfile::tempdir().unwrap();
        let (planned, unplanned) = (dir.path().join("planned"), dir.path().join("unplanned"));
        let source = LogSource { name: "a".to_owned(), from: "stdout".to_owned(), ..LogSource::default() };
        let logs = Logs { sources: vec![source], ..Logs::default() };
        let (plan, _) = Plan::new("i-1", &logs, &[("web".to_owned(), Vec::new())], |_| Ok("s".to_owned()));
        plan.write(&planned).unwrap();
        std::fs::create_dir_all(unplanned.join("left")).unwrap();
        std::fs::write(unplanned.join("plan.json"), "{").unwrap();
        for dir in [&planned, &unplanned] {
            note(dir);
            let note = std::fs::File::options().write(true).open(dir.join(NOTE)).unwrap();
            note.set_modified(SystemTime::now() - Duration::from_secs(100)).unwrap();
        }
        let keep = Duration::from_secs(200);
        assert!(!give_up_unplanned(&unplanned, keep) && unplanned.exists());
        let keep = Duration::from_secs(50);
        assert!(!give_up_unplanned(&planned, keep) && planned.exists());
        assert!(give_up_unplanned(&unplanned, keep) && !unplanned.exists());
    }
}
