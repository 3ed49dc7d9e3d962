//! The watch cache: all objects and a bounded piece of history, fed by one watch of the store.
//!
//! ```text
//!   store.watch(/registry/) ──► feed task ──► per kind: objects by key, Pods by node, last changes
//!                                   │
//!                                   └──► "reached revision N" ──► lists waiting for their own writes, watchers
//! ```
//! One task writes; everybody else reads under a short lock. Objects are shared, never copied. The cache never answers a
//! read that a write depends on: writers read the store itself.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::StreamExt;
use joey_store::{Event as StoreEvent, Store};
use tokio::sync::watch;

use crate::kinds::{RESOURCES, ROOT, Resource};
use crate::object::Object;
use crate::status::{ApiError, ApiResult};

/// Changes of one kind that a watcher may be behind.
const HISTORY: usize = 4096;
/// How long a list waits for the cache to hold what was written before it.
const CATCH_UP: std::time::Duration = std::time::Duration::from_secs(10);

/// One object's step from one state to the next; both absent never happens.
#[derive(Debug, Clone)]
pub struct Change {
    pub revision: u64,
    pub before: Option<Arc<Object>>,
    pub after: Option<Arc<Object>>,
}

#[derive(Default)]
struct Kind {
    objects: BTreeMap<String, Arc<Object>>,
    /// Keys by the value of `spec.nodeName`; only for kinds that have the field.
    by_node: HashMap<Box<str>, BTreeSet<String>>,
    history: VecDeque<Change>,
    /// Changes up to this revision are forgotten.
    floor: u64,
}

/// What a list sees at one instant.
pub struct Snapshot {
    pub objects: Vec<Arc<Object>>,
    pub revision: u64,
}

pub struct Cache {
    kinds: Vec<(&'static Resource, RwLock<Kind>)>,
    reached: watch::Sender<u64>,
    /// Highest revision this server has written.
    written: AtomicU64,
}

impl Cache {
    /// Loads everything and begins to follow the store; the task ends when the cache is dropped.
    pub async fn open(store: Arc<dyn Store>) -> ApiResult<Arc<Self>> {
        let kinds = RESOURCES.iter().filter(|r| r.is_stored()).map(|r| (r, RwLock::new(Kind::default()))).collect();
        let cache = Arc::new(Self { kinds, reached: watch::Sender::new(0), written: AtomicU64::new(0) });
        let revision = cache.load(&*store).await?;
        let weak = Arc::downgrade(&cache);
        tokio::spawn(async move {
            let mut after = revision;
            while let Some(cache) = weak.upgrade() {
                after = cache.follow(&store, &weak, after).await;
            }
        });
        Ok(cache)
    }

    fn kind(&self, resource: &'static Resource) -> Option<&RwLock<Kind>> {
        let stored: *const Resource = resource.storage();
        self.kinds.iter().find(|(r, _)| std::ptr::eq(*r, stored)).map(|(_, kind)| kind)
    }

    /// The kind that a key belongs to.
    fn owner(&self, key: &str) -> Option<(&'static Resource, &RwLock<Kind>)> {
        let mut words = key.strip_prefix(ROOT)?.split('/');
        let (group, plural) = (words.next()?, words.next()?);
        let group = if group == "core" { "" } else { group };
        self.kinds.iter().find(|(r, _)| r.group == group && r.plural == plural).map(|(r, kind)| (*r, kind))
    }

    /// Replaces everything by what the store holds now. Watchers from before must list again.
    async fn load(&self, store: &dyn Store) -> ApiResult<u64> {
        let mut all: Vec<BTreeMap<String, Arc<Object>>> = self.kinds.iter().map(|_| BTreeMap::new()).collect();
        // Pages of a store that goes on changing: the first page's revision is safe, later changes come by the watch.
        let mut first = None;
        let mut after: Option<String> = None;
        loop {
            let range = store.range(ROOT, after.as_deref(), 1000).await.map_err(ApiError::internal)?;
            let revision = *first.get_or_insert(range.revision);
            after = range.entries.last().map(|entry| entry.key.clone());
            for entry in range.entries {
                let Some((resource, _)) = self.owner(&entry.key) else { continue };
                let index = self.kinds.iter().position(|(r, _)| std::ptr::eq(*r, resource)).unwrap_or_default();
                match Object::read(resource, entry.key.clone(), entry.value, entry.mod_revision) {
                    Some(object) => drop(all[index].insert(entry.key, Arc::new(object))),
                    None => tracing::error!(key = entry.key, "a stored object is not readable"),
                }
            }
            if range.more && after.is_some() {
                continue;
            }
            for ((_, kind), objects) in self.kinds.iter().zip(all) {
                let mut kind = kind.write().unwrap_or_else(|poison| poison.into_inner());
                let by_node = HashMap::new();
                *kind = Kind { objects: BTreeMap::new(), by_node, history: VecDeque::new(), floor: revision };
                for object in objects.into_values() {
                    kind.put(object);
                }
            }
            self.reached.send_modify(|reached| *reached = (*reached).max(revision));
            return Ok(revision);
        }
    }

    /// Follows the store until its watch ends; returns where to go on.
    async fn follow(self: Arc<Self>, store: &Arc<dyn Store>, weak: &std::sync::Weak<Self>, after: u64) -> u64 {
        let mut changes = match store.watch(ROOT, after).await {
            Ok(changes) => changes,
            Err(error) => {
                tracing::warn!(%error, after, "the watch cache lists the store anew");
                return match self.load(&**store).await {
                    Ok(revision) => revision,
                    Err(error) => {
                        tracing::error!(%error, "the store cannot be read");
                        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                        after
                    }
                };
            }
        };
        drop(self);
        let mut after = after;
        while let Some(Ok(batch)) = changes.next().await {
            let Some(cache) = weak.upgrade() else { return after };
            for event in batch.events {
                cache.apply(event);
            }
            after = after.max(batch.revision);
            cache.reached.send_modify(|reached| *reached = (*reached).max(after));
        }
        after
    }

    fn apply(&self, event: StoreEvent) {
        let (key, revision, value) = match event {
            StoreEvent::Put { entry, .. } => (entry.key, entry.mod_revision, Some(entry.value)),
            StoreEvent::Delete { key, mod_revision, .. } => (key, mod_revision, None),
        };
        let Some((resource, kind)) = self.owner(&key) else { return };
        let after = value.and_then(|value| {
            let object = Object::read(resource, key.clone(), value, revision);
            if object.is_none() {
                tracing::error!(key, "a stored object is not readable");
            }
            object.map(Arc::new)
        });
        let mut kind = kind.write().unwrap_or_else(|poison| poison.into_inner());
        // Seen already: the pages of a load may be newer than the revision the watch begins at.
        if kind.objects.get(&key).is_some_and(|object| object.revision >= revision) {
            return;
        }
        let before = match &after {
            Some(object) => kind.put(object.clone()),
            None => kind.remove(&key),
        };
        if before.is_none() && after.is_none() {
            return;
        }
        if kind.history.len() >= HISTORY
            && let Some(oldest) = kind.history.pop_front()
        {
            kind.floor = oldest.revision;
        }
        kind.history.push_back(Change { revision, before, after });
    }

    /// Notes that this server has written a revision: later lists will hold it.
    pub fn wrote(&self, revision: u64) {
        self.written.fetch_max(revision, Ordering::SeqCst);
    }

    /// Waits until everything this server wrote, and the revision asked for, is in.
    pub async fn caught_up(&self, at_least: u64) -> ApiResult<u64> {
        let wanted = self.written.load(Ordering::SeqCst);
        let mut reached = self.reached.subscribe();
        if at_least > wanted && at_least > *reached.borrow() {
            // A revision from the future can only come from another cluster or another part of the store.
            let soon = tokio::time::timeout(std::time::Duration::from_secs(3), reached.wait_for(|r| *r >= at_least));
            if soon.await.is_err() {
                let mut error = ApiError::timeout();
                error.message = format!("Too large resource version: {at_least}, current: {}", *self.reached.borrow());
                error.details = serde_json::json!({"retryAfterSeconds": 1,
                    "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]});
                error.retry_after = Some(1);
                return Err(error);
            }
        }
        let caught = tokio::time::timeout(CATCH_UP, reached.wait_for(|r| *r >= wanted)).await;
        match caught {
            Ok(Ok(revision)) => Ok(*revision),
            _ => Err(ApiError::timeout()),
        }
    }

    /// The revision reached, for those who wait for changes.
    pub fn progress(&self) -> watch::Receiver<u64> {
        self.reached.subscribe()
    }

    /// Objects of a kind whose key begins with `prefix`, after the key `after`, or those of one node.
    pub fn list(
        &self,
        resource: &'static Resource,
        prefix: &str,
        node: Option<&str>,
        keep: &dyn Fn(&Object) -> bool,
    ) -> Snapshot {
        let Some(kind) = self.kind(resource) else { return Snapshot { objects: Vec::new(), revision: 0 } };
        // The revision is read before the objects: a watch from it may repeat a change but never misses one.
        let revision = *self.reached.borrow();
        let kind = kind.read().unwrap_or_else(|poison| poison.into_inner());
        let objects = match node {
            Some(node) => kind
                .by_node
                .get(node)
                .into_iter()
                .flatten()
                .filter(|key| key.starts_with(prefix))
                .filter_map(|key| kind.objects.get(key))
                .filter(|object| keep(object))
                .cloned()
                .collect(),
            None => kind
                .objects
                .range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded))
                .take_while(|(key, _)| key.starts_with(prefix))
                .filter(|(_, object)| keep(object))
                .map(|(_, object)| object.clone())
                .collect(),
        };
        Snapshot { objects, revision }
    }

    /// Changes of a kind after a revision, up to the revision returned; an error when they are forgotten.
    pub fn changes(&self, resource: &'static Resource, after: u64) -> ApiResult<(Vec<Change>, u64)> {
        let Some(kind) = self.kind(resource) else { return Ok((Vec::new(), after)) };
        let reached = *self.reached.borrow();
        let kind = kind.read().unwrap_or_else(|poison| poison.into_inner());
        if after < kind.floor {
            return Err(ApiError::expired(format!("too old resource version: {after} ({})", kind.floor)));
        }
        let from = kind.history.partition_point(|change| change.revision <= after);
        let changes: Vec<Change> =
            kind.history.range(from..).take_while(|change| change.revision <= reached).cloned().collect();
        Ok((changes, reached.max(after)))
    }
}

impl Kind {
    fn put(&mut self, object: Arc<Object>) -> Option<Arc<Object>> {
        let before = self.objects.insert(object.key.clone(), object.clone());
        if let Some(before) = &before {
            self.forget_node(before);
        }
        if let Some(node) = node_of(&object) {
            self.by_node.entry(node.into()).or_default().insert(object.key.clone());
        }
        before
    }

    fn remove(&mut self, key: &str) -> Option<Arc<Object>> {
        let before = self.objects.remove(key)?;
        self.forget_node(&before);
        Some(before)
    }

    fn forget_node(&mut self, object: &Object) {
        let Some(node) = node_of(object) else { return };
        if let Some(keys) = self.by_node.get_mut(node) {
            keys.remove(&object.key);
            if keys.is_empty() {
                self.by_node.remove(node);
            }
        }
    }
}

/// The node a Pod is bound to: its first selectable field (see the table of kinds).
fn node_of(object: &Object) -> Option<&str> {
    match object.key.starts_with("/registry/core/pods/") {
        true => object.fields.first().map(|node| &**node).filter(|node| !node.is_empty()),
        false => None,
    }
}
