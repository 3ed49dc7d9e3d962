//! Configuration of a virtual node. Values come typed from the command line; nothing is read from the environment here.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use joey_podspec::Node;

/// Everything a virtual node is told.
#[derive(Debug, Clone)]
pub struct Config {
    pub node: Node,
    /// Where the kubelet endpoints listen; port 0 takes a free one. The port taken is published in the Node's status.
    pub kubelet_listen: SocketAddr,
    pub serving: ServingCertificate,
    pub client_auth: ClientAuth,
    /// Users who may call the kubelet endpoints without the cluster being asked: the API server's own client.
    pub trusted_callers: Vec<String>,
    /// Puts the taint `virtual-kubelet.io/provider=joey:NoSchedule` on the node: wanted on clusters with nodes of their own.
    pub taint: bool,
    /// Further labels of the Node.
    pub labels: BTreeMap<String, String>,
    /// Pods that are worked upon at the same time.
    pub workers: usize,
    /// How often tokens are asked for on behalf of one service account.
    pub token_guard: joey_guard::Limits,
}

/// What a cluster stands from each service account's Pods: they are worked upon few at a time, and tried again by themselves.
pub fn token_guard() -> joey_guard::Limits {
    joey_guard::Limits {
        per_second: 100.0,
        burst: 200,
        at_once: 16,
        tries: 2,
        patience: Duration::from_secs(2),
        failures: 5,
        rest: (Duration::from_secs(1), Duration::from_secs(60)),
        ..joey_guard::Limits::default()
    }
}

impl Config {
    /// A node `node_name` reached at `address`, with what suits a cluster that others run.
    pub fn new(node_name: impl Into<String>, address: IpAddr) -> Self {
        Self {
            node: Node::new(node_name, address),
            kubelet_listen: SocketAddr::new(address, 0),
            serving: ServingCertificate::SelfSigned,
            client_auth: ClientAuth::Cluster,
            trusted_callers: Vec::new(),
            taint: true,
            labels: BTreeMap::new(),
            workers: 32,
            token_guard: token_guard(),
        }
    }
}

/// The certificate the kubelet endpoints show.
#[derive(Debug, Clone)]
pub enum ServingCertificate {
    /// PEM files, made by whoever runs the control plane.
    Files { certificate: PathBuf, key: PathBuf },
    /// Made at start. Enough for an API server without `--kubelet-certificate-authority`, which does not verify it.
    SelfSigned,
}

/// Who may call the kubelet endpoints. Anonymous callers never may.
#[derive(Debug, Clone)]
pub enum ClientAuth {
    /// Bearers of a client certificate signed by this PEM file's authority; bearer tokens are asked about at the cluster.
    Authority(PathBuf),
    /// As [`ClientAuth::Authority`], with the authority the cluster publishes in
    /// `kube-system/extension-apiserver-authentication`, key `client-ca-file`.
    Cluster,
}
