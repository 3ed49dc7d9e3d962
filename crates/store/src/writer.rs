//! The one thread that changes a store: gathers waiting requests, makes them durable in one commit, then visible.
//!
//! ```text
//! requests ──► plan against state + what this group planned ──► one durable commit ──► apply, wake watchers ──► answer
//! ```

use std::collections::{HashMap, HashSet};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::disk::Disk;
use crate::state::{Lease, State};
use crate::{Condition, Entry, Event, LeaseId, Op, Result, StoreError, TxnOutcome, WatchBatch};

/// Requests that share one commit at most.
const GROUP: usize = 512;

pub(crate) enum Request {
    Transact(Vec<Condition>, Vec<Op>, oneshot::Sender<Result<TxnOutcome>>),
    Grant(Duration, oneshot::Sender<Result<LeaseId>>),
    Revoke(LeaseId, oneshot::Sender<Result<()>>),
}

/// A durable step.
pub(crate) enum Change {
    Batch(WatchBatch),
    Grant(LeaseId, Duration),
    Revoke(LeaseId),
}

enum Answer {
    Transact(oneshot::Sender<Result<TxnOutcome>>, Result<TxnOutcome>),
    Grant(oneshot::Sender<Result<LeaseId>>, LeaseId),
    Revoke(oneshot::Sender<Result<()>>, Result<()>),
}

pub(crate) struct Writer {
    pub(crate) state: Arc<RwLock<State>>,
    pub(crate) disk: Option<Disk>,
    pub(crate) last_lease: LeaseId,
}

/// What the requests of one group will change, on top of the state.
struct Plan {
    revision: u64,
    keys: HashMap<String, Option<Entry>>,
    granted: HashSet<LeaseId>,
    revoked: HashSet<LeaseId>,
    changes: Vec<Change>,
}

impl Writer {
    /// Serves until every sender is gone.
    pub(crate) fn run(mut self, requests: &Receiver<Request>) {
        loop {
            let mut group = Vec::new();
            match self.next(requests) {
                Ok(request) => group.push(request),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            group.extend(requests.try_iter().take(GROUP - 1));
            self.carry_out(group);
        }
        self.write_state().close();
    }

    fn next(&self, requests: &Receiver<Request>) -> std::result::Result<Request, RecvTimeoutError> {
        let deadline = self.read_state().leases.values().map(|lease| lease.deadline).min();
        match deadline {
            Some(deadline) => requests.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            None => requests.recv().map_err(|_| RecvTimeoutError::Disconnected),
        }
    }

    fn carry_out(&mut self, group: Vec<Request>) {
        let (plan, answers) = self.plan(group);
        if !plan.changes.is_empty() {
            let written = self.disk.as_ref().map_or(Ok(()), |disk| disk.commit(&plan.changes, plan.revision));
            if let Err(error) = written {
                tracing::error!(%error, source = ?std::error::Error::source(&error), "store commit failed");
                // Whether the commit reached the disk is not known: nothing of this group is shown or acknowledged.
                answers.into_iter().for_each(|answer| answer.fail(&error));
                return;
            }
            let mut state = self.write_state();
            for change in plan.changes {
                match change {
                    Change::Batch(batch) => state.apply(batch),
                    Change::Grant(id, ttl) => {
                        let lease = Lease { ttl, deadline: Instant::now() + ttl, keys: HashSet::new() };
                        state.leases.insert(id, lease);
                    }
                    Change::Revoke(id) => {
                        state.leases.remove(&id);
                    }
                }
            }
        }
        answers.into_iter().for_each(Answer::send);
    }

    fn plan(&mut self, group: Vec<Request>) -> (Plan, Vec<Answer>) {
        let shared = Arc::clone(&self.state);
        let state = shared.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut plan = Plan {
            revision: state.revision,
            keys: HashMap::new(),
            granted: HashSet::new(),
            revoked: HashSet::new(),
            changes: Vec::new(),
        };
        let now = Instant::now();
        for (id, _) in state.leases.iter().filter(|(_, lease)| lease.deadline <= now) {
            plan.revoke(&state, *id);
        }
        let mut answers = Vec::with_capacity(group.len());
        for request in group {
            answers.push(match request {
                Request::Transact(conditions, ops, sender) => {
                    Answer::Transact(sender, plan.transact(&state, &conditions, ops))
                }
                Request::Grant(ttl, sender) => {
                    self.last_lease += 1;
                    plan.granted.insert(self.last_lease);
                    plan.changes.push(Change::Grant(self.last_lease, ttl));
                    Answer::Grant(sender, self.last_lease)
                }
                Request::Revoke(id, sender) => {
                    let known = plan.knows(&state, id);
                    if known {
                        plan.revoke(&state, id);
                    }
                    Answer::Revoke(sender, if known { Ok(()) } else { Err(StoreError::NoLease(id)) })
                }
            });
        }
        (plan, answers)
    }

    fn read_state(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn write_state(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Plan {
    fn entry<'a>(&'a self, state: &'a State, key: &str) -> Option<&'a Entry> {
        self.keys.get(key).map_or_else(|| state.keys.get(key), Option::as_ref)
    }

    fn knows(&self, state: &State, id: LeaseId) -> bool {
        !self.revoked.contains(&id) && (self.granted.contains(&id) || state.leases.contains_key(&id))
    }

    fn transact(&mut self, state: &State, conditions: &[Condition], ops: Vec<Op>) -> Result<TxnOutcome> {
        for condition in conditions {
            let (key, holds) = match condition {
                Condition::ModRevision { key, equals } => {
                    (key, self.entry(state, key).map_or(0, |entry| entry.mod_revision) == *equals)
                }
                Condition::Exists(key) => (key, self.entry(state, key).is_some()),
            };
            if !holds {
                return Ok(TxnOutcome::Refused { current: self.entry(state, key).cloned() });
            }
        }
        let mut seen = HashSet::new();
        for op in &ops {
            let (Op::Put { key, .. } | Op::Delete { key }) = op;
            if !seen.insert(key.as_str()) {
                return Err(StoreError::DuplicateKey(key.clone()));
            }
            if let Op::Put { lease: Some(id), .. } = op
                && !self.knows(state, *id)
            {
                return Err(StoreError::NoLease(*id));
            }
        }
        drop(seen);
        self.push(state, ops);
        Ok(TxnOutcome::Committed { revision: self.revision })
    }

    fn push(&mut self, state: &State, ops: Vec<Op>) {
        let revision = self.revision + 1;
        let mut events = Vec::with_capacity(ops.len());
        for op in ops {
            match op {
                Op::Put { key, value, lease } => {
                    let prev = self.entry(state, &key).cloned();
                    let (create_revision, version) =
                        prev.as_ref().map_or((revision, 1), |prev| (prev.create_revision, prev.version + 1));
                    let entry = Entry { key, value, create_revision, mod_revision: revision, version, lease };
                    self.keys.insert(entry.key.clone(), Some(entry.clone()));
                    events.push(Event::Put { entry, prev });
                }
                Op::Delete { key } => {
                    if let Some(prev) = self.entry(state, &key).cloned() {
                        self.keys.insert(key.clone(), None);
                        events.push(Event::Delete { key, prev: Some(prev), mod_revision: revision });
                    }
                }
            }
        }
        if !events.is_empty() {
            self.revision = revision;
            self.changes.push(Change::Batch(WatchBatch { revision, events }));
        }
    }

    fn revoke(&mut self, state: &State, id: LeaseId) {
        let mut keys: HashSet<String> = state.leases.get(&id).map(|lease| lease.keys.clone()).unwrap_or_default();
        keys.extend(self.keys.keys().cloned());
        keys.retain(|key| self.entry(state, key).is_some_and(|entry| entry.lease == Some(id)));
        self.push(state, keys.into_iter().map(|key| Op::Delete { key }).collect());
        self.revoked.insert(id);
        self.changes.push(Change::Revoke(id));
    }
}

impl Answer {
    // A caller that went away does not need its answer: failed sends are ignored.
    fn send(self) {
        match self {
            Self::Transact(sender, result) => drop(sender.send(result)),
            Self::Grant(sender, id) => drop(sender.send(Ok(id))),
            Self::Revoke(sender, result) => drop(sender.send(result)),
        }
    }

    fn fail(self, error: &StoreError) {
        match self {
            Self::Transact(sender, _) => drop(sender.send(Err(error.clone()))),
            Self::Grant(sender, _) => drop(sender.send(Err(error.clone()))),
            Self::Revoke(sender, _) => drop(sender.send(Err(error.clone()))),
        }
    }
}
