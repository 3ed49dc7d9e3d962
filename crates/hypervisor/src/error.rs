//! Why a machine could not be made, changed or saved.

use std::io;

use joey_model::ErrorKind;

#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// A file, process or interface of the host could not be made or read.
    #[error("cannot {operation} of machine {machine}")]
    Host { machine: String, operation: &'static str, source: io::Error },
    /// The monitor ended, or said why it cannot go on.
    #[error("monitor of machine {machine} failed to {operation}: {message}")]
    Monitor { machine: String, operation: &'static str, message: String },
    /// The monitor does not answer.
    #[error("monitor of machine {machine} does not answer")]
    Silent { machine: String },
}

impl HypervisorError {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Host { .. } | Self::Monitor { .. } => ErrorKind::Internal,
            Self::Silent { .. } => ErrorKind::Retryable,
        }
    }
}
