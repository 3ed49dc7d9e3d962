//! Keeps on this host what the agent in a machine tells of its containers: it is the last truth when the machine is gone.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use joey_api::agent::AgentState;
use joey_api::guest::NO_INSTANCE;
use joey_hypervisor::Vm;
use joey_rpc::{Client, RpcError};

use crate::AgentClient;

/// The file in an instance's directory.
const KEPT: &str = "state.json";
/// Between two attempts to hear an agent that does not speak.
const AGAIN: Duration = Duration::from_millis(200);
/// Between two states that are kept.
const PACE: Duration = Duration::from_millis(20);

/// How long an agent that is found may take to say what it is for.
const FOUND_LIMIT: Duration = Duration::from_secs(2);

/// Whether the agent of a sandbox has told anything yet.
pub(super) fn is_kept(dir: &Path) -> bool {
    dir.join(KEPT).exists()
}

/// Whether an agent knows what it is for. One that does not answer, when nothing it told is kept, was being started.
pub(super) async fn is_told(client: &Client) -> bool {
    let agent = AgentClient::new(client.clone());
    matches!(tokio::time::timeout(FOUND_LIMIT, agent.watch()).await, Ok(Ok(_)))
}

/// Keeps it until the machine has ended. One that has begun anew is ended: some monitors have a machine go on that restarts, and its
/// agent then knows of no instance. `begun`: it had been told of one when this process found it.
pub(super) fn keep(client: &Client, vm: &Arc<dyn Vm>, dir: &Path, begun: bool) {
    let (agent, vm, dir) = (AgentClient::new(client.clone()), vm.clone(), dir.to_owned());
    tokio::spawn(async move {
        let forgotten = tokio::select! {
            _ = vm.ended() => false,
            forgotten = follow(&agent, &dir, begun) => forgotten,
        };
        if forgotten {
            tracing::warn!(dir = %dir.display(), "the machine restarted and is ended");
            vm.kill();
        }
    });
}

/// Until there is nothing to follow; whether the agent has forgotten its instance.
async fn follow(agent: &AgentClient, dir: &Path, mut begun: bool) -> bool {
    loop {
        let watched = agent.watch().await;
        if let Err(RpcError::Remote(fault)) = &watched
            && begun
            && fault.reason == NO_INSTANCE
        {
            return true;
        }
        if let Ok(mut states) = watched {
            begun = true;
            while let Some(Ok(state)) = states.next().await {
                let dir: PathBuf = dir.to_owned();
                let written = tokio::task::spawn_blocking(move || write(&dir, &state)).await;
                if !matches!(written, Ok(Ok(()))) {
                    // The instance's directory is gone with the instance.
                    return false;
                }
                // One that says something all the time does not keep the host's disk busy; the last word is never missed.
                tokio::time::sleep(PACE).await;
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

fn write(dir: &Path, state: &AgentState) -> io::Result<()> {
    let temporary = dir.join("state.json.new");
    std::fs::write(&temporary, serde_json::to_vec(state)?)?;
    std::fs::rename(temporary, dir.join(KEPT))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use joey_model::{ErrorKind, Fault};
    use joey_rpc::fault_answer;

    use super::*;

    /// An agent that knows of no instance, but the second time that it is asked.
    fn agent() -> AgentClient {
        let asked = Arc::new(AtomicUsize::new(0));
        let service = tower::service_fn(move |_: http::Request<hyper::body::Incoming>| {
            let number = asked.fetch_add(1, Ordering::SeqCst);
            async move {
                Ok::<_, Infallible>(match number {
                    1 => joey_rpc::stream_answer(futures::stream::empty()),
                    _ => fault_answer(Fault::new(ErrorKind::Conflict, NO_INSTANCE, "no instance yet")),
                })
            }
        });
        AgentClient::new(Client::in_process("agent", service))
    }

    #[tokio::test]
    async fn an_agent_that_has_forgotten_its_instance_is_told_from_one_that_is_new() {
        let followed = |begun| async move {
            let agent = agent();
            let limit = Duration::from_secs(20);
            tokio::time::timeout(limit, follow(&agent, Path::new("/nowhere"), begun)).await.expect("an end")
        };
        assert!(followed(true).await, "at once");
        assert!(followed(false).await, "only after it knew one");
    }
}
