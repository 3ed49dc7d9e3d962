//! One look at one Pod: what is the next thing to do, and doing it.
//!
//! ```text
//!   Pod wanted,  no instance ──► create          Pod ended, instance ──► kept for its log
//!   Pod wanted,  instance    ──► status          Pod ended, no instance ──► nothing, never run again
//!   Pod deleted, instance    ──► delete, status  Pod deleted, no instance ──► Pod removed
//!   no Pod,      instance    ──► delete
//! ```

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use joey_api::instance::{Instance, WirePhase};
use joey_model::{ErrorKind, Fault};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use serde_json::json;

use super::{Context, change, contents, waits};
use crate::resolve;
use crate::status;
use joey_podspec::{Needs, Objects, Refusal};

/// Grace of an instance whose Pod was removed without waiting, in seconds.
const FORCED_GRACE: u32 = 1;

/// Looks at one Pod; `Some`: it wants to be looked at again after that time.
pub(super) async fn reconcile(context: &Arc<Context>, uid: &str) -> Option<Duration> {
    let (pod, instance, sent) =
        context.registry.read(uid, |entry| (entry.pod.clone(), entry.instance.clone(), entry.sent.clone()))?;
    let lives = matches!((&pod, &instance), (Some(pod), Some(_)) if pod.metadata.deletion_timestamp.is_none());
    if !lives {
        context.shown.release(uid);
    }
    let done = match (pod, instance) {
        (None, None) => Ok(()),
        (None, Some(instance)) => end(context, uid, &instance, Some(FORCED_GRACE)).await,
        (Some(pod), instance) => {
            let known = sent.unwrap_or_else(|| pod.status.clone().unwrap_or_default());
            match (pod.metadata.deletion_timestamp.is_some(), instance) {
                (true, None) => remove(context, &pod).await,
                (true, Some(instance)) => {
                    let grace = pod.metadata.deletion_grace_period_seconds.and_then(|s| u32::try_from(s).ok());
                    let ended = end(context, uid, &instance, grace).await;
                    tell(context, uid, &pod, &known, &instance).await.and(ended)
                }
                // Somebody else ends it. When it is gone the Pod's restart policy says what becomes of the Pod.
                (false, Some(instance)) if instance.status.phase == WirePhase::Terminating => {
                    let message = "its instance is being removed, and not by the Pod's deletion";
                    warn(context, uid, &pod, "InstanceRemoved", message, Timestamp::now());
                    Ok(())
                }
                (false, Some(instance)) => {
                    let followed = change::follow(context, uid, &pod, &known, &instance).await;
                    let told = tell(context, uid, &pod, &known, &instance).await;
                    contents::renew(context, uid, &pod, &instance).await.and(told).and(followed)
                }
                (false, None) if status::is_terminal(&known) => Ok(()),
                (false, None) => start(context, uid, &pod, &known).await,
            }
        }
    };
    match done {
        Ok(()) => {
            context.registry.read(uid, |entry| entry.attempts = 0);
            None
        }
        Err(fault) => {
            let attempts = context.registry.read(uid, |entry| {
                entry.attempts = entry.attempts.saturating_add(1);
                entry.attempts
            })?;
            tracing::debug!(uid, %fault, attempts, "pod is looked at again");
            Some(Duration::from_millis(50 << attempts.min(8)))
        }
    }
}

pub(super) fn away(error: kube::Error) -> Fault {
    Fault::new(ErrorKind::Retryable, "ClusterAway", error.to_string())
}

/// Asks for the end of an instance, once for each shorter grace.
async fn end(context: &Context, uid: &str, instance: &Instance, grace: Option<u32>) -> Result<(), Fault> {
    let wanted = grace.unwrap_or(instance.spec.termination_grace_period_seconds);
    let asked = |ending: &Option<(String, u32)>| matches!(ending, Some((id, s)) if *id == instance.id && *s <= wanted);
    if context.registry.read(uid, |entry| asked(&entry.ending)) == Some(true) {
        return Ok(());
    }
    match context.provider.delete(&instance.id, Some(wanted)).await {
        Ok(()) => {
            context.registry.read(uid, |entry| entry.ending = Some((instance.id.clone(), wanted)));
            Ok(())
        }
        Err(fault) if fault.kind == ErrorKind::NotFound => {
            context.registry.instance_gone(&instance.id, &instance.spec.name, instance.revision);
            context.registry.read(uid, |entry| entry.pod.is_some()).filter(|left| *left).map_or(Ok(()), |_| Err(fault))
        }
        Err(fault) => Err(fault),
    }
}

/// Removes a Pod whose instance is gone.
async fn remove(context: &Context, pod: &Pod) -> Result<(), Fault> {
    let params = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions { uid: pod.metadata.uid.clone(), resource_version: None }),
        ..DeleteParams::default()
    };
    match pods(context, pod).delete(pod.metadata.name.as_deref().unwrap_or_default(), &params).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(away(error)),
    }
}

fn pods(context: &Context, pod: &Pod) -> Api<Pod> {
    Api::namespaced(context.client.clone(), pod.metadata.namespace.as_deref().unwrap_or_default())
}

/// Makes the instance of a Pod, or says why there is none.
async fn start(context: &Arc<Context>, uid: &str, pod: &Arc<Pod>, known: &PodStatus) -> Result<(), Fault> {
    let now = Timestamp::now();
    let ran = known.container_statuses.iter().flatten().any(|container| container.container_id.is_some());
    if ran && pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()) == Some("Never") {
        let message = "its instance is gone, and restartPolicy Never forbids another run";
        return send(context, uid, pod, known, status::failed(pod, known, "InstanceGone", message, now)).await;
    }
    let needs = Needs::shown(pod);
    let (fetched, tokens) = tokio::join!(objects(context, pod), contents::tokens(context, uid, pod, &needs));
    let objects = match fetched.and_then(|objects| Ok(Objects { tokens: tokens?, ..objects })) {
        Ok(objects) => objects,
        Err(fault) => {
            let status = status::waits(pod, known, "CreateContainerConfigError", &fault.message, now);
            send(context, uid, pod, known, status).await?;
            return Err(fault);
        }
    };
    let mut converted = match joey_podspec::convert(pod, &objects, &context.config.node) {
        Ok(converted) => converted,
        Err(unmounted @ Refusal::Unmounted { .. }) => {
            warn(context, uid, pod, "FailedMount", &unmounted.to_string(), now);
            send(context, uid, pod, known, status::waits(pod, known, "ContainerCreating", "", now)).await?;
            if let Refusal::Unmounted { missing, .. } = unmounted {
                waits::appearance(context, uid, pod, missing);
            }
            return Ok(());
        }
        Err(refusal) => return refuse(context, uid, pod, known, "UnsupportedPod", &refusal.to_string()).await,
    };
    waits::tell(context, uid, pod, &converted.waits);
    converted.spec.restarts_before = status::restarts(known);
    if let Err(fault) = joey_api::validate::instance(&converted.spec) {
        return refuse(context, uid, pod, known, "UnsupportedPod", &fault.message).await;
    }
    // A create that is asked for again may be one that was made, with what it had then.
    let first = context.registry.read(uid, |entry| entry.attempts == 0) == Some(true);
    let files = first.then(|| contents::brief(&converted.spec.volumes));
    match context.provider.create(converted.spec).await {
        Ok(instance) => {
            contents::sent(context, uid, files);
            context.registry.instance(uid, instance, false);
            // The watch may have told it already; one more look never harms, and none is lost.
            context.wake(uid);
            Ok(())
        }
        Err(fault) if fault.kind == ErrorKind::Invalid => {
            refuse(context, uid, pod, known, &fault.reason, &fault.message).await
        }
        Err(fault) => {
            let status = status::waits(pod, known, &fault.reason, &fault.message, now);
            if fault.kind == ErrorKind::Exhausted {
                warn(context, uid, pod, &fault.reason, &fault.message, now);
                send(context, uid, pod, known, status).await?;
            }
            Err(fault)
        }
    }
}

/// What a Pod names, as it is now.
pub(super) async fn objects(context: &Context, pod: &Pod) -> Result<Objects, Fault> {
    let capacity = match needs_capacity(pod) {
        true => Some(context.provider.capacity().await?),
        false => None,
    };
    let objects = resolve::fetch(&context.client, pod, capacity.as_ref()).await.map_err(away)?;
    Ok(Objects { services: context.services.of(pod).await, ..objects })
}

fn needs_capacity(pod: &Pod) -> bool {
    let spec = pod.spec.iter();
    spec.flat_map(joey_podspec::all_containers)
        .flat_map(|(_, container)| container.env.iter().flatten())
        .any(|variable| variable.value_from.as_ref().is_some_and(|from| from.resource_field_ref.is_some()))
        || Needs::shown(pod).fields
}

async fn refuse(
    context: &Context,
    uid: &str,
    pod: &Pod,
    known: &PodStatus,
    reason: &str,
    message: &str,
) -> Result<(), Fault> {
    let now = Timestamp::now();
    warn(context, uid, pod, reason, message, now);
    send(context, uid, pod, known, status::failed(pod, known, reason, message, now)).await
}

/// Says why a Pod does not run, unless it was just said: a Pod is looked at much more often than it has news.
pub(super) fn warn(context: &Context, uid: &str, pod: &Pod, reason: &str, message: &str, now: Timestamp) {
    if context.registry.warns(uid, reason, message, now) {
        context.events.say(pod, None, true, reason, message, now);
    }
}

/// Tells the cluster how the instance is.
async fn tell(context: &Context, uid: &str, pod: &Pod, known: &PodStatus, instance: &Instance) -> Result<(), Fault> {
    for event in context.registry.news(uid, &instance.status.events) {
        if event.reason != "Scheduled" {
            let container = event.container.as_deref();
            context.events.say(pod, container, event.warning, &event.reason, &event.message, event.at);
        }
    }
    if status::is_terminal(known) {
        return Ok(());
    }
    // Conditions of others, such as readiness gates, come with the Pod, not with what was sent.
    let mut before = known.clone();
    if let Some(conditions) = pod.status.as_ref().and_then(|status| status.conditions.as_ref()) {
        let all = before.conditions.get_or_insert_default();
        for condition in conditions {
            if !all.iter().any(|known| known.type_ == condition.type_) {
                all.push(condition.clone());
            } else if let Some(own) = all.iter_mut().find(|own| own.type_ == condition.type_)
                && !status::OWN_CONDITIONS.contains(&own.type_.as_str())
            {
                *own = condition.clone();
            }
        }
    }
    let now = Timestamp::now();
    let status = status::of_instance(pod, &before, instance, context.config.node.address, now);
    send(context, uid, pod, known, status).await
}

/// Writes a status unless it is the one last written.
async fn send(context: &Context, uid: &str, pod: &Pod, known: &PodStatus, status: PodStatus) -> Result<(), Fault> {
    let parts = |status: &PodStatus| {
        let own = status
            .conditions
            .iter()
            .flatten()
            .filter(|condition| status::OWN_CONDITIONS.contains(&condition.type_.as_str()))
            .map(|c| (c.type_.clone(), c.status.clone(), c.reason.clone(), c.message.clone()))
            .collect::<std::collections::BTreeSet<_>>();
        let words = (status.reason.clone(), status.message.clone());
        // Those who wait for a condition wait until it speaks of the specification they know.
        (own, status.phase.clone(), words, status.pod_ip.clone(), status.observed_generation)
    };
    let containers = |status: &PodStatus| {
        let PodStatus { init_container_statuses: init, container_statuses: main, .. } = status.clone();
        (init, main, status.ephemeral_container_statuses.clone())
    };
    if parts(known) == parts(&status) && containers(known) == containers(&status) {
        return Ok(());
    }
    let change = status::patch(known, &status);
    let patch = Patch::Strategic(json!({ "metadata": { "uid": pod.metadata.uid }, "status": change }));
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    match pods(context, pod).patch_status(name, &PatchParams::default(), &patch).await {
        Ok(_) => {
            context.registry.read(uid, |entry| entry.sent = Some(status));
            Ok(())
        }
        // The Pod is gone, or another has its name: the watch says so.
        Err(kube::Error::Api(refused)) if matches!(refused.code, 404 | 409) => Ok(()),
        Err(error) => Err(away(error)),
    }
}
