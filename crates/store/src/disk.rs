//! Durable records of the redb engine: format version 1. What the records mean in memory is `state`'s.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::state::{Lease, State};
use crate::writer::Change;
use crate::{Entry, Event, Result, StoreError};

const KEYS: TableDefinition<&str, &[u8]> = TableDefinition::new("keys");
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const LEASES: TableDefinition<u64, u64> = TableDefinition::new("leases");
const FORMAT: u8 = 1;
const HEADER: usize = 33;
/// redb's page cache: reads come from memory, so it serves writes alone.
const CACHE_BYTES: usize = 4 << 20;

pub(crate) struct Disk {
    database: Database,
}

fn write_error(error: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    StoreError::Write(Arc::new(error))
}

fn open_error(error: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    StoreError::Open(Arc::new(error))
}

impl Disk {
    /// Opens or makes the file (mode 0600: it holds secrets) and reads all of it.
    pub(crate) fn open(path: &Path) -> Result<(Self, State)> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(open_error)?;
        let database = Database::builder().set_cache_size(CACHE_BYTES).create_file(file).map_err(open_error)?;
        let disk = Self { database };
        let transaction = disk.database.begin_write().map_err(open_error)?;
        transaction.open_table(KEYS).map_err(open_error)?;
        transaction.open_table(META).map_err(open_error)?;
        transaction.open_table(LEASES).map_err(open_error)?;
        transaction.commit().map_err(open_error)?;
        let state = disk.read()?;
        Ok((disk, state))
    }

    fn read(&self) -> Result<State> {
        let mut state = State::default();
        let transaction = self.database.begin_read().map_err(open_error)?;
        let meta = transaction.open_table(META).map_err(open_error)?;
        state.revision = meta.get("revision").map_err(open_error)?.map_or(0, |value| value.value());
        // History is not kept on disk: a watch from before this start lists again.
        state.compacted = state.revision;
        for row in transaction.open_table(LEASES).map_err(open_error)?.iter().map_err(open_error)? {
            let (id, ttl) = row.map_err(open_error)?;
            let ttl = Duration::from_millis(ttl.value());
            let lease = Lease { ttl, deadline: Instant::now() + ttl, keys: Default::default() };
            state.leases.insert(id.value(), lease);
        }
        for row in transaction.open_table(KEYS).map_err(open_error)?.iter().map_err(open_error)? {
            let (key, record) = row.map_err(open_error)?;
            let entry = decode(key.value(), record.value())?;
            if let Some(lease) = entry.lease.and_then(|id| state.leases.get_mut(&id)) {
                lease.keys.insert(entry.key.clone());
            }
            state.keys.insert(entry.key.clone(), entry);
        }
        Ok(state)
    }

    /// Writes all changes in one durable commit.
    pub(crate) fn commit(&self, changes: &[Change], revision: u64) -> Result<()> {
        let transaction = self.database.begin_write().map_err(write_error)?;
        {
            let mut keys = transaction.open_table(KEYS).map_err(write_error)?;
            let mut meta = transaction.open_table(META).map_err(write_error)?;
            let mut leases = transaction.open_table(LEASES).map_err(write_error)?;
            for change in changes {
                match change {
                    Change::Batch(batch) => {
                        for event in &batch.events {
                            match event {
                                Event::Put { entry, .. } => {
                                    keys.insert(entry.key.as_str(), encode(entry).as_slice()).map_err(write_error)?;
                                }
                                Event::Delete { key, .. } => {
                                    keys.remove(key.as_str()).map_err(write_error)?;
                                }
                            }
                        }
                    }
                    Change::Grant(id, ttl) => {
                        leases.insert(id, ttl.as_millis() as u64).map_err(write_error)?;
                        meta.insert("lease", id).map_err(write_error)?;
                    }
                    Change::Revoke(id) => {
                        leases.remove(id).map_err(write_error)?;
                    }
                }
            }
            meta.insert("revision", revision).map_err(write_error)?;
        }
        transaction.commit().map_err(write_error)
    }

    /// The last lease ever granted.
    pub(crate) fn last_lease(&self) -> Result<u64> {
        let transaction = self.database.begin_read().map_err(open_error)?;
        let meta = transaction.open_table(META).map_err(open_error)?;
        Ok(meta.get("lease").map_err(open_error)?.map_or(0, |value| value.value()))
    }
}

fn encode(entry: &Entry) -> Vec<u8> {
    let mut record = Vec::with_capacity(HEADER + entry.value.len());
    record.push(FORMAT);
    for number in [entry.create_revision, entry.mod_revision, entry.version, entry.lease.unwrap_or(0)] {
        record.extend_from_slice(&number.to_le_bytes());
    }
    record.extend_from_slice(&entry.value);
    record
}

fn decode(key: &str, record: &[u8]) -> Result<Entry> {
    if record.len() < HEADER || record[0] != FORMAT {
        return Err(StoreError::Record(key.to_owned()));
    }
    let number = |index: usize| {
        let at = 1 + index * 8;
        u64::from_le_bytes(record[at..at + 8].try_into().expect("eight bytes of a header whose length was checked"))
    };
    Ok(Entry {
        key: key.to_owned(),
        value: Bytes::copy_from_slice(&record[HEADER..]),
        create_revision: number(0),
        mod_revision: number(1),
        version: number(2),
        lease: Some(number(3)).filter(|id| *id != 0),
    })
}
