//! What the service knows, in memory: records without secrets, statuses as the host tells them, who watches.
//!
//! Pure: nothing here waits or does I/O. The caller holds the lock, so that a watcher's snapshot and its first change meet.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use jiff::Timestamp;
use joey_api::instance::{Instance, InstanceSpec, InstanceStatus, VolumeSource, WatchEvent, WirePhase};
use joey_model::{ErrorKind, Fault, InstanceId};
use tokio::sync::broadcast;

/// Changes a watcher may be behind before it is cut off.
const BEHIND: usize = 8192;

pub(crate) struct State {
    items: BTreeMap<InstanceId, Item>,
    /// Names and tokens in use, also of instances that are just being recorded.
    names: HashMap<String, InstanceId>,
    tokens: HashMap<String, InstanceId>,
    revision: u64,
    changes: broadcast::Sender<Arc<WatchEvent>>,
}

pub(crate) struct Item {
    pub(crate) instance: Instance,
    /// Revision of the record in the store.
    pub(crate) stored: u64,
    pub(crate) grace: Option<u32>,
}

/// What a reservation found.
pub(crate) enum Reserved {
    New,
    /// The same call was made before.
    Before(Box<Instance>),
}

impl State {
    pub(crate) fn new(revision: u64) -> Self {
        let (changes, _) = broadcast::channel(BEHIND);
        Self { items: BTreeMap::new(), names: HashMap::new(), tokens: HashMap::new(), revision, changes }
    }

    /// Takes name and token for an instance about to be recorded.
    pub(crate) fn reserve(&mut self, id: &InstanceId, spec: &InstanceSpec) -> Result<Reserved, Fault> {
        if let Some(before) = spec.client_token.as_ref().and_then(|token| self.tokens.get(token)) {
            return match self.items.get(before) {
                Some(item) => Ok(Reserved::Before(Box::new(item.instance.clone()))),
                None => Err(Fault::new(
                    ErrorKind::Retryable,
                    "CreationUnderWay",
                    format!("instance \"{}\" is being created by the same call", spec.name),
                )),
            };
        }
        if self.names.contains_key(&spec.name) {
            return Err(name_taken(&spec.name));
        }
        self.names.insert(spec.name.clone(), id.clone());
        if let Some(token) = &spec.client_token {
            self.tokens.insert(token.clone(), id.clone());
        }
        Ok(Reserved::New)
    }

    /// Gives back what [`State::reserve`] took, or what a removed instance held.
    pub(crate) fn release(&mut self, id: &InstanceId, spec: &InstanceSpec) {
        if self.names.get(&spec.name) == Some(id) {
            self.names.remove(&spec.name);
        }
        if let Some(token) = &spec.client_token
            && self.tokens.get(token) == Some(id)
        {
            self.tokens.remove(token);
        }
    }

    /// Adds an instance whose record is durable at revision `stored`.
    pub(crate) fn add(&mut self, id: &InstanceId, instance: Instance, stored: u64, grace: Option<u32>) -> Instance {
        self.names.insert(instance.spec.name.clone(), id.clone());
        if let Some(token) = &instance.spec.client_token {
            self.tokens.insert(token.clone(), id.clone());
        }
        self.items.insert(id.clone(), Item { instance, stored, grace });
        self.tell(id)
    }

    /// Applies `change` to an instance and tells the watchers when it changed anything.
    pub(crate) fn change(&mut self, id: &InstanceId, change: impl FnOnce(&mut Item)) -> Option<Instance> {
        let item = self.items.get_mut(id)?;
        let before = item.instance.clone();
        change(item);
        if item.instance == before {
            return Some(before);
        }
        Some(self.tell(id))
    }

    /// Takes over the host's word on an instance.
    pub(crate) fn set_status(&mut self, id: &InstanceId, status: InstanceStatus) {
        self.change(id, |item| {
            item.instance.status = status;
            if item.instance.deleted_at.is_some() {
                item.instance.status.phase = WirePhase::Terminating;
            }
        });
    }

    pub(crate) fn remove(&mut self, id: &InstanceId) {
        let Some(item) = self.items.remove(id) else { return };
        self.release(id, &item.instance.spec);
        self.revision += 1;
        let gone = WatchEvent::Gone { id: id.to_string(), name: item.instance.spec.name, revision: self.revision };
        let _ = self.changes.send(Arc::new(gone));
    }

    pub(crate) fn item(&self, id: &InstanceId) -> Option<&Item> {
        self.items.get(id)
    }

    pub(crate) fn ids(&self) -> Vec<InstanceId> {
        self.items.keys().cloned().collect()
    }

    /// Finds by id, else by name.
    pub(crate) fn find(&self, name: &str) -> Option<(InstanceId, &Item)> {
        let by_id = InstanceId::parse(name).ok().filter(|id| self.items.contains_key(id));
        let id = by_id.or_else(|| self.names.get(name).cloned())?;
        let item = self.items.get(&id)?;
        Some((id, item))
    }

    pub(crate) fn list(&self) -> Vec<Instance> {
        self.items.values().map(|item| item.instance.clone()).collect()
    }

    /// Everything there is, its revision, and the changes that follow.
    pub(crate) fn watch(&self) -> (Vec<Instance>, u64, broadcast::Receiver<Arc<WatchEvent>>) {
        (self.list(), self.revision, self.changes.subscribe())
    }

    fn tell(&mut self, id: &InstanceId) -> Instance {
        self.revision += 1;
        let revision = self.revision;
        let item = self.items.get_mut(id).expect("the caller found it under this lock");
        item.instance.revision = revision;
        let instance = item.instance.clone();
        if self.changes.receiver_count() > 0 {
            let _ = self.changes.send(Arc::new(WatchEvent::Set { instance: Box::new(instance.clone()) }));
        }
        instance
    }
}

/// The instance that readers see: without credentials and file contents.
pub(crate) fn shown(
    id: &InstanceId,
    spec: &InstanceSpec,
    created_at: Timestamp,
    deleted_at: Option<Timestamp>,
) -> Instance {
    let mut spec = spec.clone();
    spec.credentials.clear();
    for volume in &mut spec.volumes {
        if let VolumeSource::Files(files) = &mut volume.source {
            files.iter_mut().for_each(|file| file.base64.clear());
        }
    }
    let phase = if deleted_at.is_some() { WirePhase::Terminating } else { WirePhase::Pending };
    let status = InstanceStatus { phase, ..InstanceStatus::default() };
    Instance { id: id.to_string(), spec, status, created_at, deleted_at, revision: 0 }
}

pub(crate) fn name_taken(name: &str) -> Fault {
    Fault::new(ErrorKind::Conflict, "NameTaken", format!("instance name \"{name}\" is taken"))
        .with_hint(format!("choose another name, or end the one that has it: joey rm {name}"))
}

pub(crate) fn not_found(name: &str) -> Fault {
    Fault::new(ErrorKind::NotFound, "NotFound", format!("instance \"{name}\" does not exist"))
        .with_hint("list what there is: joey ps")
}
