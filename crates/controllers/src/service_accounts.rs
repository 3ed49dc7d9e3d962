//! The service account `default` of every namespace: made with the namespace, made again when deleted.

use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::PostParams;
use kube::runtime::watcher;

const RETRY: Duration = Duration::from_millis(300);

/// Runs until dropped.
pub async fn run(client: kube::Client) {
    let mut namespaces = watcher(Api::<Namespace>::all(client.clone()), watcher::Config::default()).boxed();
    let only = watcher::Config::default().fields("metadata.name=default");
    let mut accounts = watcher(Api::<ServiceAccount>::all(client.clone()), only).boxed();
    loop {
        let wanting = tokio::select! {
            event = namespaces.next() => match event {
                Some(Ok(watcher::Event::Apply(namespace) | watcher::Event::InitApply(namespace))) => {
                    namespace.metadata.name.filter(|_| namespace.metadata.deletion_timestamp.is_none())
                }
                Some(Ok(_)) => None,
                Some(Err(error)) => {
                    tracing::warn!(%error, "watch of namespaces failed, trying again");
                    tokio::time::sleep(RETRY).await;
                    None
                }
                None => return,
            },
            event = accounts.next() => match event {
                Some(Ok(watcher::Event::Delete(account))) => account.metadata.namespace,
                Some(Ok(_)) => None,
                Some(Err(error)) => {
                    tracing::warn!(%error, "watch of service accounts failed, trying again");
                    tokio::time::sleep(RETRY).await;
                    None
                }
                None => return,
            },
        };
        if let Some(namespace) = wanting {
            tokio::spawn(ensure(client.clone(), namespace));
        }
    }
}

async fn ensure(client: kube::Client, namespace: String) {
    let api: Api<ServiceAccount> = Api::namespaced(client, &namespace);
    let account = ServiceAccount {
        metadata: ObjectMeta { name: Some("default".into()), ..ObjectMeta::default() },
        ..ServiceAccount::default()
    };
    for attempt in 0..10_u32 {
        match api.create(&PostParams::default(), &account).await {
            Ok(_) => return,
            // It is there, or the namespace is ending.
            Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404 | 409) => return,
            Err(error) => tracing::warn!(namespace, %error, "default service account could not be made, trying again"),
        }
        tokio::time::sleep(RETRY * 2_u32.pow(attempt.min(6))).await;
    }
}
