//! Bodies in Kubernetes' protobuf encoding: what typed Go clients (kubectl create, auth, drain) send, read into JSON.
//!
//! Field numbers are those of the API's `generated.proto`. Answers are always JSON, which these clients accept. Kinds that
//! are not in the table are refused with 415.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use Shape::{Bytes, Flag, MapOf, Message, Micro, Number, Text, Time};

/// What a field holds.
enum Shape {
    Text,
    Number,
    Flag,
    Bytes,
    Time,
    /// A time with microseconds.
    Micro,
    Message(Fields),
    /// From text to text or bytes.
    MapOf(&'static Shape),
}

/// Number, name, shape, and whether it repeats.
type Fields = &'static [(u64, &'static str, Shape, bool)];

const OWNER: Fields = &[
    (1, "kind", Text, false),
    (3, "name", Text, false),
    (4, "uid", Text, false),
    (5, "apiVersion", Text, false),
    (6, "controller", Flag, false),
    (7, "blockOwnerDeletion", Flag, false),
];
const METADATA: Fields = &[
    (1, "name", Text, false),
    (2, "generateName", Text, false),
    (3, "namespace", Text, false),
    (5, "uid", Text, false),
    (6, "resourceVersion", Text, false),
    (7, "generation", Number, false),
    (8, "creationTimestamp", Time, false),
    (9, "deletionTimestamp", Time, false),
    (10, "deletionGracePeriodSeconds", Number, false),
    (11, "labels", MapOf(&Text), false),
    (12, "annotations", MapOf(&Text), false),
    (13, "ownerReferences", Message(OWNER), true),
    (14, "finalizers", Text, true),
];
const REFERENCE: Fields = &[
    (1, "kind", Text, false),
    (2, "namespace", Text, false),
    (3, "name", Text, false),
    (4, "uid", Text, false),
    (5, "apiVersion", Text, false),
    (6, "resourceVersion", Text, false),
    (7, "fieldPath", Text, false),
];
const LOCAL_REFERENCE: Fields = &[(1, "name", Text, false)];
const CONFIG_MAP: Fields = &[
    (1, "metadata", Message(METADATA), false),
    (2, "data", MapOf(&Text), false),
    (3, "binaryData", MapOf(&Bytes), false),
    (4, "immutable", Flag, false),
];
const SECRET: Fields = &[
    (1, "metadata", Message(METADATA), false),
    (2, "data", MapOf(&Bytes), false),
    (3, "type", Text, false),
    (4, "stringData", MapOf(&Text), false),
    (5, "immutable", Flag, false),
];
const SERVICE_ACCOUNT: Fields = &[
    (1, "metadata", Message(METADATA), false),
    (2, "secrets", Message(REFERENCE), true),
    (3, "imagePullSecrets", Message(LOCAL_REFERENCE), true),
    (4, "automountServiceAccountToken", Flag, false),
];
const NAMESPACE_SPEC: Fields = &[(1, "finalizers", Text, true)];
const NAMESPACE: Fields = &[(1, "metadata", Message(METADATA), false), (2, "spec", Message(NAMESPACE_SPEC), false)];
const BINDING: Fields = &[(1, "metadata", Message(METADATA), false), (2, "target", Message(REFERENCE), false)];
const LEASE_SPEC: Fields = &[
    (1, "holderIdentity", Text, false),
    (2, "leaseDurationSeconds", Number, false),
    (3, "acquireTime", Micro, false),
    (4, "renewTime", Micro, false),
    (5, "leaseTransitions", Number, false),
];
const LEASE: Fields = &[(1, "metadata", Message(METADATA), false), (2, "spec", Message(LEASE_SPEC), false)];
const PRECONDITIONS: Fields = &[(1, "uid", Text, false), (2, "resourceVersion", Text, false)];
const DELETE_OPTIONS: Fields = &[
    (1, "gracePeriodSeconds", Number, false),
    (2, "preconditions", Message(PRECONDITIONS), false),
    (3, "orphanDependents", Flag, false),
    (4, "propagationPolicy", Text, false),
    (5, "dryRun", Text, true),
];
const EVICTION: Fields =
    &[(1, "metadata", Message(METADATA), false), (2, "deleteOptions", Message(DELETE_OPTIONS), false)];
const BOUND_OBJECT: Fields =
    &[(1, "kind", Text, false), (2, "apiVersion", Text, false), (3, "name", Text, false), (4, "uid", Text, false)];
const TOKEN_SPEC: Fields = &[
    (1, "audiences", Text, true),
    (3, "boundObjectRef", Message(BOUND_OBJECT), false),
    (4, "expirationSeconds", Number, false),
];
const TOKEN_REQUEST: Fields = &[(1, "metadata", Message(METADATA), false), (2, "spec", Message(TOKEN_SPEC), false)];
const RESOURCE_ATTRIBUTES: Fields = &[
    (1, "namespace", Text, false),
    (2, "verb", Text, false),
    (3, "group", Text, false),
    (4, "version", Text, false),
    (5, "resource", Text, false),
    (6, "subresource", Text, false),
    (7, "name", Text, false),
];
const PATH_ATTRIBUTES: Fields = &[(1, "path", Text, false), (2, "verb", Text, false)];
const ACCESS_SPEC: Fields = &[
    (1, "resourceAttributes", Message(RESOURCE_ATTRIBUTES), false),
    (2, "nonResourceAttributes", Message(PATH_ATTRIBUTES), false),
];
const ACCESS_REVIEW: Fields = &[(1, "metadata", Message(METADATA), false), (2, "spec", Message(ACCESS_SPEC), false)];
const RULES_SPEC: Fields = &[(1, "namespace", Text, false)];
const RULES_REVIEW: Fields = &[(1, "metadata", Message(METADATA), false), (2, "spec", Message(RULES_SPEC), false)];
const SELF_REVIEW: Fields = &[(1, "metadata", Message(METADATA), false)];
const TYPE: Fields = &[(1, "apiVersion", Text, false), (2, "kind", Text, false)];
const ENVELOPE: Fields = &[(1, "type", Message(TYPE), false), (2, "raw", Bytes, false)];

fn fields(kind: &str) -> Option<Fields> {
    Some(match kind {
        "Binding" => BINDING,
        "ConfigMap" => CONFIG_MAP,
        "DeleteOptions" => DELETE_OPTIONS,
        "Eviction" => EVICTION,
        "Lease" => LEASE,
        "Namespace" => NAMESPACE,
        "Secret" => SECRET,
        "SelfSubjectAccessReview" => ACCESS_REVIEW,
        "SelfSubjectReview" => SELF_REVIEW,
        "SelfSubjectRulesReview" => RULES_REVIEW,
        "ServiceAccount" => SERVICE_ACCOUNT,
        "TokenRequest" => TOKEN_REQUEST,
        _ => return None,
    })
}

/// Why a body was not read.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// The bytes are not what they say.
    Malformed,
    /// The kind is not in the table.
    Kind(String),
}

/// Reads a body that begins with Kubernetes' magic number.
pub fn decode(body: &[u8]) -> Result<Value, Refused> {
    let body = body.strip_prefix(b"k8s\0").ok_or(Refused::Malformed)?;
    let envelope = message(ENVELOPE, body).ok_or(Refused::Malformed)?;
    let part = |pointer: &str| envelope.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    let kind = part("/type/kind");
    let fields = fields(&kind).ok_or_else(|| Refused::Kind(kind.clone()))?;
    // The envelope is read as any message, so its bytes are base64 here.
    let raw = STANDARD.decode(part("/raw")).map_err(|_| Refused::Malformed)?;
    let mut value = message(fields, &raw).ok_or(Refused::Malformed)?;
    value["apiVersion"] = part("/type/apiVersion").into();
    value["kind"] = kind.into();
    Ok(value)
}

/// One field as it is on the wire.
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn field<'a>(bytes: &mut &'a [u8]) -> Option<(u64, Wire<'a>)> {
    let tag = varint(bytes)?;
    let wire = match tag & 7 {
        0 => Wire::Number(varint(bytes)?),
        2 => {
            let length = usize::try_from(varint(bytes)?).ok()?;
            let (content, rest) = bytes.split_at_checked(length)?;
            *bytes = rest;
            Wire::Bytes(content)
        }
        _ => return None,
    };
    Some((tag >> 3, wire))
}

fn message(fields: Fields, mut bytes: &[u8]) -> Option<Value> {
    let mut out = Map::new();
    while !bytes.is_empty() {
        let (number, wire) = field(&mut bytes)?;
        let Some((_, name, shape, repeats)) = fields.iter().find(|(n, ..)| *n == number) else { continue };
        if let MapOf(inner) = shape {
            let (key, value) = entry(inner, wire)?;
            let map = out.entry(*name).or_insert_with(|| json!({}));
            map[key] = value;
            continue;
        }
        let value = read(shape, wire)?;
        if *repeats {
            out.entry(*name).or_insert_with(|| json!([])).as_array_mut()?.push(value);
        } else if value != json!("") && !value.is_null() {
            // Go writes the empty text for what is not set.
            out.insert((*name).to_owned(), value);
        }
    }
    Some(Value::Object(out))
}

fn read(shape: &Shape, wire: Wire<'_>) -> Option<Value> {
    Some(match (shape, wire) {
        (Text, Wire::Bytes(bytes)) => std::str::from_utf8(bytes).ok()?.into(),
        (Bytes, Wire::Bytes(bytes)) => STANDARD.encode(bytes).into(),
        (Number, Wire::Number(number)) => number.cast_signed().into(),
        (Flag, Wire::Number(number)) => (number != 0).into(),
        (Message(fields), Wire::Bytes(bytes)) => message(fields, bytes)?,
        (Time | Micro, Wire::Bytes(bytes)) => time(matches!(shape, Micro), bytes)?,
        _ => return None,
    })
}

fn entry(inner: &Shape, wire: Wire<'_>) -> Option<(String, Value)> {
    let Wire::Bytes(mut bytes) = wire else { return None };
    let (mut key, mut value) = (String::new(), json!(""));
    while !bytes.is_empty() {
        match field(&mut bytes)? {
            (1, wire) => key = read(&Text, wire)?.as_str()?.to_owned(),
            (2, wire) => value = read(inner, wire)?,
            _ => {}
        }
    }
    Some((key, value))
}

fn time(micro: bool, mut bytes: &[u8]) -> Option<Value> {
    // An empty message is Go's zero time: not set.
    if bytes.is_empty() {
        return Some(Value::Null);
    }
    let (mut seconds, mut nanos) = (0_i64, 0_i32);
    while !bytes.is_empty() {
        match field(&mut bytes)? {
            (1, Wire::Number(number)) => seconds = number.cast_signed(),
            (2, Wire::Number(number)) => nanos = i32::try_from(number).ok()?,
            _ => {}
        }
    }
    let at = Timestamp::new(seconds, nanos).ok()?;
    let format = if micro { "%Y-%m-%dT%H:%M:%S.%6fZ" } else { "%Y-%m-%dT%H:%M:%SZ" };
    Some(at.strftime(format).to_string().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(number: u8, content: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, u8::try_from(content.len()).unwrap()];
        out.extend_from_slice(content);
        out
    }

    fn body(kind: &str, raw: &[u8]) -> Vec<u8> {
        let named = [bytes(1, b"v1"), bytes(2, kind.as_bytes())].concat();
        [b"k8s\0".to_vec(), bytes(1, &named), bytes(2, raw), bytes(3, b""), bytes(4, b"")].concat()
    }

    #[test]
    fn a_secret() {
        let metadata = [bytes(1, b"s"), bytes(2, b""), bytes(8, b"")].concat();
        let entry = [bytes(1, b"k"), bytes(2, b"v")].concat();
        let raw = [bytes(1, &metadata), bytes(2, &entry), bytes(3, b"Opaque"), vec![5 << 3, 1]].concat();
        let expected = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {"k": "dg=="},
            "type": "Opaque", "immutable": true});
        assert_eq!(decode(&body("Secret", &raw)), Ok(expected));
    }

    #[test]
    fn hostile_bytes_are_refused() {
        assert_eq!(decode(b"{}"), Err(Refused::Malformed));
        assert_eq!(decode(&body("Unheard", b"")), Err(Refused::Kind("Unheard".into())));
        let whole = body("ConfigMap", &bytes(1, &bytes(1, b"name")));
        for end in 0..whole.len() {
            // Whatever is cut off, nothing panics.
            let _ = decode(&whole[..end]);
        }
        assert_eq!(decode(&body("ConfigMap", &[0xff; 40])), Err(Refused::Malformed));
    }
}
