//! What of a Pod changes in place: its debug (ephemeral) containers and its resources, each through a subresource of its own.
//! All else of the request is left aside, as kube-apiserver does; words are kube-apiserver's.

use std::collections::HashSet;

use joey_model::quantity::parse_milli;
use serde_json::{Value, json};

use super::metadata::label_fault;
use super::{containers, pod};
use crate::object::{list, object_at, text};
use crate::status::FieldFault;

/// Fields that a debug container cannot have: it is not restarted, and its Pod's place is taken already.
const NOT_FOR_DEBUG: [&str; 8] = [
    "ports",
    "livenessProbe",
    "readinessProbe",
    "startupProbe",
    "lifecycle",
    "resources",
    "resizePolicy",
    "restartPolicy",
];

/// The Pod with the debug containers of `wanted` and nothing else of it.
pub fn take_debug(old: &Value, wanted: &Value) -> Value {
    let mut value = old.clone();
    let mut all = wanted.pointer("/spec/ephemeralContainers").cloned().unwrap_or_else(|| json!([]));
    fill_in_debug(&mut all);
    match list(&json!({"all": all}), "/all").is_empty() {
        true => drop(object_at(&mut value, "spec").remove("ephemeralContainers")),
        false => drop(object_at(&mut value, "spec").insert("ephemeralContainers".into(), all)),
    }
    value
}

/// Fills in debug containers as they are kept, whoever sends them: there are no resources of theirs.
pub fn fill_in_debug(all: &mut Value) {
    for container in all.as_array_mut().into_iter().flatten() {
        containers::fill_in(container);
        if let Some(map) = container.as_object_mut()
            && map.get("resources") == Some(&json!({}))
        {
            map.remove("resources");
        }
    }
}

/// What is wrong with the debug containers, and with what became of those that were there.
pub fn check_debug(value: &Value, old: &Value, faults: &mut Vec<FieldFault>) {
    let field = "spec.ephemeralContainers";
    let all = list(value, "/spec/ephemeralContainers");
    for before in list(old, "/spec/ephemeralContainers") {
        let name = text(before, "/name");
        match all.iter().find(|now| text(now, "/name") == name) {
            None => {
                let why = format!("existing ephemeral containers \"{name}\" may not be removed\n");
                faults.push(FieldFault::forbidden(field, &why));
            }
            Some(now) if now != before => {
                let why = format!("existing ephemeral containers \"{name}\" may not be changed\n");
                faults.push(FieldFault::forbidden(field, &why));
            }
            Some(_) => {}
        }
    }
    let mut main = HashSet::new();
    for kind in ["initContainers", "containers"] {
        main.extend(list(value, &format!("/spec/{kind}")).iter().map(|container| text(container, "/name")));
    }
    let mut names = main.clone();
    let volumes: HashSet<&str> = list(value, "/spec/volumes").iter().map(|volume| text(volume, "/name")).collect();
    for (index, container) in all.iter().enumerate() {
        let at = format!("{field}[{index}]");
        let name = text(container, "/name");
        match label_fault(name) {
            _ if name.is_empty() => faults.push(FieldFault::required(format!("{at}.name"), "")),
            Some(why) => faults.push(FieldFault::invalid(format!("{at}.name"), &name.into(), &why)),
            None if !names.insert(name) => faults.push(FieldFault::duplicate(format!("{at}.name"), name)),
            None => {}
        }
        for forbidden in NOT_FOR_DEBUG {
            let given = container.get(forbidden).is_some_and(|value| !value.is_null());
            if given {
                let why = "cannot be set for an Ephemeral Container";
                faults.push(FieldFault::forbidden(format!("{at}.{forbidden}"), why));
            }
        }
        let target = text(container, "/targetContainerName");
        if !target.is_empty() && !main.contains(target) {
            faults.push(FieldFault::not_found(format!("{at}.targetContainerName"), target));
        }
        containers::check_container(container, &at, &volumes, faults);
    }
}

/// The Pod with the resources of `wanted`, those of the whole only to be told that they may not change, and nothing else of it.
pub fn take_resources(old: &Value, wanted: &Value) -> Value {
    let mut value = old.clone();
    match wanted.pointer("/spec/resources") {
        Some(whole) => drop(object_at(&mut value, "spec").insert("resources".into(), whole.clone())),
        None => drop(object_at(&mut value, "spec").remove("resources")),
    }
    for kind in ["containers", "initContainers"] {
        let given = list(wanted, &format!("/spec/{kind}"));
        for container in value["spec"].get_mut(kind).and_then(Value::as_array_mut).into_iter().flatten() {
            let Some(own) = given.iter().find(|own| own["name"] == container["name"]) else { continue };
            for key in ["resources", "resizePolicy"] {
                match own.get(key) {
                    Some(part) => container[key] = part.clone(),
                    None => drop(container.as_object_mut().map(|map| map.remove(key))),
                }
            }
            containers::fill_in(container);
        }
    }
    value
}

/// What is wrong with resources that change.
pub fn check_resources(value: &Value, old: &Value, faults: &mut Vec<FieldFault>) {
    if matches!(text(old, "/status/phase"), "Succeeded" | "Failed") {
        faults.push(FieldFault::forbidden("metadata", "pods that have ended cannot be resized"));
    }
    if value["spec"]["resources"] != old["spec"]["resources"] {
        let why = "the resources of a Pod as a whole may not change; change those of its containers, or delete the Pod and create it \
                   with others";
        return faults.push(FieldFault::forbidden("spec.resources", why));
    }
    if pod::qos_class(value) != text(old, "/status/qosClass") {
        let why = "Pod QOS Class may not change as a result of resizing";
        faults.push(FieldFault::invalid("spec", &pod::qos_class(value).into(), why));
    }
    for kind in ["containers", "initContainers"] {
        for (index, now) in list(value, &format!("/spec/{kind}")).iter().enumerate() {
            let before = &list(old, &format!("/spec/{kind}"))[index];
            let at = format!("spec.{kind}[{index}]");
            if now["resources"] != before["resources"] && kind == "initContainers" && now["restartPolicy"] != "Always" {
                let why = "only cpu and memory resources for sidecar containers are mutable";
                faults.push(FieldFault::forbidden(at.as_str(), why));
            }
            check_amounts(now, before, &at, faults);
            containers::check_resources(now, &format!("{at}.resources"), faults);
        }
    }
}

fn check_amounts(now: &Value, before: &Value, at: &str, faults: &mut Vec<FieldFault>) {
    let amounts =
        |container: &Value, kind: &str| container.pointer(&format!("/resources/{kind}")).cloned().unwrap_or_default();
    for kind in ["limits", "requests"] {
        let (now, before) = (amounts(now, kind), amounts(before, kind));
        let names = |amounts: &Value| {
            amounts.as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect::<HashSet<_>>()
        };
        let (now_has, before_has) = (names(&now), names(&before));
        for name in now_has.union(&before_has) {
            let same = match (&now[name], &before[name]) {
                (Value::String(a), Value::String(b)) => parse_milli(a).ok() == parse_milli(b).ok(),
                (a, b) => a == b,
            };
            if !same && !matches!(name.as_str(), "cpu" | "memory") {
                faults.push(FieldFault::forbidden(at, "only cpu and memory resources are mutable"));
            }
            if !now_has.contains(name) {
                let why = format!("resource {kind} cannot be removed");
                faults.push(FieldFault::forbidden(format!("{at}.resources.{kind}"), &why));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::strategy::Strategy;

    fn pod(resources: Value) -> Value {
        let mut value = json!({"metadata": {"name": "x"}, "spec": {"containers": [
            {"name": "a", "image": "b", "resources": resources}]}});
        pod::Pod.prepare_create(&mut value);
        value
    }

    fn messages(faults: &[FieldFault]) -> String {
        faults.iter().map(|fault| format!("{}: {}\n", fault.field, fault.message)).collect()
    }

    #[test]
    fn debug_containers_are_added_and_stay() {
        let old = pod(json!({}));
        let mut wanted = old.clone();
        wanted["spec"]["ephemeralContainers"] = json!([{"name": "look", "image": "tools", "targetContainerName": "a"}]);
        wanted["spec"]["containers"][0]["command"] = json!(["x"]);
        let value = take_debug(&old, &wanted);
        assert!(value.pointer("/spec/containers/0/command").is_none(), "nothing else is taken");
        let mut faults = Vec::new();
        check_debug(&value, &old, &mut faults);
        assert_eq!(messages(&faults), "");
        assert_eq!(value.pointer("/spec/ephemeralContainers/0/imagePullPolicy"), Some(&json!("Always")));

        let gone = take_debug(&value, &old);
        check_debug(&gone, &value, &mut faults);
        assert!(messages(&faults).contains("\"look\" may not be removed"), "{}", messages(&faults));
        let mut bad = value.clone();
        bad["spec"]["ephemeralContainers"] = json!([{"name": "a", "ports": [{"containerPort": 1}], "targetContainerName": "z",
            "image": "i"}]);
        let mut faults = Vec::new();
        check_debug(&take_debug(&old, &bad), &old, &mut faults);
        for part in
            ["Duplicate value: \"a\"", "ports: Forbidden: cannot be set", "targetContainerName: Not found: \"z\""]
        {
            assert!(messages(&faults).contains(part), "{part} in {}", messages(&faults));
        }
    }

    #[test]
    fn resources_change_within_their_class() {
        let old = pod(json!({"limits": {"cpu": "1", "memory": "64Mi"}}));
        let resized = |resources: Value| {
            let mut wanted = old.clone();
            wanted["spec"]["containers"][0]["resources"] = resources;
            wanted["spec"]["containers"][0]["image"] = "other".into();
            let value = take_resources(&old, &wanted);
            let mut faults = Vec::new();
            check_resources(&value, &old, &mut faults);
            (value, messages(&faults))
        };
        let same = json!({"cpu": "2", "memory": "128Mi"});
        let (value, faults) = resized(json!({"limits": same, "requests": same}));
        assert_eq!(faults, "");
        assert_eq!(value["spec"]["containers"][0]["image"], "b", "nothing else is taken");
        let (_, faults) =
            resized(json!({"limits": {"cpu": "2", "memory": "64Mi"}, "requests": {"cpu": "1", "memory": "64Mi"}}));
        assert!(faults.contains("QOS Class may not change"), "{faults}");
        let (_, faults) = resized(json!({"limits": {"cpu": "1"}, "requests": {"cpu": "1"}}));
        assert!(faults.contains("cannot be removed"), "{faults}");
        let (mut wanted, mut faults) = (old.clone(), Vec::new());
        wanted["spec"]["resources"] = json!({"limits": {"memory": "1Gi"}});
        check_resources(&take_resources(&old, &wanted), &old, &mut faults);
        assert!(messages(&faults).contains("as a whole may not change"), "{}", messages(&faults));
    }
}
