//! ConfigMaps and Secrets: keys, sizes, `immutable`, `stringData`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::Strategy;
use crate::object::text;
use crate::status::FieldFault;

/// Bytes that all values may have together (Kubernetes' limit).
const MAX_BYTES: usize = 1 << 20;
const IMMUTABLE: &str = "field is immutable when `immutable` is set";

pub struct ConfigMap;

impl Strategy for ConfigMap {
    fn validate(&self, value: &Value, faults: &mut Vec<FieldFault>) {
        let data = entries(value, "data");
        let binary = entries(value, "binaryData");
        let mut bytes = 0;
        for (field, entries) in [("data", data.clone()), ("binaryData", binary)] {
            for (key, content) in entries {
                check_key(field, key, faults);
                let content = content.as_str().unwrap_or_default();
                bytes += content.len();
                if field == "binaryData" {
                    check_base64(&format!("{field}[{key}]"), content, faults);
                    if data.clone().any(|(other, _)| other == key) {
                        let why = "duplicate of key present in data";
                        faults.push(FieldFault::invalid(format!("{field}[{key}]"), &key.as_str().into(), why));
                    }
                }
            }
        }
        if bytes > MAX_BYTES {
            faults.push(FieldFault::too_long("", MAX_BYTES));
        }
    }

    fn validate_update(&self, value: &Value, old: &Value, faults: &mut Vec<FieldFault>) {
        check_immutable(value, old, &["data", "binaryData"], faults);
    }
}

pub struct Secret;

impl Strategy for Secret {
    fn fold(&self, value: &mut Value) {
        fold_string_data(value);
    }

    fn prepare_create(&self, value: &mut Value) {
        if text(value, "/type").is_empty() {
            value["type"] = "Opaque".into();
        }
    }

    fn prepare_update(&self, value: &mut Value, old: &Value) {
        if text(value, "/type").is_empty() {
            value["type"] = old.get("type").cloned().unwrap_or_else(|| "Opaque".into());
        }
    }

    fn validate(&self, value: &Value, faults: &mut Vec<FieldFault>) {
        let mut bytes = 0;
        for (key, content) in entries(value, "data") {
            check_key("data", key, faults);
            let content = content.as_str().unwrap_or_default();
            bytes += content.len() / 4 * 3;
            // The content itself never goes into a message.
            if STANDARD.decode(content).is_err() {
                let field = format!("data[{key}]");
                faults.push(FieldFault::invalid(field, &"<secret contents redacted>".into(), "must be base64"));
            }
        }
        if bytes > MAX_BYTES {
            faults.push(FieldFault::too_long("data", MAX_BYTES));
        }
        let needed = match text(value, "/type") {
            "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"][..],
            "kubernetes.io/dockercfg" => &[".dockercfg"],
            "kubernetes.io/tls" => &["tls.crt", "tls.key"],
            "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
            _ => &[],
        };
        for key in needed {
            match value.get("data").and_then(|data| data.get(*key)) {
                None => faults.push(FieldFault::required(format!("data[{key}]"), "")),
                Some(content) if key.starts_with(".docker") => {
                    let bytes = STANDARD.decode(content.as_str().unwrap_or_default()).unwrap_or_default();
                    if serde_json::from_slice::<Value>(&bytes).is_err() {
                        let shown = "<secret contents redacted>".into();
                        faults.push(FieldFault::invalid(format!("data[{key}]"), &shown, "must be JSON"));
                    }
                }
                Some(_) => {}
            }
        }
    }

    fn validate_update(&self, value: &Value, old: &Value, faults: &mut Vec<FieldFault>) {
        if value.get("type") != old.get("type") {
            faults.push(FieldFault::invalid("type", &value["type"], "field is immutable"));
        }
        check_immutable(value, old, &["data"], faults);
    }
}

/// Moves `stringData` into `data`; it is never stored.
fn fold_string_data(value: &mut Value) {
    let Some(Value::Object(plain)) = value.as_object_mut().and_then(|map| map.remove("stringData")) else { return };
    if plain.is_empty() {
        return;
    }
    let data = crate::object::object_at(value, "data");
    for (key, content) in plain {
        data.insert(key, STANDARD.encode(content.as_str().unwrap_or_default()).into());
    }
}

fn entries<'a>(value: &'a Value, field: &str) -> impl Iterator<Item = (&'a String, &'a Value)> + Clone {
    value.get(field).and_then(Value::as_object).into_iter().flat_map(Map::iter)
}

fn check_key(field: &str, key: &str, faults: &mut Vec<FieldFault>) {
    let plain = key.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(&c));
    if key.is_empty() || key.len() > 253 || !plain || matches!(key, "." | "..") || key.starts_with("..") {
        let why = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or \
            'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')";
        faults.push(FieldFault::invalid(format!("{field}[{key}]"), &key.into(), why));
    }
}

fn check_base64(field: &str, content: &str, faults: &mut Vec<FieldFault>) {
    if STANDARD.decode(content).is_err() {
        faults.push(FieldFault::invalid(field, &content.into(), "must be base64"));
    }
}

fn check_immutable(value: &Value, old: &Value, fields: &[&str], faults: &mut Vec<FieldFault>) {
    if old.get("immutable") != Some(&Value::Bool(true)) {
        return;
    }
    if value.get("immutable") != Some(&Value::Bool(true)) {
        faults.push(FieldFault::forbidden("immutable", IMMUTABLE));
    }
    for field in fields {
        if value.get(*field) != old.get(*field) {
            faults.push(FieldFault::forbidden(*field, IMMUTABLE));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn string_data_is_folded_and_checked() {
        let mut value = json!({"stringData": {"a": "b"}, "data": {"c": "!"}});
        Secret.fold(&mut value);
        Secret.prepare_create(&mut value);
        assert_eq!(value, json!({"type": "Opaque", "data": {"a": "Yg==", "c": "!"}}));
        let mut faults = Vec::new();
        Secret.validate(&value, &mut faults);
        assert_eq!(faults.len(), 1);
        assert!(faults[0].message.contains("redacted") && !faults[0].message.contains('!'));
    }

    #[test]
    fn immutable() {
        let old = json!({"immutable": true, "data": {"a": "b"}});
        let mut faults = Vec::new();
        ConfigMap.validate_update(&json!({"data": {"a": "c"}}), &old, &mut faults);
        assert_eq!(faults.iter().map(|fault| fault.field.as_str()).collect::<Vec<_>>(), ["immutable", "data"]);
    }
}
