//! Namespaces that are being deleted: their content is deleted, and when nothing is left the finalizer is taken off.

use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Namespace;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, PostParams};
use kube::discovery::{ApiResource, Discovery, Scope, verbs};
use kube::runtime::{WatchStreamExt, watcher};

/// The finalizer this reconciler answers for.
const FINALIZER: &str = "kubernetes";
/// First and longest pause between two looks at what is left.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Finishes deletions until dropped.
pub(crate) async fn run(client: kube::Client) {
    let config = watcher::Config::default();
    let mut namespaces =
        watcher(Api::<Namespace>::all(client.clone()), config).default_backoff().applied_objects().boxed();
    let mut underway = std::collections::HashMap::<String, tokio::task::JoinHandle<()>>::new();
    while let Some(next) = namespaces.next().await {
        let Ok(namespace) = next else { continue };
        if namespace.metadata.deletion_timestamp.is_none() || !holds_finalizer(&namespace) {
            continue;
        }
        underway.retain(|_, task| !task.is_finished());
        let (name, client) = (namespace.name_any(), client.clone());
        underway.entry(name.clone()).or_insert_with(|| tokio::spawn(finish(client, name)));
    }
}

fn holds_finalizer(namespace: &Namespace) -> bool {
    let finalizers = namespace.spec.as_ref().and_then(|spec| spec.finalizers.as_deref()).unwrap_or_default();
    finalizers.iter().any(|finalizer| finalizer == FINALIZER)
}

/// Empties one namespace and lets it go; tries until it is done or the namespace is gone.
async fn finish(client: kube::Client, name: String) {
    let mut pause = PAUSE.0;
    loop {
        match empty(&client, &name).await {
            Ok(0) => match release(&client, &name).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(namespace = name, %error, "namespace could not be finalized, trying again")
                }
            },
            Ok(left) => tracing::debug!(namespace = name, left, "namespace is not empty yet"),
            Err(error) => tracing::warn!(namespace = name, %error, "namespace could not be emptied, trying again"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// Deletes everything in the namespace and says how many objects are still there.
async fn empty(client: &kube::Client, name: &str) -> Result<usize, kube::Error> {
    let mut left = 0;
    for resource in deletable(client).await? {
        let objects = Api::<DynamicObject>::namespaced_with(client.clone(), name, &resource);
        let listed = match objects.list_metadata(&ListParams::default()).await {
            Ok(listed) => listed.items,
            // A resource that came or went since discovery.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 405) => continue,
            Err(error) => return Err(error),
        };
        for object in listed.iter().filter(|object| object.metadata.deletion_timestamp.is_none()) {
            match objects.delete(&object.name_any(), &DeleteParams::background()).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                result => drop(result?),
            }
        }
        left += match listed.is_empty() {
            true => 0,
            false => objects.list_metadata(&ListParams::default()).await?.items.len(),
        };
    }
    Ok(left)
}

async fn deletable(client: &kube::Client) -> Result<Vec<ApiResource>, kube::Error> {
    let discovery = Discovery::new(client.clone()).run().await?;
    let mut resources = Vec::new();
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            if capabilities.scope == Scope::Namespaced
                && capabilities.supports_operation(verbs::DELETE)
                && capabilities.supports_operation(verbs::LIST)
            {
                resources.push(resource);
            }
        }
    }
    // Events last: deleting the rest makes new ones.
    resources.sort_by_key(|resource| resource.kind == "Event");
    Ok(resources)
}

async fn release(client: &kube::Client, name: &str) -> Result<(), kube::Error> {
    let namespaces = Api::<Namespace>::all(client.clone());
    let Some(mut namespace) = namespaces.get_opt(name).await? else { return Ok(()) };
    if let Some(finalizers) = namespace.spec.as_mut().and_then(|spec| spec.finalizers.as_mut()) {
        finalizers.retain(|finalizer| finalizer != FINALIZER);
    }
    match namespaces.replace_subresource::<Namespace>("finalize", name, &PostParams::default(), &namespace).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(error),
    }
}
