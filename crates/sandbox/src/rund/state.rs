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
const FOUND_LIMIT: Duration = Duration::from_secs(10);
/// The file in a machine's directory that is there before its agent is told of the instance.
const TOLD: &str = "told";

/// Remembers that the agent of the machine of this directory is told of its instance now.
pub(super) fn tells(vm_dir: &Path) -> io::Result<()> {
    std::fs::write(vm_dir.join(TOLD), "")
}

/// Forgets what the agent of a machine told that became no sandbox.
pub(super) fn forget(dir: &Path) {
    let _ = std::fs::remove_file(dir.join(KEPT));
}

/// Whether nothing of the instance has run in a machine that is found: its agent was not told of it, or says so itself. One that is
/// silent may have been.
pub(super) async fn is_unused(client: &Client, dir: &Path, vm_dir: &Path) -> bool {
    if dir.join(KEPT).exists() {
        return false;
    }
    if !vm_dir.join(TOLD).exists() {
        return true;
    }
    let agent = AgentClient::new(client.clone());
    let asked = tokio::time::timeout(FOUND_LIMIT, agent.watch()).await;
    matches!(asked, Ok(Err(RpcError::Remote(fault))) if fault.reason == NO_INSTANCE)
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
                let place: PathBuf = dir.to_owned();
                match tokio::task::spawn_blocking(move || write(&place, &state)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) if error.kind() != io::ErrorKind::NotFound => {
                        tracing::warn!(dir = %dir.display(), %error, "what a machine's agent tells is not kept for now");
                        // Who watches anew is told the state as it is then.
                        break;
                    }
                    // The instance's directory is gone with the instance.
                    _ => return false,
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
    async fn what_cannot_be_kept_now_is_kept_later() {
        let service = tower::service_fn(|_: http::Request<hyper::body::Incoming>| async {
            let state = r#"{"version": 1, "sequence": 1, "containers": [], "events": [], "stopping": false}"#;
            let lines = futures::stream::iter([Ok(format!("{state}\n").into())]).chain(futures::stream::pending());
            Ok::<_, Infallible>(joey_rpc::stream_answer(lines))
        });
        let agent = AgentClient::new(Client::in_process("agent", service));
        let dir = tempfile::tempdir().unwrap();
        // In the way of what is written.
        let obstacle = dir.path().join("state.json.new");
        std::fs::create_dir(&obstacle).unwrap();
        let follows = follow(&agent, dir.path(), true);
        tokio::pin!(follows);
        let tried = tokio::time::timeout(AGAIN * 3, &mut follows).await;
        assert!(tried.is_err() && !dir.path().join(KEPT).exists(), "it goes on");
        std::fs::remove_dir(&obstacle).unwrap();
        let kept = async {
            while !dir.path().join(KEPT).exists() {
                tokio::time::sleep(PACE).await;
            }
        };
        let limit = Duration::from_secs(20);
        tokio::select! {
            forgotten = &mut follows => panic!("it ended: {forgotten}"),
            kept = tokio::time::timeout(limit, kept) => kept.expect("it is kept in the end"),
        }
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
