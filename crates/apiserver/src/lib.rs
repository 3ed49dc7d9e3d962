//! The schema-driven Kubernetes API.

pub mod schema;
