//! OpenAPI v3 documents of what is served: paths, and the schemas they reach, from the same facts everything else uses.
//!
//! One document a group version, serialised once. kubectl reads them for `explain`, for the strategy of its patches and to
//! learn that the server checks fields (the `fieldValidation` parameter). Routes are not here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use bytes::Bytes;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::types::FACTS;

const DESCRIPTIONS: &str = include_str!("../facts/descriptions.json");
const COMPONENTS: &str = "#/components/schemas/";
const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";

/// A kind that is served.
#[derive(Debug, Clone, Copy)]
pub struct ServedResource<'a> {
    /// Empty for the core group.
    pub group: &'a str,
    pub version: &'a str,
    pub kind: &'a str,
    pub plural: &'a str,
    pub namespaced: bool,
    /// `create`, `deletecollection` …, as discovery lists them.
    pub verbs: &'a [&'a str],
}

/// A path below an object of a served kind.
#[derive(Debug, Clone, Copy)]
pub struct ServedSubresource<'a> {
    pub name: &'a str,
    pub verbs: &'a [&'a str],
    /// Group, version and kind of its body.
    pub body: (&'a str, &'a str, &'a str),
}

/// The documents of all group versions and their index.
pub struct Documents {
    index: Bytes,
    documents: BTreeMap<String, Bytes>,
}

type Facts = BTreeMap<String, Map<String, Value>>;
type Served<'a> = (ServedResource<'a>, Vec<ServedSubresource<'a>>);

impl Documents {
    pub fn build<'a>(served: impl IntoIterator<Item = Served<'a>>) -> Self {
        let mut groups: BTreeMap<String, Vec<Served<'a>>> = BTreeMap::new();
        for entry in served {
            groups.entry(root(entry.0.group, entry.0.version)).or_default().push(entry);
        }
        let facts = described();
        let mut documents = BTreeMap::new();
        let mut index = Map::new();
        for (root, resources) in groups {
            let document = Bytes::from(document(&facts, &root, &resources).to_string());
            let hash: String = Sha256::digest(&document).iter().take(16).map(|byte| format!("{byte:02X}")).collect();
            let url = format!("/openapi/v3/{root}?hash={hash}");
            index.insert(root.clone(), json!({"serverRelativeURL": url}));
            documents.insert(root, document);
        }
        Self { index: Bytes::from(json!({"paths": index}).to_string()), documents }
    }

    /// The body of `/openapi/v3`.
    pub fn index(&self) -> Bytes {
        self.index.clone()
    }

    /// The body of `/openapi/v3/ROOT`, where the root is `api/v1` or `apis/GROUP/VERSION`.
    pub fn document(&self, root: &str) -> Option<Bytes> {
        self.documents.get(root).cloned()
    }
}

fn root(group: &str, version: &str) -> String {
    match group {
        "" => format!("api/{version}"),
        group => format!("apis/{group}/{version}"),
    }
}

/// The facts with our descriptions in them.
fn described() -> Facts {
    let mut facts: Facts = serde_json::from_str(FACTS).expect("the embedded facts are JSON");
    static TEXTS: LazyLock<BTreeMap<String, BTreeMap<String, String>>> =
        LazyLock::new(|| serde_json::from_str(DESCRIPTIONS).expect("the embedded descriptions are JSON"));
    for (name, texts) in &*TEXTS {
        let Some(schema) = facts.get_mut(name) else { continue };
        for (field, text) in texts {
            let target = match field.as_str() {
                "" => Some(&mut *schema),
                field => schema.get_mut("properties").and_then(|all| all.get_mut(field)?.as_object_mut()),
            };
            if let Some(target) = target {
                target.insert("description".into(), text.as_str().into());
            }
        }
    }
    facts
}

fn document(facts: &Facts, root: &str, resources: &[Served<'_>]) -> Value {
    let mut paths = Map::new();
    let mut needed = BTreeSet::new();
    for (resource, subresources) in resources {
        let mut writer = Writer { facts, root, resource, paths: &mut paths, needed: &mut needed };
        writer.collections();
        writer.item();
        for subresource in subresources {
            writer.subresource(subresource);
        }
    }
    json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.36.3"},
        "paths": paths,
        "components": {"schemas": reachable(facts, needed)},
    })
}

/// The schemas of the given names and all they refer to.
fn reachable(facts: &Facts, mut wanted: BTreeSet<String>) -> Map<String, Value> {
    let mut found = Map::new();
    while let Some(name) = wanted.pop_first() {
        let Some(schema) = facts.get(&name) else { continue };
        let schema = Value::Object(schema.clone());
        references(&schema, &mut |name| {
            if !name.is_empty() && !found.contains_key(name) {
                wanted.insert(name.to_owned());
            }
        });
        found.insert(name, schema);
    }
    found
}

fn references(value: &Value, found: &mut impl FnMut(&str)) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match value.as_str() {
                    Some(path) if key == "$ref" => found(path.strip_prefix(COMPONENTS).unwrap_or_default()),
                    _ => references(value, found),
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

/// Writes the paths of one kind.
struct Writer<'a> {
    facts: &'a Facts,
    root: &'a str,
    resource: &'a ServedResource<'a>,
    paths: &'a mut Map<String, Value>,
    needed: &'a mut BTreeSet<String>,
}

impl Writer<'_> {
    fn collections(&mut self) {
        let resource = self.resource;
        let list = format!("{}List", resource.kind);
        let mut path = self.parameters(false);
        for (verb, method) in [("list", "get"), ("create", "post"), ("deletecollection", "delete")] {
            if resource.verbs.contains(&verb) {
                let action = if verb == "create" { "post" } else { verb };
                let body = (resource.group, resource.version, if verb == "list" { &*list } else { resource.kind });
                path.insert(method.into(), self.operation(action, "", body));
            }
        }
        let name = self.path("");
        self.paths.insert(name, path.into());
        if resource.namespaced && resource.verbs.contains(&"list") {
            let body = (resource.group, resource.version, &*list);
            let mut operation = self.operation("list", "", body);
            operation["operationId"] = format!("{}ForAllNamespaces", self.id("list", "")).into();
            self.paths.insert(format!("/{}/{}", self.root, resource.plural), json!({"get": operation}));
        }
    }

    fn item(&mut self) {
        let resource = self.resource;
        let mut path = self.parameters(true);
        for (verb, method) in [("get", "get"), ("update", "put"), ("patch", "patch"), ("delete", "delete")] {
            if resource.verbs.contains(&verb) {
                let body = (resource.group, resource.version, resource.kind);
                path.insert(method.into(), self.operation(method, "", body));
            }
        }
        if path.len() > 1 {
            let name = self.path("/{name}");
            self.paths.insert(name, path.into());
        }
    }

    fn subresource(&mut self, subresource: &ServedSubresource<'_>) {
        let mut path = self.parameters(true);
        let connects = subresource.body.2.ends_with("Options");
        for (verb, method) in [("get", "get"), ("create", "post"), ("update", "put"), ("patch", "patch")] {
            if subresource.verbs.contains(&verb) {
                let action = if connects { "connect" } else { method };
                let mut operation = self.operation(action, subresource.name, subresource.body);
                if connects {
                    operation["operationId"] = self.id(&format!("connect{}", capital(method)), subresource.name).into();
                }
                path.insert(method.into(), operation);
            }
        }
        let name = self.path(&format!("/{{name}}/{}", subresource.name));
        self.paths.insert(name, path.into());
    }

    fn path(&self, below: &str) -> String {
        let scope = if self.resource.namespaced { "/namespaces/{namespace}" } else { "" };
        format!("/{}{scope}/{}{below}", self.root, self.resource.plural)
    }

    /// What the parts of the path stand for.
    fn parameters(&self, named: bool) -> Map<String, Value> {
        let in_path = |name: &str, text: &str| {
            json!({"name": name, "in": "path", "required": true, "description": text,
                "schema": {"type": "string", "uniqueItems": true}})
        };
        let mut all = Vec::new();
        if named {
            all.push(in_path("name", "The object's name."));
        }
        if self.resource.namespaced {
            all.push(in_path("namespace", "The namespace of the object."));
        }
        Map::from_iter([("parameters".to_owned(), Value::Array(all))])
    }

    fn id(&self, action: &str, subresource: &str) -> String {
        let group = match self.resource.group.split('.').next() {
            None | Some("") => "core",
            Some(group) => group,
        };
        let scope = if self.resource.namespaced { "Namespaced" } else { "" };
        let version = capital(self.resource.version);
        format!("{action}{}{version}{scope}{}{}", capital(group), self.resource.kind, capital(subresource))
    }

    fn operation(&mut self, action: &str, subresource: &str, body: (&str, &str, &str)) -> Value {
        let (group, version, kind) = body;
        let connects = action == "connect";
        let own = if action == "list" { self.resource.kind } else { kind };
        let mut operation = json!({
            "operationId": self.id(action, subresource),
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": own},
        });
        let parameters: Vec<Value> = parameters_of(action)
            .iter()
            .map(|(name, kind)| json!({"name": name, "in": "query", "schema": {"type": kind, "uniqueItems": true}}))
            .collect();
        if !parameters.is_empty() {
            operation["parameters"] = parameters.into();
        }
        if let Some(content) = self.request(action, body) {
            operation["requestBody"] = json!({"content": content, "required": action != "delete"});
        }
        let answer = match action {
            "deletecollection" => Some(format!("{META}.Status")),
            "delete" if kind != "Pod" => Some(format!("{META}.Status")),
            _ if connects => None,
            _ => self.component(body),
        };
        let response = match answer {
            None => json!({"description": "OK", "content": {"*/*": {"schema": {"type": "string"}}}}),
            Some(name) => json!({"description": "OK", "content": {"application/json": {"schema": self.link(name)}}}),
        };
        operation["responses"] = match action {
            "post" => json!({"200": response, "201": response}),
            _ => json!({"200": response}),
        };
        operation
    }

    fn request(&mut self, action: &str, body: (&str, &str, &str)) -> Option<Value> {
        match action {
            "post" | "put" => {
                let schema = self.component(body)?;
                Some(json!({"application/json": {"schema": self.link(schema)}}))
            }
            "delete" | "deletecollection" => {
                Some(json!({"application/json": {"schema": self.link(format!("{META}.DeleteOptions"))}}))
            }
            "patch" => {
                let schema = self.link(format!("{META}.Patch"));
                let types = ["apply-patch+yaml", "json-patch+json", "merge-patch+json", "strategic-merge-patch+json"];
                let all = types.into_iter().map(|kind| (format!("application/{kind}"), json!({"schema": schema})));
                Some(Value::Object(all.collect()))
            }
            _ => None,
        }
    }

    /// A reference to a schema, which the document then must have.
    fn link(&mut self, name: String) -> Value {
        let link = json!({"$ref": format!("{COMPONENTS}{name}")});
        self.needed.insert(name);
        link
    }

    /// The schema of a kind.
    fn component(&self, (group, version, kind): (&str, &str, &str)) -> Option<String> {
        let wanted = json!({"group": group, "version": version, "kind": kind});
        let is_it = |schema: &Map<String, Value>| {
            let kinds = schema.get("x-kubernetes-group-version-kind").and_then(Value::as_array);
            kinds.is_some_and(|kinds| kinds.contains(&wanted))
        };
        self.facts.iter().find(|(_, schema)| is_it(schema)).map(|(name, _)| name.clone())
    }
}

/// Query parameters and their types.
fn parameters_of(action: &str) -> &'static [(&'static str, &'static str)] {
    match action {
        "list" => &[
            ("allowWatchBookmarks", "boolean"),
            ("continue", "string"),
            ("fieldSelector", "string"),
            ("labelSelector", "string"),
            ("limit", "integer"),
            ("resourceVersion", "string"),
            ("resourceVersionMatch", "string"),
            ("sendInitialEvents", "boolean"),
            ("timeoutSeconds", "integer"),
            ("watch", "boolean"),
        ],
        "post" | "put" => &[("dryRun", "string"), ("fieldManager", "string"), ("fieldValidation", "string")],
        "patch" => {
            &[("dryRun", "string"), ("fieldManager", "string"), ("fieldValidation", "string"), ("force", "boolean")]
        }
        "delete" => &[("dryRun", "string"), ("gracePeriodSeconds", "integer"), ("propagationPolicy", "string")],
        "deletecollection" => &[
            ("dryRun", "string"),
            ("fieldSelector", "string"),
            ("gracePeriodSeconds", "integer"),
            ("labelSelector", "string"),
            ("propagationPolicy", "string"),
        ],
        _ => &[],
    }
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

#[cfg(test)]
#[path = "openapi_tests.rs"]
mod tests;
