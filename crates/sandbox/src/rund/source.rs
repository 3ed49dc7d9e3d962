//! Where machines come from, how long that may take, and what it is called.

use std::sync::Arc;
use std::time::{Duration, Instant};

use joey_hypervisor::Template;

use super::START_LIMIT;
use super::pool::Warm;
use super::templates::Copied;
use crate::SandboxError;

/// How long a copy may take, before a boot is tried instead.
const COPY_LIMIT: Duration = Duration::from_secs(10);

/// Where a machine comes from.
pub(super) enum Source {
    Warm(Warm),
    Copy(Arc<Template>),
    Boot,
}

impl Source {
    /// What it is called among the phases of a start.
    pub(super) fn phase(&self) -> &'static str {
        match self {
            Self::Warm(_) => "give",
            Self::Copy(_) => "copy",
            Self::Boot => "start",
        }
    }

    /// The template that it is a copy of from now on.
    pub(super) fn template(&self) -> Option<Arc<Template>> {
        match self {
            Self::Warm(warm) => warm.uncopied().cloned(),
            Self::Copy(template) => Some(template.clone()),
            Self::Boot => None,
        }
    }

    pub(super) fn limit(&self) -> Duration {
        match self {
            Self::Warm(_) | Self::Copy(_) => COPY_LIMIT,
            Self::Boot => START_LIMIT,
        }
    }

    /// What is said when it fails and another one is tried.
    pub(super) fn failed(&self) -> &'static str {
        match self {
            Self::Warm(_) => "the machine that was kept ready could not be taken, and another one was made",
            Self::Copy(_) => "no copy of a template could be made, and the machine was booted",
            Self::Boot => "the machine could not be booted",
        }
    }
}

/// How far a start is.
pub(super) struct Phases {
    began: Instant,
    pub done: Vec<(String, u64)>,
}

impl Phases {
    pub(super) fn begin() -> Self {
        Self { began: Instant::now(), done: Vec::new() }
    }

    pub(super) fn done(&mut self, name: &str) {
        let before: u64 = self.done.iter().map(|(_, micros)| micros).sum();
        let micros = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.done.push((name.to_owned(), micros.saturating_sub(before)));
    }
}

/// Why a machine was not made, and what that says of the template that it was to be a copy of.
pub(super) struct Failure {
    pub error: SandboxError,
    pub copied: Option<Copied>,
}

impl From<SandboxError> for Failure {
    fn from(error: SandboxError) -> Self {
        Self { error, copied: None }
    }
}
