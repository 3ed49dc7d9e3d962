//! Error kinds: what a caller can do about an error. Messages and sources stay with the module that raises them.

use std::fmt;

/// How the caller should react to an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request is wrong and stays wrong until it is changed.
    Invalid,
    /// The named object does not exist.
    NotFound,
    /// The object exists already, or changed in between.
    Conflict,
    /// The caller is not known or may not do this.
    Denied,
    /// A limited resource is used up; it may be free again later.
    Exhausted,
    /// A peer is away or slow; the same call may work later.
    Retryable,
    /// A defect or an unusable host; the details are in the platform's own log.
    Internal,
}

impl ErrorKind {
    /// The word used on the wire and in output.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::NotFound => "not-found",
            Self::Conflict => "conflict",
            Self::Denied => "denied",
            Self::Exhausted => "exhausted",
            Self::Retryable => "retryable",
            Self::Internal => "internal",
        }
    }

    /// The kind a wire word names; an unknown word is [`ErrorKind::Internal`].
    pub fn from_word(word: &str) -> Self {
        [Self::Invalid, Self::NotFound, Self::Conflict, Self::Denied, Self::Exhausted, Self::Retryable]
            .into_iter()
            .find(|kind| kind.as_str() == word)
            .unwrap_or(Self::Internal)
    }
}

/// An error as it crosses a room's border: kind, CamelCase reason for machines, message and hint for people.
///
/// The message names the object and the operation, in lower case without a full stop. It is shown to tenants, so it never
/// holds paths of the host, addresses of the platform or other tenants' names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub kind: ErrorKind,
    /// A word of the field where there is one: `ErrImagePull`, `InvalidImageName`, `CreateContainerError` …
    pub reason: String,
    pub message: String,
    pub hint: Option<String>,
}

impl Fault {
    pub fn new(kind: ErrorKind, reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self { kind, reason: reason.into(), message: message.into(), hint: None }
    }

    /// Adds what the reader can do about it.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}
