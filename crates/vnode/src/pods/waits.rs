//! What Pods wait for that does not depend on them: objects that are not there yet, and images with names that cannot be read.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use joey_podspec::{INVALID_IMAGE_NAME, InvalidImage, Kind, Missing, Waits};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::Api;
use kube::runtime::wait::await_condition;

use super::Context;
use super::reconcile::warn;

/// When a Pod is looked at again although nothing was heard of what it waits for.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Says what its containers wait for, and has the Pod looked at again when an object appears.
pub(super) fn tell(context: &Arc<Context>, uid: &str, pod: &Arc<Pod>, waits: &Waits) {
    let now = Timestamp::now();
    let all = waits.invalid_images.iter().map(InvalidImage::to_string).collect::<Vec<_>>().join("; ");
    if !all.is_empty() && context.registry.warns(uid, INVALID_IMAGE_NAME, &all, now) {
        for image in &waits.invalid_images {
            let container = Some(image.container.as_str());
            context.events.say(pod, container, true, "InspectFailed", &image.to_string(), now);
            let failed = format!("Error: {INVALID_IMAGE_NAME}");
            context.events.say(pod, container, true, "Failed", &failed, now);
        }
    }
    for (_, missing) in &waits.missing {
        warn(context, uid, pod, "Failed", &format!("Error: {}", missing.of_variable(pod)), now);
        appearance(context, uid, pod, missing.clone());
    }
}

/// Has a Pod looked at again as soon as an object is there; once, however often it is asked for.
pub(super) fn appearance(context: &Arc<Context>, uid: &str, pod: &Arc<Pod>, missing: Missing) {
    let begin = |entry: &mut super::registry::Entry| {
        let first = !entry.awaited.contains(&missing);
        if first {
            entry.awaited.push(missing.clone());
        }
        first
    };
    if context.registry.read(uid, begin) != Some(true) {
        return;
    }
    let (context, uid) = (context.clone(), uid.to_owned());
    let namespace = pod.metadata.namespace.clone().unwrap_or_default();
    tokio::spawn(async move {
        let appeared = appeared(&context.client, &namespace, &missing);
        tokio::select! {
            () = context.shutdown.cancelled() => return,
            _ = tokio::time::timeout(LOOK_AGAIN, appeared) => {}
        }
        context.registry.read(&uid, |entry| {
            entry.awaited.retain(|other| *other != missing);
            entry.appeared = true;
        });
        context.wake(&uid);
    });
}

async fn appeared(client: &kube::Client, namespace: &str, missing: &Missing) {
    let has = |keys: Vec<&String>| missing.key.as_ref().is_none_or(|key| keys.contains(&key));
    let ended = match missing.kind {
        Kind::ConfigMap => {
            let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
            let there = |map: Option<&ConfigMap>| {
                map.is_some_and(|map| has(map.data.iter().flat_map(|data| data.keys()).collect()))
            };
            await_condition(api, &missing.name, there).await.map(drop)
        }
        Kind::Secret => {
            let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
            let there = |secret: Option<&Secret>| {
                secret.is_some_and(|secret| has(secret.data.iter().flat_map(|data| data.keys()).collect()))
            };
            await_condition(api, &missing.name, there).await.map(drop)
        }
    };
    if ended.is_err() {
        std::future::pending::<()>().await;
    }
}
