//! What is special about a kind on its way into the store. Most kinds need nothing: [`Plain`].
//!
//! A strategy sees JSON that fits its schema and has its defaults. It does no I/O.

pub mod annotations;
pub mod config;
pub mod containers;
pub mod event;
pub mod in_place;
pub mod metadata;
pub mod namespace;
pub mod node;
pub mod pod;
pub mod scheduling;
pub mod security;

use std::time::Duration;

use serde_json::Value;

use crate::status::FieldFault;

pub trait Strategy: Sync {
    /// Brings what may be written in two ways into the one that is stored.
    fn fold(&self, _value: &mut Value) {}

    /// Fills in what depends on several fields, before checks.
    fn prepare_create(&self, _value: &mut Value) {}

    fn prepare_update(&self, _value: &mut Value, _old: &Value) {}

    /// A mark of its own on an object whose deletion begins.
    fn prepare_delete(&self, _value: &mut Value) {}

    fn validate(&self, _value: &Value, _faults: &mut Vec<FieldFault>) {}

    fn validate_update(&self, _value: &Value, _old: &Value, _faults: &mut Vec<FieldFault>) {}

    /// Whether policy allows it; the text says why not and what to do instead.
    fn admit(&self, _value: &Value) -> Result<(), String> {
        Ok(())
    }

    /// Whether it may be deleted at all.
    fn may_delete(&self, _value: &Value) -> Result<(), String> {
        Ok(())
    }

    /// Seconds between the mark of deletion and the end, given what the caller asked for.
    fn grace(&self, _value: &Value, _asked: Option<i64>) -> i64 {
        0
    }

    /// Whether something besides finalizers and grace keeps a deleted object.
    fn holds(&self, _value: &Value) -> bool {
        false
    }

    /// Whether the answer to a deletion is the object and not a Status.
    fn returns_deleted(&self) -> bool {
        false
    }

    /// Whether `metadata.generation` counts changes of the spec.
    fn counts_generations(&self) -> bool {
        false
    }

    /// Whether a status sent with a new object is dropped.
    fn clears_status(&self) -> bool {
        true
    }

    /// Whether names are more than DNS subdomains forbid or allow: returns why a name is wrong.
    fn name_fault(&self, name: &str) -> Option<String> {
        metadata::subdomain_fault(name)
    }

    /// How long objects live after their last write, if not for ever.
    fn life(&self) -> Option<Duration> {
        None
    }
}

/// Nothing special.
pub struct Plain;

impl Strategy for Plain {}
