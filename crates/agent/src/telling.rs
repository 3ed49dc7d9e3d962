//! How much is told as events: no message is longer than an event of Kubernetes holds, and no reason of a container is told
//! faster than the kubelet's filter lets it (client-go's `EventSourceObjectSpamFilter`: 25 at once, one more every 5 minutes).

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// Bytes of a message.
const LONGEST: usize = 1024;
const BURST: u32 = 25;
const PAUSE: Duration = Duration::from_secs(300);

/// The message as far as an event holds it, cut between two characters.
pub fn cut(mut message: String) -> String {
    if message.len() > LONGEST {
        let end = (0..=LONGEST).rev().find(|end| message.is_char_boundary(*end));
        message.truncate(end.unwrap_or(0));
    }
    message
}

/// What may still be told, by container and reason.
#[derive(Default)]
pub struct Allowance {
    buckets: HashMap<(String, String), Bucket>,
}

impl Allowance {
    /// Whether one more may be told now.
    pub fn take(&mut self, container: &str, reason: &str, now: Instant) -> bool {
        let key = (container.to_owned(), reason.to_owned());
        self.buckets.entry(key).or_insert(Bucket { left: BURST, since: now }).take(now)
    }
}

struct Bucket {
    left: u32,
    /// When it last grew.
    since: Instant,
}

impl Bucket {
    fn take(&mut self, now: Instant) -> bool {
        let pauses = now.duration_since(self.since).as_secs() / PAUSE.as_secs();
        let grown = u32::try_from(pauses).unwrap_or(u32::MAX);
        self.since += PAUSE * grown;
        self.left = self.left.saturating_add(grown).min(BURST);
        let taken = self.left > 0;
        self.left = self.left.saturating_sub(1);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_messages_are_cut_between_characters() {
        assert_eq!(cut("short".to_owned()), "short");
        assert_eq!(cut("x".repeat(LONGEST)).len(), LONGEST);
        assert_eq!(cut("x".repeat(5000)).len(), LONGEST);
        // Three bytes each: 1024 lies within one.
        let cut = cut("€".repeat(1000));
        assert_eq!((cut.len(), cut.chars().all(|one| one == '€')), (1023, true));
    }

    #[test]
    fn each_reason_of_a_container_is_told_so_often() {
        let (mut allowance, now) = (Allowance::default(), Instant::now());
        let mut told = |container: &str, reason: &str, seconds: u64| {
            (0..100).filter(|_| allowance.take(container, reason, now + Duration::from_secs(seconds))).count()
        };
        assert_eq!(told("a", "Unhealthy", 0), 25);
        assert_eq!(told("a", "Killing", 0), 25, "another reason");
        assert_eq!(told("b", "Unhealthy", 0), 25, "another container");
        assert_eq!(told("a", "Unhealthy", 299), 0);
        assert_eq!(told("a", "Unhealthy", 300), 1);
        assert_eq!(told("a", "Unhealthy", 899), 1);
        assert_eq!(told("a", "Unhealthy", 900), 1);
        assert_eq!(told("a", "Unhealthy", 1_000_000), 25, "never more than at first");
    }
}
