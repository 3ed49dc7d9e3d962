//! Objects that name an owner: they go when the last of their owners is gone, or before it, or are set free.
//!
//! ```text
//!   owner gone ───────────────────────────────► dependents without another owner are deleted
//!   owner waits with "foregroundDeletion" ────► dependents are deleted; when none blocks it, the owner is let go
//!   owner waits with "orphan" ────────────────► dependents forget it; then the owner is let go
//! ```
//! One task holds what it saw of all kinds (only objects with owners, and owners that wait), and does nothing before it has seen
//! all of them. What it saw only says where to look, and is never proof: whether an owner is gone, and whom a dependent names,
//! is asked of the server, and what is done holds for that answer alone (uid and resourceVersion).

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
    /// The kinds of which not all has been seen even once.
    awaited: HashSet<usize>,
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
    let mut collector = Collector::new(client, kinds);
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some((number, Ok(event))) => collector.see(number, event),
                Some((number, Err(error))) => collector.miss(number, &error),
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
    fn new(client: kube::Client, kinds: Vec<Kind>) -> Self {
        let awaited = (0..kinds.len()).collect();
        let (known, due, unseen) = (HashMap::new(), HashSet::new(), HashMap::new());
        Self { client, kinds, known, due, unseen, awaited }
    }

    fn miss(&self, number: usize, error: &watcher::Error) {
        let kind = &self.kinds[number].resource.kind;
        match self.awaited.contains(&number) {
            true => {
                tracing::warn!(%error, kind, "no dependent is collected before all of this kind is seen, trying again")
            }
            false => tracing::debug!(%error, kind, "a watch for dependents broke off, beginning anew"),
        }
    }

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
                self.awaited.remove(&number);
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
        let now = Known {
            uid: metadata.uid.unwrap_or_default(),
            owners: metadata.owner_references.unwrap_or_default(),
            waits,
        };
        let before = self.known.remove(&place);
        let matters = !now.owners.is_empty() || now.waits.is_some();
        if !matters && before.is_none() {
            return;
        }
        if before.is_none_or(|before| before.owners != now.owners) {
            self.warn_of_misplaced(&place, &now.owners);
        }
        // An owner that waits is looked at again when one of its dependents changes.
        let waiting = self.known.iter().filter(|(_, known)| known.waits.is_some()).map(|(place, _)| place);
        self.due.extend(waiting.cloned());
        if matters {
            self.due.insert(place.clone());
            self.known.insert(place, now);
        }
    }

    fn warn_of_misplaced(&self, place: &Place, owners: &[OwnerReference]) {
        for owner in owners.iter().filter(|owner| self.is_misplaced(place, owner)) {
            let (kind, name) = (&self.kinds[place.0].resource.kind, &place.2);
            tracing::warn!(
                kind,
                name,
                owner_kind = owner.kind,
                owner = owner.name,
                "an object without namespace names an owner that has one: it will not be collected"
            );
        }
    }

    fn gone(&mut self, place: Place, uid: Option<&str>) {
        self.known.remove(&place);
        let depends = |known: &Known| known.waits.is_some() || known.owners.iter().any(|o| Some(&*o.uid) == uid);
        self.due.extend(self.known.iter().filter(|(_, known)| depends(known)).map(|(place, _)| place.clone()));
    }

    async fn work(&mut self) {
        if !self.awaited.is_empty() {
            return;
        }
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
        match self.weigh(place, &known.owners).await? {
            Fate::Stays => Ok(()),
            _ => self.settle(place, &known.uid).await,
        }
    }

    /// Does with a dependent what the owners it names now ask for.
    async fn settle(&self, place: &Place, uid: &str) -> Result<(), kube::Error> {
        let Some(live) = self.live(place, uid).await? else { return Ok(()) };
        if live.deletion_timestamp.is_some() {
            return Ok(());
        }
        match self.weigh(place, live.owner_references.as_deref().unwrap_or_default()).await? {
            Fate::Stays => Ok(()),
            Fate::Keeps(owners) => self.set_owners(place, &live, &owners).await,
            Fate::Goes { first } => self.delete(place, &live, first).await,
        }
    }

    async fn weigh(&self, place: &Place, owners: &[OwnerReference]) -> Result<Fate, kube::Error> {
        let (mut solid, mut waiting) = (Vec::new(), false);
        for owner in owners {
            match self.owner(place, owner).await? {
                Owner::Absent => {}
                Owner::Waits => waiting = true,
                Owner::There => solid.push(owner.clone()),
            }
        }
        Ok(match solid.len() {
            all if all == owners.len() => Fate::Stays,
            0 => Fate::Goes { first: waiting },
            _ => Fate::Keeps(solid),
        })
    }

    /// The object as it is now, if it is still the one with this uid.
    async fn live(&self, place: &Place, uid: &str) -> Result<Option<ObjectMeta>, kube::Error> {
        let found = self.api(place).get_metadata_opt(&place.2).await?.map(|found| found.metadata);
        Ok(found.filter(|metadata| metadata.uid.as_deref() == Some(uid)))
    }

    /// The number of the kind of which an owner is said to be.
    fn kind_of(&self, owner: &OwnerReference) -> Option<usize> {
        let is_it = |kind: &Kind| kind.resource.kind == owner.kind && kind.resource.api_version == owner.api_version;
        self.kinds.iter().position(is_it)
    }

    /// Whether the owner cannot be found: it would be in a namespace, and the dependent does not say in which.
    fn is_misplaced(&self, of: &Place, owner: &OwnerReference) -> bool {
        !self.kinds[of.0].namespaced && self.kind_of(owner).is_some_and(|number| self.kinds[number].namespaced)
    }

    /// What has become of an owner. One that cannot be asked for, as nobody knows its kind or namespace, is taken for being there.
    async fn owner(&self, of: &Place, owner: &OwnerReference) -> Result<Owner, kube::Error> {
        let Some(number) = self.kind_of(owner) else { return Ok(Owner::There) };
        if self.is_misplaced(of, owner) {
            return Ok(Owner::There);
        }
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
        let (mut blocked, mut done) = (false, Ok(()));
        for (dependent, of, owner) in self.dependents(&known.uid) {
            blocked |= owner.block_owner_deletion == Some(true);
            if of.waits.is_none() {
                // One that fails must not keep the others.
                done = self.settle(dependent, &of.uid).await.and(done);
            }
        }
        done?;
        if blocked { Ok(()) } else { self.let_go(place, known, FOREGROUND).await }
    }

    async fn orphan_dependents(&self, place: &Place, known: &Known) -> Result<(), kube::Error> {
        let mut done = Ok(());
        for (dependent, of, _) in self.dependents(&known.uid) {
            done = self.set_free(dependent, &of.uid, &known.uid).await.and(done);
        }
        done?;
        self.let_go(place, known, ORPHAN).await
    }

    /// Has a dependent forget an owner.
    async fn set_free(&self, dependent: &Place, uid: &str, owner: &str) -> Result<(), kube::Error> {
        let Some(live) = self.live(dependent, uid).await? else { return Ok(()) };
        let owners = live.owner_references.as_deref().unwrap_or_default();
        let others: Vec<OwnerReference> = owners.iter().filter(|other| other.uid != owner).cloned().collect();
        if others.len() == owners.len() { Ok(()) } else { self.set_owners(dependent, &live, &others).await }
    }

    fn api(&self, place: &Place) -> Api<DynamicObject> {
        let kind = &self.kinds[place.0];
        match kind.namespaced {
            true => Api::namespaced_with(self.client.clone(), &place.1, &kind.resource),
            false => Api::all_with(self.client.clone(), &kind.resource),
        }
    }

    /// Deletes the object if it is still as it was found; `first`: before its owner, and what depends on it before it likewise.
    async fn delete(&self, place: &Place, live: &ObjectMeta, first: bool) -> Result<(), kube::Error> {
        let only_this = Preconditions { uid: live.uid.clone(), resource_version: live.resource_version.clone() };
        let has = |word: &str| live.finalizers.iter().flatten().any(|finalizer| finalizer == word);
        let has_own = || self.dependents(live.uid.as_deref().unwrap_or_default()).next().is_some();
        let policy = match () {
            () if first && has_own() => PropagationPolicy::Foreground,
            () if has(ORPHAN) => PropagationPolicy::Orphan,
            () if has(FOREGROUND) => PropagationPolicy::Foreground,
            () => PropagationPolicy::Background,
        };
        let how =
            DeleteParams { preconditions: Some(only_this), propagation_policy: Some(policy), ..Default::default() };
        tracing::debug!(kind = self.kinds[place.0].resource.kind, namespace = place.1, name = place.2, "owner is gone");
        settled(self.api(place).delete(&place.2, &how).await.map(drop))
    }

    async fn set_owners(&self, place: &Place, live: &ObjectMeta, owners: &[OwnerReference]) -> Result<(), kube::Error> {
        let patch = json!({"metadata": {"uid": live.uid, "resourceVersion": live.resource_version,
            "ownerReferences": owners}});
        self.patch(place, &patch).await
    }

    /// Takes off the finalizer by which an owner waits.
    async fn let_go(&self, place: &Place, known: &Known, finalizer: &str) -> Result<(), kube::Error> {
        let Some(live) = self.live(place, &known.uid).await? else { return Ok(()) };
        let left: Vec<String> = live.finalizers.into_iter().flatten().filter(|other| other != finalizer).collect();
        let patch = json!({"metadata": {"uid": live.uid, "resourceVersion": live.resource_version,
            "finalizers": left}});
        self.patch(place, &patch).await
    }

    async fn patch(&self, place: &Place, patch: &serde_json::Value) -> Result<(), kube::Error> {
        let how = PatchParams { field_manager: Some("garbage-collector".to_owned()), ..PatchParams::default() };
        settled(self.api(place).patch_metadata(&place.2, &how, &Patch::Merge(patch)).await.map(drop))
    }
}

/// What has become of an owner.
enum Owner {
    Absent,
    /// It waits for its dependents to go first.
    Waits,
    There,
}

/// What its owners ask of a dependent.
enum Fate {
    /// All of them are there, or it has none.
    Stays,
    /// These are there; others are gone or wait.
    Keeps(Vec<OwnerReference>),
    /// None is there; `first`: one waits for it to go.
    Goes { first: bool },
}

fn place(number: usize, metadata: &ObjectMeta) -> Place {
    let text = |part: &Option<String>| part.clone().unwrap_or_default();
    (number, text(&metadata.namespace), text(&metadata.name))
}

/// Gone already is as it should be. What changed meanwhile (409) is looked at again.
fn settled(done: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match done {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        done => done,
    }
}

#[cfg(test)]
#[path = "dependents_tests.rs"]
mod tests;
