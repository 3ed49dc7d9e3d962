//! The journal on redb: the live keys and the leases as they are after the last step.

use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};

use crate::journal::{Journal, Kept, Step};
use crate::{Entry, StoreError};

const FORMAT: u64 = 1;
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Key → create revision, mod revision, version, lease (each 8 bytes, little-endian), value.
const KEYS: TableDefinition<&str, &[u8]> = TableDefinition::new("keys");
const LEASES: TableDefinition<u64, u64> = TableDefinition::new("leases");
const HEAD: usize = 32;
/// Reads are served from memory; the cache only helps commits find their pages.
const CACHE: usize = 4 << 20;

pub(crate) struct RedbJournal {
    path: PathBuf,
    /// `None` after a failure until it was opened again: redb refuses all work after an error of the disk.
    database: Option<Database>,
    /// Revision and last lease of the last step that is known to be kept.
    kept: (u64, u64),
    /// The same of an acknowledged step whose commit failed: it may be kept or not.
    perhaps_kept: Option<(u64, u64)>,
}

pub(crate) fn failed<E: Into<redb::Error>>(operation: &'static str) -> impl Fn(E) -> StoreError {
    move |error| match error.into() {
        redb::Error::Io(error) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
            StoreError::Full { operation }
        }
        other => StoreError::Engine { operation, message: other.to_string() },
    }
}

impl RedbJournal {
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        Ok(Self { path: path.to_owned(), database: Some(Self::open_file(path)?), kept: (0, 0), perhaps_kept: None })
    }

    fn open_file(path: &Path) -> Result<Database, StoreError> {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(failed("open its file"))?;
        Database::builder().set_cache_size(CACHE).create_file(file).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.to_owned() },
            other => failed("open its file")(other),
        })
    }

    /// The database, opened again after a failure. A step whose commit failed may be on disk all the same. Unless it was
    /// acknowledged, memory does not have it then, and nothing more is written over it; the next start reads what is there.
    fn database(&mut self) -> Result<&Database, StoreError> {
        let database = match self.database.take() {
            Some(database) => database,
            None => {
                let database = Self::open_file(&self.path)?;
                let found = Self::read(&database).map_err(failed("read its tables"))?.1;
                let found = Some((found.revision, found.last_lease));
                if found != Some(self.kept) && found != self.perhaps_kept {
                    let message = "a change that was told as failed is on disk; restart to read it".to_owned();
                    return Err(StoreError::Engine { operation: "go on after a failure", message });
                }
                tracing::warn!(path = %self.path.display(), "the store works again");
                database
            }
        };
        Ok(self.database.insert(database))
    }

    fn prepare(database: &Database) -> Result<(), redb::Error> {
        let write = database.begin_write()?;
        {
            let mut meta = write.open_table(META)?;
            if meta.get("format")?.is_none() {
                meta.insert("format", FORMAT)?;
            }
            write.open_table(KEYS)?;
            write.open_table(LEASES)?;
        }
        write.commit()?;
        Ok(())
    }

    fn read(database: &Database) -> Result<(u64, Kept), redb::Error> {
        let read = database.begin_read()?;
        let meta = read.open_table(META)?;
        let number = |name| meta.get(name).map(|found| found.map_or(0, |value| value.value()));
        let mut kept = Kept { revision: number("revision")?, last_lease: number("last-lease")?, ..Kept::default() };
        for row in read.open_table(KEYS)?.iter()? {
            let (key, bytes) = row?;
            kept.entries.extend(decode(key.value(), bytes.value()));
        }
        for row in read.open_table(LEASES)?.iter()? {
            let (lease, seconds) = row?;
            kept.leases.insert(lease.value(), seconds.value());
        }
        Ok((number("format")?, kept))
    }

    fn write(database: &Database, step: &Step) -> Result<(), redb::Error> {
        let write = database.begin_write()?;
        {
            let mut meta = write.open_table(META)?;
            meta.insert("revision", step.revision)?;
            meta.insert("last-lease", step.last_lease)?;
            let mut keys = write.open_table(KEYS)?;
            for (key, entry) in &step.keys {
                match entry {
                    Some(entry) => drop(keys.insert(key.as_str(), encode(entry).as_slice())?),
                    None => drop(keys.remove(key.as_str())?),
                }
            }
            let mut leases = write.open_table(LEASES)?;
            for (&lease, seconds) in &step.leases {
                match seconds {
                    Some(seconds) => drop(leases.insert(lease, seconds)?),
                    None => drop(leases.remove(lease)?),
                }
            }
        }
        // redb's default durability: the commit is on disk when it returns.
        write.commit()?;
        Ok(())
    }
}

impl Journal for RedbJournal {
    fn load(&mut self) -> Result<Kept, StoreError> {
        let database = match &self.database {
            Some(database) => database,
            None => return Err(StoreError::Closed),
        };
        Self::prepare(database).map_err(failed("prepare its tables"))?;
        let (format, kept) = Self::read(database).map_err(failed("read its tables"))?;
        self.kept = (kept.revision, kept.last_lease);
        match format {
            FORMAT => Ok(kept),
            found => Err(StoreError::Format { path: self.path.clone(), found, wanted: FORMAT }),
        }
    }

    fn keep(&mut self, step: &Step) -> Result<(), StoreError> {
        let written = Self::write(self.database()?, step).map_err(failed("commit"));
        match written {
            Ok(()) => (self.kept, self.perhaps_kept) = ((step.revision, step.last_lease), None),
            Err(_) => {
                self.database = None;
                self.perhaps_kept = step.acknowledged.then_some((step.revision, step.last_lease));
            }
        }
        written
    }
}

fn encode(entry: &Entry) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD + entry.value.len());
    for number in [entry.create_revision, entry.mod_revision, entry.version, entry.lease.unwrap_or(0)] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&entry.value);
    bytes
}

fn decode(key: &str, bytes: &[u8]) -> Option<Entry> {
    let (head, value) = bytes.split_at_checked(HEAD)?;
    let mut numbers = head.chunks_exact(8).map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap_or_default()));
    Some(Entry {
        key: key.to_owned(),
        create_revision: numbers.next()?,
        mod_revision: numbers.next()?,
        version: numbers.next()?,
        lease: numbers.next().filter(|&lease| lease != 0),
        value: Bytes::copy_from_slice(value),
    })
}
