//! ConfigMaps and Secrets that Pods show as files: each is watched by its own name, once for all Pods that show it, for as long as
//! one does, and no more when it says that it never changes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::runtime::watcher;
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::resolve::{of_config_map, of_secret};
use joey_podspec::{Kind, Values};

const RETRY: Duration = Duration::from_secs(1);

/// An object of a namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Key {
    namespace: String,
    kind: Kind,
    name: String,
}

/// What is shown, and by whom. Cheap to clone; clones are the same.
#[derive(Clone)]
pub(crate) struct Shown {
    client: kube::Client,
    state: Arc<Mutex<State>>,
    woken: mpsc::UnboundedSender<String>,
}

#[derive(Default)]
struct State {
    objects: HashMap<Key, Object>,
    /// What each Pod shows, by its UID.
    pods: HashMap<String, BTreeSet<Key>>,
    /// Grows with every change of an object, and names each watch.
    revision: u64,
}

#[derive(Default)]
struct Object {
    pods: HashSet<String>,
    /// `None`: nothing was heard yet; within: it is not there.
    known: Option<Option<Arc<Values>>>,
    revision: u64,
    watch: Option<Watch>,
}

struct Watch {
    number: u64,
    task: AbortHandle,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a Pod's objects hold; those that are not there are left out.
pub(crate) struct Contents {
    pub(crate) values: BTreeMap<(Kind, String), Arc<Values>>,
    /// Another one means other contents.
    pub(crate) revision: u64,
}

impl Shown {
    /// The UIDs of Pods that have something else to show come out of the receiver.
    pub(crate) fn new(client: kube::Client) -> (Self, mpsc::UnboundedReceiver<String>) {
        let (woken, waking) = mpsc::unbounded_channel();
        (Self { client, state: Arc::default(), woken }, waking)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a Pod show exactly these objects. `None`: not all are known yet; the Pod is woken when they are.
    pub(crate) fn hold(&self, uid: &str, namespace: &str, wanted: &BTreeSet<(Kind, String)>) -> Option<Contents> {
        let key =
            |(kind, name): &(Kind, String)| Key { namespace: namespace.to_owned(), kind: *kind, name: name.clone() };
        let keys: BTreeSet<Key> = wanted.iter().map(key).collect();
        let mut state = self.lock();
        if state.pods.get(uid).is_none_or(|held| *held != keys) {
            self.give_up(&mut state, uid, &keys);
            for key in &keys {
                self.take_up(&mut state, uid, key);
            }
            state.pods.insert(uid.to_owned(), keys.clone());
        }
        let mut contents = Contents { values: BTreeMap::new(), revision: 0 };
        for key in keys {
            let object = state.objects.get(&key)?;
            contents.revision = contents.revision.max(object.revision);
            if let Some(values) = object.known.clone()? {
                contents.values.insert((key.kind, key.name), values);
            }
        }
        Some(contents)
    }

    /// The Pod shows nothing any more.
    pub(crate) fn release(&self, uid: &str) {
        let mut state = self.lock();
        self.give_up(&mut state, uid, &BTreeSet::new());
        state.pods.remove(uid);
    }

    fn give_up(&self, state: &mut State, uid: &str, but: &BTreeSet<Key>) {
        let held = state.pods.get(uid).cloned().unwrap_or_default();
        for key in held.difference(but) {
            if let Some(object) = state.objects.get_mut(key) {
                object.pods.remove(uid);
                if object.pods.is_empty() {
                    state.objects.remove(key);
                }
            }
        }
    }

    fn take_up(&self, state: &mut State, uid: &str, key: &Key) {
        state.revision += 1;
        let number = state.revision;
        let object = state.objects.entry(key.clone()).or_default();
        // One that does not change may have been deleted and made anew before this Pod came.
        if object.pods.insert(uid.to_owned()) && object.watch.is_none() {
            let task = tokio::spawn(self.clone().watch(key.clone(), number)).abort_handle();
            object.watch = Some(Watch { number, task });
        }
    }

    async fn watch(self, key: Key, number: u64) {
        match key.kind {
            Kind::ConfigMap => self.follow(&key, number, |map: ConfigMap| (map.immutable, of_config_map(map))).await,
            Kind::Secret => self.follow(&key, number, |secret: Secret| (secret.immutable, of_secret(secret))).await,
        }
    }

    /// Follows one object until it can change no more.
    async fn follow<K>(&self, key: &Key, number: u64, read: impl Fn(K) -> (Option<bool>, Values))
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + DeserializeOwned
            + Send
            + 'static,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), &key.namespace);
        let named = watcher::Config::default().fields(&format!("metadata.name={}", key.name));
        let mut events = watcher(api, named).boxed();
        let mut listed = false;
        loop {
            let now = match events.try_next().await {
                Ok(Some(watcher::Event::Init)) => {
                    listed = false;
                    continue;
                }
                Ok(Some(watcher::Event::InitApply(object) | watcher::Event::Apply(object))) => {
                    listed = true;
                    Some(read(object))
                }
                Ok(Some(watcher::Event::InitDone)) if listed => continue,
                Ok(Some(watcher::Event::InitDone | watcher::Event::Delete(_))) => None,
                Ok(None) => return,
                Err(error) => {
                    let Key { namespace, kind, name } = key;
                    tracing::warn!(namespace, ?kind, name, %error, "object cannot be watched, trying again");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            let fixed = now.as_ref().is_some_and(|(immutable, _)| *immutable == Some(true));
            if !self.learn(key, number, now.map(|(_, values)| values), fixed) || fixed {
                return;
            }
        }
    }

    /// Takes in what an object holds; false: this watch is not wanted any more.
    fn learn(&self, key: &Key, number: u64, values: Option<Values>, fixed: bool) -> bool {
        let mut state = self.lock();
        state.revision += 1;
        let revision = state.revision;
        let Some(object) = state.objects.get_mut(key) else { return false };
        if object.watch.as_ref().is_none_or(|watch| watch.number != number) {
            return false;
        }
        if fixed {
            // It aborts the task that is here, which has nothing to wait for any more.
            object.watch = None;
        }
        if object.known.as_ref().is_some_and(|known| known.as_deref() == values.as_ref()) {
            return true;
        }
        object.known = Some(values.map(Arc::new));
        object.revision = revision;
        for uid in &object.pods {
            let _ = self.woken.send(uid.clone());
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::{Request, Response};
    use kube::client::Body;
    use serde_json::{Value, json};

    use super::*;

    /// An API server that has one object and keeps what it was asked for: `list` or `watch` and the selector.
    fn server(object: Value) -> (kube::Client, Arc<Mutex<Vec<String>>>, mpsc::UnboundedSender<Value>) {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (changes, from) = mpsc::unbounded_channel::<Value>();
        let (seen, from) = (asked.clone(), Arc::new(tokio::sync::Mutex::new(from)));
        let service = tower::service_fn(move |request: Request<Body>| {
            let (query, from, object) =
                (request.uri().query().unwrap_or_default().to_owned(), from.clone(), object.clone());
            let watches = query.contains("watch=");
            let verb = if watches { "watch" } else { "list" };
            assert!(query.contains("fieldSelector=metadata.name%3Dm"), "{query}");
            seen.lock().unwrap().push(verb.to_owned());
            async move {
                let body = match watches {
                    false => {
                        let list = json!({"kind": "ConfigMapList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"},
                            "items": [object]});
                        joey_rpc::full(list.to_string())
                    }
                    true => {
                        let lines = futures::stream::unfold(from, |from| async move {
                            let event = from.lock().await.recv().await?;
                            Some((Ok(bytes::Bytes::from(format!("{event}\n"))), from))
                        });
                        joey_rpc::stream(lines)
                    }
                };
                Ok::<_, Infallible>(Response::new(body))
            }
        });
        (kube::Client::new(service, "default"), asked, changes)
    }

    fn map(text: &str, immutable: bool) -> Value {
        json!({"kind": "ConfigMap", "apiVersion": "v1", "immutable": immutable, "data": {"k": text},
            "metadata": {"name": "m", "namespace": "n", "resourceVersion": "2"}})
    }

    fn text(contents: &Contents) -> Vec<u8> {
        contents.values[&(Kind::ConfigMap, "m".to_owned())]["k"].clone()
    }

    async fn woken(waking: &mut mpsc::UnboundedReceiver<String>) -> String {
        tokio::time::timeout(Duration::from_secs(10), waking.recv()).await.unwrap().unwrap()
    }

    #[tokio::test]
    async fn one_watch_for_all_that_show_an_object() {
        let (client, asked, changes) = server(map("1", false));
        let (shown, mut waking) = Shown::new(client);
        let wanted = BTreeSet::from([(Kind::ConfigMap, "m".to_owned())]);
        assert!(shown.hold("a", "n", &wanted).is_none());
        assert_eq!(woken(&mut waking).await, "a");
        let first = shown.hold("a", "n", &wanted).unwrap();
        let second = shown.hold("b", "n", &wanted).unwrap();
        assert_eq!((text(&first), first.revision), (b"1".to_vec(), second.revision));
        changes.send(json!({"type": "MODIFIED", "object": map("2", false)})).unwrap();
        let both = BTreeSet::from([woken(&mut waking).await, woken(&mut waking).await]);
        assert_eq!(both, BTreeSet::from(["a".to_owned(), "b".to_owned()]));
        let changed = shown.hold("a", "n", &wanted).unwrap();
        assert!(text(&changed) == b"2" && changed.revision > first.revision);
        changes.send(json!({"type": "DELETED", "object": map("2", false)})).unwrap();
        let _ = (woken(&mut waking).await, woken(&mut waking).await);
        assert!(shown.hold("b", "n", &wanted).unwrap().values.is_empty());
        assert_eq!(*asked.lock().unwrap(), ["list", "watch"]);
        shown.release("a");
        assert_eq!(shown.lock().objects.len(), 1);
        shown.release("b");
        assert!(shown.lock().objects.is_empty() && shown.lock().pods.is_empty());
    }

    #[tokio::test]
    async fn what_never_changes_is_not_watched() {
        let (client, asked, _changes) = server(map("1", true));
        let (shown, mut waking) = Shown::new(client);
        let wanted = BTreeSet::from([(Kind::ConfigMap, "m".to_owned())]);
        assert!(shown.hold("a", "n", &wanted).is_none());
        woken(&mut waking).await;
        assert_eq!(text(&shown.hold("a", "n", &wanted).unwrap()), b"1");
        assert!(shown.lock().objects.values().all(|object| object.watch.is_none()));
        // Who comes later looks once more, and nobody watches either.
        assert!(shown.hold("b", "n", &wanted).is_some());
        while asked.lock().unwrap().len() < 2 || shown.lock().objects.values().any(|object| object.watch.is_some()) {
            tokio::task::yield_now().await;
        }
        assert_eq!(*asked.lock().unwrap(), ["list", "list"]);
    }
}
