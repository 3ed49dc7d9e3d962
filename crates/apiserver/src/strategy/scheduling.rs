//! What a Pod says to the scheduler: gates, priority, terms about nodes and other Pods. Words are kube-apiserver's.

use serde_json::{Value, json};

use crate::object::{self, list, object_at, text};
use crate::status::FieldFault;

/// The priority of a class; every cluster has two, and here there are no others.
pub fn priority(class: &str) -> Option<i64> {
    match class {
        "" => Some(0),
        "system-cluster-critical" => Some(2_000_000_000),
        "system-node-critical" => Some(2_000_001_000),
        _ => None,
    }
}

/// A Pod with gates says from its beginning why it waits.
pub fn begin(pod: &mut Value) {
    if !list(pod, "/spec/schedulingGates").is_empty() {
        let condition = json!({"type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates", "lastTransitionTime": object::now()});
        object_at(pod, "status").insert("conditions".into(), json!([condition]));
    }
}

pub fn validate(spec: &Value, faults: &mut Vec<FieldFault>) {
    if !list(spec, "/schedulingGates").is_empty() && !text(spec, "/nodeName").is_empty() {
        let why = "cannot be set until all schedulingGates have been cleared";
        faults.push(FieldFault::forbidden("spec.nodeName", why));
    }
    for part in ["affinity", "topologySpreadConstraints"] {
        check_terms(&spec[part], &format!("spec.{part}"), faults);
    }
}

/// What the schema does not say of terms and selectors, at any depth: one that means nothing would hold nobody.
fn check_terms(part: &Value, at: &str, faults: &mut Vec<FieldFault>) {
    for (index, inner) in part.as_array().into_iter().flatten().enumerate() {
        check_terms(inner, &format!("{at}[{index}]"), faults);
    }
    for (key, inner) in part.as_object().into_iter().flatten() {
        let at = format!("{at}.{key}");
        match (key.as_str(), inner.as_str()) {
            ("operator", Some("In" | "NotIn" | "Exists" | "DoesNotExist")) | ("matchLabels", _) => {}
            ("operator", Some("Gt" | "Lt")) if at.contains(".nodeAffinity.") => {}
            ("operator", _) => faults.push(FieldFault::invalid(at, inner, "not a valid selector operator")),
            ("topologyKey", Some("")) => faults.push(FieldFault::required(at, "can not be empty")),
            _ => check_terms(inner, &at, faults),
        }
    }
}

/// Gates go, and none comes.
pub fn gates_only_go(new: &Value, before: &Value, faults: &mut Vec<FieldFault>) {
    let known = list(before, "/schedulingGates");
    for (index, gate) in list(new, "/schedulingGates").iter().enumerate().filter(|(_, gate)| !known.contains(gate)) {
        let why = format!("only deletion is allowed, but found new scheduling gate '{}'", text(gate, "/name"));
        faults.push(FieldFault::forbidden(format!("spec.schedulingGates[{index}].name"), &why));
    }
}

pub fn admit(pod: &Value) -> Result<(), String> {
    let class = text(pod, "/spec/priorityClassName");
    let wanted = priority(class).ok_or_else(|| {
        format!(
            "no PriorityClass with name {class} was found; there are system-node-critical and system-cluster-critical"
        )
    })?;
    if pod.pointer("/spec/schedulingGroup").is_some_and(|group| !group.is_null()) {
        let why =
            "spec.schedulingGroup is not supported: Pods are placed one by one; hold them back by schedulingGates";
        return Err(why.to_owned());
    }
    match pod.pointer("/spec/priority").and_then(Value::as_i64).filter(|given| *given != wanted) {
        None => Ok(()),
        Some(given) => Err(format!(
            "the integer value of priority ({given}) must not be provided in pod spec; priority admission controller \
             computed {wanted} from the given PriorityClass name"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_that_mean_nothing_are_told() {
        let greater = json!({"key": "operator", "operator": "Gt", "values": ["1"]});
        let selector = json!({"matchLabels": {"operator": "us"}, "matchExpressions": [greater]});
        let spec = json!({"nodeName": "n", "schedulingGates": [{"name": "g"}], "affinity": {
            "nodeAffinity": {"terms": [greater]}, "podAffinity": [{"labelSelector": selector, "topologyKey": ""}]}});
        let mut faults = Vec::new();
        validate(&spec, &mut faults);
        let fields: Vec<&str> = faults.iter().map(|fault| fault.field.trim_start_matches("spec.")).collect();
        let operator = "affinity.podAffinity[0].labelSelector.matchExpressions[0].operator";
        assert_eq!(fields, ["nodeName", operator, "affinity.podAffinity[0].topologyKey"]);
    }

    #[test]
    fn priority_is_that_of_the_class() {
        let said = |spec: Value| admit(&json!({"spec": spec})).err().unwrap_or_default();
        assert_eq!(said(json!({"priorityClassName": "system-node-critical", "priority": 2_000_001_000})), "");
        assert!(said(json!({"priority": 5})).contains("computed 0 from"));
        assert!(said(json!({"schedulingGroup": {"podGroupName": "g"}})).contains("schedulingGates"));
    }
}
