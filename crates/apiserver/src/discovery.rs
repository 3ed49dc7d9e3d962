//! What is served: version, health, groups and resources (both the old and the aggregated form), OpenAPI documents.

use http::{HeaderMap, Response, StatusCode};
use serde_json::{Value, json};

use crate::kinds::{self, RESOURCES, Resource};
use crate::request::accepted;
use crate::status::{ApiError, ApiResult, bytes_response, json_response};
use crate::{Body, State};

/// Version of the Kubernetes API that is spoken; semver, so that clients can compare it.
pub const GIT_VERSION: &str = concat!("v1.36.0+joey", env!("CARGO_PKG_VERSION"));
const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// Answers a path that is about no object.
pub fn answer(state: &State, headers: &HeaderMap, segments: &[String]) -> ApiResult<Response<Body>> {
    let words: Vec<&str> = segments.iter().map(String::as_str).collect();
    let wants_all =
        accepted(headers).iter().any(|wanted| wanted.wants("APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2"));
    let value = match words.as_slice() {
        ["healthz" | "livez" | "readyz", ..] => return Ok(bytes_response(StatusCode::OK, "text/plain", "ok")),
        ["version"] => version(),
        [] => paths(),
        ["api"] | ["apis"] if wants_all => {
            let list = aggregated(words[0] == "api").to_string();
            return Ok(bytes_response(StatusCode::OK, AGGREGATED, list));
        }
        ["api"] => json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs":
            [{"clientCIDR": "0.0.0.0/0", "serverAddress": state.advertise.to_string()}]}),
        ["apis"] => {
            let groups: Vec<Value> = named_groups().map(|(group, version)| group_of(group, version)).collect();
            json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        }
        ["api", "v1"] => resources("", "v1")?,
        ["apis", group] => {
            let found = named_groups().find(|(name, _)| name == group).ok_or_else(ApiError::no_such_path)?;
            let mut value = group_of(found.0, found.1);
            value["kind"] = "APIGroup".into();
            value["apiVersion"] = "v1".into();
            value
        }
        ["apis", group, version] => resources(group, version)?,
        ["openapi", "v3"] => {
            return Ok(bytes_response(StatusCode::OK, "application/json", state.types.openapi().index()));
        }
        ["openapi", "v3", root @ ..] => {
            let document = state.types.openapi().document(&root.join("/")).ok_or_else(ApiError::no_such_path)?;
            return Ok(bytes_response(StatusCode::OK, "application/json", document));
        }
        _ => return Err(ApiError::no_such_path()),
    };
    Ok(json_response(StatusCode::OK, &value))
}

fn version() -> Value {
    json!({"major": "1", "minor": "36", "gitVersion": GIT_VERSION, "gitCommit": "", "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z", "goVersion": "", "compiler": "rustc", "platform":
        format!("linux/{}", match std::env::consts::ARCH { "x86_64" => "amd64", "aarch64" => "arm64", other => other }),
        "emulationMajor": "1", "emulationMinor": "36", "minCompatibilityMajor": "1", "minCompatibilityMinor": "36"})
}

fn paths() -> Value {
    let mut paths = vec!["/api".to_owned(), "/api/v1".into(), "/apis".into()];
    for (group, version) in named_groups() {
        paths.push(format!("/apis/{group}"));
        paths.push(format!("/apis/{group}/{version}"));
    }
    paths.extend(["/healthz", "/livez", "/openapi/v3", "/readyz", "/version"].map(str::to_owned));
    json!({"paths": paths})
}

fn named_groups() -> impl Iterator<Item = (&'static str, &'static str)> {
    kinds::groups().into_iter().filter(|(group, _)| !group.is_empty())
}

fn group_of(group: &str, version: &str) -> Value {
    let version = json!({"groupVersion": format!("{group}/{version}"), "version": version});
    json!({"name": group, "versions": [version], "preferredVersion": version})
}

fn of<'a>(group: &'a str, version: &'a str) -> impl Iterator<Item = &'static Resource> + 'a {
    RESOURCES.iter().filter(move |r| r.group == group && r.version == version)
}

/// The old form: one document a group and version.
fn resources(group: &str, version: &str) -> ApiResult<Value> {
    let mut list = Vec::new();
    for resource in of(group, version) {
        let mut entry = json!({"name": resource.plural, "singularName": resource.singular,
            "namespaced": resource.namespaced, "kind": resource.kind, "verbs": resource.verbs});
        if !resource.short_names.is_empty() {
            entry["shortNames"] = json!(resource.short_names);
        }
        if !resource.categories.is_empty() {
            entry["categories"] = json!(resource.categories);
        }
        list.push(entry);
        for sub in resource.subresources {
            let (body_group, body_version, kind) = sub.body;
            let mut entry = json!({"name": format!("{}/{}", resource.plural, sub.name), "singularName": "",
                "namespaced": resource.namespaced, "kind": kind, "verbs": sub.verbs});
            if (body_group, body_version) != (resource.group, resource.version) {
                entry["group"] = body_group.into();
                entry["version"] = body_version.into();
            }
            list.push(entry);
        }
    }
    if list.is_empty() {
        return Err(ApiError::no_such_path());
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    Ok(json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": list}))
}

/// The aggregated form: all groups in one document.
fn aggregated(core: bool) -> Value {
    let items: Vec<Value> = kinds::groups()
        .into_iter()
        .filter(|(group, _)| group.is_empty() == core)
        .map(|(group, version)| {
            let resources: Vec<Value> = of(group, version).map(discovered).collect();
            let metadata = if core {
                json!({"creationTimestamp": null})
            } else {
                json!({"name": group, "creationTimestamp": null})
            };
            json!({"metadata": metadata, "versions":
                [{"version": version, "freshness": "Current", "resources": resources}]})
        })
        .collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items})
}

fn discovered(resource: &'static Resource) -> Value {
    let kind = |(group, version, kind): (&str, &str, &str)| json!({"group": group, "version": version, "kind": kind});
    let mut entry = json!({"resource": resource.plural,
        "responseKind": kind((resource.group, resource.version, resource.kind)),
        "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": resource.singular, "verbs": resource.verbs});
    if !resource.short_names.is_empty() {
        entry["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        entry["categories"] = json!(resource.categories);
    }
    if !resource.subresources.is_empty() {
        let subs: Vec<Value> = resource
            .subresources
            .iter()
            .map(|sub| json!({"subresource": sub.name, "responseKind": kind(sub.body), "verbs": sub.verbs}))
            .collect();
        entry["subresources"] = Value::Array(subs);
    }
    entry
}
