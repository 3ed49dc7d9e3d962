//! The reconcilers the embedded control plane needs: scheduler, namespaces, service accounts, garbage, dependents. One a file.
//!
//! Must never depend on the API server's crate, on the store or on the pool: state is reached through the client alone, so
//! that the same code serves a control plane in this process and one elsewhere.

mod dependents;
mod fit;
mod garbage;
mod namespaces;
mod neighbours;
mod scheduler;
mod service_accounts;

use tokio_util::sync::CancellationToken;

/// Runs every reconciler until `shutdown`. The API server may be away at any time: everything is retried.
pub async fn run(client: kube::Client, shutdown: CancellationToken) {
    let work = async {
        tokio::join!(
            scheduler::run(client.clone()),
            namespaces::run(client.clone()),
            service_accounts::run(client.clone()),
            garbage::run(client.clone()),
            dependents::run(client),
        );
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = work => {}
    }
}
