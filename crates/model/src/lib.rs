//! The words every room of Joey shares: ids, quantities, image references, instance states and error kinds.
//!
//! Must never depend on anything that does I/O, on async code or on serde: wire types live in `joey-api`, on-disk
//! records in the `persist` modules of their owners.

pub mod checkpoint;
pub mod error;
pub mod id;
pub mod image_ref;
pub mod quantity;
pub mod state;

pub use error::{ErrorKind, Fault};
pub use id::{InstanceId, InvalidName};
pub use image_ref::{Digest, ImageRef};
pub use state::{Phase, RestartPolicy};
