//! One suite for every engine: what etcd's semantics promise, and what durable means.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use joey_model::{ErrorKind, Fault};
use joey_store::{Condition, Event, Op, Store, StoreError, TxnOutcome, Watch, WatchBatch};

const PATIENCE: Duration = Duration::from_secs(10);

fn put(key: &str, value: &str) -> Op {
    Op::Put { key: key.to_owned(), value: Bytes::copy_from_slice(value.as_bytes()), lease: None }
}

fn delete(key: &str) -> Op {
    Op::Delete { key: key.to_owned() }
}

fn at(key: &str, equals: u64) -> Condition {
    Condition::ModRevision { key: key.to_owned(), equals }
}

async fn commit(store: &dyn Store, ops: Vec<Op>) -> u64 {
    match store.transact(Vec::new(), ops).await.unwrap() {
        TxnOutcome::Committed { revision } => revision,
        refused => panic!("{refused:?}"),
    }
}

async fn next(watch: &mut Watch) -> WatchBatch {
    tokio::time::timeout(PATIENCE, watch.next()).await.expect("a change in time").expect("open").expect("no error")
}

async fn suite(store: Arc<dyn Store>) {
    compare_and_swap(&*store).await;
    ranges(&*store).await;
    watches(&*store).await;
    leases(&*store).await;
    bad_calls(&*store).await;
    contention(store).await;
}

async fn compare_and_swap(store: &dyn Store) {
    let made = commit(store, vec![put("/cas/a", "1")]).await;
    let (entry, revision) = store.get("/cas/a").await.unwrap();
    let entry = entry.unwrap();
    assert_eq!((entry.create_revision, entry.mod_revision, entry.version, revision), (made, made, 1, made));
    match store.transact(vec![at("/cas/a", 0)], vec![put("/cas/a", "x")]).await.unwrap() {
        TxnOutcome::Refused { current, revision } => assert_eq!((current, revision), (vec![Some(entry)], made)),
        other => panic!("{other:?}"),
    }
    let changed =
        store.transact(vec![at("/cas/a", made), at("/cas/b", 0)], vec![put("/cas/a", "2"), put("/cas/b", "")]);
    assert_eq!(changed.await.unwrap(), TxnOutcome::Committed { revision: made + 1 });
    let entry = store.get("/cas/a").await.unwrap().0.unwrap();
    assert_eq!(
        (entry.create_revision, entry.mod_revision, entry.version, &entry.value[..]),
        (made, made + 1, 2, &b"2"[..])
    );
    let missing = Condition::Exists { key: "/cas/none".to_owned() };
    assert!(matches!(store.transact(vec![missing], vec![delete("/cas/a")]).await.unwrap(), TxnOutcome::Refused { .. }));
    assert_eq!(commit(store, vec![delete("/cas/none")]).await, made + 1, "nothing changed, no revision");
    assert_eq!(commit(store, vec![delete("/cas/a"), delete("/cas/b")]).await, made + 2);
    assert_eq!(store.get("/cas/a").await.unwrap(), (None, made + 2));
}

async fn ranges(store: &dyn Store) {
    let keys: Vec<String> = (0..7).map(|n| format!("/range/{n}")).collect();
    commit(store, keys.iter().map(|key| put(key, "v")).collect()).await;
    commit(store, vec![put("/rang", "v"), put("/range0", "v")]).await;
    let mut found = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let page = store.range("/range/", after.as_deref(), 3).await.unwrap();
        found.extend(page.entries.iter().map(|entry| entry.key.clone()));
        after = found.last().cloned();
        if !page.more {
            break;
        }
        assert_eq!(page.entries.len(), 3);
    }
    assert_eq!(found, keys);
    assert_eq!(store.range("/range/", None, 0).await.unwrap().entries.len(), 7);
    assert!(store.range("/none/", None, 0).await.unwrap().entries.is_empty());
}

async fn watches(store: &dyn Store) {
    let before = store.revision();
    let first = commit(store, vec![put("/watch/a", "1"), put("/elsewhere", "1")]).await;
    let mut watch = store.watch("/watch/", before).await.unwrap();
    let batch = next(&mut watch).await;
    assert_eq!((batch.revision, batch.events.len()), (first, 1), "what was missed comes first, of its prefix alone");
    let second = commit(store, vec![put("/watch/a", "2")]).await;
    match &next(&mut watch).await.events[..] {
        [Event::Put { entry, prev: Some(prev) }] => {
            assert_eq!((&entry.value[..], &prev.value[..], entry.mod_revision), (&b"2"[..], &b"1"[..], second));
        }
        other => panic!("{other:?}"),
    }
    commit(store, vec![put("/elsewhere", "2")]).await;
    let third = commit(store, vec![delete("/watch/a")]).await;
    match &next(&mut watch).await.events[..] {
        [Event::Delete { key, prev, mod_revision }] => {
            assert_eq!((key.as_str(), &prev.value[..], *mod_revision), ("/watch/a", &b"2"[..], third));
        }
        other => panic!("{other:?}"),
    }
    store.compact(third).await.unwrap();
    assert!(matches!(store.watch("/watch/", before).await, Err(StoreError::Compacted { .. })));
    assert!(store.watch("/watch/", third).await.is_ok());
}

async fn leases(store: &dyn Store) {
    let lease = store.grant(Duration::from_secs(1)).await.unwrap();
    let kept = store.grant(Duration::from_secs(3600)).await.unwrap();
    assert_ne!(lease, kept);
    let leased = |key: &str, lease| Op::Put { key: key.to_owned(), value: Bytes::new(), lease: Some(lease) };
    let revision =
        commit(store, vec![leased("/lease/a", lease), leased("/lease/b", lease), leased("/lease/c", kept)]).await;
    commit(store, vec![put("/lease/b", "belongs to nobody now")]).await;
    let mut watch = store.watch("/lease/a", revision).await.unwrap();
    assert!(matches!(&next(&mut watch).await.events[..], [Event::Delete { .. }]), "the lease ended");
    assert!(store.get("/lease/b").await.unwrap().0.is_some());
    assert!(matches!(store.keep_alive(lease).await, Err(StoreError::NoLease(_))));
    store.keep_alive(kept).await.unwrap();
    store.revoke(kept).await.unwrap();
    assert!(store.get("/lease/c").await.unwrap().0.is_none());
    assert!(matches!(store.revoke(kept).await, Err(StoreError::NoLease(_))));
    let late = store.transact(Vec::new(), vec![leased("/lease/d", kept)]).await;
    assert!(matches!(late, Err(StoreError::NoLease(_))));
}

async fn bad_calls(store: &dyn Store) {
    let long = "k".repeat(joey_store::MAX_KEY + 1);
    let big = Op::Put { key: "/big".to_owned(), value: Bytes::from(vec![0; joey_store::MAX_VALUE + 1]), lease: None };
    for ops in [vec![put("", "")], vec![put(&long, "")], vec![big], vec![put("/twice", ""), delete("/twice")]] {
        assert!(matches!(store.transact(Vec::new(), ops).await, Err(StoreError::Invalid { .. })));
    }
}

/// Many writers swap one counter: every success is counted once.
async fn contention(store: Arc<dyn Store>) {
    commit(&*store, vec![put("/counter", "0")]).await;
    let writers = (0..16).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            for _ in 0..25 {
                loop {
                    let entry = store.get("/counter").await.unwrap().0.unwrap();
                    let number: u32 = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
                    let swap = store.transact(
                        vec![at("/counter", entry.mod_revision)],
                        vec![put("/counter", &(number + 1).to_string())],
                    );
                    if matches!(swap.await.unwrap(), TxnOutcome::Committed { .. }) {
                        break;
                    }
                }
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    assert_eq!(&store.get("/counter").await.unwrap().0.unwrap().value[..], b"400");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_engine() {
    suite(joey_store::memory()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redb_engine() {
    let dir = tempfile::tempdir().unwrap();
    suite(joey_store::redb(&dir.path().join("store.redb")).unwrap()).await;
}

#[tokio::test]
async fn a_slow_watch_is_cut_off_and_holds_up_nobody() {
    let store = joey_store::memory();
    let mut watch = store.watch("/", 0).await.unwrap();
    for n in 0..10_000 {
        commit(&*store, vec![put("/a", &n.to_string())]).await;
    }
    let mut delivered = 0;
    let end = loop {
        match tokio::time::timeout(PATIENCE, watch.next()).await.expect("in time") {
            Some(Ok(batch)) => {
                delivered += 1;
                assert_eq!(batch.revision, delivered, "no gap before the cut");
            }
            end => break end,
        }
    };
    assert!(matches!(end, Some(Err(StoreError::Lagged))));
    assert!(delivered < 10_000);
    assert!(watch.next().await.is_none());
}

/// Opens the file again once the writer thread of the store before has let go of it.
async fn reopen(path: &std::path::Path) -> Arc<dyn Store> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match joey_store::redb(path) {
            Err(StoreError::InUse { .. }) if tokio::time::Instant::now() < deadline => tokio::task::yield_now().await,
            opened => return opened.unwrap(),
        }
    }
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let store = joey_store::redb(&path).unwrap();
    let lease = store.grant(Duration::from_secs(3600)).await.unwrap();
    commit(&*store, vec![put("/a", "1"), put("/b", "2")]).await;
    commit(&*store, vec![Op::Put { key: "/c".to_owned(), value: Bytes::from_static(b"3"), lease: Some(lease) }]).await;
    let revision = commit(&*store, vec![delete("/b")]).await;
    let before = store.range("/", None, 0).await.unwrap();
    assert!(matches!(joey_store::redb(&path), Err(StoreError::InUse { .. })));
    drop(store);
    let store = reopen(&path).await;
    assert_eq!(store.range("/", None, 0).await.unwrap(), before);
    assert!(matches!(store.watch("/", revision - 1).await, Err(StoreError::Compacted { .. })));
    assert!(store.watch("/", revision).await.is_ok());
    store.revoke(lease).await.unwrap();
    assert!(store.get("/c").await.unwrap().0.is_none());
    assert_ne!(store.grant(Duration::from_secs(1)).await.unwrap(), lease, "ids are not used again");
}

/// A disk that is small and of the test's own, taken away at the end.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mounted() -> Self {
        let disk = Self(tempfile::tempdir().unwrap());
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=32m", "small"]).arg(disk.0.path()).status();
        assert!(mounted.is_ok_and(|status| status.success()), "root mounts a tmpfs");
        disk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn fill(&self) {
        let mut ballast = std::fs::File::create(self.path("ballast")).unwrap();
        while ballast.write_all(&[1; 4096]).is_ok() {}
    }

    fn make_room(&self) {
        std::fs::remove_file(self.path("ballast")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_is_told_and_what_was_acknowledged_stays() {
    let disk = SmallDisk::mounted();
    let path = disk.path("store");
    let store = joey_store::redb(&path).unwrap();
    commit(&*store, vec![put("/kept", "before")]).await;
    disk.fill();
    let (mut acknowledged, value) = (store.revision(), "x".repeat(100_000));
    let refused = loop {
        // The file may have room for a few yet.
        match store.transact(Vec::new(), vec![put(&format!("/more/{acknowledged}"), &value)]).await {
            Ok(TxnOutcome::Committed { revision }) => acknowledged = revision,
            Ok(refused) => panic!("{refused:?}"),
            Err(error) => break error,
        }
    };
    for error in [refused, store.transact(Vec::new(), vec![put("/again", &value)]).await.unwrap_err()] {
        assert!(matches!(error, StoreError::Full { .. }), "{error}");
        let fault = Fault::from(error);
        assert_eq!((fault.kind, fault.reason.as_str()), (ErrorKind::Exhausted, "DiskFull"));
    }
    let (kept, revision) = store.get("/kept").await.unwrap();
    assert_eq!((&kept.unwrap().value[..], revision), (&b"before"[..], acknowledged), "it is read all the same");
    assert_eq!(store.get(&format!("/more/{acknowledged}")).await.unwrap().0, None, "what was refused is not there");
    disk.make_room();
    assert_eq!(commit(&*store, vec![put("/kept", "after")]).await, acknowledged + 1, "it works again by itself");
    drop(store);
    let store = reopen(&path).await;
    assert_eq!(&store.get("/kept").await.unwrap().0.unwrap().value[..], b"after");
    assert_eq!((store.revision(), store.get("/again").await.unwrap().0), (acknowledged + 1, None));
}
