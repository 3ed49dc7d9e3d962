//! Changes of a Pod that lives: a further container to look at it, a container started again from another image, other limits,
//! another deadline. Each may be asked for again and then changes nothing more.

use std::sync::Arc;

use joey_api::agent::{AgentContainer, Deadline};
use joey_api::instance::Resources;
use joey_api::lifecycle::Role;
use joey_model::{ErrorKind, Fault};

use crate::life::Life;
use crate::supervisor::{Agent, first_state};

fn refused(kind: ErrorKind, reason: &str, message: String) -> Fault {
    Fault::new(kind, reason, message)
}

/// Starts a container that is not there, or starts one again as it shall be from now on.
pub fn put(agent: &Arc<Agent>, name: &str, container: AgentContainer) -> Result<(), Fault> {
    let known = joey_model::id::check_label("container name", name).is_ok() && name != "agent";
    if !known || container.name != name || container.is_held() {
        let message = format!("container \"{name}\" has no program or no valid name");
        return Err(refused(ErrorKind::Invalid, "InvalidContainer", message));
    }
    if agent.stopping() {
        let message = format!("container \"{name}\" is not started: the Pod is ending");
        return Err(refused(ErrorKind::Conflict, "Stopping", message));
    }
    match agent.find(name) {
        Some(life) => become_anew(agent, &life, container),
        None => add(agent, container),
    }
}

fn add(agent: &Arc<Agent>, container: AgentContainer) -> Result<(), Fault> {
    let name = &container.name;
    if container.role != Role::Debug {
        let message = format!("container \"{name}\" cannot be added: only debug containers can");
        return Err(refused(ErrorKind::Invalid, "InvalidContainer", message));
    }
    if let Some(target) = container.target.as_deref().filter(|target| agent.find(target).is_none()) {
        let message = format!("container \"{name}\": there is no target container \"{target}\"");
        return Err(refused(ErrorKind::Invalid, "InvalidContainer", message));
    }
    let state = first_state(&container, "ContainerCreating");
    let life = agent.admit(container, state);
    // It ends with the Pod's stop, which reaches every life.
    tokio::spawn(agent.clone().live(life.at));
    Ok(())
}

fn become_anew(agent: &Agent, life: &Life, container: AgentContainer) -> Result<(), Fault> {
    let before = life.container();
    if !before.is_held() && before.image == container.image && before.image_id == container.image_id {
        return Ok(());
    }
    if before.role == Role::Debug || before.role != container.role {
        let message = format!("container \"{}\" is there already and stays what it is", before.name);
        return Err(refused(ErrorKind::Conflict, "AlreadyExists", message));
    }
    agent.change(|state| {
        let now = &mut state.containers[life.at];
        now.image.clone_from(&container.image);
        now.image_id.clone_from(&container.image_id);
        now.resources.clone_from(&container.resources);
    });
    let restarts = before.role != Role::Init && !life.has_settled();
    life.become_anew(container);
    if before.is_held() {
        life.run_again();
    } else if restarts {
        let message = format!("Container {} definition changed, will be restarted", before.name);
        agent.event(false, "Killing", message, &before);
        agent.restart(life);
    }
    Ok(())
}

/// Sets the limits of a container; its processes go on, unless it wants to be started again for that.
pub fn limit(agent: &Agent, life: &Life, resources: &Resources) -> Result<(), Fault> {
    let before = life.container();
    let cgroup = agent.cgroup_of(&before.name);
    let limits = agent.limits_with(&before.name, resources);
    let runs = life.running().is_some();
    let restarts = runs
        && matches!(before.role, Role::Main | Role::Sidecar)
        && before.restart_on_resize.holds(&before.resources, resources);
    if restarts || !runs {
        // The next run sets what there is to set.
        cgroup.lift(&limits);
    } else {
        cgroup.resize(&limits).map_err(|error| {
            let message = format!("limits of container \"{}\" cannot be set: {error}", before.name);
            refused(ErrorKind::Conflict, "ResizeFailed", message)
                .with_hint("a memory limit below what is in use waits until less is used")
        })?;
    }
    life.become_anew(AgentContainer { resources: *resources, ..AgentContainer::clone(&before) });
    agent.change(|state| state.containers[life.at].resources.clone_from(resources));
    if restarts {
        let message = format!("Container {} resize requires restart", before.name);
        agent.event(false, "Killing", message, &before);
        agent.restart(life);
        return Ok(());
    }
    agent.event(false, "ResizeCompleted", format!("Set the limits of container {}", before.name), &before);
    Ok(())
}

/// Sets when everything ends.
pub fn deadline(agent: &Agent, deadline: Deadline) {
    if *agent.deadline.borrow() != deadline.at {
        agent.deadline.send_replace(deadline.at);
        agent.change(|state| state.deadline = deadline.at);
    }
}
