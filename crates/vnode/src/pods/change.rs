//! A Pod whose specification changed while it runs: its instance is brought along, in place.

use std::sync::Arc;

use jiff::Timestamp;
use joey_api::change::InstanceChange;
use joey_api::instance::{ContainerSpec, Instance, InstanceSpec, WirePhase};
use joey_api::lifecycle::Role;
use joey_model::{ErrorKind, Fault};
use k8s_openapi::api::core::v1::{EphemeralContainer, Pod, PodStatus};

use super::reconcile::{objects, warn};
use super::{Context, waits};

/// Has the instance follow its Pod. Looks once at each generation of the Pod; where a cluster counts none, at every event. What
/// the Pod's status says is no proof: a virtual node before this one told it before it had carried out a change.
pub(super) async fn follow(
    context: &Arc<Context>,
    uid: &str,
    pod: &Arc<Pod>,
    known: &PodStatus,
    instance: &Instance,
) -> Result<(), Fault> {
    if matches!(instance.status.phase, WirePhase::Succeeded | WirePhase::Failed | WirePhase::Terminating) {
        return Ok(());
    }
    // Annotations count no generation.
    if let Some(why) = joey_podspec::fixed(pod, &instance.spec) {
        warn(context, uid, pod, "FailedChange", &why, Timestamp::now());
    }
    let generation = pod.metadata.generation;
    // What containers wait for is no matter of the Pod's generation. It is forgotten here and not at the end of a look, so that a
    // look that fails is not the last one.
    let followed = context.registry.read(uid, |entry| {
        if std::mem::take(&mut entry.appeared) {
            entry.followed = None;
        }
        entry.followed
    });
    if generation.is_some() && followed.flatten() == generation {
        return Ok(());
    }
    let mut change = match joey_podspec::changed(pod, &instance.spec) {
        Ok(change) => change,
        Err(refusal) => return refuse(context, uid, pod, &refusal.to_string()),
    };
    let further = further(pod, known, instance);
    // Whatever else has changed is no matter of containers that are there as a whole.
    let whole = |name: &str| instance.spec.containers.iter().any(|own| own.name == name && own.held.is_none());
    if !further.is_empty() || instance.spec.containers.iter().any(|container| container.held.is_some()) {
        let objects = objects(context, pod).await?;
        let node = &context.config.node;
        let own = joey_podspec::containers(pod, &objects, node);
        let all = own.and_then(|own| Ok([own, joey_podspec::debug(pod, &further, &objects, node)?]));
        for (containers, mut waits) in match all {
            Ok(all) => all,
            Err(refusal) => return refuse(context, uid, pod, &refusal.to_string()),
        } {
            bring(&mut change, containers, &instance.spec);
            waits.missing.retain(|(container, _)| !whole(container));
            waits.invalid_images.retain(|image| !whole(&image.container));
            waits::tell(context, uid, pod, &waits);
        }
    }
    if !change.is_empty() {
        match context.provider.change(&instance.id, &change).await {
            Ok(changed) => context.registry.instance(uid, changed, false),
            Err(fault) if fault.kind == ErrorKind::NotFound => return Ok(()),
            Err(fault) if fault.kind == ErrorKind::Invalid => return refuse(context, uid, pod, &fault.message),
            Err(fault) => return Err(fault),
        }
    }
    context.registry.read(uid, |entry| entry.followed = pod.metadata.generation);
    Ok(())
}

/// Notes what is new, and what is held for another reason than before or for none.
fn bring(change: &mut InstanceChange, containers: Vec<ContainerSpec>, instance: &InstanceSpec) {
    for made in containers {
        match instance.containers.iter().find(|known| known.name == made.name) {
            None if made.role == Role::Debug => change.debug.push(made),
            Some(known) if known.held.is_some() && known.held != made.held => change.given.push(made),
            _ => {}
        }
    }
}

/// The ephemeral containers that the instance does not have, or not yet as a whole, and that have not run before it was made.
fn further(pod: &Pod, known: &PodStatus, instance: &Instance) -> Vec<EphemeralContainer> {
    let all = pod.spec.iter().flat_map(|spec| spec.ephemeral_containers.iter().flatten());
    let whole = || instance.spec.containers.iter().filter(|container| container.held.is_none());
    let has = |name: &str| whole().any(|container| container.name == name);
    let ran = |name: &str| {
        let mut told = known.ephemeral_container_statuses.iter().flatten();
        told.any(|status| status.name == name && status.container_id.is_some())
    };
    all.filter(|one| !has(&one.name) && !ran(&one.name)).cloned().collect()
}

/// Says why the instance stays as it is; asked again when the Pod changes again.
fn refuse(context: &Context, uid: &str, pod: &Pod, message: &str) -> Result<(), Fault> {
    warn(context, uid, pod, "FailedChange", message, Timestamp::now());
    context.registry.read(uid, |entry| entry.followed = pod.metadata.generation);
    Ok(())
}
