//! The body of every refused request.

use joey_model::{ErrorKind, Fault};
use serde::{Deserialize, Serialize};

/// `{"error":{"kind","reason","message","hint"}}`, sent with the HTTP status of its kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ErrorBody {
    pub error: WireFault,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WireFault {
    pub kind: String,
    pub reason: String,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl From<Fault> for ErrorBody {
    fn from(fault: Fault) -> Self {
        let Fault { kind, reason, message, hint } = fault;
        Self { error: WireFault { kind: kind.as_str().to_owned(), reason, message, hint } }
    }
}

impl From<ErrorBody> for Fault {
    fn from(body: ErrorBody) -> Self {
        let WireFault { kind, reason, message, hint } = body.error;
        Self { kind: ErrorKind::from_word(&kind), reason, message, hint }
    }
}

/// The HTTP status that carries an error of this kind.
pub fn http_status(kind: ErrorKind) -> u16 {
    match kind {
        ErrorKind::Invalid => 422,
        ErrorKind::NotFound => 404,
        ErrorKind::Conflict => 409,
        ErrorKind::Denied => 403,
        ErrorKind::Exhausted => 429,
        ErrorKind::Retryable => 503,
        ErrorKind::Internal => 500,
    }
}
