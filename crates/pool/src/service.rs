//! The service itself: records, deletion, following the host.
//!
//! ```text
//! create ── record durable ── host.create ──► (host's statuses) ──► delete: deletedAt durable ── host.delete ── host says
//!              │ crash: reconcile creates again                         │ crash: reconcile deletes again        gone
//!              └ refused by the host: record removed                    └──────────────────► record removed ◄────┘
//! ```

use std::sync::{Arc, Mutex, MutexGuard, Weak};

use futures::StreamExt;
use jiff::Timestamp;
use joey_api::change::InstanceChange;
use joey_api::instance::{Instance, InstanceSpec, InstanceStatus, WatchEvent, WirePhase};
use joey_api::validate;
use joey_model::{ErrorKind, Fault, InstanceId, checkpoint};
use joey_store::{Condition, Op, Store, TxnOutcome};
use tokio::sync::broadcast;

use crate::host::{Host, HostEvents};
use crate::persist::{INSTANCES, Record, instance_key, name_key, token_key};
use crate::state::{Reserved, State, name_taken, not_found, shown};

/// Durable steps at which a process may be told to stop (`joey_model::checkpoint`).
pub const CHECKPOINTS: [&str; 5] =
    ["pool.recorded", "pool.host-accepted", "pool.change-recorded", "pool.deletion-recorded", "pool.record-removed"];

/// Longest client token, in bytes.
const LONGEST_TOKEN: usize = 256;

/// The instance service over one host.
pub struct Pool {
    store: Arc<dyn Store>,
    pub(crate) host: Arc<dyn Host>,
    state: Mutex<State>,
}

impl Pool {
    /// Reads the records, brings the host in line with them, and follows the host until the service is dropped.
    pub async fn open(store: Arc<dyn Store>, host: Arc<dyn Host>) -> Result<Arc<Self>, Fault> {
        let pool = Arc::new(Self { state: Mutex::new(State::new(store.revision())), store, host });
        pool.load().await?;
        let events = pool.reconcile().await?;
        tokio::spawn(follow(Arc::downgrade(&pool), events));
        Ok(pool)
    }

    /// Records an instance and hands it to the host. `false`: the same call was made before.
    pub async fn create(&self, spec: InstanceSpec) -> Result<(Instance, bool), Fault> {
        validate::instance(&spec)?;
        self.check_admission(&spec).await?;
        let id = InstanceId::from_bits(rand::random());
        if let Reserved::Before(instance) = self.state().reserve(&id, &spec)? {
            return Ok((*instance, false));
        }
        let record = Record::new(&id, spec, Timestamp::now());
        let instance = match self.record(&id, &record).await {
            Ok(instance) => instance,
            Err(fault) => {
                self.state().release(&id, &record.spec);
                return Err(fault);
            }
        };
        checkpoint::reached("pool.recorded");
        if let Err(fault) = self.host.create(&id, record.spec).await {
            self.remove(&id).await?;
            return Err(fault);
        }
        checkpoint::reached("pool.host-accepted");
        Ok((instance, true))
    }

    /// Marks an instance deleted and tells the host. The record goes when the host says that the instance is gone.
    pub async fn delete(&self, name: &str, grace: Option<u32>) -> Result<Instance, Fault> {
        let id = self.id(name)?;
        let mark = |record: &mut Record| {
            record.deleted_at.get_or_insert_with(Timestamp::now);
            record.grace = match (record.grace, grace) {
                (Some(before), Some(now)) => Some(before.min(now)),
                (before, now) => now.or(before),
            };
            Ok(())
        };
        let instance = self.rewrite(&id, mark).await?;
        checkpoint::reached("pool.deletion-recorded");
        let grace = self.state().item(&id).and_then(|item| item.grace);
        match self.host.delete(&id, grace).await {
            Err(fault) if fault.kind == ErrorKind::NotFound => self.remove(&id).await?,
            other => other?,
        }
        Ok(instance)
    }

    /// Changes what may change of a living instance; durable when it returns, and soon in force.
    pub async fn change(&self, name: &str, change: &InstanceChange) -> Result<Instance, Fault> {
        let id = self.id(name)?;
        let apply = |record: &mut Record| {
            change.apply(&mut record.spec)?;
            validate::instance(&record.spec)
        };
        let instance = self.rewrite(&id, apply).await?;
        checkpoint::reached("pool.change-recorded");
        match self.tell_host(&id).await {
            Err(fault) if fault.kind == ErrorKind::NotFound && instance.deleted_at.is_some() => {}
            other => other?,
        }
        Ok(instance)
    }

    /// Tells the host what an instance shall be. Of calls at once the last word is the newest record's.
    async fn tell_host(&self, id: &InstanceId) -> Result<(), Fault> {
        let key = instance_key(id);
        let mut told = 0;
        loop {
            let Some(entry) = self.store.get(&key).await?.0 else { return Err(not_found(id.as_str())) };
            if entry.mod_revision == told {
                return Ok(());
            }
            let (_, record) = Record::decode(&key, &entry.value)?;
            self.host.change(id, record.spec).await?;
            told = entry.mod_revision;
        }
    }

    pub fn get(&self, name: &str) -> Result<Instance, Fault> {
        self.state().find(name).map(|(_, item)| item.instance.clone()).ok_or_else(|| not_found(name))
    }

    pub fn list(&self) -> Vec<Instance> {
        self.state().list()
    }

    /// Everything there is, its revision, and the changes that follow. A reader that falls behind is told `Lagged`.
    pub fn watch(&self) -> (Vec<Instance>, u64, broadcast::Receiver<Arc<WatchEvent>>) {
        self.state().watch()
    }

    /// The id that an id or a name stands for.
    pub fn id(&self, name: &str) -> Result<InstanceId, Fault> {
        self.state().find(name).map(|(id, _)| id).ok_or_else(|| not_found(name))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    async fn check_admission(&self, spec: &InstanceSpec) -> Result<(), Fault> {
        if let Some(token) = &spec.client_token
            && (token.is_empty() || token.len() > LONGEST_TOKEN)
        {
            let message = format!("instance \"{}\": a client token has 1 to {LONGEST_TOKEN} bytes", spec.name);
            return Err(Fault::new(ErrorKind::Invalid, "InvalidInstance", message));
        }
        let host = self.host.describe().await;
        let classes = &host.classes;
        if classes.contains(&spec.class) {
            return Ok(());
        }
        if let Some(why) = host.classes_missing.get(&spec.class) {
            let (name, class) = (&spec.name, &spec.class);
            let message = format!("instance \"{name}\": this host makes no sandboxes of class \"{class}\": {why}");
            return Err(Fault::new(ErrorKind::Invalid, "ClassMissing", message));
        }
        let message = format!(
            "instance \"{}\": sandbox class \"{}\" is not known; classes here: {}",
            spec.name,
            spec.class,
            classes.join(", ")
        );
        Err(Fault::new(ErrorKind::Invalid, "UnknownClass", message))
    }

    async fn load(&self) -> Result<(), Fault> {
        let range = self.store.range(INSTANCES, None, 0).await?;
        for entry in range.entries {
            let (id, record) = Record::decode(&entry.key, &entry.value)?;
            let instance = shown(&id, &record.spec, record.created_at, record.deleted_at);
            self.state().add(&id, instance, entry.mod_revision, record.grace);
        }
        Ok(())
    }

    /// Writes a new record with its indexes, in one transaction.
    async fn record(&self, id: &InstanceId, record: &Record) -> Result<Instance, Fault> {
        let absent = |key: String| Condition::ModRevision { key, equals: 0 };
        let put = |key: String, value: bytes::Bytes| Op::Put { key, value, lease: None };
        let id_bytes = || bytes::Bytes::from(id.to_string());
        let name = name_key(&record.spec.name);
        let mut conditions = vec![absent(instance_key(id)), absent(name.clone())];
        let mut ops = vec![put(instance_key(id), record.encode()?), put(name, id_bytes())];
        if let Some(token) = &record.spec.client_token {
            conditions.push(absent(token_key(token)));
            ops.push(put(token_key(token), id_bytes()));
        }
        match self.store.transact(conditions, ops).await? {
            TxnOutcome::Committed { revision } => {
                let instance = shown(id, &record.spec, record.created_at, None);
                Ok(self.state().add(id, instance, revision, None))
            }
            TxnOutcome::Refused { .. } => Err(name_taken(&record.spec.name)),
        }
    }

    /// Reads, changes and writes a record; again when somebody else wrote meanwhile.
    async fn rewrite(
        &self,
        id: &InstanceId,
        change: impl Fn(&mut Record) -> Result<(), Fault>,
    ) -> Result<Instance, Fault> {
        let key = instance_key(id);
        loop {
            let Some(entry) = self.store.get(&key).await?.0 else { return Err(not_found(id.as_str())) };
            let (_, mut record) = Record::decode(&key, &entry.value)?;
            change(&mut record)?;
            let value = record.encode()?;
            if value != entry.value {
                let condition = Condition::ModRevision { key: key.clone(), equals: entry.mod_revision };
                let op = Op::Put { key: key.clone(), value, lease: None };
                match self.store.transact(vec![condition], vec![op]).await? {
                    TxnOutcome::Committed { revision } => return self.rewritten(id, &record, revision),
                    TxnOutcome::Refused { .. } => continue,
                }
            }
            return self.rewritten(id, &record, entry.mod_revision);
        }
    }

    fn rewritten(&self, id: &InstanceId, record: &Record, stored: u64) -> Result<Instance, Fault> {
        let spec = shown(id, &record.spec, record.created_at, record.deleted_at).spec;
        let changed = self.state().change(id, |item| {
            item.stored = stored.max(item.stored);
            item.grace = record.grace;
            item.instance.spec = spec;
            item.instance.deleted_at = record.deleted_at;
            if record.deleted_at.is_some() {
                item.instance.status.phase = WirePhase::Terminating;
            }
        });
        changed.ok_or_else(|| not_found(id.as_str()))
    }

    /// Removes a record with its indexes, then tells the watchers.
    async fn remove(&self, id: &InstanceId) -> Result<(), Fault> {
        let Some(spec) = self.state().item(id).map(|item| item.instance.spec.clone()) else { return Ok(()) };
        let mut ops = vec![Op::Delete { key: instance_key(id) }, Op::Delete { key: name_key(&spec.name) }];
        ops.extend(spec.client_token.as_deref().map(|token| Op::Delete { key: token_key(token) }));
        let exists = Condition::Exists { key: instance_key(id) };
        // Refused: another call removed it already.
        self.store.transact(vec![exists], ops).await?;
        checkpoint::reached("pool.record-removed");
        self.state().remove(id);
        Ok(())
    }

    /// Brings the host in line with the records: what it does not know is created, what has no record is deleted, and
    /// deletions are asked for again.
    async fn reconcile(&self) -> Result<HostEvents, Fault> {
        let (present, events) = self.host.watch();
        let mut known = std::collections::HashSet::new();
        for (id, status) in present {
            if self.state().item(&id).is_none() {
                tracing::info!(instance = %id, "host has an instance without a record, deleting it");
                forgiving(self.host.delete(&id, Some(0)).await)?;
            }
            self.state().set_status(&id, status);
            known.insert(id);
        }
        for id in self.state_ids() {
            let Some(entry) = self.store.get(&instance_key(&id)).await?.0 else { continue };
            let (_, record) = Record::decode(&entry.key, &entry.value)?;
            match (record.deleted_at, known.contains(&id)) {
                (Some(_), true) => forgiving(self.host.delete(&id, record.grace).await)?,
                (Some(_), false) => self.remove(&id).await?,
                (None, true) => {
                    // A change may have been recorded that the host was not told of.
                    if let Err(fault) = self.host.change(&id, record.spec).await {
                        tracing::warn!(instance = %id, %fault, "host did not take over what the instance shall be");
                    }
                }
                (None, false) => {
                    tracing::info!(instance = %id, "host does not have the instance, creating it");
                    if let Err(fault) = self.host.create(&id, record.spec).await {
                        self.state().set_status(&id, refused(&fault));
                    }
                }
            }
        }
        Ok(events)
    }

    fn state_ids(&self) -> Vec<InstanceId> {
        self.state().ids()
    }

    async fn apply(&self, id: InstanceId, status: Option<InstanceStatus>) -> Result<(), Fault> {
        let deleted = self.state().item(&id).map(|item| item.instance.deleted_at.is_some());
        match (status, deleted) {
            (Some(status), _) => self.state().set_status(&id, status),
            (None, Some(true)) => self.remove(&id).await?,
            (None, Some(false)) => {
                let message = format!("instance \"{id}\" is no longer on its host");
                self.state().set_status(&id, refused(&Fault::new(ErrorKind::Internal, "InstanceLost", message)));
            }
            (None, None) => {}
        }
        Ok(())
    }
}

/// Follows the host for as long as somebody holds the service.
async fn follow(pool: Weak<Pool>, mut events: HostEvents) {
    loop {
        let event = events.next().await;
        let Some(pool) = pool.upgrade() else { return };
        let outcome = match event {
            Some((id, status)) => pool.apply(id, status).await,
            None => match pool.reconcile().await {
                Ok(again) => {
                    events = again;
                    Ok(())
                }
                Err(fault) => Err(fault),
            },
        };
        if let Err(fault) = outcome {
            tracing::error!(%fault, "the host's word could not be recorded, looking again");
            // The store failed; at the next turn everything is compared again.
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            events = futures::stream::empty().boxed();
        }
    }
}

fn forgiving(outcome: Result<(), Fault>) -> Result<(), Fault> {
    match outcome {
        Err(fault) if fault.kind == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn refused(fault: &Fault) -> InstanceStatus {
    InstanceStatus {
        phase: WirePhase::Failed,
        reason: Some(fault.reason.clone()),
        message: Some(fault.message.clone()),
        ..InstanceStatus::default()
    }
}
