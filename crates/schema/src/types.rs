//! The facts in memory: types, fields and their merge behaviour, parsed once from `facts/types.json`.

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use serde_json::Value;

pub(super) const FACTS: &str = include_str!("../facts/types.json");
const DEFAULTS: &str = include_str!("../facts/defaults.json");

/// One type of [`Schemas`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TypeId(pub(super) usize);

/// Shape of a value.
#[derive(Debug)]
pub(super) enum Shape {
    Any,
    Text,
    Integer,
    Number,
    Boolean,
    IntOrString,
    Quantity,
    /// An object whose fields are not described.
    Free,
    Map(Box<Field>),
    List(Box<Field>),
    Ref(TypeId),
}

#[derive(Debug)]
pub(super) struct Field {
    pub(super) shape: Shape,
    pub(super) default: Option<Value>,
    pub(super) allowed: Vec<String>,
    /// Keys that tell the elements of a list apart.
    pub(super) map_keys: Vec<String>,
    pub(super) set: bool,
    pub(super) merge: bool,
    pub(super) merge_key: Option<String>,
    /// Whether a list or object is owned and replaced as a whole, where the facts say either.
    pub(super) atomic: Option<bool>,
}

#[derive(Debug, Default)]
pub(super) struct Type {
    pub(super) name: String,
    /// `None`: not an object with described fields but an alias of this shape.
    pub(super) alias: Option<Field>,
    pub(super) fields: BTreeMap<String, Field>,
    pub(super) required: Vec<String>,
    pub(super) atomic: bool,
}

/// Every known type, and which kinds they are.
pub struct Schemas {
    pub(super) types: Vec<Type>,
    kinds: HashMap<(String, String, String), TypeId>,
    pub(super) defaults: HashMap<String, serde_json::Map<String, Value>>,
}

impl Schemas {
    /// The kinds that are built in.
    pub fn builtin() -> &'static Self {
        static BUILTIN: LazyLock<Schemas> = LazyLock::new(|| Schemas::parse(FACTS, DEFAULTS));
        &BUILTIN
    }

    /// The type of a kind; the core group is `""`.
    pub fn kind(&self, group: &str, version: &str, kind: &str) -> Option<TypeId> {
        self.kinds.get(&(group.to_owned(), version.to_owned(), kind.to_owned())).copied()
    }

    /// The type's full name, as OpenAPI's components name it.
    pub fn name(&self, id: TypeId) -> &str {
        &self.types[id.0].name
    }

    fn parse(facts: &str, defaults: &str) -> Self {
        let raw: BTreeMap<String, Value> = serde_json::from_str(facts).expect("the embedded facts are JSON");
        let ids: HashMap<&str, TypeId> =
            raw.keys().enumerate().map(|(index, name)| (name.as_str(), TypeId(index))).collect();
        let mut kinds = HashMap::new();
        let mut types = Vec::with_capacity(raw.len());
        for (name, schema) in &raw {
            for gvk in schema["x-kubernetes-group-version-kind"].as_array().into_iter().flatten() {
                let part = |key: &str| gvk[key].as_str().unwrap_or_default().to_owned();
                kinds.insert((part("group"), part("version"), part("kind")), ids[name.as_str()]);
            }
            let alias = schema.get("properties").is_none().then(|| field(schema, &ids));
            let fields = schema["properties"].as_object().into_iter().flatten();
            types.push(Type {
                name: name.clone(),
                alias,
                fields: fields.map(|(name, schema)| (name.clone(), field(schema, &ids))).collect(),
                required: texts(&schema["required"]),
                atomic: schema["x-kubernetes-map-type"] == "atomic",
            });
        }
        let defaults = serde_json::from_str(defaults).expect("the embedded defaults are JSON");
        Self { types, kinds, defaults }
    }

    /// The described object a field holds, through aliases.
    pub(super) fn object(&self, field: &Field) -> Option<&Type> {
        match &field.shape {
            Shape::Ref(id) if self.types[id.0].alias.is_none() => Some(&self.types[id.0]),
            _ => None,
        }
    }
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn field(schema: &Value, ids: &HashMap<&str, TypeId>) -> Field {
    let reference = schema["$ref"].as_str().or_else(|| schema["allOf"][0]["$ref"].as_str());
    let named = reference.and_then(|path| ids.get(path.rsplit('/').next().unwrap_or_default()));
    let shape = match (named, schema["type"].as_str()) {
        (Some(id), _) => Shape::Ref(*id),
        (None, Some("string")) => Shape::Text,
        (None, Some("integer")) => Shape::Integer,
        (None, Some("number")) => Shape::Number,
        (None, Some("boolean")) => Shape::Boolean,
        (None, Some("array")) => Shape::List(Box::new(field(&schema["items"], ids))),
        (None, Some("object")) if schema["additionalProperties"].is_object() => {
            Shape::Map(Box::new(field(&schema["additionalProperties"], ids)))
        }
        (None, Some("object")) => Shape::Free,
        _ if schema["format"] == "int-or-string" => Shape::IntOrString,
        _ if schema["oneOf"].is_array() => Shape::Quantity,
        _ => Shape::Any,
    };
    let strategy = schema["x-kubernetes-patch-strategy"].as_str().unwrap_or_default();
    let is_map = schema["x-kubernetes-list-type"] == "map";
    let kind = schema["x-kubernetes-list-type"].as_str().or_else(|| schema["x-kubernetes-map-type"].as_str());
    Field {
        shape,
        default: schema.get("default").cloned(),
        allowed: texts(&schema["enum"]),
        map_keys: if is_map { texts(&schema["x-kubernetes-list-map-keys"]) } else { Vec::new() },
        set: schema["x-kubernetes-list-type"] == "set",
        merge: strategy.split(',').any(|word| word == "merge"),
        merge_key: schema["x-kubernetes-patch-merge-key"].as_str().map(str::to_owned),
        atomic: kind.map(|kind| kind == "atomic"),
    }
}
