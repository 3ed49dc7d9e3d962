//! Server-side apply: which writer owns which field, what an applied configuration makes of an object, and who is in the way.
//!
//! The rules are those of KEP-555. A writer that changes a field owns it; a writer that applies a configuration owns all that
//! the configuration names, takes away what it named before and names no more (unless somebody else owns it too), and is
//! refused where it would change what others own, unless it insists. Nothing is stored here and no time is read.

mod entries;
mod set;
mod walk;

use serde_json::{Map, Value};

use crate::types::{Schemas, TypeId};
use entries::{Entry, InTheWay, Operation, Owners};
use walk::{Changes, Form};

pub use entries::{Conflict, same_but_for_times};
pub use set::FieldSet;

/// Who writes, and how.
#[derive(Debug, Clone)]
pub struct Writer {
    /// The name under which the fields will be owned.
    pub name: String,
    pub api_version: String,
    /// Empty: the object itself.
    pub subresource: String,
    /// RFC 3339, whole seconds.
    pub now: String,
    /// Fields that this way of writing does not change, whatever is sent.
    pub ignored: FieldSet,
}

/// Why a configuration was not applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    #[error("{}", .0.join("\n"))]
    Misfit(Vec<String>),
    #[error("{} of the fields belong to others", .0.len())]
    Conflicts(Vec<Conflict>),
}

/// Owner of what was there before anybody applied.
const BEFORE: &str = "before-first-apply";
/// The writer that may take over what it applied from the client's side, and the annotation that says so.
const CLIENT_SIDE: (&str, &str) = ("kubectl", "kubectl.kubernetes.io/last-applied-configuration");
/// What nobody owns: identity, and what the server sets.
const NOBODYS: &[&[&str]] = &[
    &["apiVersion"],
    &["kind"],
    &["metadata"],
    &["metadata", "name"],
    &["metadata", "namespace"],
    &["metadata", "creationTimestamp"],
    &["metadata", "selfLink"],
    &["metadata", "uid"],
    &["metadata", "generation"],
    &["metadata", "managedFields"],
    &["metadata", "resourceVersion"],
];

impl Writer {
    fn entry(&self, operation: Operation, fields: FieldSet) -> Entry {
        let name = if self.name.is_empty() { "unknown" } else { &self.name };
        Entry {
            owner: name.to_owned(),
            operation,
            api_version: self.api_version.clone(),
            subresource: self.subresource.clone(),
            time: Some(self.now.clone()),
            fields,
        }
    }
}

impl Schemas {
    /// Writes into `new` who owns its fields after an update; `live` is absent when the object is created.
    ///
    /// Objects that nobody applied and that were made before owners were kept stay without.
    pub fn own_update(&self, id: TypeId, live: Option<&Value>, new: &mut Value, writer: &Writer) {
        let Some(mut owners) = sent_owners(live, new, writer).or_else(|| live.and_then(Owners::read)) else {
            return clear(new);
        };
        clear(new);
        if live.is_some() && owners.0.is_empty() {
            return;
        }
        let nothing = Value::Object(Map::new());
        let changes = self.differences(self.root_form(id), live.unwrap_or(&nothing), new, writer);
        self.own_changes(&mut owners, &changes, writer);
        owners.write(new);
    }

    fn differences(&self, form: Form<'_>, live: &Value, new: &Value, writer: &Writer) -> Changes {
        let changes = self.changes(form, live, new);
        Changes {
            added: changes.added.without(&writer.ignored),
            modified: changes.modified.without(&writer.ignored),
            removed: changes.removed.without(&writer.ignored),
        }
    }

    fn own_changes(&self, owners: &mut Owners, changes: &Changes, writer: &Writer) {
        let taken = changes.added.union(&changes.modified);
        for entry in owners.0.iter_mut().filter(|entry| entry.api_version == writer.api_version) {
            entry.fields = entry.fields.difference(&taken).difference(&changes.removed);
        }
        let own = taken.difference(&FieldSet::of_fields(NOBODYS));
        if own.is_empty() {
            return;
        }
        let mut entry = writer.entry(Operation::Update, own);
        match owners.position(&entry) {
            Some(place) => {
                entry.fields.add(&owners.0[place].fields);
                owners.0[place] = entry;
            }
            None => owners.0.push(entry),
        }
    }

    /// Where a configuration does not fit its type, as server-side apply says it.
    pub fn misfits_of(&self, id: TypeId, config: &Value) -> Vec<String> {
        let mut faults = Vec::new();
        self.misfits(self.root_form(id), config, &mut String::new(), &mut faults);
        faults
    }

    /// What becomes of `live` when `config` is applied to it, with its owners. `live` is absent when the object is created.
    ///
    /// What is compared is compared as it stands: amounts have to be canonical in both.
    pub fn apply(
        &self,
        id: TypeId,
        live: Option<&Value>,
        config: &Value,
        writer: &Writer,
        force: bool,
    ) -> Result<Value, ApplyError> {
        let form = self.root_form(id);
        let misfits = self.misfits_of(id, config);
        if !misfits.is_empty() {
            return Err(ApplyError::Misfit(misfits));
        }
        let (before, owners) = self.before(form, live, writer);
        let applied = match self.apply_to(form, &before, &owners, config, writer, force) {
            Err(mut conflicts) if writer.name == CLIENT_SIDE.0 => {
                let allowed = self.last_applied(id, &before, writer).unwrap_or_default();
                for way in &mut conflicts {
                    way.fields = way.fields.difference(&allowed);
                }
                conflicts.retain(|way| !way.fields.is_empty());
                match conflicts.is_empty() {
                    true => self.apply_to(form, &before, &owners, config, writer, true),
                    false => Err(conflicts),
                }
            }
            applied => applied,
        };
        let mut object = applied.map_err(|conflicts| ApplyError::Conflicts(InTheWay::told(&conflicts)))?;
        if writer.name == CLIENT_SIDE.0 {
            renew_last_applied(&mut object, config);
        }
        Ok(object)
    }

    /// The object without its owners, and them; what was there before anybody applied gets an owner of its own.
    fn before(&self, form: Form<'_>, live: Option<&Value>, writer: &Writer) -> (Value, Owners) {
        let Some(live) = live else { return (Value::Object(Map::new()), Owners::default()) };
        let mut owners = Owners::read(live).unwrap_or_default();
        let mut before = live.clone();
        clear(&mut before);
        if owners.0.is_empty() {
            let changes = self.changes(form, &Value::Object(Map::new()), &before);
            let first = Writer { name: BEFORE.to_owned(), ..writer.clone() };
            self.own_changes(&mut owners, &changes, &first);
        }
        (before, owners)
    }

    fn apply_to(
        &self,
        form: Form<'_>,
        live: &Value,
        owners: &Owners,
        config: &Value,
        writer: &Writer,
        force: bool,
    ) -> Result<Value, Vec<InTheWay>> {
        let mut owners = owners.clone();
        let merged = self.merged(form, Some(live), Some(config));
        let own = self.fields_of(form, config).without(&writer.ignored);
        let mut entry = writer.entry(Operation::Apply, own);
        let last = owners.position(&entry).map(|place| owners.0.remove(place));
        owners.0.push(entry.clone());
        let object = match &last {
            Some(last) => self.pruned(form, merged, &last.fields, &owners),
            None => merged,
        };
        owners.0.pop();
        let changes = self.differences(form, live, &object, writer);
        let taken = changes.added.union(&changes.modified);
        let mut conflicts = Vec::new();
        for other in owners.0.iter_mut().filter(|other| other.api_version == writer.api_version) {
            let fields = other.fields.intersection(&taken);
            if !fields.is_empty() {
                conflicts.push(InTheWay { owner: other.named(), fields });
            }
            other.fields = other.fields.difference(&taken).difference(&changes.removed);
        }
        if !force && !conflicts.is_empty() {
            return Err(conflicts);
        }
        entry.fields = entry.fields.difference(&FieldSet::of_fields(NOBODYS));
        // An application that changes nothing has no time of its own.
        if object == *live {
            entry.time = last.and_then(|last| last.time);
        }
        owners.0.push(entry);
        let mut object = object;
        owners.write(&mut object);
        Ok(object)
    }

    /// Without what the writer applied the last time, does not apply now, and nobody else owns.
    fn pruned(&self, form: Form<'_>, merged: Value, last: &FieldSet, owners: &Owners) -> Value {
        let last = self.with_parents(form, last);
        let all = self.with_parents(form, &self.fields_of(form, &merged));
        let kept_of = |pruned: &Option<Value>| match pruned {
            Some(pruned) => self.with_parents(form, &self.fields_of(form, pruned)),
            None => FieldSet::default(),
        };
        let without_last = self.removed(form, &merged, &last);
        let mut kept = kept_of(&without_last);
        for entry in &owners.0 {
            kept.add(&self.with_parents(form, &entry.fields));
        }
        let owned = self.removed(form, &merged, &all.difference(&kept));
        let gone = all.difference(&kept_of(&owned)).intersection(&last);
        self.removed(form, &merged, &gone).unwrap_or(merged)
    }

    /// The fields that were applied from the client's side and are still as they were applied.
    fn last_applied(&self, id: TypeId, live: &Value, writer: &Writer) -> Option<FieldSet> {
        let form = self.root_form(id);
        let text = live.pointer("/metadata/annotations")?.get(CLIENT_SIDE.1)?.as_str()?;
        let mut last: Value = serde_json::from_str(text).ok()?;
        self.canonical_amounts(id, &mut last);
        if last.get("apiVersion")?.as_str()? != writer.api_version {
            return None;
        }
        let changes = self.changes(form, &last, live);
        let fields = self.fields_of(form, &last);
        Some(fields.difference(&changes.modified).difference(&changes.added).difference(&changes.removed))
    }
}

/// The owners that an update sends: somebody may put them right. Nothing when it sends none, or none that can be read.
fn sent_owners(live: Option<&Value>, new: &Value, writer: &Writer) -> Option<Owners> {
    if !writer.subresource.is_empty() {
        return None;
    }
    let sent = new.pointer("/metadata/managedFields").and_then(Value::as_array);
    // An empty list, or one empty entry, takes all owners away.
    let reset = sent.is_some_and(|sent| match sent.as_slice() {
        [] => true,
        [only] => only.as_object().is_some_and(Map::is_empty),
        _ => false,
    });
    match Owners::read(new) {
        _ if reset => Some(Owners::default()),
        Some(owners) if !owners.0.is_empty() || live.is_none() => Some(owners),
        None if live.is_none() => Some(Owners::default()),
        _ => None,
    }
}

fn clear(object: &mut Value) {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
}

/// Keeps the client-side annotation true, where there is one.
fn renew_last_applied(object: &mut Value, config: &Value) {
    let Some(annotations) = object.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) else { return };
    let Some(text) = annotations.get_mut(CLIENT_SIDE.1).filter(|text| text.as_str().is_some_and(|t| !t.is_empty()))
    else {
        return;
    };
    let mut config = config.clone();
    if let Some(annotations) = config.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
        annotations.remove(CLIENT_SIDE.1);
    }
    *text = format!("{config}\n").into();
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
