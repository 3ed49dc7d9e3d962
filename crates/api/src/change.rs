//! What may change of an instance that is there: everything else is refused, in words that say so. Pure.

use std::collections::BTreeMap;

use joey_model::{ErrorKind, Fault};
use serde::{Deserialize, Serialize};

use crate::instance::{ContainerSpec, InstanceSpec, Resources, Volume};
use crate::lifecycle::Role;
use crate::validate::renew_files;

/// Body of `PATCH /v1/instances/NAME`: what is not given stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct InstanceChange {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
    /// Container → image. Only that container is started again.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, String>,
    /// Container → its limits; started again is only what says so in its `restartOnResize`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub resources: BTreeMap<String, Resources>,
    /// Containers that were held, as a whole.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub given: Vec<ContainerSpec>,
    /// Further containers, of [`Role::Debug`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub debug: Vec<ContainerSpec>,
    /// Volumes of files with their new contents; who looks sees either the old ones or the new ones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
    /// Shorter than before, or given for the first time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active_deadline_seconds: Option<u64>,
}

impl InstanceChange {
    /// Reads a request's body; a field that cannot change is refused in words that say what can.
    pub fn read(instance: &str, body: serde_json::Value) -> Result<Self, Fault> {
        const KNOWN: [&str; 8] =
            ["labels", "annotations", "images", "resources", "given", "debug", "volumes", "activeDeadlineSeconds"];
        let given = body.as_object().into_iter().flatten().map(|(field, _)| field);
        let fixed: Vec<&str> = given.map(String::as_str).filter(|field| !KNOWN.contains(field)).collect();
        if !fixed.is_empty() {
            let message = format!("instance \"{instance}\": {} cannot change while it is there", fixed.join(", "));
            return Err(Fault::new(ErrorKind::Invalid, "Immutable", message).with_hint(
                "labels, annotations, images, resources, containers that are held, contents of volumes, further debug \
                 containers and a shorter deadline can; for all else make it anew",
            ));
        }
        serde_json::from_value(body).map_err(|error| {
            let message = format!("instance \"{instance}\": the change is not understood: {error}");
            Fault::new(ErrorKind::Invalid, "InvalidChange", message)
        })
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What of the difference between two specifications may change, whatever else differs.
    pub fn found(old: &InstanceSpec, new: &InstanceSpec) -> Self {
        let mut change = Self::default();
        if old.labels != new.labels {
            change.labels = Some(new.labels.clone());
        }
        if old.annotations != new.annotations {
            change.annotations = Some(new.annotations.clone());
        }
        for container in &new.containers {
            match old.containers.iter().find(|known| known.name == container.name) {
                None => change.debug.push(container.clone()),
                Some(known) if known.held.is_some() && known != container => change.given.push(container.clone()),
                Some(known) => {
                    if known.image != container.image {
                        change.images.insert(container.name.clone(), container.image.clone());
                    }
                    if known.resources != container.resources {
                        change.resources.insert(container.name.clone(), container.resources);
                    }
                }
            }
        }
        if old.active_deadline_seconds != new.active_deadline_seconds {
            change.active_deadline_seconds = new.active_deadline_seconds;
        }
        change
    }

    /// All of a specification that may change, as it is, but for what volumes hold: a specification that is read has not got it.
    pub fn whole(spec: &InstanceSpec) -> Self {
        let of_each = || spec.containers.iter().filter(|container| container.role != Role::Debug);
        Self {
            labels: Some(spec.labels.clone()),
            annotations: Some(spec.annotations.clone()),
            images: of_each().map(|container| (container.name.clone(), container.image.clone())).collect(),
            resources: of_each().map(|container| (container.name.clone(), container.resources)).collect(),
            given: Vec::new(),
            debug: spec.containers.iter().filter(|container| container.role == Role::Debug).cloned().collect(),
            volumes: Vec::new(),
            active_deadline_seconds: spec.active_deadline_seconds,
        }
    }

    /// Brings a specification to what this says; once more changes nothing more.
    pub fn apply(&self, spec: &mut InstanceSpec) -> Result<(), Fault> {
        let refused = |why: String| {
            Err(Fault::new(ErrorKind::Invalid, "InvalidChange", format!("instance \"{}\": {why}", spec.name)))
        };
        let knows = |name: &String| spec.containers.iter().any(|container| container.name == *name);
        if let Some(name) = self.images.keys().chain(self.resources.keys()).find(|name| !knows(name)) {
            return refused(format!("it has no container \"{name}\""));
        }
        if let Some(added) = self.debug.iter().find(|added| added.role != Role::Debug) {
            return refused(format!("container \"{}\" cannot be added: only debug containers can", added.name));
        }
        let new = |added: &&ContainerSpec| !spec.containers.contains(added);
        let new: Vec<ContainerSpec> = self.debug.iter().filter(new).cloned().collect();
        if let Some(added) = new.iter().find(|added| knows(&added.name)) {
            return refused(format!("container \"{}\" is there already", added.name));
        }
        if let (Some(before), Some(now)) = (spec.active_deadline_seconds, self.active_deadline_seconds)
            && now > before
        {
            return refused(format!("its deadline of {before} s can only become shorter"));
        }
        let place = |given: &ContainerSpec| {
            let place = spec.containers.iter().position(|known| known.name == given.name && known.role == given.role);
            place.filter(|at| spec.containers[*at].held.is_some() || spec.containers[*at] == *given)
        };
        if let Some(given) = self.given.iter().find(|given| place(given).is_none()) {
            return refused(format!("container \"{}\" is not held: it stays what it is", given.name));
        }
        let given: Vec<_> = self.given.iter().filter_map(|given| Some((place(given)?, given))).collect();
        renew_files(spec, &self.volumes)?;
        for (at, container) in given {
            spec.containers[at].clone_from(container);
        }
        if let Some(labels) = &self.labels {
            spec.labels.clone_from(labels);
        }
        if let Some(annotations) = &self.annotations {
            spec.annotations.clone_from(annotations);
        }
        for container in &mut spec.containers {
            if let Some(image) = self.images.get(&container.name) {
                container.image.clone_from(image);
            }
            if let Some(resources) = self.resources.get(&container.name) {
                container.resources.clone_from(resources);
            }
        }
        spec.containers.extend(new);
        if self.active_deadline_seconds.is_some() {
            spec.active_deadline_seconds = self.active_deadline_seconds;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> InstanceSpec {
        let containers = vec![ContainerSpec::new("a", "img:1"), ContainerSpec::new("b", "img:1")];
        InstanceSpec { active_deadline_seconds: Some(100), ..InstanceSpec::new("web", containers) }
    }

    #[test]
    fn what_may_change_is_found_and_applied() {
        let mut wanted = spec();
        wanted.labels.insert("k".into(), "v".into());
        wanted.containers[1].image = "img:2".into();
        wanted.containers[0].resources.memory_bytes = Some(64 << 20);
        wanted.active_deadline_seconds = Some(50);
        wanted.containers.push(ContainerSpec { role: Role::Debug, ..ContainerSpec::new("look", "tools") });
        let change = InstanceChange::found(&spec(), &wanted);
        assert_eq!(change.images, BTreeMap::from([("b".to_owned(), "img:2".to_owned())]));
        assert_eq!(change.debug.len(), 1);
        let mut reached = spec();
        change.apply(&mut reached).unwrap();
        assert_eq!(reached, wanted);
        InstanceChange::whole(&wanted).apply(&mut reached).unwrap();
        assert_eq!(reached, wanted, "once more changes nothing");
        assert!(InstanceChange::found(&wanted, &wanted).is_empty());
    }

    #[test]
    fn what_cannot_be_done_is_said() {
        let refused = |change: InstanceChange| change.apply(&mut spec()).unwrap_err().message;
        let added = |container: ContainerSpec| InstanceChange { debug: vec![container], ..Default::default() };
        assert!(refused(added(ContainerSpec::new("c", "i"))).contains("only debug"));
        let taken = ContainerSpec { role: Role::Debug, ..ContainerSpec::new("a", "i") };
        assert!(refused(added(taken)).contains("there already"));
        let later = InstanceChange { active_deadline_seconds: Some(101), ..Default::default() };
        assert!(refused(later).contains("shorter"));
        let unknown = InstanceChange { images: BTreeMap::from([("z".into(), "i".into())]), ..Default::default() };
        assert!(refused(unknown).contains("no container \"z\""));
        let fixed = InstanceChange::read("web", serde_json::json!({"hostname": "h", "labels": {}})).unwrap_err();
        assert_eq!(fixed.message, "instance \"web\": hostname cannot change while it is there");
        let read = InstanceChange::read("web", serde_json::json!({"images": {"a": "img:3"}})).unwrap();
        assert_eq!(read.images["a"], "img:3");
    }
}
