//! Why a sandbox could not be made, found or ended.

use std::io;

use joey_hypervisor::HypervisorError;
use joey_model::{ErrorKind, Fault, InstanceId};

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The agent's program could not be started.
    #[error("cannot start the agent of instance {instance}")]
    Spawn { instance: InstanceId, source: io::Error },
    /// The agent ended, or said why it cannot run, before it answered.
    #[error("agent of instance {instance} did not come up: {message}")]
    Agent { instance: InstanceId, message: String },
    /// The machine could not be made or changed.
    #[error("machine of instance {instance} could not be made or changed")]
    Machine { instance: InstanceId, source: HypervisorError },
    /// There is no place for the disks of so many layers.
    #[error("instance {instance} has no place for {layers} further layers of images")]
    Full { instance: InstanceId, layers: usize },
    /// The class makes no sandboxes on this host.
    #[error("{message}")]
    Unsupported { message: String, hint: &'static str },
    /// A file or cgroup of the sandbox could not be read or changed.
    #[error("cannot {operation} of instance {instance}")]
    Host { instance: InstanceId, operation: &'static str, source: io::Error },
    /// Processes are still there although they were killed.
    #[error("processes of instance {instance} do not end")]
    Unkillable { instance: InstanceId },
}

impl SandboxError {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Spawn { .. } | Self::Unkillable { .. } => ErrorKind::Retryable,
            Self::Agent { .. } | Self::Host { .. } => ErrorKind::Internal,
            Self::Machine { source, .. } => source.kind(),
            Self::Unsupported { .. } => ErrorKind::Invalid,
            Self::Full { .. } => ErrorKind::Exhausted,
        }
    }
}

impl From<SandboxError> for Fault {
    fn from(error: SandboxError) -> Self {
        // The agent's own words may hold paths of the host: they go to the platform's log, not to the tenant.
        let message = match &error {
            SandboxError::Agent { instance, .. } => format!("agent of instance {instance} did not come up"),
            SandboxError::Machine { .. } => format!("{error}: the log of its host says why"),
            other => other.to_string(),
        };
        tracing::warn!(error = %error, source = ?std::error::Error::source(&error), "sandbox operation failed");
        match error {
            SandboxError::Unsupported { hint, .. } => {
                Fault::new(ErrorKind::Invalid, "Unsupported", message).with_hint(hint)
            }
            _ => Fault::new(error.kind(), "SandboxFailed", message),
        }
    }
}
