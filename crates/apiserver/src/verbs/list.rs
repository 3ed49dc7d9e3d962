//! List: a page of objects from the watch cache, as shared bytes; parsed only for tables.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::Call;
use crate::Body;
use crate::cache::Snapshot;
use crate::kinds::Resource;
use crate::object::Object;
use crate::selector::Selector;
use crate::status::{ApiError, ApiResult, FieldFault, bytes_response};
use crate::table::{self, Form};

/// One page and what is needed to ask for the next.
struct Page {
    objects: Vec<Arc<Object>>,
    revision: u64,
    next: Option<String>,
    remaining: usize,
}

pub async fn list(call: &Call<'_>) -> ApiResult<Response<Body>> {
    let form = table::form(call.headers, call.query)?;
    let resource = call.target.resource;
    let page = page(call).await?;
    let mut metadata = json!({"resourceVersion": page.revision.to_string()});
    if let Some(next) = &page.next {
        metadata["continue"] = next.as_str().into();
        // With a selector the count is not known, exactly as Kubernetes leaves it out then.
        if selector(call)?.is_empty() {
            metadata["remainingItemCount"] = page.remaining.into();
        }
    }
    let body = match form {
        Form::Plain if resource.stored_as.is_none() => plain(resource, &metadata, &page.objects),
        Form::Plain => {
            let items: Vec<Value> = values(resource, &page.objects).collect();
            json!({"kind": format!("{}List", resource.kind), "apiVersion": resource.api_version(),
                "metadata": metadata, "items": items})
            .to_string()
            .into_bytes()
        }
        Form::Metadata => {
            let items: Vec<Value> = values(resource, &page.objects).map(|v| table::metadata_only(&v, false)).collect();
            json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
                "items": items})
            .to_string()
            .into_bytes()
        }
        Form::Table(include) => {
            let rows = values(resource, &page.objects).map(|v| table::row(resource, &v, include)).collect();
            table::table(resource, metadata, rows, true).to_string().into_bytes()
        }
    };
    Ok(bytes_response(StatusCode::OK, form.media_type(), body))
}

pub fn selector(call: &Call<'_>) -> ApiResult<Selector> {
    Selector::parse(call.target.resource, call.query.get("labelSelector"), call.query.get("fieldSelector"))
}

fn values(resource: &'static Resource, objects: &[Arc<Object>]) -> impl Iterator<Item = Value> {
    objects.iter().map(|object| crate::convert::outgoing(resource, object.value(object.revision)))
}

fn plain(resource: &Resource, metadata: &Value, objects: &[Arc<Object>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(256 + objects.iter().map(|object| object.size()).sum::<usize>());
    let head = format!(
        "{{\"kind\":\"{}List\",\"apiVersion\":\"{}\",\"metadata\":{metadata},\"items\":[",
        resource.kind,
        resource.api_version()
    );
    out.extend_from_slice(head.as_bytes());
    for (index, object) in objects.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        object.write(&mut out, object.revision);
    }
    out.extend_from_slice(b"]}");
    out
}

/// The objects a request is about, all of them, from a cache that holds every write before it.
pub async fn snapshot(call: &Call<'_>, selector: &Selector, at_least: u64) -> ApiResult<Snapshot> {
    call.state.cache.caught_up(at_least).await?;
    let resource = call.target.resource;
    // A watch or list of one name comes as a field selector or as the name in the path.
    let name = match call.target.name.as_str() {
        "" => selector.exact(resource, "metadata.name").unwrap_or_default(),
        name => name,
    };
    let namespace = match call.target.namespace.as_str() {
        "" => selector.exact(resource, "metadata.namespace").unwrap_or_default(),
        namespace => namespace,
    };
    let prefix = match (resource.namespaced, namespace) {
        (true, "") => resource.prefix(),
        (true, namespace) => resource.key(namespace, name),
        (false, _) => resource.key("", name),
    };
    let node = selector.exact(resource, "spec.nodeName").filter(|node| !node.is_empty());
    let keep = |object: &Object| selector.matches(resource, object) && (name.is_empty() || object.name() == name);
    Ok(call.state.cache.list(resource, &prefix, node, &keep))
}

async fn page(call: &Call<'_>) -> ApiResult<Page> {
    let selector = selector(call)?;
    let limit = call.query.number::<i64>("limit")?.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(0);
    let (at_least, exact) = version(call)?;
    let token = call.query.get("continue").filter(|token| !token.is_empty());
    let token = token.map(Continue::read).transpose()?;
    let snapshot = snapshot(call, &selector, at_least).await?;
    if exact
        && at_least != snapshot.revision
        && call.state.cache.changes(call.target.resource, at_least)?.0.iter().any(|_| true)
    {
        return Err(ApiError::expired(format!("too old resource version: {at_least} ({})", snapshot.revision)));
    }
    let mut objects = snapshot.objects;
    let mut revision = if exact { at_least } else { snapshot.revision };
    if let Some(token) = token {
        // The pages of one list carry the first page's version, so that a watch from it misses nothing.
        call.state.cache.changes(call.target.resource, token.revision).map_err(|_| {
            ApiError::expired("The provided continue parameter is too old to display a consistent list result.")
        })?;
        revision = token.revision;
        let start = objects.partition_point(|object| object.key.as_str() <= token.after.as_str());
        objects.drain(..start);
    }
    let remaining = if limit > 0 { objects.len().saturating_sub(limit) } else { 0 };
    let mut next = None;
    if remaining > 0 {
        objects.truncate(limit);
        next = objects.last().map(|last| Continue { revision, after: last.key.clone() }.text());
    }
    Ok(Page { objects, revision, next, remaining })
}

/// The lowest version the answer may have, and whether it must be exactly that.
fn version(call: &Call<'_>) -> ApiResult<(u64, bool)> {
    let version = call.query.get("resourceVersion").unwrap_or_default();
    let rule = call.query.get("resourceVersionMatch").unwrap_or_default();
    let mut faults = Vec::new();
    let mut forbid = |why: &str| faults.push(FieldFault::forbidden("resourceVersionMatch", why));
    if !rule.is_empty() {
        if version.is_empty() {
            forbid("resourceVersionMatch is forbidden unless resourceVersion is provided");
        }
        if call.query.get("continue").is_some_and(|token| !token.is_empty()) {
            forbid("resourceVersionMatch is forbidden when continue is provided");
        }
        if rule == "Exact" && version == "0" {
            forbid("resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"");
        }
        if !matches!(rule, "Exact" | "NotOlderThan") {
            faults.push(FieldFault::unsupported("resourceVersionMatch", rule, &["Exact", "NotOlderThan", ""]));
        }
    }
    if call.query.get("sendInitialEvents").is_some() {
        faults.push(FieldFault::forbidden("sendInitialEvents", "sendInitialEvents is forbidden for list"));
    }
    match faults.is_empty() {
        true => Ok((number(version)?, rule == "Exact")),
        false => Err(ApiError::invalid_options("list", &faults)),
    }
}

/// A resource version; none is 0.
pub fn number(version: &str) -> ApiResult<u64> {
    if version.is_empty() {
        return Ok(0);
    }
    let wrong = || format!("invalid resource version: resourceVersion: Invalid value: \"{version}\": not a number");
    version.parse().map_err(|_| ApiError::bad_request(wrong()))
}

/// Where the next page begins.
struct Continue {
    revision: u64,
    after: String,
}

impl Continue {
    fn text(&self) -> String {
        URL_SAFE_NO_PAD.encode(json!({"v": "meta.k8s.io/v1", "rv": self.revision, "start": self.after}).to_string())
    }

    fn read(text: &str) -> ApiResult<Self> {
        let read = || {
            let value: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
            Some(Self { revision: value["rv"].as_u64()?, after: value["start"].as_str()?.to_owned() })
        };
        read().ok_or_else(|| ApiError::bad_request("continue key is not valid"))
    }
}
