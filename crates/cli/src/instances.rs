//! Commands about instances and hosts that are there: ps, describe, events, logs, restart, rm, host ls.

use std::process::ExitCode;

use futures::StreamExt;
use jiff::Timestamp;
use joey_api::instance::{ContainerState, Instance, LogOptions, WatchEvent, WirePhase};
use joey_api::lifecycle::Role;
use joey_model::quantity::human_bytes;
use joey_pool::PoolClient;

use crate::args::{Logs, Rm};
use crate::failure::Failure;
use crate::output::{self, Format, age};

const DONE: ExitCode = ExitCode::SUCCESS;

pub async fn ps(service: &PoolClient, format: Format) -> Result<ExitCode, Failure> {
    let mut instances = service.list().await?;
    // The newest first.
    instances
        .sort_by(|one, other| other.created_at.cmp(&one.created_at).then_with(|| one.spec.name.cmp(&other.spec.name)));
    output::print(format, &instances, |wide| {
        let mut heads = vec!["NAME", "IMAGE", "STATUS", "RESTARTS", "AGE", "ADDRESS"];
        heads.extend(wide.then_some(["ID", "CLASS", "HOST"]).into_iter().flatten());
        let mut rows = vec![heads.into_iter().map(str::to_owned).collect::<Vec<_>>()];
        rows.extend(instances.iter().map(|instance| row(instance, wide)));
        rows
    })
}

fn row(instance: &Instance, wide: bool) -> Vec<String> {
    let images: Vec<&str> = instance.spec.containers.iter().map(|container| container.image.as_str()).collect();
    let restarts: u32 = instance.status.containers.iter().map(|container| container.restart_count).sum();
    let mut row = vec![
        instance.spec.name.clone(),
        images.join(","),
        condition(instance),
        restarts.to_string(),
        age(instance.created_at),
        instance.status.address.map_or("-".to_owned(), |address| address.to_string()),
    ];
    if wide {
        let host = instance.status.host.clone().unwrap_or_else(|| "-".to_owned());
        row.extend([instance.id.clone(), instance.spec.class.clone(), host]);
    }
    row
}

/// The phase, or why it waits.
fn condition(instance: &Instance) -> String {
    let waiting = instance.status.containers.iter().find_map(|container| match &container.state {
        ContainerState::Waiting { reason, .. } if reason != "ContainerCreating" => Some(reason.clone()),
        _ => None,
    });
    match instance.status.phase {
        WirePhase::Terminating => "Terminating".to_owned(),
        phase => waiting.or_else(|| instance.status.reason.clone()).unwrap_or_else(|| format!("{phase:?}")),
    }
}

/// Everything about one instance: YAML, unless JSON is asked for.
pub async fn describe(service: &PoolClient, name: &str, format: Option<Format>) -> Result<ExitCode, Failure> {
    let instance = service.get(name).await?;
    let format = match format {
        Some(Format::Json) => Format::Json,
        _ => Format::Yaml,
    };
    output::print(format, &instance, |_| Vec::new())
}

pub async fn events(service: &PoolClient, name: &str, format: Format) -> Result<ExitCode, Failure> {
    let events = service.get(name).await?.status.events;
    output::print(format, &events, |_| {
        let mut rows = vec![["AGE", "TYPE", "REASON", "CONTAINER", "MESSAGE"].map(str::to_owned).to_vec()];
        rows.extend(events.iter().map(|event| {
            let kind = if event.warning { "Warning" } else { "Normal" };
            let container = event.container.clone().unwrap_or_else(|| "-".to_owned());
            vec![age(event.at), kind.to_owned(), event.reason.clone(), container, event.message.clone()]
        }));
        rows
    })
}

pub async fn restart(service: &PoolClient, name: &str) -> Result<ExitCode, Failure> {
    service.restart(name).await?;
    Ok(DONE)
}

/// Ends the instances and waits until each is gone, also when another cannot be ended.
pub async fn rm(service: &PoolClient, rm: &Rm) -> Result<ExitCode, Failure> {
    let grace = if rm.force { Some(0) } else { rm.grace };
    let (mut left, mut failures) = (Vec::new(), Vec::new());
    for name in &rm.names {
        match end(service, name, grace, rm.force).await {
            Ok(id) => left.push((id, name.as_str())),
            Err(failure) => failures.push(failure),
        }
    }
    while !left.is_empty() {
        gone(service, &mut left).await?;
    }
    Failure::all(failures).map_or(Ok(DONE), Err)
}

/// Begins the end of an instance; its id.
async fn end(service: &PoolClient, name: &str, grace: Option<u32>, force: bool) -> Result<String, Failure> {
    let instance = service.get(name).await?;
    let label = |label: &str| instance.spec.labels.get(label).map_or("", String::as_str);
    let (namespace, pod) = (label(joey_vnode::convert::LABEL_NAMESPACE), label(joey_vnode::convert::LABEL_POD));
    if !force && !pod.is_empty() {
        return Err(Failure::new(format!("instance \"{name}\" belongs to Pod {namespace}/{pod}"))
            .with_hint(format!("kubectl delete pod -n {namespace} {pod}; or end it under its Pod with --force")));
    }
    service.delete(&instance.id, grace).await?;
    Ok(instance.id)
}

/// Follows until all of `left` are gone, or the watch ends; names each that went.
async fn gone(service: &PoolClient, left: &mut Vec<(String, &str)>) -> Result<(), Failure> {
    let mut present = std::collections::HashSet::new();
    let mut synced = false;
    let mut changes = service.watch().await?;
    while let Some(change) = changes.next().await {
        match change? {
            WatchEvent::Set { instance } if !synced => {
                present.insert(instance.id);
            }
            WatchEvent::Set { .. } => {}
            WatchEvent::Synced { .. } => synced = true,
            WatchEvent::Gone { id, .. } => {
                present.remove(&id);
            }
        }
        if synced {
            let (there, went): (Vec<_>, Vec<_>) = left.drain(..).partition(|(id, _)| present.contains(id));
            *left = there;
            for (_, name) in went {
                output::write(format!("{name}\n").as_bytes())?;
            }
        }
        if left.is_empty() {
            break;
        }
    }
    Ok(())
}

pub async fn logs(service: &PoolClient, logs: Logs) -> Result<ExitCode, Failure> {
    let options = LogOptions {
        follow: logs.follow,
        previous: logs.previous,
        tail: logs.tail,
        since: logs.since.as_deref().map(since).transpose()?,
        timestamps: logs.timestamps,
        limit_bytes: None,
    };
    let instance = service.get(&logs.name).await?;
    let container = one_container(&instance, logs.container)?;
    let waits = instance.status.containers.iter().find(|known| known.name == container);
    let reason = waits.and_then(|known| match &known.state {
        ContainerState::Waiting { reason, message } if known.last_termination.is_none() => Some((reason, message)),
        _ => None,
    });
    match reason {
        // Soon there will be something to follow.
        Some((reason, _)) if reason == "ContainerCreating" && logs.follow => {
            crate::run::until_started(service, &instance).await?;
        }
        Some((reason, message)) => {
            let name = &logs.name;
            let why = format!("{reason}: {message}");
            let message = format!(
                "container \"{container}\" of instance \"{name}\" has not run yet: {}",
                why.trim_end_matches(": ")
            );
            return Err(Failure::new(message).with_hint(format!("see joey events {name}")));
        }
        None => {}
    }
    let mut bytes = service.logs(&instance.id, &container, &options).await?;
    while let Some(part) = bytes.next().await {
        output::write(&part?)?;
    }
    Ok(DONE)
}

/// The container that is meant: the one named, else the first main one.
pub fn one_container(instance: &Instance, given: Option<String>) -> Result<String, Failure> {
    let (name, all) = (&instance.spec.name, &instance.spec.containers);
    let found = match &given {
        Some(given) => all.iter().find(|container| container.name == *given),
        None => all.iter().find(|container| container.role == Role::Main),
    };
    found.map(|container| container.name.clone()).ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(|container| container.name.as_str()).collect();
        let given = given.unwrap_or_default();
        Failure::new(format!("instance \"{name}\" has no container \"{given}\""))
            .with_hint(format!("its containers are: {}", names.join(", ")))
    })
}

fn since(text: &str) -> Result<Timestamp, Failure> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    let age: jiff::SignedDuration = text
        .parse()
        .map_err(|_| Failure::usage(format!("--since: \"{text}\" is neither an age such as 10m nor a time")))?;
    Timestamp::now().checked_sub(age).map_err(|_| Failure::usage(format!("--since: \"{text}\" is too long ago")))
}

pub async fn hosts(service: &PoolClient, format: Format) -> Result<ExitCode, Failure> {
    let hosts = service.hosts().await?;
    output::print(format, &hosts, |wide| {
        let mut heads = vec!["NAME", "READY", "CPU", "MEMORY", "INSTANCES", "CLASSES"];
        heads.extend(wide.then_some(["ADDRESSES", "FREE", "KERNEL", "ARCHITECTURE"]).into_iter().flatten());
        let mut rows = vec![heads.into_iter().map(str::to_owned).collect::<Vec<_>>()];
        for host in &hosts {
            let mut row = vec![
                host.name.clone(),
                host.ready.to_string(),
                format!("{}", host.cpu_milli as f64 / 1000.0),
                human_bytes(host.memory_bytes),
                host.instances.to_string(),
                host.classes.join(","),
            ];
            if wide {
                row.extend([host.address_range.clone(), host.addresses_free.to_string()]);
                row.extend([host.kernel.clone(), host.architecture.clone()]);
            }
            rows.push(row);
        }
        rows
    })
}
