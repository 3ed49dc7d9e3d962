//! PodSpec → instance specification, as a pure function. Every field is taken apart by name: what cannot be honoured refuses the
//! Pod and says so, and a field that a newer API adds fails to compile here.

use std::collections::BTreeMap;

use joey_api::instance::{
    ContainerSpec, Dns, HostAlias, InstanceSpec, Mount, NetworkSpec, PullPolicy, Resources, Security, WireRestartPolicy,
};
use joey_api::lifecycle::Role;
use joey_model::quantity::{parse_milli, parse_units};
use k8s_openapi::api::core::v1 as core;

use crate::config::Config;
use crate::resolve::{Missing, Objects};

mod environment;
mod lifecycle;
#[cfg(test)]
mod tests;
mod volumes;

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
    /// An object it names is not there yet.
    #[error(transparent)]
    Missing(Missing),
    /// Images are named by what is no reference; a Pod's images may be changed, so it waits.
    #[error("{}", .0.iter().map(InvalidImage::to_string).collect::<Vec<_>>().join("; "))]
    InvalidImages(Vec<InvalidImage>),
}

/// A container whose image's name cannot be read. The message begins as the kubelet's does.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("Failed to apply default image tag \"{}\": couldn't parse image name: {}", .reason.text, .reason.why)]
pub struct InvalidImage {
    pub container: String,
    pub reason: joey_model::image_ref::InvalidReference,
}

impl From<Missing> for Refusal {
    fn from(missing: Missing) -> Self {
        Self::Missing(missing)
    }
}

/// A Pod as an instance, and what of it has no effect here though it runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Converted {
    pub spec: InstanceSpec,
    pub without_effect: Vec<String>,
}

/// Faults and remarks collected on the way.
#[derive(Default)]
pub(crate) struct Notes {
    faults: Vec<String>,
    without_effect: Vec<String>,
    invalid_images: Vec<InvalidImage>,
}

impl Notes {
    fn refuse_if(&mut self, present: bool, field: impl std::fmt::Display, alternative: &str) {
        if present {
            self.faults.push(format!("{field} is not supported: {alternative}"));
        }
    }

    fn no_effect_if(&mut self, present: bool, field: impl std::fmt::Display, why: &str) {
        if present {
            self.without_effect.push(format!("{field} has no effect: {why}"));
        }
    }
}

fn given<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_some_and(|list| !list.is_empty())
}

/// The instance of a Pod, given the objects it names.
pub fn convert(pod: &core::Pod, objects: &Objects, config: &Config) -> Result<Converted, Refusal> {
    let mut notes = Notes::default();
    let spec = pod.spec.clone().unwrap_or_default();
    let namespace = pod.metadata.namespace.clone().unwrap_or_default();
    let name = pod.metadata.name.clone().unwrap_or_default();
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    check_pod(&spec, &mut notes);
    let security = spec.security_context.clone().unwrap_or_default();
    check_pod_security(&security, &mut notes);
    let volumes = volumes::volumes(pod, &spec, objects, &mut notes)?;
    let mut containers = Vec::new();
    for (role, container) in all_containers(&spec) {
        let made = self::container(pod, &spec, container, &security, objects, config, &mut notes)?;
        containers.push(ContainerSpec { role, ..made });
    }
    let network = network(pod, &spec, &namespace, config, &mut notes);
    if !notes.faults.is_empty() {
        return Err(Refusal::Unsupported(notes.faults));
    }
    if !notes.invalid_images.is_empty() {
        return Err(Refusal::InvalidImages(notes.invalid_images));
    }
    let hostname = hostname(&spec, &name);
    let instance = InstanceSpec {
        name: format!("{name}.{namespace}"),
        client_token: Some(uid.clone()),
        labels: BTreeMap::from([
            (LABEL_NODE.to_owned(), config.node_name.clone()),
            (LABEL_UID.to_owned(), uid),
            (LABEL_NAMESPACE.to_owned(), namespace),
            (LABEL_POD.to_owned(), name),
        ]),
        annotations: BTreeMap::new(),
        class: spec.runtime_class_name.clone().unwrap_or_else(|| "runc".to_owned()),
        hostname: Some(hostname),
        containers,
        volumes,
        restart_policy: match spec.restart_policy.as_deref() {
            Some("Never") => WireRestartPolicy::Never,
            Some("OnFailure") => WireRestartPolicy::OnFailure,
            _ => WireRestartPolicy::Always,
        },
        termination_grace_period_seconds: spec
            .termination_grace_period_seconds
            .map_or(30, |s| u32::try_from(s).unwrap_or(30)),
        active_deadline_seconds: spec.active_deadline_seconds.and_then(|seconds| u64::try_from(seconds).ok()),
        debug_ports: debug_ports(pod, &mut notes),
        network,
        credentials: objects.credentials.clone(),
    };
    Ok(Converted { spec: instance, without_effect: notes.without_effect })
}

/// The containers in the order of their start, and what each is to the Pod.
pub(crate) fn all_containers(spec: &core::PodSpec) -> impl Iterator<Item = (Role, &core::Container)> {
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
        ephemeral_containers,
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
        resources,
        restart_policy: _,
        runtime_class_name: _,
        scheduler_name: _,
        scheduling_gates: _,
        scheduling_group: _,
        security_context: _,
        service_account: _,
        service_account_name: _,
        set_hostname_as_fqdn,
        share_process_namespace,
        subdomain,
        termination_grace_period_seconds: _,
        tolerations: _,
        topology_spread_constraints: _,
        volumes: _,
    } = spec;
    let on = |flag: &Option<bool>| *flag == Some(true);
    notes.refuse_if(given(ephemeral_containers), "spec.ephemeralContainers", "use exec in a running container");
    notes.refuse_if(on(host_ipc), "spec.hostIPC", "Pods have an IPC namespace of their own");
    notes.refuse_if(on(host_network), "spec.hostNetwork", "use the Pod's own address");
    notes.refuse_if(on(host_pid), "spec.hostPID", "Pods see their own processes only");
    notes.refuse_if(*host_users == Some(false), "spec.hostUsers: false", "leave it out");
    notes.refuse_if(os.as_ref().is_some_and(|os| os.name != "linux"), "spec.os", "only linux runs here");
    notes.refuse_if(given(resource_claims), "spec.resourceClaims", "leave them out; there are no devices");
    notes.refuse_if(resources.is_some(), "spec.resources", "set resources on containers");
    notes.refuse_if(on(set_hostname_as_fqdn), "spec.setHostnameAsFQDN", "leave it out");
    notes.refuse_if(on(share_process_namespace), "spec.shareProcessNamespace", "run the programs in one container");
    notes.no_effect_if(
        subdomain.as_ref().is_some_and(|name| !name.is_empty()),
        "spec.subdomain",
        "the host name inside has no domain; the cluster's DNS is not affected",
    );
}

fn check_pod_security(security: &core::PodSecurityContext, notes: &mut Notes) {
    let core::PodSecurityContext {
        app_armor_profile,
        fs_group,
        fs_group_change_policy: _,
        run_as_group: _,
        run_as_non_root: _,
        run_as_user: _,
        se_linux_change_policy: _,
        se_linux_options,
        seccomp_profile,
        supplemental_groups: _,
        supplemental_groups_policy,
        sysctls,
        windows_options,
    } = security;
    let at = "spec.securityContext";
    check_profiles(at, app_armor_profile.as_ref(), seccomp_profile.as_ref(), notes);
    notes.no_effect_if(
        fs_group.is_some(),
        format!("{at}.fsGroup"),
        "volumes keep their owner; processes get the group",
    );
    notes.refuse_if(se_linux_options.is_some(), format!("{at}.seLinuxOptions"), "leave it out");
    notes.refuse_if(
        supplemental_groups_policy.as_deref() == Some("Strict"),
        format!("{at}.supplementalGroupsPolicy: Strict"),
        "use Merge",
    );
    notes.refuse_if(given(sysctls), format!("{at}.sysctls"), "leave them out");
    notes.refuse_if(windows_options.is_some(), format!("{at}.windowsOptions"), "only linux runs here");
}

fn check_profiles(
    at: &str,
    app_armor: Option<&core::AppArmorProfile>,
    seccomp: Option<&core::SeccompProfile>,
    notes: &mut Notes,
) {
    let app_armor = app_armor.map_or("", |profile| &profile.type_);
    notes.refuse_if(app_armor == "Localhost", format!("{at}.appArmorProfile"), "use RuntimeDefault");
    let seccomp = seccomp.map_or("RuntimeDefault", |profile| &profile.type_);
    notes.refuse_if(seccomp != "RuntimeDefault", format!("{at}.seccompProfile {seccomp}"), "use RuntimeDefault");
}

fn container(
    pod: &core::Pod,
    spec: &core::PodSpec,
    container: &core::Container,
    pod_security: &core::PodSecurityContext,
    objects: &Objects,
    config: &Config,
    notes: &mut Notes,
) -> Result<ContainerSpec, Refusal> {
    let at = format!("container \"{}\": ", container.name);
    check_container(&at, container, notes);
    let image = container.image.clone().unwrap_or_default();
    notes.refuse_if(image.is_empty(), format!("{at}an empty image"), "name one");
    let reference = joey_model::ImageRef::parse(&image);
    let latest = reference.as_ref().is_ok_and(joey_model::ImageRef::is_latest);
    if let Err(reason) = reference {
        notes.invalid_images.push(InvalidImage { container: container.name.clone(), reason });
    }
    Ok(ContainerSpec {
        name: container.name.clone(),
        role: Role::Main,
        restart_policy: restart_policy(&at, container, notes),
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
        env: environment::environment(pod, spec, container, objects, config, notes)?,
        working_dir: container.working_dir.clone().filter(|dir| !dir.is_empty()),
        stdin: container.stdin == Some(true),
        tty: container.tty == Some(true),
        resources: limits(&at, container.resources.as_ref(), notes),
        mounts: mounts(&at, container, notes),
        security: security(&at, container.security_context.as_ref(), pod_security, notes),
        ports: container.ports.iter().flatten().filter_map(|port| u16::try_from(port.container_port).ok()).collect(),
    })
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
        restart_policy_rules,
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
    notes.refuse_if(given(restart_policy_rules), format!("{at}restartPolicyRules"), "use spec.restartPolicy");
    notes.refuse_if(given(volume_devices), format!("{at}volumeDevices"), "use an emptyDir");
    for port in ports.iter().flatten() {
        let core::ContainerPort { container_port: _, host_ip: _, host_port, name: _, protocol: _ } = port;
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

/// Annotation: ports that debuggers connect to, separated by commas.
const DEBUG_PORTS: &str = "joey.dev/debug-ports";

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

fn limits(at: &str, resources: Option<&core::ResourceRequirements>, notes: &mut Notes) -> Resources {
    let mut wanted = Resources::default();
    let Some(core::ResourceRequirements { claims, limits, requests: _ }) = resources else { return wanted };
    notes.refuse_if(given(claims), format!("{at}resources.claims"), "leave them out; there are no devices");
    for (name, amount) in limits.iter().flatten() {
        let parsed = match name.as_str() {
            "cpu" => parse_milli(&amount.0).map(|milli| wanted.cpu_milli = Some(milli)),
            "memory" => parse_units(&amount.0).map(|bytes| wanted.memory_bytes = Some(bytes)),
            "ephemeral-storage" => {
                notes.no_effect_if(true, format!("{at}limit of ephemeral-storage"), "use an emptyDir with a sizeLimit");
                Ok(())
            }
            _ => {
                notes.refuse_if(true, format!("{at}limit of {name}"), "limit cpu and memory only");
                Ok(())
            }
        };
        if let Err(error) = parsed {
            notes.faults.push(format!("{at}limit of {name}: {error}"));
        }
    }
    wanted
}

fn mounts(at: &str, container: &core::Container, notes: &mut Notes) -> Vec<Mount> {
    let mut mounts = Vec::new();
    for mount in container.volume_mounts.iter().flatten() {
        let core::VolumeMount {
            mount_path,
            mount_propagation,
            name,
            read_only,
            recursive_read_only,
            sub_path,
            sub_path_expr,
        } = mount;
        let filled = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        notes.refuse_if(filled(sub_path), format!("{at}subPath"), "mount the whole volume at a folder of its own");
        notes.refuse_if(filled(sub_path_expr), format!("{at}subPathExpr"), "mount the whole volume");
        notes.refuse_if(
            mount_propagation.as_deref().is_some_and(|way| way != "None"),
            format!("{at}mountPropagation"),
            "leave it out; nothing is shared with the host",
        );
        notes.refuse_if(
            recursive_read_only.as_deref() == Some("Enabled"),
            format!("{at}recursiveReadOnly: Enabled"),
            "use readOnly",
        );
        mounts.push(Mount { volume: name.clone(), path: mount_path.clone(), read_only: *read_only == Some(true) });
    }
    mounts
}

fn security(
    at: &str,
    context: Option<&core::SecurityContext>,
    pod: &core::PodSecurityContext,
    notes: &mut Notes,
) -> Security {
    let empty = core::SecurityContext::default();
    let core::SecurityContext {
        allow_privilege_escalation,
        app_armor_profile,
        capabilities,
        privileged,
        proc_mount,
        read_only_root_filesystem,
        run_as_group,
        run_as_non_root,
        run_as_user,
        se_linux_options,
        seccomp_profile,
        windows_options,
    } = context.unwrap_or(&empty);
    let at = format!("{at}securityContext");
    check_profiles(&at, app_armor_profile.as_ref(), seccomp_profile.as_ref(), notes);
    notes.refuse_if(*privileged == Some(true), format!("{at}.privileged"), "add the capabilities that are needed");
    notes.refuse_if(
        proc_mount.as_deref().is_some_and(|kind| kind != "Default"),
        format!("{at}.procMount"),
        "use Default",
    );
    notes.refuse_if(se_linux_options.is_some(), format!("{at}.seLinuxOptions"), "leave it out");
    notes.refuse_if(windows_options.is_some(), format!("{at}.windowsOptions"), "only linux runs here");
    let mut id = |number: Option<i64>, field: &str| match number.map(u32::try_from) {
        Some(Ok(id)) => Some(id),
        None => None,
        Some(Err(_)) => {
            notes.faults.push(format!("{at}.{field} is not an id"));
            None
        }
    };
    let user = id(run_as_user.or(pod.run_as_user), "runAsUser");
    let group = id(run_as_group.or(pod.run_as_group), "runAsGroup");
    let supplemental_groups = pod
        .supplemental_groups
        .iter()
        .flatten()
        .copied()
        .chain(pod.fs_group)
        .filter_map(|group| id(Some(group), "supplementalGroups"))
        .collect();
    let names = |list: Option<&Vec<String>>| -> Vec<String> {
        list.into_iter().flatten().map(|name| name.strip_prefix("CAP_").unwrap_or(name).to_owned()).collect()
    };
    Security {
        user,
        group,
        supplemental_groups,
        run_as_non_root: run_as_non_root.or(pod.run_as_non_root) == Some(true),
        read_only_root: *read_only_root_filesystem == Some(true),
        no_new_privileges: *allow_privilege_escalation == Some(false),
        drop_capabilities: names(capabilities.as_ref().and_then(|c| c.drop.as_ref())),
        add_capabilities: names(capabilities.as_ref().and_then(|c| c.add.as_ref())),
    }
}

fn network(pod: &core::Pod, spec: &core::PodSpec, namespace: &str, config: &Config, notes: &mut Notes) -> NetworkSpec {
    let mut bandwidth = |way: &str| {
        let key = format!("kubernetes.io/{way}-bandwidth");
        let text = pod.metadata.annotations.as_ref()?.get(&key)?;
        parse_units(text).map_err(|error| notes.faults.push(format!("annotation {key}: {error}"))).ok()
    };
    NetworkSpec {
        ingress_bits_per_second: bandwidth("ingress"),
        egress_bits_per_second: bandwidth("egress"),
        dns: dns(spec, namespace, config),
        host_aliases: spec
            .host_aliases
            .iter()
            .flatten()
            .map(|alias| HostAlias {
                address: alias.ip.clone(),
                hostnames: alias.hostnames.clone().unwrap_or_default(),
            })
            .collect(),
    }
}

/// Name servers as the Pod's dnsPolicy says; without a cluster DNS, ClusterFirst is the host's, as the kubelet does.
fn dns(spec: &core::PodSpec, namespace: &str, config: &Config) -> Option<Dns> {
    let mut dns = match spec.dns_policy.as_deref() {
        Some("None") => Some(Dns::default()),
        Some("Default") => None,
        _ if config.cluster_dns.is_empty() => None,
        _ => {
            let domain = &config.cluster_domain;
            Some(Dns {
                nameservers: config.cluster_dns.iter().map(ToString::to_string).collect(),
                searches: vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()],
                options: vec!["ndots:5".into()],
            })
        }
    };
    if let Some(extra) = &spec.dns_config {
        let dns = dns.get_or_insert_with(Dns::default);
        dns.nameservers.extend(extra.nameservers.clone().unwrap_or_default());
        dns.searches.extend(extra.searches.clone().unwrap_or_default());
        dns.options.extend(extra.options.iter().flatten().filter_map(|option| {
            let name = option.name.as_deref()?;
            Some(option.value.as_ref().map_or_else(|| name.to_owned(), |value| format!("{name}:{value}")))
        }));
    }
    dns
}

/// The host name: the one given, else the Pod's name cut to 63 characters, dots replaced.
fn hostname(spec: &core::PodSpec, pod: &str) -> String {
    let wanted = spec.hostname_override.as_ref().or(spec.hostname.as_ref()).filter(|name| !name.is_empty());
    let name = wanted.map_or(pod, String::as_str).replace('.', "-");
    name[..name.len().min(63)].trim_end_matches('-').to_owned()
}
