//! Makes an instance: a list of steps, each with its undo. A step that fails undoes itself and all before it.
//!
//! ```text
//! Images ──► Network ──► Disk ──► Config ──► Sandbox
//!  (kept)    release    remove  remove files  destroy      undo, in the other order
//! ```

use std::collections::HashSet;
use std::io::{self, ErrorKind as ErrorKindOfIo};
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use joey_api::agent::{AgentConfig, AgentNfs, AgentVolume, VERSION};
use joey_api::annotations::encrypts_disk;
use joey_api::instance::{InstanceSpec, VolumeSource};
use joey_api::lifecycle::storage_limit;
use joey_image::Image;
use joey_model::{ErrorKind, Fault, checkpoint};
use joey_network::{Attachment, Bandwidth};
use joey_sandbox::{CreateRequest, Layer, Network, Sandbox};

use crate::engine::Shared;
use crate::life::Life;
use crate::merge::{self, Surroundings};
use crate::pull::{self, Images, started};
use crate::{files, logs, nfs, persist};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Network,
    Disk,
    Config,
    Sandbox,
}

const STEPS: [Step; 4] = [Step::Network, Step::Disk, Step::Config, Step::Sandbox];

/// Where an instance's own disk is mounted, in its directory.
pub(crate) const DISK: &str = "disk";

/// What the steps have made so far.
struct Made {
    images: Images,
    /// Of all images, each once.
    layers: Vec<Layer>,
    attachment: Option<Attachment>,
    config: Option<AgentConfig>,
    sandbox: Option<Arc<dyn Sandbox>>,
}

/// Makes the sandbox of an instance whose images are here; on an error everything is undone.
pub(crate) async fn make(life: &mut Life, images: Images) -> Result<Arc<dyn Sandbox>, Fault> {
    let starts = life.shared.starts.clone();
    // Closed never: the semaphore lives as long as the engine.
    let _turn = starts.acquire().await;
    let mut made = Made { images, layers: Vec::new(), attachment: None, config: None, sandbox: None };
    for (done, step) in STEPS.into_iter().enumerate() {
        if let Err(fault) = perform(life, &mut made, step).await {
            tracing::warn!(instance = %life.id, ?step, %fault, "step of creation failed");
            if step == Step::Sandbox {
                life.event(true, "FailedCreatePodSandBox", format!("Failed to create pod sandbox: {fault}"), None);
            }
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
        Step::Disk => {
            let own_kernel = life.shared.class(&life.record.spec.class)?.mounts_itself().is_some();
            let (limit, dir) = (disk_limit(&life.record.spec).filter(|_| !own_kernel), life.dir.clone());
            if limit.is_some() || joey_disk::is_there(&dir.join(DISK)) {
                blocking("make its disk", move || disk(&dir, limit)).await?;
                life.mark("disk");
            }
            checkpoint::reached("instance-disk");
        }
        Step::Config => {
            let mut config = config(life, made).await?;
            logs::plan(life, config.address, &mut config.containers).await?;
            let bytes = serde_json::to_vec(&config).map_err(|error| host_fault("write its configuration", &error))?;
            let dir = life.dir.clone();
            blocking("write its configuration", move || configure(&dir, &bytes)).await?;
            made.config = Some(config);
            checkpoint::reached("instance-configured");
        }
        Step::Sandbox => {
            let class = life.shared.class(&life.record.spec.class)?;
            let Some(config) = made.config.clone() else {
                return Err(Fault::new(ErrorKind::Internal, "SandboxFailed", "instance has no configuration"));
            };
            let request = CreateRequest {
                instance: life.id.clone(),
                dir: life.dir.clone(),
                network: made.attachment.as_ref().and_then(network),
                layers: made.layers.clone(),
                disk_bytes: disk_limit(&life.record.spec),
                encrypted_disk: encrypts_disk(&life.record.spec.annotations) == Ok(true),
                config,
            };
            let sandbox = class.create(request).await?;
            for (name, micros) in sandbox.phases() {
                life.status.timings.insert(format!("sandbox.{name}"), micros);
            }
            life.status.guest = sandbox.guest();
            if let Some(remark) = sandbox.remark() {
                life.event(true, "SandboxRemark", remark, None);
            }
            made.sandbox = Some(sandbox);
            life.shared.carry_logs(&life.id);
            life.mark("sandbox");
            checkpoint::reached("instance-sandbox");
        }
    }
    Ok(())
}

/// Bytes that the containers may write, where that is limited.
fn disk_limit(spec: &InstanceSpec) -> Option<u64> {
    storage_limit(started(spec).map(|one| (one.role, one.resources.ephemeral_storage_bytes)))
}

/// What a sandbox is told of its network, which is IPv4 only.
fn network(attachment: &Attachment) -> Option<Network> {
    let v4 = |address: IpAddr| match address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    };
    Some(Network {
        netns: attachment.netns.clone(),
        address: v4(attachment.address)?,
        mac: attachment.mac,
        gateway: v4(attachment.gateway)?,
        gateway_mac: attachment.gateway_mac,
    })
}

/// Where there is a limit, a disk of its own, on which lies what its containers write. It is larger than their limit by a twentieth,
/// so that who exceeds that is seen to, and evicted as under a kubelet; and never larger than what the host has.
fn disk(dir: &Path, limit: Option<u64>) -> io::Result<()> {
    let place = dir.join(DISK);
    // What an attempt before this one left; the disk last, by which it is found.
    for name in ["upper", "volumes"] {
        if dir.join(name).is_symlink() {
            std::fs::remove_file(dir.join(name))?;
        }
    }
    joey_disk::remove(&place)?;
    let Some(limit) = limit else { return Ok(()) };
    let host = joey_disk::size(dir)?;
    joey_disk::make(&place, limit.saturating_add(limit / 20).min(host))?;
    for (name, mode) in [("upper", 0o700), ("volumes", 0o755)] {
        std::fs::DirBuilder::new().mode(mode).create(place.join(name))?;
        std::os::unix::fs::symlink(Path::new(DISK).join(name), dir.join(name))?;
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
        Step::Disk => {
            let place = life.dir.join(DISK);
            if joey_disk::is_there(&place) {
                blocking("remove its disk", move || joey_disk::remove(&place)).await?;
            }
            checkpoint::reached("instance-disk-removed");
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

async fn config(life: &mut Life, made: &mut Made) -> Result<AgentConfig, Fault> {
    let (spec, shared) = (life.record.spec.clone(), life.shared.clone());
    let spec = &spec;
    let address = made.attachment.as_ref().map(|attachment| attachment.address);
    let short = short_hostname(spec);
    let hostname = files::hostname(spec, &short);
    let mut containers = Vec::new();
    let mut first = None;
    for (container, image) in started(spec).zip(&made.images.containers) {
        let merged = match image {
            Some(image) => {
                let layers = layers(&shared, &spec.class, image).await?;
                let around = Surroundings { hostname: &hostname, address, layers: named(&layers) };
                made.layers.extend(layers);
                merge::container(container, image, around)
            }
            None => Ok(merge::held(container)),
        };
        containers.push(merged.unwrap_or_else(|fault| {
            life.hold(&container.name, fault.clone());
            first.get_or_insert(fault);
            merge::held(container)
        }));
    }
    if let Some(fault) = first
        && !pull::begins(containers.iter().map(|container| (container.role, container.is_held())))
    {
        return Err(fault);
    }
    let (volumes, of_volumes) = volumes(life, &made.images.volumes).await?;
    let mut known = HashSet::new();
    made.layers.extend(of_volumes);
    made.layers.retain(|layer| known.insert(layer.clone()));
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

/// The layers of an image, topmost first, as the class has them.
pub(crate) async fn layers(shared: &Shared, class: &str, image: &Image) -> Result<Vec<Layer>, Fault> {
    let class = shared.class(class)?;
    let layers = shared.images.mount(image).await?;
    let layer = |layer: joey_image::Layer| {
        let path = class.mounts_itself().map(|place| Path::new(place).join(layer.name.hex()));
        Layer { path: path.unwrap_or(layer.folder), image: layer.file }
    };
    Ok(layers.into_iter().map(layer).collect())
}

/// What the agent calls layers.
pub(crate) fn named(layers: &[Layer]) -> Vec<String> {
    layers.iter().map(|layer| layer.path.to_string_lossy().into_owned()).collect()
}

/// The volumes as the agent makes them, and the layers they show; `images` are those of the volumes that show one.
async fn volumes(life: &mut Life, images: &[Arc<Image>]) -> Result<(Vec<AgentVolume>, Vec<Layer>), Fault> {
    let spec = &life.record.spec.clone();
    let mut images = images.iter();
    let (mut made, mut all) = (Vec::new(), Vec::new());
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
                let layers = layers(&life.shared, &spec.class, images.next().ok_or_else(lost)?).await?;
                agents.layers = named(&layers);
                all.extend(layers);
            }
            VolumeSource::Nfs { server, path, read_only } => {
                let (server, path, read_only) = (server.clone(), path.clone(), *read_only);
                let address = nfs::address(life, &volume.name, &server).await?;
                agents.nfs = Some(AgentNfs { server, address, path, read_only });
            }
        }
        made.push(agents);
    }
    Ok((made, all))
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
