//! Who owns which fields: `metadata.managedFields` in memory. What is owned is decided in [`super`].

use serde_json::{Value, json};

use super::set::{FieldSet, shown};

/// Entries of updates that an object keeps; older ones are put together (kube-apiserver's bound).
const MAX_UPDATERS: usize = 10;
/// Under which name they are put together.
const ANCIENT: &str = "ancient-changes";

/// How a field came to be owned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Operation {
    Apply,
    Update,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) owner: String,
    pub(super) operation: Operation,
    pub(super) api_version: String,
    pub(super) subresource: String,
    pub(super) time: Option<String>,
    pub(super) fields: FieldSet,
}

impl Entry {
    fn read(value: &Value) -> Option<Self> {
        let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let operation = match text("operation").as_str() {
            "Apply" => Operation::Apply,
            "Update" => Operation::Update,
            _ => return None,
        };
        if text("apiVersion").is_empty() || text("fieldsType") != "FieldsV1" {
            return None;
        }
        let fields = match value.get("fieldsV1") {
            Some(fields) => FieldSet::read(fields)?,
            None => FieldSet::default(),
        };
        Some(Self {
            owner: text("manager"),
            operation,
            api_version: text("apiVersion"),
            subresource: text("subresource"),
            time: Some(text("time")).filter(|time| !time.is_empty()),
            fields,
        })
    }

    fn write(&self) -> Value {
        let operation = match self.operation {
            Operation::Apply => "Apply",
            Operation::Update => "Update",
        };
        let mut value = json!({"manager": self.owner, "operation": operation, "apiVersion": self.api_version,
            "fieldsType": "FieldsV1", "fieldsV1": self.fields.write()});
        if let Some(time) = &self.time {
            value["time"] = time.as_str().into();
        }
        if !self.subresource.is_empty() {
            value["subresource"] = self.subresource.as_str().into();
        }
        value
    }

    /// Whether another entry is of the same owner in the same way: an applier whatever version it spoke.
    pub(super) fn is_of(&self, other: &Self) -> bool {
        self.owner == other.owner
            && self.operation == other.operation
            && self.subresource == other.subresource
            && (self.operation == Operation::Apply || self.api_version == other.api_version)
    }

    /// The owner as messages name it.
    pub(super) fn named(&self) -> String {
        let mut text = format!("{:?}", self.owner);
        if !self.subresource.is_empty() {
            text += &format!(" with subresource {:?}", self.subresource);
        }
        match self.operation {
            Operation::Update => format!("{text} using {}", self.api_version),
            Operation::Apply => text,
        }
    }
}

/// All owners of one object's fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Owners(pub(super) Vec<Entry>);

impl Owners {
    /// Reads `metadata.managedFields`; nothing when an entry is malformed.
    pub(super) fn read(object: &Value) -> Option<Self> {
        let entries = object.pointer("/metadata/managedFields").and_then(Value::as_array);
        entries.into_iter().flatten().map(Entry::read).collect::<Option<_>>().map(Self)
    }

    /// Puts them into the object, in the order of kube-apiserver: by operation, time, name.
    pub(super) fn write(mut self, object: &mut Value) {
        self.bound();
        self.0.retain(|entry| !entry.fields.is_empty());
        self.0.sort_by(|a, b| {
            let key = |e: &Entry| (e.operation, e.time.clone(), e.owner.clone(), e.api_version.clone());
            key(a).cmp(&key(b)).then_with(|| a.subresource.cmp(&b.subresource))
        });
        let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else { return };
        match self.0.is_empty() {
            true => drop(metadata.remove("managedFields")),
            false => {
                let entries = self.0.iter().map(Entry::write).collect();
                metadata.insert("managedFields".into(), Value::Array(entries));
            }
        }
    }

    pub(super) fn position(&self, like: &Entry) -> Option<usize> {
        self.0.iter().position(|entry| entry.is_of(like))
    }

    /// Puts the oldest updates together while there are too many.
    fn bound(&mut self) {
        let is_update = |entry: &Entry| entry.operation == Operation::Update;
        while self.0.iter().filter(|entry| is_update(entry)).count() > MAX_UPDATERS {
            let mut updates: Vec<usize> = (0..self.0.len()).filter(|place| is_update(&self.0[*place])).collect();
            updates.sort_by_key(|place| (self.0[*place].time.clone(), self.0[*place].owner.clone()));
            let (first, second) = (updates[0], updates[1]);
            let taken = self.0[first].fields.clone();
            let ancient = &mut self.0[second];
            ancient.fields.add(&taken);
            ancient.owner = ANCIENT.to_owned();
            ancient.subresource.clear();
            self.0.remove(first);
        }
    }
}

/// One field that somebody else owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The owner, as messages name it: `"kubectl" using v1`.
    pub owner: String,
    /// `.spec.containers[name="c"].image`.
    pub field: String,
    pub(super) path: Vec<String>,
}

impl Conflict {
    pub(super) fn of(owner: &Entry, fields: &FieldSet) -> Vec<Self> {
        let one = |path: Vec<String>| Self { owner: owner.named(), field: shown(&path), path };
        fields.paths().into_iter().map(one).collect()
    }
}
