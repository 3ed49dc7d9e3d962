//! Instances whose records a sink answers that it does not take now. It may be the sink, and it may be these records: so each instance is
//! tried again by itself, in longer and longer pauses, and the others go on without it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::carrier::PAUSE;

/// Those of one sink.
#[derive(Debug, Default)]
pub(crate) struct Held {
    of: BTreeMap<String, Wait>,
    /// Of all together, since the sink took anything: one that takes nothing is not asked once for each of them.
    together: Option<Wait>,
}

#[derive(Debug, Clone, Copy)]
struct Wait {
    /// Not given: it was not tried by itself yet.
    until: Option<Instant>,
    pause: Duration,
}

impl Wait {
    const NONE: Self = Self { until: None, pause: PAUSE.0 };

    fn lengthen(&mut self, now: Instant, part: f64) {
        self.until = Some(now + self.pause.mul_f64(part));
        self.pause = (self.pause * 2).min(PAUSE.1);
    }

    fn is_over(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| until <= now)
    }
}

impl Held {
    pub(crate) fn ids(&self) -> BTreeSet<String> {
        self.of.keys().cloned().collect()
    }

    /// Something of each of these was in what was refused.
    pub(crate) fn hold(&mut self, ids: BTreeSet<String>) {
        for id in ids {
            self.of.entry(id).or_insert(Wait::NONE);
        }
    }

    /// The one to be tried now: who was not yet, and else who waits the longest.
    pub(crate) fn due(&self, now: Instant) -> Option<String> {
        let again = self.together.is_none_or(|wait| wait.is_over(now));
        let over = |(_, wait): &(&String, &Wait)| wait.until.is_none() || again && wait.is_over(now);
        self.of.iter().filter(over).min_by_key(|(_, wait)| wait.until).map(|(id, _)| id.clone())
    }

    /// It was tried and refused; `part` is what its pause is multiplied with.
    pub(crate) fn refused(&mut self, id: &str, now: Instant, part: f64) {
        if let Some(wait) = self.of.get_mut(id) {
            wait.lengthen(now, part);
            self.together.get_or_insert(Wait::NONE).lengthen(now, part);
        }
    }

    /// Nothing of it is refused any more.
    pub(crate) fn release(&mut self, id: &str) {
        self.of.remove(id);
    }

    /// The sink has taken something.
    pub(crate) fn taken(&mut self) {
        self.together = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ids: &[&str]) -> BTreeSet<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    #[test]
    fn each_is_tried_at_once_and_then_in_pauses_of_its_own() {
        let (mut held, begin) = (Held::default(), Instant::now());
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        assert_eq!(held.due(begin), None);
        held.hold(set(&["a", "b", "c"]));
        held.refused("a", begin, 1.0);
        assert_eq!(held.due(begin).as_deref(), Some("b"), "nobody waits for another one's pause before the first time");
        held.taken();
        held.release("b");
        held.refused("c", begin, 1.0);
        assert_eq!((held.due(begin), held.ids()), (None, set(&["a", "c"])));
        assert_eq!(held.due(at(1)).as_deref(), Some("a"));
        held.hold(set(&["a"]));
        held.refused("a", at(1), 1.0);
        assert_eq!(held.due(at(1)), None, "both are refused: the sink is not asked for each of them at once");
        assert_eq!(held.due(at(3)).as_deref(), Some("c"));
        held.taken();
        held.release("c");
        assert_eq!((held.due(at(2)), held.due(at(3)).as_deref()), (None, Some("a")), "its pause was two seconds");
        for _ in 0..20 {
            held.refused("a", at(3), 1.0);
        }
        assert_eq!(
            (held.due(at(62)), held.due(at(63)).as_deref()),
            (None, Some("a")),
            "and never longer than a minute"
        );
    }
}
