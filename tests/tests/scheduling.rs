//! Point 1, what a Pod says of its place: gates, priority, other Pods, room; and what of it stays as it was.

use joey_tests::joey::pod;
use joey_tests::{Joey, Outcome, Registry, holds, seconds, wait_until};
use serde_json::{Value, json};

/// What kubectl says of an object that the API server refuses.
fn refused(joey: &Joey, object: &Value) -> String {
    joey.kubectl_with_input(&["apply", "-f", "-"], &object.to_string()).fails(1)
}

fn patch(joey: &Joey, name: &str, change: &Value, further: &[&str]) -> Outcome {
    let change = change.to_string();
    joey.kubectl(&[&["patch", "pod", name, "-p", &change][..], further].concat())
}

/// Waits until events about a Pod hold `part`.
fn wait_for_event(joey: &Joey, name: &str, part: &str) {
    let field = format!("involvedObject.name={name}");
    wait_until(&format!("{name} is told: {part}"), seconds(20), || {
        let events = joey.kubectl(&["get", "events", "--field-selector", &field]).ok();
        holds(events.contains("FailedScheduling") && events.contains(part), events)
    });
    assert_eq!(joey.get("pod", name)["status"]["phase"], "Pending");
}

#[test]
fn a_gated_pod_waits_until_its_gates_are_gone() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let mut object = pod("held", &registry.demo(), &["sleep", "1000"]);
    object["spec"]["schedulingGates"] = json!([{"name": "example.org/quota"}, {"name": "example.org/licence"}]);
    joey.apply(&object);
    // One that comes later runs meanwhile, so that the scheduler has seen both.
    let free = joey.run_pod("free", &registry.demo(), &["sleep", "1000"]);
    let held = joey.get("pod", "held");
    assert!(held["spec"]["nodeName"].is_null(), "{held}");
    assert_eq!(held["status"]["conditions"][0]["reason"], "SchedulingGated", "{held}");
    assert!(joey.kubectl(&["get", "pod", "held"]).ok().contains("SchedulingGated"));

    let node = &free["spec"]["nodeName"];
    let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "held"},
        "target": {"kind": "Node", "name": node}});
    let path = "/api/v1/namespaces/default/pods/held/binding";
    let said = joey.kubectl_with_input(&["create", "--raw", path, "-f", "-"], &binding.to_string()).fails(1);
    assert!(said.contains("pod held has non-empty .spec.schedulingGates"), "{said}");
    let more = json!([{"op": "add", "path": "/spec/schedulingGates/-", "value": {"name": "example.org/more"}}]);
    let said = patch(&joey, "held", &more, &["--type=json"]).fails(1);
    assert!(said.contains("only deletion is allowed, but found new scheduling gate 'example.org/more'"), "{said}");
    object["metadata"]["name"] = json!("bound");
    object["spec"]["nodeName"] = node.clone();
    let said = refused(&joey, &object);
    assert!(said.contains("cannot be set until all schedulingGates have been cleared"), "{said}");

    patch(&joey, "held", &json!([{"op": "remove", "path": "/spec/schedulingGates/0"}]), &["--type=json"]).ok();
    assert!(joey.get("pod", "held")["spec"]["nodeName"].is_null(), "one gate is left");
    patch(&joey, "held", &json!([{"op": "remove", "path": "/spec/schedulingGates"}]), &["--type=json"]).ok();
    joey.wait_for("held", "Ready", seconds(30));
}

#[test]
fn what_the_scheduler_cannot_heed_is_refused() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    let nowhere = json!({"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"topologyKey": "", "labelSelector": {"matchLabels": {"a": "b"}}}]}});
    for (field, value, part) in [
        ("priorityClassName", json!("high"), "no PriorityClass with name high was found"),
        ("priority", json!(7), "the integer value of priority (7) must not be provided"),
        ("schedulingGroup", json!({"podGroupName": "gang"}), "hold them back by schedulingGates"),
        ("affinity", nowhere, "topologyKey: Required value"),
    ] {
        let mut object = pod("refused", &image, &["true"]);
        object["spec"][field] = value;
        let said = refused(&joey, &object);
        assert!(said.contains(part), "{field}: {said}");
        assert!(joey.get("pod", "refused").is_null(), "{field}");
    }
    let mut object = pod("critical", &image, &["sleep", "1000"]);
    object["spec"]["priorityClassName"] = json!("system-node-critical");
    joey.apply(&object);
    assert_eq!(joey.wait_for("critical", "Ready", seconds(30))["spec"]["priority"], 2_000_001_000);
    joey.apply(&object);
}

#[test]
fn other_pods_keep_one_from_a_node_and_let_it_there() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    let required = |kind: &str, set: &str| {
        json!({kind: {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"set": set}}}]}})
    };
    let member = |name: &str, set: &str, affinity: Value| {
        let mut object = pod(name, &image, &["sleep", "1000"]);
        object["metadata"]["labels"]["set"] = json!(set);
        object["spec"]["affinity"] = affinity;
        object
    };
    joey.apply(&member("first", "db", required("podAntiAffinity", "db")));
    joey.wait_for("first", "Ready", seconds(30));
    joey.apply(&member("second", "db", required("podAntiAffinity", "db")));
    wait_for_event(&joey, "second", "0/1 nodes are available: 1 node(s) didn't match pod anti-affinity rules.");
    joey.delete_pod("first");
    joey.wait_for("second", "Ready", seconds(30));

    joey.apply(&member("guest", "none", required("podAffinity", "host")));
    wait_for_event(&joey, "guest", "1 node(s) didn't match pod affinity rules");
    joey.apply(&member("host", "host", json!({})));
    joey.wait_for("guest", "Ready", seconds(30));
}

#[test]
fn all_that_a_pod_asks_for_takes_room() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    let sidecar = json!([{"name": "side", "image": image, "command": ["sleep", "1000"], "restartPolicy": "Always",
        "resources": {"requests": {"cpu": "5k"}}}]);
    for (name, field, value) in [
        ("overhead", "overhead", json!({"cpu": "5k"})),
        ("whole", "resources", json!({"requests": {"cpu": "5k"}})),
        ("sidecar", "initContainers", sidecar),
    ] {
        let mut object = pod(name, &image, &["sleep", "1000"]);
        object["spec"][field] = value;
        joey.apply(&object);
        wait_for_event(&joey, name, "1 Insufficient cpu");
    }
    // The node tells its disk, and so what asks for more of it waits.
    let mut object = pod("hoards", &image, &["sleep", "1000"]);
    object["spec"]["containers"][0]["resources"] = json!({"requests": {"ephemeral-storage": "9Pi"}});
    joey.apply(&object);
    wait_for_event(&joey, "hoards", "1 Insufficient ephemeral-storage");
}

#[test]
fn what_is_fixed_for_the_life_of_a_pod_is_not_taken() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let mut object = pod("fixed", &registry.demo(), &["sleep", "1000"]);
    object["metadata"]["annotations"] = json!({"joey.dev/pids": "100"});
    joey.apply(&object);
    joey.wait_for("fixed", "Ready", seconds(30));
    for (change, key) in [
        ("joey.dev/pids=200", "joey.dev/pids"),
        ("joey.dev/pids-", "joey.dev/pids"),
        ("kubernetes.io/egress-bandwidth=10M", "kubernetes.io/egress-bandwidth"),
        ("joey.dev/log-sink=here", "joey.dev/log-sink"),
    ] {
        let said = joey.kubectl(&["annotate", "--overwrite", "pod", "fixed", change]).fails(1);
        let wanted = format!("metadata.annotations[{key}]: Forbidden: it is read when the Pod begins");
        assert!(said.contains(&wanted) && said.contains("create it with another"), "{change}: {said}");
    }
    let change = json!({"metadata": {"annotations": {"joey.dev/pids": "200"}}});
    let said = patch(&joey, "fixed", &change, &["--subresource=status"]).fails(1);
    assert!(said.contains("joey.dev/pids"), "{said}");
    joey.kubectl(&["annotate", "pod", "fixed", "note=1"]).ok();
    joey.apply(&object);
    assert_eq!(joey.get("pod", "fixed")["metadata"]["annotations"]["joey.dev/pids"], "100");

    let whole = json!({"spec": {"resources": {"limits": {"memory": "96Mi"}}}});
    let said = patch(&joey, "fixed", &whole, &["--subresource=resize"]).fails(1);
    assert!(said.contains("the resources of a Pod as a whole may not change"), "{said}");
}
