//! What answers in a row are worth: a probe is believed once its thresholds are reached, as Kubernetes' documentation of probes
//! says it.

use joey_api::lifecycle::Probe;

use crate::Unwell;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Good,
    Bad,
    Unknown,
}

/// Answers in a row, against the thresholds.
pub struct Counted {
    believed: Answer,
    last: Answer,
    row: u32,
    needed: (u32, u32),
}

impl Counted {
    pub fn new(probe: &Probe, at_first: Answer) -> Self {
        let needed = (probe.success_threshold.max(1), probe.failure_threshold.max(1));
        Self { believed: at_first, last: Answer::Unknown, row: 0, needed }
    }

    /// What is believed from now on, when that is news.
    pub fn count(&mut self, answer: Result<(), Unwell>) -> Option<Answer> {
        let answer = if answer.is_ok() { Answer::Good } else { Answer::Bad };
        self.row = if answer == self.last { self.row.saturating_add(1) } else { 1 };
        self.last = answer;
        let needed = if answer == Answer::Good { self.needed.0 } else { self.needed.1 };
        if self.row < needed || self.believed == answer {
            return None;
        }
        self.believed = answer;
        Some(answer)
    }
}

#[cfg(test)]
mod tests {
    use joey_api::lifecycle::Action;

    use super::*;

    fn probe(success_threshold: u32, failure_threshold: u32) -> Probe {
        Probe {
            action: Action::Sleep { seconds: 0 },
            initial_delay_seconds: 0,
            timeout_seconds: 1,
            period_seconds: 1,
            success_threshold,
            failure_threshold,
            termination_grace_period_seconds: None,
        }
    }

    fn counts(mut counted: Counted, answers: &str) -> Vec<Option<Answer>> {
        let bad = || Err(Unwell(String::new()));
        answers.chars().map(|answer| counted.count(if answer == '+' { Ok(()) } else { bad() })).collect()
    }

    #[test]
    fn thresholds_count_answers_in_a_row() {
        use Answer::{Bad, Good};
        let ready = counts(Counted::new(&probe(2, 3), Bad), "++-+---++");
        assert_eq!(ready, [None, Some(Good), None, None, None, None, Some(Bad), None, Some(Good)]);
        let alive = counts(Counted::new(&probe(1, 3), Good), "--+---");
        assert_eq!(alive, [None, None, None, None, None, Some(Bad)]);
        let started = counts(Counted::new(&probe(1, 2), Answer::Unknown), "-+");
        assert_eq!(started, [None, Some(Good)]);
    }
}
