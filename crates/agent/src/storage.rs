//! What a Pod leaves on the disk: writable layers, logs and empty directories are measured again and again, and the Pod whose
//! limits are exceeded is ended as `Evicted`, in the kubelet's words (`pkg/kubelet/eviction`).
//!
//! A file that is open but removed is not seen, as under a kubelet without quotas; it does take room on the Pod's own disk, which
//! is a little larger than what the Pod may use (`joey_disk`).

use std::fs::{OpenOptions, ReadDir};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use joey_api::agent::Failed;
use joey_api::lifecycle::storage_limit;
use tokio::time::Instant;

use crate::supervisor::Agent;
use crate::{sys, volumes};

/// The shortest pause between two looks; a long look makes the pause longer, so that it costs a twentieth of a core at most.
const PAUSE: Duration = Duration::from_secs(2);
const PAUSES: u32 = 20;
/// What is left to a Pod that is evicted: the kubelet's immediate eviction.
const GRACE: Duration = Duration::from_secs(1);
/// Entries looked at before others have their turn.
const TURN: u32 = 256;
/// Directories within each other that are looked into; what lies deeper exceeds every limit.
const DEPTH: usize = 128;
/// openat2: never out of the directory, over links or onto other mounts.
const STRICT: u64 = 0x08 | 0x04 | 0x02 | 0x01;

/// Measures where there is a limit, until one is exceeded.
pub async fn watch(agent: Arc<Agent>) {
    let mut changes = agent.state.subscribe();
    loop {
        let began = Instant::now();
        if !is_limited(&agent) {
            // A container that is changed may get one.
            if changes.changed().await.is_err() {
                return;
            }
            continue;
        }
        if let Some(message) = exceeded(&agent).await {
            agent.fail(Failed { reason: "Evicted".to_owned(), message }, true, GRACE);
            return;
        }
        tokio::time::sleep((began.elapsed() * PAUSES).max(PAUSE)).await;
    }
}

fn is_limited(agent: &Agent) -> bool {
    let volume =
        agent.config.volumes.iter().any(|volume| volumes::is_on_disk(volume) && volume.size_limit_bytes.is_some());
    volume || agent.lives().iter().any(|life| life.container().resources.ephemeral_storage_bytes.is_some())
}

/// The limit that is exceeded, as the kubelet words it. Its order too: volumes, the Pod, containers.
async fn exceeded(agent: &Agent) -> Option<String> {
    let containers: Vec<_> = agent.lives().iter().map(|life| life.container()).collect();
    let limits = containers.iter().map(|container| (container.role, container.resources.ephemeral_storage_bytes));
    let whole = storage_limit(limits);
    let mut total = 0u64;
    for volume in agent.config.volumes.iter().filter(|volume| volumes::is_on_disk(volume)) {
        if whole.is_none() && volume.size_limit_bytes.is_none() {
            continue;
        }
        let used = used(&volumes::on_disk(&agent.dir, volume)).await;
        total = total.saturating_add(used);
        if let Some(limit) = volume.size_limit_bytes.filter(|limit| used > *limit) {
            let (name, limit) = (&volume.name, quantity(limit));
            return Some(format!("Usage of EmptyDir volume \"{name}\" exceeds the limit \"{limit}\". "));
        }
    }
    let mut fault = None;
    for container in &containers {
        let limit = container.resources.ephemeral_storage_bytes;
        if whole.is_none() && limit.is_none() {
            continue;
        }
        let layers = used(&agent.dir.join("upper").join(&container.name)).await;
        let used = layers.saturating_add(logs(&agent.dir.join("logs").join(&container.name)));
        total = total.saturating_add(used);
        if let Some(limit) = limit.filter(|limit| used > *limit) {
            let (name, limit) = (&container.name, quantity(limit));
            fault.get_or_insert(format!("Container {name} exceeded its local ephemeral storage limit \"{limit}\". "));
        }
    }
    match whole.filter(|limit| total > *limit) {
        Some(limit) => {
            let limit = quantity(limit);
            Some(format!("Pod ephemeral local storage usage exceeds the total limit of containers {limit}. "))
        }
        None => fault,
    }
}

/// Bytes on the disk below a directory; nothing where it cannot be looked into, which is where it is not there.
async fn used(place: &Path) -> u64 {
    match measure(place, DEPTH).await {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => {
            eprintln!("cannot measure {}: {error}", place.display());
            0
        }
    }
}

/// Bytes of a container's logs. Their further names, for the collector, lie elsewhere and take nothing off.
fn logs(place: &Path) -> u64 {
    let entries = std::fs::read_dir(place).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|meta| meta.blocks() * 512).sum()
}

/// Walks by open directories, never by paths: what is renamed meanwhile leads nowhere else. Containers write there.
async fn measure(place: &Path, depth: usize) -> io::Result<u64> {
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let top: OwnedFd = OpenOptions::new().read(true).custom_flags(flags).open(place)?.into();
    let mut stack = vec![(entries(&top)?, top)];
    let (mut bytes, mut seen) = (0u64, 0u32);
    while let Some((list, dir)) = stack.last_mut() {
        let Some(entry) = list.next() else {
            stack.pop();
            continue;
        };
        // What is gone meanwhile takes no room.
        let Ok((entry, meta)) = entry.and_then(|entry| entry.metadata().map(|meta| (entry, meta))) else { continue };
        if meta.is_dir() {
            bytes = bytes.saturating_add(meta.blocks() * 512);
            let opened = sys::openat2(dir.as_fd(), Path::new(&entry.file_name()), flags, STRICT);
            if stack.len() >= depth {
                return Ok(u64::MAX);
            }
            if let Ok(below) = opened.and_then(|fd| Ok((entries(&fd)?, fd))) {
                stack.push(below);
            }
        } else {
            // All links of a file lie in the same tree: no link leads out of a mount. Each counts for its part.
            bytes = bytes.saturating_add(meta.blocks() * 512 / meta.nlink().max(1));
        }
        seen += 1;
        if seen.is_multiple_of(TURN) {
            tokio::task::yield_now().await;
        }
    }
    Ok(bytes)
}

fn entries(dir: &OwnedFd) -> io::Result<ReadDir> {
    std::fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()))
}

/// An amount in Kubernetes' notation: `1Mi`, `500k`, `1025`.
fn quantity(bytes: u64) -> String {
    let scaled = |unit: u64, names: [&str; 6]| {
        let mut scaled = (bytes, "");
        for name in names {
            if scaled.0 == 0 || !scaled.0.is_multiple_of(unit) {
                break;
            }
            scaled = (scaled.0 / unit, name);
        }
        format!("{}{}", scaled.0, scaled.1)
    };
    match bytes.is_multiple_of(1024) {
        true => scaled(1024, ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]),
        false => scaled(1000, ["k", "M", "G", "T", "P", "E"]),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn amounts() {
        for (bytes, text) in
            [(1 << 20, "1Mi"), (3 << 29, "1536Mi"), (500_000, "500k"), (1025, "1025"), (0, "0"), (512, "512")]
        {
            assert_eq!(quantity(bytes), text);
        }
    }

    #[tokio::test]
    async fn a_tree_is_measured_by_what_it_takes() {
        let place = std::env::temp_dir().join(format!("joey-agent-storage-{}", std::process::id()));
        fs::create_dir_all(place.join("sub")).unwrap();
        let empty = measure(&place, DEPTH).await.unwrap();
        fs::write(place.join("sub/file"), vec![1; 1 << 20]).unwrap();
        fs::hard_link(place.join("sub/file"), place.join("again")).unwrap();
        fs::File::create(place.join("hole")).unwrap().set_len(1 << 30).unwrap();
        std::os::unix::fs::symlink("/", place.join("sub/out")).unwrap();
        let filled = measure(&place, DEPTH).await.unwrap() - empty;
        assert!((1 << 20..2 << 20).contains(&filled), "{filled}");
        assert_eq!(measure(&place, 1).await.unwrap(), u64::MAX, "too deep to be measured");
        assert_eq!(used(&place.join("absent")).await, 0);
        fs::remove_dir_all(place).unwrap();
    }
}
