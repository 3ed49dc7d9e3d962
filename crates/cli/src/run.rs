//! `joey run`: an instance from an image and a few flags, followed until it runs (or, with --rm, until it ends).

use std::process::ExitCode;

use futures::StreamExt;
use joey_api::diagnosis::check_core_pattern;
use joey_api::instance::{
    ContainerSpec, ContainerState, EnvVar, Instance, InstanceSpec, Limits, LogOptions, NetworkSpec, PullPolicy,
    Resources, Termination, WatchEvent, WirePhase, WireRestartPolicy,
};
use joey_model::{ErrorKind, Fault, ImageRef, quantity};
use joey_pool::PoolClient;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{Attach, Pull, Restart, Run};
use crate::exec;
use crate::failure::Failure;
use crate::output::{self, Format};

/// How long what a container still said may take to arrive once it is known to have ended.
const LOG_TAIL: std::time::Duration = std::time::Duration::from_secs(1);

/// Less than this no program is content with.
const MIN_DISK: u64 = 1 << 20;
/// The word for a container whose program could not be started.
const NOT_STARTED: &str = "StartError";
/// Exit codes of what a signal ended, as shells have them.
const INTERRUPTED: u8 = 128 + 2;
const TERMINATED: u8 = 128 + 15;

/// A run whose values are all good.
pub struct Wanted {
    spec: InstanceSpec,
    /// Show the log, wait for the end, remove.
    to_the_end: bool,
    /// Join it, with this input and this terminal.
    joins: bool,
    detach: bool,
    format: Format,
}

impl Run {
    /// Checks every value and tells all that are wrong together.
    pub fn validate(self) -> Result<Wanted, Failure> {
        let mut faults: Vec<String> = Vec::new();
        exec::check_terminal(self.stdin, self.tty)?;
        let image = ImageRef::parse(&self.image).map_err(|error| faults.push(error.to_string())).ok();
        let mut amount =
            |flag: &str, text: &Option<String>, read: fn(&str) -> Result<u64, quantity::InvalidQuantity>| {
                let text = text.as_ref()?;
                read(text).map_err(|error| faults.push(format!("--{flag}: {error}"))).ok()
            };
        let cpu = amount("cpu", &self.cpu, quantity::parse_milli);
        let memory = amount("memory", &self.memory, quantity::parse_units);
        let disk = amount("disk", &self.disk, quantity::parse_units);
        let bandwidth = amount("bandwidth", &self.bandwidth, quantity::parse_units);
        let packets = amount("packets", &self.packets, quantity::parse_units);
        let limits = Limits {
            pids: self.pids,
            disk_bytes_per_second: amount("disk-bytes", &self.disk_bytes, quantity::parse_units),
            disk_operations_per_second: amount("disk-operations", &self.disk_operations, quantity::parse_units),
            ..Limits::default()
        };
        let env: Vec<EnvVar> = self.env.iter().filter_map(|text| variable(text, &mut faults)).collect();
        if let Some(why) = self.core_pattern.as_deref().and_then(|pattern| check_core_pattern(pattern).err()) {
            faults.push(format!("--core-pattern: {why}"));
        }
        if disk.is_some_and(|bytes| bytes < MIN_DISK) {
            faults.push("--disk: at least 1Mi".to_owned());
        }
        if self.public {
            faults.push("--public is not there yet: instances have addresses of this host only".to_owned());
        }
        let name = match (self.name, &image) {
            (Some(name), _) => name,
            (None, Some(image)) => default_name(image),
            (None, None) => "unnamed".to_owned(),
        };
        let container_name = joey_model::id::check_label("container name", &name).map_or("main", |()| name.as_str());
        let container = ContainerSpec {
            pull_policy: pull_policy(self.pull),
            command: self.command.into_iter().collect(),
            args: self.args,
            env,
            working_dir: self.workdir,
            stdin: self.stdin,
            stdin_once: self.stdin,
            tty: self.tty,
            resources: Resources {
                cpu_milli: cpu,
                memory_bytes: memory,
                ephemeral_storage_bytes: disk,
                ..Resources::default()
            },
            ..ContainerSpec::new(container_name, &self.image)
        };
        let restart_policy = match self.restart {
            _ if self.rm => WireRestartPolicy::Never,
            Restart::Always => WireRestartPolicy::Always,
            Restart::OnFailure => WireRestartPolicy::OnFailure,
            Restart::Never => WireRestartPolicy::Never,
        };
        let spec = InstanceSpec {
            core_pattern: self.core_pattern,
            client_token: Some(format!("run-{:032x}", rand::random::<u128>())),
            class: self.class,
            restart_policy,
            limits,
            use_specs: self.spec,
            network: NetworkSpec {
                ingress_bits_per_second: bandwidth,
                egress_bits_per_second: bandwidth,
                ingress_packets_per_second: packets,
                egress_packets_per_second: packets,
                ..NetworkSpec::default()
            },
            ..InstanceSpec::new(&name, vec![container])
        };
        if faults.is_empty() {
            faults.extend(joey_api::validate::instance(&spec).err().map(|fault| fault.message));
        }
        match faults.is_empty() {
            true => Ok(Wanted {
                spec,
                to_the_end: self.rm,
                joins: self.stdin || self.tty,
                detach: self.detach,
                format: self.output.format(),
            }),
            false => Err(Failure::usage(faults.join("\nerror: "))),
        }
    }
}

fn variable(text: &str, faults: &mut Vec<String>) -> Option<EnvVar> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => {
            Some(EnvVar { name: name.to_owned(), value: Some(value.to_owned()), address: false })
        }
        _ => {
            faults.push(format!("--env: \"{text}\" is not NAME=VALUE"));
            None
        }
    }
}

fn pull_policy(pull: Pull) -> PullPolicy {
    match pull {
        Pull::Always => PullPolicy::Always,
        Pull::Missing => PullPolicy::IfNotPresent,
        Pull::Never => PullPolicy::Never,
    }
}

/// The last part of the repository and five random digits: `nginx-3fa9c`.
fn default_name(image: &ImageRef) -> String {
    let last = image.repository().rsplit('/').next().unwrap_or("instance");
    let plain: String = last.chars().map(|c| if matches!(c, '.' | '_') { '-' } else { c }).take(50).collect();
    format!("{}-{:05x}", plain.trim_end_matches('-'), rand::random::<u32>() & 0xf_ffff)
}

/// Creates the instance and follows it.
pub async fn run(service: &PoolClient, wanted: Wanted) -> Result<ExitCode, Failure> {
    if wanted.to_the_end {
        return to_the_end(service, &wanted.spec).await;
    }
    let created = service.create(&wanted.spec).await?;
    if wanted.detach {
        return tell(&created, wanted.format);
    }
    if wanted.joins {
        return join(service, &created).await;
    }
    let running = until_started(service, &created).await?;
    match running.status.phase {
        WirePhase::Failed => Err(why(&running)),
        _ => tell(&running, wanted.format),
    }
}

/// Shows the log until the end and removes the instance, also when it does not start or somebody interrupts.
async fn to_the_end(service: &PoolClient, spec: &InstanceSpec) -> Result<ExitCode, Failure> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let created = service.create(spec).await?;
    let outcome = tokio::select! {
        outcome = join(service, &created) => outcome,
        _ = interrupt.recv() => Ok(ExitCode::from(INTERRUPTED)),
        _ = terminate.recv() => Ok(ExitCode::from(TERMINATED)),
    };
    // Hints would lead to what is being removed.
    let outcome = outcome.map_err(Failure::without_hint);
    match service.delete(&created.id, Some(0)).await.map_err(Fault::from) {
        Err(fault) if fault.kind != ErrorKind::NotFound => outcome.and(Err(fault.into())),
        _ => outcome,
    }
}

/// Shows what an instance's container says until it has ended, with this input and terminal where it was made with them; its exit
/// code.
async fn join(service: &PoolClient, created: &Instance) -> Result<ExitCode, Failure> {
    let container = &created.spec.containers[0];
    let running = until_started(service, created).await?;
    if !ended(&running) && container.tty {
        eprintln!("instance {} runs; if there is no prompt, press enter", created.spec.name);
        let (name, container, stdin) = (created.id.clone(), Some(container.name.clone()), container.stdin);
        let joined = exec::attach(service, Attach { name, container, stdin, tty: true }).await;
        match service.get(&created.id).await {
            // It was quicker: what it said is in its log.
            Ok(now) if joined.is_err() && ended(&now) => {}
            _ => return joined,
        }
    }
    if !ended(&running) && container.stdin {
        exec::feed(service, &created.id, &container.name).await?;
    }
    // What it said before anybody could join it is in its log.
    follow(service, created).await
}

/// Shows the log of an instance's container until it has ended; its exit code.
async fn follow(service: &PoolClient, created: &Instance) -> Result<ExitCode, Failure> {
    let container = &created.spec.containers[0].name;
    let options = LogOptions { follow: true, ..LogOptions::default() };
    let mut log = service.logs(&created.id, container, &options).await?;
    let mut print = std::pin::pin!(async {
        while let Some(part) = log.next().await {
            output::write(&part.map_err(|error| Failure::broke_off(&error))?)?;
        }
        Ok::<(), Failure>(())
    });
    // The log's end is not waited for without bound: a descendant of the container's process may hold it open.
    let ended = tokio::select! {
        printed = &mut print => {
            printed?;
            wait(service, created, ended).await?
        }
        ended = wait(service, created, ended) => {
            tokio::time::timeout(LOG_TAIL, print).await.unwrap_or(Ok(()))?;
            ended?
        }
    };
    if ended.status.reason.is_some() {
        return Err(why(&ended));
    }
    match ended.status.containers.first().map(|container| &container.state) {
        Some(ContainerState::Terminated(end)) if end.reason == NOT_STARTED => Err(not_started(created, end)),
        Some(ContainerState::Terminated(end)) => Ok(ExitCode::from(u8::try_from(end.exit_code).unwrap_or(1))),
        _ => Err(why(&ended)),
    }
}

/// Waits until an instance has begun to run, or failed in a way that only a person can mend.
pub async fn until_started(service: &PoolClient, created: &Instance) -> Result<Instance, Failure> {
    wait(service, created, started).await
}

/// Follows an instance until `enough` of its state, or a failure that only a person can mend. What it waits for is said.
async fn wait(service: &PoolClient, created: &Instance, enough: fn(&Instance) -> bool) -> Result<Instance, Failure> {
    let mut said = None;
    loop {
        let mut changes = service.watch().await?;
        while let Some(change) = changes.next().await {
            match change? {
                WatchEvent::Set { instance } if instance.id == created.id => {
                    if let Some(failure) = hopeless(&instance) {
                        return Err(failure);
                    }
                    if enough(&instance) {
                        return Ok(*instance);
                    }
                    let waits = waits_for(&instance);
                    if waits.is_some() && waits != said {
                        eprintln!("waiting: {}", output::printable(waits.as_deref().unwrap_or_default()));
                        said = waits;
                    }
                }
                WatchEvent::Gone { id, name, .. } if id == created.id => {
                    return Err(Failure::new(format!("instance \"{name}\" was removed while it started")));
                }
                _ => {}
            }
        }
    }
}

/// What keeps a container from starting, beside the usual work.
fn waits_for(instance: &Instance) -> Option<String> {
    instance.status.containers.iter().find_map(|container| match &container.state {
        ContainerState::Waiting { reason, message }
            if reason != "ContainerCreating" && container.last_termination.is_none() =>
        {
            Some(format!("{reason}: {message}"))
        }
        _ => None,
    })
}

fn started(instance: &Instance) -> bool {
    matches!(instance.status.phase, WirePhase::Running | WirePhase::Succeeded | WirePhase::Failed)
}

fn ended(instance: &Instance) -> bool {
    matches!(instance.status.phase, WirePhase::Succeeded | WirePhase::Failed)
}

/// Why a container waits for what only a person can mend: the image cannot be had, or the container cannot be made.
pub fn waits_in_vain(state: &ContainerState) -> Option<String> {
    const REASONS: [&str; 6] = [
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "CreateContainerError",
        "CreateContainerConfigError",
    ];
    match state {
        ContainerState::Waiting { reason, message } if REASONS.contains(&reason.as_str()) => {
            Some(format!("{reason}: {message}"))
        }
        _ => None,
    }
}

/// A wait that does not end by itself soon.
fn hopeless(instance: &Instance) -> Option<Failure> {
    instance.status.containers.iter().find_map(|container| match (&container.state, &container.last_termination) {
        (ContainerState::Waiting { .. }, Some(end)) if end.reason == NOT_STARTED => Some(not_started(instance, end)),
        (state, _) => waits_in_vain(state).map(|why| stuck(instance, &why)),
    })
}

fn not_started(instance: &Instance, end: &Termination) -> Failure {
    match instance.spec.restart_policy {
        WireRestartPolicy::Never => does_not_start(instance, &end.message),
        _ => stuck(instance, &end.message),
    }
}

fn does_not_start(instance: &Instance, why: &str) -> Failure {
    Failure::new(format!("instance \"{}\" does not start: {why}", instance.spec.name))
}

/// It does not start, and is there.
fn stuck(instance: &Instance, why: &str) -> Failure {
    does_not_start(instance, why)
        .with_hint(format!("it is tried again until it is removed: joey rm {}", instance.spec.name))
}

fn why(instance: &Instance) -> Failure {
    let status = &instance.status;
    let ended = status.containers.iter().find_map(|container| match &container.state {
        ContainerState::Terminated(end) if end.exit_code != 0 => Some(end),
        _ => None,
    });
    let why = match (&status.message, ended) {
        (Some(message), _) => format!("{}: {message}", status.reason.as_deref().unwrap_or("Failed")),
        (None, Some(end)) if end.reason == NOT_STARTED => return not_started(instance, end),
        (None, Some(end)) => format!("its container ended with exit code {} ({})", end.exit_code, end.reason),
        (None, None) => "it failed".to_owned(),
    };
    Failure::new(format!("instance \"{}\": {why}", instance.spec.name))
        .with_hint(format!("see joey describe {0} and joey logs {0}", instance.spec.name))
}

fn tell(instance: &Instance, format: Format) -> Result<ExitCode, Failure> {
    let address = instance.status.address.map(|address| address.to_string()).unwrap_or_default();
    match format {
        Format::Table | Format::Wide => {
            output::write(format!("{} {address}", instance.spec.name).trim_end().as_bytes())?;
            output::write(b"\n")?;
            Ok(ExitCode::SUCCESS)
        }
        other => output::print(other, instance, |_| Vec::new()),
    }
}
