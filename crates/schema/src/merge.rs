//! Patches: strategic merge (the directives of Kubernetes' patch format), JSON merge (RFC 7386) and JSON patch (RFC 6902).
//!
//! Nothing is stored or checked against the schema here; that comes after. Rules of the strategic form, per field of the
//! schema: lists with the `merge` strategy are merged by their merge key (or as sets when their items are scalars), other
//! lists are replaced; objects are merged key by key; what the schema does not know is merged as JSON.

use serde_json::{Map, Value};

use super::types::{Field, Schemas, Shape, Type, TypeId};

const DIRECTIVE: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const ORDER: &str = "$setElementOrder/";
const REMOVE: &str = "$deleteFromPrimitiveList/";

/// Why a patch makes no sense for its object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    #[error("the patch is not an object")]
    NotAnObject,
    #[error("unknown patch directive {0}")]
    UnknownDirective(String),
    #[error("the directive {0} needs a list")]
    NotAList(String),
    #[error("an element of the list {list} does not contain the merge key {key}: {element}")]
    NoMergeKey { list: String, key: String, element: String },
    #[error("the patch sets {key}, which its $retainKeys does not name")]
    NotRetained { key: String },
    #[error("the element {element} of the list {list} is missing in its $setElementOrder")]
    NotOrdered { list: String, element: String },
    #[error("cannot apply the JSON patch: {0}")]
    Operation(String),
}

/// What is known of an object that is merged.
#[derive(Clone, Copy)]
enum Shaped<'a> {
    Described(&'a Type),
    Map(&'a Field),
    Unknown,
}

/// A list that is merged: its name, for messages, and the key of its elements, if they are objects.
struct Merged<'a> {
    name: &'a str,
    key: Option<&'a str>,
    item: Option<&'a Field>,
}

impl Schemas {
    /// `current` changed by a strategic merge patch. Parts of a type without a schema are merged as JSON.
    pub fn strategic_merge(&self, id: TypeId, current: &Value, patch: &Value) -> Result<Value, MergeError> {
        let patch = patch.as_object().ok_or(MergeError::NotAnObject)?;
        let current = current.as_object().cloned().unwrap_or_default();
        let shaped = match self.types[id.0].alias {
            None => Shaped::Described(&self.types[id.0]),
            Some(_) => Shaped::Unknown,
        };
        self.merge_object(shaped, current, patch).map(Value::Object)
    }

    fn merge_object<'a>(
        &'a self,
        shaped: Shaped<'a>,
        mut current: Map<String, Value>,
        patch: &Map<String, Value>,
    ) -> Result<Map<String, Value>, MergeError> {
        match patch.get(DIRECTIVE).map(|word| (word, word.as_str())) {
            None | Some((_, Some("merge"))) => {}
            Some((_, Some("replace"))) => current.clear(),
            Some((_, Some("delete"))) => return Ok(Map::new()),
            Some((word, _)) => return Err(MergeError::UnknownDirective(word.to_string())),
        }
        retain(&mut current, patch)?;
        for (key, value) in patch {
            if let Some(name) = key.strip_prefix(ORDER) {
                if !patch.contains_key(name)
                    && let Some(Value::Array(list)) = current.get_mut(name)
                {
                    let field = shaped.field(name);
                    let merged = Merged::of(name, field);
                    *list = merged.ordered(std::mem::take(list), value, &merged.keys_of_list(list))?;
                }
            } else if key == DIRECTIVE || key == RETAIN || key.starts_with(REMOVE) {
                continue;
            } else if value.is_null() {
                current.remove(key);
            } else {
                let order = patch.get(&format!("{ORDER}{key}"));
                let old = current.get_mut(key).map(Value::take);
                match self.merge_value((key, shaped.field(key)), old, value, order)? {
                    Some(value) => current.insert(key.clone(), value),
                    None => current.remove(key),
                };
            }
        }
        for (key, value) in patch {
            if let Some(name) = key.strip_prefix(REMOVE) {
                let gone = value.as_array().ok_or_else(|| MergeError::NotAList(key.clone()))?;
                if let Some(Value::Array(list)) = current.get_mut(name) {
                    list.retain(|item| !gone.contains(item));
                }
            }
        }
        Ok(current)
    }

    /// `None`: the patch takes away what is not there.
    fn merge_value(
        &self,
        (name, field): (&str, Option<&Field>),
        old: Option<Value>,
        patch: &Value,
        order: Option<&Value>,
    ) -> Result<Option<Value>, MergeError> {
        match patch {
            Value::Object(patch) => {
                let old = match old {
                    Some(Value::Object(old)) => old,
                    _ if patch.get(DIRECTIVE).is_some_and(|word| word == "delete") => return Ok(None),
                    _ => Map::new(),
                };
                let shaped = field.map_or(Shaped::Unknown, |field| self.shaped(field));
                self.merge_object(shaped, old, patch).map(|map| Some(Value::Object(map)))
            }
            Value::Array(patch) if field.is_some_and(|field| field.merge) => {
                let old = match old {
                    Some(Value::Array(old)) => old,
                    _ => Vec::new(),
                };
                let merged = Merged::of(name, field);
                self.merge_list(&merged, old, patch, order).map(|list| Some(Value::Array(list)))
            }
            other => Ok(Some(other.clone())),
        }
    }

    fn shaped<'a>(&'a self, field: &'a Field) -> Shaped<'a> {
        match &field.shape {
            Shape::Ref(id) => match &self.types[id.0].alias {
                None => Shaped::Described(&self.types[id.0]),
                Some(alias) => self.shaped(alias),
            },
            Shape::Map(item) => Shaped::Map(item),
            _ => Shaped::Unknown,
        }
    }

    fn merge_list(
        &self,
        merged: &Merged<'_>,
        old: Vec<Value>,
        patch: &[Value],
        order: Option<&Value>,
    ) -> Result<Vec<Value>, MergeError> {
        let before = merged.keys_of_list(&old);
        let (mut list, mut named) = (old, Vec::new());
        if patch.iter().any(|item| item[DIRECTIVE] == "replace") {
            list.clear();
        }
        for item in patch {
            match (merged.key, item.get(DIRECTIVE).and_then(Value::as_str)) {
                (_, Some("replace")) => {}
                (_, Some("delete")) => {
                    let wanted = merged.key_of(item)?;
                    list.retain(|item| merged.loose_key(item) != wanted);
                }
                (_, Some(word)) if word != "merge" => return Err(MergeError::UnknownDirective(word.to_owned())),
                _ => {
                    self.merge_item(merged, &mut list, item)?;
                    named.push(item.clone());
                }
            }
        }
        match order {
            Some(order) => {
                check_order(merged, &named, order)?;
                merged.ordered(list, order, &before)
            }
            None => merged.ordered(list, &Value::Array(named), &before),
        }
    }

    fn merge_item(&self, merged: &Merged<'_>, list: &mut Vec<Value>, item: &Value) -> Result<(), MergeError> {
        let wanted = merged.key_of(item)?;
        let place = list.iter().position(|old| merged.loose_key(old) == wanted);
        let Value::Object(patch) = item else {
            if place.is_none() {
                list.push(item.clone());
            }
            return Ok(());
        };
        let shaped = merged.item.map_or(Shaped::Unknown, |item| self.shaped(item));
        let old = match place.map(|place| list[place].take()) {
            Some(Value::Object(old)) => old,
            _ => Map::new(),
        };
        let new = Value::Object(self.merge_object(shaped, old, patch)?);
        match place {
            Some(place) => list[place] = new,
            None => list.push(new),
        }
        Ok(())
    }
}

impl<'a> Shaped<'a> {
    fn field(self, name: &str) -> Option<&'a Field> {
        match self {
            Self::Described(ty) => ty.fields.get(name),
            Self::Map(item) => Some(item),
            Self::Unknown => None,
        }
    }
}

impl<'a> Merged<'a> {
    fn of(name: &'a str, field: Option<&'a Field>) -> Self {
        let item = match field.map(|field| &field.shape) {
            Some(Shape::List(item)) => Some(&**item),
            _ => None,
        };
        Self { name, key: field.and_then(|field| field.merge_key.as_deref()), item }
    }

    /// What tells an element from others: its merge key, or itself.
    fn key_of(&self, item: &Value) -> Result<String, MergeError> {
        match (self.key, item) {
            (Some(key), Value::Object(map)) if !map.contains_key(key) => Err(MergeError::NoMergeKey {
                list: self.name.to_owned(),
                key: key.to_owned(),
                element: item.to_string(),
            }),
            _ => Ok(self.loose_key(item)),
        }
    }

    fn loose_key(&self, item: &Value) -> String {
        match (self.key, item) {
            (Some(key), Value::Object(map)) => map.get(key).unwrap_or(&Value::Null).to_string(),
            _ => item.to_string(),
        }
    }

    fn keys_of_list(&self, list: &[Value]) -> Vec<String> {
        list.iter().map(|item| self.loose_key(item)).collect()
    }

    /// The elements that `order` names, in its order, among which the others keep their place relative to those that were
    /// there `before`; an element that was not there goes in front of the others.
    fn ordered(&self, list: Vec<Value>, order: &Value, before: &[String]) -> Result<Vec<Value>, MergeError> {
        let order = order.as_array().ok_or_else(|| MergeError::NotAList(format!("{ORDER}{}", self.name)))?;
        let order = self.keys_of_list(order);
        let place = |keys: &[String], item: &Value| {
            let key = self.loose_key(item);
            keys.iter().position(|other| *other == key)
        };
        let (mut named, mut others): (Vec<Value>, Vec<Value>) =
            list.into_iter().partition(|item| place(&order, item).is_some());
        named.sort_by_key(|item| place(&order, item));
        others.sort_by_key(|item| place(before, item));
        let mut out = Vec::with_capacity(named.len() + others.len());
        let (mut named, mut others) = (named.into_iter().peekable(), others.into_iter().peekable());
        loop {
            let other_first = match (others.peek(), named.peek()) {
                (None, None) => return Ok(out),
                (other, None) => other.is_some(),
                (None, _) => false,
                (Some(other), Some(named)) => match (place(before, other), place(before, named)) {
                    (Some(other), Some(named)) => other < named,
                    _ => false,
                },
            };
            out.extend(if other_first { others.next() } else { named.next() });
        }
    }
}

fn retain(current: &mut Map<String, Value>, patch: &Map<String, Value>) -> Result<(), MergeError> {
    let Some(keep) = patch.get(RETAIN) else { return Ok(()) };
    let keep = keep.as_array().ok_or_else(|| MergeError::NotAList(RETAIN.to_owned()))?;
    let kept = |key: &str| keep.iter().any(|word| word == key);
    if let Some((key, _)) = patch.iter().find(|(key, value)| !key.starts_with('$') && !value.is_null() && !kept(key)) {
        return Err(MergeError::NotRetained { key: key.clone() });
    }
    current.retain(|key, _| kept(key));
    Ok(())
}

fn check_order(merged: &Merged<'_>, named: &[Value], order: &Value) -> Result<(), MergeError> {
    let order = merged.keys_of_list(order.as_array().map(Vec::as_slice).unwrap_or_default());
    match named.iter().find(|item| !order.contains(&merged.loose_key(item))) {
        None => Ok(()),
        Some(item) => Err(MergeError::NotOrdered { list: merged.name.to_owned(), element: merged.loose_key(item) }),
    }
}

/// `current` changed by a JSON merge patch (RFC 7386).
pub fn json_merge(current: &Value, patch: &Value) -> Value {
    let mut value = current.clone();
    json_patch::merge(&mut value, patch);
    value
}

/// `current` changed by the operations of a JSON patch (RFC 6902): all of them or none.
pub fn json_patch(current: &Value, operations: &json_patch::Patch) -> Result<Value, MergeError> {
    let mut value = current.clone();
    json_patch::patch(&mut value, operations).map_err(|error| MergeError::Operation(error.to_string()))?;
    Ok(value)
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
