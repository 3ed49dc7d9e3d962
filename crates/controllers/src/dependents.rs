//! Objects that name an owner: they go when the last of their owners is gone, or before it, or are set free.
//!
//! ```text
//!   owner gone ───────────────────────────────► dependents without another owner are deleted
//!   owner waits with "foregroundDeletion" ────► dependents are deleted; when none blocks it, the owner is let go
//!   owner waits with "orphan" ────────────────► dependents forget it; then the owner is let go
//! ```
//! One task holds what it saw of all kinds (only objects with owners, and owners that wait) and acts on it. What it saw is
//! never proof that an owner is gone: that is asked of the server, by name and uid.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures::{StreamExt, stream};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, Preconditions, PropagationPolicy};
use kube::core::PartialObjectMeta;
use kube::discovery::{ApiResource, Discovery, Scope, verbs};
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::json;
use tokio::time::MissedTickBehavior;

/// How often what failed is tried again.
const RETRY: Duration = Duration::from_secs(2);
const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";

/// A kind, and whether its objects have namespaces.
struct Kind {
    resource: ApiResource,
    namespaced: bool,
}

/// Place of an object: its kind's number, namespace and name.
type Place = (usize, String, String);
type Seen = watcher::Event<PartialObjectMeta<DynamicObject>>;

/// What is kept of an object.
struct Known {
    uid: String,
    owners: Vec<OwnerReference>,
    /// The finalizer by which it waits for its dependents.
    waits: Option<&'static str>,
}

struct Collector {
    client: kube::Client,
    kinds: Vec<Kind>,
    known: HashMap<Place, Known>,
    /// What is to be looked at.
    due: HashSet<Place>,
    /// What a watch that begins anew has not shown again yet.
    unseen: HashMap<usize, HashSet<Place>>,
}

/// Collects until dropped.
pub(crate) async fn run(client: kube::Client) {
    let kinds = loop {
        match kinds(&client).await {
            Ok(kinds) => break kinds,
            Err(error) => tracing::debug!(%error, "kinds could not be discovered, trying again"),
        }
        tokio::time::sleep(RETRY).await;
    };
    let watches = kinds.iter().enumerate().map(|(number, kind)| {
        let objects = Api::<PartialObjectMeta<DynamicObject>>::all_with(client.clone(), &kind.resource);
        watcher(objects, watcher::Config::default()).default_backoff().map(move |event| (number, event)).boxed()
    });
    let mut events = stream::select_all(watches);
    let mut retries = tokio::time::interval(RETRY);
    retries.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (known, due, unseen) = (HashMap::new(), HashSet::new(), HashMap::new());
    let mut collector = Collector { client, kinds, known, due, unseen };
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some((number, Ok(event))) => collector.see(number, event),
                Some((_, Err(error))) => tracing::debug!(%error, "a watch for dependents broke off, beginning anew"),
                None => return,
            },
            _ = retries.tick(), if !collector.due.is_empty() => {}
        }
        collector.work().await;
    }
}

async fn kinds(client: &kube::Client) -> Result<Vec<Kind>, kube::Error> {
    let discovery = Discovery::new(client.clone()).run().await?;
    let mut kinds: Vec<Kind> = Vec::new();
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            let needed = [verbs::DELETE, verbs::LIST, verbs::WATCH, verbs::PATCH];
            // Events are the one kind of two groups; they have no owners, and there are many.
            if resource.kind != "Event" && needed.iter().all(|verb| capabilities.supports_operation(verb)) {
                kinds.push(Kind { namespaced: capabilities.scope == Scope::Namespaced, resource });
            }
        }
    }
    Ok(kinds)
}

impl Collector {
    fn see(&mut self, number: usize, event: Seen) {
        match event {
            watcher::Event::Init => {
                let of_kind = self.known.keys().filter(|place| place.0 == number).cloned().collect();
                self.unseen.insert(number, of_kind);
            }
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => self.keep(number, object.metadata),
            watcher::Event::Delete(object) => {
                self.gone(place(number, &object.metadata), object.metadata.uid.as_deref())
            }
            watcher::Event::InitDone => {
                for place in self.unseen.remove(&number).unwrap_or_default() {
                    let uid = self.known.get(&place).map(|known| known.uid.clone());
                    self.gone(place, uid.as_deref());
                }
                // Owners of this kind may have gone while nobody looked.
                let dependents = self.known.iter().filter(|(_, known)| !known.owners.is_empty());
                self.due.extend(dependents.map(|(place, _)| place.clone()));
            }
        }
    }

    fn keep(&mut self, number: usize, metadata: ObjectMeta) {
        let place = place(number, &metadata);
        if let Some(unseen) = self.unseen.get_mut(&number) {
            unseen.remove(&place);
        }
        let finalizers = metadata.finalizers.unwrap_or_default();
        let held_by = |word: &'static str| finalizers.iter().any(|finalizer| finalizer == word).then_some(word);
        let deleting = metadata.deletion_timestamp.is_some();
        let waits = if deleting { held_by(FOREGROUND).or(held_by(ORPHAN)) } else { None };
        let owners = metadata.owner_references.unwrap_or_default();
        let was_known = self.known.remove(&place).is_some();
        if owners.is_empty() && waits.is_none() && !was_known {
            return;
        }
        // An owner that waits is looked at again when one of its dependents changes.
        let waiting = self.known.iter().filter(|(_, known)| known.waits.is_some()).map(|(place, _)| place);
        self.due.extend(waiting.cloned());
        if owners.is_empty() && waits.is_none() {
            return;
        }
        self.due.insert(place.clone());
        self.known.insert(place, Known { uid: metadata.uid.unwrap_or_default(), owners, waits });
    }

    fn gone(&mut self, place: Place, uid: Option<&str>) {
        self.known.remove(&place);
        let depends = |known: &Known| known.waits.is_some() || known.owners.iter().any(|o| Some(&*o.uid) == uid);
        self.due.extend(self.known.iter().filter(|(_, known)| depends(known)).map(|(place, _)| place.clone()));
    }

    async fn work(&mut self) {
        for place in std::mem::take(&mut self.due) {
            if let Err(error) = self.look_at(&place).await {
                tracing::debug!(%error, namespace = place.1, name = place.2, "dependents could not be collected yet");
                self.due.insert(place);
            }
        }
    }

    async fn look_at(&self, place: &Place) -> Result<(), kube::Error> {
        let Some(known) = self.known.get(place) else { return Ok(()) };
        match known.waits {
            Some(FOREGROUND) => return self.delete_dependents(place, known).await,
            Some(_) => return self.orphan_dependents(place, known).await,
            None => {}
        }
        let (mut solid, mut waiting, mut absent) = (Vec::new(), false, false);
        for owner in &known.owners {
            match self.owner(place, owner).await? {
                Owner::Absent => absent = true,
                Owner::Waits => waiting = true,
                Owner::There => solid.push(owner),
            }
        }
        match solid.is_empty() {
            _ if !absent && !waiting => Ok(()),
            false => self.set_owners(place, known, &solid).await,
            true => self.delete(place, known, PropagationPolicy::Background).await,
        }
    }

    /// What has become of an owner. Kinds that nobody knows are taken for being there.
    async fn owner(&self, of: &Place, owner: &OwnerReference) -> Result<Owner, kube::Error> {
        let is_it = |kind: &Kind| kind.resource.kind == owner.kind && kind.resource.api_version == owner.api_version;
        let Some(number) = self.kinds.iter().position(is_it) else { return Ok(Owner::There) };
        let namespace = if self.kinds[number].namespaced { of.1.clone() } else { String::new() };
        let place = (number, namespace, owner.name.clone());
        let Some(found) = self.api(&place).get_metadata_opt(&owner.name).await? else { return Ok(Owner::Absent) };
        let waits = |meta: &ObjectMeta| {
            let finalizers = meta.finalizers.iter().flatten();
            meta.deletion_timestamp.is_some() && finalizers.into_iter().any(|finalizer| finalizer == FOREGROUND)
        };
        Ok(match found.metadata.uid.as_deref() == Some(&owner.uid) {
            false => Owner::Absent,
            true if waits(&found.metadata) => Owner::Waits,
            true => Owner::There,
        })
    }

    fn dependents<'a>(&'a self, uid: &'a str) -> impl Iterator<Item = (&'a Place, &'a Known, &'a OwnerReference)> {
        self.known.iter().filter_map(move |(place, known)| {
            known.owners.iter().find(|owner| owner.uid == uid).map(|owner| (place, known, owner))
        })
    }

    async fn delete_dependents(&self, place: &Place, known: &Known) -> Result<(), kube::Error> {
        let mut blocked = false;
        for (dependent, of, owner) in self.dependents(&known.uid) {
            blocked |= owner.block_owner_deletion == Some(true);
            if of.waits.is_none() && of.owners.len() == 1 {
                // What depends on the dependent goes before it, likewise.
                let has_own = self.dependents(&of.uid).next().is_some();
                let policy = if has_own { PropagationPolicy::Foreground } else { PropagationPolicy::Background };
                self.delete(dependent, of, policy).await?;
            }
        }
        if blocked { Ok(()) } else { self.let_go(place, known, FOREGROUND).await }
    }

    async fn orphan_dependents(&self, place: &Place, known: &Known) -> Result<(), kube::Error> {
        for (dependent, of, _) in self.dependents(&known.uid) {
            let others: Vec<&OwnerReference> = of.owners.iter().filter(|owner| owner.uid != known.uid).collect();
            self.set_owners(dependent, of, &others).await?;
        }
        self.let_go(place, known, ORPHAN).await
    }

    fn api(&self, place: &Place) -> Api<DynamicObject> {
        let kind = &self.kinds[place.0];
        match kind.namespaced {
            true => Api::namespaced_with(self.client.clone(), &place.1, &kind.resource),
            false => Api::all_with(self.client.clone(), &kind.resource),
        }
    }

    async fn delete(&self, place: &Place, known: &Known, policy: PropagationPolicy) -> Result<(), kube::Error> {
        let only_this = Preconditions { uid: Some(known.uid.clone()), resource_version: None };
        let how =
            DeleteParams { preconditions: Some(only_this), propagation_policy: Some(policy), ..Default::default() };
        tracing::debug!(kind = self.kinds[place.0].resource.kind, namespace = place.1, name = place.2, "owner is gone");
        settled(self.api(place).delete(&place.2, &how).await.map(drop))
    }

    async fn set_owners(&self, place: &Place, known: &Known, owners: &[&OwnerReference]) -> Result<(), kube::Error> {
        let patch = json!({"metadata": {"uid": known.uid, "ownerReferences": owners}});
        self.patch(place, &patch).await
    }

    /// Takes off the finalizer by which an owner waits.
    async fn let_go(&self, place: &Place, known: &Known, finalizer: &str) -> Result<(), kube::Error> {
        let Some(found) = self.api(place).get_metadata_opt(&place.2).await? else { return Ok(()) };
        let metadata = found.metadata;
        if metadata.uid.as_deref() != Some(&known.uid) {
            return Ok(());
        }
        let left: Vec<String> = metadata.finalizers.into_iter().flatten().filter(|other| other != finalizer).collect();
        let patch = json!({"metadata": {"uid": known.uid, "resourceVersion": metadata.resource_version,
            "finalizers": left}});
        self.patch(place, &patch).await
    }

    async fn patch(&self, place: &Place, patch: &serde_json::Value) -> Result<(), kube::Error> {
        let how = PatchParams { field_manager: Some("garbage-collector".to_owned()), ..PatchParams::default() };
        let done = self.api(place).patch_metadata(&place.2, &how, &Patch::Merge(patch)).await;
        match done {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            done => done.map(drop),
        }
    }
}

/// What has become of an owner.
enum Owner {
    Absent,
    /// It waits for its dependents to go first.
    Waits,
    There,
}

fn place(number: usize, metadata: &ObjectMeta) -> Place {
    let text = |part: &Option<String>| part.clone().unwrap_or_default();
    (number, text(&metadata.namespace), text(&metadata.name))
}

/// Gone already, or another by the same name: both are as they should be.
fn settled(done: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match done {
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        done => done,
    }
}
