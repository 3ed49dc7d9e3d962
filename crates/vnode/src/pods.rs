//! The Pod controller: brings each Pod of this node and its instance together, and tells the cluster how it goes.
//!
//! ```text
//!  watch of Pods ───────┐                        ┌► provider.create / delete
//!                       ├► Registry ─ wake(uid) ─┤
//!  watch of instances ──┘    one task a Pod,     ├► status patch, Pod delete
//!                            many Pods at once   └► events
//! ```
//! A Pod's task reads what is known and does the next thing; woken while it works, it looks once more. Nothing is decided before
//! both watches have told everything that was there.

use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use joey_api::instance::WatchEvent;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::runtime::watcher;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::events::Events;
use crate::provider::Provider;
use crate::refresh::Shown;
use crate::services::Services;
use joey_podspec::{LABEL_NODE, LABEL_UID};

mod change;
mod contents;
mod reconcile;
mod registry;
#[cfg(test)]
mod tests;
mod waits;

pub use registry::Registry;

const RETRY: Duration = Duration::from_millis(300);

/// What every Pod's task needs.
pub(crate) struct Context {
    client: kube::Client,
    provider: Arc<dyn Provider>,
    registry: Arc<Registry>,
    config: Arc<Config>,
    services: Services,
    shown: Shown,
    events: Events,
    /// Of calls for tokens, by service account.
    accounts: joey_guard::Guard,
    workers: Semaphore,
    shutdown: CancellationToken,
}

impl Context {
    /// Has the Pod looked at: now, or once more when it is being looked at.
    pub(crate) fn wake(self: &Arc<Self>, uid: &str) {
        if self.registry.begin(uid) {
            let (context, uid) = (self.clone(), uid.to_owned());
            tokio::spawn(async move { context.work(uid).await });
        }
    }

    async fn work(self: Arc<Self>, uid: String) {
        let Ok(_permit) = self.workers.acquire().await else { return };
        loop {
            let again = reconcile::reconcile(&self, &uid).await;
            if self.shutdown.is_cancelled() {
                return;
            }
            if let Some(after) = again {
                let (context, uid) = (self.clone(), uid.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    context.wake(&uid);
                });
            }
            if !self.registry.end(&uid) {
                return;
            }
        }
    }

    fn wake_all(self: &Arc<Self>) {
        for uid in self.registry.uids() {
            self.wake(&uid);
        }
    }
}

/// Works until `shutdown`.
pub(crate) async fn run(
    client: kube::Client,
    provider: Arc<dyn Provider>,
    registry: Arc<Registry>,
    config: Arc<Config>,
    shutdown: CancellationToken,
) {
    let (events, writer) = Events::new(client.clone(), config.node.name.clone());
    let workers = Semaphore::new(config.workers.max(1));
    let (shown, mut waking) = Shown::new(client.clone());
    let context = Arc::new(Context {
        accounts: joey_guard::Guard::new(config.token_guard),
        client,
        provider,
        registry,
        config,
        services: Services::default(),
        shown,
        events,
        workers,
        shutdown: shutdown.clone(),
    });
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = watch_pods(context.clone()) => {}
        () = watch_instances(context.clone()) => {}
        () = context.services.keep(context.client.clone()) => {}
        () = writer => {}
        () = async { while let Some(uid) = waking.recv().await { context.wake(&uid) } } => {}
    }
}

async fn watch_pods(context: Arc<Context>) {
    let api: Api<Pod> = Api::all(context.client.clone());
    let config = watcher::Config::default().fields(&format!("spec.nodeName={}", context.config.node.name));
    let mut events = watcher(api, config).boxed();
    let mut listed = Vec::new();
    loop {
        match events.try_next().await {
            Ok(Some(watcher::Event::Apply(pod))) => {
                if let Some(uid) = context.registry.pod(pod) {
                    context.wake(&uid);
                }
            }
            Ok(Some(watcher::Event::InitApply(pod))) => {
                listed.extend(pod.metadata.uid.clone());
                if let Some(uid) = context.registry.pod(pod)
                    && context.registry.synced()
                {
                    context.wake(&uid);
                }
            }
            Ok(Some(watcher::Event::Delete(pod))) => {
                if let Some(uid) = &pod.metadata.uid {
                    context.registry.pod_gone(uid);
                    context.wake(uid);
                }
            }
            Ok(Some(watcher::Event::Init)) => listed.clear(),
            Ok(Some(watcher::Event::InitDone)) => {
                context.registry.pods_listed(&listed);
                listed = Vec::new();
                context.wake_all();
            }
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "watch of pods failed, trying again");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

async fn watch_instances(context: Arc<Context>) {
    loop {
        match context.provider.watch(None).await {
            Ok(mut events) => {
                let mut listed = Some(Vec::new());
                loop {
                    match events.next().await {
                        Some(Ok(event)) => take(&context, event, &mut listed),
                        Some(Err(fault)) => {
                            tracing::warn!(%fault, "watch of instances failed, trying again");
                            break;
                        }
                        None => break,
                    }
                }
            }
            Err(fault) => tracing::warn!(%fault, "instances cannot be watched, trying again"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Takes in one event; `listed` is given until all that was there has been told.
fn take(context: &Arc<Context>, event: WatchEvent, listed: &mut Option<Vec<String>>) {
    match event {
        WatchEvent::Set { instance } => {
            let labels = &instance.spec.labels;
            if labels.get(LABEL_NODE) != Some(&context.config.node.name) {
                return;
            }
            let Some(uid) = labels.get(LABEL_UID).cloned() else { return };
            listed.iter_mut().for_each(|listed| listed.push(instance.id.clone()));
            context.registry.instance(&uid, *instance, listed.is_some());
            if context.registry.synced() {
                context.wake(&uid);
            }
        }
        WatchEvent::Gone { id, name, revision } => {
            for uid in context.registry.instance_gone(&id, &name, revision) {
                context.wake(&uid);
            }
        }
        WatchEvent::Synced { .. } => {
            if let Some(listed) = listed.take() {
                context.registry.instances_listed(&listed);
                context.wake_all();
            }
        }
    }
}
