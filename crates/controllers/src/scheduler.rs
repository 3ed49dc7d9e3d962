//! The scheduler: binds each Pod that has no node to one that fits. Reads Pods and Nodes through one watch each, and keeps the sums.
//!
//! Rules are kube-scheduler's in their first form: node ready and schedulable, nodeSelector, required node affinity (`In NotIn
//! Exists DoesNotExist`), taints `NoSchedule` and `NoExecute`, requests within allocatable. Among nodes that fit, the one with the
//! most free memory is taken. Spreading, Pod affinity and preemption are not here.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use jiff::Timestamp;
use joey_model::quantity::{parse_milli, parse_units};
use k8s_openapi::api::core::v1::{
    Event, EventSource, Node, NodeSelectorRequirement, ObjectReference, Pod, Taint, Toleration,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use serde_json::json;

const NAME: &str = "default-scheduler";
const RETRY: Duration = Duration::from_millis(300);

/// Runs until dropped.
pub async fn run(client: kube::Client) {
    let mut pods = watcher(Api::<Pod>::all(client.clone()), watcher::Config::default()).boxed();
    let mut nodes = watcher(Api::<Node>::all(client.clone()), watcher::Config::default()).boxed();
    let mut cluster = Cluster::default();
    let mut writes = FuturesUnordered::new();
    loop {
        tokio::select! {
            event = pods.next() => match event {
                Some(Ok(event)) => cluster.pod_event(event),
                Some(Err(error)) => { tracing::warn!(%error, "watch of pods failed, trying again"); tokio::time::sleep(RETRY).await; }
                None => return,
            },
            event = nodes.next() => match event {
                Some(Ok(event)) => cluster.node_event(event),
                Some(Err(error)) => { tracing::warn!(%error, "watch of nodes failed, trying again"); tokio::time::sleep(RETRY).await; }
                None => return,
            },
            Some(failed) = writes.next(), if !writes.is_empty() => if let Some(key) = failed {
                // The binding was refused or lost: what the watch says next counts, and the Pod is tried again.
                cluster.unassume(&key);
            },
        }
        for decision in cluster.decide() {
            writes.push(carry_out(client.clone(), decision));
        }
    }
}

type Key = (String, String);

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Amounts {
    cpu_milli: u64,
    memory_bytes: u64,
    pods: u64,
}

#[derive(Default)]
struct Cluster {
    nodes: HashMap<String, Node>,
    /// Pods that use a node: its name and what they request. Assumed ones too, from the decision on.
    bound: HashMap<Key, (String, Amounts)>,
    waiting: BTreeMap<Key, Waiting>,
    listed: (bool, bool),
    pods_seen: Vec<Key>,
    nodes_seen: Vec<String>,
    changed: bool,
}

struct Waiting {
    pod: Pod,
    /// Not decided since something changed.
    fresh: bool,
    /// What was said last, so that it is said once.
    said: String,
}

enum Decision {
    Bind { key: Key, pod: Box<Pod>, node: String },
    Refuse { pod: Box<Pod>, message: String },
}

impl Cluster {
    fn pod_event(&mut self, event: watcher::Event<Pod>) {
        match event {
            watcher::Event::Apply(pod) => self.pod(pod),
            watcher::Event::InitApply(pod) => {
                self.pods_seen.push(key(&pod));
                self.pod(pod);
            }
            watcher::Event::Delete(pod) => self.forget(&key(&pod)),
            watcher::Event::Init => self.pods_seen.clear(),
            watcher::Event::InitDone => {
                let seen: std::collections::HashSet<Key> = std::mem::take(&mut self.pods_seen).into_iter().collect();
                self.bound.retain(|key, _| seen.contains(key));
                self.waiting.retain(|key, _| seen.contains(key));
                self.listed.0 = true;
                self.changed = true;
            }
        }
    }

    fn pod(&mut self, pod: Pod) {
        let key = key(&pod);
        let spec = pod.spec.clone().unwrap_or_default();
        let over = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        if matches!(over, Some("Succeeded" | "Failed")) {
            self.forget(&key);
        } else if let Some(node) = spec.node_name.clone().filter(|node| !node.is_empty()) {
            self.waiting.remove(&key);
            self.bound.insert(key, (node, requests(&pod)));
        } else if spec.scheduler_name.as_deref().unwrap_or(NAME) == NAME
            && pod.metadata.deletion_timestamp.is_none()
            && spec.scheduling_gates.as_ref().is_none_or(Vec::is_empty)
            && !self.bound.contains_key(&key)
        {
            let said = self.waiting.get(&key).map(|waiting| waiting.said.clone()).unwrap_or_default();
            // A Pod that waits is looked at when it is new; its own status written by this scheduler wakes nothing.
            let fresh = said.is_empty();
            self.waiting.insert(key, Waiting { pod, fresh, said });
        } else if pod.metadata.deletion_timestamp.is_some() {
            self.waiting.remove(&key);
        }
    }

    fn forget(&mut self, key: &Key) {
        self.waiting.remove(key);
        self.changed |= self.bound.remove(key).is_some();
    }

    fn unassume(&mut self, key: &Key) {
        self.forget(key);
    }

    fn node_event(&mut self, event: watcher::Event<Node>) {
        let name = |node: &Node| node.metadata.name.clone().unwrap_or_default();
        match event {
            watcher::Event::Apply(node) | watcher::Event::InitApply(node) => {
                self.nodes_seen.push(name(&node));
                let before = self.nodes.insert(name(&node), node.clone());
                self.changed |= before.is_none_or(|before| matters(&before) != matters(&node));
                if self.listed.1 {
                    self.nodes_seen.clear();
                }
            }
            watcher::Event::Delete(node) => {
                self.nodes.remove(&name(&node));
            }
            watcher::Event::Init => {
                self.listed.1 = false;
                self.nodes_seen.clear();
            }
            watcher::Event::InitDone => {
                let seen = std::mem::take(&mut self.nodes_seen);
                self.nodes.retain(|name, _| seen.contains(name));
                self.listed.1 = true;
                self.changed = true;
            }
        }
    }

    /// Decides about every Pod that waits and may have a new answer.
    fn decide(&mut self) -> Vec<Decision> {
        if self.listed != (true, true) {
            return Vec::new();
        }
        let all = std::mem::take(&mut self.changed);
        let keys: Vec<Key> = self.waiting.iter().filter(|(_, w)| all || w.fresh).map(|(key, _)| key.clone()).collect();
        if keys.is_empty() {
            return Vec::new();
        }
        let mut used: HashMap<String, Amounts> = HashMap::new();
        for (node, amounts) in self.bound.values() {
            add(used.entry(node.clone()).or_default(), *amounts);
        }
        let mut decisions = Vec::new();
        for key in keys {
            let Some(mut waiting) = self.waiting.remove(&key) else { continue };
            waiting.fresh = false;
            match choose(&waiting.pod, &self.nodes, &used) {
                Ok(node) => {
                    let amounts = requests(&waiting.pod);
                    add(used.entry(node.clone()).or_default(), amounts);
                    self.bound.insert(key.clone(), (node.clone(), amounts));
                    decisions.push(Decision::Bind { key, pod: Box::new(waiting.pod), node });
                }
                Err(message) => {
                    if waiting.said != message {
                        waiting.said.clone_from(&message);
                        decisions.push(Decision::Refuse { pod: Box::new(waiting.pod.clone()), message });
                    }
                    self.waiting.insert(key, waiting);
                }
            }
        }
        decisions
    }
}

fn key(pod: &Pod) -> Key {
    (pod.metadata.namespace.clone().unwrap_or_default(), pod.metadata.name.clone().unwrap_or_default())
}

/// What of a Node decides: heartbeats do not.
fn matters(
    node: &Node,
) -> (Option<&k8s_openapi::api::core::v1::NodeSpec>, Option<&BTreeMap<String, String>>, bool, Amounts) {
    (node.spec.as_ref(), node.metadata.labels.as_ref(), ready(node), allocatable(node))
}

fn ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn add(sum: &mut Amounts, more: Amounts) {
    sum.cpu_milli = sum.cpu_milli.saturating_add(more.cpu_milli);
    sum.memory_bytes = sum.memory_bytes.saturating_add(more.memory_bytes);
    sum.pods += more.pods;
}

/// What a Pod asks for: the sum of its containers' requests and its overhead.
fn requests(pod: &Pod) -> Amounts {
    let mut sum = Amounts { pods: 1, ..Amounts::default() };
    let Some(spec) = &pod.spec else { return sum };
    let containers = spec.containers.iter().filter_map(|c| c.resources.as_ref()?.requests.as_ref());
    for amounts in containers.chain(spec.overhead.as_ref()) {
        let text = |name: &str| amounts.get(name).map_or("0", |amount| amount.0.as_str());
        let cpu_milli = parse_milli(text("cpu")).unwrap_or(u64::MAX);
        let memory_bytes = parse_units(text("memory")).unwrap_or(u64::MAX);
        add(&mut sum, Amounts { cpu_milli, memory_bytes, pods: 0 });
    }
    sum
}

fn allocatable(node: &Node) -> Amounts {
    let amounts = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
    let text = |name: &str| amounts.and_then(|amounts| amounts.get(name)).map_or("0", |amount| amount.0.as_str());
    Amounts {
        cpu_milli: parse_milli(text("cpu")).unwrap_or(0),
        memory_bytes: parse_units(text("memory")).unwrap_or(0),
        pods: parse_units(text("pods")).unwrap_or(0),
    }
}

/// The node for a Pod, or why there is none, in kube-scheduler's words.
fn choose(pod: &Pod, nodes: &HashMap<String, Node>, used: &HashMap<String, Amounts>) -> Result<String, String> {
    let wanted = requests(pod);
    let mut best: Option<(u64, &String)> = None;
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    for (name, node) in nodes {
        let used = used.get(name).copied().unwrap_or_default();
        match refusal(pod, node, wanted, used) {
            None => {
                let free = allocatable(node).memory_bytes.saturating_sub(used.memory_bytes);
                if best.is_none_or(|(most, first)| (free, name) > (most, first)) {
                    best = Some((free, name));
                }
            }
            Some(reason) => *reasons.entry(reason).or_default() += 1,
        }
    }
    if let Some((_, name)) = best {
        return Ok(name.clone());
    }
    if nodes.is_empty() {
        return Err("no nodes available to schedule pods".into());
    }
    let reasons: Vec<String> = reasons.into_iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    Err(format!("0/{} nodes are available: {}.", nodes.len(), reasons.join(", ")))
}

fn refusal(pod: &Pod, node: &Node, wanted: Amounts, used: Amounts) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let node_spec = node.spec.clone().unwrap_or_default();
    if !ready(node) {
        return Some("node(s) were not ready".into());
    }
    if node_spec.unschedulable == Some(true) {
        return Some("node(s) were unschedulable".into());
    }
    let tolerations = spec.tolerations.as_deref().unwrap_or_default();
    let repelling = node_spec.taints.iter().flatten().find(|taint| {
        matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute") && !tolerations.iter().any(|t| tolerates(t, taint))
    });
    if let Some(taint) = repelling {
        let value = taint.value.as_deref().unwrap_or_default();
        return Some(format!("node(s) had untolerated taint {{{}: {value}}}", taint.key));
    }
    if !selected(pod, node) {
        return Some("node(s) didn't match Pod's node affinity/selector".into());
    }
    let has = allocatable(node);
    let fits = |have: u64, used: u64, want: u64| used.saturating_add(want) <= have;
    if !fits(has.pods, used.pods, 1) {
        return Some("Too many pods".into());
    }
    if wanted.cpu_milli > 0 && !fits(has.cpu_milli, used.cpu_milli, wanted.cpu_milli) {
        return Some("Insufficient cpu".into());
    }
    if wanted.memory_bytes > 0 && !fits(has.memory_bytes, used.memory_bytes, wanted.memory_bytes) {
        return Some("Insufficient memory".into());
    }
    None
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let filled = |text: &Option<String>| text.clone().unwrap_or_default();
    let (key, effect) = (filled(&toleration.key), filled(&toleration.effect));
    if !effect.is_empty() && effect != taint.effect {
        return false;
    }
    match toleration.operator.as_deref() {
        Some("Exists") => key.is_empty() || key == taint.key,
        _ => key == taint.key && filled(&toleration.value) == filled(&taint.value),
    }
}

fn selected(pod: &Pod, node: &Node) -> bool {
    let Some(spec) = &pod.spec else { return true };
    let labels = node.metadata.labels.clone().unwrap_or_default();
    if !spec.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value)) {
        return false;
    }
    let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let Some(required) = affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref()) else {
        return true;
    };
    let fields = BTreeMap::from([("metadata.name".to_owned(), node.metadata.name.clone().unwrap_or_default())]);
    required.node_selector_terms.iter().any(|term| {
        let expressions = term.match_expressions.as_deref().unwrap_or_default();
        let on_fields = term.match_fields.as_deref().unwrap_or_default();
        expressions.len() + on_fields.len() > 0
            && expressions.iter().all(|wanted| matches_requirement(wanted, &labels))
            && on_fields.iter().all(|wanted| matches_requirement(wanted, &fields))
    })
}

fn matches_requirement(wanted: &NodeSelectorRequirement, labels: &BTreeMap<String, String>) -> bool {
    let value = labels.get(&wanted.key);
    let values = wanted.values.as_deref().unwrap_or_default();
    let number = |text: Option<&String>| text.and_then(|text| text.parse::<i64>().ok());
    match wanted.operator.as_str() {
        "In" => value.is_some_and(|value| values.contains(value)),
        "NotIn" => value.is_none_or(|value| !values.contains(value)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => number(value).zip(number(values.first())).is_some_and(|(have, bound)| have > bound),
        "Lt" => number(value).zip(number(values.first())).is_some_and(|(have, bound)| have < bound),
        _ => false,
    }
}

/// Writes a decision; `Some`: the binding did not come about.
async fn carry_out(client: kube::Client, decision: Decision) -> Option<Key> {
    match decision {
        Decision::Bind { key, pod, node } => {
            let api: Api<Pod> = Api::namespaced(client.clone(), &key.0);
            let binding = json!({
                "apiVersion": "v1", "kind": "Binding",
                "metadata": { "name": key.1, "namespace": key.0, "uid": pod.metadata.uid },
                "target": { "apiVersion": "v1", "kind": "Node", "name": node },
            });
            let bound: Result<serde_json::Value, _> =
                api.create_subresource("binding", &key.1, &PostParams::default(), &binding).await;
            if let Err(error) = bound {
                tracing::warn!(namespace = key.0, pod = key.1, %error, "pod could not be bound");
                return Some(key);
            }
            let message = format!("Successfully assigned {}/{} to {node}", key.0, key.1);
            say(&client, &pod, false, "Scheduled", "Binding", message).await;
            None
        }
        Decision::Refuse { pod, message } => {
            let (namespace, name) = key(&pod);
            let status = json!({ "metadata": { "uid": pod.metadata.uid }, "status": { "conditions": [{
                "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message,
                "lastTransitionTime": Time(Timestamp::now()), "observedGeneration": pod.metadata.generation,
            }]}});
            let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
            let written = api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(status)).await;
            if let Err(error) = written {
                tracing::debug!(%error, "condition of an unschedulable pod could not be written");
            }
            say(&client, &pod, true, "FailedScheduling", "Scheduling", message).await;
            None
        }
    }
}

async fn say(client: &kube::Client, pod: &Pod, warning: bool, reason: &str, action: &str, message: String) {
    let (namespace, name) = key(pod);
    let now = Timestamp::now();
    let event = Event {
        metadata: ObjectMeta {
            name: Some(format!("{}.{:016x}", &name[..name.len().min(230)], now.as_nanosecond())),
            namespace: Some(namespace.clone()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: Some(name),
            namespace: Some(namespace.clone()),
            uid: pod.metadata.uid.clone(),
            ..ObjectReference::default()
        },
        action: Some(action.into()),
        count: Some(1),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        reason: Some(reason.into()),
        message: Some(message),
        type_: Some(if warning { "Warning" } else { "Normal" }.into()),
        source: Some(EventSource { component: Some(NAME.into()), host: None }),
        reporting_component: Some(NAME.into()),
        ..Event::default()
    };
    let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
    if let Err(error) = api.create(&PostParams::default(), &event).await {
        tracing::debug!(%error, "event could not be written");
    }
}
