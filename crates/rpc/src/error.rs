//! Why a call failed: no connection, a broken one, or an answer that says no.

use std::io;
use std::time::Duration;

use joey_model::{ErrorKind, Fault};

/// An error of a call or of a served connection.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// No connection was made: nobody listens, or the socket is not there. The call was not seen by anybody.
    #[error("cannot connect to {peer}")]
    Connect { peer: String, source: io::Error },
    /// The connection broke before the answer was whole. The call may have been carried out.
    #[error("connection to {peer} broke")]
    Protocol { peer: String, source: hyper::Error },
    /// The answer did not come in time. The call may have been carried out, or may be yet.
    #[error("{peer} did not answer within {patience:?}")]
    Late { peer: String, patience: Duration },
    /// The other side's answer: a refusal.
    #[error("{0}")]
    Remote(Fault),
    /// The body is longer than the reader allows.
    #[error("body from {peer} is longer than {limit} bytes")]
    TooLong { peer: String, limit: usize },
    /// The body broke off.
    #[error("body from {peer} broke off")]
    Broken { peer: String, source: io::Error },
    /// The body is not what was expected.
    #[error("body from {peer} is not understood")]
    Decode { peer: String, source: serde_json::Error },
    /// The request could not be formed.
    #[error("request cannot be formed")]
    Request { source: Box<dyn std::error::Error + Send + Sync> },
    /// A served connection ended in an error.
    #[error("serving a connection failed")]
    Serve { source: Box<dyn std::error::Error + Send + Sync> },
}

impl RpcError {
    /// How the caller should react.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Connect { .. } | Self::Protocol { .. } | Self::Broken { .. } | Self::Late { .. } => {
                ErrorKind::Retryable
            }
            Self::Remote(fault) => fault.kind,
            Self::TooLong { .. } | Self::Decode { .. } | Self::Request { .. } => ErrorKind::Invalid,
            Self::Serve { .. } => ErrorKind::Internal,
        }
    }

    /// Whether nothing listens at the other end, so that the call was certainly not carried out.
    pub fn is_connect(&self) -> bool {
        matches!(self, Self::Connect { .. })
    }
}

impl From<RpcError> for Fault {
    fn from(error: RpcError) -> Self {
        let kind = error.kind();
        match error {
            RpcError::Remote(fault) => fault,
            RpcError::Connect { .. } => Fault::new(kind, "Unreachable", error.to_string()),
            RpcError::Protocol { .. } | RpcError::Broken { .. } => {
                Fault::new(kind, "ConnectionLost", error.to_string())
            }
            RpcError::Late { .. } => Fault::new(kind, "NoAnswer", error.to_string()),
            RpcError::TooLong { .. } => Fault::new(kind, "BodyTooLong", error.to_string()),
            RpcError::Decode { ref source, .. } => Fault::new(kind, "InvalidBody", format!("{error}: {source}")),
            RpcError::Request { .. } => Fault::new(kind, "InvalidRequest", error.to_string()),
            RpcError::Serve { .. } => Fault::new(kind, "InternalError", error.to_string()),
        }
    }
}
