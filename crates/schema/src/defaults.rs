//! Defaults: those of the schema that are not zero values, then `facts/defaults.json`.
//!
//! Rules there: `$pullPolicy [image, policy]`: `Always` for `:latest` or no tag, else `IfNotPresent`;
//! `$copyMissing [from, to]`: entries of the map `from` that `to` lacks; `$onlyName [name, field]`: an object with nothing but
//! its name gets the field, empty; `$mirror [field, old]`: two names of one value, of which the first wins.
//! A text that is empty counts as absent.

use joey_model::ImageRef;
use serde_json::{Map, Value};

use super::types::{Field, Schemas, Shape, Type, TypeId};

impl Schemas {
    /// Fills in what is absent. Applying it again changes nothing.
    pub fn apply_defaults(&self, id: TypeId, value: &mut Value) {
        self.default_type(&self.types[id.0], value);
    }

    fn default_type(&self, ty: &Type, value: &mut Value) {
        let Some(object) = value.as_object_mut() else { return };
        for (name, field) in &ty.fields {
            if let Some(default) = field.default.as_ref().filter(|default| !is_zero(default)) {
                fill(object, name, default);
            }
        }
        for (name, default) in self.defaults.get(&ty.name).into_iter().flatten() {
            match (name.as_str(), default[0].as_str(), default[1].as_str()) {
                ("$pullPolicy", Some(image), Some(policy)) => pull_policy(object, image, policy),
                ("$copyMissing", Some(from), Some(to)) => copy_missing(object, from, to),
                ("$onlyName", Some(name), Some(field)) => {
                    if object.keys().all(|key| key == name) {
                        object.insert(field.to_owned(), Value::Object(Map::new()));
                    }
                }
                ("$mirror", Some(field), Some(old)) => mirror(object, field, old),
                _ => fill(object, name, default),
            }
        }
        for (name, value) in object.iter_mut() {
            if let Some(field) = ty.fields.get(name) {
                self.default_field(field, value);
            }
        }
    }

    fn default_field(&self, field: &Field, value: &mut Value) {
        match (&field.shape, value) {
            (Shape::Ref(id), value) => self.default_type(&self.types[id.0], value),
            (Shape::List(item), Value::Array(list)) => list.iter_mut().for_each(|v| self.default_field(item, v)),
            (Shape::Map(item), Value::Object(map)) => map.values_mut().for_each(|v| self.default_field(item, v)),
            _ => {}
        }
    }
}

fn is_absent(value: Option<&Value>) -> bool {
    value.is_none_or(|value| value == "")
}

fn fill(object: &mut Map<String, Value>, name: &str, default: &Value) {
    if is_absent(object.get(name)) {
        object.insert(name.to_owned(), default.clone());
    }
}

fn mirror(object: &mut Map<String, Value>, field: &str, old: &str) {
    let set = [field, old].into_iter().find(|name| !is_absent(object.get(*name)));
    if let Some(value) = set.and_then(|name| object.get(name).cloned()) {
        object.insert(field.to_owned(), value.clone());
        object.insert(old.to_owned(), value);
    }
}

fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

fn pull_policy(object: &mut Map<String, Value>, image: &str, policy: &str) {
    if is_absent(object.get(policy)) {
        let latest = object.get(image).and_then(Value::as_str).and_then(|text| ImageRef::parse(text).ok());
        let word = if latest.is_some_and(|image| image.is_latest()) { "Always" } else { "IfNotPresent" };
        object.insert(policy.to_owned(), word.into());
    }
}

fn copy_missing(object: &mut Map<String, Value>, from: &str, to: &str) {
    let Some(source) = object.get(from).and_then(Value::as_object).cloned() else { return };
    if let Some(target) = object.entry(to).or_insert_with(|| Value::Object(Map::new())).as_object_mut() {
        for (key, value) in source {
            target.entry(key).or_insert(value);
        }
    }
}

#[cfg(test)]
#[path = "defaults_tests.rs"]
mod tests;
