//! Schemas of kinds, and what is generic over them: decoding and defaults. Patches and OpenAPI documents are not here.
//!
//! No kind has code here; facts come from `schema-facts/`.

mod decode;
mod defaults;
mod types;

pub use decode::{FieldError, FieldReason, UnknownFields};
pub use types::{Schemas, TypeId};
