//! Hooks that a Pod's annotations name (`joey_api::hooks`): each must be one, for a container that serves, and stays what it is.

use joey_api::hooks;
use joey_api::lifecycle::Role;
use serde_json::Value;

use crate::object::{list, text};
use crate::status::FieldFault;

fn annotations(pod: &Value) -> impl Iterator<Item = (&str, &str)> {
    let all = pod.pointer("/metadata/annotations").and_then(Value::as_object).into_iter().flatten();
    all.filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
}

pub fn check(pod: &Value, faults: &mut Vec<FieldFault>) {
    let inits = list(pod, "/spec/initContainers").iter().map(|container| {
        let sidecar = text(container, "/restartPolicy") == "Always";
        (text(container, "/name"), if sidecar { Role::Sidecar } else { Role::Init })
    });
    let mains = list(pod, "/spec/containers").iter().map(|container| (text(container, "/name"), Role::Main));
    let containers: Vec<_> = inits.chain(mains).collect();
    for (key, why) in hooks::faults(annotations(pod), &containers) {
        let value = annotations(pod).find(|(known, _)| *known == key).map_or("", |(_, value)| value);
        faults.push(FieldFault::invalid(format!("metadata.annotations[{key}]"), &value.into(), &why));
    }
}

/// A Pod's containers know their hooks from its beginning; what would not be heeded is not taken.
pub fn check_update(pod: &Value, old: &Value, faults: &mut Vec<FieldFault>) {
    let of = |value: &Value, other: &Value| -> Vec<String> {
        let others: Vec<_> = annotations(other).collect();
        let own = annotations(value).filter(|(key, _)| hooks::is_hook(key));
        own.filter(|one| !others.contains(one)).map(|(key, _)| key.to_owned()).collect()
    };
    let mut changed = of(pod, old);
    changed.extend(of(old, pod));
    changed.sort();
    changed.dedup();
    for key in changed {
        let why = "hooks of a Pod may not change; delete it and create it with others";
        faults.push(FieldFault::forbidden(format!("metadata.annotations[{key}]"), why));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn hooks_are_checked_and_stay() {
        let pod = |annotations: Value| {
            json!({"metadata": {"annotations": annotations}, "spec": {
                "initContainers": [{"name": "once"}, {"name": "side", "restartPolicy": "Always"}],
                "containers": [{"name": "web"}]}})
        };
        let told = |faults: Vec<FieldFault>| -> Vec<String> {
            faults.iter().map(|fault| format!("{}: {}", fault.field, fault.message)).collect()
        };
        let bad = pod(
            json!({"joey.dev/pre-start.once": "true", "joey.dev/pre-online.web": "[", "joey.dev/pre-start.side": "true"}),
        );
        let mut faults = Vec::new();
        check(&bad, &mut faults);
        let found = told(faults).join("\n");
        assert!(found.contains("metadata.annotations[joey.dev/pre-start.once]: Invalid value: \"true\""), "{found}");
        assert!(found.contains("JSON") && !found.contains("side"), "{found}");
        let (before, mut faults) = (pod(json!({"a": "1", "joey.dev/pre-start.web": "true"})), Vec::new());
        check_update(&pod(json!({"a": "2", "joey.dev/pre-start.web": "true"})), &before, &mut faults);
        assert_eq!(told(std::mem::take(&mut faults)), Vec::<String>::new());
        check_update(&pod(json!({"joey.dev/pre-start.web": "false"})), &before, &mut faults);
        check_update(&pod(json!({})), &before, &mut faults);
        assert_eq!(faults.len(), 2, "{:?}", told(faults));
    }
}
