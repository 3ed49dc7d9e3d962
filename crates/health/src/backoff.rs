//! How long a container that ended waits for its next run, as the kubelet has it: the first restart comes at once, those after it
//! later and later, and after a good run it begins again.

use std::time::Duration;

const FIRST: Duration = Duration::from_secs(10);
const LAST: Duration = Duration::from_secs(300);
/// A run of this length was a good one.
const GOOD_RUN: Duration = Duration::from_secs(600);

#[derive(Debug, Default)]
pub struct Backoff {
    next: Duration,
}

impl Backoff {
    /// The wait after a run of this length; none where the end was asked for, which is no failure.
    pub fn after(&mut self, ran: Duration, asked: bool) -> Duration {
        if ran >= GOOD_RUN {
            self.next = Duration::ZERO;
        }
        if asked {
            return Duration::ZERO;
        }
        let wait = self.next;
        self.next = (wait * 2).clamp(FIRST, LAST);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_until_a_good_run() {
        let mut backoff = Backoff::default();
        let mut after = |ran: u64, asked: bool| backoff.after(Duration::from_secs(ran), asked).as_secs();
        let waits: Vec<u64> = (0..8).map(|_| after(1, false)).collect();
        assert_eq!(waits, [0, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(after(599, true), 0, "who asks does not wait");
        assert_eq!(after(599, false), 300, "and makes no wait shorter");
        assert_eq!([after(600, false), after(1, false), after(1, false)], [0, 10, 20]);
        assert_eq!([after(600, true), after(1, false), after(1, false)], [0, 0, 10]);
    }
}
