//! Carries what instances' segments hold to the sinks: one task a sink, one batch at a time, as long as it takes.
//!
//! ```text
//! gather ─► deliver ─► taken ─► positions written ─► gather …; nothing there: a look a second
//!             │  ▲
//!             ▼  │ 1 s, 2 s … 60 s, each up to a quarter longer or shorter
//!            not reached         refused for good: halves of it, down to the one record, which is lost and told
//!                                answered that not now: after three times each instance by itself (`held`), the others go on
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use joey_api::instance::InstanceEvent;
use joey_collect::{Position, read};
use rand::Rng;

use crate::held::Held;
use crate::left;
use crate::plan::{Plan, replace};
use crate::record;
use crate::sink::{Batch, Refused, Sink, SinkSettings};
use crate::stream;

/// Between two looks at segments that had nothing new.
const LOOK: Duration = Duration::from_secs(1);
/// Between two attempts at a sink that does not take what it is given.
pub(crate) const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// So often a sink may answer that it does not take a batch of several instances now.
const ANSWERS: u32 = 3;
/// Bytes of JSON in a batch; one record may be more than that.
const BATCH: usize = 512 << 10;
const POSITIONS: &str = "positions.json";

/// Where to, and what is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Directory of what instances that are gone left behind.
    pub left: PathBuf,
    pub sinks: BTreeMap<String, SinkSettings>,
    /// The sink of those who name none.
    pub default: Option<String>,
    /// Of what is left behind at most so many bytes stay, and for so long.
    pub keep_bytes: u64,
    pub keep: Duration,
}

impl Settings {
    /// No sinks, and nothing that is left behind is given up.
    pub fn new(left: PathBuf) -> Self {
        Self { left, sinks: BTreeMap::new(), default: None, keep_bytes: u64::MAX, keep: Duration::MAX }
    }
}

/// Tells an instance what happened to its logs.
pub type Teller = Arc<dyn Fn(InstanceEvent) + Send + Sync>;

/// The carrying of this host. Cheap to clone.
#[derive(Clone)]
pub struct Carrier {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) settings: Settings,
    followed: Mutex<Vec<Arc<Followed>>>,
}

/// An instance whose segments are carried.
pub(crate) struct Followed {
    pub(crate) id: String,
    pub(crate) plan: Plan,
    tell: Option<Teller>,
    place: Mutex<Place>,
}

struct Place {
    dir: PathBuf,
    positions: BTreeMap<String, Position>,
    /// The instance is gone: nothing more is written.
    left: bool,
}

/// How far a batch goes in a stream.
struct Piece {
    followed: Arc<Followed>,
    stream: usize,
    next: Position,
    /// How many records are lost before it, and why.
    lost: Vec<(u64, String)>,
}

/// Of whom a batch is.
enum Whose {
    One(String),
    AllBut(BTreeSet<String>),
}

impl Whose {
    fn has(&self, id: &str) -> bool {
        match self {
            Self::One(one) => one == id,
            Self::AllBut(others) => !others.contains(id),
        }
    }
}

/// What became of a batch.
enum Carried {
    Nothing,
    Taken,
    /// The sink does not take it now; of whom it was.
    NotNow(BTreeSet<String>),
}

impl Carrier {
    /// Takes up what is left behind and begins with the sinks. Within a runtime.
    pub fn open(settings: Settings) -> io::Result<Self> {
        let mut sinks = Vec::new();
        for (name, settings) in &settings.sinks {
            sinks.push((
                name.clone(),
                Sink::open(settings).map_err(|why| io::Error::other(format!("sink \"{name}\": {why}")))?,
            ));
        }
        // Now, and not when the disk is full.
        std::fs::create_dir_all(&settings.left)?;
        let shared = Arc::new(Shared { settings, followed: Mutex::default() });
        for id in left::instances(&shared.settings.left)? {
            let dir = shared.settings.left.join(&id);
            if !left::give_up_unplanned(&dir, shared.settings.keep) {
                shared.load(&id, dir, true, None);
            }
        }
        for (name, sink) in sinks {
            tokio::spawn(carry(Arc::downgrade(&shared), name, sink));
        }
        tokio::spawn(left::watch(Arc::downgrade(&shared)));
        Ok(Self { shared })
    }

    /// The name of the sink that is asked for, or why there is none.
    pub fn sink(&self, name: Option<&str>) -> Result<String, String> {
        let Settings { sinks, default, .. } = &self.shared.settings;
        match name.or(default.as_deref()) {
            Some(name) if sinks.contains_key(name) => Ok(name.to_owned()),
            Some(name) if sinks.is_empty() => Err(format!("this host has no log sink \"{name}\", and no other")),
            Some(name) => {
                let known: Vec<&str> = sinks.keys().map(String::as_str).collect();
                Err(format!("this host has no log sink \"{name}\"; it has: {}", known.join(", ")))
            }
            None => Err("it names no log sink, and this host has no default one".to_owned()),
        }
    }

    /// Carries what an instance's plan says, from `dir` below which its segments are. Once more changes nothing.
    pub fn follow(&self, id: &str, dir: PathBuf, tell: Teller) {
        self.shared.load(id, dir, false, Some(tell));
    }

    /// The instance is gone: takes over what was not carried yet, from the directory of its segments, and carries it later. Nothing is
    /// taken where nothing was collected.
    pub fn take_over(&self, id: &str, dir: &Path) -> io::Result<()> {
        let place = self.shared.settings.left.join(id);
        match std::fs::rename(dir, &place) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            done => done?,
        }
        left::note(&place);
        let known = self.shared.followed().iter().find(|followed| followed.id == id).cloned();
        match known {
            Some(followed) => {
                let mut at = followed.place();
                (at.dir, at.left) = (place, true);
            }
            None => self.shared.load(id, place, true, None),
        }
        Ok(())
    }
}

impl Shared {
    pub(crate) fn followed(&self) -> MutexGuard<'_, Vec<Arc<Followed>>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn load(&self, id: &str, dir: PathBuf, left: bool, tell: Option<Teller>) {
        let plan = match Plan::read(&dir) {
            Ok(Some(plan)) => plan,
            Ok(None) => return,
            Err(error) => {
                return tracing::error!(instance = id, %error, "logs are not carried: their plan cannot be read");
            }
        };
        let mut all = self.followed();
        if all.iter().any(|known| known.id == id && known.plan == plan) {
            return;
        }
        // None, or none that is whole: from the beginning, which repeats and loses nothing.
        let positions = std::fs::read(dir.join(POSITIONS)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let place = Mutex::new(Place { dir, positions: positions.unwrap_or_default(), left });
        all.retain(|known| known.id != id);
        all.push(Arc::new(Followed { id: id.to_owned(), plan, tell, place }));
    }

    /// What there is for a sink; nothing: `None`. `turn` is where it begins, so that one who writes much does not keep others waiting.
    fn gather(&self, sink: &str, whose: &Whose, turn: &mut usize) -> Option<(Batch, Vec<Piece>)> {
        let mut pieces: Vec<Piece> = Vec::new();
        for followed in self.followed().iter().filter(|followed| whose.has(&followed.id)) {
            let place = followed.place();
            for (stream, of_it) in followed.plan.streams.iter().enumerate().filter(|(_, stream)| stream.sink == sink) {
                let next = place.positions.get(&of_it.key()).copied().unwrap_or_default();
                pieces.push(Piece { followed: followed.clone(), stream, next, lost: Vec::new() });
            }
        }
        let count = pieces.len().max(1);
        pieces.rotate_left(*turn % count);
        *turn = turn.wrapping_add(1);
        let (mut batch, mut more) = (Batch::default(), BTreeSet::new());
        let mut moved = true;
        while moved && batch.body.len() < BATCH {
            moved = false;
            for (at, piece) in pieces.iter_mut().enumerate() {
                if batch.body.len() < BATCH && piece.add(&mut batch) {
                    moved = true;
                    more.insert(at);
                }
            }
        }
        let mut at = 0..;
        pieces.retain(|_| at.next().is_some_and(|at| more.contains(&at)));
        (!pieces.is_empty()).then_some((batch, pieces))
    }
}

impl Piece {
    /// Reads on into the batch; false: there is no more.
    fn add(&mut self, batch: &mut Batch) -> bool {
        let (plan, stream) = (&self.followed.plan, &self.followed.plan.streams[self.stream]);
        let dir = stream.dir(&self.followed.place().dir);
        let part = match read(&dir, self.next) {
            Ok(part) => part,
            Err(error) => {
                tracing::warn!(instance = self.followed.id, %error, "segments cannot be read");
                return false;
            }
        };
        let before = self.next;
        batch.of(&format!("{}/{}", plan.instance, stream.key()), |body| {
            if part.lost > 0 {
                let mut why = format!("sink \"{}\" did not take them before newer ones took their place", stream.sink);
                if stream.files.is_some() {
                    why.push_str(", or their file went before it was read");
                }
                record::write_lost(body, plan, stream, part.lost, &why);
                self.lost.push((part.lost, why));
            }
            self.next = part.begin;
            for line in part.bytes.split_inclusive(|byte| *byte == b'\n') {
                if body.len() >= BATCH {
                    break;
                }
                self.next.bytes += line.len() as u64;
                self.next.lines += 1;
                record::write(body, plan, stream, line);
            }
        });
        self.next != before
    }
}

impl Followed {
    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its directory, once the instance is gone.
    pub(crate) fn left(&self) -> Option<PathBuf> {
        let place = self.place();
        place.left.then(|| place.dir.clone())
    }

    /// The sink has taken this much.
    fn taken(&self, pieces: &[&Piece]) -> io::Result<()> {
        let mut place = self.place();
        for piece in pieces {
            place.positions.insert(self.plan.streams[piece.stream].key(), piece.next);
        }
        let bytes = serde_json::to_vec(&place.positions)?;
        match replace(&place.dir.join(POSITIONS), &bytes) {
            // Given up, or removed with everything.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    /// Whether nothing is left to carry.
    pub(crate) fn is_done(&self) -> io::Result<bool> {
        let place = self.place();
        for stream in &self.plan.streams {
            let at = place.positions.get(&stream.key()).copied().unwrap_or_default();
            if !stream::ends_at(&stream.dir(&place.dir), at)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn tell_lost(&self, stream: usize, lost: u64, why: &str) {
        let stream = &self.plan.streams[stream];
        tracing::warn!(
            instance = self.id,
            container = stream.container,
            source = stream.name,
            lost,
            "records are lost"
        );
        let Some(tell) = &self.tell else { return };
        tell(InstanceEvent {
            at: Timestamp::now(),
            warning: true,
            reason: "LogsLost".to_owned(),
            message: format!("{lost} records of log source \"{}\" are lost: {why}", stream.name),
            container: Some(stream.container.clone()),
        });
    }
}

/// The task of a sink, until the carrier is gone.
async fn carry(shared: Weak<Shared>, name: String, mut sink: Sink) {
    let (mut turn, mut held) = (0, Held::default());
    loop {
        // Who is held up, one at a time, and then all who are not.
        let due = held.due(Instant::now());
        if let Some(id) = &due {
            match carry_some(&shared, &name, &mut sink, Whose::One(id.clone()), &mut turn).await {
                None => return,
                Some(Carried::Nothing) => held.release(id),
                Some(Carried::Taken) => {
                    tracing::info!(sink = name, instance = id.as_str(), "sink takes its records again");
                    held.release(id);
                    held.taken();
                }
                Some(Carried::NotNow(_)) => {
                    let part = rand::rng().random_range(0.75..1.25);
                    held.refused(id, Instant::now(), part);
                }
            }
        }
        match carry_some(&shared, &name, &mut sink, Whose::AllBut(held.ids()), &mut turn).await {
            None => return,
            Some(Carried::Nothing) if due.is_none() => {
                if let Some(strong) = shared.upgrade() {
                    let _ = tokio::task::spawn_blocking(move || left::clear(&strong)).await;
                }
                tokio::time::sleep(LOOK).await;
            }
            Some(Carried::Nothing) => {}
            Some(Carried::Taken) => held.taken(),
            Some(Carried::NotNow(ids)) => held.hold(ids),
        }
    }
}

/// Carries one batch; `None`: the carrier is gone.
async fn carry_some(
    shared: &Weak<Shared>,
    name: &str,
    sink: &mut Sink,
    whose: Whose,
    turn: &mut usize,
) -> Option<Carried> {
    let (strong, of, mut at) = (shared.upgrade()?, name.to_owned(), *turn);
    let answers = if matches!(whose, Whose::One(_)) { 1 } else { ANSWERS };
    let gathering = tokio::task::spawn_blocking(move || (strong.gather(&of, &whose, &mut at), at));
    let (gathered, next) = gathering.await.ok()?;
    *turn = next;
    let Some((batch, pieces)) = gathered else { return Some(Carried::Nothing) };
    let Some(refused) = deliver(name, sink, &batch, answers).await else {
        return Some(Carried::NotNow(pieces.into_iter().map(|piece| piece.followed.id.clone()).collect()));
    };
    let mut of_each: BTreeMap<&str, u64> = BTreeMap::new();
    refused.into_iter().for_each(|record| *of_each.entry(batch.key(record)).or_default() += 1);
    for piece in &pieces {
        for (lost, why) in &piece.lost {
            piece.followed.tell_lost(piece.stream, *lost, why);
        }
        if let Some(count) = of_each.get(piece.key().as_str()) {
            piece.followed.tell_lost(piece.stream, *count, &format!("sink \"{name}\" refuses them for good"));
        }
    }
    let _ = tokio::task::spawn_blocking(move || remember(&pieces)).await;
    Some(Carried::Taken)
}

impl Piece {
    fn key(&self) -> String {
        format!("{}/{}", self.followed.plan.instance, self.followed.plan.streams[self.stream].key())
    }
}

fn remember(pieces: &[Piece]) {
    let mut of_each: BTreeMap<&str, Vec<&Piece>> = BTreeMap::new();
    pieces.iter().for_each(|piece| of_each.entry(&piece.followed.id).or_default().push(piece));
    for pieces in of_each.values() {
        // What is not remembered is told again.
        if let Err(error) = pieces[0].followed.taken(pieces) {
            tracing::warn!(instance = pieces[0].followed.id, %error, "position in logs cannot be written");
        }
    }
}

/// Delivers all of a batch in its order, however long the sink is not reached; the numbers of the records that it refuses for good.
/// `None`: it answered so many times that it does not take some of them now. What it took before that comes again.
async fn deliver(name: &str, sink: &mut Sink, batch: &Batch, answers: u32) -> Option<Vec<usize>> {
    let (mut refused, mut pause, mut down, mut answered) = (Vec::new(), PAUSE.0, false, 0);
    // Ranges, the next one last.
    let mut left = Vec::new();
    left.push(0..batch.len());
    while let Some(range) = left.pop() {
        if range.is_empty() {
            continue;
        }
        let why = match sink.deliver(batch, range.clone()).await {
            Ok(()) => {
                if std::mem::take(&mut down) {
                    tracing::info!(sink = name, "sink takes records again");
                }
                (pause, answered) = (PAUSE.0, 0);
                continue;
            }
            Err(Refused::Never(why)) => {
                if range.len() > 1 {
                    let middle = range.start + range.len() / 2;
                    left.extend([middle..range.end, range.start..middle]);
                    continue;
                }
                if refused.is_empty() {
                    tracing::warn!(sink = name, why, "records are refused for good");
                }
                refused.push(range.start);
                continue;
            }
            Err(Refused::NotNow(why)) => {
                answered += 1;
                why
            }
            Err(Refused::Later(why)) => why,
        };
        if !std::mem::replace(&mut down, true) && answers > 1 {
            tracing::warn!(sink = name, why, "sink does not take records, trying again");
        }
        if answered >= answers {
            return None;
        }
        left.push(range);
        let part = rand::rng().random_range(0.75..1.25);
        tokio::time::sleep(pause.mul_f64(part)).await;
        pause = (pause * 2).min(PAUSE.1);
    }
    Some(refused)
}
