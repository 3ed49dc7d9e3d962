//! The schema-driven Kubernetes API.
