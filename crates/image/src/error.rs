//! Why an image could not be pulled, imported, mounted or removed, and how that is told to others.
//!
//! Messages reach tenants: they name the image and the layer, never a path of the host.

use joey_model::{Digest, ErrorKind, Fault};

/// A failure, with the image it concerns.
#[derive(Debug, Clone, thiserror::Error)]
#[error("image {image}: {problem}")]
pub struct ImageError {
    /// The reference as completed, or what the caller gave.
    pub image: String,
    pub problem: Problem,
}

/// What is wrong with an image, its registry, or the store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("the reference is not valid: {0}")]
    InvalidName(String),
    #[error("not found in registry {registry}")]
    NotFound { registry: String },
    #[error("no such image is stored on this host")]
    NotStored,
    #[error("registry {registry} refused access{}", if *.anonymous { " without credentials" } else { " with the credentials given" })]
    Denied { registry: String, anonymous: bool },
    #[error("registry {registry} cannot be used: {detail}")]
    Unavailable { registry: String, detail: String },
    #[error("{object} has digest {actual} where {expected} is required")]
    Digest { object: String, expected: Digest, actual: String },
    #[error("no variant for {wanted}; available: {}", if .available.is_empty() { "none".to_owned() } else { .available.join(", ") })]
    Platform { wanted: String, available: Vec<String> },
    #[error("{object} is not usable: {detail}")]
    Malformed { object: &'static str, detail: String },
    #[error("layer {layer}: {detail}")]
    Layer { layer: Digest, detail: String },
    #[error("layer {layer} is larger than {limit} bytes unpacked")]
    LayerTooLarge { layer: Digest, limit: u64 },
    #[error("its layers are larger than {limit} bytes together")]
    ImageTooLarge { limit: u64 },
    #[error("its layers cannot be put on each other: {detail}")]
    Tangled { detail: String },
    #[error("it is in use by a running instance")]
    InUse,
    #[error("the image store failed to {operation}: {detail}")]
    Store { operation: &'static str, detail: String },
    #[error("the image store failed to {operation}: the host's disk is full")]
    Full { operation: &'static str },
}

impl Problem {
    /// Attaches the image's name.
    pub(crate) fn of(self, image: impl ToString) -> ImageError {
        ImageError { image: image.to_string(), problem: self }
    }

    pub(crate) fn store(operation: &'static str, error: &std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Self::Full { operation },
            _ => Self::Store { operation, detail: error.to_string() },
        }
    }

    fn kind_and_reason(&self) -> (ErrorKind, &'static str) {
        match self {
            Self::InvalidName(_) => (ErrorKind::Invalid, "InvalidImageName"),
            Self::NotFound { .. } => (ErrorKind::NotFound, "ImageNotFound"),
            Self::NotStored => (ErrorKind::NotFound, "ImageNotFound"),
            Self::Denied { .. } => (ErrorKind::Denied, "ErrImagePull"),
            Self::Unavailable { .. } => (ErrorKind::Retryable, "RegistryUnavailable"),
            Self::InUse => (ErrorKind::Conflict, "ImageInUse"),
            Self::Store { .. } => (ErrorKind::Internal, "ImageStoreFailed"),
            Self::Full { .. } => (ErrorKind::Exhausted, "ImageStoreFull"),
            Self::Digest { .. }
            | Self::Platform { .. }
            | Self::Malformed { .. }
            | Self::Layer { .. }
            | Self::LayerTooLarge { .. }
            | Self::ImageTooLarge { .. }
            | Self::Tangled { .. } => (ErrorKind::Invalid, "ErrImagePull"),
        }
    }

    fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::InvalidName(_) => "write it as [REGISTRY/]REPOSITORY[:TAG][@sha256:DIGEST]",
            Self::NotFound { .. } => {
                "check the repository and the tag or digest; a private repository needs credentials"
            }
            Self::NotStored => "pull or import it first",
            Self::Denied { anonymous: true, .. } => {
                "give credentials: imagePullSecrets, or a docker configuration file"
            }
            Self::Denied { .. } => "check user and password, and that the user may pull this repository",
            Self::Unavailable { .. } => "check the registry's address and that this host reaches it",
            Self::Digest { .. } => "the content is not what was named: pull again, or push the image again",
            Self::Platform { .. } => "push a variant for this architecture, or choose another image",
            Self::Malformed { .. } | Self::Layer { .. } => "build and push the image again",
            Self::LayerTooLarge { .. } | Self::ImageTooLarge { .. } => {
                "make the image smaller, or have the operator raise the image size limit"
            }
            Self::Tangled { .. } => "build the image so that each layer lists the directories of its files",
            Self::InUse => "delete the instances that run it first",
            Self::Full { .. } => {
                "remove images that are not needed (joey image rm), or give the disk more room, and pull again"
            }
            Self::Store { .. } => return None,
        })
    }
}

impl From<&ImageError> for Fault {
    fn from(error: &ImageError) -> Self {
        let (kind, reason) = error.problem.kind_and_reason();
        let fault = Fault::new(kind, reason, error.to_string());
        match error.problem.hint() {
            Some(hint) => fault.with_hint(hint),
            None => fault,
        }
    }
}

impl From<ImageError> for Fault {
    fn from(error: ImageError) -> Self {
        Self::from(&error)
    }
}
