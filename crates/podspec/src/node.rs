//! What a Pod may see of the node it runs on.

use std::net::IpAddr;

/// A virtual node, as far as its Pods are concerned.
#[derive(Debug, Clone)]
pub struct Node {
    /// Name of the Node object, a DNS subdomain.
    pub name: String,
    /// Address of the Node object.
    pub address: IpAddr,
    /// Name servers for Pods with dnsPolicy ClusterFirst; empty: those of the host.
    pub cluster_dns: Vec<IpAddr>,
    /// Domain of Services: `cluster.local`.
    pub cluster_domain: String,
}

impl Node {
    pub fn new(name: impl Into<String>, address: IpAddr) -> Self {
        Self { name: name.into(), address, cluster_dns: Vec::new(), cluster_domain: "cluster.local".to_owned() }
    }
}
