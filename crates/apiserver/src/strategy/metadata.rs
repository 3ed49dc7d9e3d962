//! Rules of metadata that hold for every kind: names, labels, annotations, finalizers, what never changes.

use joey_model::id::{check_label, check_subdomain};
use serde_json::Value;

use crate::kinds::Resource;
use crate::object::{is_deleting, list, text};
use crate::selector::{key_is_valid, value_is_valid};
use crate::status::FieldFault;

/// Bytes that all annotations of an object may have (apimachinery's limit).
const MAX_ANNOTATIONS: usize = 256 << 10;

const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', \
    and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must \
    start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";

/// Why a text is no DNS subdomain, in Kubernetes' words.
pub fn subdomain_fault(name: &str) -> Option<String> {
    if name.len() > 253 {
        return Some("must be no more than 253 characters".to_owned());
    }
    check_subdomain("name", name).err().map(|_| SUBDOMAIN.to_owned())
}

/// Why a text is no DNS label, in Kubernetes' words.
pub fn label_fault(name: &str) -> Option<String> {
    if name.len() > 63 {
        return Some("must be no more than 63 characters".to_owned());
    }
    check_label("name", name).err().map(|_| LABEL.to_owned())
}

/// Faults of a new object's metadata.
pub fn check(resource: &Resource, value: &Value, faults: &mut Vec<FieldFault>) {
    let name = text(value, "/metadata/name");
    if !name.is_empty()
        && let Some(why) = resource.strategy.name_fault(name)
    {
        faults.push(FieldFault::invalid("metadata.name", &name.into(), &why));
    }
    for (key, label) in value.pointer("/metadata/labels").and_then(Value::as_object).into_iter().flatten() {
        if !key_is_valid(key) {
            let why = "a qualified name must consist of alphanumeric characters, '-', '_' or '.', with an optional DNS \
                subdomain prefix and '/' (e.g. 'example.com/MyName')";
            faults.push(FieldFault::invalid("metadata.labels", &key.as_str().into(), why));
        }
        if !label.as_str().is_some_and(value_is_valid) {
            let why = "a valid label must be an empty string or consist of at most 63 alphanumeric characters, '-', '_' \
                or '.', and must start and end with an alphanumeric character";
            faults.push(FieldFault::invalid("metadata.labels", label, why));
        }
    }
    let mut bytes = 0;
    for (key, note) in value.pointer("/metadata/annotations").and_then(Value::as_object).into_iter().flatten() {
        bytes += key.len() + note.as_str().map_or(0, str::len);
        if !key_is_valid(&key.to_ascii_lowercase()) {
            let why = "a qualified name must consist of alphanumeric characters, '-', '_' or '.'";
            faults.push(FieldFault::invalid("metadata.annotations", &key.as_str().into(), why));
        }
    }
    if bytes > MAX_ANNOTATIONS {
        faults.push(FieldFault::too_long("metadata.annotations", MAX_ANNOTATIONS));
    }
    for (index, finalizer) in list(value, "/metadata/finalizers").iter().enumerate() {
        if !finalizer.as_str().is_some_and(key_is_valid) {
            let field = format!("metadata.finalizers[{index}]");
            faults.push(FieldFault::invalid(
                field,
                finalizer,
                "name is neither a standard finalizer name nor qualified",
            ));
        }
    }
}

/// Faults of changed metadata.
pub fn check_update(resource: &Resource, value: &Value, old: &Value, faults: &mut Vec<FieldFault>) {
    check(resource, value, faults);
    let before = list(old, "/metadata/finalizers");
    if is_deleting(old) && list(value, "/metadata/finalizers").iter().any(|finalizer| !before.contains(finalizer)) {
        let why = "no new finalizers can be added if the object is being deleted";
        faults.push(FieldFault::forbidden("metadata.finalizers", why));
    }
}
