//! `joey restart`: asks for it, and follows the instance until what ran runs anew.

use std::process::ExitCode;
use std::time::Duration;

use futures::StreamExt;
use joey_api::instance::{ContainerState, ContainerStatus, Instance, WatchEvent};
use joey_api::lifecycle::Role;
use joey_pool::PoolClient;

use crate::args::Anew;
use crate::failure::Failure;

/// How long containers may take to run again once their grace is over.
pub const LIMIT: Duration = Duration::from_secs(60);

pub async fn restart(service: &PoolClient, asked: &Anew) -> Result<ExitCode, Failure> {
    let before = service.get(&asked.name).await?;
    service.restart(&before.id).await?;
    if !asked.no_wait {
        let limit = LIMIT + Duration::from_secs(before.spec.termination_grace_period_seconds.into());
        tokio::time::timeout(limit, until_restarted(service, &before)).await.map_err(|_| {
            let name = &before.spec.name;
            Failure::new(format!("instance \"{name}\" did not run again within {} s", limit.as_secs()))
                .with_hint(format!("see joey describe {name} and joey events {name}"))
        })??;
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn until_restarted(service: &PoolClient, before: &Instance) -> Result<(), Failure> {
    loop {
        let mut changes = service.watch().await?;
        while let Some(change) = changes.next().await {
            match change? {
                WatchEvent::Set { instance } if instance.id == before.id && has_restarted(before, &instance) => {
                    return Ok(());
                }
                WatchEvent::Gone { id, name, .. } if id == before.id => {
                    return Err(Failure::new(format!("instance \"{name}\" was removed while it restarted")));
                }
                _ => {}
            }
        }
    }
}

/// Whether every container that had run runs anew. One that never ran is not waited for: it is only tried once more.
fn has_restarted(before: &Instance, now: &Instance) -> bool {
    before.status.containers.iter().filter(|old| had_run(old)).all(|old| {
        let new = now.status.containers.iter().find(|new| new.name == old.name);
        new.is_some_and(|new| runs_anew(old, new))
    })
}

fn had_run(container: &ContainerStatus) -> bool {
    match (container.role, &container.state) {
        (Role::Main | Role::Sidecar, ContainerState::Running { .. }) => true,
        (Role::Main, ContainerState::Terminated(_)) => true,
        (Role::Main, ContainerState::Waiting { .. }) => container.last_termination.is_some(),
        _ => false,
    }
}

fn runs_anew(old: &ContainerStatus, new: &ContainerStatus) -> bool {
    let more = new.restart_count > old.restart_count;
    match (&old.state, &new.state) {
        // Where the whole sandbox is another one, nothing is counted.
        (ContainerState::Running { started_at: before, .. }, ContainerState::Running { started_at, .. }) => {
            more || before != started_at
        }
        (_, ContainerState::Running { .. }) => true,
        // It has ended again already.
        (_, ContainerState::Terminated(_)) => more,
        (_, ContainerState::Waiting { reason, .. }) => more && reason == "CrashLoopBackOff",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn instance(containers: &[(&str, u32, Value)]) -> Instance {
        let containers: Vec<Value> = containers
            .iter()
            .map(|(name, restarts, state)| {
                let role = if *name == "init" { "Init" } else { "Main" };
                json!({"name": name, "role": role, "image": "i", "restartCount": restarts, "state": state})
            })
            .collect();
        serde_json::from_value(json!({
            "id": "i", "revision": 1, "createdAt": "2024-01-01T00:00:00Z",
            "spec": {"name": "web", "containers": []}, "status": {"phase": "Running", "containers": containers},
        }))
        .unwrap()
    }

    #[test]
    fn a_restart_shows_when_all_that_had_run_run_anew() {
        let runs = |second: u32| json!({"running": {"startedAt": format!("2024-01-01T00:00:{second:02}Z"), "pid": 7}});
        let waits = |reason: &str| json!({"waiting": {"reason": reason, "message": ""}});
        let ended =
            || json!({"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": "2024-01-01T00:00:30Z"}});
        let before = instance(&[("init", 0, ended()), ("a", 1, runs(1)), ("b", 0, ended()), ("c", 0, waits("E"))]);
        let rest = |a: (u32, Value), b: (u32, Value)| {
            instance(&[("init", 0, ended()), ("a", a.0, a.1), ("b", b.0, b.1), ("c", 0, waits("E"))])
        };
        assert!(!has_restarted(&before, &before));
        for (a, b, expected) in [
            ((2, runs(2)), (0, ended()), false),
            ((2, waits("ContainerCreating")), (1, runs(2)), false),
            ((1, ended()), (1, runs(2)), false),
            ((2, runs(2)), (1, runs(2)), true),
            ((2, runs(2)), (1, ended()), true),
            ((2, waits("CrashLoopBackOff")), (1, ended()), true),
            // Made anew as a whole.
            ((1, runs(2)), (0, runs(2)), true),
        ] {
            let now = rest(a, b);
            assert_eq!(has_restarted(&before, &now), expected, "{:?}", now.status.containers);
        }
    }
}
