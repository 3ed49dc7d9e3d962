//! Objects as they are kept: JSON bytes shared with the store, and the little that lists and selectors need, parsed once.
//!
//! The stored form begins `{"apiVersion":…,"kind":…,"metadata":{` so that the resource version, which only the store
//! knows, can be put in when the object is served without parsing it again.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::{Map, Value};

use crate::kinds::Resource;
use crate::status::{ApiError, ApiResult};

const METADATA: &[u8] = b"\"metadata\":{";

/// One object at one revision.
#[derive(Debug)]
pub struct Object {
    /// The store's key.
    pub key: String,
    /// The stored form; see the head of this file.
    bytes: Bytes,
    /// Where the resource version goes.
    splice: usize,
    pub revision: u64,
    pub labels: BTreeMap<Box<str>, Box<str>>,
    /// Values of the kind's selectable fields, in the table's order.
    pub fields: Vec<Box<str>>,
}

impl Object {
    /// Reads what the store holds.
    pub fn read(resource: &Resource, key: String, bytes: Bytes, revision: u64) -> Option<Self> {
        let splice = bytes.windows(METADATA.len()).position(|part| part == METADATA)? + METADATA.len();
        let value: Value = serde_json::from_slice(&bytes).ok()?;
        let labels = value
            .pointer("/metadata/labels")
            .and_then(Value::as_object)
            .map(|labels| {
                labels.iter().map(|(k, v)| (k.as_str().into(), v.as_str().unwrap_or_default().into())).collect()
            })
            .unwrap_or_default();
        let fields = resource.fields.iter().map(|path| field_text(&value, path).into()).collect();
        Some(Self { key, bytes, splice, revision, labels, fields })
    }

    /// Appends the object as it is served, at its own revision or a later one (a deletion's).
    pub fn write(&self, out: &mut Vec<u8>, revision: u64) {
        out.extend_from_slice(&self.bytes[..self.splice]);
        out.extend_from_slice(format!("\"resourceVersion\":\"{revision}\"").as_bytes());
        if self.bytes[self.splice] != b'}' {
            out.push(b',');
        }
        out.extend_from_slice(&self.bytes[self.splice..]);
    }

    /// The object as it is served, parsed.
    pub fn value(&self, revision: u64) -> Value {
        stored(&self.bytes, revision).unwrap_or_default()
    }

    /// Bytes it takes when served, about.
    pub fn size(&self) -> usize {
        self.bytes.len() + 48
    }

    pub fn name(&self) -> &str {
        self.key.rsplit('/').next().unwrap_or_default()
    }

    /// The namespace, or nothing for kinds without namespaces.
    pub fn namespace(&self, resource: &Resource) -> &str {
        match resource.namespaced {
            true => self.key.rsplit('/').nth(1).unwrap_or_default(),
            false => "",
        }
    }
}

/// Parses stored bytes and puts the resource version in.
pub fn stored(bytes: &[u8], revision: u64) -> ApiResult<Value> {
    let mut value: Value =
        serde_json::from_slice(bytes).map_err(|_| ApiError::internal("a stored object is not readable"))?;
    value["metadata"]["resourceVersion"] = revision.to_string().into();
    Ok(value)
}

/// The stored form of an object.
pub fn encode(resource: &'static Resource, value: &Value) -> Bytes {
    let stored = resource.storage();
    let mut metadata = value.get("metadata").and_then(Value::as_object).cloned().unwrap_or_default();
    metadata.remove("resourceVersion");
    metadata.remove("selfLink");
    let mut out = format!("{{\"apiVersion\":\"{}\",\"kind\":\"{}\",\"metadata\":", stored.api_version(), stored.kind);
    out.push_str(&Value::Object(metadata).to_string());
    for (key, part) in value.as_object().into_iter().flatten() {
        if !matches!(key.as_str(), "apiVersion" | "kind" | "metadata") {
            out.push(',');
            out.push_str(&Value::String(key.clone()).to_string());
            out.push(':');
            out.push_str(&part.to_string());
        }
    }
    out.push('}');
    Bytes::from(out)
}

/// The text of a scalar at a dotted path; empty when absent.
pub fn field_text(value: &Value, path: &str) -> String {
    let found = path.split('.').try_fold(value, |value, part| value.get(part));
    match found {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Bool(flag)) => flag.to_string(),
        Some(Value::Number(number)) => number.to_string(),
        // A source of an event is an object; its component is what the selector means.
        Some(Value::Object(map)) => map.get("component").and_then(Value::as_str).unwrap_or_default().to_owned(),
        _ if path == "spec.unschedulable" || path == "spec.hostNetwork" => "false".to_owned(),
        _ => String::new(),
    }
}

/// Text at a JSON pointer; empty when absent.
pub fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The array at a JSON pointer; empty when absent.
pub fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// The metadata of an object, made when absent.
pub fn metadata(value: &mut Value) -> &mut Map<String, Value> {
    object_at(value, "metadata")
}

/// The object under a key, made when absent or of another type.
pub fn object_at<'a>(value: &'a mut Value, key: &str) -> &'a mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    let slot = &mut value[key];
    if !slot.is_object() {
        *slot = Value::Object(Map::new());
    }
    slot.as_object_mut().expect("made an object above")
}

/// Whether deletion of the object has begun.
pub fn is_deleting(value: &Value) -> bool {
    !text(value, "/metadata/deletionTimestamp").is_empty()
}

/// A time as Kubernetes writes it: RFC 3339 in whole seconds.
pub fn time(at: jiff::Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Now, in whole seconds.
pub fn now() -> String {
    time(jiff::Timestamp::now())
}

/// A random UUID (version 4).
pub fn uid() -> String {
    let bits: u128 = rand::random();
    let bits = (bits & !(0xf << 76) & !(0x3 << 62)) | (0x4 << 76) | (0x2 << 62);
    let hex = format!("{bits:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Five random characters for `generateName`, from an alphabet without vowels so that no words come out.
pub fn name_suffix() -> String {
    const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    (0..5).map(|_| char::from(ALPHABET[rand::random_range(0..ALPHABET.len())])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bytes_are_served_with_their_version() {
        let resource = crate::kinds::find("", "v1", "configmaps").unwrap();
        let tricky = json!({"data": {"resourceVersion": "x", "a": "\"metadata\":{"},
            "metadata": {"name": "a", "labels": {"k": "v"}, "resourceVersion": "3"}});
        let bytes = encode(resource, &tricky);
        let object = Object::read(resource, resource.key("d", "a"), bytes, 7).unwrap();
        let mut out = Vec::new();
        object.write(&mut out, 9);
        let value: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(value["metadata"]["resourceVersion"], "9");
        assert_eq!(value["data"], tricky["data"]);
        assert_eq!((object.name(), object.namespace(resource)), ("a", "d"));
        assert_eq!(object.value(9), value);
    }

    #[test]
    fn uids() {
        let id = uid();
        assert_eq!(id.len(), 36);
        assert_eq!(&id[14..15], "4");
        assert!("89ab".contains(&id[19..20]), "{id}");
    }
}
