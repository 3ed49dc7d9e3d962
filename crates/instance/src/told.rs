//! What an agent tells, before anything is made of it. The agent of a machine that was taken over says what it likes, as often as it
//! likes: lengths, times and counts are brought to what an honest one says, and who says too much is heard later.

use std::collections::HashSet;
use std::time::Duration;

use futures::{Stream, StreamExt};
use jiff::{SignedDuration, Timestamp};
use joey_api::agent::{AgentContainerState, AgentState};
use joey_api::instance::{ContainerState, InstanceEvent, Termination};
use tokio::time::Instant;

/// Bytes of a reason, of a name or reference, and of a message: as Kubernetes has them for its objects.
const REASON: usize = 128;
const NAME: usize = 4096;
const MESSAGE: usize = 4096;
const EVENT_MESSAGE: usize = 1024;
/// Events of a state.
const EVENTS: usize = 32;
/// How far a machine's clock may be ahead of the host's.
const AHEAD: SignedDuration = SignedDuration::from_hours(1);
/// The highest count that Kubernetes knows.
pub(crate) const MOST_RESTARTS: u32 = i32::MAX.unsigned_abs();

/// States that are heard one after another, and one more each.
const STATES: (u32, Duration) = (256, Duration::from_millis(50));
/// New events, the same.
const NEWS: (u32, Duration) = (128, Duration::from_millis(500));

/// So many at once, and one more after each pause.
#[derive(Debug)]
struct Allowance {
    limit: (u32, Duration),
    /// When all of them are there again.
    whole: Instant,
}

impl Allowance {
    fn new(limit: (u32, Duration)) -> Self {
        Self { limit, whole: Instant::now() }
    }

    /// When the next one is there.
    fn next(&self) -> Instant {
        let (most, pause) = self.limit;
        self.whole.checked_sub(pause * (most - 1)).unwrap_or_else(Instant::now)
    }

    fn spend(&mut self) {
        self.whole = self.whole.max(Instant::now()) + self.limit.1;
    }
}

/// The listener to one agent.
#[derive(Debug)]
pub(crate) struct Listener {
    states: Allowance,
    news: Allowance,
    events: Vec<InstanceEvent>,
}

impl Listener {
    pub(crate) fn new() -> Self {
        Self { states: Allowance::new(STATES), news: Allowance::new(NEWS), events: Vec::new() }
    }

    /// The next state. One that always has news is not heard all the time: what it says waits in its machine. Nothing is lost when it
    /// is dropped while it waits.
    pub(crate) async fn next<S: Stream + Unpin>(&self, states: &mut S) -> Option<S::Item> {
        tokio::time::sleep_until(self.states.next()).await;
        states.next().await
    }

    /// Takes in a state that was just heard. Of its new events some are left out where there are too many of them.
    pub(crate) fn hear(&mut self, state: AgentState) -> AgentState {
        self.states.spend();
        let mut state = bounded(state);
        state.events.retain(|event| {
            let may = self.events.contains(event) || self.news.next() <= Instant::now();
            if may && !self.events.contains(event) {
                self.news.spend();
            }
            may
        });
        self.events.clone_from(&state.events);
        state
    }
}

/// The state with nothing in it that is longer, later or more than it can be.
pub(crate) fn bounded(mut state: AgentState) -> AgentState {
    let latest = Timestamp::now().checked_add(AHEAD).unwrap_or(Timestamp::MAX);
    let mut known = HashSet::new();
    state.containers.retain(|container| container.name.len() <= NAME && known.insert(container.name.clone()));
    state.containers.iter_mut().for_each(|container| bound_container(container, latest));
    let surplus = state.events.len().saturating_sub(EVENTS);
    state.events.drain(..surplus);
    // An event that has not happened yet would be the last one for ever.
    state.events.retain(|event| (Timestamp::UNIX_EPOCH..=latest).contains(&event.at));
    for event in &mut state.events {
        cut(&mut event.reason, REASON);
        cut(&mut event.message, EVENT_MESSAGE);
        event.container = event.container.take().filter(|name| known.contains(name));
    }
    if let Some(failed) = &mut state.failed {
        cut(&mut failed.reason, REASON);
        cut(&mut failed.message, MESSAGE);
    }
    state
}

fn bound_container(container: &mut AgentContainerState, latest: Timestamp) {
    let within = |at: Timestamp| at.clamp(Timestamp::UNIX_EPOCH, latest);
    let bound_end = |end: &mut Termination| {
        cut(&mut end.reason, REASON);
        cut(&mut end.message, MESSAGE);
        end.started_at = end.started_at.map(within);
        end.finished_at = within(end.finished_at);
    };
    match &mut container.state {
        ContainerState::Waiting { reason, message } => {
            cut(reason, REASON);
            cut(message, MESSAGE);
        }
        ContainerState::Running { started_at, .. } => *started_at = within(*started_at),
        ContainerState::Terminated(end) => bound_end(end),
    }
    if let Some(end) = &mut container.last_termination {
        bound_end(end);
    }
    container.running_since = container.running_since.map(within);
    container.restart_count = container.restart_count.min(MOST_RESTARTS);
    cut(&mut container.image, NAME);
    cut(&mut container.image_id, NAME);
}

/// Cuts a text to so many bytes, between two characters.
fn cut(text: &mut String, bytes: usize) {
    if text.len() > bytes {
        let end = (0..=bytes).rev().find(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or(0));
    }
}

#[cfg(test)]
#[path = "told_tests.rs"]
mod tests;
