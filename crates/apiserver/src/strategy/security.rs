//! What a Pod may not ask for: a closed default that keeps tenants off the host. Each refusal names a way out.

use joey_api::validate::DEFAULT_CAPABILITIES;
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
    for (index, volume) in list(spec, "/volumes").iter().enumerate() {
        if volume.get("hostPath").is_some() {
            why.push(format!(
                "spec.volumes[{index}].hostPath (volume \"{}\") is not allowed; use emptyDir, configMap or secret",
                text(volume, "/name")
            ));
        }
    }
    for kind in ["initContainers", "containers"] {
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
        let word = capability.as_str().unwrap_or_default();
        if !DEFAULT_CAPABILITIES.contains(&word.trim_start_matches("CAP_")) {
            why.push(format!(
                "{field}.securityContext.capabilities.add (container \"{name}\") must not include \"{word}\"; allowed are {}",
                DEFAULT_CAPABILITIES.join(", ")
            ));
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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
