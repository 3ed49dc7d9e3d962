//! Garbage: Pods bound to a node that is no longer there are removed without waiting for anybody.

use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, ListParams, Preconditions};
use kube::runtime::watcher;

/// How long a node may be away before its Pods go, as kube-controller-manager waits (`quarantineTime`).
const QUARANTINE: Duration = Duration::from_secs(40);
const RETRY: Duration = Duration::from_millis(300);

/// Runs until dropped.
pub async fn run(client: kube::Client) {
    let mut nodes = watcher(Api::<Node>::all(client.clone()), watcher::Config::default()).boxed();
    // Once after start, and after each deletion of a node, when the quarantine is over.
    let mut due = Some(tokio::time::Instant::now() + QUARANTINE);
    loop {
        let at = due.unwrap_or_else(|| tokio::time::Instant::now() + QUARANTINE);
        tokio::select! {
            event = nodes.next() => match event {
                Some(Ok(watcher::Event::Delete(_))) => due = Some(tokio::time::Instant::now() + QUARANTINE),
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    tracing::warn!(%error, "watch of nodes failed, trying again");
                    tokio::time::sleep(RETRY).await;
                }
                None => return,
            },
            () = tokio::time::sleep_until(at), if due.is_some() => {
                due = match collect(&client).await {
                    Ok(()) => None,
                    Err(error) => {
                        tracing::warn!(%error, "pods of absent nodes could not be removed, trying again");
                        Some(tokio::time::Instant::now() + QUARANTINE)
                    }
                };
            }
        }
    }
}

async fn collect(client: &kube::Client) -> Result<(), kube::Error> {
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?;
    let known: Vec<String> = nodes.into_iter().filter_map(|node| node.metadata.name).collect();
    for pod in Api::<Pod>::all(client.clone()).list(&ListParams::default()).await? {
        let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) else { continue };
        if node.is_empty() || known.contains(&node) {
            continue;
        }
        let (name, namespace) = (pod.metadata.name.unwrap_or_default(), pod.metadata.namespace.unwrap_or_default());
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: pod.metadata.uid, resource_version: None }),
            ..DeleteParams::default()
        };
        match Api::<Pod>::namespaced(client.clone(), &namespace).delete(&name, &params).await {
            Ok(_) => tracing::info!(namespace, pod = name, node, "pod of an absent node removed"),
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
