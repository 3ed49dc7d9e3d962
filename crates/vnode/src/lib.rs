//! The virtual node: a node of any Kubernetes cluster whose Pods run as Joey's instances.
//!
//! ```text
//!  API server ◄── kube::Client ──  node      registration, heartbeat, lease
//!             ◄──────────────────  pods      watch → joey_podspec → Provider; Provider's watch → status, events
//!             ──► kubelet endpoints ─────►   logs, exec, attach → Provider
//! ```
//!
//! The same code joins the embedded API server and a cluster that others run. Must never depend on the pool's server, on hosts
//! or on the API server's crate: instances are reached through [`Provider`] alone, the cluster through its client alone.

pub mod config;
pub mod events;
mod kubelet;
pub mod node;
pub mod pods;
pub mod pool;
pub mod provider;
mod refresh;
pub mod resolve;
pub mod services;
mod serving;
pub mod spdy;
pub mod status;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

pub use config::{ClientAuth, Config, ServingCertificate};
pub use pool::PoolProvider;
pub use provider::{ByteStream, Capacity, InstanceEvents, Provider};

/// Why the virtual node could not begin. Once it runs, it retries by itself.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("kubelet listener on {address} could not be opened")]
    Listen { address: std::net::SocketAddr, source: std::io::Error },
    #[error("kubelet's TLS could not be set up: {0}")]
    Tls(String),
}

impl NodeError {
    /// How the caller should react.
    pub fn kind(&self) -> joey_model::ErrorKind {
        match self {
            Self::Listen { .. } => joey_model::ErrorKind::Exhausted,
            Self::Tls(_) => joey_model::ErrorKind::Invalid,
        }
    }
}

/// Runs the virtual node until `shutdown`; instances go on running afterwards.
///
/// The cluster may be away when this is called and at any time later: everything is retried with back-off.
pub async fn run(
    client: kube::Client,
    provider: Arc<dyn Provider>,
    config: Config,
    shutdown: CancellationToken,
) -> Result<(), NodeError> {
    let listener = tokio::net::TcpListener::bind(config.kubelet_listen)
        .await
        .map_err(|source| NodeError::Listen { address: config.kubelet_listen, source })?;
    let port = listener.local_addr().map_or(config.kubelet_listen.port(), |address| address.port());
    let identity = serving::identity(&config)?;
    let config = Arc::new(config);
    let registry = Arc::new(pods::Registry::default());
    let kubelet = kubelet::Kubelet::new(client.clone(), provider.clone(), registry.clone(), config.clone());
    let _ended = shutdown.clone().drop_guard();
    tokio::join!(
        node::run(client.clone(), provider.clone(), config.clone(), port, shutdown.clone()),
        pods::run(client, provider, registry, config, shutdown.clone()),
        kubelet::serve(listener, identity, kubelet, shutdown),
    );
    Ok(())
}
