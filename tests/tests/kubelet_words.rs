//! Pods in the kubelet's words: reasons, messages, pauses and conditions; what containers are told of names, amounts and name
//! servers; and that what a container leaves running ends with it.

use joey_tests::host::processes;
use joey_tests::joey::pod;
use joey_tests::{Joey, Program, Registry, holds, seconds, wait_until};
use serde_json::{Value, json};

fn scripted(name: &str, image: &str, script: &str) -> Value {
    pod(name, image, &["sh", "-c", script])
}

fn apply_all(joey: &Joey, objects: &[Value]) {
    joey.apply(&json!({"apiVersion": "v1", "kind": "List", "items": objects}));
}

/// Waits until the Pod's container waits for this reason, with these words in its message.
#[track_caller]
fn waits(joey: &Joey, name: &str, reason: &str, parts: &[&str]) {
    wait_until(&format!("{name} waits: {reason} {parts:?}"), seconds(40), || {
        let status = joey.get("pod", name)["status"].clone();
        let waiting = &status["containerStatuses"][0]["state"]["waiting"];
        let message = waiting["message"].as_str().unwrap_or_default();
        holds(waiting["reason"] == reason && parts.iter().all(|part| message.contains(part)), &status)
    });
}

/// Waits until the Pod has this phase; its status.
#[track_caller]
fn becomes(joey: &Joey, name: &str, phase: &str) -> Value {
    wait_until(&format!("{name} is {phase}"), seconds(40), || {
        let status = joey.get("pod", name)["status"].clone();
        if status["phase"] == phase { Ok(status) } else { Err(status.to_string()) }
    })
}

/// Waits until the Pod's own conditions are these, written as `TYPE=STATUS REASON`.
#[track_caller]
fn conditions(joey: &Joey, name: &str, wanted: [&str; 5]) {
    wait_until(&format!("{name} has the conditions {wanted:?}"), seconds(40), || {
        let status = joey.get("pod", name)["status"].clone();
        let all = status["conditions"].as_array().cloned().unwrap_or_default();
        let word = |condition: &Value, field: &str| condition[field].as_str().unwrap_or_default().to_owned();
        let line = |c: &Value| format!("{}={} {}", word(c, "type"), word(c, "status"), word(c, "reason"));
        let lines: Vec<String> = all.iter().map(|condition| line(condition).trim_end().to_owned()).collect();
        let same = |wanted: &&str| lines.iter().any(|line| line == wanted);
        holds(wanted.iter().all(same), &status)
    });
}

/// Pods that wait for what is not there.
fn lacking(registry: &Registry) -> [Value; 4] {
    let image = registry.demo();
    let needs = |name: &str, kind: &str, object: &str| {
        let mut made = scripted(name, &image, "echo word $WORD");
        made["spec"]["containers"][0]["env"] =
            json!([{"name": "WORD", "valueFrom": {kind: {"name": object, "key": "later"}}}]);
        made
    };
    let mut never = pod("never", &registry.image("joey/never:1"), &[]);
    never["spec"]["containers"][0]["imagePullPolicy"] = json!("Never");
    [
        pod("absent", &registry.image("joey/absent:1"), &[]),
        never,
        needs("lacks-map", "configMapKeyRef", "map"),
        needs("lacks-key", "secretKeyRef", "partial"),
    ]
}

/// The words in the column STATUS that a Pod had, one after the other.
fn columns(watch: &Program, name: &str) -> Vec<String> {
    let text = watch.output();
    let rows = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row.first() == Some(&name)).filter_map(|row| row.get(2).map(|&word| word.to_owned())).collect()
}

#[test]
fn waiting_has_its_reasons() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    let mut loops = scripted("loops", &image, "exit 1");
    loops["spec"]["restartPolicy"] = "Always".into();
    joey.apply(&loops);
    let watch = Program::start(
        &mut joey.kubectl_command(&["get", "pods", "-w", "--no-headers"]),
        &joey.scratch().join("watch"),
    );
    wait_until("the watch has begun", seconds(10), || holds(!columns(&watch, "loops").is_empty(), watch.output()));
    joey.kubectl(&["create", "secret", "generic", "partial", "--from-literal=other=x"]).ok();
    let mut rooted = pod("rooted", &image, &["true"]);
    rooted["spec"]["securityContext"] = json!({"runAsNonRoot": true});
    let mut shows = scripted("lacks-volume", &image, "cat /map/later");
    shows["spec"]["volumes"] = json!([{"name": "shown", "configMap": {"name": "map"}}]);
    shows["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "shown", "mountPath": "/map"}]);
    apply_all(&joey, &[&lacking(&registry)[..], &[rooted, shows][..]].concat());

    // The first restart comes at once, each further one after twice the pause.
    waits(&joey, "loops", "CrashLoopBackOff", &["back-off 10s restarting failed container=main"]);
    assert_eq!(joey.get("pod", "loops")["status"]["containerStatuses"][0]["restartCount"], 1);
    waits(&joey, "loops", "CrashLoopBackOff", &["back-off 20s restarting failed container=main"]);
    assert_eq!(joey.get("pod", "loops")["status"]["containerStatuses"][0]["restartCount"], 2);

    waits(&joey, "rooted", "CreateContainerConfigError", &["container has runAsNonRoot and image will run as root"]);
    waits(&joey, "never", "ErrImageNeverPull", &["joey/never:1\" is not present with pull policy of Never"]);
    let seen = wait_until("the pull is given up for a while", seconds(40), || {
        let seen = columns(&watch, "absent");
        if seen.iter().any(|word| word == "ImagePullBackOff") { Ok(seen) } else { Err(format!("{seen:?}")) }
    });
    let first = |word: &str| seen.iter().position(|seen| seen == word);
    assert!(first("ErrImagePull").is_some() && first("ErrImagePull") < first("ImagePullBackOff"), "{seen:?}");
    assert!(
        joey.get("pod", "absent")["status"]["containerStatuses"][0]["state"]["waiting"]["message"]
            .as_str()
            .is_some_and(|message| message.contains("joey/absent:1"))
    );

    // What waits for an object goes on when that comes.
    waits(&joey, "lacks-volume", "ContainerCreating", &[]);
    let events = joey.kubectl(&["describe", "pod", "lacks-volume"]).ok();
    let mount = "MountVolume.SetUp failed for volume \"shown\" : configmap \"map\" not found";
    assert!(events.contains("FailedMount") && events.contains(mount), "{events}");
    waits(&joey, "lacks-map", "CreateContainerConfigError", &["configmap \"map\" not found"]);
    waits(&joey, "lacks-key", "CreateContainerConfigError", &["couldn't find key later in Secret default/partial"]);
    joey.kubectl(&["create", "configmap", "map", "--from-literal=later=mapped"]).ok();
    let later = json!({"stringData": {"later": "secret"}}).to_string();
    joey.kubectl(&["patch", "secret", "partial", "--type=merge", "-p", &later]).ok();
    let said = [("lacks-map", "word mapped\n"), ("lacks-key", "word secret\n"), ("lacks-volume", "mapped")];
    for (name, said) in said {
        becomes(&joey, name, "Succeeded");
        assert_eq!(joey.kubectl(&["logs", name]).ok(), said, "{name}");
    }
}

/// An instance that somebody else removes is one that was lost: the Pod's restart policy decides.
#[test]
fn an_instance_that_is_taken_away_comes_back() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let mut object = pod("web", &registry.demo(), &["sleep", "1000"]);
    object["spec"]["restartPolicy"] = "Always".into();
    joey.apply(&object);
    joey.wait_for("web", "Ready", seconds(30));
    joey.joey(&["rm", "--force", "web.default"]).ok();
    wait_until("it runs again", seconds(30), || {
        let status = joey.get("pod", "web")["status"].clone();
        let count = status["containerStatuses"][0]["restartCount"].as_u64();
        holds(status["phase"] == "Running" && count >= Some(1), status)
    });
    assert!(joey.kubectl(&["describe", "pod", "web"]).ok().contains("InstanceRemoved"));
    joey.kubectl(&["delete", "pod", "web", "--grace-period=1"]).ok();
    wait_until("its end is told", seconds(10), || {
        let events = joey.kubectl(&["get", "events"]).ok();
        holds(events.contains("Stopping container main"), events)
    });
}

/// Waits until the containers of the Pod `crew` are in these states; the Pod's status.
#[track_caller]
fn crew_is(joey: &Joey, wanted: [&str; 4]) -> Value {
    let word = |state: &Value| match &state["waiting"]["reason"] {
        Value::String(reason) => reason.clone(),
        _ if state["running"].is_object() => "Running".to_owned(),
        _ => state.to_string(),
    };
    wait_until(&format!("they are {wanted:?}"), seconds(60), || {
        let status = joey.get("pod", "crew")["status"].clone();
        let all = status["containerStatuses"].as_array().cloned().unwrap_or_default();
        let named =
            all.iter().map(|one| format!("{} {}", one["name"].as_str().unwrap_or_default(), word(&one["state"])));
        let mut found: Vec<String> = named.collect();
        found.sort();
        holds(found == wanted, format!("{found:?}")).map(|()| status)
    })
}

/// A container that cannot be made holds up itself and no other one, and comes when what it lacks is there.
#[test]
fn what_one_container_lacks_keeps_no_other_one_waiting() {
    let registry = Registry::with_demo_image();
    let (mut joey, image) = (Joey::start(), registry.demo());
    let absent = registry.image("joey/comes-later:1");
    let mut object = scripted("crew", &image, "echo at work; sleep 1000");
    let lacking = |name: &str, image: &str, env: Value| json!({"name": name, "image": image, "env": env, "command": ["sleep", "1000"]});
    let secret = json!([{"name": "WORD", "valueFrom": {"secretKeyRef": {"name": "late", "key": "word"}}}]);
    let spec = &mut object["spec"];
    let containers = spec["containers"].as_array_mut().expect("a list");
    containers.extend([
        lacking("malformed", "Bad//Ref:::", json!([])),
        lacking("absent", &absent, json!([])),
        lacking("lacks", &image, secret),
    ]);
    spec["initContainers"] = json!([{"name": "first", "image": image, "command": ["echo", "done first"]}]);
    joey.apply(&object);
    let waiting = crew_is(
        &joey,
        ["absent ImagePullBackOff", "lacks CreateContainerConfigError", "main Running", "malformed InvalidImageName"],
    );
    assert_eq!(waiting["phase"], "Pending", "as a kubelet has it while one has never run");
    assert_eq!(joey.kubectl(&["logs", "crew", "-c", "first"]).ok(), "done first\n");
    assert_eq!(joey.kubectl(&["logs", "crew", "-c", "main"]).ok(), "at work\n");
    assert_eq!(joey.kubectl(&["exec", "crew", "-c", "main", "--", "echo", "here"]).ok(), "here\n");
    assert!(waiting["podIP"].is_string(), "{waiting}");
    let refused = joey.kubectl(&["logs", "crew", "-c", "lacks"]).fails(1);
    assert!(refused.contains("is waiting to start: CreateContainerConfigError"), "{refused}");
    let events = joey.kubectl(&["describe", "pod", "crew"]).ok();
    let back_off = format!("Back-off pulling image \"{absent}\"");
    for part in ["InspectFailed", "secret \"late\" not found", "Failed to pull image", &back_off] {
        assert!(events.contains(part), "{part} in {events}");
    }
    wait_until("what runs of it is measured", seconds(30), || {
        let top = joey.kubectl(&["top", "pod", "crew", "--no-headers"]);
        holds(top.code == 0 && top.stdout.starts_with("crew "), top)
    });

    // Also a new daemon knows why they wait.
    joey.kill();
    joey.up();
    crew_is(
        &joey,
        ["absent ImagePullBackOff", "lacks CreateContainerConfigError", "main Running", "malformed InvalidImageName"],
    );

    joey.kubectl(&["create", "secret", "generic", "late", "--from-literal=word=came"]).ok();
    joey.kubectl(&["set", "image", "pod/crew", &format!("malformed={image}"), &format!("absent={image}")]).ok();
    let running = crew_is(&joey, ["absent Running", "lacks Running", "main Running", "malformed Running"]);
    assert_eq!(running["phase"], "Running");
    assert_eq!(joey.kubectl(&["exec", "crew", "-c", "lacks", "--", "sh", "-c", "echo $WORD"]).ok(), "came\n");
    let main =
        running["containerStatuses"].as_array().expect("a list").iter().find(|one| one["name"] == "main").cloned();
    assert_eq!(main.expect("it is told")["restartCount"], 0);
    joey.kubectl(&["delete", "pod", "crew", "--grace-period=1", "--timeout=30s"]).ok();
}

#[test]
fn conditions_say_how_far_a_pod_is() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    let mut gated = scripted("gated", &image, "sleep 1000");
    gated["spec"]["readinessGates"] = json!([{"conditionType": "example.org/open"}]);
    let mut begins = scripted("begins", &image, "true");
    begins["spec"]["initContainers"] = json!([{"name": "first", "image": image, "command": ["sleep", "1000"]}]);
    let mut lacks = scripted("lacks", &image, "true");
    lacks["spec"]["containers"][0]["envFrom"] = json!([{"configMapRef": {"name": "map"}}]);
    // It fails once, and its folder outlives its containers.
    let mut again = scripted("again", &image, "test -e /state/again && exit 0; touch /state/again; exit 1");
    again["spec"]["restartPolicy"] = "OnFailure".into();
    again["spec"]["volumes"] = json!([{"name": "state", "emptyDir": {}}]);
    again["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "state", "mountPath": "/state"}]);
    apply_all(&joey, &[gated, begins, lacks, again]);

    let status = becomes(&joey, "again", "Succeeded");
    let container = &status["containerStatuses"][0];
    assert_eq!(container["restartCount"], 1, "{container}");
    let end = |state: &str| {
        let end = &container[state]["terminated"];
        (end["exitCode"].as_i64(), end["reason"].as_str())
    };
    assert_eq!(end("lastState"), (Some(1), Some("Error")), "{container}");
    assert_eq!(end("state"), (Some(0), Some("Completed")), "{container}");

    for (name, network, initialized, ready, containers) in [
        ("gated", "True", "True", "False ReadinessGatesNotReady", "True"),
        ("begins", "True", "False ContainersNotInitialized", "False ContainersNotReady", "False ContainersNotReady"),
        ("lacks", "False", "True", "False ContainersNotReady", "False ContainersNotReady"),
        ("again", "False", "True PodCompleted", "False PodCompleted", "False PodCompleted"),
    ] {
        let wanted = [
            "PodScheduled=True".to_owned(),
            format!("PodReadyToStartContainers={network}"),
            format!("Initialized={initialized}"),
            format!("Ready={ready}"),
            format!("ContainersReady={containers}"),
        ];
        conditions(&joey, name, wanted.each_ref().map(String::as_str));
    }

    // Its containers are ready, it is not, until somebody says so.
    let row = || joey.kubectl(&["get", "pod", "gated", "--no-headers", "-o", "wide"]).ok();
    assert!(row().contains(" 1/1 ") && row().trim_end().ends_with(" 0/1"), "{}", row());
    let gate = |status: &str| {
        let condition = json!({"status": {"conditions": [{"type": "example.org/open", "status": status}]}}).to_string();
        joey.kubectl(&["patch", "pod", "gated", "--subresource=status", "-p", &condition]).ok();
    };
    gate("True");
    joey.wait_for("gated", "Ready", seconds(20));
    assert!(row().trim_end().ends_with(" 1/1"), "{}", row());
    gate("False");
    wait_until("it is not ready any more", seconds(20), || {
        let all = joey.get("pod", "gated")["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let closed = |c: &Value| c["type"] == "Ready" && c["reason"] == "ReadinessGatesNotReady";
        holds(all.iter().any(closed), all)
    });
}

/// What a Pod is told that asks for the host's name servers.
fn servers_of_the_host() -> String {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = text.lines().filter_map(|line| line.strip_prefix("nameserver ")).map(str::trim);
    let elsewhere = servers.filter(|server| !server.starts_with("127.") && *server != "::1").count();
    // A server on the host's loopback is no use in a Pod: systemd-resolved says which ones it asks itself.
    let upstream = std::fs::read_to_string("/run/systemd/resolve/resolv.conf").ok();
    upstream.filter(|_| elsewhere == 0).unwrap_or(text)
}

#[test]
fn containers_are_told_names_and_amounts() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    let show = ["cat", "/etc/resolv.conf"];
    let mut own = pod("own", &image, &show);
    own["spec"]["dnsPolicy"] = json!("None");
    own["spec"]["dnsConfig"] = json!({"nameservers": ["192.0.2.53", "192.0.2.54"], "searches": ["one.test", "two.test"],
        "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]});
    let mut host = pod("host", &image, &show);
    host["spec"]["dnsPolicy"] = json!("Default");

    let script = r#"for word in "$@"; do echo "$word"; done"#;
    let mut words = pod("words", &image, &["$(SHELL)", "-c", script, "$(FIRST)"]);
    let amount = |resource: &str| json!({"resourceFieldRef": {"resource": resource}});
    let in_units =
        |resource: &str, divisor: &str| json!({"resourceFieldRef": {"resource": resource, "divisor": divisor}});
    let container = &mut words["spec"]["containers"][0];
    container["resources"] =
        json!({"limits": {"memory": "64Mi", "cpu": "250m"}, "requests": {"memory": "1500k", "cpu": "100m"}});
    container["env"] = json!([
        {"name": "SHELL", "value": "sh"}, {"name": "FIRST", "value": "one"},
        {"name": "SECOND", "value": "$(FIRST)-two"},
        {"name": "EARLY", "value": "$(LATE)"}, {"name": "LATE", "value": "late"},
        {"name": "BYTES", "valueFrom": amount("limits.memory")},
        {"name": "MEGABYTES", "valueFrom": in_units("limits.memory", "1Mi")},
        {"name": "ROUNDED_UP", "valueFrom": in_units("requests.memory", "1Mi")},
        {"name": "CORES", "valueFrom": amount("requests.cpu")},
        {"name": "THOUSANDTHS", "valueFrom": in_units("limits.cpu", "1m")},
    ]);
    container["args"] = json!([
        "$(FIRST)",
        "<$(SECOND)>",
        "$(EARLY)",
        "$$(FIRST)",
        "$$$(FIRST)",
        "$(ABSENT)",
        "$(BYTES)",
        "$(MEGABYTES)",
        "$(ROUNDED_UP)",
        "$(CORES)",
        "$(THOUSANDTHS)",
    ]);
    apply_all(&joey, &[own, host, words]);
    let told = |name: &str| {
        becomes(&joey, name, "Succeeded");
        joey.kubectl(&["logs", name]).ok()
    };
    assert_eq!(
        told("own"),
        "nameserver 192.0.2.53\nnameserver 192.0.2.54\nsearch one.test two.test\noptions ndots:2 edns0\n"
    );
    assert_eq!(told("host"), servers_of_the_host());
    assert_eq!(
        told("words").lines().collect::<Vec<_>>(),
        ["one", "<one-two>", "$(LATE)", "$(FIRST)", "$one", "$(ABSENT)", "67108864", "64", "2", "1", "250"]
    );
}

/// The host's processes whose last argument is this.
fn sleeping(length: &str) -> Vec<u32> {
    let end = format!("\0{length}\0");
    let ends =
        |pid: &u32| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.ends_with(end.as_bytes()));
    processes().into_iter().filter(ends).collect()
}

#[test]
fn whole_trees_of_processes_end() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    let some = 100_000 + 10 * u32::from(rand::random::<u16>());
    // Alone and beside others in one namespace of processes, started again and not.
    let trees: Vec<(String, String, bool)> = [("alone", false), ("shared", true)]
        .into_iter()
        .flat_map(|(name, shared)| [(format!("{name}-again"), shared), (format!("{name}-once"), shared)])
        .zip(some..)
        .map(|((name, shared), length)| (name, length.to_string(), shared))
        .collect();
    let objects: Vec<Value> = trees
        .iter()
        .map(|(name, length, shared)| {
            let script = format!("(setsid sleep {length} &); until test -e /tmp/end; do sleep 0.1; done; exit 1");
            let mut object = scripted(name, &image, &script);
            let policy = if name.ends_with("again") { "Always" } else { "Never" };
            object["spec"]["restartPolicy"] = policy.into();
            object["spec"]["shareProcessNamespace"] = (*shared).into();
            object
        })
        .collect();
    apply_all(&joey, &objects);
    let one = |name: &str, length: &str, before: Option<u32>| {
        wait_until(&format!("one process of {name} sleeps, not {before:?}"), seconds(40), || match sleeping(length)[..]
        {
            [pid] if Some(pid) != before => Ok(pid),
            ref other => Err(format!("{other:?}")),
        })
    };
    let firsts: Vec<u32> = trees.iter().map(|(name, length, _)| one(name, length, None)).collect();
    for (name, ..) in &trees {
        joey.wait_for(name, "Ready", seconds(20));
        joey.kubectl(&["exec", name, "--", "touch", "/tmp/end"]).ok();
    }
    for ((name, length, _), first) in trees.iter().zip(firsts) {
        if name.ends_with("again") {
            // Were the first one left, there would be two.
            one(name, length, Some(first));
            wait_until(&format!("{name} is told to run again"), seconds(20), || {
                let container = joey.get("pod", name)["status"]["containerStatuses"][0].clone();
                holds(container["restartCount"] == 1 && container["ready"] == true, container)
            });
        } else {
            becomes(&joey, name, "Failed");
            assert!(sleeping(length).is_empty(), "{name}");
        }
    }
    let arguments = ["delete", "pod", "--grace-period=1", "--timeout=30s", "alone-again", "shared-again"];
    joey.kubectl(&arguments).ok();
    for (name, length, _) in &trees {
        assert!(sleeping(length).is_empty(), "{name}");
    }
}
