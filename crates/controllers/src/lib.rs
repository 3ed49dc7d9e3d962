//! The reconcilers the embedded control plane needs: scheduler, namespaces, service accounts, garbage. One a file.
//!
//! Must never depend on the API server's crate or the store: the cluster is reached through `kube::Client` alone, so that the same
//! code works against any API server. A reconciler reads the cluster anew whenever it is woken; it is told nothing but that
//! something changed.

pub mod garbage;
pub mod namespaces;
pub mod scheduler;
pub mod service_accounts;

use tokio_util::sync::CancellationToken;

/// Runs every reconciler until `shutdown`. The API server may be away at any time: everything is retried.
pub async fn run(client: kube::Client, shutdown: CancellationToken) {
    let all = async {
        tokio::join!(
            scheduler::run(client.clone()),
            namespaces::run(client.clone()),
            service_accounts::run(client.clone()),
            garbage::run(client),
        );
    };
    tokio::select! {
        () = all => {}
        () = shutdown.cancelled() => {}
    }
}
