//! Checks of what users send, all faults at once, before anything is stored.

use std::collections::HashSet;

use joey_model::id::{check_label, check_subdomain};
use joey_model::{ErrorKind, Fault, ImageRef};

use crate::instance::{ContainerSpec, InstanceSpec, VolumeSource};
use crate::lifecycle::{Action, Lifecycle, Role};

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
        note(check_label("hostname", hostname).map_err(|e| e.to_string()));
    }
    if !spec.containers.iter().any(|container| container.role == Role::Main) {
        note(Err("it has no container".to_owned()));
    }
    if !spec.containers.is_sorted_by_key(|container| container.role == Role::Main) {
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
    for (what, value) in
        [("ingress", spec.network.ingress_bits_per_second), ("egress", spec.network.egress_bits_per_second)]
    {
        if value.is_some_and(|bits| !BANDWIDTH.contains(&bits)) {
            note(Err(format!("{what} bandwidth must be between 1k and 1P bits per second")));
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

fn check_volume(volume: &crate::instance::Volume) -> Result<(), String> {
    let VolumeSource::Files(files) = &volume.source else { return Ok(()) };
    let bytes: usize = files.iter().map(|file| file.base64.len() / 4 * 3).sum();
    if bytes > MAX_FILE_BYTES {
        return Err(format!("volume \"{}\" holds more than {MAX_FILE_BYTES} bytes", volume.name));
    }
    match files.iter().find(|file| !relative_path_is_safe(&file.path)) {
        Some(file) => {
            Err(format!("volume \"{}\": path \"{}\" must be relative and without \"..\"", volume.name, file.path))
        }
        None => Ok(()),
    }
}

fn check_container(container: &ContainerSpec, volumes: &HashSet<&str>, note: &mut impl FnMut(Result<(), String>)) {
    let name = &container.name;
    note(check_label("container name", name).map_err(|e| e.to_string()));
    note(ImageRef::parse(&container.image).map(drop).map_err(|e| format!("container \"{name}\": {e}")));
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
        if !volumes.contains(mount.volume.as_str()) {
            note(Err(format!("container \"{name}\": there is no volume \"{}\"", mount.volume)));
        }
        if !mount.path.starts_with('/') || mount.path.split('/').any(|part| part == "..") {
            note(Err(format!(
                "container \"{name}\": mount path \"{}\" must be absolute and without \"..\"",
                mount.path
            )));
        }
    }
    check_lifecycle(container, note);
    for capability in &container.security.add_capabilities {
        if !DEFAULT_CAPABILITIES.contains(&capability.as_str()) && capability != "ALL" {
            note(Err(format!(
                "container \"{name}\": capability {capability} is not in the default set and cannot be added"
            )));
        } else if capability == "ALL" {
            note(Err(format!("container \"{name}\": not every capability can be added; name those you need")));
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
    if container.role == Role::Init
        && *lifecycle != (Lifecycle { stop_signal: lifecycle.stop_signal.clone(), ..Lifecycle::default() })
    {
        note(Err(format!("container \"{name}\": an init container has no probes and no hooks; a sidecar has")));
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
            "lifecycle": {"liveness": {"action": {"sleep": {"seconds": 1}}, "periodSeconds": 0}},
            "lastWords": {"path": "/a/../b"}}, {"name": "late", "image": "a", "role": "Init",
            "lifecycle": {"preStop": {"sleep": {"seconds": 1}}}}],
            "network": {"egressBitsPerSecond": 5}
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
            "egress",
            "at least 1",
            "tells nothing",
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
