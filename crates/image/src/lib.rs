//! Image reference to verified, shared EROFS layers: pull, import, keep, mount.
//!
//! The path of data: reference → registry → manifest (platform chosen) → configuration → layers. A layer's compressed
//! bytes are verified, decompressed, verified again (`diff_id`) and written as an EROFS image in one streaming pass;
//! nothing of a tenant's is ever unpacked onto the host's own file system, so no entry of a layer can reach outside it.
//!
//! Must never depend on the store, on sandboxes or instances, or on anything of Kubernetes.

mod convert;
mod cover;
mod credentials;
mod detour;
mod erofs;
mod error;
mod flight;
mod images;
mod import;
mod locks;
mod looks;
mod mount;
mod oci;
mod persist;
mod pull;
mod registry;
mod stack;
mod supplement;
mod tar_stream;
mod tokens;
mod tree;

pub use error::{ImageError, Problem};
pub use images::{Config, Image, Images, Layer};
pub use oci::ImageConfig;
