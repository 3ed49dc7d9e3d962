//! A container's variables: literal values, ConfigMaps, Secrets, the Pod's own fields and resources.

use joey_api::instance::EnvVar;
use joey_model::quantity::parse_milli;
use k8s_openapi::api::core::v1 as core;

use crate::Notes;
use crate::node::Node;
use crate::objects::{Kind, Objects};

/// Every variable in order, envFrom first, as the kubelet builds them.
pub(crate) fn environment(
    pod: &core::Pod,
    spec: &core::PodSpec,
    container: &core::Container,
    objects: &Objects,
    node: &Node,
    notes: &mut Notes,
) -> Vec<EnvVar> {
    let mut variables: Vec<EnvVar> = Vec::new();
    // First, so that the Pod's own variables may refer to them and come before them.
    for (name, value) in &objects.services {
        put(&mut variables, name.clone(), literal(value));
    }
    for core::EnvFromSource { config_map_ref, prefix, secret_ref } in container.env_from.iter().flatten() {
        let prefix = prefix.as_deref().unwrap_or_default();
        let mut add = |kind, name: &str, optional: Option<bool>| {
            for (key, value) in
                notes.found(pod, &container.name, objects.all(kind, name, optional)).into_iter().flatten()
            {
                if let Ok(value) = String::from_utf8(value) {
                    put(&mut variables, format!("{prefix}{key}"), literal(&value));
                }
            }
        };
        if let Some(reference) = config_map_ref {
            add(Kind::ConfigMap, &reference.name, reference.optional);
        }
        if let Some(reference) = secret_ref {
            add(Kind::Secret, &reference.name, reference.optional);
        }
    }
    for core::EnvVar { name, value, value_from } in container.env.iter().flatten() {
        let Some(source) = value_from else {
            put(&mut variables, name.clone(), value.clone().unwrap_or_default());
            continue;
        };
        let core::EnvVarSource { config_map_key_ref, field_ref, file_key_ref, resource_field_ref, secret_key_ref } =
            source;
        let at = || format!("container \"{}\": variable \"{name}\"", container.name);
        notes.refuse_if(file_key_ref.is_some(), format!("{}: fileKeyRef", at()), "use a ConfigMap or Secret");
        let found = if let Some(key) = config_map_key_ref {
            notes.found(pod, &container.name, objects.one(Kind::ConfigMap, &key.name, &key.key, key.optional)).flatten()
        } else if let Some(key) = secret_key_ref {
            notes.found(pod, &container.name, objects.one(Kind::Secret, &key.name, &key.key, key.optional)).flatten()
        } else if let Some(field) = field_ref {
            if matches!(field.field_path.as_str(), "status.podIP" | "status.podIPs") {
                variables.retain(|variable| variable.name != *name);
                variables.push(EnvVar { name: name.clone(), value: None, address: true });
                continue;
            }
            let value = pod_field(pod, spec, &field.field_path, node);
            notes.refuse_if(value.is_none(), format!("{}: field {}", at(), field.field_path), "give the value itself");
            value.map(String::into_bytes)
        } else if let Some(field) = resource_field_ref {
            let value = resource_field(spec, Some(container), field, objects);
            notes.refuse_if(value.is_none(), format!("{}: resource {}", at(), field.resource), "give the value itself");
            value.map(String::into_bytes)
        } else {
            None
        };
        if let Some(value) = found {
            put(&mut variables, name.clone(), literal(&String::from_utf8_lossy(&value)));
        }
    }
    variables
}

fn put(variables: &mut Vec<EnvVar>, name: String, value: String) {
    match variables.iter_mut().find(|variable| variable.name == name) {
        Some(variable) => *variable = EnvVar { name, value: Some(value), address: false },
        None => variables.push(EnvVar { name, value: Some(value), address: false }),
    }
}

/// A value that must arrive as it is: `$(X)` in it is no reference.
fn literal(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    let mut rest = value.chars().peekable();
    while let Some(c) = rest.next() {
        text.push(c);
        if c == '$' && matches!(rest.peek(), Some('(' | '$')) {
            text.push('$');
        }
    }
    text
}

/// A field of the Pod by its path (the list of the downward API); `None`: it cannot be referred to.
pub(crate) fn pod_field(pod: &core::Pod, spec: &core::PodSpec, path: &str, node: &Node) -> Option<String> {
    let metadata = &pod.metadata;
    let keyed = |rest: &str, map: &Option<std::collections::BTreeMap<String, String>>| {
        let key = rest.strip_prefix("['").and_then(|rest| rest.strip_suffix("']"))?;
        Some(map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default())
    };
    let text = |value: &Option<String>| Some(value.clone().unwrap_or_default());
    match path {
        "metadata.name" => text(&metadata.name),
        "metadata.namespace" => text(&metadata.namespace),
        "metadata.uid" => text(&metadata.uid),
        "metadata.labels" => Some(lines(&metadata.labels)),
        "metadata.annotations" => Some(lines(&metadata.annotations)),
        "spec.nodeName" => text(&spec.node_name),
        "spec.serviceAccountName" => text(&spec.service_account_name),
        "status.hostIP" | "status.hostIPs" => Some(node.address.to_string()),
        _ => match path.strip_prefix("metadata.labels") {
            Some(rest) => keyed(rest, &metadata.labels),
            None => keyed(path.strip_prefix("metadata.annotations")?, &metadata.annotations),
        },
    }
}

fn lines(map: &Option<std::collections::BTreeMap<String, String>>) -> String {
    let all: Vec<String> = map.iter().flatten().map(|(key, value)| format!("{key}={value:?}")).collect();
    all.join("\n")
}

/// An amount of a container's resources in units of the divisor, rounded up; a limit that is not set is the node's capacity.
pub(crate) fn resource_field(
    spec: &core::PodSpec,
    own: Option<&core::Container>,
    field: &core::ResourceFieldSelector,
    objects: &Objects,
) -> Option<String> {
    let container = match &field.container_name {
        Some(name) => crate::all_containers(spec).find(|(_, container)| container.name == *name)?.1,
        None => own?,
    };
    let (list, name) = field.resource.split_once('.')?;
    let resources = container.resources.clone().unwrap_or_default();
    let amounts = match list {
        "limits" => resources.limits,
        "requests" => resources.requests,
        _ => return None,
    };
    let milli = match amounts.as_ref().and_then(|amounts| amounts.get(name)) {
        Some(amount) => parse_milli(&amount.0).ok()?,
        None => match (list, name) {
            ("requests", _) => 0,
            (_, "cpu") => objects.node_cpu_milli,
            (_, "memory") => objects.node_memory_bytes.saturating_mul(1000),
            _ => return None,
        },
    };
    let divisor = match field.divisor.as_ref().map(|divisor| divisor.0.as_str()) {
        None | Some("" | "0") => 1000,
        Some(text) => parse_milli(text).ok()?.max(1),
    };
    Some(milli.div_ceil(divisor).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_are_not_expanded() {
        assert_eq!(literal("a$b"), "a$b");
        assert_eq!(literal("$(A)"), "$$(A)");
        assert_eq!(literal("$$(A)$"), "$$$$(A)$");
    }
}
