//! Decoding and defaults held against what kube-apiserver 1.36.3 answered to the same objects (`facts/defaulting-answers.json`).

use serde_json::json;

use super::super::decode::UnknownFields;
use super::*;

const ANSWERS: &str = include_str!("../facts/defaulting-answers.json");

fn id(object: &Value) -> TypeId {
    let version = object["apiVersion"].as_str().unwrap();
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    Schemas::builtin().kind(group, version, object["kind"].as_str().unwrap()).unwrap()
}

/// Without what an answer may leave out: nulls, empty texts and lists, `false`.
fn shown(value: &Value) -> Value {
    let said = |value: &Value| {
        !matches!(value, Value::Null | Value::Bool(false)) && *value != json!("") && *value != json!([])
    };
    match value {
        Value::Object(map) => {
            map.iter().filter(|(_, value)| said(value)).map(|(key, value)| (key.clone(), shown(value))).collect()
        }
        Value::Array(list) => list.iter().map(shown).collect(),
        other => other.clone(),
    }
}

#[test]
fn defaults_are_those_of_kubernetes() {
    let schemas = Schemas::builtin();
    let cases: Vec<Value> = serde_json::from_str(ANSWERS).unwrap();
    let mut wrong = Vec::new();
    for case in &cases {
        let id = id(&case["sent"]);
        let decoded = schemas.decode(id, &case["sent"], UnknownFields::Strict);
        if !decoded.errors.is_empty() {
            wrong.push(format!("{}: {:?}", case["sent"], decoded.errors));
            continue;
        }
        let mut ours = decoded.value;
        schemas.apply_defaults(id, &mut ours);
        let once = ours.clone();
        schemas.apply_defaults(id, &mut ours);
        assert_eq!(once, ours, "defaults applied twice");
        for own in ["apiVersion", "kind", "status", "metadata"] {
            ours.as_object_mut().unwrap().remove(own);
        }
        let (ours, theirs) = (shown(&ours), shown(&case["got"]));
        if ours != theirs {
            wrong.push(format!("sent   {}\nours   {ours}\ntheirs {theirs}", case["sent"]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}
