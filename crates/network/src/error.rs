//! What can go wrong with a network, and what the caller can do about it.

use std::io;

use joey_model::{ErrorKind, Fault, InstanceId};

/// An operation of this crate that failed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("no address of range {range} is free for instance {instance}")]
    Exhausted { range: ipnet::Ipv4Net, instance: InstanceId },
    #[error("network configuration is not valid: {0}")]
    Configuration(String),
    #[error("cannot {operation} {object}")]
    Netlink { operation: &'static str, object: String, source: rtnetlink::Error },
    #[error("cannot {operation} {object}")]
    Io { operation: &'static str, object: String, source: io::Error },
    #[error("{program} refused: {output}")]
    Program { program: &'static str, output: String },
    #[error("instance {0} has no network attachment")]
    NotAttached(InstanceId),
}

impl NetworkError {
    pub(crate) fn io(operation: &'static str, object: impl ToString) -> impl FnOnce(io::Error) -> Self {
        let object = object.to_string();
        move |source| Self::Io { operation, object, source }
    }

    pub(crate) fn errno(operation: &'static str, object: impl ToString) -> impl FnOnce(nix::Error) -> Self {
        let object = object.to_string();
        move |errno| Self::Io { operation, object, source: errno.into() }
    }

    pub(crate) fn netlink(operation: &'static str, object: impl ToString) -> impl FnOnce(rtnetlink::Error) -> Self {
        let object = object.to_string();
        move |source| Self::Netlink { operation, object, source }
    }

    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Exhausted { .. } => ErrorKind::Exhausted,
            Self::Configuration(_) => ErrorKind::Invalid,
            Self::NotAttached(_) => ErrorKind::NotFound,
            Self::Netlink { .. } | Self::Io { .. } | Self::Program { .. } => ErrorKind::Internal,
        }
    }
}

impl From<NetworkError> for Fault {
    fn from(error: NetworkError) -> Self {
        let kind = error.kind();
        match &error {
            NetworkError::Exhausted { range, .. } => Self::new(kind, "AddressesExhausted", error.to_string())
                .with_hint(format!(
                    "delete instances that are done, or start the host with a range larger than {range}"
                )),
            NetworkError::Configuration(_) => Self::new(kind, "InvalidNetworkConfiguration", error.to_string()),
            NetworkError::NotAttached(_) => Self::new(kind, "NotAttached", error.to_string()),
            _ => {
                tracing::error!(error = &error as &dyn std::error::Error, "network operation failed");
                Self::new(kind, "NetworkUnavailable", "the instance's network could not be set up")
                    .with_hint("the host's log names the operation that failed")
            }
        }
    }
}
