//! PodSpec → instance specification, as a pure function. Every field is taken apart by name: what cannot be honoured refuses the
//! Pod and says so, and a field that a newer API adds fails to compile here.

use std::collections::BTreeMap;

use joey_api::annotations::{self, DEBUG_PORTS};
use joey_api::hooks;
use joey_api::instance::{ContainerSpec, Dns, HostAlias, InstanceSpec, NetworkSpec, PullPolicy, WireRestartPolicy};
use joey_api::lifecycle::{Held, Role};
use k8s_openapi::api::core::v1 as core;

mod environment;
mod ephemeral;
#[cfg(test)]
mod fields_tests;
mod lifecycle;
mod limits;
mod logs;
mod naming;
mod needs;
mod node;
mod objects;
mod security;
#[cfg(test)]
mod tests;
mod volumes;

pub use ephemeral::{changed, debug, fixed};
pub use needs::Needs;
pub use node::Node;
pub use objects::{Kind, Missing, Objects, Token, TokenWish, Tokens, Values};
pub use volumes::files;

/// Label on instances: the virtual node that made them.
pub const LABEL_NODE: &str = "joey.dev/virtual-node";
/// Label on instances: UID, namespace and name of their Pod.
pub const LABEL_UID: &str = "joey.dev/pod-uid";
pub const LABEL_NAMESPACE: &str = "joey.dev/pod-namespace";
pub const LABEL_POD: &str = "joey.dev/pod-name";

/// Why a Pod does not become an instance.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// It asks for what is not there; it never runs as it is.
    #[error("{}", .0.join("; "))]
    Unsupported(Vec<String>),
    /// A volume shows an object that is not there yet: all of the Pod waits for that. The message begins as the kubelet's does.
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {missing}")]
    Unmounted { volume: String, missing: Missing },
}

/// Why a container with such an image waits.
pub const INVALID_IMAGE_NAME: &str = "InvalidImageName";

/// A container whose image's name cannot be read. The message begins as the kubelet's does.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("Failed to apply default image tag \"{}\": couldn't parse image name: {}", .reason.text, .reason.why)]
pub struct InvalidImage {
    pub container: String,
    pub reason: joey_model::image_ref::InvalidReference,
}

/// A Pod as an instance.
#[derive(Debug, Clone, PartialEq)]
pub struct Converted {
    pub spec: InstanceSpec,
    pub waits: Waits,
}

/// What some containers wait for, while others go on: each of them is held. A Pod's images may be changed, and objects appear.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Waits {
    /// The first object of each container that lacks any, by the container's name.
    pub missing: Vec<(String, Missing)>,
    pub invalid_images: Vec<InvalidImage>,
}

/// Faults collected on the way, and what the container waits for that is being made.
#[derive(Default)]
pub(crate) struct Notes {
    faults: Vec<String>,
    waits: Waits,
    held: Option<Held>,
    /// What is being made only looks on.
    looks_on: bool,
}

impl Notes {
    /// The first reason counts.
    fn hold(&mut self, reason: &str, message: String) {
        self.held.get_or_insert(Held { reason: reason.to_owned(), message });
    }

    /// What was found of an object, unless the container has to wait for it.
    pub(crate) fn found<T>(&mut self, pod: &core::Pod, container: &str, found: Result<T, Missing>) -> Option<T> {
        let missing = match found {
            Ok(found) => return Some(found),
            Err(missing) => missing,
        };
        // An object is watched for each container, not for each of its variables.
        if self.held.is_none() {
            self.hold("CreateContainerConfigError", missing.of_variable(pod));
            self.waits.missing.push((container.to_owned(), missing));
        }
        None
    }

    fn done<T>(self, made: T) -> Result<(T, Waits), Refusal> {
        match self.faults.is_empty() {
            true => Ok((made, self.waits)),
            false => Err(Refusal::Unsupported(self.faults)),
        }
    }

    fn refuse_if(&mut self, present: bool, field: impl std::fmt::Display, alternative: &str) {
        if present {
            self.faults.push(format!("{field} is not supported: {alternative}"));
        }
    }
}

fn given<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_some_and(|list| !list.is_empty())
}

/// The instance of a Pod, given the objects it names.
pub fn convert(pod: &core::Pod, objects: &Objects, node: &Node) -> Result<Converted, Refusal> {
    let mut notes = Notes::default();
    let spec = pod.spec.clone().unwrap_or_default();
    let namespace = pod.metadata.namespace.clone().unwrap_or_default();
    let name = pod.metadata.name.clone().unwrap_or_default();
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    check_pod(&spec, &mut notes);
    let security = spec.security_context.clone().unwrap_or_default();
    security::check_pod(&security, &mut notes);
    let sysctls = security::sysctls(&security, &mut notes);
    let naming = naming::naming(&spec, (&name, &namespace), &node.cluster_domain, &mut notes);
    let limits = limits::pod(pod, &spec, &mut notes);
    let volumes = volumes::volumes(pod, &spec, objects, &mut notes)?;
    hook_faults(pod, &spec, &mut notes);
    let containers = own_containers(pod, &spec, objects, node, &mut notes);
    let network = NetworkSpec {
        dns: dns(&spec, &namespace, node),
        host_aliases: host_aliases(&spec),
        ..limits::network(pod, &mut notes)
    };
    let logs = logs::logs(pod, &containers, &mut notes);
    let (debug_ports, fs_group) = (debug_ports(pod, &mut notes), volumes::fs_group(&security, &mut notes));
    limits::encryption(pod, &spec, &mut notes);
    let ((), waits) = notes.done(())?;
    let instance = InstanceSpec {
        name: format!("{name}.{namespace}"),
        client_token: Some(uid.clone()),
        labels: BTreeMap::from([
            (LABEL_NODE.to_owned(), node.name.clone()),
            (LABEL_UID.to_owned(), uid),
            (LABEL_NAMESPACE.to_owned(), namespace),
            (LABEL_POD.to_owned(), name),
        ]),
        annotations: fixed_annotations(pod),
        class: spec.runtime_class_name.clone().unwrap_or_else(|| "runc".to_owned()),
        hostname: Some(naming.hostname),
        domain: naming.domain,
        full_hostname: naming.full,
        share_processes: spec.share_process_namespace == Some(true),
        sysctls,
        limits,
        use_specs: limits::use_specs(pod),
        containers,
        volumes,
        fs_group,
        restart_policy: match spec.restart_policy.as_deref() {
            Some("Never") => WireRestartPolicy::Never,
            Some("OnFailure") => WireRestartPolicy::OnFailure,
            _ => WireRestartPolicy::Always,
        },
        termination_grace_period_seconds: spec
            .termination_grace_period_seconds
            .map_or(30, |s| u32::try_from(s).unwrap_or(30)),
        active_deadline_seconds: spec.active_deadline_seconds.and_then(|seconds| u64::try_from(seconds).ok()),
        debug_ports,
        core_pattern: limits::core_pattern(pod),
        restarts_before: BTreeMap::new(),
        logs,
        network,
        credentials: objects.credentials.clone(),
    };
    Ok(Converted { spec: instance, waits })
}

/// The containers of a Pod as they are now, ephemeral ones apart.
pub fn containers(pod: &core::Pod, objects: &Objects, node: &Node) -> Result<(Vec<ContainerSpec>, Waits), Refusal> {
    let mut notes = Notes::default();
    let spec = pod.spec.clone().unwrap_or_default();
    let made = own_containers(pod, &spec, objects, node, &mut notes);
    notes.done(made)
}

fn own_containers(
    pod: &core::Pod,
    spec: &core::PodSpec,
    objects: &Objects,
    node: &Node,
    notes: &mut Notes,
) -> Vec<ContainerSpec> {
    let security = spec.security_context.clone().unwrap_or_default();
    let made = all_containers(spec).map(|(role, container)| {
        let mut made = self::container(pod, spec, container, &security, objects, node, notes);
        if let Some(annotations) = &pod.metadata.annotations {
            hooks::add(annotations, &made.name, &mut made.lifecycle);
        }
        ContainerSpec { role, ..made }
    });
    made.collect()
}

/// The containers in the order of their start, and what each is to the Pod.
pub fn all_containers(spec: &core::PodSpec) -> impl Iterator<Item = (Role, &core::Container)> {
    let before = spec.init_containers.iter().flatten().map(|container| {
        let sidecar = container.restart_policy.as_deref() == Some("Always");
        (if sidecar { Role::Sidecar } else { Role::Init }, container)
    });
    before.chain(spec.containers.iter().map(|container| (Role::Main, container)))
}

/// Goes through every field of a PodSpec. Those named `_` are somebody else's (scheduler, admission) or read in [`convert`].
fn check_pod(spec: &core::PodSpec, notes: &mut Notes) {
    let core::PodSpec {
        active_deadline_seconds: _,
        affinity: _,
        automount_service_account_token: _,
        containers: _,
        dns_config: _,
        dns_policy: _,
        enable_service_links: _,
        // They come later: `ephemeral`.
        ephemeral_containers: _,
        host_aliases: _,
        host_ipc,
        host_network,
        host_pid,
        host_users,
        hostname: _,
        hostname_override: _,
        image_pull_secrets: _,
        init_containers: _,
        node_name: _,
        node_selector: _,
        os,
        overhead: _,
        preemption_policy: _,
        priority: _,
        priority_class_name: _,
        readiness_gates: _,
        resource_claims,
        resources: _,
        restart_policy: _,
        runtime_class_name: _,
        scheduler_name: _,
        scheduling_gates: _,
        scheduling_group: _,
        security_context: _,
        service_account: _,
        service_account_name: _,
        set_hostname_as_fqdn: _,
        share_process_namespace: _,
        subdomain: _,
        termination_grace_period_seconds: _,
        tolerations: _,
        topology_spread_constraints: _,
        volumes: _,
    } = spec;
    let on = |flag: &Option<bool>| *flag == Some(true);
    notes.refuse_if(on(host_ipc), "spec.hostIPC", "Pods have an IPC namespace of their own");
    notes.refuse_if(on(host_network), "spec.hostNetwork", "use the Pod's own address");
    notes.refuse_if(on(host_pid), "spec.hostPID", "Pods see their own processes only");
    notes.refuse_if(
        *host_users == Some(false),
        "spec.hostUsers: false",
        "leave it out and run as another user; root inside has the default capabilities alone",
    );
    notes.refuse_if(os.as_ref().is_some_and(|os| os.name != "linux"), "spec.os", "only linux runs here");
    notes.refuse_if(given(resource_claims), "spec.resourceClaims", "leave them out; there are no devices");
}

fn container(
    pod: &core::Pod,
    spec: &core::PodSpec,
    container: &core::Container,
    pod_security: &core::PodSecurityContext,
    objects: &Objects,
    node: &Node,
    notes: &mut Notes,
) -> ContainerSpec {
    let at = format!("container \"{}\": ", container.name);
    check_container(&at, container, notes);
    let image = container.image.clone().unwrap_or_default();
    notes.refuse_if(image.is_empty(), format!("{at}an empty image"), "name one");
    let reference = joey_model::ImageRef::parse(&image);
    let latest = reference.as_ref().is_ok_and(joey_model::ImageRef::is_latest);
    if let Err(reason) = reference {
        let invalid = InvalidImage { container: container.name.clone(), reason };
        notes.hold(INVALID_IMAGE_NAME, invalid.to_string());
        notes.waits.invalid_images.push(invalid);
    }
    let env = environment::environment(pod, spec, container, objects, node, notes);
    ContainerSpec {
        name: container.name.clone(),
        role: Role::Main,
        target: None,
        restart_policy: restart_policy(&at, container, notes),
        restart_rules: security::restart_rules(&at, container, notes),
        lifecycle: lifecycle::lifecycle(&at, container, notes),
        last_words: lifecycle::last_words(container),
        pull_policy: match container.image_pull_policy.as_deref() {
            Some("Always") => PullPolicy::Always,
            Some("Never") => PullPolicy::Never,
            Some(_) => PullPolicy::IfNotPresent,
            None if latest => PullPolicy::Always,
            None => PullPolicy::IfNotPresent,
        },
        image,
        command: container.command.clone().unwrap_or_default(),
        args: container.args.clone().unwrap_or_default(),
        env,
        working_dir: container.working_dir.clone().filter(|dir| !dir.is_empty()),
        stdin: container.stdin == Some(true),
        stdin_once: container.stdin_once == Some(true),
        tty: container.tty == Some(true),
        resources: limits::container(&at, container.resources.as_ref(), limits::pod_is_limited(pod, spec), notes),
        restart_on_resize: limits::restart_on_resize(container),
        mounts: volumes::mounts(&at, container, notes),
        security: security::security(&at, container.security_context.as_ref(), pod_security, notes),
        ports: container.ports.iter().flatten().filter_map(|port| u16::try_from(port.container_port).ok()).collect(),
        held: notes.held.take(),
    }
}

/// Goes through every field of a Container. Those named `_` are read in [`container`] and the functions it calls.
fn check_container(at: &str, container: &core::Container, notes: &mut Notes) {
    let core::Container {
        args: _,
        command: _,
        env: _,
        env_from: _,
        image: _,
        image_pull_policy: _,
        lifecycle: _,
        liveness_probe: _,
        name: _,
        ports,
        readiness_probe: _,
        resize_policy: _,
        resources: _,
        restart_policy: _,
        restart_policy_rules: _,
        security_context: _,
        startup_probe: _,
        stdin: _,
        stdin_once: _,
        termination_message_path: _,
        termination_message_policy: _,
        tty: _,
        volume_devices,
        volume_mounts: _,
        working_dir: _,
    } = container;
    notes.refuse_if(given(volume_devices), format!("{at}volumeDevices"), "use an emptyDir");
    for port in ports.iter().flatten() {
        let core::ContainerPort { container_port: _, host_ip, host_port, name: _, protocol: _ } = port;
        let host_ip = host_ip.as_ref().is_some_and(|ip| !ip.is_empty());
        notes.refuse_if(host_ip, format!("{at}hostIP"), "leave it out; there is no node to listen on");
        notes.refuse_if(host_port.is_some_and(|p| p != 0), format!("{at}hostPort"), "use the Pod's own address");
    }
}

/// A container's own policy; an init container's `Always` makes it a sidecar.
fn restart_policy(at: &str, container: &core::Container, notes: &mut Notes) -> Option<WireRestartPolicy> {
    match container.restart_policy.as_deref()? {
        "Always" => Some(WireRestartPolicy::Always),
        "OnFailure" => Some(WireRestartPolicy::OnFailure),
        "Never" => Some(WireRestartPolicy::Never),
        other => {
            notes.refuse_if(true, format!("{at}restartPolicy {other}"), "use Always, OnFailure or Never");
            None
        }
    }
}

fn debug_ports(pod: &core::Pod, notes: &mut Notes) -> Vec<u16> {
    let annotation = pod.metadata.annotations.as_ref().and_then(|all| all.get(DEBUG_PORTS));
    let words = annotation.iter().flat_map(|text| text.split(',')).map(str::trim).filter(|word| !word.is_empty());
    words
        .filter_map(|word| match word.parse::<u16>() {
            Ok(port) if port != 0 => Some(port),
            _ => {
                notes.faults.push(format!("annotation {DEBUG_PORTS}: \"{word}\" is no port"));
                None
            }
        })
        .collect()
}

/// The annotations that made the instance what it is; kept with it to tell when the Pod's are others.
fn fixed_annotations(pod: &core::Pod) -> BTreeMap<String, String> {
    let all = pod.metadata.annotations.iter().flatten().filter(|(key, _)| annotations::is_fixed(key));
    all.map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// What is wrong with the hooks that annotations name.
fn hook_faults(pod: &core::Pod, spec: &core::PodSpec, notes: &mut Notes) {
    let annotations = pod.metadata.annotations.iter().flatten().map(|(key, value)| (key.as_str(), value.as_str()));
    let containers: Vec<_> = all_containers(spec).map(|(role, container)| (container.name.as_str(), role)).collect();
    let faults = hooks::faults(annotations, &containers);
    notes.faults.extend(faults.into_iter().map(|(key, fault)| format!("annotation {key}: {fault}")));
}

fn host_aliases(spec: &core::PodSpec) -> Vec<HostAlias> {
    let all = spec.host_aliases.iter().flatten();
    all.map(|core::HostAlias { hostnames, ip }| HostAlias {
        address: ip.clone(),
        hostnames: hostnames.clone().unwrap_or_default(),
    })
    .collect()
}

/// Name servers as the Pod's dnsPolicy says; without a cluster DNS, ClusterFirst is the host's, as the kubelet does.
fn dns(spec: &core::PodSpec, namespace: &str, node: &Node) -> Option<Dns> {
    let mut dns = match spec.dns_policy.as_deref() {
        Some("None") => Some(Dns::default()),
        Some("Default") => None,
        _ if node.cluster_dns.is_empty() => None,
        _ => {
            let domain = &node.cluster_domain;
            Some(Dns {
                host: false,
                nameservers: node.cluster_dns.iter().map(ToString::to_string).collect(),
                searches: vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()],
                options: vec!["ndots:5".into()],
            })
        }
    };
    if let Some(extra) = &spec.dns_config {
        let dns = dns.get_or_insert_with(|| Dns { host: true, ..Dns::default() });
        dns.nameservers.extend(extra.nameservers.clone().unwrap_or_default());
        dns.searches.extend(extra.searches.clone().unwrap_or_default());
        dns.options.extend(extra.options.iter().flatten().filter_map(|option| {
            let name = option.name.as_deref()?;
            Some(option.value.as_ref().map_or_else(|| name.to_owned(), |value| format!("{name}:{value}")))
        }));
    }
    dns
}
