//! Why no guest could be made, and what a person can do about it.

use std::io;
use std::path::{Path, PathBuf};

use joey_model::ErrorKind;

pub type Result<T> = std::result::Result<T, GuestError>;

/// A failure, with the file it concerns. It is for the operator of a host: it names the host's paths.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error("cannot {operation} {}", .path.display())]
    Host { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is not usable: {detail}", .path.display())]
    Malformed { path: PathBuf, detail: String },
    #[error("agent {} is not usable: {detail}", .path.display())]
    Agent { path: PathBuf, detail: String },
    #[error("kernel {} lacks {what}", .kernel.display())]
    Lacks { kernel: PathBuf, what: String },
    #[error("{package} cannot be fetched: {detail}")]
    Fetch { package: String, detail: String },
    #[error("there is no guest {id}")]
    NotFound { id: String },
    #[error("guest {id} is the one in use")]
    InUse { id: String },
}

impl GuestError {
    /// For `map_err` of what is done with one path.
    pub(crate) fn host(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { operation, path: path.to_owned(), source }
    }

    /// For `map_err` of reading a source: what the system says of files is told as such, all else is wrong with the source.
    pub(crate) fn source(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        move |error| match error.raw_os_error() {
            Some(_) => Self::host(operation, path)(error),
            None => Self::Malformed { path: path.to_owned(), detail: error.to_string() },
        }
    }

    /// What the caller can do.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Host { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::Exhausted,
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Internal,
            },
            Self::Malformed { .. } | Self::Agent { .. } | Self::Lacks { .. } => ErrorKind::Invalid,
            Self::Fetch { .. } => ErrorKind::Retryable,
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::InUse { .. } => ErrorKind::Conflict,
        }
    }

    /// What a person can do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Host { .. } if self.kind() == ErrorKind::Exhausted => {
                Some("give the disk more room; a guest takes about 100 MB while it is made")
            }
            Self::Malformed { .. } => Some(
                "give a package of a kernel image (linux-image-…-cloud-amd64), a bzImage or an uncompressed vmlinux",
            ),
            Self::Agent { .. } => Some("give an agent that is linked statically, for x86-64"),
            Self::Lacks { .. } => {
                Some("use a kernel for virtual machines, such as that of Debian's package linux-image-cloud-amd64")
            }
            Self::Fetch { .. } => {
                Some("give a kernel as a file: a package that was downloaded elsewhere, a bzImage or a vmlinux")
            }
            Self::InUse { .. } => Some("make another guest first"),
            Self::Host { .. } | Self::NotFound { .. } => None,
        }
    }
}
