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

const NAME_PART: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an \
    alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
    '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and \
    must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for \
    validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";

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
            faults.push(FieldFault::invalid("metadata.labels", &key.as_str().into(), NAME_PART));
        }
        if !label.as_str().is_some_and(value_is_valid) {
            let long = label.as_str().is_some_and(|label| label.len() > 63);
            let why = if long { "must be no more than 63 characters" } else { LABEL_VALUE };
            faults.push(FieldFault::invalid("metadata.labels", label, why));
        }
    }
    let mut bytes = 0;
    for (key, note) in value.pointer("/metadata/annotations").and_then(Value::as_object).into_iter().flatten() {
        bytes += key.len() + note.as_str().map_or(0, str::len);
        if !key_is_valid(&key.to_ascii_lowercase()) {
            faults.push(FieldFault::invalid("metadata.annotations", &key.as_str().into(), NAME_PART));
        }
    }
    if bytes > MAX_ANNOTATIONS {
        faults.push(FieldFault::too_long("metadata.annotations", MAX_ANNOTATIONS));
    }
    for (index, finalizer) in list(value, "/metadata/finalizers").iter().enumerate() {
        let word = finalizer.as_str().unwrap_or_default();
        let field = format!("metadata.finalizers[{index}]");
        if !key_is_valid(word) {
            faults.push(FieldFault::invalid(field, finalizer, NAME_PART));
        } else if !word.contains('/') && !["orphan", "foregroundDeletion", "kubernetes"].contains(&word) {
            let why = "name is neither a standard finalizer name nor is it fully qualified";
            faults.push(FieldFault::invalid(field, finalizer, why));
        }
    }
    let base = text(value, "/metadata/generateName");
    // What is generated ends with a letter or digit, so the base may end with a dash.
    if !base.is_empty()
        && let Some(why) = resource.strategy.name_fault(&format!("{}a", base.trim_end_matches('-')))
    {
        faults.push(FieldFault::invalid("metadata.generateName", &base.into(), &why));
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
