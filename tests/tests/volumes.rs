//! Point 3: volumes as Pods see them, and what reaches them while they run.

use std::process::Command;
use std::time::{Duration, Instant};

use joey_tests::host::process_start;
use joey_tests::image::{Entry, Image, Layer, Packing};
use joey_tests::joey::pod;
use joey_tests::served::Served;
use joey_tests::{Joey, Registry, holds, run, seconds, wait_until};
use serde_json::{Value, json};

/// What a change of a ConfigMap or Secret may take until a running Pod sees it.
const REACHED: Duration = seconds(10);

/// Reads both files of one generation again and again, and says what should not be.
const READER: &str = "while :; do cd -P /all/..data || { echo no data; continue; }; a=$(cat map); b=$(cat two/map); \
    [ \"$a\" = \"$b\" ] || echo \"mixed $a $b\"; [ -n \"$a\" ] || echo missing; cat /all/map >/dev/null || echo no top; done";

fn inside(joey: &Joey, pod: &str, script: &str) -> String {
    joey.kubectl(&["exec", pod, "-c", "main", "--", "sh", "-c", script]).ok()
}

#[track_caller]
fn shows(joey: &Joey, pod: &str, script: &str, expected: &str) {
    wait_until(&format!("{script} shows {expected}"), REACHED, || {
        let seen = joey.kubectl(&["exec", pod, "-c", "main", "--", "sh", "-c", script]);
        holds(seen.stdout.trim() == expected, seen)
    });
}

fn patch(joey: &Joey, kind: &str, name: &str, body: &Value) {
    joey.kubectl(&["patch", kind, name, "--type=merge", "-p", &body.to_string()]).ok();
}

/// Lets some time pass in which nothing may happen.
fn pass(length: Duration) {
    let end = Instant::now() + length;
    wait_until("time passes", length + seconds(1), || holds(Instant::now() >= end, ""));
}

/// A Pod that shows a ConfigMap `map`, a Secret `key`, its labels and a token in one volume, and parts of them elsewhere.
fn projected(image: &str) -> Value {
    let mut object = pod("shows", image, &["sh", "-c", READER]);
    object["metadata"]["labels"] = json!({"app": "shows", "colour": "brown"});
    object["spec"]["volumes"] = json!([
        {"name": "all", "projected": {"sources": [
            {"configMap": {"name": "map", "items": [{"key": "map", "path": "map"}, {"key": "map", "path": "two/map"}]}},
            {"secret": {"name": "key", "items": [{"key": "key", "path": "key", "mode": 0o400}]}},
            {"downwardAPI": {"items": [{"path": "colour", "fieldRef": {"fieldPath": "metadata.labels['colour']"}}]}},
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}},
            {"configMap": {"name": "later", "optional": true}},
        ]}},
        {"name": "map", "configMap": {"name": "map"}},
        {"name": "fixed", "configMap": {"name": "fixed"}},
    ]);
    object["spec"]["containers"][0]["volumeMounts"] = json!([
        {"name": "all", "mountPath": "/all"}, {"name": "fixed", "mountPath": "/fixed"},
        {"name": "map", "mountPath": "/part", "subPath": "map"},
    ]);
    object["spec"]["containers"][0]["env"] =
        json!([{"name": "MAP", "valueFrom": {"configMapKeyRef": {"name": "map", "key": "map"}}}]);
    object
}

fn make_objects(joey: &Joey) {
    joey.kubectl(&["create", "configmap", "map", "--from-literal=map=one"]).ok();
    joey.kubectl(&["create", "secret", "generic", "key", "--from-literal=key=first"]).ok();
    make_fixed(joey, "1");
}

fn make_fixed(joey: &Joey, value: &str) {
    joey.apply(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "fixed"}, "immutable": true,
        "data": {"k": value}}));
}

#[test]
fn changes_reach_a_running_pod_as_a_whole() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    make_objects(&joey);
    joey.apply(&projected(&registry.demo()));
    joey.wait_for("shows", "Ready", seconds(60));
    assert_eq!(
        inside(&joey, "shows", "cat /all/key /all/colour /fixed/k; ls /all; stat -Lc %a /all/key"),
        "firstbrown1colour\nkey\nmap\ntoken\ntwo\n400\n"
    );

    let mut slowest = Duration::ZERO;
    for number in 0..10 {
        let value = format!("change {number}");
        let began = Instant::now();
        patch(&joey, "configmap", "map", &json!({"data": {"map": value}}));
        shows(&joey, "shows", "cat /all/map", &value);
        slowest = slowest.max(began.elapsed());
    }
    eprintln!("the slowest of ten changes was seen after {slowest:?}, kubectl's own time included");
    patch(&joey, "secret", "key", &json!({"stringData": {"key": "second"}}));
    shows(&joey, "shows", "cat /all/key", "second");
    joey.kubectl(&["label", "pod", "shows", "--overwrite", "colour=grey"]).ok();
    shows(&joey, "shows", "cat /all/colour", "grey");
    joey.kubectl(&["create", "configmap", "later", "--from-literal=late=here"]).ok();
    shows(&joey, "shows", "cat /all/late 2>/dev/null", "here");
    joey.kubectl(&["delete", "configmap", "later"]).ok();
    shows(&joey, "shows", "ls /all | grep -c late", "0");

    // What does not change: variables, parts that are mounted alone, and what says that it never changes.
    joey.kubectl(&["delete", "configmap", "fixed"]).ok();
    make_fixed(&joey, "2");
    patch(&joey, "configmap", "map", &json!({"data": {"map": "last"}}));
    shows(&joey, "shows", "cat /all/map", "last");
    assert_eq!(
        inside(&joey, "shows", "cat /part; cat /fixed/k; tr '\\0' '\\n' </proc/1/environ | grep ^MAP="),
        "one1MAP=one\n"
    );
    // What is gone is kept as it was, and said.
    joey.kubectl(&["delete", "secret", "key"]).ok();
    wait_until("the missing Secret is told of", REACHED, || {
        let events = joey.kubectl(&["get", "events", "-o", "json"]).ok();
        holds(events.contains("FailedMount") && events.contains("secret \\\"key\\\" not found"), events.len())
    });
    assert_eq!(inside(&joey, "shows", "cat /all/key"), "second");
    assert_eq!(joey.kubectl(&["logs", "shows"]).ok(), "", "no mix, nothing missing");
    assert_eq!(joey.get("pod", "shows")["status"]["containerStatuses"][0]["restartCount"], 0);

    let instance = joey.instance_of("shows").to_string();
    for secret in ["c2Vjb25k", "bGFzdA=="] {
        assert!(!instance.contains(secret), "contents are not told: {instance}");
    }
    let described = joey.kubectl(&["describe", "pod", "shows"]).ok();
    assert!(!described.contains("second"), "{described}");
}

#[test]
fn tokens_are_replaced_and_work() {
    let registry = Registry::with_demo_image();
    let mut joey = Joey::start();
    make_objects(&joey);
    let mut object = projected(&registry.demo());
    object["spec"]["securityContext"] = json!({"runAsUser": 1000, "fsGroup": 2000});
    joey.apply(&object);
    joey.wait_for("shows", "Ready", seconds(60));
    assert_eq!(inside(&joey, "shows", "stat -Lc '%a %u %g' /all/token"), "640 1000 2000\n", "the Pod's user's alone");
    let first = inside(&joey, "shows", "cat /all/token");
    let status = |token: &str| {
        let (header, url) =
            (format!("Authorization: Bearer {token}"), format!("https://{}/api/v1/pods", joey.listen()));
        run(Command::new("curl").args(["-sk", "-o", "/dev/null", "-w", "%{http_code}", "-H", &header, &url])).ok()
    };
    assert_eq!(status(&first), "403", "it says who asks");
    assert_eq!(status("x"), "401");
    let pid = joey.pid_of("shows.default");
    joey.kill();
    joey.up();
    // What an earlier virtual node sent is not known, so another token is sent at once.
    let second = wait_until("the token is another", REACHED, || {
        let token = inside(&joey, "shows", "cat /all/token");
        if token == first { Err(token) } else { Ok(token) }
    });
    let (header, url) = (format!("Authorization: Bearer {second}"), format!("https://{}/api/v1/pods", joey.listen()));
    let code =
        run(Command::new("curl").args(["-sk", "-o", "/dev/null", "-w", "%{http_code}", "-H", &header, &url])).ok();
    assert_eq!(code, "403");
    assert_eq!(joey.pid_of("shows.default"), pid, "the Pod went on");
    assert_eq!(joey.kubectl(&["logs", "shows"]).ok(), "", "no mix, nothing missing");
}

#[test]
fn a_change_outlives_the_daemon() {
    let registry = Registry::with_demo_image();
    let mut joey = Joey::start();
    make_objects(&joey);
    joey.apply(&projected(&registry.demo()));
    joey.wait_for("shows", "Ready", seconds(60));
    let identity = |joey: &Joey| Some(joey.pid_of("shows.default")).map(|pid| (pid, process_start(pid)));
    let before = identity(&joey);
    for (number, step) in ["pool.change-recorded", "instance-change-recorded"].into_iter().enumerate() {
        joey.kill();
        joey.crash_at(Some(step));
        joey.launch();
        let value = format!("killed {number}");
        // The new daemon's first word to the running Pod is a change already: its token.
        wait_until("the change ends the daemon", seconds(30), || {
            let body = json!({"data": {"map": value}}).to_string();
            let outcome =
                joey.kubectl(&["--request-timeout=2s", "patch", "configmap", "map", "--type=merge", "-p", &body]);
            holds(joey.program().ended().is_some(), outcome.stderr)
        });
        joey.crash_at(None);
        joey.up();
        patch(&joey, "configmap", "map", &json!({"data": {"map": value}}));
        shows(&joey, "shows", "cat /all/map", &value);
        assert_eq!(identity(&joey), before);
    }
    // A change while the daemon is away.
    joey.kill();
    joey.up();
    patch(&joey, "configmap", "map", &json!({"data": {"map": "at last"}}));
    shows(&joey, "shows", "cat /all/map", "at last");
    assert_eq!(joey.kubectl(&["logs", "shows"]).ok(), "", "no mix, nothing missing");
}

/// Waits until a Pod has failed; its status.
#[track_caller]
fn failed(joey: &Joey, name: &str) -> Value {
    wait_until("it fails", seconds(40), || {
        let pod = joey.get("pod", name);
        let failed = pod["status"]["phase"] == "Failed";
        if failed { Ok(pod["status"].clone()) } else { Err(pod["status"].to_string()) }
    })
}

#[test]
fn sizes_are_held() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let fills = |name: &str, volume: Value, path: &str| {
        let script = format!("dd if=/dev/zero of={path}/big bs=1M count=3; echo $?; sleep 1000");
        let mut object = pod(name, &registry.demo(), &["sh", "-c", &script]);
        object["spec"]["volumes"] = json!([{"name": "room", "emptyDir": volume}]);
        object["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "room", "mountPath": "/room"}]);
        object
    };
    joey.apply(&fills("disk", json!({"sizeLimit": "1Mi"}), "/room"));
    let mut object = fills("layer", json!({}), "/tmp");
    object["spec"]["containers"][0]["resources"] = json!({"limits": {"ephemeral-storage": "2Mi"}});
    joey.apply(&object);
    joey.apply(&fills("memory", json!({"medium": "Memory", "sizeLimit": "1Mi"}), "/room"));
    joey.apply(&fills("fits", json!({"sizeLimit": "8Mi"}), "/room"));
    let status = failed(&joey, "disk");
    assert_eq!(status["reason"], "Evicted", "{status}");
    assert_eq!(status["message"], "Usage of EmptyDir volume \"room\" exceeds the limit \"1Mi\". ");
    let status = failed(&joey, "layer");
    assert_eq!(status["reason"], "Evicted", "{status}");
    assert_eq!(status["message"], "Pod ephemeral local storage usage exceeds the total limit of containers 2Mi. ");
    assert!(joey.kubectl(&["get", "events"]).ok().contains("Evicted"));
    // Memory is no larger than it is said to be; who has room goes on.
    joey.wait_for("memory", "Ready", seconds(30));
    wait_until("dd has failed", seconds(10), || {
        let log = joey.kubectl(&["logs", "memory"]).ok();
        holds(log.contains("No space left") && log.contains("\n1\n"), log)
    });
    pass(seconds(5));
    assert_eq!(joey.get("pod", "fits")["status"]["phase"], "Running");
}

#[test]
fn parts_of_volumes_and_their_owners() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.kubectl(&["create", "configmap", "map", "--from-literal=key=value"]).ok();
    let script = "id -G; stat -Lc '%n %a %g' /data /map/key /log; touch /data/x /log/y; stat -c %g /data/x; ls /whole /whole/logs; \
                  cat /one; touch /map/new || echo closed; touch /ro/z || echo read-only; sleep 1000";
    let mut object = pod("parts", &registry.demo(), &["sh", "-c", script]);
    object["spec"]["securityContext"] = json!({"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000});
    object["spec"]["volumes"] =
        json!([{"name": "data", "emptyDir": {}}, {"name": "map", "configMap": {"name": "map"}}]);
    let container = &mut object["spec"]["containers"][0];
    container["env"] = json!([{"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]);
    container["volumeMounts"] = json!([
        {"name": "data", "mountPath": "/data"}, {"name": "data", "mountPath": "/whole", "mountPropagation": "HostToContainer"},
        {"name": "data", "mountPath": "/log", "subPathExpr": "logs/$(NAME)"},
        {"name": "data", "mountPath": "/ro", "readOnly": true, "recursiveReadOnly": "Enabled"},
        {"name": "map", "mountPath": "/map"}, {"name": "map", "mountPath": "/one", "subPath": "key"},
    ]);
    joey.apply(&object);
    joey.wait_for("parts", "Ready", seconds(60));
    let log = wait_until("it has said all", seconds(10), || {
        let log = joey.kubectl(&["logs", "parts"]).ok();
        if log.contains("read-only\n") { Ok(log) } else { Err(log) }
    });
    for part in [
        "1000 2000\n",
        "/data 2777 2000\n/map/key 644 2000\n/log 2777 2000\n2000\n",
        "/whole:\nlogs\nx\n\n/whole/logs:\nparts\n",
        "value",
        "closed\n",
    ] {
        assert!(log.contains(part), "{part} in {log}");
    }
    assert!(!log.contains("FieldWithoutEffect"));

    // An expression of a variable that is not there, and a key that is not there: the container waits and says why.
    let mut object = pod("lost", &registry.demo(), &["true"]);
    object["spec"]["volumes"] = json!([{"name": "map", "configMap": {"name": "map"}}]);
    object["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "map", "mountPath": "/x", "subPath": "none"}]);
    joey.apply(&object);
    wait_until("it says what is missing", seconds(30), || {
        let waiting = joey.get("pod", "lost")["status"]["containerStatuses"][0]["state"]["waiting"].clone();
        let told = waiting["message"].as_str().is_some_and(|text| text.contains("subPath \"none\""));
        holds(told && waiting["reason"] == "CreateContainerConfigError", waiting)
    });
    patch(&joey, "configmap", "map", &json!({"data": {"none": "found"}}));
    joey.kubectl(&["wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/lost", "--timeout=30s"]).ok();
}

#[test]
fn an_image_is_a_volume() {
    let (registry, served) = (Registry::with_demo_image(), Served::start());
    let joey = Joey::start();
    let below =
        Layer::new(&[Entry::dir("data/"), Entry::file("data/a", b"old"), Entry::file("gone", b"x")], Packing::Gzip);
    let above =
        Layer::new(&[Entry::dir("data/"), Entry::file("data/a", b"new"), Entry::file(".wh.gone", b"")], Packing::Zstd);
    let data = served.add("data:1", &Image::new(vec![below, above], json!({})));
    let mut object = pod(
        "reads",
        &registry.demo(),
        &["sh", "-c", "cat /image/data/a /part/a; ls /image; touch /image/x || echo closed; sleep 1000"],
    );
    object["spec"]["volumes"] = json!([{"name": "image", "image": {"reference": data, "pullPolicy": "IfNotPresent"}}]);
    object["spec"]["containers"][0]["volumeMounts"] = json!([
        {"name": "image", "mountPath": "/image"}, {"name": "image", "mountPath": "/part", "subPath": "data"}]);
    joey.apply(&object);
    joey.wait_for("reads", "Ready", seconds(60));
    wait_until("it has read", seconds(10), || {
        let log = joey.kubectl(&["logs", "reads"]).ok();
        holds(log.contains("newnewdata\n") && log.contains("closed\n") && !log.contains("gone"), log)
    });
    let refused = joey.joey(&["image", "rm", &data]);
    assert_ne!(refused.code, 0, "an instance uses it: {}", refused.stdout);

    object["metadata"]["name"] = json!("lacks");
    object["spec"]["volumes"][0]["image"]["reference"] = json!(served.image("none:1"));
    joey.apply(&object);
    wait_until("it says that there is none", seconds(30), || {
        let waiting = joey.get("pod", "lacks")["status"]["containerStatuses"][0]["state"]["waiting"].clone();
        let reason = waiting["reason"].as_str().unwrap_or_default().to_owned();
        let named = waiting["message"].as_str().is_some_and(|text| text.contains("none:1"));
        holds(named && matches!(reason.as_str(), "ErrImagePull" | "ImagePullBackOff"), waiting)
    });
}

#[test]
fn what_is_kept_elsewhere_is_refused_in_clear_words() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    for (name, source) in [
        ("nfs", json!({"nfs": {"server": "192.0.2.1", "path": "/"}})),
        ("claim", json!({"persistentVolumeClaim": {"claimName": "c"}})),
    ] {
        let mut object = pod(name, &registry.demo(), &["true"]);
        let mut volume = source.clone();
        volume["name"] = json!("kept");
        object["spec"]["volumes"] = json!([volume]);
        let applied = joey.kubectl_with_input(&["apply", "-f", "-"], &object.to_string());
        let text = match applied.code {
            0 => failed(&joey, name)["message"].to_string(),
            _ => applied.stderr,
        };
        let kind = source.as_object().and_then(|source| source.keys().next().cloned()).expect("it has a kind");
        assert!(text.contains(&kind) && text.contains("emptyDir"), "{text}");
    }
}
