//! What a virtual machine boots: an uncompressed kernel, and an initramfs that holds the agent as `/init` and kernel modules.
//! Both are made from a kernel package or from files, and kept by what they were made from.
//!
//! Nothing of an archive is unpacked by its own paths, and whatever is read may be broken or hostile: sizes have bounds,
//! and what does not fit together is an error.
//!
//! Must never depend on another crate of ours but the model: it knows nothing of sandboxes, images or instances.

mod bytes;
mod debian;
mod elf;
mod error;
#[cfg(test)]
mod fixture;
mod guests;
mod initramfs;
mod kernel;
mod modules;
mod package;
mod packing;
mod persist;
mod source;

pub use debian::fetch_package;
pub use error::GuestError;
pub use guests::{Built, Guests, Request};
pub use persist::Guest;
pub use source::Kernel;
