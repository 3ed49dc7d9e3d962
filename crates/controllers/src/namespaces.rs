//! The end of namespaces: deletes what a terminating namespace holds, kind by kind, then takes the finalizer `kubernetes` off.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams};
use kube::discovery::{Discovery, Scope, verbs};
use kube::runtime::watcher;

const RETRY: Duration = Duration::from_millis(300);
/// Pause between looks at a namespace whose Pods are still ending.
const ENDING: Duration = Duration::from_millis(500);

/// Runs until dropped.
pub async fn run(client: kube::Client) {
    let mut namespaces = watcher(Api::<Namespace>::all(client.clone()), watcher::Config::default()).boxed();
    let ending: Arc<Mutex<HashSet<String>>> = Arc::default();
    while let Some(event) = namespaces.next().await {
        match event {
            Ok(watcher::Event::Apply(namespace) | watcher::Event::InitApply(namespace)) => {
                let Some(name) = namespace.metadata.name.clone() else { continue };
                if namespace.metadata.deletion_timestamp.is_none() {
                    continue;
                }
                if !ending.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone()) {
                    continue;
                }
                let (client, ending) = (client.clone(), ending.clone());
                tokio::spawn(async move {
                    while let Err(error) = finish(&client, &name).await {
                        tracing::debug!(namespace = name, %error, "namespace is not empty yet");
                        tokio::time::sleep(ENDING).await;
                    }
                    ending.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
                });
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "watch of namespaces failed, trying again");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Why a namespace cannot go yet.
#[derive(Debug, thiserror::Error)]
enum NotYet {
    #[error("{0} objects of kind {1} are left")]
    Left(usize, String),
    #[error(transparent)]
    Cluster(#[from] kube::Error),
}

async fn finish(client: &kube::Client, name: &str) -> Result<(), NotYet> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let Some(mut namespace) = namespaces.get_opt(name).await? else { return Ok(()) };
    if namespace.metadata.deletion_timestamp.is_none() {
        return Ok(());
    }
    let discovery = Discovery::new(client.clone()).run().await?;
    let mut left = None;
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            // Events go last of all by their own age; they hold up nothing, yet are deleted like the rest.
            if capabilities.scope != Scope::Namespaced
                || !capabilities.supports_operation(verbs::LIST)
                || !capabilities.supports_operation(verbs::DELETE)
            {
                continue;
            }
            let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), name, &resource);
            for object in api.list(&ListParams::default()).await? {
                let Some(object_name) = object.metadata.name else { continue };
                if object.metadata.deletion_timestamp.is_some() {
                    continue;
                }
                match api.delete(&object_name, &DeleteParams::background()).await {
                    Ok(_) => {}
                    Err(kube::Error::Api(status)) if status.code == 404 => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let remaining = api.list(&ListParams::default()).await?.items.len();
            if remaining > 0 {
                left = Some(NotYet::Left(remaining, resource.kind.clone()));
            }
        }
    }
    if let Some(left) = left {
        return Err(left);
    }
    if let Some(spec) = namespace.spec.as_mut() {
        spec.finalizers.iter_mut().for_each(|finalizers| finalizers.retain(|finalizer| finalizer != "kubernetes"));
    }
    let body = serde_json::to_vec(&namespace).map_err(kube::Error::SerdeError)?;
    let request = http::Request::put(format!("/api/v1/namespaces/{name}/finalize"))
        .header("content-type", "application/json")
        .body(body)
        .map_err(kube::Error::HttpError)?;
    match client.request::<serde_json::Value>(request).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(error.into()),
    }
}
