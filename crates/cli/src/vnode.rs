//! `joey vnode`: a virtual node of a cluster that others run, with a host in this process or the pool of a running joey.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Instant;

use joey_vnode::PoolProvider;
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;
use crate::roles::{HostRole, Lock, asked_to_stop, serve_rest, store};
use crate::settings::VnodeSettings;

/// Joins the cluster and serves it until told to stop; instances go on running.
pub async fn vnode(settings: VnodeSettings) -> Result<(), Failure> {
    let began = Instant::now();
    let stop = asked_to_stop()?;
    let cluster = cluster(&settings).await?;
    let address = match settings.address {
        Some(address) => address,
        None => facing(&cluster)?,
    };
    let server = cluster.cluster_url.to_string();
    let client = kube::Client::try_from(cluster)
        .map_err(|error| Failure::caused("the cluster's kubeconfig cannot be used", &error))?;
    let version = client.apiserver_version().await.map_err(|error| {
        Failure::caused(&format!("cluster {server} does not answer"), &error)
            .with_hint("check the server and the credentials in the file given with --kubeconfig")
    })?;

    let shutdown = CancellationToken::new();
    // Held until the end of this function: the host's parts live as long as the role.
    let _own;
    let pool = match &settings.pool {
        Some(socket) => joey_rpc::Client::unix(socket.clone()),
        None => {
            let place = &settings.host.place;
            let lock = Lock::take(place)?;
            let host = HostRole::open(&settings.host).await?;
            let pool = host.pool(&settings.host, store(place)?).await?;
            serve_rest(place, &pool, shutdown.clone())?;
            let client = joey_rpc::Client::in_process("the pool", pool.router());
            _own = (lock, host, pool);
            client
        }
    };
    let mut config = joey_vnode::Config::new(&settings.node_name, address);
    config.taint = settings.taint;
    config.token_guard = settings.host.configuration.account_tokens;
    let node = joey_vnode::run(client, Arc::new(PoolProvider::new(pool)), config, shutdown.clone());
    tokio::pin!(node);
    println!(
        "joey is ready: node {} of {server} (Kubernetes {}, {:.1} s)",
        settings.node_name,
        version.git_version,
        began.elapsed().as_secs_f64()
    );
    tokio::select! {
        ended = &mut node => return ended.map_err(|error| Failure::caused("the virtual node cannot start", &error)),
        stopped = stop.wait() => stopped?,
    }
    shutdown.cancel();
    node.await.map_err(|error| Failure::caused("the virtual node did not end well", &error))
}

async fn cluster(settings: &VnodeSettings) -> Result<kube::Config, Failure> {
    let bad = |error: &kube::config::KubeconfigError| {
        Failure::caused(&format!("kubeconfig {} cannot be used", settings.kubeconfig.display()), error)
    };
    let file = Kubeconfig::read_from(&settings.kubeconfig).map_err(|error| bad(&error))?;
    kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(|error| bad(&error))
}

/// This machine's address on the way to the cluster. Connecting a datagram socket sends nothing: it only looks up the route.
fn facing(cluster: &kube::Config) -> Result<IpAddr, Failure> {
    use std::net::ToSocketAddrs;
    let host = cluster.cluster_url.host().unwrap_or_default().trim_matches(['[', ']']);
    let port = cluster.cluster_url.port_u16().unwrap_or(443);
    let unknown = |error: std::io::Error| {
        Failure::new(format!("no address of this machine faces {host}: {error}")).with_hint("give one with --address")
    };
    let server: SocketAddr = (host, port)
        .to_socket_addrs()
        .map_err(unknown)?
        .next()
        .ok_or_else(|| unknown(std::io::ErrorKind::NotFound.into()))?;
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        SocketAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any).map_err(unknown)?;
    socket.connect(server).map_err(unknown)?;
    Ok(socket.local_addr().map_err(unknown)?.ip())
}
