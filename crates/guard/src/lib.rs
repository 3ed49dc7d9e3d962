//! Guarded calls to services outside that instances need at their start: however many start at once, and however badly a
//! service does, it is called seldom, a few at a time, tried again a few times, and left alone for a while when it fails.
//!
//! Each application that calls a service has a guard of its own, named by a key: one that is refused or misconfigured is in
//! nobody else's way. This crate must never depend on any other of ours, nor know what is called.
//!
//! ```text
//!           rate, places            good, or an answer that stands
//! call ──► wait for a turn ──► try ──────────────────────────────────► done
//!   │         │ too long        │ failed: again after a pause, at most `tries`
//!   │         ▼                 ▼ too many failures in a row, or asked to by Retry-After
//!   │       Held             resting (twice as long each time) ──► over: one call tries alone ──► good: as before
//!   └── rests: Held ◄───────────┘                                           └─ failed: rests again
//! ```

mod service;

use std::collections::HashMap;
use std::fmt::Display;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use service::Service;

/// What a guard lets through.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Calls a second in the long run.
    pub per_second: f64,
    /// Calls that may be made at once after a quiet time.
    pub burst: u32,
    /// Calls under way at a time.
    pub at_once: usize,
    /// Tries of one call.
    pub tries: u32,
    /// Pause after the first failed try; each later one is twice as long, and each is spread by half of itself.
    pub pause: Duration,
    /// Longest wait for a turn, and for a service that names a time when it wants to be asked again.
    pub patience: Duration,
    /// Failed tries in a row, over all calls, after which the service is left alone.
    pub failures: u32,
    /// How long it is left alone: the first time, and at most.
    pub rest: (Duration, Duration),
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            per_second: 20.0,
            burst: 40,
            at_once: 4,
            tries: 3,
            pause: Duration::from_millis(200),
            patience: Duration::from_secs(20),
            failures: 3,
            rest: (Duration::from_secs(5), Duration::from_secs(300)),
        }
    }
}

/// Why one try did not work.
#[derive(Debug, Clone, PartialEq)]
pub enum Failed<E> {
    /// It may work later; after the time that the service named, if it did.
    Again { error: E, after: Option<Duration> },
    /// The service answered; asking again changes nothing.
    Final(E),
}

/// Why a call has no result.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refused<E: Display> {
    #[error("{0}")]
    Failed(E),
    #[error(transparent)]
    Held(Held),
}

/// The guard makes no call before a time.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{why}; its call guard lets the next call through at {until:.0}")]
pub struct Held {
    /// What the service said last, or which limit was reached.
    pub why: String,
    pub until: Timestamp,
}

impl Held {
    fn new(why: impl Into<String>, wait: Duration) -> Self {
        // To the next whole second: never too early.
        let wait = SignedDuration::try_from(wait).unwrap_or(SignedDuration::MAX);
        let wait = wait.saturating_add(SignedDuration::from_secs(1));
        let until = Timestamp::now().checked_add(wait).unwrap_or(Timestamp::MAX);
        Self { why: why.into(), until: Timestamp::from_second(until.as_second()).unwrap_or(until) }
    }
}

/// Guards that are remembered though nobody calls.
const REMEMBERED: usize = 1024;

/// Guards of one kind of service, by application.
#[derive(Debug)]
pub struct Guard {
    limits: Limits,
    services: Mutex<HashMap<String, Arc<Service>>>,
    /// Spreads the pauses of those that failed together.
    chance: RandomState,
}

impl Guard {
    pub fn new(limits: Limits) -> Self {
        Self { limits, services: Mutex::default(), chance: RandomState::new() }
    }

    /// Calls on behalf of `application`, by `one` for each try.
    pub async fn call<T, E, F>(&self, application: &str, one: impl Fn() -> F) -> Result<T, Refused<E>>
    where
        E: Display,
        F: Future<Output = Result<T, Failed<E>>>,
    {
        let (service, limits) = (self.service(application), &self.limits);
        let mut tries = 0;
        loop {
            let turn = service.turn(limits).await.map_err(Refused::Held)?;
            tries += 1;
            match one().await {
                Ok(value) => {
                    turn.good();
                    return Ok(value);
                }
                Err(Failed::Final(error)) => {
                    turn.good();
                    return Err(Refused::Failed(error));
                }
                Err(Failed::Again { error, after }) => {
                    // "At once" names no time: it is left alone like one that says nothing.
                    let after = after.filter(|after| !after.is_zero());
                    let rests = turn.bad(limits, after, error.to_string());
                    // Only for a time that the service names itself is it worth to wait here.
                    let worth = rests.is_zero() || after.is_some() && rests <= limits.patience;
                    if tries >= limits.tries || !worth {
                        return Err(match rests.is_zero() {
                            true => Refused::Failed(error),
                            false => Refused::Held(Held::new(error.to_string(), rests)),
                        });
                    }
                    tokio::time::sleep(rests.max(self.pause(tries))).await;
                }
            }
        }
    }

    fn pause(&self, tries: u32) -> Duration {
        let whole = self.limits.pause * (1 << tries.saturating_sub(1).min(10));
        let share = self.chance.hash_one((tries, Instant::now())) % 1000;
        whole / 2 + whole * u32::try_from(share).unwrap_or(0) / 1000
    }

    fn service(&self, application: &str) -> Arc<Service> {
        let mut services = lock(&self.services);
        if services.len() >= REMEMBERED && !services.contains_key(application) {
            services.retain(|_, service| Arc::strong_count(service) > 1 || !service.is_quiet(&self.limits));
        }
        services.entry(application.to_owned()).or_insert_with(|| Arc::new(Service::new(&self.limits))).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
