//! Tests of the status of Pods.

use super::*;

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn pod(spec: Value) -> Pod {
    let mut whole = json!({ "containers": [{ "name": "a", "image": "img:a" }, { "name": "b", "image": "img:b" }] });
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    serde_json::from_value(json!({ "metadata": { "name": "web", "generation": 3 }, "spec": whole })).unwrap()
}

fn instance(phase: &str, containers: &[(&str, Value)]) -> Instance {
    let containers: Vec<Value> = containers
        .iter()
        .map(|(name, state)| {
            let waits = state.get("waiting").is_some();
            let id = if waits { String::new() } else { format!("joey://i/{name}/0") };
            let runs = state.get("running").is_some();
            json!({ "name": name, "state": state, "restartCount": 0, "image": "img", "containerId": id,
                    "started": runs, "ready": runs })
        })
        .collect();
    serde_json::from_value(json!({
        "id": "i", "revision": 1, "createdAt": "2024-01-01T00:00:00Z",
        "spec": { "name": "web.shop", "containers": [] },
        "status": { "phase": phase, "address": "10.0.0.9", "containers": containers },
    }))
    .unwrap()
}

fn running() -> Value {
    json!({ "running": { "startedAt": "2024-01-01T00:00:01.75Z", "pid": 7 } })
}

fn waits(reason: &str) -> Value {
    json!({ "waiting": { "reason": reason, "message": "" } })
}

fn ended(code: i32) -> Value {
    let reason = if code == 0 { "Completed" } else { "Error" };
    json!({ "terminated": { "exitCode": code, "reason": reason, "finishedAt": "2024-01-01T00:00:09Z" } })
}

fn status(pod: &Pod, before: &PodStatus, instance: &Instance) -> PodStatus {
    of_instance(pod, before, instance, "192.0.2.1".parse().unwrap(), at("2024-01-01T00:01:00.5Z"))
}

fn condition<'a>(status: &'a PodStatus, kind: &str) -> &'a PodCondition {
    status.conditions.iter().flatten().find(|condition| condition.type_ == kind).unwrap()
}

#[test]
fn phases() {
    for (phase, containers, wanted) in [
        ("Pending", vec![], "Pending"),
        ("Starting", vec![("a", running())], "Pending"),
        ("Running", vec![("a", running()), ("b", waits("CrashLoopBackOff"))], "Running"),
        ("Succeeded", vec![("a", ended(0)), ("b", ended(0))], "Succeeded"),
        ("Failed", vec![("a", ended(0)), ("b", ended(3))], "Failed"),
        ("Terminating", vec![], "Pending"),
        ("Terminating", vec![("a", waits("ErrImagePull"))], "Pending"),
        ("Terminating", vec![("a", running()), ("b", running())], "Running"),
        ("Terminating", vec![("a", running()), ("b", ended(1))], "Running"),
        ("Terminating", vec![("a", ended(0)), ("b", ended(0))], "Succeeded"),
        ("Terminating", vec![("a", ended(0)), ("b", ended(137))], "Failed"),
    ] {
        let made = status(&pod(json!({})), &PodStatus::default(), &instance(phase, &containers));
        assert_eq!(made.phase.as_deref(), Some(wanted), "{phase} {containers:?}");
        assert_eq!(is_terminal(&made), matches!(wanted, "Succeeded" | "Failed"));
    }
}

#[test]
fn a_running_pod() {
    let made =
        status(&pod(json!({})), &PodStatus::default(), &instance("Running", &[("a", running()), ("b", running())]));
    assert_eq!((made.pod_ip.as_deref(), made.host_ip.as_deref()), (Some("10.0.0.9"), Some("192.0.2.1")));
    assert_eq!(made.observed_generation, Some(3));
    assert_eq!(made.start_time, Some(Time(at("2024-01-01T00:01:00Z"))), "whole seconds");
    for kind in ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"] {
        assert_eq!(condition(&made, kind).status, "True", "{kind}");
    }
    let containers = made.container_statuses.unwrap();
    assert!(containers.iter().all(|container| container.ready && container.started == Some(true)));
    assert_eq!(containers[0].container_id.as_deref(), Some("joey://i/a/0"));
    let began = containers[0].state.as_ref().unwrap().running.as_ref().unwrap().started_at.clone();
    assert_eq!(began, Some(Time(at("2024-01-01T00:00:01Z"))));
}

#[test]
fn what_is_not_ready_is_named() {
    let made = status(&pod(json!({})), &PodStatus::default(), &instance("Starting", &[("b", waits("ErrImagePull"))]));
    let ready = condition(&made, "Ready");
    assert_eq!((ready.status.as_str(), ready.reason.as_deref()), ("False", Some("ContainersNotReady")));
    assert_eq!(ready.message.as_deref(), Some("containers with unready status: [a b]"));
    let reasons: Vec<_> = made
        .container_statuses
        .unwrap()
        .into_iter()
        .map(|container| (container.name, container.image, container.state.unwrap().waiting.unwrap().reason))
        .collect();
    // One of them the instance does not know of yet.
    assert_eq!(reasons[0], ("a".into(), "img:a".into(), Some("ContainerCreating".into())));
    assert_eq!(reasons[1], ("b".into(), "img".into(), Some("ErrImagePull".into())));
}

#[test]
fn an_ended_pod_is_not_ready() {
    let both = |code| instance(if code == 0 { "Succeeded" } else { "Failed" }, &[("a", ended(code)), ("b", ended(0))]);
    for (code, reason) in [(0, "PodCompleted"), (7, "PodFailed")] {
        let made = status(&pod(json!({})), &PodStatus::default(), &both(code));
        for kind in ["Ready", "ContainersReady"] {
            let found = condition(&made, kind);
            assert_eq!((found.status.as_str(), found.reason.as_deref()), ("False", Some(reason)));
        }
        assert_eq!(condition(&made, "PodReadyToStartContainers").status, "False");
        let run = made.container_statuses.unwrap().remove(0).state.unwrap().terminated.unwrap();
        assert_eq!(run.exit_code, code);
    }
}

#[test]
fn times_stay_until_something_changes() {
    let pod = pod(json!({}));
    let both = |state: Value| instance("Running", &[("a", running()), ("b", state)]);
    let host = "192.0.2.1".parse().unwrap();
    let first = of_instance(&pod, &PodStatus::default(), &both(running()), host, at("2024-01-01T00:00:00Z"));
    let second = of_instance(&pod, &first, &both(running()), host, at("2024-01-01T00:00:10Z"));
    assert_eq!(first, second);
    let third = of_instance(&pod, &second, &both(waits("CrashLoopBackOff")), host, at("2024-01-01T00:00:20Z"));
    assert_eq!(third.start_time, first.start_time);
    assert_eq!(condition(&third, "Ready").last_transition_time, Some(Time(at("2024-01-01T00:00:20Z"))));
    assert_eq!(condition(&third, "Initialized").last_transition_time, Some(Time(at("2024-01-01T00:00:00Z"))));
}

#[test]
fn readiness_gates_are_waited_for() {
    let pod = pod(json!({ "readinessGates": [{ "conditionType": "example.org/ok" }] }));
    let instance = instance("Running", &[("a", running()), ("b", running())]);
    let made = status(&pod, &PodStatus::default(), &instance);
    assert_eq!(condition(&made, "Ready").reason.as_deref(), Some("ReadinessGatesNotReady"));
    assert_eq!(condition(&made, "ContainersReady").status, "True");
    let before: PodStatus =
        serde_json::from_value(json!({ "conditions": [{ "type": "example.org/ok", "status": "True" }] })).unwrap();
    assert_eq!(condition(&status(&pod, &before, &instance), "Ready").status, "True");
}

#[test]
fn refused_and_waiting_pods() {
    let now = at("2024-01-01T00:00:00Z");
    let refused = failed(&pod(json!({})), &PodStatus::default(), "UnsupportedPod", "why", now);
    assert!(is_terminal(&refused));
    assert_eq!((refused.reason.as_deref(), refused.message.as_deref()), (Some("UnsupportedPod"), Some("why")));
    let waiting = super::waits(&pod(json!({})), &PodStatus::default(), "CreateContainerConfigError", "why", now);
    assert_eq!(waiting.phase.as_deref(), Some("Pending"));
    assert_eq!(condition(&waiting, "Ready").reason.as_deref(), Some("ContainersNotReady"));
    assert_eq!(waiting.container_statuses.unwrap().len(), 2);
}

#[test]
fn restarts_are_counted_over_the_instances_of_a_pod() {
    let (pod, now) = (pod(json!({})), at("2024-01-01T00:00:00Z"));
    let mut ran = status(&pod, &PodStatus::default(), &instance("Running", &[("a", running())]));
    assert_eq!(restarts(&ran), BTreeMap::from([("a".to_owned(), 1)]), "the other one has not run");
    ran.container_statuses.as_mut().unwrap()[0].restart_count = 4;
    assert_eq!(restarts(&ran), BTreeMap::from([("a".to_owned(), 5)]));
    // Also where it had to wait for something before it was made again.
    let waiting = super::waits(&pod, &ran, "CreateContainerConfigError", "why", now);
    assert_eq!(restarts(&waiting), BTreeMap::from([("a".to_owned(), 5)]));
    assert_eq!(waiting.container_statuses.unwrap()[0].restart_count, 4);
}

#[test]
fn a_patch_takes_away_what_is_no_longer_said() {
    let pod = pod(json!({}));
    let both = |state: Value| instance("Running", &[("a", running()), ("b", state)]);
    let unready = status(&pod, &PodStatus::default(), &both(waits("CrashLoopBackOff")));
    let ready = status(&pod, &unready, &both(running()));
    let patch = patch(&unready, &ready);
    let own = patch["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Ready").unwrap();
    assert_eq!((&own["status"], &own["reason"], &own["message"]), (&json!("True"), &Value::Null, &Value::Null));
    assert!(own.as_object().unwrap().contains_key("reason") && own.as_object().unwrap().contains_key("message"));
    assert_eq!(patch["podIPs"], json!([{ "ip": "10.0.0.9" }]));
    let mut moved = ready.clone();
    moved.pod_ips = Some(vec![PodIP { ip: "10.0.0.10".into() }]);
    let wanted = json!([{ "ip": "10.0.0.10" }, { "ip": "10.0.0.9", "$patch": "delete" }]);
    assert_eq!(super::patch(&ready, &moved)["podIPs"], wanted);
}
