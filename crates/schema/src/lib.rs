//! Schemas of kinds, and what is generic over them: decoding, defaults, patches, owners of fields, OpenAPI.
//!
//! No kind has code here; facts come from `facts/`. Must never do I/O, and must never know requests, storage or objects' life.

mod decode;
mod defaults;
mod merge;
mod openapi;
mod ownership;
pub mod protobuf;
mod quantity;
mod reading;
mod types;

pub use decode::{Decoded, FieldError, FieldReason, UnknownFields};
pub use merge::{MergeError, json_merge, json_patch};
pub use openapi::{Documents, ServedResource, ServedSubresource};
pub use ownership::{ApplyError, Conflict, FieldSet, Writer, same_but_for_times};
pub use reading::read_json;
pub use types::{Schemas, TypeId};
