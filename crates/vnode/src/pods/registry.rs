//! What is known of each Pod of this node: the object, its instance, what was told to the cluster. In memory, rebuilt at start.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};
use joey_api::instance::{ContainerState, Instance, InstanceEvent, WirePhase};
use k8s_openapi::api::core::v1::{Pod, PodStatus};

use joey_podspec::{Missing, Tokens};

/// A Pod that goes on waiting for the same reason says so this often; the cluster forgets events after an hour.
const WARN_AGAIN: SignedDuration = SignedDuration::from_mins(10);
/// Reasons of a Pod that are remembered.
const WARNINGS: usize = 16;

/// Pods and instances by the Pod's UID.
#[derive(Default)]
pub struct Registry {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    entries: HashMap<String, Entry>,
    /// Instance id → Pod's UID.
    owners: HashMap<String, String>,
    pods_listed: bool,
    instances_listed: bool,
}

#[derive(Default)]
pub(super) struct Entry {
    pub pod: Option<Arc<Pod>>,
    pub instance: Option<Arc<Instance>>,
    /// Revision at which an instance of this Pod was seen to go.
    gone_revision: u64,
    /// The status last written and accepted.
    pub sent: Option<PodStatus>,
    /// The shortest grace an end was asked for with, for the instance of that id.
    pub ending: Option<(String, u32)>,
    pub attempts: u32,
    /// The generation of the Pod that its instance was brought to.
    pub followed: Option<i64>,
    /// Objects of which somebody waits for the appearance.
    pub awaited: Vec<Missing>,
    /// One of them is there now, or it is time to look.
    pub appeared: bool,
    pub files: Files,
    /// The warnings said last about why it does not run, oldest first.
    warned: VecDeque<Warned>,
    pub said: HashSet<(i64, String, Option<String>)>,
    working: bool,
    again: bool,
}

/// What its volumes of files hold.
#[derive(Default)]
pub(super) struct Files {
    pub tokens: Tokens,
    /// When the Pod is woken to have the next of them replaced.
    pub waking: Option<Timestamp>,
    /// What the files sent last were made from, and the files themselves; both in brief.
    pub made_from: Option<u64>,
    pub sent: Option<u64>,
}

struct Warned {
    at: Timestamp,
    reason: String,
    message: String,
}

impl Warned {
    /// Whether it is too early to say this: it was said just now.
    fn covers(&self, reason: &str, message: &str, now: Timestamp) -> bool {
        self.reason == reason && self.message == message && now.duration_since(self.at) < WARN_AGAIN
    }
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is a plain assignment, so the state is whole even after a panic elsewhere.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The Pod and its instance by namespace and name, for the kubelet endpoints. The youngest, when an old one is just ending.
    pub fn find(&self, namespace: &str, name: &str) -> Option<(Arc<Pod>, Option<Arc<Instance>>)> {
        let state = self.lock();
        let fits = |pod: &Pod| {
            pod.metadata.name.as_deref() == Some(name) && pod.metadata.namespace.as_deref() == Some(namespace)
        };
        let mut found: Vec<_> = state
            .entries
            .values()
            .filter_map(|entry| Some((entry.pod.clone()?, entry.instance.clone())))
            .filter(|(pod, _)| fits(pod))
            .collect();
        found.sort_by_key(|(pod, _)| pod.metadata.creation_timestamp.clone());
        found.pop()
    }

    /// Every Pod of this node.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.lock().entries.values().filter_map(|entry| entry.pod.clone()).collect()
    }

    /// The Pods whose instances run.
    pub fn running(&self) -> Vec<(Arc<Pod>, Arc<Instance>)> {
        let state = self.lock();
        let both = state.entries.values().filter_map(|entry| Some((entry.pod.clone()?, entry.instance.clone()?)));
        // One of several containers may wait, and the others run.
        let runs = |instance: &Instance| {
            let mut states = instance.status.containers.iter().map(|container| &container.state);
            states.any(|state| matches!(state, ContainerState::Running { .. }))
        };
        both.filter(|(_, instance)| match instance.status.phase {
            WirePhase::Running => true,
            WirePhase::Starting => runs(instance),
            _ => false,
        })
        .collect()
    }

    pub(super) fn synced(&self) -> bool {
        let state = self.lock();
        state.pods_listed && state.instances_listed
    }

    pub(super) fn uids(&self) -> Vec<String> {
        self.lock().entries.keys().cloned().collect()
    }

    pub(super) fn pod(&self, mut pod: Pod) -> Option<String> {
        let uid = pod.metadata.uid.clone()?;
        pod.metadata.managed_fields = None;
        self.lock().entries.entry(uid.clone()).or_default().pod = Some(Arc::new(pod));
        Some(uid)
    }

    pub(super) fn pod_gone(&self, uid: &str) {
        if let Some(entry) = self.lock().entries.get_mut(uid) {
            entry.pod = None;
        }
    }

    pub(super) fn pods_listed(&self, listed: &[String]) {
        let listed: HashSet<&String> = listed.iter().collect();
        let mut state = self.lock();
        state.pods_listed = true;
        for (uid, entry) in &mut state.entries {
            if !listed.contains(uid) {
                entry.pod = None;
            }
        }
    }

    /// Takes in an instance as it now is; `first`: it was there before the watch, so what happened to it has been said.
    pub(super) fn instance(&self, uid: &str, instance: Instance, first: bool) {
        let mut state = self.lock();
        state.owners.insert(instance.id.clone(), uid.to_owned());
        let entry = state.entries.entry(uid.to_owned()).or_default();
        let newer = entry.instance.as_ref().is_none_or(|known| known.revision <= instance.revision);
        if !newer || instance.revision <= entry.gone_revision {
            return;
        }
        if first && entry.instance.is_none() {
            entry.said = instance.status.events.iter().map(mark).collect();
        }
        entry.instance = Some(Arc::new(instance));
    }

    /// Takes in that an instance is gone; says which Pods have something to do now: its own, and one that waits for its name.
    pub(super) fn instance_gone(&self, id: &str, name: &str, revision: u64) -> Vec<String> {
        let mut state = self.lock();
        let mut woken: Vec<String> = state.owners.remove(id).into_iter().collect();
        for uid in &woken {
            if let Some(entry) = state.entries.get_mut(uid) {
                entry.instance = None;
                entry.gone_revision = entry.gone_revision.max(revision);
            }
        }
        let waits = |entry: &Entry| {
            entry.attempts > 0
                && entry.instance.is_none()
                && entry.pod.as_ref().is_some_and(|pod| {
                    let text = |value: &Option<String>| value.clone().unwrap_or_default();
                    name == format!("{}.{}", text(&pod.metadata.name), text(&pod.metadata.namespace))
                })
        };
        woken.extend(state.entries.iter().filter(|(_, entry)| waits(entry)).map(|(uid, _)| uid.clone()));
        woken
    }

    pub(super) fn instances_listed(&self, listed: &[String]) {
        let listed: HashSet<&String> = listed.iter().collect();
        let mut state = self.lock();
        state.instances_listed = true;
        for entry in state.entries.values_mut() {
            if entry.instance.as_ref().is_some_and(|instance| !listed.contains(&instance.id)) {
                entry.instance = None;
            }
        }
        state.owners.retain(|id, _| listed.contains(id));
    }

    /// Whether the caller shall work on the Pod; otherwise somebody does and will look once more.
    pub(super) fn begin(&self, uid: &str) -> bool {
        let mut state = self.lock();
        if !(state.pods_listed && state.instances_listed) {
            return false;
        }
        let Some(entry) = state.entries.get_mut(uid) else { return false };
        if entry.working {
            entry.again = true;
            return false;
        }
        entry.working = true;
        true
    }

    /// Ends a look at the Pod; true: look once more. What nobody needs is forgotten.
    pub(super) fn end(&self, uid: &str) -> bool {
        let mut state = self.lock();
        let Some(entry) = state.entries.get_mut(uid) else { return false };
        if std::mem::take(&mut entry.again) {
            return true;
        }
        entry.working = false;
        if entry.pod.is_none() && entry.instance.is_none() {
            state.entries.remove(uid);
        }
        false
    }

    pub(super) fn read<T>(&self, uid: &str, read: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        self.lock().entries.get_mut(uid).map(read)
    }

    /// Whether a warning shall be said: it is none of the last ones, or that was long ago. It counts as said from now on.
    pub(super) fn warns(&self, uid: &str, reason: &str, message: &str, now: Timestamp) -> bool {
        let mut state = self.lock();
        let Some(entry) = state.entries.get_mut(uid) else { return false };
        if entry.warned.iter().any(|said| said.covers(reason, message, now)) {
            return false;
        }
        if entry.warned.len() >= WARNINGS {
            entry.warned.pop_front();
        }
        entry.warned.push_back(Warned { at: now, reason: reason.to_owned(), message: message.to_owned() });
        true
    }

    /// Events of the instance that were not said yet; they count as said from now on.
    pub(super) fn news(&self, uid: &str, events: &[InstanceEvent]) -> Vec<InstanceEvent> {
        let mut state = self.lock();
        let Some(entry) = state.entries.get_mut(uid) else { return Vec::new() };
        let news = events.iter().filter(|event| !entry.said.contains(&mark(event))).cloned().collect();
        entry.said = events.iter().map(mark).collect();
        news
    }
}

fn mark(event: &InstanceEvent) -> (i64, String, Option<String>) {
    (event.at.as_microsecond(), event.reason.clone(), event.container.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> Registry {
        let registry = Registry::default();
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": { "name": "web", "namespace": "shop", "uid": "u-1" },
        }))
        .unwrap();
        assert_eq!(registry.pod(pod), Some("u-1".to_owned()));
        registry
    }

    #[test]
    fn a_warning_is_repeated_seldom() {
        let registry = registry();
        let begin: Timestamp = "2024-01-01T00:00:00Z".parse().unwrap();
        let at = |seconds| begin + SignedDuration::from_secs(seconds);
        assert!(registry.warns("u-1", "Failed", "a", at(0)));
        assert!(!registry.warns("u-1", "Failed", "a", at(1)));
        assert!(registry.warns("u-1", "Failed", "b", at(2)));
        assert!(!registry.warns("u-1", "Failed", "b", at(601)));
        assert!(registry.warns("u-1", "Failed", "b", at(602)));
        assert!(!registry.warns("u-2", "Failed", "a", at(0)), "nobody knows that Pod");
    }

    #[test]
    fn one_look_at_a_time_and_none_is_lost() {
        let registry = registry();
        assert!(!registry.begin("u-1"), "nothing is decided before everything was listed");
        registry.pods_listed(&["u-1".to_owned()]);
        registry.instances_listed(&[]);
        assert!(registry.begin("u-1"));
        assert!(!registry.begin("u-1"), "somebody is at it");
        assert!(registry.end("u-1"), "and looks once more");
        assert!(!registry.end("u-1"));
        registry.pod_gone("u-1");
        assert!(registry.begin("u-1"));
        assert!(!registry.end("u-1"));
        assert!(registry.uids().is_empty(), "what nobody needs is forgotten");
    }
}
