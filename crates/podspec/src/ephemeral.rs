//! What of a Pod changes while its instance lives: images, limits, the deadline, and ephemeral (debug) containers. The rest of a
//! Pod is fixed by the API server, and made once in the parent module.

use std::collections::BTreeMap;

use joey_api::annotations;
use joey_api::change::InstanceChange;
use joey_api::instance::{ContainerSpec, InstanceSpec};
use joey_api::lifecycle::{Held, Role};
use k8s_openapi::api::core::v1 as core;

use crate::node::Node;
use crate::objects::Objects;
use crate::{Notes, Refusal, Waits, all_containers, container, limits};

/// What a living instance has to change to be what its Pod says, debug containers apart.
pub fn changed(pod: &core::Pod, instance: &InstanceSpec) -> Result<InstanceChange, Refusal> {
    let spec = pod.spec.clone().unwrap_or_default();
    let mut notes = Notes::default();
    let mut change = InstanceChange::default();
    let limited = limits::pod_is_limited(pod, &spec);
    for (_, wanted) in all_containers(&spec) {
        let Some(now) = instance.containers.iter().find(|now| now.name == wanted.name) else { continue };
        let image = wanted.image.clone().unwrap_or_default();
        if image != now.image {
            change.images.insert(now.name.clone(), image);
        }
        let at = format!("container \"{}\": ", wanted.name);
        let resources = limits::container(&at, wanted.resources.as_ref(), limited, &mut notes);
        if resources != now.resources {
            change.resources.insert(now.name.clone(), resources);
        }
    }
    let deadline = spec.active_deadline_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    change.active_deadline_seconds = deadline.filter(|_| deadline != instance.active_deadline_seconds);
    notes.done(change).map(|(change, _)| change)
}

/// The annotations that are others than those the instance was made from, and that it cannot follow; nothing where none is.
pub fn fixed(pod: &core::Pod, instance: &InstanceSpec) -> Option<String> {
    let now = pod.metadata.annotations.iter().flat_map(pairs);
    let changed = annotations::changed(pairs(&instance.annotations), now);
    (!changed.is_empty()).then(|| format!("annotation {}: {}", changed.join(", "), annotations::FIXED))
}

fn pairs(all: &BTreeMap<String, String>) -> impl Iterator<Item = (&str, &str)> {
    all.iter().map(|(key, value)| (key.as_str(), value.as_str()))
}

/// Ephemeral containers as an instance has them.
pub fn debug(
    pod: &core::Pod,
    wanted: &[core::EphemeralContainer],
    objects: &Objects,
    node: &Node,
) -> Result<(Vec<ContainerSpec>, Waits), Refusal> {
    let spec = pod.spec.clone().unwrap_or_default();
    let security = spec.security_context.clone().unwrap_or_default();
    let mut notes = Notes { looks_on: true, ..Notes::default() };
    let mut made = Vec::new();
    for one in wanted {
        let target = one.target_container_name.clone().filter(|name| !name.is_empty());
        let alike = as_container(one.clone());
        let mut converted = container(pod, &spec, &alike, &security, objects, node, &mut notes);
        // It cannot be taken back, and others are not to wait for it.
        let faults = std::mem::take(&mut notes.faults);
        if !faults.is_empty() {
            let held = Held { reason: "CreateContainerConfigError".to_owned(), message: faults.join("; ") };
            converted = ContainerSpec { held: Some(held), ..ContainerSpec::new(&alike.name, &converted.image) };
        }
        // It is run once, and nothing is asked of it.
        made.push(ContainerSpec { role: Role::Debug, target, restart_policy: None, ..converted });
    }
    notes.done(made)
}

/// The fields that an ephemeral container shares with others, which are all but its target.
fn as_container(one: core::EphemeralContainer) -> core::Container {
    let core::EphemeralContainer {
        args,
        command,
        env,
        env_from,
        image,
        image_pull_policy,
        lifecycle,
        liveness_probe,
        name,
        ports,
        readiness_probe,
        resize_policy,
        resources,
        restart_policy,
        restart_policy_rules,
        security_context,
        startup_probe,
        stdin,
        stdin_once,
        target_container_name: _,
        termination_message_path,
        termination_message_policy,
        tty,
        volume_devices,
        volume_mounts,
        working_dir,
    } = one;
    core::Container {
        args,
        command,
        env,
        env_from,
        image,
        image_pull_policy,
        lifecycle,
        liveness_probe,
        name,
        ports,
        readiness_probe,
        resize_policy,
        resources,
        restart_policy,
        restart_policy_rules,
        security_context,
        startup_probe,
        stdin,
        stdin_once,
        termination_message_path,
        termination_message_policy,
        tty,
        volume_devices,
        volume_mounts,
        working_dir,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::convert;

    fn pod(change: impl Fn(&mut Value)) -> core::Pod {
        let mut pod = json!({"metadata": {"name": "web", "namespace": "shop", "uid": "u"}, "spec": {"containers": [
            {"name": "a", "image": "img:1", "resources": {"limits": {"memory": "64Mi"}}}, {"name": "b", "image": "img:1"}]}});
        change(&mut pod);
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn only_what_changed_is_told() {
        let node = Node::new("node", "192.0.2.1".parse().unwrap());
        let before = convert(&pod(|_| {}), &Objects::default(), &node).unwrap().spec;
        assert!(changed(&pod(|_| {}), &before).unwrap().is_empty());
        let after = pod(|pod| {
            pod["spec"]["containers"][0]["resources"]["limits"]["memory"] = "128Mi".into();
            pod["spec"]["containers"][1]["image"] = "img:2".into();
            pod["spec"]["activeDeadlineSeconds"] = 60.into();
        });
        let change = changed(&after, &before).unwrap();
        assert_eq!(change.images.into_iter().collect::<Vec<_>>(), [("b".to_owned(), "img:2".to_owned())]);
        assert_eq!(change.resources["a"].memory_bytes, Some(128 << 20));
        assert_eq!((change.resources.len(), change.active_deadline_seconds), (1, Some(60)));
    }

    #[test]
    fn annotations_that_cannot_be_followed_are_told() {
        let node = Node::new("node", "192.0.2.1".parse().unwrap());
        let annotated = |pids: &str, note: &str| {
            pod(|pod| pod["metadata"]["annotations"] = json!({"joey.dev/pids": pids, "note": note}))
        };
        let made = convert(&annotated("100", "a"), &Objects::default(), &node).unwrap().spec;
        assert_eq!(made.annotations.len(), 1, "{:?}", made.annotations);
        assert_eq!(fixed(&annotated("100", "b"), &made), None);
        let told = fixed(&annotated("200", "a"), &made).unwrap();
        assert!(told.starts_with("annotation joey.dev/pids: ") && told.contains("delete the Pod"), "{told}");
        assert!(fixed(&pod(|_| {}), &made).is_some(), "one that went is told, too");
    }

    #[test]
    fn a_debug_container_keeps_its_target() {
        let node = Node::new("node", "192.0.2.1".parse().unwrap());
        let wanted: Vec<core::EphemeralContainer> = serde_json::from_value(json!([
            {"name": "look", "image": "tools", "stdin": true, "tty": true, "targetContainerName": "a"}]))
        .unwrap();
        let (made, waits) = debug(&pod(|_| {}), &wanted, &Objects::default(), &node).unwrap();
        assert_eq!(waits, Waits::default());
        assert_eq!((made[0].role, made[0].target.as_deref()), (Role::Debug, Some("a")));
        assert!(made[0].stdin && made[0].tty);
    }
}
