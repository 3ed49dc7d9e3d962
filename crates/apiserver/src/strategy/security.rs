//! What a Pod may not ask for: a closed default that keeps tenants off the host. Each refusal names a way out.

use joey_api::lifecycle::Role;
use joey_api::validate::{SYSCTLS, check_capability, may_trace, sysctl_refusal};
use serde_json::Value;

use crate::object::{list, text};

/// Refuses a Pod that reaches for the host; all reasons at once.
pub fn admit(pod: &Value) -> Result<(), String> {
    let Some(spec) = pod.get("spec") else { return Ok(()) };
    let mut why = Vec::new();
    for (field, instead) in [
        ("hostNetwork", "every Pod has an address of its own that the host and other Pods reach"),
        ("hostPID", "use shareProcessNamespace to see the processes of the Pod's other containers"),
        ("hostIPC", "containers of one Pod share IPC already"),
    ] {
        if spec.get(field) == Some(&Value::Bool(true)) {
            why.push(format!("spec.{field} is not allowed; {instead}"));
        }
    }
    if spec.get("hostUsers") == Some(&Value::Bool(false)) {
        why.push("spec.hostUsers: false is not allowed; leave it out and run as another user".to_owned());
    }
    let unsafe_ones = list(spec, "/securityContext/sysctls").iter().map(|one| text(one, "/name").replace('/', "."));
    for (index, name) in unsafe_ones.enumerate().filter(|(_, name)| !SYSCTLS.contains(&name.as_str())) {
        why.push(format!("spec.securityContext.sysctls[{index}]: {}", sysctl_refusal(&name)));
    }
    profile_reasons(spec, "spec", &mut why);
    for (index, volume) in list(spec, "/volumes").iter().enumerate() {
        if volume.get("hostPath").is_some() {
            why.push(format!(
                "spec.volumes[{index}].hostPath (volume \"{}\") is not allowed; use emptyDir, configMap or secret",
                text(volume, "/name")
            ));
        }
    }
    for kind in ["initContainers", "containers", "ephemeralContainers"] {
        for (index, container) in list(spec, &format!("/{kind}")).iter().enumerate() {
            container_reasons(container, &format!("spec.{kind}[{index}]"), &mut why);
        }
    }
    match why.is_empty() {
        true => Ok(()),
        false => Err(format!("violates the security default: {}", why.join("; "))),
    }
}

fn container_reasons(container: &Value, field: &str, why: &mut Vec<String>) {
    let name = text(container, "/name");
    if container.pointer("/securityContext/privileged") == Some(&Value::Bool(true)) {
        why.push(format!(
            "{field}.securityContext.privileged (container \"{name}\") is not allowed; add the capabilities it needs from \
             the default set"
        ));
    }
    for capability in list(container, "/securityContext/capabilities/add") {
        let (word, looks_on) = (capability.as_str().unwrap_or_default(), field.starts_with("spec.ephemeralContainers"));
        if looks_on && may_trace(Role::Debug, word) {
            continue;
        }
        if let Err(fault) = check_capability(word) {
            why.push(format!("{field}.securityContext.capabilities.add (container \"{name}\"): {fault}"));
        }
    }
    if !list(container, "/volumeDevices").is_empty() {
        why.push(format!(
            "{field}.volumeDevices (container \"{name}\") is not allowed; there are no raw devices, use an emptyDir"
        ));
    }
    profile_reasons(container, field, why);
    for (index, port) in list(container, "/ports").iter().enumerate() {
        if port.get("hostPort").and_then(Value::as_i64).unwrap_or(0) != 0 {
            why.push(format!(
                "{field}.ports[{index}].hostPort (container \"{name}\") is not allowed; reach the Pod at its own address"
            ));
        }
    }
    if !matches!(text(container, "/securityContext/procMount"), "" | "Default") {
        why.push(format!("{field}.securityContext.procMount (container \"{name}\") must be Default"));
    }
}

/// Filters of system calls other than the default one, and profiles that would lie on a node.
fn profile_reasons(of: &Value, field: &str, why: &mut Vec<String>) {
    let seccomp = text(of, "/securityContext/seccompProfile/type");
    if !matches!(seccomp, "" | "RuntimeDefault") {
        why.push(format!("{field}.securityContext.seccompProfile {seccomp} is not allowed; use RuntimeDefault"));
    }
    if text(of, "/securityContext/appArmorProfile/type") == "Localhost" {
        why.push(format!("{field}.securityContext.appArmorProfile Localhost is not allowed; use RuntimeDefault"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_refusal_names_a_way_out() {
        let pod = json!({"spec": {"hostUsers": false,
            "securityContext": {"sysctls": [{"name": "kernel/msgmax", "value": "1"},
                {"name": "net.ipv4.tcp_syncookies", "value": "1"}], "seccompProfile": {"type": "Unconfined"}},
            "containers": [{"name": "a", "volumeDevices": [{}], "securityContext": {
                "appArmorProfile": {"type": "Localhost"}, "capabilities": {"add": ["SYS_PTRACE", "NET_ADMIN", "NET_RAW"]}}}]}});
        let why = admit(&pod).unwrap_err();
        for part in
            ["run as another user", "kernel.msgmax", "RuntimeDefault", "emptyDir", "debug container", "annotations"]
        {
            assert!(why.contains(part), "{part} in {why}");
        }
        assert!(!why.contains("sysctls[1]") && !why.contains("NET_RAW is"), "{why}");
    }

    #[test]
    fn the_host_is_out_of_reach() {
        let pod = json!({"spec": {"hostNetwork": true, "hostPID": true, "volumes": [{"name": "v", "hostPath": {}}],
            "containers": [{"name": "a", "ports": [{"hostPort": 80}], "securityContext": {"privileged": true,
                "capabilities": {"add": ["SYS_ADMIN", "CHOWN"]}}}]}});
        let why = admit(&pod).unwrap_err();
        for part in ["hostNetwork", "hostPID", "hostPath", "hostPort", "privileged", "SYS_ADMIN", "use emptyDir"] {
            assert!(why.contains(part), "{part} in {why}");
        }
        assert_eq!(admit(&json!({"spec": {"containers": [{"name": "a"}]}})), Ok(()));
    }
}
