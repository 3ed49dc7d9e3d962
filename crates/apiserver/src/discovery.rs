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
/// The old OpenAPI document in protobuf, as clients name it and as servers do.
const OPENAPI_V2_ACCEPTED: &str = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";
const OPENAPI_V2: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

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
        ["openapi", "v2"] => return Ok(openapi_v2(headers)),
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

/// The old OpenAPI document, without definitions: everything is described in v3 and checked by the server itself.
///
/// kubectl insists on one before it applies a `List` of objects, whatever v3 says; definitions that it does not find there it
/// leaves to the server. Go clients ask for it in protobuf (gnostic's `openapi.v2.Document`).
fn openapi_v2(headers: &HeaderMap) -> Response<Body> {
    const TITLE: &str = "Kubernetes";
    if !accepted(headers).iter().any(|wanted| wanted.media_type == OPENAPI_V2_ACCEPTED) {
        let document = json!({"swagger": "2.0", "info": {"title": TITLE, "version": GIT_VERSION}, "paths": {}});
        return json_response(StatusCode::OK, &document);
    }
    // A field of bytes: its number with wire type 2, its length (all here are below 128), the bytes.
    let field = |number: u8, bytes: &[u8]| [&[number << 3 | 2, bytes.len() as u8][..], bytes].concat();
    let info = [field(1, TITLE.as_bytes()), field(2, GIT_VERSION.as_bytes())].concat();
    bytes_response(StatusCode::OK, OPENAPI_V2, [field(1, b"2.0"), field(2, &info)].concat())
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
    paths.extend(["/healthz", "/livez", "/openapi/v2", "/openapi/v3", "/readyz", "/version"].map(str::to_owned));
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

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn the_old_document_is_protobuf_for_those_who_ask() {
        let mut headers = HeaderMap::new();
        assert_eq!(openapi_v2(&headers).headers()[http::header::CONTENT_TYPE], "application/json");
        headers.insert(http::header::ACCEPT, OPENAPI_V2_ACCEPTED.parse().unwrap());
        let response = openapi_v2(&headers);
        assert_eq!(response.headers()[http::header::CONTENT_TYPE], OPENAPI_V2);
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        assert!(bytes.starts_with(b"\x0a\x032.0\x12"), "{bytes:?}");
        assert_eq!(usize::from(bytes[6]), bytes.len() - 7, "the info is all that follows");
    }
}
