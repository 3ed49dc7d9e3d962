//! States of an instance as every layer names them.

/// Phase of an instance.
///
/// ```text
/// Pending ──► Starting ──► Running ──► Succeeded
///    │            │           │  └───► Failed
///    └────────────┴───────────┴──► Terminating ──► (gone)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Accepted and durable; not yet placed or its image not yet present.
    Pending,
    /// Its sandbox is being made.
    Starting,
    /// At least one container runs or will be restarted.
    Running,
    /// All containers ended with exit code 0 and will not be restarted.
    Succeeded,
    /// All containers ended, at least one of them in failure, and will not be restarted.
    Failed,
    /// Being stopped and removed.
    Terminating,
}

impl Phase {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Starting => "Starting",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
            Self::Terminating => "Terminating",
        }
    }
}

/// What happens when a container ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RestartPolicy {
    #[default]
    Always,
    OnFailure,
    Never,
}

impl RestartPolicy {
    /// Whether a container that ended with `exit_code` is started again.
    pub fn restarts(self, exit_code: i32) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => exit_code != 0,
            Self::Never => false,
        }
    }
}
