//! Makes an instance: a list of steps, each with its undo. A step that fails undoes itself and all before it.
//!
//! ```text
//! Images ──► Network ──► Config ──► Sandbox
//!  (kept)    release   remove files  destroy      undo, in the other order
//! ```

use std::io::{self, ErrorKind as ErrorKindOfIo};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use joey_api::agent::{AgentConfig, AgentVolume, VERSION};
use joey_api::instance::{ContainerSpec, InstanceSpec, PullPolicy, VolumeSource};
use joey_api::lifecycle::Role;
use joey_image::Image;
use joey_model::{ErrorKind, Fault, ImageRef, checkpoint};
use joey_network::{Attachment, Bandwidth};
use joey_sandbox::{CreateRequest, Sandbox};

use crate::life::Life;
use crate::merge::{self, Surroundings};
use crate::{files, logs, persist};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Network,
    Config,
    Sandbox,
}

const STEPS: [Step; 3] = [Step::Network, Step::Config, Step::Sandbox];

/// What the steps have made so far.
struct Made {
    images: Vec<Arc<Image>>,
    attachment: Option<Attachment>,
    config: Option<AgentConfig>,
    sandbox: Option<Arc<dyn Sandbox>>,
}

/// Makes the sandbox of an instance whose images are here; on an error everything is undone.
pub(crate) async fn make(life: &mut Life, images: Vec<Arc<Image>>) -> Result<Arc<dyn Sandbox>, Fault> {
    let starts = life.shared.starts.clone();
    // Closed never: the semaphore lives as long as the engine.
    let _turn = starts.acquire().await;
    let mut made = Made { images, attachment: None, config: None, sandbox: None };
    for (done, step) in STEPS.into_iter().enumerate() {
        if let Err(fault) = perform(life, &mut made, step).await {
            tracing::warn!(instance = %life.id, ?step, %fault, "step of creation failed");
            for step in STEPS[..=done].iter().rev() {
                undo(life, *step).await?;
            }
            return Err(fault);
        }
    }
    made.sandbox.ok_or_else(|| Fault::new(ErrorKind::Internal, "SandboxFailed", "no sandbox was made"))
}

/// Undoes every step, done or not, from nothing but the instance's id.
pub(crate) async fn unmake(life: &mut Life) -> Result<(), Fault> {
    for step in STEPS.into_iter().rev() {
        undo(life, step).await?;
    }
    Ok(())
}

async fn perform(life: &mut Life, made: &mut Made, step: Step) -> Result<(), Fault> {
    match step {
        Step::Network => {
            let caps = &life.record.spec.network;
            let bandwidth = Bandwidth {
                ingress: caps.ingress_bits_per_second,
                egress: caps.egress_bits_per_second,
                ingress_packets: caps.ingress_packets_per_second,
                egress_packets: caps.egress_packets_per_second,
            };
            let attachment = life.shared.network.attach(&life.id, bandwidth).await?;
            life.status.address = Some(attachment.address);
            made.attachment = Some(attachment);
            life.mark("network");
            checkpoint::reached("instance-network");
        }
        Step::Config => {
            let mut config = config(life, made).await?;
            logs::plan(life, &mut config).await?;
            let bytes = serde_json::to_vec(&config).map_err(|error| host_fault("write its configuration", &error))?;
            let dir = life.dir.clone();
            blocking("write its configuration", move || configure(&dir, &bytes)).await?;
            made.config = Some(config);
            checkpoint::reached("instance-configured");
        }
        Step::Sandbox => {
            let class = life.shared.class(&life.record.spec.class)?;
            let netns = made.attachment.as_ref().map(|attachment| attachment.netns.clone());
            let Some(config) = made.config.clone() else {
                return Err(Fault::new(ErrorKind::Internal, "SandboxFailed", "instance has no configuration"));
            };
            let request = CreateRequest { instance: life.id.clone(), dir: life.dir.clone(), netns, config };
            made.sandbox = Some(class.create(request).await?);
            life.shared.carry_logs(&life.id);
            life.mark("sandbox");
            checkpoint::reached("instance-sandbox");
        }
    }
    Ok(())
}

/// Writes what a sandbox is made from. What the agent of one before it told last is not to be taken for its own.
fn configure(dir: &Path, config: &[u8]) -> io::Result<()> {
    match std::fs::remove_file(dir.join("state.json")) {
        Err(error) if error.kind() != ErrorKindOfIo::NotFound => return Err(error),
        _ => {}
    }
    persist::write_private(&dir.join("agent.json"), config).map(drop)
}

async fn undo(life: &mut Life, step: Step) -> Result<(), Fault> {
    match step {
        Step::Sandbox => {
            let class = life.shared.class(&life.record.spec.class)?;
            class.destroy(&life.id, &life.dir).await?;
            checkpoint::reached("instance-sandbox-destroyed");
        }
        Step::Network => {
            life.shared.network.release(&life.id).await?;
            life.status.address = None;
            checkpoint::reached("instance-network-released");
        }
        Step::Config => {
            let dir = life.dir.clone();
            let id = life.id.clone();
            blocking("remove its files", move || {
                // Where the agent ended by itself, there is nothing that it did not see.
                if let Err(error) = joey_collect::last_look(&dir) {
                    tracing::warn!(instance = %id, %error, "what its containers wrote last into files is not collected");
                }
                for name in ["volumes", "upper", "agent.json"] {
                    let path = dir.join(name);
                    let removed = match path.is_dir() {
                        true => std::fs::remove_dir_all(&path),
                        false => std::fs::remove_file(&path),
                    };
                    match removed {
                        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                }
                Ok(())
            })
            .await?;
        }
    }
    Ok(())
}

/// Names of every image of an instance: those of containers, then those of volumes.
pub(crate) fn images_of(spec: &InstanceSpec) -> Vec<String> {
    let of_volumes = spec.volumes.iter().filter_map(|volume| match &volume.source {
        VolumeSource::Image { reference, .. } => Some(reference.clone()),
        VolumeSource::Files(_) | VolumeSource::EmptyDir { .. } => None,
    });
    spec.containers.iter().map(|container| container.image.clone()).chain(of_volumes).collect()
}

/// Every image of the instance, in the order of [`images_of`], pulled where its policy says so. Dropping the future gives the
/// pull up.
pub(crate) async fn images(life: &mut Life) -> Result<Vec<Arc<Image>>, Fault> {
    let mut images = Vec::new();
    for container in started(&life.record.spec).cloned().collect::<Vec<_>>() {
        let image = image(life, &container.image, container.pull_policy, Some(&container.name)).await?;
        let known = format!("{}/{}@{}", image.reference.registry(), image.reference.repository(), image.manifest);
        if let Some(status) = life.status.containers.iter_mut().find(|status| status.name == container.name) {
            status.image_id = known;
        }
        images.push(image);
    }
    for volume in life.record.spec.volumes.clone() {
        if let VolumeSource::Image { reference, pull_policy } = &volume.source {
            images.push(image(life, reference, *pull_policy, None).await?);
        }
    }
    life.use_images(images.iter().map(|image| image.id.clone()).collect());
    life.mark("images");
    Ok(images)
}

/// An image of the container of that name, or of a volume.
async fn image(life: &mut Life, given: &str, policy: PullPolicy, container: Option<&str>) -> Result<Arc<Image>, Fault> {
    let reference = ImageRef::parse(given)
        .map_err(|error| Fault::new(ErrorKind::Invalid, "InvalidImageName", error.to_string()))?;
    if policy != PullPolicy::Always
        && let Some(image) = life.shared.images.find(&reference).await
    {
        life.event(false, "Pulled", format!("Container image \"{given}\" already present on machine"), container);
        return Ok(image);
    }
    if policy == PullPolicy::Never {
        let message = format!("Container image \"{given}\" is not present with pull policy of Never");
        return Err(Fault::new(ErrorKind::NotFound, "ErrImageNeverPull", message)
            .with_hint("import or pull the image first, or choose the policy IfNotPresent"));
    }
    life.event(false, "Pulling", format!("Pulling image \"{given}\""), container);
    life.publish();
    let began = Instant::now();
    let credentials = life.record.spec.credentials.clone();
    match life.shared.images.pull(&reference, &credentials, |_| {}).await {
        Ok(image) => {
            let message = format!(
                "Successfully pulled image \"{given}\" in {:.3}s. Image size: {} bytes.",
                began.elapsed().as_secs_f64(),
                image.size
            );
            life.event(false, "Pulled", message, container);
            Ok(image)
        }
        Err(error) => {
            let problem = error.problem.to_string();
            let mut fault = Fault::from(error);
            if fault.reason != "InvalidImageName" {
                // The kubelet's word for every other reason; the message says which it is.
                fault.reason = "ErrImagePull".to_owned();
            }
            // An event and a container's state are one text each: the way out goes with the cause.
            let hint = fault.hint.take().map_or_else(String::new, |hint| format!("; {hint}"));
            life.event(true, "Failed", format!("Failed to pull image \"{given}\": {problem}{hint}"), container);
            fault.message.push_str(&hint);
            Err(fault)
        }
    }
}

async fn config(life: &Life, made: &Made) -> Result<AgentConfig, Fault> {
    let (spec, shared) = (&life.record.spec, &life.shared);
    let address = made.attachment.as_ref().map(|attachment| attachment.address);
    let short = short_hostname(spec);
    let hostname = files::hostname(spec, &short);
    let mut containers = Vec::new();
    for (container, image) in started(spec).zip(&made.images) {
        let around = Surroundings { hostname: &hostname, address, layers: layers(life, image).await? };
        containers.push(merge::container(container, image, around)?);
    }
    let volumes = volumes(life, made.images.get(started(spec).count()..).unwrap_or_default()).await?;
    Ok(AgentConfig {
        version: VERSION,
        instance: life.id.to_string(),
        resolv_conf: files::resolv_conf(spec, &shared.config.resolv_conf),
        hosts: files::hosts(spec, &short, address),
        hostname,
        address,
        containers,
        volumes,
        fs_group: spec.fs_group,
        restart_policy: spec.restart_policy,
        termination_grace_period_seconds: spec.termination_grace_period_seconds,
        share_processes: spec.share_processes,
        sysctls: spec.sysctls.clone(),
        limits: spec.limits,
        deadline: spec.active_deadline_seconds.map(|seconds| deadline(life.record.accepted_at, seconds)),
        debug_ports: spec.debug_ports.clone(),
        core_pattern: spec.core_pattern.clone(),
        cgroup: format!("{}/{}", shared.config.cgroup_root, life.id),
        log_max_bytes: shared.config.log_max_bytes,
        log_max_files: shared.config.log_max_files,
    })
}

/// Mounted layers of an image, topmost first.
async fn layers(life: &Life, image: &Image) -> Result<Vec<String>, Fault> {
    let layers = life.shared.images.mount(image).await?;
    Ok(layers.iter().map(|layer| layer.to_string_lossy().into_owned()).collect())
}

/// The volumes as the agent makes them; `images` are those of the volumes that show one.
async fn volumes(life: &Life, images: &[Arc<Image>]) -> Result<Vec<AgentVolume>, Fault> {
    let spec = &life.record.spec;
    let mut images = images.iter();
    let mut made = Vec::new();
    for volume in &spec.volumes {
        let mut agents = AgentVolume { name: volume.name.clone(), ..AgentVolume::default() };
        match &volume.source {
            VolumeSource::Files(files) => agents.files = Some(files.clone()),
            VolumeSource::EmptyDir { memory, size_limit_bytes } => {
                agents.memory = *memory;
                agents.size_limit_bytes =
                    if *memory { files::memory_size(spec, *size_limit_bytes) } else { *size_limit_bytes };
            }
            VolumeSource::Image { reference, .. } => {
                let lost =
                    || Fault::new(ErrorKind::Retryable, "ErrImagePull", format!("image \"{reference}\" is not here"));
                agents.layers = layers(life, images.next().ok_or_else(lost)?).await?;
            }
        }
        made.push(agents);
    }
    Ok(made)
}

/// The containers that a sandbox starts with: those that only look on come when it runs.
pub(crate) fn started(spec: &InstanceSpec) -> impl Iterator<Item = &ContainerSpec> {
    spec.containers.iter().filter(|container| container.role != Role::Debug)
}

fn short_hostname(spec: &InstanceSpec) -> String {
    let first = spec.name.split('.').next().unwrap_or(&spec.name);
    spec.hostname.clone().unwrap_or_else(|| first.chars().take(63).collect())
}

/// What programs are told when they ask for the host name.
pub(crate) fn hostname(spec: &InstanceSpec) -> String {
    files::hostname(spec, &short_hostname(spec))
}

/// The moment when an instance's time is over; too far away is never.
pub(crate) fn deadline(from: Timestamp, seconds: u64) -> Timestamp {
    let span = SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX));
    from.checked_add(span).unwrap_or(Timestamp::MAX)
}

/// Runs file work where it may block.
pub(crate) async fn blocking<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, Fault> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| match error.kind() {
            ErrorKindOfIo::StorageFull | ErrorKindOfIo::QuotaExceeded => disk_full(operation),
            _ => host_fault(operation, &error),
        }),
        Err(error) => Err(host_fault(operation, &error)),
    }
}

fn disk_full(operation: &'static str) -> Fault {
    tracing::error!(operation, "the disk of instances is full");
    Fault::new(ErrorKind::Exhausted, "DiskFull", format!("the host could not {operation}: its disk is full"))
        .with_hint("free space on the disk that holds the data directory, or delete instances that are done")
}

/// A failure of this host; its text goes to the platform's log only.
pub(crate) fn host_fault(operation: &'static str, error: &dyn std::error::Error) -> Fault {
    tracing::error!(operation, %error, "host failed");
    Fault::new(ErrorKind::Internal, "HostFailed", format!("the host could not {operation}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::persist::had_sandbox;

    #[test]
    fn a_sandbox_that_was_not_made_is_not_taken_for_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        configure(dir.path(), b"{}").unwrap();
        assert!(!had_sandbox(dir.path()));
        let state = r#"{"version": 1, "sequence": 7, "containers": [], "events": [], "stopping": false}"#;
        std::fs::write(dir.path().join("state.json"), state).unwrap();
        assert!(had_sandbox(dir.path()), "its agent told of it");
        configure(dir.path(), b"{}").unwrap();
        assert!(!had_sandbox(dir.path()));
    }
}
