//! Namespaces: phases and the finalizer that holds them until their content is gone.

use serde_json::{Value, json};

use super::Strategy;
use crate::object::{list, object_at, text};

pub struct Namespace;

/// Namespaces that every cluster has.
pub const STANDARD: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

impl Strategy for Namespace {
    fn prepare_create(&self, value: &mut Value) {
        let name = text(value, "/metadata/name").to_owned();
        object_at(value, "spec").insert("finalizers".into(), json!(["kubernetes"]));
        object_at(value, "status").insert("phase".into(), "Active".into());
        label(value, &name);
    }

    fn prepare_update(&self, value: &mut Value, old: &Value) {
        // Only the subresource "finalize" changes them.
        let finalizers = old.pointer("/spec/finalizers").cloned().unwrap_or_else(|| json!([]));
        object_at(value, "spec").insert("finalizers".into(), finalizers);
        label(value, text(old, "/metadata/name"));
    }

    fn prepare_delete(&self, value: &mut Value) {
        object_at(value, "status").insert("phase".into(), "Terminating".into());
    }

    fn may_delete(&self, value: &Value) -> Result<(), String> {
        match STANDARD.contains(&text(value, "/metadata/name")) {
            true => Err("this namespace may not be deleted".to_owned()),
            false => Ok(()),
        }
    }

    fn holds(&self, value: &Value) -> bool {
        !list(value, "/spec/finalizers").is_empty()
    }

    fn returns_deleted(&self) -> bool {
        true
    }

    fn name_fault(&self, name: &str) -> Option<String> {
        super::metadata::label_fault(name)
    }
}

fn label(value: &mut Value, name: &str) {
    if name.is_empty() {
        return;
    }
    let metadata = crate::object::metadata(value);
    let labels = metadata.entry("labels").or_insert_with(|| json!({}));
    labels["kubernetes.io/metadata.name"] = name.into();
}
