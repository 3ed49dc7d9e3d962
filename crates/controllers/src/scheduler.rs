//! The scheduler: binds each Pod without a node to the ready node that has room, of these to the one it prefers, of these to the one
//! with the fewest Pods. Pods of higher priority come first; none makes room by ending others.
//!
//! ```text
//!  waiting ──► bound in memory ──► POST binding ──► the watch shows it bound
//!     ▲               └── refused ──┘
//!     └── no node fits: event FailedScheduling, condition PodScheduled=False; tried again when something changed
//! ```
//!
//! A Pod with scheduling gates does not wait here: it comes when the last gate is gone.
//!
//! One task owns the state; bindings are sent by tasks of their own, so that one slow call holds up nobody.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Binding, Namespace, Node, ObjectReference, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Resource, ResourceExt};
use serde_json::json;
use tokio::sync::mpsc;

use crate::fit::{self, Room};
use crate::neighbours::{Around, Key, Labels, Placed, looks_at_others};

/// The `schedulerName` that is served; Pods naming another are somebody else's.
const NAME: &str = "default-scheduler";
/// How long a refused binding waits before the Pod is looked at again.
const RETRY: Duration = Duration::from_millis(200);

/// Schedules until dropped.
pub(crate) async fn run(client: kube::Client) {
    let pods = watcher(Api::<Pod>::all(client.clone()), watcher::Config::default())
        .default_backoff()
        .map_ok(Change::Pod)
        .boxed();
    let nodes = watcher(Api::<Node>::all(client.clone()), watcher::Config::default())
        .default_backoff()
        .map_ok(Change::Node)
        .boxed();
    let namespaces = watcher(Api::<Namespace>::all(client.clone()), watcher::Config::default())
        .default_backoff()
        .map_ok(Change::Namespace)
        .boxed();
    let mut changes = stream::select(stream::select(pods, nodes), namespaces);
    let (answers, mut answered) = mpsc::unbounded_channel();
    let recorder = Recorder::new(client.clone(), Reporter { controller: NAME.to_owned(), instance: None });
    let mut scheduler = Scheduler { client, recorder, answers, state: State::default() };
    loop {
        tokio::select! {
            change = changes.next() => match change {
                Some(Ok(Change::Pod(event))) => scheduler.state.pod_changed(event),
                Some(Ok(Change::Node(event))) => scheduler.state.node_changed(event),
                Some(Ok(Change::Namespace(event))) => scheduler.state.namespace_changed(event),
                Some(Err(error)) => tracing::debug!(%error, "scheduler's watch broke, beginning again"),
                None => return,
            },
            Some((key, pod)) = answered.recv() => scheduler.state.binding_refused(&key, pod),
        }
        scheduler.schedule();
    }
}

// One at a time and consumed at once: boxing would cost more than it saves.
#[allow(clippy::large_enum_variant)]
enum Change {
    Pod(watcher::Event<Pod>),
    Node(watcher::Event<Node>),
    Namespace(watcher::Event<Namespace>),
}

struct Scheduler {
    client: kube::Client,
    recorder: Recorder,
    /// Pods whose binding was refused, as they are now; `None`: gone.
    answers: mpsc::UnboundedSender<(Key, Option<Box<Pod>>)>,
    state: State,
}

#[derive(Default)]
struct State {
    nodes: BTreeMap<String, Node>,
    namespaces: BTreeMap<String, Labels>,
    /// Every Pod that has a node, also those whose binding is under way.
    placed: HashMap<Key, Placed>,
    used: HashMap<String, Room>,
    waiting: BTreeMap<Key, Pod>,
    /// Something happened since waiting Pods were last looked at.
    stirred: bool,
    /// Lists of Pods, nodes and namespaces were received: what is used is known.
    synced: (bool, bool, bool),
    /// Lists under way: what is not in them is gone.
    listed_pods: Option<std::collections::HashSet<Key>>,
    listed_nodes: Option<std::collections::HashSet<String>>,
}

impl State {
    fn pod_changed(&mut self, event: watcher::Event<Pod>) {
        match event {
            watcher::Event::Init => self.listed_pods = Some(Default::default()),
            watcher::Event::InitApply(pod) => {
                if let Some(listed) = &mut self.listed_pods {
                    listed.insert(key(&pod));
                }
                self.pod_is(pod);
            }
            watcher::Event::InitDone => {
                self.synced.0 = true;
                self.stirred = true;
                if let Some(listed) = self.listed_pods.take() {
                    self.waiting.retain(|key, _| listed.contains(key));
                    let gone: Vec<Key> = self.placed.keys().filter(|key| !listed.contains(*key)).cloned().collect();
                    gone.iter().for_each(|key| self.unplace(key));
                }
            }
            watcher::Event::Apply(pod) => self.pod_is(pod),
            watcher::Event::Delete(pod) => {
                let key = key(&pod);
                self.waiting.remove(&key);
                self.unplace(&key);
            }
        }
    }

    fn pod_is(&mut self, pod: Pod) {
        let key = key(&pod);
        let Some(spec) = &pod.spec else { return };
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
        if matches!(phase, "Succeeded" | "Failed") {
            self.waiting.remove(&key);
            self.unplace(&key);
        } else if let Some(node) = spec.node_name.clone() {
            self.waiting.remove(&key);
            self.place(key, Placed::of(&pod, node));
        } else if pod.metadata.deletion_timestamp.is_some() || is_gated(spec) {
            self.waiting.remove(&key);
        } else if spec.scheduler_name.as_deref().unwrap_or(NAME) == NAME && !self.placed.contains_key(&key) {
            self.waiting.insert(key, pod);
            self.stirred = true;
        }
    }

    fn node_changed(&mut self, event: watcher::Event<Node>) {
        match event {
            watcher::Event::Init => self.listed_nodes = Some(Default::default()),
            watcher::Event::InitApply(node) => {
                if let Some(listed) = &mut self.listed_nodes {
                    listed.insert(node.name_any());
                }
                self.node_is(node);
            }
            watcher::Event::InitDone => {
                self.synced.1 = true;
                self.stirred = true;
                if let Some(listed) = self.listed_nodes.take() {
                    self.nodes.retain(|name, _| listed.contains(name));
                }
            }
            watcher::Event::Apply(node) => self.node_is(node),
            watcher::Event::Delete(node) => {
                self.nodes.remove(&node.name_any());
            }
        }
    }

    fn node_is(&mut self, mut node: Node) {
        node.metadata.managed_fields = None;
        if let Some(status) = &mut node.status {
            // Not looked at, and large on nodes that run containers themselves.
            status.images = None;
        }
        self.nodes.insert(node.name_any(), node);
        self.stirred = true;
    }

    fn namespace_changed(&mut self, event: watcher::Event<Namespace>) {
        match event {
            watcher::Event::Init => {
                self.namespaces.clear();
                self.synced.2 = false;
            }
            watcher::Event::InitApply(namespace) | watcher::Event::Apply(namespace) => {
                let name = namespace.name_any();
                self.namespaces.insert(name, namespace.metadata.labels.unwrap_or_default());
                self.stirred = true;
            }
            watcher::Event::InitDone => {
                self.synced.2 = true;
                self.stirred = true;
            }
            watcher::Event::Delete(namespace) => drop(self.namespaces.remove(&namespace.name_any())),
        }
    }

    fn place(&mut self, key: Key, placed: Placed) {
        if self.placed.get(&key) == Some(&placed) {
            return;
        }
        self.unplace(&key);
        self.used.entry(placed.node.clone()).or_default().add(placed.room);
        self.placed.insert(key, placed);
        self.stirred = true;
    }

    fn unplace(&mut self, key: &Key) {
        if let Some(placed) = self.placed.remove(key) {
            if let Some(used) = self.used.get_mut(&placed.node) {
                used.remove(placed.room);
            }
            self.stirred = true;
        }
    }

    fn binding_refused(&mut self, key: &Key, pod: Option<Box<Pod>>) {
        self.unplace(key);
        if let Some(pod) = pod {
            self.pod_is(*pod);
        }
    }

    /// Waiting Pods in the order in which they are looked at.
    fn queue(&self) -> Vec<Key> {
        let priority = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or_default();
        let mut queue: Vec<_> = self.waiting.iter().map(|(key, pod)| (Reverse(priority(pod)), key)).collect();
        queue.sort_unstable();
        queue.into_iter().map(|(_, key)| key.clone()).collect()
    }

    /// The ready node with room that the Pod likes best and that has the fewest Pods, or why there is none.
    fn choose(&self, pod: &Pod) -> Result<String, String> {
        let around = Around { nodes: &self.nodes, namespaces: &self.namespaces, placed: &self.placed };
        let mut obstacles = Vec::new();
        let mut best: Option<((i64, u64), &String)> = None;
        for (name, node) in &self.nodes {
            let used = self.used.get(name).copied().unwrap_or_default();
            let obstacle = fit::obstacle(pod, node, used);
            if let Some(obstacle) = obstacle.or_else(|| around.obstacle(pod, node).map(str::to_owned)) {
                obstacles.push(obstacle);
                continue;
            }
            let rank = (-fit::wishes(pod, node) - around.wishes(pod, node), used.pods);
            if best.is_none_or(|(known, _)| rank < known) {
                best = Some((rank, name));
            }
        }
        best.map(|(_, name)| name.clone()).ok_or_else(|| fit::explain(self.nodes.len(), &obstacles))
    }
}

impl Scheduler {
    fn schedule(&mut self) {
        if self.state.synced != (true, true, true) {
            return;
        }
        while std::mem::take(&mut self.state.stirred) {
            for key in self.state.queue() {
                let Some(pod) = self.state.waiting.get(&key) else { continue };
                match self.state.choose(pod) {
                    Ok(node) => {
                        if let Some(pod) = self.state.waiting.remove(&key) {
                            self.state.place(key.clone(), Placed::of(&pod, node.clone()));
                            self.bind(key, pod, node);
                        }
                    }
                    Err(why) => self.report(key, why),
                }
            }
            // Placing stirs only those who look for others: room became less.
            self.state.stirred &= self.state.waiting.values().any(looks_at_others);
        }
    }

    fn bind(&self, key: Key, pod: Pod, node: String) {
        let (client, recorder, answers) = (self.client.clone(), self.recorder.clone(), self.answers.clone());
        tokio::spawn(async move {
            match bind(&client, &pod, &node).await {
                Ok(()) => {
                    let note = format!("Successfully assigned {}/{} to {node}", key.0, key.1);
                    publish(&recorder, &pod, EventType::Normal, "Scheduled", "Binding", note).await;
                }
                Err(error) => {
                    tracing::debug!(namespace = key.0, pod = key.1, %error, "binding was refused");
                    tokio::time::sleep(RETRY).await;
                    let pods = Api::<Pod>::namespaced(client, &key.0);
                    // What cannot be read now is tried as it was; a Pod that is gone stays gone.
                    let now = pods.get_opt(&key.1).await.unwrap_or(Some(pod));
                    let _ = answers.send((key, now.map(Box::new)));
                }
            }
        });
    }

    /// Says on the Pod why it waits; only when the words are new.
    fn report(&mut self, key: Key, why: String) {
        let Some(pod) = self.state.waiting.get_mut(&key) else { return };
        let conditions = pod.status.get_or_insert_default().conditions.get_or_insert_default();
        let known = conditions.iter().find(|condition| condition.type_ == "PodScheduled");
        if known.is_some_and(|known| known.status == "False" && known.message.as_deref() == Some(why.as_str())) {
            return;
        }
        let condition = json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why,
            "lastTransitionTime": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()});
        if let Ok(condition) = serde_json::from_value(condition.clone()) {
            conditions.retain(|condition: &k8s_openapi::api::core::v1::PodCondition| condition.type_ != "PodScheduled");
            conditions.push(condition);
        }
        let (pods, recorder) = (Api::<Pod>::namespaced(self.client.clone(), &key.0), self.recorder.clone());
        let pod = pod.clone();
        tokio::spawn(async move {
            let patch = Patch::Strategic(json!({"status": {"conditions": [condition]}}));
            if let Err(error) = pods.patch_status(&key.1, &PatchParams::default(), &patch).await {
                tracing::debug!(namespace = key.0, pod = key.1, %error, "condition could not be written");
            }
            publish(&recorder, &pod, EventType::Warning, "FailedScheduling", "Scheduling", why).await;
        });
    }
}

async fn bind(client: &kube::Client, pod: &Pod, node: &str) -> Result<(), kube::Error> {
    let name = pod.name_any();
    let pods = Api::<Pod>::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let binding = Binding {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: pod.namespace(),
            // The server refuses the binding when another Pod of this name has taken its place.
            uid: pod.uid(),
            ..ObjectMeta::default()
        },
        target: ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(node.to_owned()),
            ..ObjectReference::default()
        },
    };
    let _answer: serde_json::Value =
        pods.create_subresource("binding", &name, &PostParams::default(), &binding).await?;
    Ok(())
}

async fn publish(recorder: &Recorder, pod: &Pod, type_: EventType, reason: &str, action: &str, note: String) {
    let event =
        Event { type_, reason: reason.to_owned(), action: action.to_owned(), note: Some(note), secondary: None };
    if let Err(error) = recorder.publish(&event, &pod.object_ref(&())).await {
        tracing::debug!(%error, reason, "event could not be written");
    }
}

/// Whether somebody holds the Pod back yet.
fn is_gated(spec: &PodSpec) -> bool {
    spec.scheduling_gates.as_ref().is_some_and(|gates| !gates.is_empty())
}

fn key(pod: &Pod) -> Key {
    (pod.namespace().unwrap_or_default(), pod.name_any())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn pod(name: &str, node: Option<&str>, phase: &str) -> Pod {
        let mut value = json!({"metadata": {"name": name, "namespace": "n"}, "status": {"phase": phase},
            "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]}});
        if let Some(node) = node {
            value["spec"]["nodeName"] = Value::from(node);
        }
        serde_json::from_value(value).unwrap()
    }

    fn node(name: &str) -> Node {
        serde_json::from_value(json!({"metadata": {"name": name}, "status": {
            "conditions": [{"type": "Ready", "status": "True"}], "allocatable": {"cpu": "2", "pods": "10"}}}))
        .unwrap()
    }

    #[test]
    fn the_emptiest_node_with_room_is_chosen() {
        let mut state = State::default();
        state.node_changed(watcher::Event::Apply(node("a")));
        state.node_changed(watcher::Event::Apply(node("b")));
        state.pod_changed(watcher::Event::Apply(pod("1", Some("a"), "Running")));
        assert_eq!(state.choose(&pod("2", None, "Pending")), Ok("b".to_owned()));
        for name in ["3", "4"] {
            state.pod_changed(watcher::Event::Apply(pod(name, Some("b"), "Running")));
        }
        assert_eq!(state.choose(&pod("5", None, "Pending")), Ok("a".to_owned()));
        state.pod_changed(watcher::Event::Apply(pod("6", Some("a"), "Running")));
        let full = state.choose(&pod("7", None, "Pending")).unwrap_err();
        assert_eq!(full, "0/2 nodes are available: 2 Insufficient cpu.");
        state.pod_changed(watcher::Event::Apply(pod("3", Some("b"), "Succeeded")));
        assert_eq!(state.choose(&pod("7", None, "Pending")), Ok("b".to_owned()));
    }

    #[test]
    fn a_new_list_forgets_what_it_does_not_hold() {
        let mut state = State::default();
        state.pod_changed(watcher::Event::Apply(pod("old", Some("a"), "Running")));
        state.pod_changed(watcher::Event::Apply(pod("waits", None, "Pending")));
        state.pod_changed(watcher::Event::Init);
        state.pod_changed(watcher::Event::InitApply(pod("new", Some("a"), "Running")));
        state.pod_changed(watcher::Event::InitDone);
        assert!(state.waiting.is_empty());
        assert_eq!(state.placed.len(), 1);
        assert_eq!(state.used["a"], Room { cpu: 1000, pods: 1, ..Room::default() });
    }

    #[test]
    fn a_gated_pod_comes_when_the_last_gate_is_gone() {
        let mut state = State::default();
        let gated = |gates: Value| {
            let mut pod = pod("held", None, "Pending");
            pod.spec.as_mut().unwrap().scheduling_gates = serde_json::from_value(gates).unwrap();
            watcher::Event::Apply(pod)
        };
        state.pod_changed(gated(json!([{"name": "a"}, {"name": "b"}])));
        state.pod_changed(gated(json!([{"name": "b"}])));
        assert!(state.waiting.is_empty() && !state.stirred);
        state.pod_changed(gated(json!([])));
        assert!(state.stirred);
        assert_eq!(state.queue(), [("n".to_owned(), "held".to_owned())]);
    }

    #[test]
    fn higher_priority_is_looked_at_first() {
        let mut state = State::default();
        for (name, priority) in [("a", 0), ("b", 2_000_001_000), ("c", 2_000_000_000), ("d", 0)] {
            let mut pod = pod(name, None, "Pending");
            pod.spec.as_mut().unwrap().priority = Some(priority);
            state.pod_changed(watcher::Event::Apply(pod));
        }
        let names: Vec<String> = state.queue().into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["b", "c", "a", "d"]);
    }

    #[test]
    fn a_preferred_node_counts_before_an_empty_one() {
        let mut state = State::default();
        let mut liked = node("b");
        liked.metadata.labels = Some([("disk".to_owned(), "fast".to_owned())].into());
        state.node_changed(watcher::Event::Apply(node("a")));
        state.node_changed(watcher::Event::Apply(liked));
        state.pod_changed(watcher::Event::Apply(pod("1", Some("b"), "Running")));
        let mut choosy = pod("2", None, "Pending");
        assert_eq!(state.choose(&choosy), Ok("a".to_owned()));
        let affinity = json!({"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 1, "preference": {"matchExpressions": [{"key": "disk", "operator": "Exists"}]}}]}});
        choosy.spec.as_mut().unwrap().affinity = serde_json::from_value(affinity).unwrap();
        assert_eq!(state.choose(&choosy), Ok("b".to_owned()));
    }
}
