//! What an instance's status says, derived from what its agent says. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use joey_api::agent::AgentState;
use joey_api::instance::{
    ContainerSpec, ContainerState, ContainerStatus, InstanceEvent, InstanceSpec, InstanceStatus, Termination, WirePhase,
};
use joey_api::lifecycle::Role;
use joey_model::{ErrorKind, Fault, InstanceId, RestartPolicy};
use joey_sandbox::Loss;

use crate::persist::Record;
use crate::told;

/// Events a status shows.
const EVENTS: usize = 32;

/// The status before there is an agent: every container waits for `reason`.
pub(crate) fn waiting(record: &Record, host: &str, reason: &str, message: &str) -> InstanceStatus {
    let containers = record.spec.containers.iter().map(|container| {
        let restart_count = record.restarts_before.get(&container.name).copied().unwrap_or(0);
        ContainerStatus { restart_count, ..waits(container, reason, message) }
    });
    InstanceStatus { host: Some(host.to_owned()), containers: containers.collect(), ..InstanceStatus::default() }
}

fn waits(container: &ContainerSpec, reason: &str, message: &str) -> ContainerStatus {
    ContainerStatus {
        name: container.name.clone(),
        role: container.role,
        state: ContainerState::Waiting { reason: reason.to_owned(), message: message.to_owned() },
        started: false,
        ready: false,
        last_termination: None,
        restart_count: 0,
        image: container.image.clone(),
        image_id: String::new(),
        container_id: String::new(),
        resources: None,
    }
}

/// A specification that changed may have further containers.
pub(crate) fn take_in(status: &mut InstanceStatus, spec: &InstanceSpec) {
    for container in &spec.containers {
        match status.containers.iter_mut().find(|known| known.name == container.name) {
            None => status.containers.push(waits(container, "ContainerCreating", "")),
            Some(known) if known.image_id.is_empty() => known.image.clone_from(&container.image),
            Some(_) => {}
        }
    }
}

/// Brings the agent's truth into a status.
pub(crate) fn apply(
    status: &mut InstanceStatus,
    id: &str,
    spec: &InstanceSpec,
    restarts_before: &BTreeMap<String, u32>,
    state: &AgentState,
) {
    for told in &state.containers {
        let Some(container) = status.containers.iter_mut().find(|container| container.name == told.name) else {
            continue;
        };
        if !told.image.is_empty() {
            (container.image, container.image_id) = (told.image.clone(), told.image_id.clone());
            container.resources = Some(told.resources);
        }
        container.state = told.state.clone();
        (container.started, container.ready) = (told.started, told.ready);
        let before = restarts_before.get(&told.name).copied().unwrap_or(0);
        container.restart_count = before.saturating_add(told.restart_count).min(told::MOST_RESTARTS);
        if told.last_termination.is_some() {
            container.last_termination = told.last_termination.clone();
        }
        if !matches!(told.state, ContainerState::Waiting { .. }) && !told.image.is_empty() {
            container.container_id = format!("joey://{id}/{}/{}", told.name, container.restart_count);
        }
    }
    for container in status.containers.iter_mut().filter(|container| container.role == Role::Debug) {
        let told = state.containers.iter().any(|told| told.name == container.name);
        if !told && restarts_before.contains_key(&container.name) {
            end_lost(container, "its sandbox is gone, and debug containers are not started again");
        }
    }
    (status.reason, status.message) = (None, None);
    status.phase = match (state.stopping, &state.failed) {
        (true, _) => WirePhase::Terminating,
        (false, Some(failed)) if status.containers.iter().all(|container| !runs(container)) => {
            (status.reason, status.message) = (Some(failed.reason.clone()), Some(failed.message.clone()));
            WirePhase::Failed
        }
        (false, _) => phase(spec, &status.containers),
    };
}

fn runs(container: &ContainerStatus) -> bool {
    matches!(container.state, ContainerState::Running { .. })
}

/// Whether a container that ended with this code is started again: its own policy and rules count before the instance's.
fn runs_again(spec: &InstanceSpec, container: &ContainerStatus, exit_code: i32) -> bool {
    let own = spec.containers.iter().find(|own| own.name == container.name);
    let policy: RestartPolicy = own.and_then(|own| own.restart_policy).unwrap_or(spec.restart_policy).into();
    let policy = match (container.role, policy) {
        // What prepares the others is done once it has been done.
        (Role::Init, RestartPolicy::Always) => RestartPolicy::OnFailure,
        (_, policy) => policy,
    };
    let ruled = own.is_some_and(|own| own.restart_rules.iter().any(|rule| rule.holds(exit_code)));
    ruled || policy.restarts(exit_code)
}

/// The phase that containers in these states make, as a kubelet's `getPhase` has it: the main ones decide once those that prepare
/// them are done and each of them has run, and it is over when those that accompany them have ended too.
pub(crate) fn phase(spec: &InstanceSpec, containers: &[ContainerStatus]) -> WirePhase {
    // Who only looks on comes last, and says nothing about the rest.
    let own = containers.iter().position(|container| container.role == Role::Debug).unwrap_or(containers.len());
    let containers = &containers[..own];
    for init in containers.iter().filter(|container| container.role == Role::Init) {
        match &init.state {
            ContainerState::Terminated(end) if end.exit_code == 0 => {}
            ContainerState::Terminated(end) if !runs_again(spec, init, end.exit_code) => {
                let others = containers.iter().any(runs);
                return if others { WirePhase::Starting } else { WirePhase::Failed };
            }
            _ => return WirePhase::Starting,
        }
    }
    let main = || containers.iter().filter(|container| container.role == Role::Main);
    let never_ran = |container: &ContainerStatus| {
        matches!(container.state, ContainerState::Waiting { .. }) && container.last_termination.is_none()
    };
    if main().any(never_ran) {
        return WirePhase::Starting;
    }
    let mut failed = false;
    for container in main() {
        match &container.state {
            ContainerState::Terminated(end) if !runs_again(spec, container, end.exit_code) => {
                failed |= end.exit_code != 0;
            }
            _ => return WirePhase::Running,
        }
    }
    match failed {
        _ if containers.iter().any(runs) => WirePhase::Running,
        true => WirePhase::Failed,
        false => WirePhase::Succeeded,
    }
}

/// Everybody knows already that its containers are being made; in milliseconds there is news.
pub(crate) fn is_being_started(status: &InstanceStatus) -> bool {
    let being_made = |state: &ContainerState| matches!(state, ContainerState::Waiting { reason, .. } if reason == "ContainerCreating");
    status.phase == WirePhase::Starting && status.containers.iter().all(|container| being_made(&container.state))
}

/// Whether nothing will run any more by itself.
pub(crate) fn is_final(phase: WirePhase) -> bool {
    matches!(phase, WirePhase::Succeeded | WirePhase::Failed)
}

/// The status of an instance whose agent is gone and that is not started again.
pub(crate) fn lost(status: &mut InstanceStatus, fault: &Fault) {
    for container in &mut status.containers {
        end_lost(container, &fault.message);
    }
    status.phase = WirePhase::Failed;
    (status.reason, status.message) = (Some(fault.reason.clone()), Some(fault.message.clone()));
}

fn end_lost(container: &mut ContainerStatus, message: &str) {
    if let ContainerState::Terminated(_) = container.state {
        return;
    }
    let started_at = match container.state {
        ContainerState::Running { started_at, .. } => Some(started_at),
        _ => None,
    };
    (container.started, container.ready) = (false, false);
    container.state = ContainerState::Terminated(Termination {
        exit_code: 137,
        signal: Some(9),
        reason: "Error".to_owned(),
        message: message.to_owned(),
        started_at,
        finished_at: Timestamp::now(),
    });
}

/// Events of the host and of the agent in one list, oldest first. The host's last ones are among them whatever the agent says.
pub(crate) fn events(ours: &[InstanceEvent], agent: &[InstanceEvent]) -> Vec<InstanceEvent> {
    let last = |events: &[InstanceEvent], count: usize| events[events.len().saturating_sub(count)..].to_vec();
    let agent = last(agent, EVENTS - ours.len().min(EVENTS / 2));
    let mut all = last(ours, EVENTS - agent.len());
    all.extend(agent);
    all.sort_by_key(|event| event.at);
    all
}

/// Why a sandbox was lost.
pub(crate) fn fault_of(id: &InstanceId, loss: Option<Loss>) -> Fault {
    match loss {
        Some(Loss { reason, message }) => {
            let message = format!("the virtual machine of instance {id} {message}");
            Fault::new(ErrorKind::Retryable, reason, message)
        }
        None => {
            let message = format!("agent of instance {id} was lost and its containers with it");
            Fault::new(ErrorKind::Retryable, "AgentLost", message)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn container(state: ContainerState, before: bool) -> ContainerStatus {
        let mut status: ContainerStatus = serde_json::from_value(json!({"name": "c", "image": "i", "restartCount": 0,
            "state": {"waiting": {"reason": "ContainerCreating", "message": ""}}}))
        .unwrap();
        status.state = state;
        status.last_termination = before.then(|| end(1));
        status
    }

    fn spec(policy: RestartPolicy) -> InstanceSpec {
        let policy = format!("{policy:?}");
        serde_json::from_value(json!({"name": "i", "containers": [], "restartPolicy": policy})).unwrap()
    }

    fn end(exit_code: i32) -> Termination {
        serde_json::from_value(json!({"exitCode": exit_code, "reason": "r", "finishedAt": "2026-01-01T00:00:00Z"}))
            .unwrap()
    }

    #[test]
    fn init_containers_and_sidecars() {
        let runs = || ContainerState::Running { started_at: Timestamp::UNIX_EPOCH, pid: 1 };
        let waits = || ContainerState::Waiting { reason: "r".to_owned(), message: String::new() };
        let ended = |code| ContainerState::Terminated(end(code));
        let (init, side, main) = (Role::Init, Role::Sidecar, Role::Main);
        for (policy, states, expected) in [
            (RestartPolicy::Always, vec![(init, runs()), (main, waits())], WirePhase::Starting),
            (RestartPolicy::Always, vec![(init, ended(1)), (main, waits())], WirePhase::Starting),
            (RestartPolicy::Never, vec![(init, ended(1)), (main, waits())], WirePhase::Failed),
            (RestartPolicy::Never, vec![(side, runs()), (init, ended(1)), (main, waits())], WirePhase::Starting),
            (RestartPolicy::Always, vec![(side, runs()), (main, waits())], WirePhase::Starting),
            (RestartPolicy::Always, vec![(init, ended(0)), (main, runs())], WirePhase::Running),
            (RestartPolicy::Never, vec![(side, runs()), (main, ended(0))], WirePhase::Running),
            (RestartPolicy::Never, vec![(side, ended(143)), (main, ended(0))], WirePhase::Succeeded),
            (RestartPolicy::Never, vec![(side, ended(0)), (main, ended(2))], WirePhase::Failed),
        ] {
            let containers: Vec<_> =
                states.into_iter().map(|(role, state)| ContainerStatus { role, ..container(state, false) }).collect();
            assert_eq!(phase(&spec(policy), &containers), expected, "{policy:?} {containers:?}");
        }
    }

    #[test]
    fn phases() {
        let runs = || ContainerState::Running { started_at: Timestamp::UNIX_EPOCH, pid: 1 };
        let waits = || ContainerState::Waiting { reason: "r".to_owned(), message: String::new() };
        let ended = |code| ContainerState::Terminated(end(code));
        for (policy, states, expected) in [
            (RestartPolicy::Always, vec![(waits(), false)], WirePhase::Starting),
            (RestartPolicy::Always, vec![(waits(), false), (runs(), false)], WirePhase::Starting),
            (RestartPolicy::Always, vec![(runs(), false), (waits(), false)], WirePhase::Starting),
            (RestartPolicy::Never, vec![(ended(0), false), (waits(), false)], WirePhase::Starting),
            (RestartPolicy::Always, vec![(runs(), false), (waits(), true)], WirePhase::Running),
            (RestartPolicy::Always, vec![(waits(), true)], WirePhase::Running),
            (RestartPolicy::Always, vec![(ended(0), false)], WirePhase::Running),
            (RestartPolicy::OnFailure, vec![(ended(0), false), (ended(1), false)], WirePhase::Running),
            (RestartPolicy::OnFailure, vec![(ended(0), false)], WirePhase::Succeeded),
            (RestartPolicy::Never, vec![(ended(0), false), (runs(), false)], WirePhase::Running),
            (RestartPolicy::Never, vec![(ended(0), false), (ended(3), false)], WirePhase::Failed),
            (RestartPolicy::Never, vec![(ended(0), false), (ended(0), false)], WirePhase::Succeeded),
        ] {
            let containers: Vec<_> = states.into_iter().map(|(state, before)| container(state, before)).collect();
            assert_eq!(phase(&spec(policy), &containers), expected, "{policy:?} {containers:?}");
        }
    }

    #[test]
    fn restarts_are_counted_on_from_those_before() {
        let spec = json!({"name": "i", "containers": [{"name": "c", "image": "i"}], "restartsBefore": {"c": 4}});
        let record = Record::new(serde_json::from_value(spec).unwrap());
        let mut status = waiting(&record, "h", "ContainerCreating", "");
        assert_eq!(status.containers[0].restart_count, 4);
        let state: AgentState = serde_json::from_value(json!({"version": 1, "sequence": 1, "events": [],
            "stopping": false, "containers": [{"name": "c", "restartCount": 2, "lastTermination": null,
            "runningSince": null, "state": {"running": {"startedAt": "2026-01-01T00:00:00Z", "pid": 7}}}]}))
        .unwrap();
        apply(&mut status, "id", &record.spec, &record.restarts_before, &state);
        assert_eq!((status.containers[0].restart_count, status.phase), (6, WirePhase::Running));
    }

    #[test]
    fn containers_with_a_policy_of_their_own() {
        let spec: InstanceSpec = serde_json::from_value(json!({"name": "i", "restartPolicy": "Always", "containers": [
            {"name": "first", "image": "i", "role": "Init", "restartPolicy": "Never"},
            {"name": "again", "image": "i", "role": "Init", "restartPolicy": "OnFailure"},
            {"name": "once", "image": "i", "restartPolicy": "Never"},
            {"name": "ruled", "image": "i", "restartPolicy": "Never", "restartRules": [{"exitCodes": [3]}]},
            {"name": "always", "image": "i"}]}))
        .unwrap();
        let waits = || ContainerState::Waiting { reason: "r".to_owned(), message: String::new() };
        let ended = |code| ContainerState::Terminated(end(code));
        for (states, expected) in [
            (vec![("once", ended(0))], WirePhase::Succeeded),
            (vec![("once", ended(1))], WirePhase::Failed),
            (vec![("once", ended(0)), ("always", ended(0))], WirePhase::Running),
            (vec![("once", ended(0)), ("ruled", ended(0))], WirePhase::Succeeded),
            (vec![("once", ended(0)), ("ruled", ended(4))], WirePhase::Failed),
            (vec![("once", ended(0)), ("ruled", ended(3))], WirePhase::Running),
            (vec![("first", ended(1)), ("always", waits())], WirePhase::Failed),
            (vec![("again", ended(1)), ("always", waits())], WirePhase::Starting),
        ] {
            let made = |(name, state): (&str, ContainerState)| {
                let role = spec.containers.iter().find(|own| own.name == name).unwrap().role;
                ContainerStatus { name: name.to_owned(), role, ..container(state, false) }
            };
            let containers: Vec<_> = states.into_iter().map(made).collect();
            assert_eq!(phase(&spec, &containers), expected, "{containers:?}");
        }
    }
}
