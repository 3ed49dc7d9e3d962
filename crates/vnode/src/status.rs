//! Instance → Pod status, as the kubelet would write it. Pure functions; sending is done in `pods`.

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::Timestamp;
use joey_api::instance::{ContainerState as State, ContainerStatus as Container, Instance, Termination, WirePhase};
use k8s_openapi::api::core::v1::{
    self as core, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodSpec, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Value, json};

/// Conditions that are ours; all others are somebody else's and stay as they are.
pub const OWN_CONDITIONS: [&str; 5] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

/// Whether the Pod has ended for good: it is never run again.
pub fn is_terminal(status: &PodStatus) -> bool {
    matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
}

/// With what the restart counts of a Pod's next instance begin: another run of what has run is one restart more.
pub fn restarts(status: &PodStatus) -> BTreeMap<String, u32> {
    let all = status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten());
    all.filter(|container| container.container_id.is_some())
        .map(|container| {
            let count = u32::try_from(container.restart_count).unwrap_or(0);
            (container.name.clone(), count.saturating_add(1))
        })
        .collect()
}

/// Kubernetes' times have whole seconds.
fn seconds(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}

/// The status of a Pod whose instance is as given. `before` is the status last known, of which times are kept.
pub fn of_instance(pod: &Pod, before: &PodStatus, instance: &Instance, host: IpAddr, now: Timestamp) -> PodStatus {
    let spec = pod.spec.clone().unwrap_or_default();
    let status = &instance.status;
    let (inits, containers) = of_containers(&spec, |wanted, name, image| {
        match status.containers.iter().find(|container| container.name == name) {
            Some(container) => {
                let resources = in_force(wanted, container);
                let allocated_resources = resources.as_ref().and_then(|resources| resources.requests.clone());
                ContainerStatus { resources, allocated_resources, ..container_status(container) }
            }
            None => {
                let reason = status.reason.as_deref().unwrap_or("ContainerCreating");
                waiting(name, image, reason, status.message.as_deref().unwrap_or_default())
            }
        }
    });
    let phase = match status.phase {
        WirePhase::Pending | WirePhase::Starting => "Pending",
        WirePhase::Running => "Running",
        WirePhase::Succeeded => "Succeeded",
        WirePhase::Failed => "Failed",
        WirePhase::Terminating => ending(&containers),
    };
    let mut made = PodStatus {
        phase: Some(phase.to_owned()),
        reason: status.reason.clone().filter(|_| phase == "Failed"),
        message: status.message.clone().filter(|_| phase == "Failed"),
        ..frame(pod, before, Some(host), now)
    };
    if let Some(address) = status.address {
        made.pod_ip = Some(address.to_string());
        made.pod_ips = Some(vec![PodIP { ip: address.to_string() }]);
    }
    made.conditions = Some(conditions(pod, before, (&inits, &containers), phase, status.address.is_some(), now));
    made.container_statuses = Some(containers);
    made.init_container_statuses = Some(inits).filter(|inits| !inits.is_empty());
    made.ephemeral_container_statuses = debug(&spec, before, instance);
    made
}

/// The statuses of ephemeral containers; those of an instance that is gone stay as they ended.
fn debug(spec: &PodSpec, before: &PodStatus, instance: &Instance) -> Option<Vec<ContainerStatus>> {
    let of = |one: &core::EphemeralContainer| {
        if let Some(now) = instance.status.containers.iter().find(|now| now.name == one.name) {
            return ContainerStatus { ready: false, started: None, ..container_status(now) };
        }
        let told = before.ephemeral_container_statuses.iter().flatten().find(|told| told.name == one.name);
        match told.filter(|told| told.container_id.is_some()) {
            Some(told) if told.state.as_ref().is_some_and(|state| state.terminated.is_some()) => told.clone(),
            Some(told) => ContainerStatus {
                state: Some(ContainerState {
                    terminated: Some(ContainerStateTerminated {
                        exit_code: 137,
                        reason: Some("ContainerStatusUnknown".to_owned()),
                        message: Some("The container could not be located when the pod was made again".to_owned()),
                        ..ContainerStateTerminated::default()
                    }),
                    ..ContainerState::default()
                }),
                ..told.clone()
            },
            None => waiting(&one.name, one.image.as_deref().unwrap_or_default(), "ContainerCreating", ""),
        }
    };
    let all: Vec<ContainerStatus> = spec.ephemeral_containers.iter().flatten().map(of).collect();
    Some(all).filter(|all| !all.is_empty())
}

/// The resources in force: limits as the instance tells them, requests as the Pod has them.
fn in_force(wanted: &core::Container, now: &Container) -> Option<core::ResourceRequirements> {
    let told = now.resources?;
    let asked = wanted.resources.clone().unwrap_or_default();
    let mut limits = asked.limits.clone().unwrap_or_default();
    let milli = |text: &str| joey_model::quantity::parse_milli(text).ok();
    let units = |text: &str| joey_model::quantity::parse_units(text).ok();
    if let Some(cpu) = limits.get_mut("cpu").filter(|cpu| told.cpu_milli.is_some() && milli(&cpu.0) != told.cpu_milli) {
        cpu.0 = format!("{}m", told.cpu_milli.unwrap_or_default());
    }
    let own = told.memory_bytes;
    if let Some(memory) = limits.get_mut("memory").filter(|memory| own.is_some() && units(&memory.0) != own) {
        memory.0 = own.unwrap_or_default().to_string();
    }
    let limits = Some(limits).filter(|limits| !limits.is_empty());
    Some(core::ResourceRequirements { claims: None, limits, requests: asked.requests })
}

/// The statuses of the init containers and of the main ones, made from name and image.
fn of_containers(
    spec: &PodSpec,
    status: impl Fn(&core::Container, &str, &str) -> ContainerStatus,
) -> (Vec<ContainerStatus>, Vec<ContainerStatus>) {
    let made = |container: &core::Container| {
        status(container, &container.name, container.image.as_deref().unwrap_or_default())
    };
    (spec.init_containers.iter().flatten().map(made).collect(), spec.containers.iter().map(made).collect())
}

/// The phase of a Pod that is being ended: final once all its containers are.
fn ending(containers: &[ContainerStatus]) -> &'static str {
    let ended: Vec<_> =
        containers.iter().filter_map(|c| c.state.as_ref().and_then(|state| state.terminated.as_ref())).collect();
    match () {
        // None of them ever ran.
        () if ended.len() < containers.len() && containers.iter().all(|c| c.container_id.is_none()) => "Pending",
        () if ended.len() < containers.len() => "Running",
        () if ended.iter().all(|run| run.exit_code == 0) => "Succeeded",
        () => "Failed",
    }
}

/// The status of a Pod that is refused for good.
pub fn failed(pod: &Pod, before: &PodStatus, reason: &str, message: &str, now: Timestamp) -> PodStatus {
    PodStatus {
        phase: Some("Failed".into()),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        conditions: Some(conditions(pod, before, (&[], &[]), "Failed", false, now)),
        container_statuses: before.container_statuses.as_ref().map(|all| all.iter().map(|c| lost(c, now)).collect()),
        init_container_statuses: before.init_container_statuses.clone(),
        ..frame(pod, before, None, now)
    }
}

/// A container that was running when it was last heard of, and runs no more: in the kubelet's words.
fn lost(container: &ContainerStatus, now: Timestamp) -> ContainerStatus {
    let mut lost = ContainerStatus { ready: false, started: Some(false), ..container.clone() };
    if let Some(running) = container.state.as_ref().and_then(|state| state.running.as_ref()) {
        lost.state = Some(ContainerState {
            terminated: Some(ContainerStateTerminated {
                exit_code: 137,
                reason: Some("ContainerStatusUnknown".to_owned()),
                message: Some("The container could not be located when the pod was terminated".to_owned()),
                started_at: running.started_at.clone(),
                finished_at: Some(seconds(now)),
                ..ContainerStateTerminated::default()
            }),
            ..ContainerState::default()
        });
    }
    lost
}

/// The status of a Pod whose containers wait, all for the same reason.
pub fn waits(pod: &Pod, before: &PodStatus, reason: &str, message: &str, now: Timestamp) -> PodStatus {
    let told = || before.init_container_statuses.iter().chain(&before.container_statuses).flatten();
    let wait = |name: &str, image: &str| {
        let waits = waiting(name, image, reason, message);
        // What has run before goes on being told: it counts when it runs again.
        match told().find(|told| told.name == name && told.container_id.is_some()) {
            Some(told) => {
                let (restart_count, container_id) = (told.restart_count, told.container_id.clone());
                ContainerStatus { restart_count, container_id, ..waits }
            }
            None => waits,
        }
    };
    let spec = pod.spec.clone().unwrap_or_default();
    let (inits, containers) = of_containers(&spec, |_, name, image| wait(name, image));
    PodStatus {
        phase: Some("Pending".into()),
        conditions: Some(conditions(pod, before, (&inits, &containers), "Pending", false, now)),
        container_statuses: Some(containers),
        init_container_statuses: Some(inits).filter(|inits| !inits.is_empty()),
        ..frame(pod, before, None, now)
    }
}

fn frame(pod: &Pod, before: &PodStatus, host: Option<IpAddr>, now: Timestamp) -> PodStatus {
    PodStatus {
        host_ip: host.map(|ip| ip.to_string()),
        host_ips: host.map(|ip| vec![HostIP { ip: ip.to_string() }]),
        start_time: before.start_time.clone().or_else(|| Some(seconds(now))),
        observed_generation: pod.metadata.generation,
        ..PodStatus::default()
    }
}

fn waiting(name: &str, image: &str, reason: &str, message: &str) -> ContainerStatus {
    ContainerStatus {
        name: name.to_owned(),
        image: image.to_owned(),
        started: Some(false),
        state: Some(ContainerState {
            waiting: Some(ContainerStateWaiting {
                reason: Some(reason.to_owned()),
                message: Some(message.to_owned()).filter(|text| !text.is_empty()),
            }),
            ..ContainerState::default()
        }),
        ..ContainerStatus::default()
    }
}

fn container_status(container: &Container) -> ContainerStatus {
    let state = match &container.state {
        State::Waiting { reason, message } => {
            return ContainerStatus {
                last_state: container.last_termination.as_ref().map(|run| terminated(run, &container.container_id)),
                restart_count: i32::try_from(container.restart_count).unwrap_or(i32::MAX),
                image_id: container.image_id.clone(),
                container_id: Some(container.container_id.clone()).filter(|id| !id.is_empty()),
                ..waiting(&container.name, &container.image, reason, message)
            };
        }
        State::Running { started_at, .. } => ContainerState {
            running: Some(ContainerStateRunning { started_at: Some(seconds(*started_at)) }),
            ..ContainerState::default()
        },
        State::Terminated(run) => terminated(run, &container.container_id),
    };
    ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone(),
        image_id: container.image_id.clone(),
        container_id: Some(container.container_id.clone()).filter(|id| !id.is_empty()),
        ready: container.ready,
        started: Some(container.started),
        restart_count: i32::try_from(container.restart_count).unwrap_or(i32::MAX),
        last_state: container.last_termination.as_ref().map(|run| terminated(run, "")),
        state: Some(state),
        ..ContainerStatus::default()
    }
}

fn terminated(run: &Termination, id: &str) -> ContainerState {
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            container_id: Some(id.to_owned()).filter(|id| !id.is_empty()),
            exit_code: run.exit_code,
            finished_at: Some(seconds(run.finished_at)),
            message: Some(run.message.clone()).filter(|text| !text.is_empty()),
            reason: Some(run.reason.clone()),
            signal: run.signal,
            started_at: run.started_at.map(seconds),
        }),
        ..ContainerState::default()
    }
}

fn conditions(
    pod: &Pod,
    before: &PodStatus,
    (inits, containers): (&[ContainerStatus], &[ContainerStatus]),
    phase: &str,
    has_address: bool,
    now: Timestamp,
) -> Vec<PodCondition> {
    let known = before.conditions.as_deref().unwrap_or_default();
    let is_sidecar = |name: &str| {
        let inits = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
        inits.into_iter().any(|init| init.name == name && init.restart_policy.as_deref() == Some("Always"))
    };
    let sidecars = inits.iter().filter(|c| is_sidecar(&c.name));
    let unready: Vec<&str> = sidecars.chain(containers).filter(|c| !c.ready).map(|c| c.name.as_str()).collect();
    // A sidecar has done its part of the start when it has started, another when it is done.
    let begun = |c: &&ContainerStatus| if is_sidecar(&c.name) { c.started == Some(true) } else { c.ready };
    let incomplete: Vec<&str> = inits.iter().filter(|c| !begun(c)).map(|c| c.name.as_str()).collect();
    let (reason, message) = match phase {
        "Succeeded" => (Some("PodCompleted"), None),
        "Failed" => (Some("PodFailed"), None),
        _ if unready.is_empty() => (None, None),
        _ => (Some("ContainersNotReady"), Some(format!("containers with unready status: [{}]", unready.join(" ")))),
    };
    let over = matches!(phase, "Succeeded" | "Failed");
    let gates = pod.spec.as_ref().and_then(|spec| spec.readiness_gates.as_deref()).unwrap_or_default();
    let closed = gates
        .iter()
        .find(|gate| !known.iter().any(|c| c.type_ == gate.condition_type && c.status == "True"))
        .map(|gate| format!("corresponding condition of pod readiness gate \"{}\" is not true", gate.condition_type));
    let all_ready = reason.is_none();
    let condition = |kind: &str, value: bool, reason: Option<&str>, message: Option<String>| {
        let value = if value { "True" } else { "False" };
        let old = known.iter().find(|old| old.type_ == kind && old.status == value);
        PodCondition {
            type_: kind.to_owned(),
            status: value.to_owned(),
            reason: reason.map(str::to_owned),
            message,
            observed_generation: pod.metadata.generation,
            last_transition_time: old.and_then(|old| old.last_transition_time.clone()).or_else(|| Some(seconds(now))),
            ..PodCondition::default()
        }
    };
    let ready = match (all_ready, closed) {
        (true, Some(why)) => condition("Ready", false, Some("ReadinessGatesNotReady"), Some(why)),
        (true, None) => condition("Ready", true, None, None),
        (false, _) => condition("Ready", false, reason, message.clone()),
    };
    vec![
        condition("PodReadyToStartContainers", has_address && !over, None, None),
        match incomplete.is_empty() || phase == "Succeeded" {
            true => condition("Initialized", true, reason.filter(|r| *r == "PodCompleted"), None),
            false => {
                let message = format!("containers with incomplete status: [{}]", incomplete.join(" "));
                condition("Initialized", false, Some("ContainersNotInitialized"), Some(message))
            }
        },
        ready,
        condition("ContainersReady", all_ready, reason, message),
        condition("PodScheduled", true, None, None),
    ]
}

/// A status as a strategic merge patch onto one that may be `known`: what it no longer says is taken away.
pub fn patch(known: &PodStatus, status: &PodStatus) -> Value {
    let mut patch = json!(status);
    let null_unless = |object: &mut Value, fields: &[&str]| {
        for &field in fields {
            if object.get(field).is_none() {
                object[field] = Value::Null;
            }
        }
    };
    null_unless(&mut patch, &["reason", "message"]);
    // Merged by type: a reason left out would stay.
    for condition in patch["conditions"].as_array_mut().into_iter().flatten() {
        null_unless(condition, &["reason", "message"]);
    }
    // Merged by address: another address would come beside the old one.
    let mut replaced = |field: &str, before: Vec<&str>, now: Vec<&str>| {
        if let Some(list) = patch[field].as_array_mut() {
            let old = before.into_iter().filter(|ip| !now.contains(ip));
            list.extend(old.map(|ip| json!({ "ip": ip, "$patch": "delete" })));
        }
    };
    fn pod_ips(status: &PodStatus) -> Vec<&str> {
        status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str()).collect()
    }
    fn host_ips(status: &PodStatus) -> Vec<&str> {
        status.host_ips.iter().flatten().map(|ip| ip.ip.as_str()).collect()
    }
    replaced("podIPs", pod_ips(known), pod_ips(status));
    replaced("hostIPs", host_ips(known), host_ips(status));
    patch
}

#[cfg(test)]
mod tests;
