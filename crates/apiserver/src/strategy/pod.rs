//! Pods: what is filled in, what may be changed, how they are deleted. Containers are checked in [`super::containers`],
//! what is allowed in [`super::security`].

use serde_json::{Value, json};

use super::{Strategy, annotations, containers, in_place, scheduling, security};
use crate::object::{list, object_at, text};
use crate::status::FieldFault;

/// Seconds between the wish to stop and the end, when a Pod does not say.
const GRACE: i64 = 30;

/// What is said where anything else of a Pod would change.
const FIXED: &str = "pod updates may not change fields other than `spec.containers[*].image`,\
    `spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing \
    tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

pub struct Pod;

impl Strategy for Pod {
    fn prepare_create(&self, value: &mut Value) {
        let spec = object_at(value, "spec");
        spec.remove("ephemeralContainers");
        // The old name of the field stays filled for old clients.
        let account = ["serviceAccountName", "serviceAccount"]
            .iter()
            .find_map(|key| spec.get(*key).and_then(Value::as_str).filter(|name| !name.is_empty()))
            .unwrap_or("default")
            .to_owned();
        spec.insert("serviceAccountName".into(), account.as_str().into());
        spec.insert("serviceAccount".into(), account.into());
        let class = spec.get("priorityClassName").and_then(Value::as_str).unwrap_or_default();
        let priority = scheduling::priority(class).unwrap_or_default();
        for (key, default) in [
            ("restartPolicy", json!("Always")),
            ("dnsPolicy", json!("ClusterFirst")),
            ("schedulerName", json!("default-scheduler")),
            ("terminationGracePeriodSeconds", json!(GRACE)),
            ("securityContext", json!({})),
            ("enableServiceLinks", json!(true)),
            ("preemptionPolicy", json!("PreemptLowerPriority")),
            ("priority", json!(priority)),
        ] {
            spec.entry(key).or_insert(default);
        }
        tolerate_bad_nodes(spec.entry("tolerations").or_insert_with(|| json!([])));
        for field in ["containers", "initContainers"] {
            let all = value.pointer_mut(&format!("/spec/{field}")).and_then(Value::as_array_mut);
            for container in all.into_iter().flatten() {
                containers::fill_in(container);
            }
        }
        let class = qos_class(value);
        object_at(value, "status").extend([("phase".into(), "Pending".into()), ("qosClass".into(), class.into())]);
        scheduling::begin(value);
    }

    fn prepare_update(&self, value: &mut Value, old: &Value) {
        // A manifest applied again leaves out what was filled in at creation.
        let (Some(spec), Some(before)) = (value.get_mut("spec").and_then(Value::as_object_mut), old.get("spec")) else {
            return;
        };
        for key in [
            "serviceAccountName",
            "serviceAccount",
            "nodeName",
            "restartPolicy",
            "dnsPolicy",
            "schedulerName",
            "terminationGracePeriodSeconds",
            "securityContext",
            "enableServiceLinks",
            "preemptionPolicy",
            "priority",
            "tolerations",
        ] {
            if let Some(part) = before.get(key) {
                spec.entry(key).or_insert_with(|| part.clone());
            }
        }
        tolerate_bad_nodes(spec.entry("tolerations").or_insert_with(|| json!([])));
        for field in ["containers", "initContainers"] {
            for container in spec.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten() {
                containers::fill_in(container);
            }
        }
        if let Some(debug) = spec.get_mut("ephemeralContainers") {
            in_place::fill_in_debug(debug);
        }
    }

    fn validate(&self, value: &Value, faults: &mut Vec<FieldFault>) {
        let Some(spec) = value.get("spec") else {
            return faults.push(FieldFault::required("spec", ""));
        };
        containers::validate(spec, faults);
        annotations::check(value, faults);
        scheduling::validate(spec, faults);
        let policy = text(spec, "/restartPolicy");
        let policies = ["Always", "OnFailure", "Never"];
        if !policies.contains(&policy) {
            faults.push(FieldFault::unsupported("spec.restartPolicy", policy, &policies));
        }
        let dns = text(spec, "/dnsPolicy");
        let words = ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"];
        if !words.contains(&dns) {
            faults.push(FieldFault::unsupported("spec.dnsPolicy", dns, &words));
        } else if dns == "None" && list(spec, "/dnsConfig/nameservers").is_empty() {
            let why = "must provide at least one DNS nameserver when `dnsPolicy` is None";
            faults.push(FieldFault::required("spec.dnsConfig.nameservers", why));
        }
        for (field, least) in [("terminationGracePeriodSeconds", 0), ("activeDeadlineSeconds", 1)] {
            if let Some(seconds) = spec.get(field).filter(|s| s.as_i64().is_some_and(|s| s < least)) {
                let why = format!("must be greater than or equal to {least}");
                faults.push(FieldFault::invalid(format!("spec.{field}"), seconds, &why));
            }
        }
        for (field, name) in [("hostname", text(spec, "/hostname")), ("subdomain", text(spec, "/subdomain"))] {
            if let Some(why) = super::metadata::label_fault(name).filter(|_| !name.is_empty()) {
                faults.push(FieldFault::invalid(format!("spec.{field}"), &name.into(), &why));
            }
        }
    }

    fn validate_update(&self, value: &Value, old: &Value, faults: &mut Vec<FieldFault>) {
        annotations::check_update(value, old, faults);
        let (Some(new), Some(before)) = (value.get("spec"), old.get("spec")) else { return };
        for field in ["containers", "initContainers"] {
            let count = |spec: &Value| list(spec, &format!("/{field}")).len();
            if count(new) != count(before) {
                let why = match field {
                    "containers" => "pod updates may not add or remove containers",
                    _ => "pod updates may not add or remove initContainers",
                };
                return faults.push(FieldFault::forbidden(format!("spec.{field}"), why));
            }
        }
        deadline_only_shrinks(new, before, faults);
        scheduling::gates_only_go(new, before, faults);
        if new == before || changeable_removed(new, before) == changeable_removed(before, before) {
            tolerations_only_grow(new, before, faults);
            grace_only_begins(new, before, faults);
            return;
        }
        faults.push(FieldFault::forbidden("spec", FIXED));
    }

    fn admit(&self, value: &Value) -> Result<(), String> {
        scheduling::admit(value).and_then(|()| security::admit(value))
    }

    fn grace(&self, value: &Value, asked: Option<i64>) -> i64 {
        let unbound = text(value, "/spec/nodeName").is_empty();
        if unbound || matches!(text(value, "/status/phase"), "Succeeded" | "Failed") {
            return 0;
        }
        let own = value.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(GRACE);
        asked.unwrap_or(own).max(0)
    }

    fn returns_deleted(&self) -> bool {
        true
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

/// A spec with what may be changed taken from `base`.
fn changeable_removed(spec: &Value, base: &Value) -> Value {
    let mut spec = spec.clone();
    for field in ["containers", "initContainers"] {
        for container in spec[field].as_array_mut().into_iter().flatten() {
            container["image"] = Value::Null;
        }
        if spec[field].is_null() {
            spec[field] = base[field].clone();
        }
    }
    for key in ["activeDeadlineSeconds", "tolerations", "schedulingGates"] {
        spec[key] = Value::Null;
    }
    let grace = |spec: &Value| spec["terminationGracePeriodSeconds"].as_i64();
    if grace(&spec) == Some(1) && grace(base).is_some_and(|before| before < 0) {
        spec["terminationGracePeriodSeconds"] = base["terminationGracePeriodSeconds"].clone();
    }
    spec
}

fn deadline_only_shrinks(new: &Value, before: &Value, faults: &mut Vec<FieldFault>) {
    let seconds = |spec: &Value| spec.get("activeDeadlineSeconds").and_then(Value::as_i64);
    let field = "spec.activeDeadlineSeconds";
    match (seconds(new), seconds(before)) {
        (Some(after), Some(before)) if after > before => {
            faults.push(FieldFault::invalid(field, &after.into(), "must be less than or equal to previous value"));
        }
        (None, Some(_)) => {
            let why = "must not update from a positive integer to nil value";
            faults.push(FieldFault::invalid(field, &Value::Null, why));
        }
        _ => {}
    }
}

fn tolerations_only_grow(new: &Value, before: &Value, faults: &mut Vec<FieldFault>) {
    let after = list(new, "/tolerations");
    if list(before, "/tolerations").iter().any(|toleration| !after.contains(toleration)) {
        let why = "existing toleration can not be modified except its tolerationSeconds";
        faults.push(FieldFault::forbidden("spec.tolerations", why));
    }
}

/// A grace that was never valid may become the shortest; no other changes.
fn grace_only_begins(new: &Value, before: &Value, faults: &mut Vec<FieldFault>) {
    let seconds = |spec: &Value| spec.get("terminationGracePeriodSeconds").and_then(Value::as_i64);
    let (before, now) = (seconds(before), seconds(new));
    if before != now && !(before.is_some_and(|before| before < 0) && now == Some(1)) {
        faults.push(FieldFault::forbidden("spec", FIXED));
    }
}

/// Five minutes on a node that does not answer, as every cluster gives.
fn tolerate_bad_nodes(tolerations: &mut Value) {
    let Some(all) = tolerations.as_array_mut() else { return };
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let covered = all.iter().any(|toleration| {
            let own = text(toleration, "/key");
            (own == key || (own.is_empty() && text(toleration, "/operator") == "Exists"))
                && matches!(text(toleration, "/effect"), "" | "NoExecute")
        });
        if !covered {
            all.push(json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}));
        }
    }
}

/// Quality of service: from requests and limits of CPU and memory of all containers.
pub fn qos_class(pod: &Value) -> &'static str {
    let mut any = false;
    let mut guaranteed = true;
    // Where the Pod says what it needs as a whole, that alone counts.
    let whole: Option<&Value> = pod.get("spec").filter(|spec| spec.get("resources").is_some());
    let each = list(pod, "/spec/containers").iter().chain(list(pod, "/spec/initContainers"));
    let all = whole.into_iter().chain(each.filter(|_| whole.is_none()));
    for container in all {
        for resource in ["cpu", "memory"] {
            let amount = |kind: &str| {
                let amount = container.pointer(&format!("/resources/{kind}/{resource}")).and_then(Value::as_str);
                amount.and_then(|text| joey_model::quantity::parse_milli(text).ok()).filter(|milli| *milli > 0)
            };
            let (request, limit) = (amount("requests"), amount("limits"));
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && request.is_none_or(|request| Some(request) == limit);
        }
    }
    match (any, guaranteed) {
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
        (false, _) => "BestEffort",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(spec: Value) -> Value {
        let mut value = json!({"metadata": {"name": "x"}, "spec": spec});
        Pod.prepare_create(&mut value);
        value
    }

    fn faults(value: &Value) -> Vec<String> {
        let mut faults = Vec::new();
        Pod.validate(value, &mut faults);
        faults.iter().map(|fault| format!("{}: {}", fault.field, fault.message)).collect()
    }

    #[test]
    fn all_faults_at_once() {
        let bad = pod(json!({"restartPolicy": "Sometimes", "terminationGracePeriodSeconds": -1, "containers": [
            {"name": "A_b"},
            {"name": "c", "image": "i", "volumeMounts": [{"name": "v", "mountPath": "/v"}],
             "ports": [{"containerPort": 70000}], "resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}},
            {"name": "c", "image": "i", "env": [{"name": "a=b"}]}]}));
        let found = faults(&bad).join("\n");
        for part in [
            "spec.containers[0].image: Required value",
            "spec.containers[0].name: Invalid value: \"A_b\"",
            "spec.containers[1].volumeMounts[0].name: Not found: \"v\"",
            "spec.containers[1].ports[0].containerPort: Invalid value: 70000",
            "spec.containers[1].resources.requests: Invalid value: \"2\"",
            "spec.containers[2].name: Duplicate value: \"c\"",
            "spec.containers[2].env[0].name",
            "spec.restartPolicy: Unsupported value: \"Sometimes\"",
            "spec.terminationGracePeriodSeconds: Invalid value: -1",
        ] {
            assert!(found.contains(part), "{part} in\n{found}");
        }
        assert_eq!(faults(&pod(json!({"containers": []}))), ["spec.containers: Required value"]);
        assert_eq!(faults(&pod(json!({"containers": [{"name": "a", "image": "b"}]}))), Vec::<String>::new());
    }

    #[test]
    fn quality_of_service() {
        let with = |resources: Value| pod(json!({"containers": [{"name": "a", "image": "b", "resources": resources}]}));
        for (resources, class) in [
            (json!({}), "BestEffort"),
            (json!({"limits": {"cpu": "1", "memory": "1Gi"}}), "Guaranteed"),
            (json!({"requests": {"cpu": "1"}}), "Burstable"),
        ] {
            assert_eq!(with(resources)["status"]["qosClass"], class);
        }
    }

    #[test]
    fn only_some_fields_change() {
        let old = pod(json!({"containers": [{"name": "a", "image": "b"}]}));
        let mut new = old.clone();
        new["spec"]["containers"][0]["image"] = "c".into();
        let mut faults = Vec::new();
        Pod.validate_update(&new, &old, &mut faults);
        assert_eq!(faults, []);
        new["spec"]["containers"][0]["command"] = json!(["x"]);
        Pod.validate_update(&new, &old, &mut faults);
        assert_eq!(faults[0].field, "spec");
        let said = |change: fn(&mut Value), old: &Value| {
            let (mut new, mut faults) = (old.clone(), Vec::new());
            change(&mut new["spec"]);
            Pod.validate_update(&new, old, &mut faults);
            faults.iter().map(|fault| fault.message.clone()).collect::<String>()
        };
        let mut bounded = old.clone();
        bounded["spec"]["activeDeadlineSeconds"] = 60.into();
        assert_eq!(said(|spec| spec["activeDeadlineSeconds"] = 60.into(), &old), "");
        assert_eq!(said(|spec| spec["activeDeadlineSeconds"] = 30.into(), &bounded), "");
        assert!(said(|spec| spec["activeDeadlineSeconds"] = 90.into(), &bounded).contains("previous value"));
        assert!(said(|spec| spec["terminationGracePeriodSeconds"] = 5.into(), &old).contains("may not change"));
        assert!(said(|spec| spec["ephemeralContainers"] = json!([{"name": "e"}]), &old).contains("may not change"));
        assert!(
            said(|spec| spec["containers"][0]["resources"] = json!({"limits": {"cpu": "1"}}), &old).contains("may not")
        );
    }

    #[test]
    fn grace() {
        let mut value = pod(json!({"containers": []}));
        assert_eq!(Pod.grace(&value, None), 0);
        value["spec"]["nodeName"] = "n".into();
        assert_eq!((Pod.grace(&value, None), Pod.grace(&value, Some(5))), (30, 5));
        value["status"]["phase"] = "Failed".into();
        assert_eq!(Pod.grace(&value, None), 0);
    }
}
