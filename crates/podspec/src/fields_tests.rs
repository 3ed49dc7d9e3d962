//! The states of docs/pod-fields.md are true: what is called refused is refused by name, what is called honoured or the
//! cluster's is taken.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};

use super::*;

const TABLE: &str = include_str!("../../../docs/pod-fields.md");
const FACTS: &str = include_str!("../../schema/facts/types.json");
const PREFIX: &str = "io.k8s.api.core.v1.";

static TYPES: LazyLock<Value> = LazyLock::new(|| serde_json::from_str(FACTS).unwrap());

/// Values of fields whose type does not say enough.
fn known(path: &str) -> Option<Value> {
    let containers = ["spec.initContainers[]", "spec.ephemeralContainers[]"];
    let path = containers
        .iter()
        .find_map(|kind| path.strip_prefix(kind))
        .map_or(path.to_owned(), |rest| format!("spec.containers[]{rest}"));
    let field = path.strip_prefix("spec.containers[].");
    Some(match (path.as_str(), field) {
        ("spec.activeDeadlineSeconds", _) => json!(60),
        ("spec.dnsPolicy", _) => json!("Default"),
        ("spec.restartPolicy", _) => json!("Never"),
        ("spec.runtimeClassName", _) => json!("runc"),
        ("spec.hostUsers", _) => json!(false),
        ("spec.os", _) => json!({"name": "linux"}),
        ("spec.dnsConfig", _) => json!({"nameservers": ["192.0.2.1"]}),
        ("spec.hostAliases[]", _) => json!({"ip": "192.0.2.1", "hostnames": ["one"]}),
        ("spec.resources.limits{}" | "spec.resources.requests{}", _) => json!({"cpu": "1", "memory": "64Mi"}),
        ("spec.securityContext.sysctls[]", _) => json!({"name": "net.ipv4.tcp_syncookies", "value": "1"}),
        ("spec.securityContext.supplementalGroupsPolicy", _) => json!("Strict"),
        ("spec.volumes[].nfs", _) => json!({"server": "files.example.org", "path": "/"}),
        ("spec.volumes[].image", _) => json!({"reference": "example.org/files:1"}),
        ("spec.volumes[].projected", _) => json!({"sources": [{"configMap": {"name": "x"}}]}),
        (_, Some("args[]" | "command[]")) => json!("x"),
        (_, Some("image")) => json!("example.org/app:2"),
        (_, Some("imagePullPolicy")) => json!("Never"),
        (_, Some("restartPolicy")) => json!("Always"),
        (_, Some("terminationMessagePath")) => json!("/dev/end"),
        (_, Some("workingDir")) => json!("/srv"),
        (_, Some("livenessProbe" | "readinessProbe" | "startupProbe")) => json!({"tcpSocket": {"port": 80}}),
        (_, Some("lifecycle")) => json!({"preStop": {"sleep": {"seconds": 1}}, "stopSignal": "SIGINT"}),
        (_, Some("lifecycle.postStart.tcpSocket" | "lifecycle.preStop.tcpSocket")) => json!({"port": 80}),
        (_, Some("ports[].containerPort" | "ports[].hostPort")) => json!(80),
        (_, Some("env[].valueFrom")) => json!({"fieldRef": {"fieldPath": "metadata.name"}}),
        (_, Some("env[].valueFrom.fileKeyRef")) => json!({"path": "p", "volumeName": "v", "key": "k"}),
        (_, Some("envFrom[]")) => json!({"prefix": "X_", "configMapRef": {"name": "c", "optional": true}}),
        (_, Some("resources.limits{}" | "resources.requests{}")) => json!({"cpu": "1", "ephemeral-storage": "1Gi"}),
        (_, Some("resizePolicy[]")) => json!({"resourceName": "cpu", "restartPolicy": "NotRequired"}),
        (_, Some("restartPolicyRules[]")) => {
            json!({"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}})
        }
        (_, Some("securityContext.procMount")) => json!("Unmasked"),
        (_, Some("securityContext.capabilities")) => json!({"add": ["CHOWN"], "drop": ["ALL"]}),
        (_, Some("volumeMounts[]")) => json!({"name": "v", "mountPath": "/v"}),
        (_, Some("volumeMounts[].mountPath")) => json!("/other"),
        (_, Some("volumeMounts[].mountPropagation")) => json!("HostToContainer"),
        (_, Some("volumeMounts[].name")) => json!("v"),
        (_, Some("volumeMounts[].subPath" | "volumeMounts[].subPathExpr")) => json!("a/b"),
        (_, Some("volumeMounts[].recursiveReadOnly")) => json!("IfPossible"),
        _ if path.ends_with(".httpGet.host") || path.ends_with(".tcpSocket.host") => json!("192.0.2.1"),
        _ if path.ends_with(".seccompProfile") || path.ends_with(".appArmorProfile") => {
            json!({"type": "RuntimeDefault"})
        }
        _ => return None,
    })
}

/// What an object on the way to a field needs besides it.
fn around(path: &str) -> Value {
    match path {
        "spec.containers[]" | "spec.initContainers[]" | "spec.ephemeralContainers[]" => {
            json!({"name": "other", "image": "example.org/app:1"})
        }
        "spec.volumes[]" => json!({"name": "v"}),
        _ if path.ends_with(".httpGet") || path.ends_with(".tcpSocket") => json!({"port": 80}),
        _ if path.ends_with(".env[]") => json!({"name": "X"}),
        _ if path.ends_with(".ports[]") => json!({"containerPort": 80}),
        _ if path.ends_with(".volumeMounts[]") => json!({"name": "v", "mountPath": "/v"}),
        _ => json!({}),
    }
}

fn target(schema: &Value) -> Option<&str> {
    let reference = schema["$ref"].as_str().or_else(|| schema["allOf"][0]["$ref"].as_str())?;
    reference.rsplit('/').next()
}

/// A value that the type allows: what it requires and nothing else.
fn sample(schema: &Value) -> Value {
    if let Some(name) = target(schema) {
        let of = &TYPES[name];
        if of["properties"].is_null() {
            return if name.ends_with("IntOrString") { json!(80) } else { json!("1") };
        }
        let required = of["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
        return required
            .map(|field| (field.to_owned(), sample(&of["properties"][field])))
            .collect::<Map<_, _>>()
            .into();
    }
    match schema["type"].as_str() {
        Some("boolean") => json!(true),
        Some("integer" | "number") => json!(1),
        Some("array") => json!([sample(&schema["items"])]),
        Some("object") => json!({}),
        _ => json!("x"),
    }
}

/// Lays a value for the field into `object`, of type `name`, whose path is `at`; `rest` leads from there to the field.
fn lay(object: &mut Value, name: &str, at: &str, rest: &str) {
    let (step, further) = rest.split_once('.').map_or((rest, None), |(step, further)| (step, Some(further)));
    let field = step.trim_end_matches("[]").trim_end_matches("{}");
    let schema = &TYPES[name]["properties"][field];
    let inner = if step.ends_with("[]") { &schema["items"] } else { schema };
    let path = format!("{at}.{step}");
    let value = match further {
        None => known(&path).unwrap_or_else(|| match step.ends_with("{}") {
            true => json!({"x": "1"}),
            false => sample(inner),
        }),
        Some(further) => {
            let mut value = around(&path);
            lay(&mut value, target(inner).unwrap(), &path, further);
            value
        }
    };
    let value = if further.is_none() && value.is_object() && !around(&path).is_null() {
        let mut whole = around(&path);
        whole.as_object_mut().unwrap().extend(value.as_object().unwrap().clone());
        whole
    } else {
        value
    };
    match (step.ends_with("[]"), object[field].as_array_mut()) {
        (true, Some(list)) => list.push(value),
        (true, None) => object[field] = json!([value]),
        (false, _) => object[field] = value,
    }
}

/// A Pod with the field of a row.
fn pod(row: &str) -> core::Pod {
    let mut spec = json!({
        "containers": [{"name": "main", "image": "example.org/app:1"}], "volumes": [{"name": "v", "emptyDir": {}}],
    });
    if row.starts_with("spec.volumes[]") {
        spec["volumes"] = json!([]);
    }
    if row.starts_with("spec.volumes[].nfs") {
        spec["runtimeClassName"] = json!("rund");
    }
    let field = row.trim_end_matches(".*").strip_prefix("spec.").unwrap();
    lay(&mut spec, &format!("{PREFIX}PodSpec"), "spec", field);
    if row == "spec.volumes[].name" || row == "spec.volumes[]" {
        spec["volumes"] = json!([{"name": "x", "emptyDir": {}}]);
    }
    let metadata = json!({"name": "web", "namespace": "shop", "uid": "u"});
    serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap_or_else(|error| panic!("{row}: {error}"))
}

fn faults(row: &str) -> Vec<String> {
    let node = Node::new("virtual", "192.0.2.1".parse().unwrap());
    match convert(&pod(row), &Objects::default(), &node) {
        Err(Refusal::Unsupported(faults)) => faults,
        Err(Refusal::Unmounted { .. }) => Vec::new(),
        Ok(converted) => {
            joey_api::validate::instance(&converted.spec).err().map(|fault| fault.message).into_iter().collect()
        }
    }
}

fn check(row: &str, state: &str) -> Option<String> {
    let found = faults(row);
    let last = row.trim_end_matches(".*").rsplit('.').next().unwrap().trim_end_matches("[]");
    let right = match state {
        "refused" => found.iter().any(|fault| fault.contains(last)),
        _ => found.is_empty(),
    };
    (!right).then(|| format!("{row} is called {state}, and found are {found:?}"))
}

#[test]
fn the_states_are_true() {
    let rows = TABLE.lines().filter(|line| line.starts_with("| `spec."));
    let rows: Vec<(&str, &str)> = rows
        .map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            (cells[1].trim_matches('`'), cells[2])
        })
        .collect();
    assert!(rows.len() > 100);
    let mut wrong: Vec<String> = rows.iter().filter_map(|(row, state)| check(row, state)).collect();
    // What is refused of a container is refused of the others.
    for (row, state) in rows.iter().filter(|(_, state)| *state == "refused") {
        if let Some(rest) = row.strip_prefix("spec.containers[]") {
            wrong.extend(check(&format!("spec.initContainers[]{rest}"), state));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
