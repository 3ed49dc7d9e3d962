//! State that survives: keys with revisions, transactions, watches and leases, with the semantics of etcd v3.
//!
//! * One revision counter for the whole store: every committed transaction that changed something takes the next one.
//! * [`Store::transact`] compares and swaps; it is durable before it answers.
//! * A watch delivers every change after a revision, in order and once, or says that it cannot ([`StoreError::Compacted`],
//!   [`StoreError::Lagged`]): then the watcher lists again.
//! * A lease deletes its keys when it is not kept alive. Leases begin anew when the store is opened: a process that was
//!   away does not find its keys gone at once.
//!
//! Must never know what is stored: no Kubernetes, no JSON. Engines differ in [`journal`] alone.

mod engine;
mod journal;
mod log;
mod redb_journal;
mod state;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use joey_model::{ErrorKind, Fault};

pub use watch::Watch;

/// Names a lease; never 0, never reused in one store.
pub type LeaseId = u64;

/// Largest key, in bytes.
pub const MAX_KEY: usize = 1024;
/// Largest value, in bytes (etcd's default limit for a request is 1.5 MiB; Kubernetes' objects stay below it).
pub const MAX_VALUE: usize = 3 << 20;

/// A live key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub value: Bytes,
    /// Revision that made the key.
    pub create_revision: u64,
    /// Revision of the last change.
    pub mod_revision: u64,
    /// Changes since it was made; 1 at first.
    pub version: u64,
    pub lease: Option<LeaseId>,
}

/// What must hold for a transaction to commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// The key was last changed by this revision; 0: there is no such key.
    ModRevision { key: String, equals: u64 },
    /// There is such a key.
    Exists { key: String },
}

impl Condition {
    pub fn key(&self) -> &str {
        match self {
            Self::ModRevision { key, .. } | Self::Exists { key } => key,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Put {
        key: String,
        value: Bytes,
        lease: Option<LeaseId>,
    },
    /// Deleting a key that is not there changes nothing.
    Delete {
        key: String,
    },
}

impl Op {
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TxnOutcome {
    /// Durable. Where nothing changed, the revision is that of the store.
    Committed { revision: u64 },
    /// A condition did not hold, nothing was done. `current` holds what is there for each condition's key, in order.
    Refused { current: Vec<Option<Entry>>, revision: u64 },
}

/// Entries in the order of their keys, as they were together at `revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    pub entries: Vec<Entry>,
    pub revision: u64,
    /// There are more behind the last one.
    pub more: bool,
}

/// The changes of one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchBatch {
    pub revision: u64,
    pub events: Vec<Event>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Put { entry: Entry, prev: Option<Entry> },
    Delete { key: String, prev: Entry, mod_revision: u64 },
}

impl Event {
    pub fn key(&self) -> &str {
        match self {
            Self::Put { entry, .. } => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    #[error("revision {asked} is compacted, the oldest one kept is {oldest}")]
    Compacted { asked: u64, oldest: u64 },
    #[error("watch was too slow and has lost changes")]
    Lagged,
    #[error("lease {0} does not exist")]
    NoLease(LeaseId),
    #[error("transaction on \"{key}\" is not valid: {why}")]
    Invalid { key: String, why: &'static str },
    #[error("store is closed")]
    Closed,
    #[error("store {path} is in use by another process")]
    InUse { path: PathBuf },
    #[error("store {path} has format {found}, this program reads {wanted}")]
    Format { path: PathBuf, found: u64, wanted: u64 },
    #[error("store could not {operation}: its disk is full")]
    Full { operation: &'static str },
    #[error("store could not {operation}: {message}")]
    Engine { operation: &'static str, message: String },
}

impl StoreError {
    /// How the caller should react.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Compacted { .. } | Self::Lagged | Self::Closed => ErrorKind::Retryable,
            Self::NoLease(_) => ErrorKind::NotFound,
            Self::Invalid { .. } => ErrorKind::Invalid,
            Self::InUse { .. } => ErrorKind::Conflict,
            Self::Full { .. } => ErrorKind::Exhausted,
            Self::Format { .. } | Self::Engine { .. } => ErrorKind::Internal,
        }
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        let message = match &error {
            StoreError::Full { .. } => {
                return Fault::new(error.kind(), "DiskFull", "state could not be written: the platform's disk is full")
                    .with_hint("free space on the disk that holds the data directory; the same call works then");
            }
            // Paths and engine messages are for the platform's own log.
            StoreError::InUse { .. } | StoreError::Format { .. } | StoreError::Engine { .. } => {
                "state could not be read or written".to_owned()
            }
            other => other.to_string(),
        };
        Fault::new(error.kind(), "StoreFailed", message)
    }
}

#[async_trait]
pub trait Store: Send + Sync {
    /// The entry, and the revision of the store when it was read.
    async fn get(&self, key: &str) -> Result<(Option<Entry>, u64), StoreError>;

    /// At most `limit` entries (0: all) whose key begins with `prefix` and, if given, is greater than `after`.
    async fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Range, StoreError>;

    /// Does every operation if every condition holds, else nothing. Durable when it answers. A key may be in one operation only.
    async fn transact(&self, conditions: Vec<Condition>, ops: Vec<Op>) -> Result<TxnOutcome, StoreError>;

    /// Every change after the revision to keys that begin with `prefix`.
    async fn watch(&self, prefix: &str, after_revision: u64) -> Result<Watch, StoreError>;

    /// Forgets changes before the revision; live keys stay.
    async fn compact(&self, before: u64) -> Result<(), StoreError>;

    /// A lease that ends `ttl` after it was last kept alive.
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError>;

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Ends a lease now and deletes its keys.
    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Revision of the last change.
    fn revision(&self) -> u64;
}

/// An engine that keeps nothing: for tests, and for a skeleton of a new engine.
pub fn memory() -> Arc<dyn Store> {
    match engine::Engine::open(Box::new(journal::Forgetful)) {
        Ok(engine) => Arc::new(engine),
        Err(error) => unreachable!("a journal without disk cannot fail to open: {error}"),
    }
}

/// The embedded engine: a database at `path` and its log beside it (`.log`), made (mode 0600) when they are not there. They belong
/// together: neither is whole without the other. One process at a time.
pub fn redb(path: &Path) -> Result<Arc<dyn Store>, StoreError> {
    let database = redb_journal::RedbJournal::open(path)?;
    let journal = log::LoggedJournal::open(database, &path.with_extension("log"))?;
    Ok(Arc::new(engine::Engine::open(Box::new(journal))?))
}
