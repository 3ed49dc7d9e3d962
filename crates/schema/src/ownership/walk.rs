//! Objects against their types: which fields a value has, what differs between two, one merged into another, fields taken out.
//!
//! ```text
//!   object with described fields ─┐                       ┌─ scalar, what is not described
//!   map ──────────────────────────┼─ walked into   leaves ┼─ atomic list or object
//!   list by keys, list as a set ──┘                       └─ what is empty on both sides
//! ```
//! A field that Go's types cannot leave out (a struct in place, a list that is required) counts as there and empty.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::{Map, Value};

use super::set::{FieldSet, Node, field_step, push_shown};
use crate::types::{Field, Schemas, Shape, Type, TypeId};

/// Misfits that are told of one value; a sender can make more than anybody reads.
const MAX_MISFITS: usize = 50;

/// How a value is looked at.
#[derive(Clone, Copy)]
pub(super) enum Form<'a> {
    Leaf,
    Object(&'a Type),
    Map(&'a Field),
    List(Elements<'a>),
}

/// What tells the elements of a list apart; without keys they do themselves.
#[derive(Clone, Copy)]
pub(super) struct Elements<'a> {
    keys: &'a [String],
    merge_key: Option<&'a String>,
    item: &'a Field,
}

/// What changed between two objects. No path is in two of the sets.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) added: FieldSet,
    pub(super) modified: FieldSet,
    pub(super) removed: FieldSet,
}

impl Schemas {
    pub(super) fn root_form(&self, id: TypeId) -> Form<'_> {
        let ty = &self.types[id.0];
        match &ty.alias {
            Some(alias) => self.form(alias),
            None if ty.atomic => Form::Leaf,
            None => Form::Object(ty),
        }
    }

    fn form<'a>(&'a self, field: &'a Field) -> Form<'a> {
        if field.atomic == Some(true) {
            return Form::Leaf;
        }
        match &field.shape {
            Shape::Ref(id) => match (&self.types[id.0], self.root_form(*id)) {
                (ty, Form::Leaf) if ty.alias.is_none() && field.atomic == Some(false) => Form::Object(ty),
                (_, form) => form,
            },
            Shape::Map(item) => Form::Map(item),
            // Without a list type the older facts of strategic merge say what the elements are.
            Shape::List(item) if field.atomic == Some(false) || field.merge => {
                let keyed_by_merge = field.map_keys.is_empty() && !field.set;
                let merge_key = field.merge_key.as_ref().filter(|_| keyed_by_merge);
                Form::List(Elements { keys: &field.map_keys, merge_key, item })
            }
            _ => Form::Leaf,
        }
    }

    /// The step to an element of a list; nothing when it has none of the keys.
    pub(super) fn element_step(&self, list: Elements<'_>, element: &Value) -> Option<String> {
        let keys: Vec<&String> = list.keys.iter().chain(list.merge_key).collect();
        if keys.is_empty() {
            return (!element.is_object() && !element.is_array() && !element.is_null()).then(|| format!("v:{element}"));
        }
        let element = element.as_object()?;
        let default = |key: &str| self.object(list.item).and_then(|ty| ty.fields.get(key)?.default.as_ref());
        let found =
            keys.into_iter().filter_map(|key| Some((key.clone(), element.get(key).or_else(|| default(key))?.clone())));
        let found: Map<String, Value> = found.collect();
        (!found.is_empty()).then(|| format!("k:{}", Value::Object(found)))
    }

    fn child_form<'a>(&'a self, form: Form<'a>, name: &str) -> Form<'a> {
        match form {
            Form::Object(ty) => ty.fields.get(name).map_or(Form::Leaf, |field| self.form(field)),
            Form::Map(item) => self.form(item),
            Form::List(_) | Form::Leaf => Form::Leaf,
        }
    }

    /// Every field and element that a value mentions.
    pub(super) fn fields_of(&self, form: Form<'_>, value: &Value) -> FieldSet {
        let mut root = Node::default();
        self.mention(form, value, &mut root);
        root.below
    }

    fn mention(&self, form: Form<'_>, value: &Value, at: &mut Node) {
        match (form, value) {
            (Form::Object(_) | Form::Map(_), Value::Object(map)) => {
                for (name, value) in map {
                    let child = at.below.0.entry(field_step(name)).or_default();
                    self.mention(self.child_form(form, name), value, child);
                    let described = matches!(form, Form::Object(ty) if ty.fields.contains_key(name));
                    child.member |= !described || value.is_null() || value.as_object().is_some_and(Map::is_empty);
                }
            }
            (Form::List(list), Value::Array(elements)) => {
                for element in elements {
                    let Some(step) = self.element_step(list, element) else { continue };
                    let child = at.below.0.entry(step).or_default();
                    child.member = true;
                    self.mention(self.form(list.item), element, child);
                }
            }
            _ => at.member = true,
        }
        at.below.0.retain(|_, node| node.member || !node.below.0.is_empty());
    }

    pub(super) fn changes(&self, form: Form<'_>, old: &Value, new: &Value) -> Changes {
        let mut changes = Changes::default();
        self.compare(form, (Some(old), Some(new)), &mut Vec::new(), &mut changes);
        changes
    }

    fn compare<'v>(
        &'v self,
        form: Form<'v>,
        (old, new): (Option<&'v Value>, Option<&'v Value>),
        path: &mut Vec<String>,
        out: &mut Changes,
    ) {
        if matches!(form, Form::Leaf) || (is_hollow(old) && is_hollow(new)) {
            match (old, new) {
                (None, Some(_)) => out.added.insert(path),
                (Some(_), None) => out.removed.insert(path),
                (old, new) if old != new => out.modified.insert(path),
                _ => {}
            }
            return;
        }
        match form {
            Form::List(list) => {
                for (step, pair) in self.paired(list, old, new) {
                    path.push(step);
                    self.compare(self.form(list.item), pair, path, out);
                    path.pop();
                }
            }
            _ => {
                let names = [old, new].into_iter().filter_map(object).flat_map(Map::keys);
                let names: HashSet<&String> = names.collect();
                let child = |whole: Option<&'v Value>, name: &str| {
                    let said = object(whole).and_then(|map| map.get(name));
                    said.or_else(|| whole.and_then(|_| implied(form, name)))
                };
                for name in names {
                    path.push(field_step(name));
                    self.compare(self.child_form(form, name), (child(old, name), child(new, name)), path, out);
                    path.pop();
                }
            }
        }
        match (old, new) {
            (None, _) => out.added.insert(path),
            (_, None) => out.removed.insert(path),
            _ => {}
        }
    }

    /// The elements of two lists, by their steps; of elements that repeat, the first.
    fn paired<'v>(&self, list: Elements<'_>, old: Option<&'v Value>, new: Option<&'v Value>) -> Paired<'v> {
        let mut pairs = Paired::new();
        let elements = |value: Option<&'v Value>| value.and_then(Value::as_array).into_iter().flatten();
        for element in elements(old) {
            if let Some(step) = self.element_step(list, element) {
                pairs.entry(step).or_default().0.get_or_insert(element);
            }
        }
        for element in elements(new) {
            if let Some(step) = self.element_step(list, element) {
                pairs.entry(step).or_default().1.get_or_insert(element);
            }
        }
        pairs
    }

    fn stepped<'v>(&self, list: Elements<'_>, value: Option<&'v Value>) -> Vec<(String, &'v Value)> {
        let elements = value.and_then(Value::as_array).into_iter().flatten();
        let mut seen = HashSet::new();
        let stepped = elements.filter_map(|element| Some((self.element_step(list, element)?, element)));
        stepped.filter(|(step, _)| seen.insert(step.clone())).collect()
    }

    /// `live` with everything that `config` says; nothing is taken away.
    pub(super) fn merged(&self, form: Form<'_>, live: Option<&Value>, config: Option<&Value>) -> Value {
        let other = || config.or(live).cloned().unwrap_or(Value::Null);
        if matches!(form, Form::Leaf) || (is_hollow(live) && is_hollow(config)) {
            return other();
        }
        match form {
            Form::List(list) => self.merged_list(list, live, config),
            _ => {
                let (live, config) = (object(live), object(config));
                let alone = |name: &String| config.is_none_or(|config| !config.contains_key(name));
                let left = live.into_iter().flatten().filter(|(name, _)| alone(name));
                let mut out: Map<String, Value> = left.map(|(name, value)| (name.clone(), value.clone())).collect();
                for (name, value) in config.into_iter().flatten() {
                    let before = live.and_then(|live| live.get(name));
                    out.insert(name.clone(), self.merged(self.child_form(form, name), before, Some(value)));
                }
                Value::Object(out)
            }
        }
    }

    /// In the order of `config`, among which elements of `live` alone stay before what they preceded.
    fn merged_list(&self, list: Elements<'_>, live: Option<&Value>, config: Option<&Value>) -> Value {
        let (left, right) = (self.stepped(list, live), self.stepped(list, config));
        let form = self.form(list.item);
        let by_step: HashMap<&String, &Value> = left.iter().map(|(step, element)| (step, *element)).collect();
        let in_right: HashSet<&String> = right.iter().map(|(step, _)| step).collect();
        let is_right = |step: &String| in_right.contains(step);
        let find_left = |step: &String| by_step.get(step).copied();
        let mut shared = right.iter().map(|(step, _)| step).filter(|step| find_left(step).is_some()).peekable();
        let mut rest = left.iter().peekable();
        let mut out = Vec::with_capacity(left.len() + right.len());
        for (step, element) in &right {
            while let Some((next, alone)) = rest.peek() {
                if !is_right(next) {
                    out.push((*alone).clone());
                } else if shared.peek() == Some(&next) {
                    break;
                }
                rest.next();
            }
            let before = find_left(step);
            out.push(self.merged(form, before, Some(element)));
            if shared.next_if(|next| *next == step).is_some() {
                rest.next_if(|(next, _)| next == step);
            }
        }
        out.extend(rest.filter(|(step, _)| !is_right(step)).map(|(_, element)| (*element).clone()));
        Value::Array(out)
    }

    /// `value` without the members of a set; nothing when nothing is left.
    pub(super) fn removed(&self, form: Form<'_>, value: &Value, set: &FieldSet) -> Option<Value> {
        match (form, value) {
            (Form::Object(_) | Form::Map(_), Value::Object(map)) => {
                let mut out = Map::new();
                for (name, value) in map {
                    let kept = match set.0.get(&field_step(name)) {
                        Some(node) if node.member => None,
                        Some(node) => self.removed(self.child_form(form, name), value, &node.below),
                        None => Some(value.clone()),
                    };
                    out.extend(kept.map(|value| (name.clone(), value)));
                }
                (!out.is_empty()).then_some(Value::Object(out))
            }
            (Form::List(list), Value::Array(elements)) => {
                let kept = elements.iter().filter_map(|element| {
                    let node = self.element_step(list, element).and_then(|step| set.0.get(&step));
                    match node {
                        Some(node) if node.member => None,
                        Some(node) => self.removed(self.form(list.item), element, &node.below),
                        None => Some(element.clone()),
                    }
                });
                let kept: Vec<Value> = kept.collect();
                (!kept.is_empty()).then_some(Value::Array(kept))
            }
            _ => Some(value.clone()),
        }
    }

    /// The set with every described field that has members below it as a member, too.
    pub(super) fn with_parents(&self, form: Form<'_>, set: &FieldSet) -> FieldSet {
        let nodes = set.0.iter().map(|(step, node)| {
            let name = step.strip_prefix("f:");
            let described = matches!((form, name), (Form::Object(ty), Some(name)) if ty.fields.contains_key(name));
            let below = match (form, name) {
                (Form::List(list), _) => self.with_parents(self.form(list.item), &node.below),
                (_, Some(name)) => self.with_parents(self.child_form(form, name), &node.below),
                (_, None) => node.below.clone(),
            };
            let member = node.member || (described && !node.below.0.is_empty());
            (step.clone(), Node { member, below })
        });
        FieldSet(nodes.collect())
    }

    /// Where a value does not fit its type: unknown fields, elements without keys, elements that repeat.
    pub(super) fn misfits(&self, form: Form<'_>, value: &Value, path: &mut String, out: &mut Vec<String>) {
        let here = path.len();
        match (form, value) {
            (Form::Object(_) | Form::Map(_), Value::Object(map)) => {
                for (name, value) in map {
                    if out.len() >= MAX_MISFITS {
                        return;
                    }
                    push_shown(path, &field_step(name));
                    match form {
                        Form::Object(ty) if !ty.fields.contains_key(name) => {
                            out.push(format!("{path}: field not declared in schema"));
                        }
                        _ => self.misfits(self.child_form(form, name), value, path, out),
                    }
                    path.truncate(here);
                }
            }
            (Form::List(list), Value::Array(elements)) => {
                let mut seen = HashSet::new();
                for (place, element) in elements.iter().enumerate() {
                    if out.len() >= MAX_MISFITS {
                        return;
                    }
                    let Some(step) = self.element_step(list, element) else {
                        let why = "associative list with keys has an element that omits all key fields";
                        out.push(format!("{path}: element {place}: {why}"));
                        continue;
                    };
                    push_shown(path, &step);
                    if !seen.insert(step) {
                        let (list, shown) = path.split_at(here);
                        out.push(format!("{list}: duplicate entries for key {shown}"));
                    }
                    self.misfits(self.form(list.item), element, path, out);
                    path.truncate(here);
                }
            }
            (Form::Leaf, _) | (_, Value::Null) => {}
            (Form::List(_), other) => out.push(format!("{path}: expected list, got {}", shortened(other))),
            (_, other) => out.push(format!("{path}: expected map, got {}", shortened(other))),
        }
    }
}

/// What two lists have under a step.
type Paired<'v> = BTreeMap<String, (Option<&'v Value>, Option<&'v Value>)>;

/// What is shown of a value that somebody sent.
fn shortened(value: &Value) -> String {
    value.to_string().chars().take(64).collect()
}

/// What a field that is absent from an object that is there counts as.
fn implied<'a>(form: Form<'a>, name: &str) -> Option<&'a Value> {
    static EMPTY_LIST: Value = Value::Array(Vec::new());
    let Form::Object(ty) = form else { return None };
    let field = ty.fields.get(name)?;
    let in_place = field.default.as_ref().filter(|default| default.as_object().is_some_and(Map::is_empty));
    let required = ty.required.iter().any(|required| required == name) && matches!(field.shape, Shape::List(_));
    in_place.or(required.then_some(&EMPTY_LIST))
}

fn object(value: Option<&Value>) -> Option<&Map<String, Value>> {
    value.and_then(Value::as_object)
}

fn is_hollow(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::Array(list)) => list.is_empty(),
        Some(_) => false,
    }
}
