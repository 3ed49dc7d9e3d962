//! The journal's log: a file of fixed size whose every record is one durable step. Small steps cost one write and one sync here;
//! the database behind it takes many of them at once, when the log is full.
//!
//! ```text
//! keep ──► fits? ── yes ──► append, sync ──► acknowledged          load: database, then the log's records on top of it
//!            │ no
//!            └► what the log holds goes into the database ──► the log begins anew, under another mark
//! ```
//! A record has a mark, its length and a checksum. Records count from the beginning of the file for as long as the mark is the
//! same: what an earlier round left behind them has another one, which nobody can guess. Records of a round that the
//! database has already are read again after a crash: they say what keys hold, not how they change, so this does no harm.

use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use bytes::Bytes;
use joey_model::checkpoint;

use crate::journal::{Journal, Kept, Step};
use crate::redb_journal::failed;
use crate::{Entry, LeaseId, StoreError};

/// Size of the file. It is written once, so that a sync of a record has no new size to keep.
const SIZE: usize = 4 << 20;
/// Mark, length of what follows, checksum of the mark and of what follows.
const HEAD: usize = 16;

/// A journal in front of another.
pub(crate) struct LoggedJournal<J> {
    behind: J,
    log: Log,
    /// What the log holds and the journal behind does not have yet.
    pending: Step,
}

impl<J: Journal> LoggedJournal<J> {
    pub(crate) fn open(behind: J, path: &Path) -> Result<Self, StoreError> {
        let log = Log::open(path).map_err(failed("open its log"))?;
        Ok(Self { behind, log, pending: Step::default() })
    }

    /// Hands everything on. Where that fails, all of it is still in the log.
    fn hand_on(&mut self) -> Result<(), StoreError> {
        if !self.pending.is_empty() {
            self.behind.keep(&self.pending)?;
            checkpoint::reached("store.handed-on");
            self.pending = Step::default();
        }
        self.log.begin_anew();
        Ok(())
    }
}

impl<J: Journal> Journal for LoggedJournal<J> {
    fn load(&mut self) -> Result<Kept, StoreError> {
        let kept = self.behind.load()?;
        let steps = self.log.read().map_err(failed("read its log"))?;
        // Older than the database: all of it was handed on, and a step that was too large for the log came after it.
        let reached = |step: &Step| (step.revision, step.last_lease) >= (kept.revision, kept.last_lease);
        if !steps.last().is_some_and(reached) {
            return Ok(kept);
        }
        steps.iter().for_each(|step| merge(&mut self.pending, step));
        self.hand_on()?;
        self.behind.load()
    }

    fn keep(&mut self, step: &Step) -> Result<(), StoreError> {
        let record = self.log.record(step);
        if self.log.is_broken || self.log.at + record.len() > SIZE {
            self.hand_on()?;
            if record.len() > SIZE {
                // What the log held, also a record that failed half way, must not be read on top of this step.
                self.log.erase().map_err(failed("empty its log"))?;
                return self.behind.keep(step);
            }
            // Under the new mark.
            let record = self.log.record(step);
            self.log.append(&record).map_err(failed("write its log"))?;
        } else {
            self.log.append(&record).map_err(failed("write its log"))?;
        }
        checkpoint::reached("store.logged");
        merge(&mut self.pending, step);
        Ok(())
    }
}

fn merge(into: &mut Step, step: &Step) {
    (into.revision, into.last_lease) = (step.revision, step.last_lease);
    into.keys.extend(step.keys.iter().map(|(key, entry)| (key.clone(), entry.clone())));
    into.leases.extend(&step.leases);
    into.acknowledged = true;
}

struct Log {
    file: File,
    mark: u64,
    /// Where the next record goes.
    at: usize,
    /// A write failed: what is there now may or may not be read again, so nothing may follow it.
    is_broken: bool,
}

impl Log {
    fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        if file.metadata()?.len() < SIZE as u64 {
            file.write_all_at(&vec![0; SIZE], 0)?;
            file.sync_all()?;
            path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())?;
        }
        Ok(Self { file, mark: fresh_mark(), at: 0, is_broken: false })
    }

    fn begin_anew(&mut self) {
        (self.mark, self.at, self.is_broken) = (fresh_mark(), 0, false);
    }

    /// Nothing in it is a record any more.
    fn erase(&mut self) -> io::Result<()> {
        self.is_broken = true;
        self.file.write_all_at(&[0; HEAD], 0)?;
        self.file.sync_data()?;
        self.begin_anew();
        Ok(())
    }

    /// Every whole record of the last round. What comes next begins anew.
    fn read(&mut self) -> io::Result<Vec<Step>> {
        let mut bytes = vec![0; SIZE];
        self.file.read_exact_at(&mut bytes, 0)?;
        let (mut steps, mut rest, mut mark) = (Vec::new(), &bytes[..], None);
        while let Some((found, body, after)) =
            record_at(rest).filter(|(found, ..)| mark.is_none_or(|mark| mark == *found))
        {
            let step =
                decode(body).ok_or_else(|| io::Error::other("a record with a right checksum is not understood"))?;
            steps.push(step);
            (mark, rest) = (Some(found), after);
        }
        Ok(steps)
    }

    fn record(&self, step: &Step) -> Vec<u8> {
        let mut bytes = vec![0; HEAD];
        encode(step, &mut bytes);
        let (head, body) = bytes.split_at_mut(HEAD);
        head[..8].copy_from_slice(&self.mark.to_le_bytes());
        head[8..12].copy_from_slice(&(body.len() as u32).to_le_bytes());
        let sum = checksum(&[&head[..12], body]);
        head[12..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn append(&mut self, record: &[u8]) -> io::Result<()> {
        self.is_broken = true;
        self.file.write_all_at(record, self.at as u64)?;
        self.file.sync_data()?;
        self.is_broken = false;
        self.at += record.len();
        Ok(())
    }
}

/// A number that whoever fills records cannot know. Never 0, which an empty file is full of.
fn fresh_mark() -> u64 {
    RandomState::new().hash_one("mark") | 1
}

/// The mark and body of the whole record at the beginning, and what follows it.
fn record_at(bytes: &[u8]) -> Option<(u64, &[u8], &[u8])> {
    let (head, rest) = bytes.split_at_checked(HEAD)?;
    let mark = u64::from_le_bytes(head[..8].try_into().ok()?);
    let length = u32::from_le_bytes(head[8..12].try_into().ok()?) as usize;
    let sum = u32::from_le_bytes(head[12..].try_into().ok()?);
    let (body, after) = rest.split_at_checked(length)?;
    (mark != 0 && checksum(&[&head[..12], body]) == sum).then_some((mark, body, after))
}

fn encode(step: &Step, out: &mut Vec<u8>) {
    let number = |out: &mut Vec<u8>, number: u64| out.extend_from_slice(&number.to_le_bytes());
    for value in [step.revision, step.last_lease, step.keys.len() as u64] {
        number(out, value);
    }
    for (key, entry) in &step.keys {
        number(out, key.len() as u64);
        out.extend_from_slice(key.as_bytes());
        // A create revision is never 0: that stands for a deletion.
        let Some(entry) = entry else {
            number(out, 0);
            continue;
        };
        let lease = entry.lease.unwrap_or(0);
        for value in [entry.create_revision, entry.mod_revision, entry.version, lease, entry.value.len() as u64] {
            number(out, value);
        }
        out.extend_from_slice(&entry.value);
    }
    for (&lease, &seconds) in &step.leases {
        // A lease lasts a second at least: 0 stands for its end.
        number(out, lease);
        number(out, seconds.unwrap_or(0));
    }
}

fn decode(body: &[u8]) -> Option<Step> {
    let mut rest = body;
    let mut step = Step { revision: number(&mut rest)?, last_lease: number(&mut rest)?, ..Step::default() };
    for _ in 0..number(&mut rest)? {
        let key = String::from_utf8(bytes(&mut rest)?.to_vec()).ok()?;
        let entry = match number(&mut rest)? {
            0 => None,
            create_revision => Some(Entry {
                key: key.clone(),
                create_revision,
                mod_revision: number(&mut rest)?,
                version: number(&mut rest)?,
                lease: Some(number(&mut rest)?).filter(|&lease| lease != 0),
                value: Bytes::copy_from_slice(bytes(&mut rest)?),
            }),
        };
        step.keys.insert(key, entry);
    }
    while !rest.is_empty() {
        let lease: LeaseId = number(&mut rest)?;
        step.leases.insert(lease, Some(number(&mut rest)?).filter(|&seconds| seconds != 0));
    }
    Some(step)
}

fn number(rest: &mut &[u8]) -> Option<u64> {
    let (head, tail) = rest.split_at_checked(8)?;
    *rest = tail;
    Some(u64::from_le_bytes(head.try_into().ok()?))
}

fn bytes<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(number(rest)?).ok()?;
    let (head, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    Some(head)
}

/// CRC-32 of the parts one after another.
fn checksum(parts: &[&[u8]]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    parts.iter().for_each(|part| sum.update(part));
    sum.finalize()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// What stands behind: remembers what it was handed, and refuses while it is told to.
    #[derive(Clone, Default)]
    struct Behind(Arc<Mutex<(Step, bool)>>);

    impl Journal for Behind {
        fn load(&mut self) -> Result<Kept, StoreError> {
            let (step, _) = &*self.0.lock().unwrap();
            let entries = step.keys.values().flatten().cloned().collect();
            let leases = step.leases.iter().filter_map(|(&lease, &seconds)| Some((lease, seconds?))).collect();
            Ok(Kept { revision: step.revision, entries, leases, last_lease: step.last_lease })
        }

        fn keep(&mut self, step: &Step) -> Result<(), StoreError> {
            let (kept, refuses) = &mut *self.0.lock().unwrap();
            if *refuses {
                return Err(StoreError::Full { operation: "commit" });
            }
            merge(kept, step);
            Ok(())
        }
    }

    fn step(revision: u64, key: &str, value: Option<&[u8]>) -> Step {
        let entry = value.map(|value| Entry {
            key: key.to_owned(),
            value: Bytes::copy_from_slice(value),
            create_revision: 1,
            mod_revision: revision,
            version: revision,
            lease: revision.is_multiple_of(2).then_some(7),
        });
        let leases = [(7, Some(5)), (revision, None)].into();
        Step { revision, keys: [(key.to_owned(), entry)].into(), leases, last_lease: 9, acknowledged: false }
    }

    fn found(kept: &Kept) -> Vec<(String, usize, u64)> {
        kept.entries.iter().map(|entry| (entry.key.clone(), entry.value.len(), entry.mod_revision)).collect()
    }

    #[test]
    fn steps_come_back_in_order_up_to_a_torn_one() {
        let dir = tempfile::tempdir().unwrap();
        for torn in [false, true] {
            let path = dir.path().join(format!("log-{torn}"));
            let behind = Behind::default();
            let mut journal = LoggedJournal::open(behind.clone(), &path).unwrap();
            journal.load().unwrap();
            journal.keep(&step(1, "a", Some(b"old"))).unwrap();
            journal.keep(&step(2, "a", Some(b"newer"))).unwrap();
            journal.keep(&step(3, "b", Some(b""))).unwrap();
            let last = journal.log.at;
            journal.keep(&step(4, "a", None)).unwrap();
            assert_eq!(behind.0.lock().unwrap().0.revision, 0, "nothing is handed on yet");
            drop(journal);
            if torn {
                let file = OpenOptions::new().write(true).open(&path).unwrap();
                file.write_all_at(b"?", last as u64 + 30).unwrap();
            }
            let kept = LoggedJournal::open(behind.clone(), &path).unwrap().load().unwrap();
            let expected = match torn {
                true => vec![("a".to_owned(), 5, 2), ("b".to_owned(), 0, 3)],
                false => vec![("b".to_owned(), 0, 3)],
            };
            assert_eq!((found(&kept), kept.revision), (expected, if torn { 3 } else { 4 }));
            assert_eq!((kept.last_lease, kept.leases), (9, [(7, 5)].into()));
            assert_eq!(behind.0.lock().unwrap().0.revision, kept.revision, "handed on at the start");
        }
    }

    #[test]
    fn what_an_earlier_round_left_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let behind = Behind::default();
        let mut journal = LoggedJournal::open(behind.clone(), &path).unwrap();
        journal.load().unwrap();
        for revision in 1..=4 {
            journal.keep(&step(revision, "a", Some(b"x"))).unwrap();
        }
        journal.hand_on().unwrap();
        // As long as the first of the earlier round: the second one follows it.
        journal.keep(&step(5, "a", Some(b"y"))).unwrap();
        drop(journal);
        let kept = LoggedJournal::open(behind, &path).unwrap().load().unwrap();
        assert_eq!((found(&kept), kept.revision), (vec![("a".to_owned(), 1, 5)], 5));
    }

    #[test]
    fn a_full_log_is_handed_on_and_a_step_that_is_too_large_passes_it_by() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let behind = Behind::default();
        let mut journal = LoggedJournal::open(behind.clone(), &path).unwrap();
        journal.load().unwrap();
        let third = vec![1; SIZE / 3];
        for revision in 1..=2 {
            journal.keep(&step(revision, &revision.to_string(), Some(&third))).unwrap();
        }
        behind.0.lock().unwrap().1 = true;
        let refused = journal.keep(&step(3, "3", Some(&third))).unwrap_err();
        assert!(matches!(refused, StoreError::Full { .. }), "{refused}");
        assert_eq!(behind.0.lock().unwrap().0.revision, 0);
        behind.0.lock().unwrap().1 = false;
        journal.keep(&step(3, "3", Some(&third))).unwrap();
        assert_eq!(behind.0.lock().unwrap().0.revision, 2, "the first two made room for the third");
        journal.keep(&step(4, "3", Some(&vec![1; SIZE]))).unwrap();
        assert_eq!(behind.0.lock().unwrap().0.revision, 4);
        drop(journal);
        let kept = LoggedJournal::open(behind, &path).unwrap().load().unwrap();
        assert_eq!(found(&kept).last(), Some(&("3".to_owned(), SIZE, 4)), "the log is older than what went past it");
    }

    #[test]
    fn a_step_that_passes_by_is_not_overlaid_by_one_that_failed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let behind = Behind::default();
        let mut journal = LoggedJournal::open(behind.clone(), &path).unwrap();
        journal.load().unwrap();
        journal.keep(&step(1, "a", Some(b"first"))).unwrap();
        // As after a sync that failed although the record is on the disk.
        let record = journal.log.record(&step(2, "a", Some(b"told as failed")));
        journal.log.append(&record).unwrap();
        journal.log.is_broken = true;
        journal.keep(&step(2, "a", Some(&vec![1; SIZE]))).unwrap();
        drop(journal);
        let kept = LoggedJournal::open(behind, &path).unwrap().load().unwrap();
        assert_eq!(found(&kept), [("a".to_owned(), SIZE, 2)]);
    }
}
