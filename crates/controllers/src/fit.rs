//! Whether a Pod fits a node: readiness, selectors, affinity, taints, room. Pure functions; the words are kube-scheduler's.

use std::collections::BTreeMap;

use joey_model::quantity::{parse_milli, parse_units};
use k8s_openapi::api::core::v1::{
    Container, Node, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec, Taint, Toleration,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// What Pods ask for, or a node offers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Room {
    /// Thousandths of a core.
    pub(crate) cpu: u64,
    /// Bytes.
    pub(crate) memory: u64,
    /// Bytes of the disk (`ephemeral-storage`).
    pub(crate) storage: u64,
    pub(crate) pods: u64,
}

impl Room {
    pub(crate) fn add(&mut self, other: Room) {
        self.cpu = self.cpu.saturating_add(other.cpu);
        self.memory = self.memory.saturating_add(other.memory);
        self.storage = self.storage.saturating_add(other.storage);
        self.pods += other.pods;
    }

    pub(crate) fn remove(&mut self, other: Room) {
        self.cpu = self.cpu.saturating_sub(other.cpu);
        self.memory = self.memory.saturating_sub(other.memory);
        self.storage = self.storage.saturating_sub(other.storage);
        self.pods = self.pods.saturating_sub(other.pods);
    }

    /// The larger of each amount.
    fn grow_to(&mut self, other: Room) {
        self.cpu = self.cpu.max(other.cpu);
        self.memory = self.memory.max(other.memory);
        self.storage = self.storage.max(other.storage);
    }
}

/// The requests of a Pod: those of what runs at once, which is its containers and sidecars, or each init container and the sidecars
/// before it. What is said of the Pod as a whole counts before that of its containers; its overhead comes on top.
pub(crate) fn requests(spec: &PodSpec) -> Room {
    let of = |container: &Container| amounts(container.resources.as_ref().and_then(|own| own.requests.as_ref()));
    let (mut sidecars, mut start) = (Room::default(), Room::default());
    for container in spec.init_containers.iter().flatten() {
        let mut at_once = sidecars;
        at_once.add(of(container));
        if container.restart_policy.as_deref() == Some("Always") {
            sidecars = at_once;
        }
        start.grow_to(at_once);
    }
    let mut sum = sidecars;
    for container in &spec.containers {
        sum.add(of(container));
    }
    sum.grow_to(start);
    let whole = spec.resources.as_ref();
    // A limit of the whole is its request where nobody asks for that.
    for (said, counts) in [
        (whole.and_then(|whole| whole.limits.as_ref()), [sum.cpu == 0, sum.memory == 0]),
        (whole.and_then(|whole| whole.requests.as_ref()), [true, true]),
    ] {
        let has = |name: &str| said.is_some_and(|said| said.contains_key(name));
        if counts[0] && has("cpu") {
            sum.cpu = amounts(said).cpu;
        }
        if counts[1] && has("memory") {
            sum.memory = amounts(said).memory;
        }
    }
    sum.add(amounts(spec.overhead.as_ref()));
    Room { pods: 1, ..sum }
}

fn amounts(said: Option<&BTreeMap<String, Quantity>>) -> Room {
    Room {
        cpu: amount(said, "cpu", parse_milli),
        memory: amount(said, "memory", parse_units),
        storage: amount(said, "ephemeral-storage", parse_units),
        pods: 0,
    }
}

/// What a node can give to Pods. A node that states no number of Pods takes the kubelet's default of 110; one that states no disk
/// is not asked about it.
pub(crate) fn allocatable(node: &Node) -> Room {
    let offered = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
    let stated = |name: &str, otherwise: u64| match offered.is_some_and(|offered| offered.contains_key(name)) {
        true => amount(offered, name, parse_units),
        false => otherwise,
    };
    Room { pods: stated("pods", 110), storage: stated("ephemeral-storage", u64::MAX), ..amounts(offered) }
}

fn amount<E>(amounts: Option<&BTreeMap<String, Quantity>>, name: &str, parse: fn(&str) -> Result<u64, E>) -> u64 {
    // The API server has checked amounts; one it could not read asks for nothing.
    amounts.and_then(|amounts| amounts.get(name)).and_then(|quantity| parse(&quantity.0).ok()).unwrap_or(0)
}

/// Why `pod` cannot run on `node`, of which `used` is taken; `None`: it can.
pub(crate) fn obstacle(pod: &Pod, node: &Node, used: Room) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    if !is_ready(node) {
        return Some("node(s) were not ready".to_owned());
    }
    if node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) {
        return Some("node(s) were unschedulable".to_owned());
    }
    if !selector_matches(spec, node) {
        return Some("node(s) didn't match Pod's node affinity/selector".to_owned());
    }
    if let Some(taint) = untolerated(spec, node) {
        let value = taint.value.as_deref().unwrap_or_default();
        return Some(format!("node(s) had untolerated taint {{{}: {value}}}", taint.key));
    }
    let (wanted, offered) = (requests(spec), allocatable(node));
    if used.pods + wanted.pods > offered.pods {
        return Some("Too many pods".to_owned());
    }
    if wanted.cpu > 0 && used.cpu.saturating_add(wanted.cpu) > offered.cpu {
        return Some("Insufficient cpu".to_owned());
    }
    if wanted.memory > 0 && used.memory.saturating_add(wanted.memory) > offered.memory {
        return Some("Insufficient memory".to_owned());
    }
    if wanted.storage > 0 && used.storage.saturating_add(wanted.storage) > offered.storage {
        return Some("Insufficient ephemeral-storage".to_owned());
    }
    None
}

/// What a Pod prefers of a node, as the sum of the weights of the terms that fit.
pub(crate) fn wishes(pod: &Pod, node: &Node) -> i64 {
    let empty = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref()?.node_affinity.as_ref());
    let preferred = affinity.and_then(|own| own.preferred_during_scheduling_ignored_during_execution.as_ref());
    let fitting = preferred.into_iter().flatten().filter(|wish| term_matches(&wish.preference, node, labels));
    fitting.map(|wish| i64::from(wish.weight)).sum()
}

/// `0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable.`
pub(crate) fn explain(nodes: usize, obstacles: &[String]) -> String {
    let mut counts = BTreeMap::<&str, usize>::new();
    for obstacle in obstacles {
        *counts.entry(obstacle).or_default() += 1;
    }
    let parts: Vec<String> = counts.iter().map(|(obstacle, count)| format!("{count} {obstacle}")).collect();
    match parts.is_empty() {
        true => "no nodes available to schedule pods".to_owned(),
        false => format!("0/{nodes} nodes are available: {}.", parts.join(", ")),
    }
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

pub(crate) fn selector_matches(spec: &PodSpec, node: &Node) -> bool {
    let empty = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let selected =
        spec.node_selector.iter().flatten().all(|(key, value)| labels.get(key).is_some_and(|found| found == value));
    let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity.and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    selected
        && required
            .is_none_or(|required| required.node_selector_terms.iter().any(|term| term_matches(term, node, labels)))
}

fn term_matches(term: &NodeSelectorTerm, node: &Node, labels: &BTreeMap<String, String>) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    // A term without any requirement matches nothing (Kubernetes' API reference, NodeSelectorTerm).
    !(expressions.is_empty() && fields.is_empty())
        && expressions.iter().all(|wanted| requirement_holds(wanted, labels.get(&wanted.key).map(String::as_str)))
        && fields
            .iter()
            .all(|wanted| wanted.key == "metadata.name" && requirement_holds(wanted, node.metadata.name.as_deref()))
}

fn requirement_holds(wanted: &NodeSelectorRequirement, found: Option<&str>) -> bool {
    let values = wanted.values.as_deref().unwrap_or_default();
    let listed = || found.is_some_and(|found| values.iter().any(|value| value == found));
    let compared = |holds: fn(i64, i64) -> bool| {
        let found = found.and_then(|found| found.parse().ok());
        let bound = values.first().and_then(|value| value.parse().ok());
        matches!((found, bound), (Some(found), Some(bound)) if holds(found, bound))
    };
    match wanted.operator.as_str() {
        "In" => listed(),
        "NotIn" => !listed(),
        "Exists" => found.is_some(),
        "DoesNotExist" => found.is_none(),
        "Gt" => compared(|found, bound| found > bound),
        "Lt" => compared(|found, bound| found < bound),
        _ => false,
    }
}

pub(crate) fn untolerated<'a>(spec: &PodSpec, node: &'a Node) -> Option<&'a Taint> {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let tolerations = spec.tolerations.as_deref().unwrap_or_default();
    taints
        .iter()
        .filter(|taint| taint.effect != "PreferNoSchedule")
        .find(|taint| !tolerations.iter().any(|toleration| tolerates(toleration, taint)))
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let key = toleration.key.as_deref().unwrap_or_default();
    let exists = toleration.operator.as_deref() == Some("Exists");
    (effect.is_empty() || effect == taint.effect)
        && (key == taint.key || (key.is_empty() && exists))
        && (exists || toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(change: impl FnOnce(&mut Value)) -> Node {
        let mut value = json!({
            "metadata": {"name": "joey", "labels": {"zone": "a", "size": "7"}}, "spec": {},
            "status": {"conditions": [{"type": "Ready", "status": "True"}],
                       "allocatable": {"cpu": "2", "memory": "1Gi", "pods": "3"}}
        });
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    fn pod(spec: Value) -> Pod {
        let mut value = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c"}]}});
        value["spec"].as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn ready_and_schedulable() {
        assert_eq!(obstacle(&pod(json!({})), &node(|_| ()), Room::default()), None);
        let away = node(|node| node["status"]["conditions"][0]["status"] = "Unknown".into());
        assert!(obstacle(&pod(json!({})), &away, Room::default()).unwrap().contains("not ready"));
        let cordoned = node(|node| node["spec"]["unschedulable"] = true.into());
        assert!(obstacle(&pod(json!({})), &cordoned, Room::default()).unwrap().contains("unschedulable"));
    }

    #[test]
    fn selectors_and_affinity() {
        let affinity = |expression: Value| {
            pod(json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
                {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}}}}))
        };
        let matching = [
            pod(json!({"nodeSelector": {"zone": "a"}})),
            affinity(json!({"key": "zone", "operator": "In", "values": ["b", "a"]})),
            affinity(json!({"key": "other", "operator": "NotIn", "values": ["a"]})),
            affinity(json!({"key": "size", "operator": "Gt", "values": ["6"]})),
            affinity(json!({"key": "other", "operator": "DoesNotExist"})),
        ];
        for pod in matching {
            assert_eq!(obstacle(&pod, &node(|_| ()), Room::default()), None, "{pod:?}");
        }
        let others = [
            pod(json!({"nodeSelector": {"zone": "b"}})),
            affinity(json!({"key": "zone", "operator": "NotIn", "values": ["a"]})),
            affinity(json!({"key": "size", "operator": "Lt", "values": ["7"]})),
            affinity(json!({"key": "zone", "operator": "Near", "values": ["a"]})),
        ];
        for pod in others {
            assert!(obstacle(&pod, &node(|_| ()), Room::default()).unwrap().contains("affinity/selector"), "{pod:?}");
        }
    }

    #[test]
    fn taints() {
        let tainted = node(|node| node["spec"]["taints"] = json!([{"key": "k", "value": "v", "effect": "NoSchedule"}]));
        let refused = obstacle(&pod(json!({})), &tainted, Room::default()).unwrap();
        assert_eq!(refused, "node(s) had untolerated taint {k: v}");
        for toleration in [json!({"operator": "Exists"}), json!({"key": "k", "value": "v", "effect": "NoSchedule"})] {
            let tolerant = pod(json!({"tolerations": [toleration]}));
            assert_eq!(obstacle(&tolerant, &tainted, Room::default()), None);
        }
        let wrong = pod(json!({"tolerations": [{"key": "k", "value": "w"}]}));
        assert!(obstacle(&wrong, &tainted, Room::default()).is_some());
    }

    #[test]
    fn room() {
        let big = pod(json!({"containers": [
            {"name": "a", "resources": {"requests": {"cpu": "1500m", "memory": "512Mi"}}},
            {"name": "b", "resources": {"requests": {"cpu": "500m"}}}]}));
        assert_eq!(obstacle(&big, &node(|_| ()), Room::default()), None);
        let mut used = Room { cpu: 1, pods: 1, ..Room::default() };
        assert_eq!(obstacle(&big, &node(|_| ()), used), Some("Insufficient cpu".to_owned()));
        used = Room { memory: 600 << 20, pods: 1, ..Room::default() };
        assert_eq!(obstacle(&big, &node(|_| ()), used), Some("Insufficient memory".to_owned()));
        used.pods = 3;
        assert_eq!(obstacle(&big, &node(|_| ()), used), Some("Too many pods".to_owned()));
    }

    #[test]
    fn the_disk_counts_where_it_is_stated() {
        let big = pod(json!({"containers": [{"name": "a", "resources": {"requests": {"ephemeral-storage": "2Gi"}}}]}));
        assert_eq!(obstacle(&big, &node(|_| ()), Room::default()), None);
        let small = node(|node| node["status"]["allocatable"]["ephemeral-storage"] = "3Gi".into());
        assert_eq!(obstacle(&big, &small, Room::default()), None);
        let used = Room { storage: 2 << 30, ..Room::default() };
        assert_eq!(obstacle(&big, &small, used), Some("Insufficient ephemeral-storage".to_owned()));
    }

    #[test]
    fn what_runs_at_once_is_summed() {
        let container = |name: &str, cpu: &str| json!({"name": name, "resources": {"requests": {"cpu": cpu}}});
        let sidecar = |name: &str, cpu: &str| {
            let mut one = container(name, cpu);
            one["restartPolicy"] = "Always".into();
            one
        };
        let cpu = |mut spec: Value| {
            let base = json!({"containers": [container("a", "300m"), container("b", "200m")]});
            for (key, part) in base.as_object().unwrap() {
                spec.as_object_mut().unwrap().entry(key).or_insert_with(|| part.clone());
            }
            requests(pod(spec).spec.as_ref().unwrap()).cpu
        };
        assert_eq!(cpu(json!({})), 500);
        assert_eq!(cpu(json!({"initContainers": [container("i", "400m"), container("j", "900m")]})), 900);
        let mixed = [container("i", "600m"), sidecar("s", "100m"), container("j", "450m"), sidecar("t", "20m")];
        assert_eq!(cpu(json!({"initContainers": mixed})), 620);
        let late = [sidecar("s", "100m"), container("j", "900m")];
        assert_eq!(cpu(json!({"initContainers": late})), 1000);
        assert_eq!(cpu(json!({"overhead": {"cpu": "50m", "memory": "1Mi"}})), 550);
        assert_eq!(cpu(json!({"resources": {"requests": {"cpu": "2"}}, "overhead": {"cpu": "50m"}})), 2050);
        assert_eq!(cpu(json!({"resources": {"limits": {"cpu": "2"}}})), 500);
        let silent = json!([{"name": "a"}]);
        assert_eq!(cpu(json!({"containers": silent, "resources": {"limits": {"cpu": "2"}}})), 2000);
    }

    #[test]
    fn preferred_terms_are_weighed() {
        let wish = |weight: i32, zone: &str| {
            json!({"weight": weight, "preference": {"matchExpressions":
                [{"key": "zone", "operator": "In", "values": [zone]}]}})
        };
        let wanting = pod(json!({"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution":
            [wish(30, "a"), wish(7, "a"), wish(50, "b")]}}}));
        assert_eq!(wishes(&wanting, &node(|_| ())), 37);
        assert_eq!(wishes(&pod(json!({})), &node(|_| ())), 0);
    }

    #[test]
    fn explanations() {
        assert_eq!(explain(0, &[]), "no nodes available to schedule pods");
        let obstacles = ["Insufficient cpu", "Too many pods", "Insufficient cpu"].map(str::to_owned);
        assert_eq!(explain(3, &obstacles), "0/3 nodes are available: 2 Insufficient cpu, 1 Too many pods.");
    }
}
