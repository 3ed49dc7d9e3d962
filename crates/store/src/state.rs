//! The live keys in memory, the recent changes, the leases: everything that is read. Changed by the engine's writer alone.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::journal::{Kept, Step};
use crate::watch::{Watch, Watchers};
use crate::{Entry, Event, LeaseId, Range, StoreError, WatchBatch};

/// Changes kept for watches that resume: so many revisions at most …
const HISTORY_REVISIONS: usize = 8192;
/// … and so many bytes of values.
const HISTORY_BYTES: usize = 16 << 20;

pub(crate) struct Lease {
    pub(crate) ttl: Duration,
    pub(crate) ends: Instant,
    pub(crate) keys: BTreeSet<String>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) revision: u64,
    pub(crate) live: BTreeMap<String, Entry>,
    pub(crate) leases: HashMap<LeaseId, Lease>,
    pub(crate) last_lease: LeaseId,
    history: VecDeque<Arc<WatchBatch>>,
    history_bytes: usize,
    /// Changes up to here are forgotten.
    compacted: u64,
    watchers: Watchers,
}

impl State {
    pub(crate) fn restored(kept: Kept, now: Instant) -> Self {
        let mut state =
            Self { revision: kept.revision, compacted: kept.revision, last_lease: kept.last_lease, ..Self::default() };
        for (lease, seconds) in kept.leases {
            state.lease_is(lease, Some(seconds), now);
        }
        for entry in kept.entries {
            if let Some(lease) = entry.lease.and_then(|lease| state.leases.get_mut(&lease)) {
                lease.keys.insert(entry.key.clone());
            }
            state.live.insert(entry.key.clone(), entry);
        }
        state
    }

    pub(crate) fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Range {
        let from = match after.filter(|after| *after >= prefix) {
            Some(after) => Bound::Excluded(after),
            None => Bound::Included(prefix),
        };
        let limit = if limit == 0 { usize::MAX } else { limit };
        let mut found =
            self.live.range::<str, _>((from, Bound::Unbounded)).take_while(|(key, _)| key.starts_with(prefix));
        let entries: Vec<Entry> = found.by_ref().take(limit).map(|(_, entry)| entry.clone()).collect();
        Range { entries, revision: self.revision, more: found.next().is_some() }
    }

    pub(crate) fn watch(&mut self, prefix: &str, after: u64) -> Result<Watch, StoreError> {
        if after < self.compacted {
            return Err(StoreError::Compacted { asked: after, oldest: self.compacted });
        }
        let missed =
            self.history.iter().filter(|batch| batch.revision > after).filter_map(|batch| of_prefix(batch, prefix));
        Ok(self.watchers.add(prefix, missed.collect()))
    }

    /// Makes a durable step visible and tells the watchers. `batches` are its changes, revision by revision.
    pub(crate) fn apply(&mut self, step: Step, batches: Vec<WatchBatch>, now: Instant) {
        self.last_lease = step.last_lease;
        for (lease, seconds) in step.leases {
            self.lease_is(lease, seconds, now);
        }
        for (key, entry) in step.keys {
            let before = match &entry {
                Some(entry) => self.live.insert(key.clone(), entry.clone()),
                None => self.live.remove(&key),
            };
            if let Some(lease) = before.and_then(|before| before.lease).and_then(|lease| self.leases.get_mut(&lease)) {
                lease.keys.remove(&key);
            }
            if let Some(lease) = entry.and_then(|entry| entry.lease).and_then(|lease| self.leases.get_mut(&lease)) {
                lease.keys.insert(key);
            }
        }
        self.revision = step.revision;
        for batch in batches {
            let batch = Arc::new(batch);
            self.watchers.tell(&batch);
            self.history_bytes += weight(&batch);
            self.history.push_back(batch);
        }
        while self.history.len() > HISTORY_REVISIONS || self.history_bytes > HISTORY_BYTES {
            self.forget_oldest();
        }
    }

    pub(crate) fn compact(&mut self, before: u64) {
        while self.history.front().is_some_and(|batch| batch.revision < before) {
            self.forget_oldest();
        }
    }

    pub(crate) fn keep_alive(&mut self, lease: LeaseId, now: Instant) -> Result<(), StoreError> {
        let lease = self.leases.get_mut(&lease).ok_or(StoreError::NoLease(lease))?;
        lease.ends = now + lease.ttl;
        Ok(())
    }

    pub(crate) fn next_end(&self) -> Option<Instant> {
        self.leases.values().map(|lease| lease.ends).min()
    }

    fn lease_is(&mut self, lease: LeaseId, seconds: Option<u64>, now: Instant) {
        match seconds {
            Some(seconds) => {
                let ttl = Duration::from_secs(seconds);
                self.leases.insert(lease, Lease { ttl, ends: now + ttl, keys: BTreeSet::new() });
            }
            None => drop(self.leases.remove(&lease)),
        }
    }

    fn forget_oldest(&mut self) {
        if let Some(batch) = self.history.pop_front() {
            self.compacted = batch.revision;
            self.history_bytes -= weight(&batch);
        }
    }
}

/// The part of a batch that a prefix sees; shared where it is all of it.
pub(crate) fn of_prefix(batch: &Arc<WatchBatch>, prefix: &str) -> Option<Arc<WatchBatch>> {
    let seen = batch.events.iter().filter(|event| event.key().starts_with(prefix)).count();
    match seen {
        0 => None,
        all if all == batch.events.len() => Some(batch.clone()),
        _ => {
            let events = batch.events.iter().filter(|event| event.key().starts_with(prefix)).cloned().collect();
            Some(Arc::new(WatchBatch { revision: batch.revision, events }))
        }
    }
}

/// Bytes a batch keeps alive: the values that nothing else holds once they are replaced.
fn weight(batch: &WatchBatch) -> usize {
    let of = |event: &Event| match event {
        Event::Put { entry, .. } => entry.key.len() + entry.value.len(),
        Event::Delete { key, prev, .. } => key.len() + prev.value.len(),
    };
    batch.events.iter().map(of).sum::<usize>() + 128
}
