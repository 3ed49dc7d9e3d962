//! Every active namespace has a ServiceAccount `default`; one that somebody deletes is made again.

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use kube::api::{Api, PostParams};
use kube::runtime::{WatchStreamExt, watcher};

/// Name of the account a Pod has when it names none.
const NAME: &str = "default";

/// Keeps the accounts until dropped.
pub(crate) async fn run(client: kube::Client) {
    let config = watcher::Config::default();
    let namespaces = watcher(Api::<Namespace>::all(client.clone()), config.clone())
        .default_backoff()
        .applied_objects()
        .try_filter(|namespace| std::future::ready(namespace.metadata.deletion_timestamp.is_none()))
        .map_ok(|namespace| namespace.name_any())
        .boxed();
    let accounts = Api::<ServiceAccount>::all(client.clone());
    let deleted = watcher(accounts, config.fields(&format!("metadata.name={NAME}")))
        .default_backoff()
        .try_filter_map(|event| {
            std::future::ready(Ok(match event {
                watcher::Event::Delete(account) => account.namespace(),
                _ => None,
            }))
        })
        .boxed();
    let mut wanted = stream::select(namespaces, deleted);
    while let Some(next) = wanted.next().await {
        let Ok(namespace) = next else { continue };
        if let Err(error) = ensure(&client, &namespace).await {
            tracing::warn!(namespace, %error, "service account default could not be made");
        }
    }
}

async fn ensure(client: &kube::Client, namespace: &str) -> Result<(), kube::Error> {
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), namespace);
    let account = ServiceAccount {
        metadata: ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() },
        ..ServiceAccount::default()
    };
    match accounts.create(&PostParams::default(), &account).await {
        // It exists; or its namespace is going or gone.
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404 | 409) => Ok(()),
        result => result.map(drop),
    }
}
