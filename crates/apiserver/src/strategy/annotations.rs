//! What a Pod's annotations ask of Joey (`joey_api::annotations`): it stays what it is, and each hook must be one, for a container
//! that serves.

use joey_api::annotations::{FIXED, changed};
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

/// What would not be heeded is not taken.
pub fn check_update(pod: &Value, old: &Value, faults: &mut Vec<FieldFault>) {
    for key in changed(annotations(old), annotations(pod)) {
        faults.push(FieldFault::forbidden(format!("metadata.annotations[{key}]"), FIXED));
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
        check_update(&pod(json!({"a": "2", "joey.dev/pids": "9"})), &before, &mut faults);
        let found = told(faults);
        assert!(found.len() == 2 && found[0].contains("[joey.dev/pids]: Forbidden: it is read"), "{found:?}");
    }
}
