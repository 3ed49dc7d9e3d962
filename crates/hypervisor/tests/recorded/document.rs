//! A monitor's API document as a table: which requests there are, when, and what their bodies hold. Nothing else is let through.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
pub struct Document {
    /// What it was taken from.
    pub document: String,
    /// The state that a monitor begins in.
    pub begin: String,
    calls: BTreeMap<String, Call>,
    types: BTreeMap<String, Type>,
}

#[derive(Clone, Deserialize)]
pub struct Call {
    body: Option<String>,
    pub success: u16,
    /// The success where the machine does not run yet.
    pub cold: Option<u16>,
    when: Vec<String>,
    pub then: Option<String>,
    /// Whether a descriptor goes along.
    #[serde(default)]
    pub descriptor: bool,
}

#[derive(Deserialize)]
struct Type {
    required: Vec<String>,
    fields: BTreeMap<String, String>,
}

/// What a path is in a body, for who knows the jail.
pub enum Named<'a> {
    File(&'a str),
    /// A disk, and whether it is written.
    Disk(&'a str, bool),
}

impl Document {
    pub fn read(text: &str) -> Self {
        let document: Self = serde_json::from_str(text).expect("the table can be read");
        assert!(!document.document.is_empty(), "it says what it was taken from");
        document
    }

    /// The call that a request is, in this state; or why it is none.
    pub fn call(&self, request: &str, state: &str) -> Result<&Call, String> {
        let called = |pattern: &str| match pattern.split_once("/{") {
            Some((start, _)) => {
                request.strip_prefix(start).and_then(|rest| rest.strip_prefix('/')).is_some_and(|id| !id.contains('/'))
            }
            None => request == pattern,
        };
        let call = self.calls.iter().find(|(pattern, _)| called(pattern)).map(|(_, call)| call);
        let call = call.ok_or_else(|| format!("{request}: there is no such call"))?;
        match call.when.iter().any(|when| when == state) {
            true => Ok(call),
            false => Err(format!("{request}: not when the machine is {state}")),
        }
    }

    /// Checks a body; `exists` looks at what it names.
    pub fn check(
        &self,
        call: &Call,
        body: Option<&Value>,
        exists: &dyn Fn(Named<'_>) -> Result<(), String>,
    ) -> Result<(), String> {
        match (&call.body, body) {
            (None, None) => Ok(()),
            (Some(kind), Some(Value::Object(body))) => self.object(kind, body, exists),
            (wanted, body) => Err(format!("the body is {body:?} and not {wanted:?}")),
        }
    }

    pub fn object(
        &self,
        kind: &str,
        object: &Map<String, Value>,
        exists: &dyn Fn(Named<'_>) -> Result<(), String>,
    ) -> Result<(), String> {
        let known = &self.types[kind];
        for name in &known.required {
            if !object.contains_key(name) {
                return Err(format!("{kind} lacks {name}"));
            }
        }
        for (name, value) in object {
            let form = known.fields.get(name).ok_or_else(|| format!("{kind} has no {name}"))?;
            let wrong = |why: String| format!("{kind}.{name}: {why}");
            let read_only =
                ["readonly", "is_read_only"].iter().any(|name| object.get(*name) == Some(&Value::Bool(true)));
            match (form.split_once(' ').unwrap_or((form, "")), value) {
                (("list", inner), Value::Array(items)) => {
                    for item in items {
                        let item = item.as_object().ok_or_else(|| wrong(format!("{item} is no object")))?;
                        self.object(inner, item, exists)?;
                    }
                }
                (("a", inner), Value::Object(item)) => self.object(inner, item, exists)?,
                (("file", _), Value::String(path)) => exists(Named::File(path)).map_err(wrong)?,
                (("disk", _), Value::String(path)) => {
                    let written = !read_only && kind != "PartialDrive";
                    exists(Named::Disk(path, written)).map_err(wrong)?;
                }
                (form, value) if is_plain(form, value) => {}
                (_, value) => return Err(wrong(format!("{value} is no {form}"))),
            }
        }
        Ok(())
    }
}

fn is_plain(form: (&str, &str), value: &Value) -> bool {
    match (form, value) {
        (("string", _), Value::String(_)) | (("boolean", _), Value::Bool(_)) => true,
        (("one", words), Value::String(word)) => words.split(' ').any(|known| known == word),
        (("mac", _), Value::String(mac)) => {
            let mut parts = mac.split(':');
            mac.len() == 17 && parts.all(|part| part.len() == 2 && u8::from_str_radix(part, 16).is_ok())
        }
        (("integer", range), Value::Number(number)) => {
            let bounds = range.split_once("..").map(|(low, high)| (low.parse::<u64>(), high.parse::<u64>()));
            let (low, high) = bounds.map_or((0, u64::MAX), |(low, high)| (low.unwrap(), high.unwrap()));
            number.as_u64().is_some_and(|number| (low..=high).contains(&number))
        }
        _ => false,
    }
}

#[test]
fn the_tables_let_nothing_else_through() {
    let document = Document::read(include_str!("firecracker.json"));
    let says = |request: &str, state: &str, body: Option<Value>| {
        let call = document.call(request, state)?;
        document.check(call, body.as_ref(), &|_| Ok(()))
    };
    let balloon = |more: Value| {
        let mut body = serde_json::json!({ "amount_mib": 0, "deflate_on_oom": true });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        Some(body)
    };
    let nothing = serde_json::json!({});
    says("PUT /balloon", "fresh", balloon(nothing.clone())).unwrap();
    for (request, state, body) in [
        ("PUT /balloon", "running", balloon(nothing.clone())),
        ("PATCH /balloon", "fresh", balloon(nothing.clone())),
        ("PUT /balloon", "fresh", None),
        ("PUT /balloon", "fresh", Some(nothing.clone())),
        ("PUT /balloon", "fresh", balloon(serde_json::json!({ "size": 1 }))),
        ("PUT /balloon", "fresh", balloon(serde_json::json!({ "amount_mib": -1 }))),
        ("PUT /balloon", "fresh", balloon(serde_json::json!({ "deflate_on_oom": "true" }))),
        ("GET /", "fresh", Some(nothing.clone())),
        ("PATCH /vm", "running", Some(serde_json::json!({ "state": "paused" }))),
    ] {
        assert!(says(request, state, body.clone()).is_err(), "{request} {state} {body:?}");
    }
    Document::read(include_str!("cloud_hypervisor.json"));
}
