//! The engine: one writer thread takes transactions in groups, keeps each group in one durable step, then shows it.
//!
//! ```text
//! transact ──► queue ──► decide (live keys and the group so far) ──► journal.keep ──► state.apply ──► answers, watches
//! ```
//!
//! Reads never wait for the disk. Transactions that arrive while the disk is busy form the next group and share its sync.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::oneshot;

use crate::journal::{Journal, Step};
use crate::state::State;
use crate::{
    Condition, Entry, Event, LeaseId, MAX_KEY, MAX_VALUE, Op, Range, Store, StoreError, TxnOutcome, Watch, WatchBatch,
};

/// Transactions in a group at most.
const GROUP: usize = 512;

pub(crate) struct Engine {
    state: Arc<Mutex<State>>,
    queue: Sender<Work>,
}

enum Work {
    Transact { conditions: Vec<Condition>, ops: Vec<Op>, answer: Answer<TxnOutcome> },
    Grant { ttl: Duration, answer: Answer<LeaseId> },
    Revoke { lease: LeaseId, answer: Answer<()> },
}

type Answer<T> = oneshot::Sender<Result<T, StoreError>>;

impl Engine {
    pub(crate) fn open(mut journal: Box<dyn Journal>) -> Result<Self, StoreError> {
        let state = Arc::new(Mutex::new(State::restored(journal.load()?, Instant::now())));
        let (queue, work) = channel();
        let writer = Writer { journal, state: state.clone() };
        std::thread::Builder::new()
            .name("joey-store".to_owned())
            .spawn(move || writer.run(&work))
            .map_err(|error| StoreError::Engine { operation: "start its writer", message: error.to_string() })?;
        Ok(Self { state, queue })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    async fn ask<T>(&self, work: impl FnOnce(Answer<T>) -> Work) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        self.queue.send(work(answer)).map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl Store for Engine {
    async fn get(&self, key: &str) -> Result<(Option<Entry>, u64), StoreError> {
        let state = self.state();
        Ok((state.live.get(key).cloned(), state.revision))
    }

    async fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Range, StoreError> {
        Ok(self.state().range(prefix, after, limit))
    }

    async fn transact(&self, conditions: Vec<Condition>, ops: Vec<Op>) -> Result<TxnOutcome, StoreError> {
        check(&ops)?;
        self.ask(|answer| Work::Transact { conditions, ops, answer }).await
    }

    async fn watch(&self, prefix: &str, after_revision: u64) -> Result<Watch, StoreError> {
        self.state().watch(prefix, after_revision)
    }

    async fn compact(&self, before: u64) -> Result<(), StoreError> {
        self.state().compact(before);
        Ok(())
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.ask(|answer| Work::Grant { ttl, answer }).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.state().keep_alive(lease, Instant::now())
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.ask(|answer| Work::Revoke { lease, answer }).await
    }

    fn revision(&self) -> u64 {
        self.state().revision
    }
}

fn check(ops: &[Op]) -> Result<(), StoreError> {
    let mut keys = std::collections::HashSet::new();
    for op in ops {
        let invalid = |why| Err(StoreError::Invalid { key: op.key().chars().take(128).collect(), why });
        if op.key().is_empty() || op.key().len() > MAX_KEY {
            return invalid("a key has 1 to 1024 bytes");
        }
        if matches!(op, Op::Put { value, .. } if value.len() > MAX_VALUE) {
            return invalid("a value has at most 3 MiB");
        }
        if !keys.insert(op.key()) {
            return invalid("a key may be in one operation only");
        }
    }
    Ok(())
}

struct Writer {
    journal: Box<dyn Journal>,
    state: Arc<Mutex<State>>,
}

/// Called with the step's fate.
type Reply = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// What a group will do, decided but not yet kept.
struct Group {
    step: Step,
    batches: Vec<WatchBatch>,
    replies: Vec<Reply>,
}

impl Writer {
    fn run(mut self, queue: &Receiver<Work>) {
        loop {
            // Not in the match: the lock would be held while waiting for work.
            let end = locked(&self.state).next_end();
            let first = match end {
                None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(end) => queue.recv_timeout(end.saturating_duration_since(Instant::now())),
            };
            match first {
                Ok(first) => self.group(std::iter::once(first).chain(queue.try_iter().take(GROUP - 1))),
                Err(RecvTimeoutError::Timeout) => self.group(std::iter::empty()),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Takes expired leases and `work` as one durable step.
    fn group(&mut self, work: impl Iterator<Item = Work>) {
        let now = Instant::now();
        let mut group = {
            let state = locked(&self.state);
            let step = Step { revision: state.revision, last_lease: state.last_lease, ..Step::default() };
            Group { step, batches: Vec::new(), replies: Vec::new() }
        };
        let state = self.state.clone();
        let ended: Vec<LeaseId> =
            locked(&state).leases.iter().filter(|(_, lease)| lease.ends <= now).map(|(&id, _)| id).collect();
        for lease in ended {
            group.end_lease(&locked(&state), lease);
        }
        for one in work {
            group.decide(&locked(&state), one);
        }
        let Group { step, batches, replies } = group;
        let kept = if step.is_empty() { Ok(()) } else { self.journal.keep(&step) };
        match &kept {
            Ok(()) => locked(&self.state).apply(step, batches, now),
            Err(error) => {
                tracing::error!(%error, "a group of transactions could not be kept");
                if replies.is_empty() {
                    // Leases that ended: nobody waits for an answer, and the disk may be full for a while.
                    std::thread::sleep(Duration::from_millis(200));
                }
            }
        }
        for reply in replies {
            reply(kept.clone());
        }
    }
}

impl Group {
    fn decide(&mut self, state: &State, work: Work) {
        match work {
            Work::Transact { conditions, ops, answer } => match self.transact(state, &conditions, ops) {
                Ok(outcome) => self.replies.push(Box::new(move |kept| drop(answer.send(kept.map(|()| outcome))))),
                Err(error) => drop(answer.send(Err(error))),
            },
            Work::Grant { ttl, answer } => {
                self.step.last_lease += 1;
                let lease = self.step.last_lease;
                self.step.leases.insert(lease, Some(ttl.as_secs().max(1)));
                self.replies.push(Box::new(move |kept| drop(answer.send(kept.map(|()| lease)))));
            }
            Work::Revoke { lease, answer } => match self.has_lease(state, lease) {
                true => {
                    self.end_lease(state, lease);
                    self.replies.push(Box::new(move |kept| drop(answer.send(kept))));
                }
                false => drop(answer.send(Err(StoreError::NoLease(lease)))),
            },
        }
    }

    fn transact(&mut self, state: &State, conditions: &[Condition], ops: Vec<Op>) -> Result<TxnOutcome, StoreError> {
        let holds = |condition: &Condition| match condition {
            Condition::ModRevision { key, equals } => {
                self.current(state, key).map_or(0, |entry| entry.mod_revision) == *equals
            }
            Condition::Exists { key } => self.current(state, key).is_some(),
        };
        if !conditions.iter().all(holds) {
            let current = conditions.iter().map(|condition| self.current(state, condition.key()).cloned()).collect();
            return Ok(TxnOutcome::Refused { current, revision: self.step.revision });
        }
        let leases = ops.iter().filter_map(|op| match op {
            Op::Put { lease, .. } => *lease,
            Op::Delete { .. } => None,
        });
        for lease in leases {
            if !self.has_lease(state, lease) {
                return Err(StoreError::NoLease(lease));
            }
        }
        self.change(state, ops);
        Ok(TxnOutcome::Committed { revision: self.step.revision })
    }

    /// Does the operations at the next revision; where they change nothing, there is none.
    fn change(&mut self, state: &State, ops: Vec<Op>) {
        let revision = self.step.revision + 1;
        let mut events = Vec::with_capacity(ops.len());
        for op in ops {
            let prev = self.current(state, op.key()).cloned();
            match (op, prev) {
                (Op::Put { key, value, lease }, prev) => {
                    let (create_revision, version) =
                        prev.as_ref().map_or((revision, 1), |prev| (prev.create_revision, prev.version + 1));
                    let entry =
                        Entry { key: key.clone(), value, create_revision, mod_revision: revision, version, lease };
                    self.step.keys.insert(key, Some(entry.clone()));
                    events.push(Event::Put { entry, prev });
                }
                (Op::Delete { key }, Some(prev)) => {
                    self.step.keys.insert(key.clone(), None);
                    events.push(Event::Delete { key, prev, mod_revision: revision });
                }
                (Op::Delete { .. }, None) => {}
            }
        }
        if !events.is_empty() {
            self.step.revision = revision;
            self.batches.push(WatchBatch { revision, events });
        }
    }

    fn end_lease(&mut self, state: &State, lease: LeaseId) {
        let mut keys: BTreeMap<&str, ()> = BTreeMap::new();
        let before = state.leases.get(&lease).into_iter().flat_map(|lease| lease.keys.iter().map(String::as_str));
        keys.extend(before.map(|key| (key, ())));
        let now: Vec<String> = keys
            .into_keys()
            .chain(self.step.keys.keys().map(String::as_str))
            .filter(|key| self.current(state, key).is_some_and(|entry| entry.lease == Some(lease)))
            .map(str::to_owned)
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect();
        self.change(state, now.into_iter().map(|key| Op::Delete { key }).collect());
        self.step.leases.insert(lease, None);
    }

    fn current<'a>(&'a self, state: &'a State, key: &str) -> Option<&'a Entry> {
        match self.step.keys.get(key) {
            Some(decided) => decided.as_ref(),
            None => state.live.get(key),
        }
    }

    fn has_lease(&self, state: &State, lease: LeaseId) -> bool {
        match self.step.leases.get(&lease) {
            Some(decided) => decided.is_some(),
            None => state.leases.contains_key(&lease),
        }
    }
}
