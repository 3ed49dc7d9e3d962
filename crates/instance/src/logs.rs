//! Which logs of an instance are collected: the plan that its agent and the carrier follow, made with each sandbox.

use std::net::IpAddr;
use std::path::Path;

use joey_api::agent::AgentContainer;
use joey_api::instance::InstanceSpec;
use joey_hidecar::Plan;
use joey_model::Fault;

use crate::life::Life;
use crate::{merge, pull, start};

/// Plans, writes the plan and tells these containers their part; nothing where nothing is asked for. What cannot be collected is told by
/// an event: a container runs without it.
pub(crate) async fn plan(
    life: &mut Life,
    address: Option<IpAddr>,
    containers: &mut [AgentContainer],
) -> Result<(), Fault> {
    let spec = &life.record.spec;
    if !asks(spec) {
        return Ok(());
    }
    let variables = pull::started(spec).map(|container| (container.name.clone(), merge::spec_env(container, address)));
    let all: Vec<_> = variables.collect();
    let carrier = life.shared.carrier.clone();
    let (plan, faults) = Plan::new(life.id.as_str(), &spec.logs, &all, |name| carrier.sink(name));
    // Of one that is held not all is known.
    let whole = |name: &str| containers.iter().any(|container| container.name == name && !container.is_held());
    for (container, fault) in faults.into_iter().filter(|(name, _)| whole(name)) {
        life.event(true, "LogsNotCollected", fault, Some(&container));
    }
    for container in containers {
        container.collected = plan.collected(&container.name);
    }
    let dir = life.dir.join(joey_collect::DIRECTORY);
    start::blocking("write its plan of logs", move || write(&plan, &dir)).await
}

fn asks(spec: &InstanceSpec) -> bool {
    let mut variables = spec.containers.iter().flat_map(|container| &container.env);
    !spec.logs.sources.is_empty() || variables.any(|variable| variable.name.starts_with(joey_api::logs::PREFIX))
}

fn write(plan: &Plan, dir: &Path) -> std::io::Result<()> {
    match plan.streams.is_empty() {
        true => Ok(()),
        false => plan.write(dir),
    }
}
