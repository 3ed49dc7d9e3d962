//! Containers and volumes of a Pod: rules beyond the schema that people run into.

use std::collections::HashSet;

use joey_model::quantity::parse_milli;
use serde_json::{Value, json};

use super::metadata::{label_fault, subdomain_fault};
use crate::object::{list, text};
use crate::status::FieldFault;

/// Defaults of one container that depend on nothing else.
pub fn fill_in(container: &mut Value) {
    let latest = {
        let image = text(container, "/image");
        let last = image.rsplit('/').next().unwrap_or_default();
        !image.contains('@') && last.split_once(':').is_none_or(|(_, tag)| tag == "latest")
    };
    let Some(map) = container.as_object_mut() else { return };
    let policy = if latest { "Always" } else { "IfNotPresent" };
    map.entry("imagePullPolicy").or_insert_with(|| policy.into());
    map.entry("terminationMessagePath").or_insert_with(|| "/dev/termination-log".into());
    map.entry("terminationMessagePolicy").or_insert_with(|| "File".into());
    map.entry("resources").or_insert_with(|| json!({}));
    for port in map.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(port) = port.as_object_mut() {
            port.entry("protocol").or_insert_with(|| "TCP".into());
        }
    }
    // A limit without a request is the request, too.
    let Some(resources) = map.get_mut("resources").and_then(Value::as_object_mut) else { return };
    let Some(limits) = resources.get("limits").and_then(Value::as_object).cloned() else { return };
    let requests = resources.entry("requests").or_insert_with(|| json!({}));
    if let Some(requests) = requests.as_object_mut() {
        for (name, limit) in limits {
            requests.entry(name).or_insert(limit);
        }
    }
}

/// Faults of all containers and volumes of a Pod's spec.
pub fn validate(spec: &Value, faults: &mut Vec<FieldFault>) {
    let mut volumes = HashSet::new();
    for (index, volume) in list(spec, "/volumes").iter().enumerate() {
        let (field, name) = (format!("spec.volumes[{index}].name"), text(volume, "/name"));
        match label_fault(name) {
            _ if name.is_empty() => faults.push(FieldFault::required(field, "")),
            Some(why) => faults.push(FieldFault::invalid(field, &name.into(), &why)),
            None if !volumes.insert(name) => faults.push(FieldFault::duplicate(field, name)),
            None => {}
        }
    }
    if list(spec, "/containers").is_empty() {
        faults.push(FieldFault::required("spec.containers", ""));
    }
    let mut names = HashSet::new();
    for kind in ["initContainers", "containers"] {
        for (index, container) in list(spec, &format!("/{kind}")).iter().enumerate() {
            let field = format!("spec.{kind}[{index}]");
            check_name(container, &field, &mut names, faults);
            check_container(container, &field, &volumes, faults);
        }
    }
    for (index, secret) in list(spec, "/imagePullSecrets").iter().enumerate() {
        let name = text(secret, "/name");
        if let Some(why) = subdomain_fault(name).filter(|_| !name.is_empty()) {
            faults.push(FieldFault::invalid(format!("spec.imagePullSecrets[{index}].name"), &name.into(), &why));
        }
    }
}

fn check_name<'a>(container: &'a Value, field: &str, names: &mut HashSet<&'a str>, faults: &mut Vec<FieldFault>) {
    let (field, name) = (format!("{field}.name"), text(container, "/name"));
    match label_fault(name) {
        _ if name.is_empty() => faults.push(FieldFault::required(field, "")),
        Some(why) => faults.push(FieldFault::invalid(field, &name.into(), &why)),
        None if !names.insert(name) => faults.push(FieldFault::duplicate(field, name)),
        None => {}
    }
}

pub fn check_container(container: &Value, field: &str, volumes: &HashSet<&str>, faults: &mut Vec<FieldFault>) {
    let image = text(container, "/image");
    if image.is_empty() {
        faults.push(FieldFault::required(format!("{field}.image"), ""));
    } else if image.trim() != image {
        let why = "must not have leading or trailing whitespace";
        faults.push(FieldFault::invalid(format!("{field}.image"), &image.into(), why));
    }
    let policy = text(container, "/imagePullPolicy");
    let policies = ["Always", "IfNotPresent", "Never"];
    if !policies.contains(&policy) {
        faults.push(FieldFault::unsupported(format!("{field}.imagePullPolicy"), policy, &policies));
    }
    check_ports(container, field, faults);
    for (index, variable) in list(container, "/env").iter().enumerate() {
        let (field, name) = (format!("{field}.env[{index}]"), text(variable, "/name"));
        if name.is_empty() {
            faults.push(FieldFault::required(format!("{field}.name"), ""));
        } else if name.contains('=') || !name.bytes().all(|c| (0x20..0x7f).contains(&c)) {
            let why =
                "a valid environment variable name must consist only of printable ASCII characters other than '='";
            faults.push(FieldFault::invalid(format!("{field}.name"), &name.into(), why));
        }
        let given = variable.get("value").and_then(Value::as_str).is_some_and(|value| !value.is_empty());
        if given && variable.get("valueFrom").is_some() {
            let why = "may not be specified when `value` is not empty";
            faults.push(FieldFault::invalid(format!("{field}.valueFrom"), &"".into(), why));
        }
    }
    let mut paths = HashSet::new();
    for (index, mount) in list(container, "/volumeMounts").iter().enumerate() {
        check_mount(mount, &format!("{field}.volumeMounts[{index}]"), volumes, &mut paths, faults);
    }
    check_resources(container, &format!("{field}.resources"), faults);
}

fn check_ports(container: &Value, field: &str, faults: &mut Vec<FieldFault>) {
    let mut names = HashSet::new();
    for (index, port) in list(container, "/ports").iter().enumerate() {
        let field = format!("{field}.ports[{index}]");
        for key in ["containerPort", "hostPort"] {
            let number = port.get(key);
            let optional = key == "hostPort" && number.and_then(Value::as_i64).unwrap_or(0) == 0;
            match number.and_then(Value::as_i64) {
                _ if optional => {}
                None => faults.push(FieldFault::required(format!("{field}.{key}"), "")),
                Some(1..=65535) => {}
                Some(other) => {
                    let why = "must be between 1 and 65535, inclusive";
                    faults.push(FieldFault::invalid(format!("{field}.{key}"), &other.into(), why));
                }
            }
        }
        let protocol = text(port, "/protocol");
        if !matches!(protocol, "" | "TCP" | "UDP" | "SCTP") {
            faults.push(FieldFault::unsupported(format!("{field}.protocol"), protocol, &["SCTP", "TCP", "UDP"]));
        }
        let name = text(port, "/name");
        if name.len() > 15 {
            let why = "must be no more than 15 characters";
            faults.push(FieldFault::invalid(format!("{field}.name"), &name.into(), why));
        } else if !name.is_empty() && !names.insert(name) {
            faults.push(FieldFault::duplicate(format!("{field}.name"), name));
        }
    }
}

fn check_mount<'a>(
    mount: &'a Value,
    field: &str,
    volumes: &HashSet<&str>,
    paths: &mut HashSet<&'a str>,
    faults: &mut Vec<FieldFault>,
) {
    let (name, path) = (text(mount, "/name"), text(mount, "/mountPath"));
    if name.is_empty() {
        faults.push(FieldFault::required(format!("{field}.name"), ""));
    } else if !volumes.contains(name) {
        faults.push(FieldFault::not_found(format!("{field}.name"), name));
    }
    if path.is_empty() {
        faults.push(FieldFault::required(format!("{field}.mountPath"), ""));
    } else if !paths.insert(path) {
        let why = "must be unique";
        faults.push(FieldFault::invalid(format!("{field}.mountPath"), &path.into(), why));
    }
    let sub = text(mount, "/subPath");
    if sub.starts_with('/') || sub.split('/').any(|part| part == "..") {
        let why = "must be a relative path and must not contain '..'";
        faults.push(FieldFault::invalid(format!("{field}.subPath"), &sub.into(), why));
    }
}

pub fn check_resources(container: &Value, field: &str, faults: &mut Vec<FieldFault>) {
    let resources = container.get("resources").unwrap_or(&Value::Null);
    for kind in ["limits", "requests"] {
        for (name, amount) in resources.get(kind).and_then(Value::as_object).into_iter().flatten() {
            let at = format!("{field}.{kind}[{name}]");
            let text = amount.as_str().unwrap_or_default();
            match parse_milli(text) {
                Err(_) if text.starts_with('-') => {
                    faults.push(FieldFault::invalid(at, amount, "must be greater than or equal to 0"));
                }
                // Texts that are no amounts are the schema's matter.
                Err(error) if error.why.contains("too large") => {
                    faults.push(FieldFault::invalid(at, amount, error.why));
                }
                Err(_) => {}
                Ok(request) if kind == "requests" => {
                    let limit = resources["limits"].get(name).and_then(Value::as_str);
                    let above = limit.and_then(|limit| parse_milli(limit).ok()).is_some_and(|limit| request > limit);
                    if let Some(limit) = limit.filter(|_| above) {
                        let why = format!("must be less than or equal to {name} limit of {limit}");
                        faults.push(FieldFault::invalid(format!("{field}.requests"), amount, &why));
                    }
                }
                Ok(_) => {}
            }
        }
    }
}
