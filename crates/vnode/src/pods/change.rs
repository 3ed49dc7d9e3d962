//! A Pod whose specification changed while it runs: its instance is brought along, in place.

use std::sync::Arc;

use jiff::Timestamp;
use joey_api::instance::{Instance, WirePhase};
use joey_model::{ErrorKind, Fault};
use k8s_openapi::api::core::v1::{EphemeralContainer, Pod, PodStatus};

use super::Context;
use super::reconcile::{away, warn};
use crate::resolve;
use joey_podspec::{Objects, Refusal};

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
    let followed = context.registry.read(uid, |entry| entry.followed).flatten();
    if generation.is_some() && followed == generation {
        return Ok(());
    }
    let mut change = match joey_podspec::changed(pod, &instance.spec) {
        Ok(change) => change,
        Err(refusal) => return refuse(context, uid, pod, &refusal.to_string()),
    };
    let further = further(pod, known, instance);
    if !further.is_empty() {
        let objects = resolve::fetch(&context.client, pod, None).await.map_err(away)?;
        let objects = Objects { services: context.services.of(pod).await, ..objects };
        match joey_podspec::debug(pod, &further, &objects, &context.config.node) {
            Ok(debug) => change.debug = debug,
            Err(Refusal::Missing(missing)) => {
                let message = format!("Error: {missing}");
                warn(context, uid, pod, "Failed", &message, Timestamp::now());
                return Err(Fault::new(ErrorKind::Retryable, "CreateContainerConfigError", message));
            }
            Err(refusal) => return refuse(context, uid, pod, &refusal.to_string()),
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

/// The ephemeral containers that the instance does not have, and that have not run before it was made.
fn further(pod: &Pod, known: &PodStatus, instance: &Instance) -> Vec<EphemeralContainer> {
    let all = pod.spec.iter().flat_map(|spec| spec.ephemeral_containers.iter().flatten());
    let has = |name: &str| instance.spec.containers.iter().any(|container| container.name == name);
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
