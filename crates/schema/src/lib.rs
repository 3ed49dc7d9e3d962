//! Schemas of kinds, and what is generic over them: decoding, defaults, patches, OpenAPI.
//!
//! No kind has code here; facts come from `facts/`. Must never do I/O, and must never know requests, storage or objects' life.

mod decode;
mod defaults;
mod merge;
mod openapi;
mod types;

pub use decode::{FieldError, FieldReason, UnknownFields};
pub use merge::{MergeError, json_merge, json_patch};
pub use openapi::{Documents, ServedResource, ServedSubresource};
pub use types::{Schemas, TypeId};
