//! One service as one application calls it: its bucket of turns, its places, and whether it rests.

use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::Instant;

use crate::{Held, Limits, lock};

#[derive(Debug)]
pub(crate) struct Service {
    state: Mutex<State>,
    places: Semaphore,
    /// The call that tried alone has ended.
    tried: Notify,
}

#[derive(Debug)]
struct State {
    /// Turns that may be taken now; below zero: so many wait.
    turns: f64,
    filled: Instant,
    /// Failed tries in a row.
    failures: u32,
    /// It rests, or rested and was not good since.
    until: Option<Instant>,
    /// Rests in a row.
    rests: u32,
    /// After a rest one tries alone; the others wait for what it finds.
    alone: bool,
    /// What was said at the last failure.
    why: String,
}

/// Leave to make one try; told how it went, or dropped when the call is given up.
pub(crate) struct Turn<'a> {
    service: &'a Service,
    _place: SemaphorePermit<'a>,
    alone: bool,
}

enum Look {
    Free,
    Alone,
    /// Another one tries alone.
    Wait,
    Rests(Duration, String),
}

impl Service {
    pub(crate) fn new(limits: &Limits) -> Self {
        let state = State {
            turns: f64::from(limits.burst),
            filled: Instant::now(),
            failures: 0,
            until: None,
            rests: 0,
            alone: false,
            why: String::new(),
        };
        Self { state: Mutex::new(state), places: Semaphore::new(limits.at_once.max(1)), tried: Notify::new() }
    }

    /// Waits for a turn; a service that rests is not waited for.
    pub(crate) async fn turn(&self, limits: &Limits) -> Result<Turn<'_>, Held> {
        if let Some((left, why)) = lock(&self.state).rests() {
            return Err(Held::new(why, left));
        }
        let wait = self.take_turn(limits)?;
        tokio::time::sleep(wait).await;
        // Closed never: it lives as long as the service.
        let place = self.places.acquire().await.map_err(|_| Held::new("the guard is gone", Duration::ZERO))?;
        // While this one waited, others may have found out.
        loop {
            let mut tried = std::pin::pin!(self.tried.notified());
            tried.as_mut().enable();
            let seen = lock(&self.state).look();
            match seen {
                Look::Free => return Ok(Turn { service: self, _place: place, alone: false }),
                Look::Alone => return Ok(Turn { service: self, _place: place, alone: true }),
                Look::Rests(left, why) => return Err(Held::new(why, left)),
                Look::Wait => tried.await,
            }
        }
    }

    /// Takes the next turn; how long it is until then.
    fn take_turn(&self, limits: &Limits) -> Result<Duration, Held> {
        let mut state = lock(&self.state);
        state.fill(limits);
        let behind = 1.0 - state.turns;
        let wait = Duration::try_from_secs_f64(behind.max(0.0) / limits.per_second.max(f64::MIN_POSITIVE));
        let wait = wait.unwrap_or(Duration::MAX);
        if wait > limits.patience {
            let why = format!("more than {} calls a second are wanted", limits.per_second);
            return Err(Held::new(why, wait));
        }
        state.turns -= 1.0;
        Ok(wait)
    }

    /// Whether a new one in its place would do the same.
    pub(crate) fn is_quiet(&self, limits: &Limits) -> bool {
        let mut state = lock(&self.state);
        state.fill(limits);
        state.until.is_none() && state.failures == 0 && state.turns >= f64::from(limits.burst)
    }
}

impl State {
    /// How long it rests still, and why.
    fn rests(&self) -> Option<(Duration, String)> {
        let left = self.until?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then(|| (left, self.why.clone()))
    }

    /// Whether a try may be made. Who may make it alone has to tell how it went.
    fn look(&mut self) -> Look {
        match self.rests() {
            Some((left, why)) => Look::Rests(left, why),
            None if self.until.is_none() => Look::Free,
            None if std::mem::replace(&mut self.alone, true) => Look::Wait,
            None => Look::Alone,
        }
    }

    fn fill(&mut self, limits: &Limits) {
        let now = Instant::now();
        let fresh = (now - self.filled).as_secs_f64() * limits.per_second;
        (self.turns, self.filled) = ((self.turns + fresh).min(f64::from(limits.burst.max(1))), now);
    }
}

impl Turn<'_> {
    /// The service answered.
    pub(crate) fn good(self) {
        let mut state = lock(&self.service.state);
        (state.failures, state.rests, state.until) = (0, 0, None);
    }

    /// The try failed; how long the service rests now, if it does.
    pub(crate) fn bad(self, limits: &Limits, after: Option<Duration>, why: String) -> Duration {
        let now = Instant::now();
        let mut state = lock(&self.service.state);
        state.failures += 1;
        state.why = why;
        if self.alone || after.is_some() || state.failures >= limits.failures {
            // Of several that fail at the same time the first one says how long it rests.
            if self.alone || state.until.is_none() {
                let own = (limits.rest.0 * (1 << state.rests.min(16))).min(limits.rest.1);
                let asked = after.map(|after| after.min(limits.rest.1));
                state.rests = state.rests.saturating_add(1);
                state.until = Some(now + asked.unwrap_or(own));
            }
            state.failures = 0;
        }
        state.until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.alone {
            lock(&self.service.state).alone = false;
            self.service.tried.notify_waiters();
        }
    }
}
