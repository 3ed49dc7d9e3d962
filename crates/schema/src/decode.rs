//! Reading an object by its schema: types, required fields, enums, amounts; unknown fields are pruned.

use serde_json::{Map, Value};

use super::quantity;
use super::types::{Field, Schemas, Shape, Type, TypeId};

/// What becomes of fields that the schema does not know; they are never stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownFields {
    Ignore,
    /// Each makes a warning.
    Warn,
    /// Each makes an error.
    Strict,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldReason {
    Required,
    Invalid,
    NotSupported,
    TypeInvalid,
    Unknown,
}

/// One fault of one field, `spec.containers[0].name` style.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {detail}")]
pub struct FieldError {
    pub path: String,
    pub reason: FieldReason,
    pub detail: String,
}

/// An object as far as it could be read.
#[derive(Debug)]
pub struct Decoded {
    /// Without unknown fields and nulls; amounts are canonical.
    pub value: Value,
    pub warnings: Vec<String>,
    pub errors: Vec<FieldError>,
}

struct Decoder<'a> {
    schemas: &'a Schemas,
    unknown: UnknownFields,
    warnings: Vec<String>,
    errors: Vec<FieldError>,
}

impl Schemas {
    /// Reads an object; all its faults are told, and what can be read is there beside them.
    pub fn decode(&self, id: TypeId, value: &Value, unknown: UnknownFields) -> Decoded {
        let mut decoder = Decoder { schemas: self, unknown, warnings: Vec::new(), errors: Vec::new() };
        let value = decoder.typed(&self.types[id.0], value, "");
        Decoded { value, warnings: decoder.warnings, errors: decoder.errors }
    }
}

impl Schemas {
    /// Makes amounts canonical where they stand; what is no amount is left for [`Schemas::decode`] to tell.
    pub fn canonical_amounts(&self, id: TypeId, value: &mut Value) {
        self.canonical_type(&self.types[id.0], value);
    }

    fn canonical_type(&self, ty: &Type, value: &mut Value) {
        if let Some(alias) = &ty.alias {
            return self.canonical_field(alias, value);
        }
        for (name, value) in value.as_object_mut().into_iter().flatten() {
            if let Some(field) = ty.fields.get(name) {
                self.canonical_field(field, value);
            }
        }
    }

    fn canonical_field(&self, field: &Field, value: &mut Value) {
        match (&field.shape, value) {
            (Shape::Ref(id), value) => self.canonical_type(&self.types[id.0], value),
            (Shape::List(item), Value::Array(list)) => list.iter_mut().for_each(|v| self.canonical_field(item, v)),
            (Shape::Map(item), Value::Object(map)) => map.values_mut().for_each(|v| self.canonical_field(item, v)),
            (Shape::Quantity, value) => {
                let canonical = match &*value {
                    Value::String(text) => quantity::canonical(text).ok(),
                    Value::Number(number) => quantity::canonical(&number.to_string()).ok(),
                    _ => None,
                };
                if let Some(canonical) = canonical {
                    *value = canonical.into();
                }
            }
            _ => {}
        }
    }
}

impl Decoder<'_> {
    fn fail(&mut self, path: &str, reason: FieldReason, detail: impl Into<String>) {
        self.errors.push(FieldError { path: path.to_owned(), reason, detail: detail.into() });
    }

    fn typed(&mut self, ty: &Type, value: &Value, path: &str) -> Value {
        if let Some(alias) = &ty.alias {
            return self.field(alias, value, path);
        }
        let Some(object) = value.as_object() else {
            self.fail(path, FieldReason::TypeInvalid, format!("must be an object, not {}", describe(value)));
            return Value::Null;
        };
        let mut out = Map::new();
        for (key, value) in object {
            let at = join(path, key);
            match ty.fields.get(key) {
                Some(_) if value.is_null() => {}
                Some(field) => {
                    let value = self.field(field, value, &at);
                    out.insert(key.clone(), value);
                }
                None => match self.unknown {
                    UnknownFields::Ignore => {}
                    UnknownFields::Warn => self.warnings.push(format!("unknown field \"{at}\"")),
                    UnknownFields::Strict => self.fail(&at, FieldReason::Unknown, format!("unknown field \"{at}\"")),
                },
            }
        }
        // A status comes from the platform and its Go clients, which write zero values for what they leave out.
        if !(path == "status" || path.starts_with("status.")) {
            // Go clients and kube-apiserver treat absent metadata as empty, whatever the document says.
            for key in ty.required.iter().filter(|key| *key != "metadata") {
                let empty = match out.get(key) {
                    None => true,
                    Some(Value::String(text)) => text.is_empty(),
                    Some(Value::Array(list)) => list.is_empty(),
                    Some(_) => false,
                };
                if empty {
                    self.fail(&join(path, key), FieldReason::Required, "Required value");
                }
            }
        }
        Value::Object(out)
    }

    fn field(&mut self, field: &Field, value: &Value, path: &str) -> Value {
        let fits = match &field.shape {
            Shape::Any => true,
            Shape::Text => value.is_string(),
            Shape::Integer => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|n| n.fract() == 0.0),
            Shape::Number => value.is_number(),
            Shape::Boolean => value.is_boolean(),
            Shape::IntOrString => value.is_i64() || value.is_u64() || value.is_string(),
            Shape::Quantity => value.is_number() || value.is_string(),
            Shape::Free | Shape::Map(_) => value.is_object(),
            Shape::List(_) => value.is_array(),
            Shape::Ref(id) => return self.typed(&self.schemas.types[id.0], value, path),
        };
        if !fits {
            self.fail(path, FieldReason::TypeInvalid, format!("has the wrong type: {}", describe(value)));
            return Value::Null;
        }
        if let Some(text) = value.as_str()
            && !text.is_empty()
            && !field.allowed.is_empty()
            && !field.allowed.iter().any(|allowed| allowed == text)
        {
            let allowed: Vec<String> = field.allowed.iter().map(|word| format!("\"{word}\"")).collect();
            let detail = format!("Unsupported value: {value}: supported values: {}", allowed.join(", "));
            self.fail(path, FieldReason::NotSupported, detail);
        }
        match (&field.shape, value) {
            (Shape::Quantity, value) => self.quantity(value, path),
            (Shape::Map(item), Value::Object(map)) => {
                let entries = map.iter().filter(|(_, value)| !value.is_null());
                entries.map(|(key, value)| (key.clone(), self.field(item, value, &format!("{path}[{key}]")))).collect()
            }
            (Shape::List(item), Value::Array(list)) => self.list(field, item, list, path),
            _ => value.clone(),
        }
    }

    fn quantity(&mut self, value: &Value, path: &str) -> Value {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        match quantity::canonical(&text) {
            Ok(canonical) => canonical.into(),
            Err(why) => {
                self.fail(path, FieldReason::Invalid, format!("Invalid value: {:?}: {why}", shortened(&text)));
                value.clone()
            }
        }
    }

    fn list(&mut self, field: &Field, item: &Field, list: &[Value], path: &str) -> Value {
        let items: Vec<Value> = list
            .iter()
            .enumerate()
            .map(|(index, value)| self.field(item, value, &format!("{path}[{index}]")))
            .collect();
        if !field.map_keys.is_empty() {
            let mut seen = std::collections::HashSet::new();
            for (index, value) in items.iter().enumerate() {
                let keys: Vec<String> = field.map_keys.iter().map(|key| self.key_of(item, value, key)).collect();
                let keys = keys.join(",");
                // Kubernetes takes such lists; what may not repeat is the kind's own rule.
                if !seen.insert(keys.clone()) {
                    let why = "hides previous definition of";
                    let told = format!("{path}[{index}]: {why} {keys}, which may be dropped when using apply");
                    self.warnings.push(told);
                }
            }
        }
        Value::Array(items)
    }

    /// A key's value, or its default where it is absent (a port without protocol is a TCP port).
    fn key_of(&self, item: &Field, value: &Value, key: &str) -> String {
        let default = || self.schemas.object(item).and_then(|ty| ty.fields.get(key)?.default.as_ref());
        value.get(key).or_else(default).unwrap_or(&Value::Null).to_string()
    }
}

/// What is shown of a text that somebody sent.
fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn describe(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
