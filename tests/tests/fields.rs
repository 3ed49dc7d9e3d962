//! Point 1: every field of a Pod has a state that somebody decided on, and what runs shows what the states say.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};

use joey_tests::host::Confines;
use joey_tests::joey::pod;
use joey_tests::{Joey, Registry, holds, repository, run, seconds, wait_until};
use serde_json::{Value, json};

const POD: &str = "io.k8s.api.core.v1.PodSpec";

/// Paths of every field of a type: `[]` stands for an element of a list, `{}` for a value of a map.
fn walk(types: &Value, name: &str, path: &str, found: &mut BTreeSet<String>) {
    let properties = types[name]["properties"].as_object().expect("a type has properties");
    for (field, schema) in properties {
        let mut path = format!("{path}.{field}");
        let mut schema = schema;
        if schema["type"] == "array" {
            path.push_str("[]");
            schema = &schema["items"];
        } else if schema["additionalProperties"].is_object() {
            path.push_str("{}");
            schema = &schema["additionalProperties"];
        }
        found.insert(path.clone());
        let reference = schema["$ref"].as_str().or_else(|| schema["allOf"][0]["$ref"].as_str());
        let inner = reference.and_then(|reference| reference.rsplit('/').next());
        if let Some(inner) = inner.filter(|inner| types[*inner]["properties"].is_object()) {
            walk(types, inner, &path, found);
        }
    }
}

/// Field and state of each row of docs/pod-fields.md.
fn rows() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(repository().join("docs/pod-fields.md")).expect("the table is there");
    let rows = text.lines().filter(|line| line.starts_with("| `spec."));
    rows.map(|line| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        (cells[1].trim_matches('`').to_owned(), cells[2].to_owned())
    })
    .collect()
}

fn covers(row: &str, field: &str) -> bool {
    match row.strip_suffix(".*") {
        Some(top) => field == top || field.strip_prefix(top).is_some_and(|rest| rest.starts_with('.')),
        None => row == field,
    }
}

#[test]
fn every_field_has_a_row_and_every_row_a_field() {
    let types = std::fs::read(repository().join("crates/schema/facts/types.json")).expect("the facts are there");
    let types: Value = serde_json::from_slice(&types).expect("the facts are JSON");
    let mut fields = BTreeSet::new();
    walk(&types, POD, "spec", &mut fields);
    assert!(fields.len() > 1000, "{} fields", fields.len());
    let rows = rows();
    // Containers of all three kinds share rows.
    let shared = |field: &str| {
        ["spec.initContainers[]", "spec.ephemeralContainers[]"]
            .iter()
            .find_map(|kind| field.strip_prefix(kind))
            .map(|rest| format!("spec.containers[]{rest}"))
    };
    let has_row = |field: &str| rows.iter().any(|(row, _)| covers(row, field));
    let undecided: Vec<_> =
        fields.iter().filter(|field| !has_row(field) && !shared(field).is_some_and(|field| has_row(&field))).collect();
    assert!(undecided.is_empty(), "no row in docs/pod-fields.md: {undecided:#?}");
    let strangers: Vec<_> = rows.iter().filter(|(row, _)| !fields.iter().any(|field| covers(row, field))).collect();
    assert!(strangers.is_empty(), "rows that name no field: {strangers:#?}");
    let twice: Vec<_> =
        rows.iter().filter(|(row, _)| rows.iter().filter(|(other, _)| other == row).count() > 1).collect();
    assert!(twice.is_empty(), "{twice:?}");
    for (row, state) in &rows {
        assert!(["honoured", "refused", "cluster"].contains(&state.as_str()), "{row} is {state}");
    }
}

/// The log of a Pod that runs to its end.
fn said(joey: &Joey, object: &Value) -> String {
    let name = object["metadata"]["name"].as_str().expect("it has a name");
    joey.apply(object);
    wait_until("it ends", seconds(30), || {
        let pod = joey.get("pod", name);
        holds(matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed")), &pod["status"])
    });
    let first = object["spec"]["containers"][0]["name"].as_str().expect("it has a container");
    joey.kubectl(&["logs", name, "-c", first]).ok()
}

fn scripted(name: &str, image: &str, script: &str) -> Value {
    pod(name, image, &["sh", "-c", script])
}

#[test]
fn names_settings_and_groups() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();

    let mut object = scripted("named", &image, "hostname; cat /etc/hosts; cat /proc/sys/net/ipv4/tcp_keepalive_time");
    object["spec"]["hostname"] = json!("one");
    object["spec"]["subdomain"] = json!("peers");
    object["spec"]["setHostnameAsFQDN"] = json!(true);
    object["spec"]["hostAliases"] = json!([{"ip": "192.0.2.9", "hostnames": ["nine", "neuf"]}]);
    object["spec"]["securityContext"] = json!({"sysctls": [{"name": "net.ipv4.tcp_keepalive_time", "value": "123"}]});
    let text = said(&joey, &object);
    assert!(text.starts_with("one.peers.default.svc.cluster.local\n"), "{text}");
    assert!(text.contains("\tone.peers.default.svc.cluster.local\tone\n"), "{text}");
    assert!(text.contains("192.0.2.9\tnine\tneuf\n") && text.ends_with("123\n"), "{text}");
    let host = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_keepalive_time").expect("the host has it too");
    assert_ne!(host.trim(), "123", "the setting is the Pod's alone");

    let mut object = scripted("overridden", &image, "hostname");
    object["spec"]["hostnameOverride"] = json!("some.other.name");
    assert_eq!(said(&joey, &object), "some.other.name\n");

    // The groups that the image gives its user count where the policy is Merge.
    let groups = "--from-literal=group=www-data:x:33:\nadm:x:4:www-data\n".replace("\\n", "\n");
    joey.kubectl(&["create", "configmap", "groups", &groups]).ok();
    let script = "id -G; pwd; ls -ld /made/up | cut -c1-10";
    for (name, policy, wanted) in [("merge", "Merge", vec!["33", "4", "5"]), ("strict", "Strict", vec!["33", "5"])] {
        let mut object = scripted(name, &image, script);
        object["spec"]["securityContext"] = json!({"runAsUser": 33, "runAsNonRoot": true, "supplementalGroups": [5], "supplementalGroupsPolicy": policy});
        object["spec"]["volumes"] = json!([{"name": "groups", "configMap": {"name": "groups"}}]);
        let container = &mut object["spec"]["containers"][0];
        container["workingDir"] = json!("/made/up");
        container["volumeMounts"] = json!([{"name": "groups", "mountPath": "/etc/group", "subPath": "group"}]);
        let text = said(&joey, &object);
        let mut found: Vec<_> = text.lines().next().unwrap_or_default().split(' ').collect();
        found.sort_unstable();
        assert_eq!(found, wanted, "{policy}: {text}");
        assert!(text.ends_with("/made/up\ndrwxr-xr-x\n"), "{text}");
    }
}

#[test]
fn containers_share_their_processes() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    let mut object = pod("shared", &image, &["sh", "-c", "exec sleep 1001"]);
    object["spec"]["shareProcessNamespace"] = json!(true);
    object["spec"]["restartPolicy"] = json!("Always");
    let beside = json!({"name": "beside", "image": image, "command": ["sh", "-c", "(sleep 0.2 &); exec sleep 1002"]});
    object["spec"]["containers"].as_array_mut().expect("a list").push(beside);
    joey.apply(&object);
    joey.wait_for("shared", "Ready", seconds(30));
    let inside = |script: &str| joey.kubectl(&["exec", "shared", "-c", "main", "--", "sh", "-c", script]);
    let processes = inside("ps -o pid,args").ok();
    for part in ["sleep 1001", "sleep 1002", " 1 pause"] {
        assert!(processes.contains(part), "{part} in {processes}");
    }
    // Nothing of the first process is to be had, and it cannot be ended.
    for script in ["ls -l /proc/1/root/", "cat /proc/1/environ", "readlink /proc/1/fd/0", "cat /proc/1/maps"] {
        assert_ne!(inside(script).code, 0, "{script}: {}", inside(script).stdout);
    }
    assert_eq!(inside("wc -l < /proc/1/mountinfo").ok().trim(), "1", "{}", inside("cat /proc/1/mountinfo").stdout);
    inside("kill -9 1; kill 1");
    assert!(inside("cat /proc/1/comm").ok().starts_with("pause"));
    // Orphans are taken in and gone at once.
    inside("(sleep 0.1 &) ; true").ok();
    wait_until("no zombie stays", seconds(5), || {
        let states = inside("cat /proc/[0-9]*/stat").stdout;
        holds(!states.contains(") Z "), states)
    });
    // A signal over the border: the other container ends with all it started, and comes back.
    inside("(sleep 1003 &)").ok();
    inside("kill -9 $(ps -o pid,args | awk '/[s]leep 1002/ {print $1}')").ok();
    wait_until("it was started again", seconds(10), || {
        let status = joey.get("pod", "shared")["status"]["containerStatuses"].clone();
        let again = status.as_array().into_iter().flatten().any(|c| c["name"] == "beside" && c["restartCount"] == 1);
        holds(again, &status)
    });
    assert!(inside("ps -o args").ok().contains("sleep 1003"), "what another container started goes on");
    joey.delete_pod("shared");
}

#[test]
fn containers_start_again_by_rule() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let mut object = scripted("ruled", &registry.demo(), "test -e /state/again && exit 3; touch /state/again; exit 42");
    object["spec"]["volumes"] = json!([{"name": "state", "emptyDir": {}}]);
    let container = &mut object["spec"]["containers"][0];
    container["volumeMounts"] = json!([{"name": "state", "mountPath": "/state"}]);
    container["restartPolicy"] = json!("Never");
    container["restartPolicyRules"] = json!([{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]);
    joey.apply(&object);
    let status = wait_until("it ends for good", seconds(30), || {
        let pod = joey.get("pod", "ruled");
        holds(pod["status"]["phase"] == "Failed", &pod["status"]).map(|()| pod["status"].clone())
    });
    let container = &status["containerStatuses"][0];
    assert_eq!((&container["restartCount"], &container["state"]["terminated"]["exitCode"]), (&json!(1), &json!(3)));
}

#[test]
fn input_ends_with_its_first_reader() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let mut object = scripted("once", &registry.demo(), "cat; echo over");
    object["spec"]["containers"][0]["stdin"] = json!(true);
    object["spec"]["containers"][0]["stdinOnce"] = json!(true);
    joey.apply(&object);
    joey.wait_for("once", "Ready", seconds(30));
    // A caller who goes away without a word: for others that would leave the input open.
    let mut command = joey.kubectl_command(&["attach", "-i", "once"]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut caller = command.spawn().expect("kubectl starts");
    let mut input = caller.stdin.take().expect("its input is piped");
    input.write_all(b"said\n").expect("it reads");
    wait_until("it was heard", seconds(10), || {
        let log = joey.kubectl(&["logs", "once"]).ok();
        holds(log == "said\n", log)
    });
    caller.kill().expect("it can be killed");
    caller.wait().expect("it ends");
    wait_until("it saw the end", seconds(10), || {
        let log = joey.kubectl(&["logs", "once"]).ok();
        holds(log == "said\nover\n", log)
    });
}

#[test]
fn what_is_refused_says_why_and_what_instead() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    // At admission, where Joey is the whole Kubernetes: the object is never stored.
    for (part, alternative, spec, container) in [
        ("privileged", "default set", json!({}), json!({"securityContext": {"privileged": true}})),
        ("hostNetwork", "address of its own", json!({"hostNetwork": true}), json!({})),
        ("hostPID", "shareProcessNamespace", json!({"hostPID": true}), json!({})),
        ("hostIPC", "share IPC", json!({"hostIPC": true}), json!({})),
        ("hostPath", "emptyDir", json!({"volumes": [{"name": "h", "hostPath": {"path": "/"}}]}), json!({})),
        ("hostPort", "own address", json!({}), json!({"ports": [{"containerPort": 80, "hostPort": 80}]})),
        ("SYS_ADMIN", "volumes", json!({}), json!({"securityContext": {"capabilities": {"add": ["SYS_ADMIN"]}}})),
        (
            "SYS_PTRACE",
            "debug container",
            json!({}),
            json!({"securityContext": {"capabilities": {"add": ["SYS_PTRACE"]}}}),
        ),
        ("NET_ADMIN", "annotations", json!({}), json!({"securityContext": {"capabilities": {"add": ["NET_ADMIN"]}}})),
        (
            "kernel.msgmax",
            "safe ones are",
            json!({"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}),
            json!({}),
        ),
        ("volumeDevices", "emptyDir", json!({}), json!({"volumeDevices": [{"name": "d", "devicePath": "/dev/d"}]})),
        (
            "seccompProfile",
            "RuntimeDefault",
            json!({}),
            json!({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}),
        ),
        ("procMount", "Default", json!({}), json!({"securityContext": {"procMount": "Unmasked"}})),
    ] {
        let mut object = pod("refused", &image, &["true"]);
        object["spec"].as_object_mut().expect("an object").extend(spec.as_object().expect("an object").clone());
        let own = object["spec"]["containers"][0].as_object_mut().expect("an object");
        own.extend(container.as_object().expect("an object").clone());
        let outcome = joey.kubectl_with_input(&["apply", "-f", "-"], &object.to_string());
        assert_ne!(outcome.code, 0, "{part} was admitted");
        assert!(outcome.stderr.contains(part) && outcome.stderr.contains(alternative), "{part}: {}", outcome.stderr);
        assert!(joey.get("pod", "refused").is_null(), "{part}");
    }
    // What is not the host's is refused by the virtual node.
    let mut object = pod("unsupported", &image, &["true"]);
    object["spec"]["volumes"] = json!([{"name": "n", "nfs": {"server": "s", "path": "/"}}]);
    joey.apply(&object);
    let status = wait_until("it is refused", seconds(10), || {
        let pod = joey.get("pod", "unsupported");
        holds(pod["status"]["phase"] == "Failed", &pod["status"]).map(|()| pod["status"].clone())
    });
    assert_eq!(status["reason"], "UnsupportedPod");
    assert!(status["message"].as_str().is_some_and(|message| message.contains("nfs")), "{status}");
}

/// What of the instance's cgroup `name` is limited.
fn confines(joey: &Joey, instance: &str, name: &str) -> Confines {
    let id = joey.joey(&["describe", instance, "-o", "json"]).json()["id"].as_str().expect("an id").to_owned();
    Confines::of(&id, name)
}

/// Whether the host's kernel caps one interface each way, at rates that nothing else here has.
#[track_caller]
fn is_capped(bandwidth: &str, packets: &str) {
    let queues = run(Command::new("tc").args(["qdisc", "show"])).ok();
    assert_eq!(queues.matches(&format!("rate {bandwidth}bit ")).count(), 2, "{bandwidth}: {queues}");
    let rules = run(Command::new("nft").args(["list", "ruleset"])).ok();
    assert_eq!(rules.matches(&format!("limit rate over {packets}/second ")).count(), 2, "{packets}: {rules}");
}

#[test]
fn sizes_are_taken_from_a_list() {
    let registry = Registry::with_demo_image();
    let file = registry.dir().join("joey.yaml");
    let tiny =
        "{cpu: 250m, memory: 48Mi, pids: 50, bandwidth: 21M, packets: 1237, diskBytes: 9Mi, diskOperations: 321}";
    std::fs::write(&file, format!("specs:\n  tiny: {tiny}\n")).expect("the folder is writable");
    let arguments = vec!["--config".to_owned(), file.display().to_string()];
    let joey = Joey::start_with(joey_tests::Settings { arguments, ..joey_tests::Settings::default() });
    joey.joey(&["run", &registry.demo(), "--name", "a", "--spec", "no.such", "--spec", "tiny"]).ok();
    let tiny = Confines {
        cpu_milli: Some(250),
        memory: Some(48 << 20),
        pids: Some(50),
        disk_bytes: Some(9 << 20),
        disk_operations: Some(321),
    };
    assert_eq!(confines(&joey, "a", "containers"), tiny);
    is_capped("21M", "1237");
    let refused =
        joey.joey(&["run", &registry.demo(), "--name", "b", "--spec", "no.such", "--spec", "999-1Gi"]).fails(1);
    assert!(refused.contains("\"no.such\" is not known") && refused.contains("tiny"), "{refused}");

    let mut object = pod("sized", &registry.demo(), &["sleep", "1000"]);
    object["metadata"]["annotations"] = json!({"k8s.aliyun.com/eci-use-specs": "ecs.c6.large, 0.5-64Mi"});
    joey.apply(&object);
    joey.wait_for("sized", "Ready", seconds(30));
    let sized = Confines { cpu_milli: Some(500), memory: Some(64 << 20), ..Confines::default() };
    assert_eq!(confines(&joey, "sized.default", "containers"), sized);
    object["metadata"]["name"] = json!("unsized");
    object["metadata"]["annotations"] = json!({"k8s.aliyun.com/eci-use-specs": "ecs.c6.large"});
    joey.apply(&object);
    wait_until("it is refused", seconds(10), || {
        let status = joey.get("pod", "unsized")["status"].clone();
        holds(status["reason"] == "NoSuchSpec" && status["message"].to_string().contains("ecs.c6.large"), status)
    });

    // The same by flags: of the instance as a whole, and of its container.
    let image = registry.demo();
    let mut words =
        vec!["run", image.as_str(), "--name", "flagged", "--cpu", "150m", "--memory", "40Mi", "--pids", "33"];
    words.extend(["--bandwidth", "22M", "--packets", "1238", "--disk-bytes", "7Mi", "--disk-operations", "123"]);
    joey.joey(&words).ok();
    let (pids, disk_bytes, disk_operations) = (Some(33), Some(7 << 20), Some(123));
    let whole = Confines { pids, disk_bytes, disk_operations, ..Confines::default() };
    assert_eq!(confines(&joey, "flagged", "containers"), whole);
    let own = confines(&joey, "flagged", "containers/flagged");
    assert_eq!((own.cpu_milli, own.memory), (Some(150), Some(40 << 20)));
    is_capped("22M", "1238");
}

#[test]
fn requests_become_limits_and_the_class_is_told() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let requests = json!({"requests": {"memory": "64Mi", "cpu": "100m", "ephemeral-storage": "70Mi"}});
    let both = json!({"requests": {"cpu": "100m"}, "limits": {"memory": "32Mi", "cpu": "200m"}});
    for (name, resources, whole, class, cpu, memory, storage) in [
        ("best", json!({}), Value::Null, "BestEffort", None, None, None),
        ("burst", requests, Value::Null, "Burstable", Some(100), Some(64 << 20), Some(70 << 20)),
        ("higher", both, Value::Null, "Burstable", Some(200), Some(32 << 20), None),
        (
            "sure",
            json!({"limits": {"memory": "32Mi", "cpu": "100m"}}),
            Value::Null,
            "Guaranteed",
            Some(100),
            Some(32 << 20),
            None,
        ),
        (
            "whole",
            json!({}),
            json!({"limits": {"memory": "80Mi", "cpu": "1"}}),
            "Guaranteed",
            Some(1000),
            Some(80 << 20),
            None,
        ),
    ] {
        let mut object = pod(name, &registry.demo(), &["sleep", "1000"]);
        object["spec"]["containers"][0]["resources"] = resources;
        if !whole.is_null() {
            object["spec"]["resources"] = whole.clone();
        }
        joey.apply(&object);
        let pod = joey.wait_for(name, "Ready", seconds(30));
        assert_eq!(pod["status"]["qosClass"], class, "{name}");
        let cgroup = if whole.is_null() { "main" } else { "containers" };
        let found = confines(&joey, &format!("{name}.default"), cgroup);
        assert_eq!((found.cpu_milli, found.memory), (cpu, memory), "{name}");
        let resources = joey.instance_of(name)["spec"]["containers"][0]["resources"].clone();
        assert_eq!(resources["ephemeralStorageBytes"].as_u64(), storage, "{name}: {resources}");
    }
}
