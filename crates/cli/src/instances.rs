//! Commands about instances and hosts that are there: ps, describe, events, logs, rm, host ls.

use std::process::ExitCode;

use futures::StreamExt;
use jiff::Timestamp;
use joey_api::instance::{ContainerState, ContainerStatus, Instance, LogOptions, WatchEvent, WirePhase};
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
        let mut heads = vec!["NAME", "READY", "STATUS", "RESTARTS", "AGE", "IMAGE", "ADDRESS"];
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
        ready(instance),
        condition(instance),
        restarts.to_string(),
        age(instance.created_at),
        images.join(","),
        instance.status.address.map_or("-".to_owned(), |address| address.to_string()),
    ];
    if wide {
        let host = instance.status.host.clone().unwrap_or_else(|| "-".to_owned());
        row.extend([instance.id.clone(), instance.spec.class.clone(), host]);
    }
    row
}

/// What the instance is doing, or what is wrong, in the words that kubectl has for a Pod.
fn condition(instance: &Instance) -> String {
    let (status, containers) = (&instance.status, &instance.status.containers);
    if status.phase == WirePhase::Terminating {
        return "Terminating".to_owned();
    }
    let of = |role: Role| containers.iter().filter(move |container| container.role == role);
    let before: Vec<&ContainerStatus> =
        containers.iter().take_while(|c| matches!(c.role, Role::Init | Role::Sidecar)).collect();
    for (index, container) in before.iter().enumerate() {
        let word = match &container.state {
            ContainerState::Terminated(end) if end.exit_code == 0 => continue,
            ContainerState::Running { .. } if container.role == Role::Sidecar && container.started => continue,
            ContainerState::Terminated(end) => end.reason.clone(),
            ContainerState::Waiting { reason, .. } if reason != "PodInitializing" => reason.clone(),
            _ => format!("{index}/{}", before.len()),
        };
        let begun = of(Role::Main).any(|main| !matches!(main.state, ContainerState::Waiting { .. }));
        if !begun {
            return format!("Init:{word}");
        }
    }
    let waiting = of(Role::Main).find_map(|container| match &container.state {
        ContainerState::Waiting { reason, .. } => Some(reason.clone()),
        _ => None,
    });
    let ended = || {
        of(Role::Main).find_map(|container| match &container.state {
            ContainerState::Terminated(end) => Some(end.reason.clone()),
            _ => None,
        })
    };
    let runs = of(Role::Main).any(|container| matches!(container.state, ContainerState::Running { .. }));
    let over = matches!(status.phase, WirePhase::Succeeded | WirePhase::Failed);
    match waiting.or_else(|| status.reason.clone()) {
        Some(word) => word,
        None if runs && ended().is_some() => "NotReady".to_owned(),
        None if over => ended().unwrap_or_else(|| format!("{:?}", status.phase)),
        None => format!("{:?}", status.phase),
    }
}

/// Containers that are ready, of all that serve: the main ones and the sidecars.
fn ready(instance: &Instance) -> String {
    let serves = |container: &&ContainerStatus| matches!(container.role, Role::Main | Role::Sidecar);
    let all = instance.status.containers.iter().filter(serves);
    let (ready, total) = all.fold((0, 0), |(ready, total), one| (ready + u32::from(one.ready), total + 1));
    format!("{ready}/{total}")
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
    let (namespace, pod) = (label(joey_podspec::LABEL_NAMESPACE), label(joey_podspec::LABEL_POD));
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
        limit_bytes: logs.limit_bytes,
    };
    if logs.all_containers {
        return all_logs(service, &logs.name, &options).await;
    }
    let instance = service.get(&logs.name).await?;
    let container = one_container(&instance, logs.container)?;
    let known = instance.status.containers.iter().find(|known| known.name == container);
    let reason = match known.map(|known| (&known.state, &known.last_termination)) {
        // Nobody has begun with it yet.
        None => Some(("ContainerCreating", "")),
        Some((ContainerState::Waiting { reason, message }, None)) => Some((reason.as_str(), message.as_str())),
        Some(_) => None,
    };
    match reason {
        // Soon there will be something to follow.
        Some(("ContainerCreating", _)) if logs.follow => {
            crate::run::until_started(service, &instance).await?;
        }
        // What the hook says is in the log already.
        Some((reason, _)) if reason == joey_api::hooks::RUNS => {}
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
        output::write(&part.map_err(|error| Failure::broke_off(&error))?)?;
    }
    Ok(DONE)
}

/// The logs of all containers one after another, or as they are written where they are followed; each line begins with its
/// container.
async fn all_logs(service: &PoolClient, name: &str, options: &LogOptions) -> Result<ExitCode, Failure> {
    let mut streams = Vec::new();
    for container in service.get(name).await?.spec.containers {
        // One that did not start yet has no log.
        if let Ok(bytes) = service.logs(name, &container.name, options).await {
            streams.push(prefixed(container.name, bytes));
        }
    }
    let mut lines = match options.follow {
        true => futures::stream::select_all(streams).boxed(),
        false => futures::stream::iter(streams).flatten().boxed(),
    };
    while let Some(line) = lines.next().await {
        output::write(&line?)?;
    }
    Ok(DONE)
}

/// Whole lines of a log, each with the container's name before it.
fn prefixed(
    container: String,
    bytes: joey_pool::ByteStream,
) -> futures::stream::BoxStream<'static, std::io::Result<Vec<u8>>> {
    let state = (bytes, Vec::<u8>::new(), false);
    futures::stream::unfold(state, move |(mut bytes, mut open, mut ended)| {
        let prefix = format!("[{container}] ").into_bytes();
        async move {
            loop {
                if let Some(end) = open.iter().position(|byte| *byte == b'\n') {
                    let rest = open.split_off(end + 1);
                    let line = [prefix, open].concat();
                    return Some((Ok(line), (bytes, rest, ended)));
                }
                if ended {
                    let last = (!open.is_empty()).then(|| [prefix, open, b"\n".to_vec()].concat())?;
                    return Some((Ok(last), (bytes, Vec::new(), true)));
                }
                match bytes.next().await {
                    Some(Ok(part)) => open.extend_from_slice(&part),
                    Some(Err(error)) => return Some((Err(error), (bytes, Vec::new(), true))),
                    None => ended = true,
                }
            }
        }
    })
    .boxed()
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
        let mut heads = vec!["NAME", "READY", "CPU", "MEMORY", "INSTANCES", "CLASSES", "MACHINES"];
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
                host.machines.clone().unwrap_or_default(),
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
