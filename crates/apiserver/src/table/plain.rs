//! Columns of kinds whose cells are plain fields: everything but Pods.

use serde_json::{Map, Value};

use super::{AGE, Column, NAME, age, column, wide};
use crate::object::{list, text};

fn count(value: &Value, field: &str) -> usize {
    value.get(field).and_then(Value::as_object).map_or(0, Map::len)
}

fn or_none(text: &str) -> Value {
    if text.is_empty() { "<none>".into() } else { text.into() }
}

pub const CONFIG_MAP: &[Column] = &[
    NAME,
    column("Data", "Number of entries.", |value| {
        (count(value, "data") + count(value, "binaryData")).to_string().into()
    }),
    AGE,
];

pub const SECRET: &[Column] = &[
    NAME,
    column("Type", "What the data is for.", |value| text(value, "/type").into()),
    column("Data", "Number of entries.", |value| count(value, "data").to_string().into()),
    AGE,
];

pub const SERVICE_ACCOUNT: &[Column] =
    &[NAME, column("Secrets", "Number of secrets.", |value| list(value, "/secrets").len().to_string().into()), AGE];

pub const NAMESPACE: &[Column] =
    &[NAME, column("Status", "Phase of the namespace.", |value| text(value, "/status/phase").into()), AGE];

pub const LEASE: &[Column] =
    &[NAME, column("Holder", "Who holds the lease.", |value| text(value, "/spec/holderIdentity").into()), AGE];

pub const EVENT: &[Column] = &[
    column("Last Seen", "Time since it was last seen.", last_seen),
    column("Type", "Normal or Warning.", |value| text(value, "/type").into()),
    column("Reason", "Why, in one word.", |value| text(value, "/reason").into()),
    column("Object", "What it is about.", |value| {
        let about = about(value);
        format!("{}/{}", text(about, "/kind").to_lowercase(), text(about, "/name")).into()
    }),
    wide("Subobject", "Part of the object.", |value| text(about(value), "/fieldPath").into()),
    wide("Source", "Who reported it.", source),
    column("Message", "What happened.", |value| either(value, "/message", "/note").trim().into()),
    wide("First Seen", "Time since it was first seen.", first_seen),
    wide("Count", "How often it was seen.", |value| times(value).to_string().into()),
    Column { priority: 1, ..NAME },
];

/// A field that the two groups of events name differently.
fn either<'a>(value: &'a Value, core: &str, events: &str) -> &'a str {
    match text(value, core) {
        "" => text(value, events),
        found => found,
    }
}

fn about(value: &Value) -> &Value {
    value.get("involvedObject").or_else(|| value.get("regarding")).unwrap_or(&Value::Null)
}

fn times(value: &Value) -> i64 {
    let count = value.pointer("/series/count").or_else(|| value.get("count"));
    count.or_else(|| value.get("deprecatedCount")).and_then(Value::as_i64).unwrap_or(1).max(1)
}

fn first_seen(value: &Value) -> Value {
    match either(value, "/firstTimestamp", "/deprecatedFirstTimestamp") {
        "" => age(either(value, "/eventTime", "/metadata/creationTimestamp")),
        first => age(first),
    }
}

fn last_seen(value: &Value) -> Value {
    match either(value, "/series/lastObservedTime", "/lastTimestamp") {
        "" => match text(value, "/deprecatedLastTimestamp") {
            "" => first_seen(value),
            last => age(last),
        },
        last => age(last),
    }
}

fn source(value: &Value) -> Value {
    let source = value.get("source").or_else(|| value.get("deprecatedSource")).unwrap_or(&Value::Null);
    let component = match text(source, "/component") {
        "" => either(value, "/reportingComponent", "/reportingController"),
        component => component,
    };
    match text(source, "/host") {
        "" => component.into(),
        host => format!("{component}, {host}").into(),
    }
}

pub const NODE: &[Column] = &[
    NAME,
    column("Status", "Whether it takes and runs Pods.", node_status),
    column("Roles", "Roles named by its labels.", node_roles),
    AGE,
    column("Version", "Version of its kubelet.", |value| text(value, "/status/nodeInfo/kubeletVersion").into()),
    wide("Internal-IP", "Address inside the cluster.", |value| or_none(address(value, "InternalIP"))),
    wide("External-IP", "Address outside the cluster.", |value| or_none(address(value, "ExternalIP"))),
    wide("OS-Image", "Operating system.", |value| or_unknown(text(value, "/status/nodeInfo/osImage"))),
    wide("Kernel-Version", "Kernel.", |value| or_unknown(text(value, "/status/nodeInfo/kernelVersion"))),
    wide("Container-Runtime", "Runtime.", |value| or_unknown(text(value, "/status/nodeInfo/containerRuntimeVersion"))),
];

fn or_unknown(text: &str) -> Value {
    if text.is_empty() { "<unknown>".into() } else { text.into() }
}

fn address<'a>(node: &'a Value, kind: &str) -> &'a str {
    let found = list(node, "/status/addresses").iter().find(|address| address["type"] == kind);
    found.map(|address| text(address, "/address")).unwrap_or_default()
}

fn node_status(node: &Value) -> Value {
    let ready = list(node, "/status/conditions").iter().find(|condition| condition["type"] == "Ready");
    let mut words = vec![match ready.map(|condition| text(condition, "/status")) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }];
    if node.pointer("/spec/unschedulable") == Some(&Value::Bool(true)) {
        words.push("SchedulingDisabled");
    }
    words.join(",").into()
}

fn node_roles(node: &Value) -> Value {
    let mut roles: Vec<&str> = Vec::new();
    for (key, value) in node.pointer("/metadata/labels").and_then(Value::as_object).into_iter().flatten() {
        if let Some(role) = key.strip_prefix("node-role.kubernetes.io/").filter(|role| !role.is_empty()) {
            roles.push(role);
        } else if key == "kubernetes.io/role" {
            roles.extend(value.as_str());
        }
    }
    roles.sort_unstable();
    roles.dedup();
    or_none(&roles.join(","))
}
