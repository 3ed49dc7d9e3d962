//! `metrics.k8s.io`: what Pods and nodes use now. Nothing is stored: the nodes' kubelet endpoints are asked (`/stats/summary`),
//! as Kubernetes' metrics server asks them.

use std::collections::HashMap;

use http::{Response, StatusCode};
use serde_json::{Value, json};

use crate::kinds::{self, Resource};
use crate::object::{self, list, text};
use crate::selector::Selector;
use crate::status::{ApiError, ApiResult, json_response};
use crate::table::{self, Column, Form, NAME, column};
use crate::verbs::Call;
use crate::{Body, proxy};

/// The group of kinds that are measured when they are asked for.
pub const GROUP: &str = "metrics.k8s.io";

/// How long the span of a rate is at most; what is told is the newest look's.
const WINDOW: &str = "15s";

pub const COLUMNS: &[Column] = &[
    NAME,
    column("CPU", "CPU used, in cores.", |one| used(one, "cpu")),
    column("Memory", "Memory that cannot be taken away.", |one| used(one, "memory")),
    column("Window", "Span of time that the CPU is averaged over.", |one| text(one, "/window").into()),
];

fn used(one: &Value, what: &str) -> Value {
    let pointer = format!("/usage/{what}");
    if let Some(own) = one.pointer(&pointer) {
        return own.clone();
    }
    let number = |container: &Value| {
        text(container, &pointer).trim_end_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0_u64)
    };
    let sum: u64 = list(one, "/containers").iter().map(number).sum();
    format!("{sum}{}", if what == "cpu" { "n" } else { "Ki" }).into()
}

/// GET of one or all.
pub async fn answer(call: &Call<'_>) -> ApiResult<Response<Body>> {
    let form = table::form(call.headers, call.query)?;
    let resource = call.target.resource;
    let items = match resource.plural {
        "nodes" => of_nodes(call).await?,
        _ => of_pods(call).await?,
    };
    let kind = |mut one: Value| {
        one["kind"] = resource.kind.into();
        one["apiVersion"] = resource.api_version().into();
        one
    };
    if call.target.verb == "get" {
        let one = items.into_iter().next().ok_or_else(|| ApiError::not_found(resource, &call.target.name))?;
        return Ok(json_response(StatusCode::OK, &table::shown(resource, kind(one), form)));
    }
    let body = match form {
        Form::Table(include) => {
            let rows = items.into_iter().map(|one| table::row(resource, &kind(one), include)).collect();
            table::table(resource, json!({}), rows, true)
        }
        _ => json!({"kind": format!("{}List", resource.kind), "apiVersion": resource.api_version(), "metadata": {},
            "items": items}),
    };
    Ok(json_response(StatusCode::OK, &body))
}

/// Objects of another kind that the caller's selectors and path mean.
async fn chosen(call: &Call<'_>, resource: &'static Resource) -> ApiResult<Vec<Value>> {
    let selector = Selector::parse(resource, call.query.get("labelSelector"), call.query.get("fieldSelector"))?;
    let (namespace, name) = (&call.target.namespace, &call.target.name);
    let prefix = match (resource.namespaced, namespace.as_str()) {
        (true, "") => resource.prefix(),
        (true, namespace) => resource.key(namespace, ""),
        (false, _) => resource.prefix(),
    };
    call.state.cache.caught_up(0).await?;
    let keep =
        |object: &object::Object| selector.matches(resource, object) && (name.is_empty() || object.name() == name);
    let found = call.state.cache.list(resource, &prefix, None, &keep);
    Ok(found.objects.iter().map(|object| object.value(object.revision)).collect())
}

/// The summaries of all nodes that answer, by name.
async fn summaries(call: &Call<'_>, nodes: &[Value]) -> HashMap<String, Value> {
    let asked = nodes.iter().map(|node| async move {
        let name = text(node, "/metadata/name").to_owned();
        match proxy::ask(call.state, node, "/stats/summary").await {
            Ok(summary) => Some((name, summary)),
            Err(error) => {
                tracing::debug!(node = name, error = error.message, "figures of a node could not be read");
                None
            }
        }
    });
    futures::future::join_all(asked).await.into_iter().flatten().collect()
}

fn usage(of: &Value) -> Value {
    let number = |pointer: &str| of.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
    json!({"cpu": format!("{}n", number("/cpu/usageNanoCores")),
        "memory": format!("{}Ki", number("/memory/workingSetBytes") / 1024)})
}

fn measured(of: &Value, object: &Value) -> Value {
    let own = &object["metadata"];
    let mut metadata = json!({"name": own["name"], "creationTimestamp": object::now()});
    for key in ["namespace", "labels"] {
        if let Some(part) = own.get(key) {
            metadata[key] = part.clone();
        }
    }
    let time = of.pointer("/cpu/time").cloned().unwrap_or_else(|| object::now().into());
    json!({"metadata": metadata, "timestamp": time, "window": WINDOW})
}

async fn of_nodes(call: &Call<'_>) -> ApiResult<Vec<Value>> {
    let nodes = chosen(call, kinds::find("", "v1", "nodes").ok_or_else(ApiError::no_such_path)?).await?;
    let summaries = summaries(call, &nodes).await;
    let of = |node: &Value| {
        let own = summaries.get(text(node, "/metadata/name"))?.get("node")?;
        let mut one = measured(own, node);
        one["usage"] = usage(own);
        Some(one)
    };
    Ok(nodes.iter().filter_map(of).collect())
}

async fn of_pods(call: &Call<'_>) -> ApiResult<Vec<Value>> {
    let pods = chosen(call, kinds::find("", "v1", "pods").ok_or_else(ApiError::no_such_path)?).await?;
    let all = kinds::find("", "v1", "nodes").ok_or_else(ApiError::no_such_path)?;
    let found = call.state.cache.list(all, &all.prefix(), None, &|_| true);
    let nodes: Vec<Value> = found.objects.iter().map(|object| object.value(object.revision)).collect();
    let summaries = summaries(call, &nodes).await;
    let by_uid: HashMap<&str, &Value> = summaries
        .values()
        .flat_map(|summary| list(summary, "/pods"))
        .map(|pod| (text(pod, "/podRef/uid"), pod))
        .collect();
    let of = |pod: &Value| {
        let own = by_uid.get(text(pod, "/metadata/uid"))?;
        let containers = list(own, "/containers")
            .iter()
            .map(|container| json!({"name": container["name"], "usage": usage(container)}));
        let mut one = measured(own, pod);
        one["containers"] = containers.collect();
        Some(one)
    };
    Ok(pods.iter().filter_map(of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells() {
        let pod = json!({"containers": [{"usage": {"cpu": "5n", "memory": "3Ki"}}, {"usage": {"cpu": "7n", "memory": "4Ki"}}]});
        assert_eq!((used(&pod, "cpu"), used(&pod, "memory")), (json!("12n"), json!("7Ki")));
        let node = usage(&json!({"cpu": {"usageNanoCores": 9}, "memory": {"workingSetBytes": 4096}}));
        assert_eq!(node, json!({"cpu": "9n", "memory": "4Ki"}));
        assert_eq!(used(&json!({"usage": node}), "memory"), json!("4Ki"));
    }
}
