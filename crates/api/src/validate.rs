//! Checks of what users send, all faults at once, before anything is stored.

use std::collections::HashSet;
use std::net::IpAddr;

use joey_model::id::{check_label, check_subdomain};
use joey_model::{ErrorKind, Fault, ImageRef};

use crate::annotations::encrypts_disk;
use crate::diagnosis::check_core_pattern;
use crate::instance::{ContainerSpec, InstanceSpec, Limits, Mount, Volume, VolumeSource};
use crate::lifecycle::{Action, HttpGet, Lifecycle, Role};

/// Capabilities a container has unless it drops them: the default set of Docker and containerd.
pub const DEFAULT_CAPABILITIES: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// Kernel settings that belong to an instance alone: those that Kubernetes calls safe.
pub const SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

/// Longest host name that the kernel keeps, in bytes.
pub const MAX_HOSTNAME: usize = 64;
/// Least processes that a limit leaves: a shell and what it starts.
pub const MIN_PIDS: u64 = 4;
/// Packets a second a cap may have.
pub const PACKETS: std::ops::RangeInclusive<u64> = 10..=1_000_000_000;
/// Smallest caps of the disk that a container's start survives: bytes and operations a second.
pub const MIN_DISK: (u64, u64) = (64 << 10, 10);

/// Smallest memory limit that a container's start survives, in bytes.
pub const MIN_MEMORY: u64 = 4 << 20;
/// Smallest CPU limit the kernel's bandwidth control takes, in thousandths.
pub const MIN_CPU_MILLI: u64 = 10;
/// Bandwidth a cap may have, in bits per second: 1 kbit/s to 1 Pbit/s (the range of Kubernetes' annotations).
pub const BANDWIDTH: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;
/// Bytes of file contents an instance may carry.
pub const MAX_FILE_BYTES: usize = 16 << 20;

/// Says everything that is wrong with a specification, or nothing.
pub fn instance(spec: &InstanceSpec) -> Result<(), Fault> {
    let mut faults = Vec::new();
    let mut note = |fault: Result<(), String>| faults.extend(fault.err());
    note(check_subdomain("instance name", &spec.name).map_err(|e| e.to_string()));
    if let Some(hostname) = &spec.hostname {
        note(check_subdomain("hostname", hostname).map_err(|e| e.to_string()));
        let full = match spec.domain.as_ref().filter(|_| spec.full_hostname) {
            Some(domain) => format!("{hostname}.{domain}"),
            None => hostname.clone(),
        };
        if full.len() > MAX_HOSTNAME {
            note(Err(format!("host name \"{full}\" is longer than {MAX_HOSTNAME} bytes")));
        }
    }
    if let Some(domain) = &spec.domain {
        note(check_subdomain("domain", domain).map_err(|e| e.to_string()));
    }
    for name in spec.sysctls.keys().filter(|name| !SYSCTLS.contains(&name.as_str())) {
        note(Err(sysctl_refusal(name)));
    }
    check_limits(&spec.limits, &mut note);
    note(encrypts_disk(&spec.annotations).map(drop));
    note(spec.core_pattern.as_deref().map_or(Ok(()), check_core_pattern));
    if !spec.containers.iter().any(|container| container.role == Role::Main) {
        note(Err("it has no container".to_owned()));
    }
    let order = |role: Role| match role {
        Role::Init | Role::Sidecar => 0,
        Role::Main => 1,
        Role::Debug => 2,
    };
    if !spec.containers.is_sorted_by_key(|container| order(container.role)) {
        note(Err("init containers and sidecars must come before the main containers".to_owned()));
    }
    let mut volumes = HashSet::new();
    for volume in &spec.volumes {
        note(check_label("volume name", &volume.name).map_err(|e| e.to_string()));
        if !volumes.insert(volume.name.as_str()) {
            note(Err(format!("volume \"{}\" is given twice", volume.name)));
        }
        note(check_volume(volume));
    }
    let mut names = HashSet::new();
    for container in &spec.containers {
        if !names.insert(container.name.as_str()) {
            note(Err(format!("container \"{}\" is given twice", container.name)));
        }
        check_container(container, &volumes, &mut note);
    }
    let containers: Vec<&str> = spec.containers.iter().map(|container| container.name.as_str()).collect();
    crate::logs::check(&spec.logs, &containers).into_iter().for_each(|fault| note(Err(fault)));
    for (what, value) in
        [("ingress", spec.network.ingress_bits_per_second), ("egress", spec.network.egress_bits_per_second)]
    {
        if value.is_some_and(|bits| !BANDWIDTH.contains(&bits)) {
            note(Err(format!("{what} bandwidth must be between 1k and 1P bits per second")));
        }
    }
    for (what, value) in
        [("ingress", spec.network.ingress_packets_per_second), ("egress", spec.network.egress_packets_per_second)]
    {
        if value.is_some_and(|packets| !PACKETS.contains(&packets)) {
            note(Err(format!("{what} packets must be between {} and {} a second", PACKETS.start(), PACKETS.end())));
        }
    }
    match faults.is_empty() {
        true => Ok(()),
        false => Err(Fault::new(
            ErrorKind::Invalid,
            "InvalidInstance",
            format!("instance \"{}\" is not valid: {}", spec.name, faults.join("; ")),
        )),
    }
}

fn check_volume(volume: &Volume) -> Result<(), String> {
    let name = &volume.name;
    let files = match &volume.source {
        VolumeSource::Files(files) => files,
        VolumeSource::EmptyDir { .. } => return Ok(()),
        VolumeSource::Nfs { server, path, .. } => {
            return check_nfs(server, path).map_err(|why| format!("volume \"{name}\": nfs: {why}"));
        }
        VolumeSource::Image { reference, .. } => {
            return ImageRef::parse(reference).map(drop).map_err(|error| format!("volume \"{name}\": {error}"));
        }
    };
    let bytes: usize = files.iter().map(|file| file.base64.len() / 4 * 3).sum();
    if bytes > MAX_FILE_BYTES {
        return Err(format!("volume \"{name}\" holds more than {MAX_FILE_BYTES} bytes"));
    }
    // Names that begin so are those of the volume's own bookkeeping, as under Kubernetes.
    let fits = |path: &str| relative_path_is_safe(path) && !path.starts_with("..");
    match files.iter().find(|file| !fits(&file.path)) {
        Some(file) => Err(format!(
            "volume \"{name}\": path \"{}\" must be relative, without \"..\" and not begin with it",
            file.path
        )),
        None => Ok(()),
    }
}

/// Longest path on a server.
const LONGEST_PATH: usize = 1024;

fn check_nfs(server: &str, path: &str) -> Result<(), String> {
    if joey_model::id::check_subdomain("server", &server.to_ascii_lowercase()).is_err() {
        return Err(format!("server \"{server}\" is neither a host's name nor an IPv4 address"));
    }
    let plain = path.starts_with('/') && path.len() <= LONGEST_PATH && !path.contains(|c: char| c.is_control());
    if plain { Ok(()) } else { Err(format!("path \"{}\" is not absolute", path.escape_debug())) }
}

fn check_mount(container: &str, mount: &Mount, volumes: &HashSet<&str>) -> Result<(), String> {
    let wrong = |what: String| Err(format!("container \"{container}\": {what}"));
    if !volumes.contains(mount.volume.as_str()) {
        return wrong(format!("there is no volume \"{}\"", mount.volume));
    }
    if !mount.path.starts_with('/') || mount.path.split('/').any(|part| part == "..") {
        return wrong(format!("mount path \"{}\" must be absolute and without \"..\"", mount.path));
    }
    if mount.sub_path.is_some() && mount.sub_path_expr.is_some() {
        return wrong(format!("its mount at {} has both a path and an expression within the volume", mount.path));
    }
    // What an expression leads to is looked at when its variables are known.
    match mount.sub_path.as_ref().filter(|path| !relative_path_is_safe(path)) {
        Some(path) => wrong(format!("path \"{path}\" within its volume must be relative and without \"..\"")),
        None => Ok(()),
    }
}

/// Takes new contents of volumes of files into a specification; everything else of its volumes stays as it is.
pub fn renew_files(spec: &mut InstanceSpec, volumes: &[Volume]) -> Result<(), Fault> {
    for new in volumes {
        let known = spec.volumes.iter_mut().find(|volume| volume.name == new.name);
        let refused = match known {
            None => Err(format!("there is no volume \"{}\"", new.name)),
            Some(volume) => match (&mut volume.source, &new.source) {
                (VolumeSource::Files(files), VolumeSource::Files(renewed)) => {
                    check_volume(new).map(|()| files.clone_from(renewed))
                }
                _ => Err(format!("volume \"{}\": only contents of files change in a living instance", new.name)),
            },
        };
        refused.map_err(|what| {
            let message = format!("instance \"{}\": {what}", spec.name);
            Fault::new(ErrorKind::Invalid, "InvalidInstance", message)
                .with_hint("create a new instance to change anything else")
        })?;
    }
    Ok(())
}

fn check_container(container: &ContainerSpec, volumes: &HashSet<&str>, note: &mut impl FnMut(Result<(), String>)) {
    let name = &container.name;
    note(check_label("container name", name).map_err(|e| e.to_string()));
    if container.held.is_none() {
        note(ImageRef::parse(&container.image).map(drop).map_err(|e| format!("container \"{name}\": {e}")));
    }
    if container.resources.memory_bytes.is_some_and(|bytes| bytes < MIN_MEMORY) {
        note(Err(format!("container \"{name}\": a memory limit must be at least 4Mi")));
    }
    if container.resources.cpu_milli.is_some_and(|milli| milli < MIN_CPU_MILLI) {
        note(Err(format!("container \"{name}\": a CPU limit must be at least 10m")));
    }
    for variable in &container.env {
        if variable.name.is_empty() || variable.name.contains(['=', '\0']) {
            note(Err(format!("container \"{name}\": \"{}\" is no name for a variable", variable.name)));
        }
        if variable.value.is_some() == variable.address {
            note(Err(format!("container \"{name}\": variable \"{}\" needs a value or an address", variable.name)));
        }
    }
    for mount in &container.mounts {
        note(check_mount(name, mount, volumes));
    }
    check_lifecycle(container, note);
    for capability in container.security.add_capabilities.iter().filter(|name| !may_trace(container.role, name)) {
        note(check_capability(capability).map_err(|fault| format!("container \"{name}\": {fault}")));
    }
    if container.restart_rules.iter().any(|rule| rule.exit_codes.is_empty()) {
        note(Err(format!("container \"{name}\": a restart rule needs exit codes")));
    }
    if container.resources.pids.is_some_and(|pids| pids < MIN_PIDS) {
        note(Err(format!("container \"{name}\": a limit of processes must be at least {MIN_PIDS}")));
    }
}

/// Whoever is there to look on may trace what it sees: processes of its own Pod.
pub fn may_trace(role: Role, capability: &str) -> bool {
    role == Role::Debug && capability.strip_prefix("CAP_").unwrap_or(capability) == "SYS_PTRACE"
}

/// Why a capability beyond the default set is refused, and what to do instead.
pub fn check_capability(capability: &str) -> Result<(), String> {
    let name = capability.strip_prefix("CAP_").unwrap_or(capability);
    if DEFAULT_CAPABILITIES.contains(&name) {
        return Ok(());
    }
    let instead = match name {
        "ALL" => "name those of the default set that are needed",
        "SYS_PTRACE" => {
            "a process may trace those of its own user without it; a debug container with a target sees the others"
        }
        "NET_ADMIN" => "caps are set by annotations, kernel settings of the network by safe sysctls",
        "SYS_ADMIN" => "volumes are mounted by the specification",
        "SYS_TIME" => "the host keeps the time",
        "SYS_MODULE" => "the host loads what it needs",
        "SYS_RESOURCE" => "limits are set by the specification",
        "IPC_LOCK" => "memory is never swapped where there is a memory limit",
        "SYS_NICE" => "shares of the CPU follow its limits",
        _ => "run without it",
    };
    let known = DEFAULT_CAPABILITIES.join(", ");
    Err(format!("capability {capability} is not in the default set and cannot be added; {instead} (default: {known})"))
}

/// Why a kernel setting is refused, and what to do instead.
pub fn sysctl_refusal(name: &str) -> String {
    let instead = match name.split('.').next() {
        Some("net") => "it is the host's as well, or may harm other instances",
        _ => "it is the host's",
    };
    format!("sysctl {name} is not safe to set: {instead}; safe ones are {}", SYSCTLS.join(", "))
}

fn check_limits(limits: &Limits, note: &mut impl FnMut(Result<(), String>)) {
    let least = [
        (limits.memory_bytes, MIN_MEMORY, "a memory limit must be at least 4Mi"),
        (limits.cpu_milli, MIN_CPU_MILLI, "a CPU limit must be at least 10m"),
        (limits.pids, MIN_PIDS, "a limit of processes must be at least 4"),
        (limits.disk_bytes_per_second, MIN_DISK.0, "a cap of the disk must be at least 64Ki bytes a second"),
        (limits.disk_operations_per_second, MIN_DISK.1, "a cap of the disk must be at least 10 operations a second"),
    ];
    for (value, least, fault) in least {
        if value.is_some_and(|value| value < least) {
            note(Err(fault.to_owned()));
        }
    }
}

fn check_lifecycle(container: &ContainerSpec, note: &mut impl FnMut(Result<(), String>)) {
    let name = &container.name;
    let lifecycle = &container.lifecycle;
    for (kind, probe) in
        [("startup", &lifecycle.startup), ("liveness", &lifecycle.liveness), ("readiness", &lifecycle.readiness)]
    {
        let Some(probe) = probe else { continue };
        let counts = [probe.timeout_seconds, probe.period_seconds, probe.success_threshold, probe.failure_threshold];
        if counts.contains(&0) {
            note(Err(format!("container \"{name}\": times and thresholds of its {kind} probe must be at least 1")));
        }
        if matches!(probe.action, Action::Sleep { .. }) {
            note(Err(format!("container \"{name}\": a sleep tells nothing: its {kind} probe needs another action")));
        }
    }
    let probes = [&lifecycle.startup, &lifecycle.liveness, &lifecycle.readiness].into_iter().flatten();
    let hooks = [&lifecycle.post_start, &lifecycle.pre_stop].into_iter().flatten();
    for action in probes.map(|probe| &probe.action).chain(hooks) {
        let (Action::HttpGet(HttpGet { host, .. }) | Action::TcpSocket { host, .. }) = action else { continue };
        if let Some(host) = host.as_deref().filter(|host| !host.is_empty() && host.parse::<IpAddr>().is_err()) {
            note(Err(format!("container \"{name}\": host \"{host}\" of a probe or hook must be an IP address")));
        }
    }
    for (kind, hook) in [("preStart", &lifecycle.pre_start), ("preOnline", &lifecycle.pre_online)] {
        let checked = hook.as_ref().map_or(Ok(()), crate::hooks::check);
        note(checked.map_err(|fault| format!("container \"{name}\": its {kind} hook: {fault}")));
    }
    if matches!(container.role, Role::Init | Role::Debug)
        && *lifecycle != (Lifecycle { stop_signal: lifecycle.stop_signal.clone(), ..Lifecycle::default() })
    {
        note(Err(format!(
            "container \"{name}\": an init or debug container has no probes and no hooks; a sidecar has"
        )));
    }
    let words = &container.last_words.path;
    if !words.starts_with('/') || !relative_path_is_safe(words.trim_start_matches('/')) {
        note(Err(format!(
            "container \"{name}\": \"{words}\" is no file for last words: it must be absolute and without \"..\""
        )));
    }
}

/// Whether a path stays below the directory it is joined to.
pub fn relative_path_is_safe(path: &str) -> bool {
    !path.is_empty()
        && !path.starts_with('/')
        && !path.contains('\0')
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_faults_at_once() {
        let spec: InstanceSpec = serde_json::from_value(serde_json::json!({
            "name": "Web", "containers": [{"name": "a_b", "image": "Nginx", "resources": {"memoryBytes": 1},
            "mounts": [{"volume": "v", "path": "x"}], "security": {"addCapabilities": ["SYS_ADMIN"]},
            "lifecycle": {"liveness": {"action": {"sleep": {"seconds": 1}}, "periodSeconds": 0},
                "readiness": {"action": {"tcpSocket": {"host": "db.example.org", "port": 80}}},
                "preStart": {"command": []}},
            "lastWords": {"path": "/a/../b"}}, {"name": "late", "image": "a", "role": "Init",
            "lifecycle": {"preStop": {"sleep": {"seconds": 1}}}}],
            "network": {"egressBitsPerSecond": 5, "ingressPacketsPerSecond": 1}, "hostname": "x".repeat(65),
            "sysctls": {"kernel.msgmax": "1"}, "limits": {"pids": 1, "diskBytesPerSecond": 1}
        }))
        .unwrap();
        let fault = instance(&spec).unwrap_err();
        for part in [
            "\"Web\"",
            "a_b",
            "Nginx",
            "4Mi",
            "no volume \"v\"",
            "absolute",
            "SYS_ADMIN",
            "volumes are mounted by the specification",
            "egress",
            "ingress packets",
            "longer than 64",
            "kernel.msgmax is not safe",
            "limit of processes",
            "64Ki",
            "at least 1",
            "tells nothing",
            "host \"db.example.org\" of a probe",
            "preStart hook: it names no program",
            "last words",
            "no hooks",
            "before the main",
        ] {
            assert!(fault.message.contains(part), "{part} in {}", fault.message);
        }
        let fine: InstanceSpec = serde_json::from_value(
            serde_json::json!({"name": "web", "containers": [{"name": "web", "image": "nginx"}]}),
        )
        .unwrap();
        assert_eq!(instance(&fine), Ok(()));
    }

    #[test]
    fn paths() {
        assert!(relative_path_is_safe("a/b.c"));
        for bad in ["", "/a", "../a", "a/../b", "a//b", "a/", "a\0b", "."] {
            assert!(!relative_path_is_safe(bad), "{bad}");
        }
    }
}
