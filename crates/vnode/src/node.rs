//! The Node object: registration, status, heartbeat and lease. Says nothing about Pods.
//!
//! Periods are the kubelet's defaults: lease every 10 s for 40 s (`nodeLeaseDurationSeconds`), status when it changed and at least
//! every 5 minutes (`nodeStatusReportFrequency`). A Node that somebody deleted is made again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{
    DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeSpec, NodeStatus, NodeSystemInfo, Taint,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference, Time};
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::provider::{Capacity, Provider};

/// Key, value and effect of the node's own taint, as virtual-kubelet names it.
pub const TAINT_KEY: &str = "virtual-kubelet.io/provider";
const TAINT_VALUE: &str = "joey";
/// Version the node reports. The minor version is the API it was written against.
const KUBELET_VERSION: &str = concat!("v1.36.0+joey.", env!("CARGO_PKG_VERSION"));

const LEASE_PERIOD: Duration = Duration::from_secs(10);
const LEASE_SECONDS: i32 = 40;
const STATUS_PERIOD: Duration = Duration::from_secs(300);
const RETRY: Duration = Duration::from_millis(500);

/// Keeps the Node and its Lease alive until `shutdown`.
pub(crate) async fn run(
    client: kube::Client,
    provider: Arc<dyn Provider>,
    config: Arc<Config>,
    kubelet_port: u16,
    shutdown: CancellationToken,
) {
    let mut heart = Heart {
        nodes: Api::all(client.clone()),
        leases: Api::namespaced(client, "kube-node-lease"),
        provider,
        config,
        kubelet_port,
        reported: None,
    };
    let mut ticks = tokio::time::interval(LEASE_PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            beat = heart.beat() => if let Err(error) = beat {
                tracing::warn!(node = heart.config.node.name, %error, "node could not be kept alive, trying again");
                ticks.reset_after(RETRY);
            }
        }
    }
}

struct Heart {
    nodes: Api<Node>,
    leases: Api<Lease>,
    provider: Arc<dyn Provider>,
    config: Arc<Config>,
    kubelet_port: u16,
    /// What was last written, and when.
    reported: Option<(Option<Capacity>, Instant)>,
}

impl Heart {
    async fn beat(&mut self) -> Result<(), kube::Error> {
        let node = match self.nodes.get_opt(&self.config.node.name).await? {
            Some(node) => node,
            None => {
                self.reported = None;
                self.register().await?
            }
        };
        self.claim(&node).await?;
        self.report(&node).await?;
        self.renew(&node).await
    }

    async fn register(&self) -> Result<Node, kube::Error> {
        let node = Node {
            metadata: ObjectMeta {
                name: Some(self.config.node.name.clone()),
                labels: Some(labels(&self.config)),
                ..ObjectMeta::default()
            },
            spec: Some(NodeSpec {
                taints: self.config.taint.then(|| vec![taint()]),
                provider_id: Some(format!("joey://{}", self.config.node.name)),
                ..NodeSpec::default()
            }),
            status: None,
        };
        let created = self.nodes.create(&PostParams::default(), &node).await?;
        tracing::info!(node = self.config.node.name, "node registered");
        Ok(created)
    }

    /// Puts labels and the taint on a Node that was there before.
    async fn claim(&self, node: &Node) -> Result<(), kube::Error> {
        let wanted = labels(&self.config);
        let present = node.metadata.labels.clone().unwrap_or_default();
        let mut patch = serde_json::Map::new();
        if wanted.iter().any(|(key, value)| present.get(key) != Some(value)) {
            patch.insert("metadata".into(), json!({ "labels": wanted }));
        }
        let mut taints = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
        if self.config.taint && !taints.iter().any(|taint| taint.key == TAINT_KEY) {
            taints.push(taint());
            patch.insert("spec".into(), json!({ "taints": taints }));
        }
        if !patch.is_empty() {
            self.nodes.patch(&self.config.node.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        }
        Ok(())
    }

    async fn report(&mut self, node: &Node) -> Result<(), kube::Error> {
        let capacity = match self.provider.capacity().await {
            Ok(capacity) => Some(capacity),
            Err(fault) => {
                tracing::warn!(%fault, "capacity could not be asked for");
                None
            }
        };
        let fresh = self.reported.as_ref().is_some_and(|(_, at)| at.elapsed() < STATUS_PERIOD);
        let same = self.reported.as_ref().is_some_and(|(reported, _)| *reported == capacity);
        if fresh && same && node_is_ready(node) == capacity.is_some() {
            return Ok(());
        }
        let status = status(&self.config, self.kubelet_port, capacity.as_ref(), node, Timestamp::now());
        let patch = Patch::Strategic(json!({ "status": status }));
        self.nodes.patch_status(&self.config.node.name, &PatchParams::default(), &patch).await?;
        self.reported = Some((capacity, Instant::now()));
        Ok(())
    }

    async fn renew(&self, node: &Node) -> Result<(), kube::Error> {
        let now = MicroTime(Timestamp::now());
        let name = &self.config.node.name;
        let patch = Patch::Merge(json!({ "spec": {
            "holderIdentity": name, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": now,
        }}));
        match self.leases.patch(name, &PatchParams::default(), &patch).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            other => return other.map(drop),
        }
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                owner_references: node.metadata.uid.clone().map(|uid| {
                    vec![OwnerReference {
                        api_version: "v1".into(),
                        kind: "Node".into(),
                        name: name.clone(),
                        uid,
                        ..OwnerReference::default()
                    }]
                }),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(name.clone()),
                lease_duration_seconds: Some(LEASE_SECONDS),
                renew_time: Some(now),
                ..LeaseSpec::default()
            }),
        };
        self.leases.create(&PostParams::default(), &lease).await.map(drop)
    }
}

fn taint() -> Taint {
    Taint { key: TAINT_KEY.into(), value: Some(TAINT_VALUE.into()), effect: "NoSchedule".into(), ..Taint::default() }
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn labels(config: &Config) -> BTreeMap<String, String> {
    let mut labels: BTreeMap<String, String> = [
        ("type", "virtual-kubelet"),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", architecture()),
        ("kubernetes.io/hostname", config.node.name.as_str()),
        ("kubernetes.io/role", "agent"),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect();
    labels.extend(config.labels.clone());
    labels
}

fn node_is_ready(node: &Node) -> bool {
    node.status
        .as_ref()
        .and_then(|status| status.conditions.as_ref())
        .is_some_and(|all| all.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True"))
}

/// The whole status of a Node; without a capacity it is not ready.
fn status(config: &Config, port: u16, capacity: Option<&Capacity>, node: &Node, now: Timestamp) -> NodeStatus {
    let resources = capacity.map(resources);
    let before = node.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    let condition = |kind: &str, value: &str, reason: &str, message: &str| NodeCondition {
        type_: kind.into(),
        status: value.into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        last_heartbeat_time: Some(Time(now)),
        last_transition_time: before
            .iter()
            .find(|old| old.type_ == kind && old.status == value)
            .and_then(|old| old.last_transition_time.clone())
            .or(Some(Time(now))),
    };
    let ready = match capacity {
        Some(_) => condition("Ready", "True", "KubeletReady", "virtual node is ready"),
        None => condition("Ready", "False", "ProviderAway", "the provider of instances does not answer"),
    };
    NodeStatus {
        addresses: Some(vec![
            NodeAddress { type_: "InternalIP".into(), address: config.node.address.to_string() },
            NodeAddress { type_: "Hostname".into(), address: config.node.name.clone() },
        ]),
        capacity: resources.clone(),
        allocatable: resources,
        conditions: Some(vec![
            ready,
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "memory is sufficient"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "disk space is sufficient"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID", "process ids are sufficient"),
        ]),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(port) }),
        }),
        node_info: Some(NodeSystemInfo {
            architecture: capacity.map_or_else(|| architecture().to_owned(), |c| c.architecture.clone()),
            container_runtime_version: concat!("joey://", env!("CARGO_PKG_VERSION")).into(),
            kernel_version: capacity.map(|c| c.kernel.clone()).unwrap_or_default(),
            kubelet_version: KUBELET_VERSION.into(),
            kube_proxy_version: String::new(),
            machine_id: config.node.name.clone(),
            operating_system: "linux".into(),
            os_image: "Joey".into(),
            ..NodeSystemInfo::default()
        }),
        ..NodeStatus::default()
    }
}

fn resources(capacity: &Capacity) -> BTreeMap<String, Quantity> {
    let cpu = match capacity.cpu_milli % 1000 {
        0 => (capacity.cpu_milli / 1000).to_string(),
        _ => format!("{}m", capacity.cpu_milli),
    };
    let mut resources = BTreeMap::from([
        ("cpu".to_owned(), Quantity(cpu)),
        ("memory".to_owned(), Quantity(format!("{}Ki", capacity.memory_bytes / 1024))),
        ("pods".to_owned(), Quantity(capacity.pods.to_string())),
    ]);
    if capacity.storage_bytes > 0 {
        resources.insert("ephemeral-storage".into(), Quantity(format!("{}Ki", capacity.storage_bytes / 1024)));
    }
    resources
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transition_times_stay_while_nothing_changes() {
        let config = Config::new("v", "10.0.0.1".parse().unwrap());
        let capacity = Capacity {
            cpu_milli: 2500,
            memory_bytes: 4096,
            pods: 7,
            storage_bytes: 0,
            kernel: "6.1".into(),
            architecture: "amd64".into(),
        };
        let early: Timestamp = "2020-01-01T00:00:00Z".parse().unwrap();
        let mut node = Node::default();
        node.status = Some(status(&config, 10250, Some(&capacity), &node, early));
        let later = status(&config, 10250, Some(&capacity), &node, Timestamp::now());
        assert!(later.conditions.unwrap().iter().all(|c| c.last_transition_time == Some(Time(early))));
        let away = status(&config, 10250, None, &node, Timestamp::now());
        let ready = away.conditions.unwrap().remove(0);
        assert_eq!((ready.status.as_str(), ready.last_transition_time == Some(Time(early))), ("False", false));
        let resources = later.capacity.unwrap();
        assert_eq!(resources["cpu"], Quantity("2500m".into()));
        assert_eq!(resources["memory"], Quantity("4Ki".into()));
    }
}
