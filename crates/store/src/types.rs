//! The store's interface: entries, transactions, events, errors and the [`Store`] trait. No engine lives here.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use joey_model::{ErrorKind, Fault};

use crate::Watch;

/// Names a lease; never 0 and never reused in one store.
pub type LeaseId = u64;

pub type Result<T> = std::result::Result<T, StoreError>;

/// One live key. Cloning shares the value's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub value: Bytes,
    /// Revision that made the key (again, after a deletion).
    pub create_revision: u64,
    /// Revision that wrote it last.
    pub mod_revision: u64,
    /// Writes since its creation, from 1.
    pub version: u64,
    pub lease: Option<LeaseId>,
}

/// What must hold for a transaction to be carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// The key was last written at this revision; 0: it does not exist.
    ModRevision {
        key: String,
        equals: u64,
    },
    Exists(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Put {
        key: String,
        value: Bytes,
        lease: Option<LeaseId>,
    },
    /// Deleting an absent key is no error and makes no event.
    Delete {
        key: String,
    },
}

/// How a transaction ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TxnOutcome {
    /// Durable. `revision` is that of its changes, or the store's when it changed nothing.
    Committed { revision: u64 },
    /// A condition did not hold; `current` is what the key of the first such condition holds.
    Refused { current: Option<Entry> },
}

/// A page of a prefix, in key order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    pub entries: Vec<Entry>,
    /// The store's revision at which the page was read.
    pub revision: u64,
    /// Whether keys of the prefix follow the last entry.
    pub more: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Put { entry: Entry, prev: Option<Entry> },
    Delete { key: String, prev: Option<Entry>, mod_revision: u64 },
}

impl Event {
    pub fn key(&self) -> &str {
        match self {
            Self::Put { entry, .. } => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }
}

/// The events of one revision, in the order of their operations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchBatch {
    pub revision: u64,
    pub events: Vec<Event>,
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    #[error("watch from revision {requested}: history before revision {compacted} is compacted")]
    Compacted { requested: u64, compacted: u64 },
    #[error("watch of \"{prefix}\": the reader fell behind and was cut off")]
    Lagged { prefix: String },
    #[error("lease {0} is not known")]
    NoLease(LeaseId),
    #[error("transaction writes key \"{0}\" twice")]
    DuplicateKey(String),
    #[error("open store")]
    Open(#[source] Arc<dyn std::error::Error + Send + Sync>),
    #[error("write store")]
    Write(#[source] Arc<dyn std::error::Error + Send + Sync>),
    #[error("read store record of \"{0}\": its format is not known")]
    Record(String),
    #[error("store is closed")]
    Closed,
}

impl StoreError {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Compacted { .. } | Self::Lagged { .. } => ErrorKind::Conflict,
            Self::NoLease(_) => ErrorKind::NotFound,
            Self::DuplicateKey(_) => ErrorKind::Invalid,
            Self::Closed => ErrorKind::Retryable,
            Self::Open(_) | Self::Write(_) | Self::Record(_) => ErrorKind::Internal,
        }
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        let message = match error.kind() {
            ErrorKind::Internal => "the store could not be used".to_owned(),
            _ => error.to_string(),
        };
        Fault::new(error.kind(), "StoreError", message)
    }
}

/// etcd's semantics over one key space. Reads come from memory and see only what is durable.
#[async_trait::async_trait]
pub trait Store: Send + Sync {
    /// The entry and the store's revision at which it was read.
    async fn get(&self, key: &str) -> Result<(Option<Entry>, u64)>;
    /// At most `limit` entries (0: all) whose keys begin with `prefix` and sort after `after`.
    async fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Range>;
    /// Carries out all operations at one revision, or none. Durable before it returns.
    async fn transact(&self, conditions: Vec<Condition>, ops: Vec<Op>) -> Result<TxnOutcome>;
    /// Every event of the prefix after the revision, then the new ones. Fails when that history is compacted.
    async fn watch(&self, prefix: &str, after_revision: u64) -> Result<Watch>;
    /// Forgets the history of revisions below `before`.
    async fn compact(&self, before: u64) -> Result<()>;
    /// A lease whose keys are deleted when it is not kept alive for `ttl`.
    async fn grant(&self, ttl: Duration) -> Result<LeaseId>;
    /// Ends a lease and deletes its keys.
    async fn revoke(&self, lease: LeaseId) -> Result<()>;
    /// Starts the lease's time again.
    async fn keepalive(&self, lease: LeaseId) -> Result<()>;
    fn revision(&self) -> u64;
}
