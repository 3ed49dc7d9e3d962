//! Pods bound to a node that does not exist any more: nobody will ever end them, so they are deleted here.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, Preconditions};
use tokio::time::{Instant, MissedTickBehavior};

/// How often is looked (kube-controller-manager's podgc looks every 20 s).
const PERIOD: Duration = Duration::from_secs(20);
/// How long a node must be missing (podgc's quarantine is 40 s): it may be about to register again.
const QUARANTINE: Duration = Duration::from_secs(40);

/// Collects until dropped.
pub(crate) async fn run(client: kube::Client) {
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut missing = HashMap::new();
    loop {
        ticks.tick().await;
        if let Err(error) = collect(&client, &mut missing).await {
            tracing::debug!(%error, "orphaned pods could not be collected");
        }
    }
}

async fn collect(client: &kube::Client, missing: &mut HashMap<String, Instant>) -> Result<(), kube::Error> {
    let nodes = Api::<Node>::all(client.clone()).list_metadata(&ListParams::default()).await?;
    let nodes: HashSet<String> = nodes.iter().map(ResourceExt::name_any).collect();
    let pods = Api::<Pod>::all(client.clone()).list(&ListParams::default()).await?;
    let node_of = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let named: HashSet<String> = pods.iter().filter_map(node_of).filter(|node| !nodes.contains(node)).collect();
    missing.retain(|node, _| named.contains(node));
    for node in named {
        missing.entry(node).or_insert_with(Instant::now);
    }
    for pod in &pods {
        let gone = node_of(pod).and_then(|node| missing.get(&node).copied());
        if gone.is_none_or(|since| since.elapsed() < QUARANTINE) {
            continue;
        }
        let only_this = Preconditions { uid: pod.uid(), resource_version: None };
        let now = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default().grace_period(0) };
        let api = Api::<Pod>::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
        match api.delete(&pod.name_any(), &now).await {
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            result => drop(result?),
        }
    }
    Ok(())
}
