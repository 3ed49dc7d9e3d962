//! Sets of fields as `metadata.managedFields` writes them (`fieldsV1`), and their algebra.
//!
//! A set is a tree. A step into it has the written form of the API: `f:NAME` a field or key of a map, `k:{…}` an element of a
//! list by its keys, `v:…` an element of a list of scalars, `i:N` one by its place. A node may be a member itself (`.`) besides
//! what is below it. Values and types are not known here.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// Letters of one step that messages show: names are whoever sends them to choose, and stand before all that is below them.
const MAX_SHOWN: usize = 64;

/// A set of fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSet(pub(super) BTreeMap<String, Node>);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) member: bool,
    pub(super) below: FieldSet,
}

/// The step to a field of an object or a key of a map.
pub(super) fn field_step(name: &str) -> String {
    format!("f:{name}")
}

impl FieldSet {
    /// Reads the written form; nothing when it is malformed.
    pub(super) fn read(value: &Value) -> Option<Self> {
        let mut set = BTreeMap::new();
        for (step, below) in value.as_object()? {
            if step != "." {
                set.insert(canonical_step(step)?, Node::read(below)?);
            }
        }
        Some(Self(set))
    }

    /// The written form.
    pub(super) fn write(&self) -> Value {
        self.0.iter().map(|(step, node)| (step.clone(), node.write())).collect::<Map<_, _>>().into()
    }

    /// A set of the given paths of plain fields.
    pub fn of_fields(paths: &[&[&str]]) -> Self {
        let mut set = Self::default();
        for path in paths {
            set.insert(&path.iter().map(|name| field_step(name)).collect::<Vec<_>>());
        }
        set
    }

    /// Makes a path a member. The root belongs to nobody.
    pub(super) fn insert(&mut self, path: &[String]) {
        let Some((first, rest)) = path.split_first() else { return };
        if !self.0.contains_key(first) {
            self.0.insert(first.clone(), Node::default());
        }
        let Some(node) = self.0.get_mut(first) else { return };
        match rest.is_empty() {
            true => node.member = true,
            false => node.below.insert(rest),
        }
    }

    /// Whether nothing is a member.
    pub fn is_empty(&self) -> bool {
        self.0.values().all(|node| !node.member && node.below.is_empty())
    }

    pub(super) fn union(&self, other: &Self) -> Self {
        let mut out = self.clone();
        out.add(other);
        out
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (step, node) in &other.0 {
            let own = self.0.entry(step.clone()).or_default();
            own.member |= node.member;
            own.below.add(&node.below);
        }
    }

    pub(super) fn intersection(&self, other: &Self) -> Self {
        self.combined(|step| {
            let (own, other) = (self.0.get(step)?, other.0.get(step)?);
            Some(Node { member: own.member && other.member, below: own.below.intersection(&other.below) })
        })
    }

    /// Without the members of the other; what is below them stays.
    pub(super) fn difference(&self, other: &Self) -> Self {
        self.combined(|step| {
            let own = self.0.get(step)?;
            let Some(other) = other.0.get(step) else { return Some(own.clone()) };
            Some(Node { member: own.member && !other.member, below: own.below.difference(&other.below) })
        })
    }

    /// Without the members of the other and all that is below them.
    pub(super) fn without(&self, other: &Self) -> Self {
        self.combined(|step| {
            let own = self.0.get(step)?;
            match other.0.get(step) {
                None => Some(own.clone()),
                Some(other) if other.member => None,
                Some(other) => Some(Node { member: own.member, below: own.below.without(&other.below) }),
            }
        })
    }

    /// What a function makes of every step, without what is empty.
    fn combined(&self, make: impl Fn(&str) -> Option<Node>) -> Self {
        let nodes = self.0.keys().filter_map(|step| Some((step.clone(), make(step)?)));
        Self(nodes.filter(|(_, node)| node.member || !node.below.0.is_empty()).collect())
    }

    /// At most so many members as messages show them: `.spec.containers[name="c"].image`. The members of a level come before
    /// what is below them.
    pub(super) fn shown(&self, most: usize) -> Vec<String> {
        let mut all = Vec::new();
        self.collect(&mut String::new(), most, &mut all);
        all
    }

    fn collect(&self, path: &mut String, most: usize, all: &mut Vec<String>) {
        let here = path.len();
        for (step, _) in self.0.iter().filter(|(_, node)| node.member) {
            if all.len() >= most {
                return;
            }
            push_shown(path, step);
            all.push(path.clone());
            path.truncate(here);
        }
        for (step, node) in self.0.iter().filter(|(_, node)| !node.below.0.is_empty()) {
            if all.len() >= most {
                return;
            }
            push_shown(path, step);
            node.below.collect(path, most, all);
            path.truncate(here);
        }
    }
}

impl Node {
    fn read(value: &Value) -> Option<Self> {
        let map = value.as_object()?;
        let below = FieldSet::read(value)?;
        Some(Self { member: map.is_empty() || map.contains_key("."), below })
    }

    fn write(&self) -> Value {
        let mut value = self.below.write();
        if self.member && !self.below.0.is_empty() {
            value["."] = Value::Object(Map::new());
        }
        value
    }
}

/// A step with its JSON in the one form that is compared.
fn canonical_step(step: &str) -> Option<String> {
    let (kind, rest) = step.split_once(':')?;
    match kind {
        "f" => Some(step.to_owned()),
        "i" => rest.parse::<i64>().ok().map(|place| format!("i:{place}")),
        "k" | "v" => Some(format!("{kind}:{}", serde_json::from_str::<Value>(rest).ok()?)),
        _ => None,
    }
}

/// Puts a step to the end of a path as messages show it: `.image`, `[name="c"]`.
pub(super) fn push_shown(path: &mut String, step: &str) {
    let (kind, rest) = step.split_once(':').unwrap_or(("f", step));
    let shown = match kind {
        // What is too long to be shown whole is not read either.
        "k" if rest.len() <= 4 * MAX_SHOWN => {
            let keys: Map<String, Value> = serde_json::from_str(rest).unwrap_or_default();
            let keys: Vec<String> = keys.iter().map(|(name, value)| format!("{name}={value}")).collect();
            format!("[{}]", cut(&keys.join(",")))
        }
        "k" | "i" => format!("[{}]", cut(rest)),
        "v" => format!("[={}]", cut(rest)),
        _ => format!(".{}", cut(rest)),
    };
    path.push_str(&shown);
}

fn cut(text: &str) -> &str {
    text.char_indices().nth(MAX_SHOWN).map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn set(value: Value) -> FieldSet {
        FieldSet::read(&value).unwrap()
    }

    #[test]
    fn the_written_form_goes_both_ways() {
        let written = json!({"f:metadata": {"f:labels": {".": {}, "f:a": {}}}, "f:spec": {"f:containers":
            {"k:{\"name\":\"c\"}": {".": {}, "f:image": {}}}, "f:finalizers": {"v:\"x\"": {}}}});
        assert_eq!(set(written.clone()).write(), written);
        let odd = json!({"k:{ \"protocol\": \"TCP\", \"containerPort\": 80}": {}});
        assert_eq!(set(odd).write(), json!({"k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {}}));
        for bad in [json!([]), json!({"x": {}}), json!({"f:a": 1}), json!({"k:{": {}}), json!({"i:x": {}})] {
            assert_eq!(FieldSet::read(&bad), None, "{bad}");
        }
    }

    #[test]
    fn algebra() {
        let a = set(json!({"f:a": {".": {}, "f:b": {}}, "f:c": {}}));
        let b = set(json!({"f:a": {}, "f:d": {}}));
        assert_eq!(a.difference(&b), set(json!({"f:a": {"f:b": {}}, "f:c": {}})));
        assert_eq!(a.without(&b), set(json!({"f:c": {}})));
        assert_eq!(a.intersection(&b), set(json!({"f:a": {}})));
        assert_eq!(a.union(&b).write(), json!({"f:a": {".": {}, "f:b": {}}, "f:c": {}, "f:d": {}}));
        assert!(a.difference(&a).is_empty() && a.difference(&a) == FieldSet::default());
        assert_eq!(a.shown(9), [".a", ".c", ".a.b"]);
        assert_eq!(a.shown(2), [".a", ".c"]);
        let odd = set(json!({"f:l": {"k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {"f:x": {}}, "v:\"z\"": {}}}));
        assert_eq!(odd.shown(9), [".l[=\"z\"]", ".l[containerPort=80,protocol=\"TCP\"].x"]);
    }
}
