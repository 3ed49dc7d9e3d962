//! Who owns which fields: `metadata.managedFields` in memory. What is owned is decided in [`super`].

use serde_json::{Map, Value, json};

use super::set::FieldSet;

/// Entries of updates that an object keeps; older ones are put together (kube-apiserver's bound).
const MAX_UPDATERS: usize = 10;
/// Under which name they are put together.
const ANCIENT: &str = "ancient-changes";
/// Fields that are told when they are in the way.
const MAX_TOLD: usize = 500;

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
            let order = a.operation.cmp(&b.operation).then_with(|| a.time.cmp(&b.time));
            let order = order.then_with(|| a.owner.cmp(&b.owner)).then_with(|| a.api_version.cmp(&b.api_version));
            order.then_with(|| a.subresource.cmp(&b.subresource))
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

    /// Puts the oldest updates together when there are too many.
    fn bound(&mut self) {
        let count = self.0.iter().filter(|entry| entry.operation == Operation::Update).count();
        if count <= MAX_UPDATERS {
            return;
        }
        let entries = std::mem::take(&mut self.0).into_iter();
        let (mut updates, rest): (Vec<Entry>, _) = entries.partition(|entry| entry.operation == Operation::Update);
        updates.sort_by(|a, b| a.time.cmp(&b.time).then_with(|| a.owner.cmp(&b.owner)));
        let recent = updates.split_off(count - MAX_UPDATERS + 1);
        let mut all = FieldSet::default();
        for update in &updates {
            all.add(&update.fields);
        }
        let ancient = updates.pop().map(|last| Entry {
            owner: ANCIENT.to_owned(),
            subresource: String::new(),
            fields: all,
            ..last
        });
        self.0 = rest;
        self.0.extend(ancient.into_iter().chain(recent));
    }
}

/// One field that somebody else owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The owner, as messages name it: `"kubectl" using v1`.
    pub owner: String,
    /// `.spec.containers[name="c"].image`.
    pub field: String,
}

/// What one owner has that an applier would change.
pub(super) struct InTheWay {
    pub(super) owner: String,
    pub(super) fields: FieldSet,
}

impl InTheWay {
    /// The fields one by one, as far as anybody reads them.
    pub(super) fn told(all: &[Self]) -> Vec<Conflict> {
        let one = |way: &Self, field| Conflict { owner: way.owner.clone(), field };
        let conflicts = all.iter().flat_map(|way| way.fields.shown(MAX_TOLD).into_iter().map(|field| one(way, field)));
        conflicts.take(MAX_TOLD).collect()
    }
}

/// Whether two objects differ at most in the times and the order of their owners.
pub fn same_but_for_times(one: &Value, other: &Value) -> bool {
    let (Some(one), Some(other)) = (one.as_object(), other.as_object()) else { return one == other };
    one.len() == other.len()
        && one.iter().all(|(key, part)| match (key.as_str(), part, other.get(key)) {
            ("metadata", Value::Object(one), Some(Value::Object(other))) => same_metadata(one, other),
            (_, part, theirs) => Some(part) == theirs,
        })
}

fn same_metadata(one: &Map<String, Value>, other: &Map<String, Value>) -> bool {
    one.len() == other.len()
        && one.iter().all(|(key, part)| match (key.as_str(), part, other.get(key)) {
            ("managedFields", Value::Array(one), Some(Value::Array(other))) => same_owners(one, other),
            (_, part, theirs) => Some(part) == theirs,
        })
}

fn same_owners(one: &[Value], other: &[Value]) -> bool {
    // Entries stand in the order of their times.
    let who = |entry: &Value| {
        ["operation", "manager", "apiVersion", "subresource"]
            .map(|key| entry[key].as_str().unwrap_or_default().to_owned())
    };
    let sorted = |entries: &'_ [Value]| {
        let mut places: Vec<usize> = (0..entries.len()).collect();
        places.sort_by_cached_key(|place| who(&entries[*place]));
        places
    };
    let same = |(one, other): (&Value, &Value)| who(one) == who(other) && one.get("fieldsV1") == other.get("fieldsV1");
    let pairs = || sorted(one).into_iter().zip(sorted(other)).map(|(left, right)| (&one[left], &other[right]));
    one.len() == other.len() && pairs().all(same)
}
