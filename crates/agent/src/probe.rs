//! The probes of one run of a container: asked at their times, counted against their thresholds, told as readiness, as
//! "started", or as the verdict that ends the run. The rules are those of the Kubernetes probe documentation: before the
//! startup probe was good the others wait; readiness begins as not ready, liveness as alive.

use std::time::Duration;

use joey_api::agent::AgentContainer;
use joey_api::lifecycle::{Probe, Role};
use joey_health::{Answer, Counted};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use crate::check::{self, Asker, Unwell};
use crate::debugged;
use crate::life::Life;
use crate::supervisor::Agent;

/// How long the same words about a probe are not said again.
const QUIET: Duration = Duration::from_secs(300);

/// How a run is, as its probes see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Health {
    pub started: bool,
    /// As its probes see it.
    pub ready: bool,
    /// Its hook before it is ready was good, or there is none.
    pub online: bool,
}

impl Health {
    /// Whether it is told as ready.
    pub fn counts_as_ready(self) -> bool {
        self.ready && self.online
    }
}

/// What ends a run: the probe that failed and the grace it gives, if it has one of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub probe: &'static str,
    pub grace: Option<Duration>,
}

/// Whether it is ready as soon as it has started. An init container is ready once it is done.
pub fn is_ready_unasked(container: &AgentContainer) -> bool {
    container.role != Role::Init && container.lifecycle.readiness.is_none()
}

/// Asks until a probe fails for good; never ends otherwise.
pub async fn watch(agent: &Agent, life: &Life, health: &watch::Sender<Health>) -> Verdict {
    let container = life.container();
    let container = &*container;
    let begun = Instant::now();
    if let Some(probe) = &container.lifecycle.startup {
        let mut counted = Counted::new(probe, Answer::Unknown);
        let mut asking = Asking::new(agent, life, container, "Startup", probe, begun);
        loop {
            match counted.count(asking.ask().await) {
                Some(Answer::Good) => break,
                Some(Answer::Bad) => return verdict("startup", probe),
                _ => {}
            }
        }
    }
    let ready = is_ready_unasked(container);
    health.send_if_modified(|health| {
        let now = Health { started: true, ready, ..*health };
        std::mem::replace(health, now) != now
    });
    let liveness = async {
        let Some(probe) = &container.lifecycle.liveness else { return std::future::pending().await };
        let mut counted = Counted::new(probe, Answer::Good);
        let mut asking = Asking::new(agent, life, container, "Liveness", probe, begun);
        loop {
            let answer = asking.answer().await;
            if let Err(unwell) = &answer {
                let held = debugged::held(agent, life);
                asking.say_unwell(unwell, held.as_deref());
                if held.is_some() {
                    // It counts again from the beginning when the debugger leaves.
                    counted = Counted::new(probe, Answer::Good);
                    continue;
                }
            }
            if counted.count(answer) == Some(Answer::Bad) {
                return verdict("liveness", probe);
            }
        }
    };
    let readiness = async {
        let Some(probe) = &container.lifecycle.readiness else { return std::future::pending().await };
        let mut counted = Counted::new(probe, Answer::Bad);
        let mut asking = Asking::new(agent, life, container, "Readiness", probe, begun);
        loop {
            if let Some(answer) = counted.count(asking.ask().await) {
                health.send_if_modified(|health| {
                    let ready = answer == Answer::Good;
                    std::mem::replace(&mut health.ready, ready) != ready
                });
            }
        }
    };
    tokio::select! {
        verdict = liveness => verdict,
        never = readiness => never,
    }
}

fn verdict(probe: &'static str, asked: &Probe) -> Verdict {
    let grace = asked.termination_grace_period_seconds.map(|seconds| Duration::from_secs(seconds.into()));
    Verdict { probe, grace }
}

/// Asks one probe at its times.
struct Asking<'a> {
    agent: &'a Agent,
    life: &'a Life,
    container: &'a AgentContainer,
    name: &'static str,
    probe: &'a Probe,
    times: tokio::time::Interval,
    said: Option<(String, Instant)>,
}

impl<'a> Asking<'a> {
    fn new(
        agent: &'a Agent,
        life: &'a Life,
        container: &'a AgentContainer,
        name: &'static str,
        probe: &'a Probe,
        begun: Instant,
    ) -> Self {
        let first = begun + Duration::from_secs(probe.initial_delay_seconds.into());
        let period = Duration::from_secs(probe.period_seconds.max(1).into());
        let mut times = tokio::time::interval_at(first.max(Instant::now()), period);
        times.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { agent, life, container, name, probe, times, said: None }
    }

    async fn ask(&mut self) -> Result<(), Unwell> {
        let answer = self.answer().await;
        if let Err(unwell) = &answer {
            self.say_unwell(unwell, None);
        }
        answer
    }

    async fn answer(&mut self) -> Result<(), Unwell> {
        self.times.tick().await;
        let limit = Duration::from_secs(self.probe.timeout_seconds.max(1).into());
        check::perform(self.agent, self.life, &self.probe.action, Asker::Probe, limit).await
    }

    fn say_unwell(&mut self, unwell: &Unwell, held: Option<&str>) {
        self.say(match held {
            None => format!("{} probe failed: {}", self.name, unwell.0),
            Some(by) => format!("{} probe failed, and does not count while {by}", self.name),
        });
    }

    /// Tells it as an event, but the same words not again and again.
    fn say(&mut self, words: String) {
        let known = self.said.as_ref().is_some_and(|(said, at)| *said == words && at.elapsed() < QUIET);
        if !known {
            self.agent.event(true, "Unhealthy", words.clone(), self.container);
            self.said = Some((words, Instant::now()));
        }
    }
}
