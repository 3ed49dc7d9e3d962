//! Point 4: the Kubernetes API as real kubectl uses it, and what callers without rights get.

use std::process::Command;

use joey_tests::joey::pod;
use joey_tests::{Joey, Program, Registry, holds, run, seconds, wait_until};
use serde_json::json;

#[test]
fn objects_are_made_read_changed_and_deleted() {
    let joey = Joey::start();
    joey.kubectl(&["create", "namespace", "burrow"]).ok();
    joey.kubectl(&["create", "configmap", "map", "-n", "burrow", "--from-literal=a=1", "--from-literal=b=2"]).ok();
    joey.kubectl(&["create", "secret", "generic", "key", "-n", "burrow", "--from-literal=word=honey"]).ok();
    let secret = joey.kubectl(&["get", "secret", "key", "-n", "burrow", "-o", "jsonpath={.data.word}"]).ok();
    assert_eq!(secret, "aG9uZXk=");
    wait_until("the namespace has its service account", seconds(10), || {
        let outcome = joey.kubectl(&["get", "serviceaccount", "default", "-n", "burrow"]);
        holds(outcome.code == 0, outcome.stderr)
    });

    // The three kinds of patch, and what each does to a map.
    let patch = |kind: &str, body: &str| {
        joey.kubectl(&["patch", "configmap", "map", "-n", "burrow", "--type", kind, "-p", body]).ok();
        joey.kubectl(&["get", "configmap", "map", "-n", "burrow", "-o", "json"]).json()["data"].clone()
    };
    assert_eq!(patch("merge", r#"{"data":{"a":null,"c":"3"}}"#), json!({"b": "2", "c": "3"}));
    assert_eq!(patch("json", r#"[{"op":"replace","path":"/data/b","value":"4"}]"#), json!({"b": "4", "c": "3"}));
    assert_eq!(patch("strategic", r#"{"data":{"d":"5"}}"#), json!({"b": "4", "c": "3", "d": "5"}));
    let stale = r#"{"metadata":{"resourceVersion":"1"},"data":{"a":"x"}}"#;
    let refused = joey.kubectl(&["patch", "configmap", "map", "-n", "burrow", "--type=merge", "-p", stale]).fails(1);
    assert!(refused.contains("Conflict") || refused.contains("modified"), "{refused}");

    joey.kubectl(&["label", "configmap", "map", "-n", "burrow", "colour=brown"]).ok();
    joey.kubectl(&["annotate", "configmap", "map", "-n", "burrow", "note=1"]).ok();
    let listed =
        |selector: &str| joey.kubectl(&["get", "configmap", "-n", "burrow", "-l", selector, "-o", "name"]).ok();
    assert_eq!(listed("colour=brown").trim(), "configmap/map");
    assert_eq!(listed("colour in (brown, grey),!absent").trim(), "configmap/map");
    assert_eq!(listed("colour!=brown").matches("/map").count(), 0);

    joey.kubectl(&["delete", "namespace", "burrow", "--timeout=30s"]).ok();
    let gone = joey.kubectl(&["get", "configmap", "map", "-n", "burrow"]).fails(1);
    assert!(gone.contains("NotFound") || gone.contains("not found"), "{gone}");
}

#[test]
fn apply_is_idempotent_and_shows_what_changed() {
    let joey = Joey::start();
    let object =
        |value: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}, "data": {"k": value}});
    assert!(joey.apply(&object("1")).contains("created"));
    assert!(joey.apply(&object("1")).contains("unchanged"));
    assert!(joey.apply(&object("2")).contains("configured"));
    let unknown = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "n"}, "dada": {}});
    let refused = joey.kubectl_with_input(&["apply", "-f", "-"], &unknown.to_string()).fails(1);
    assert!(refused.contains("dada"), "an unknown field is named: {refused}");
    let dry = joey.kubectl_with_input(&["apply", "--dry-run=server", "-f", "-"], &object("3").to_string()).ok();
    assert!(dry.contains("dry run"), "{dry}");
    assert_eq!(joey.get("configmap", "m")["data"]["k"], "2");
}

#[test]
fn a_pod_is_described_followed_and_entered() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.run_pod(
        "talks",
        &registry.demo(),
        &["sh", "-c", "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.05; done"],
    );

    let described = joey.kubectl(&["describe", "pod", "talks"]).ok();
    for part in ["talks", "Running", "Started", "Pulled", "Scheduled", &registry.demo()] {
        assert!(described.contains(part), "{part} in {described}");
    }
    let tail = joey.kubectl(&["logs", "talks", "--tail=3", "--timestamps"]).ok();
    assert_eq!(tail.lines().count(), 3, "{tail}");
    assert!(tail.lines().all(|line| line.contains("Z line ")), "{tail}");

    let follow = Program::start(&mut joey.kubectl_command(&["logs", "-f", "talks"]), &joey.scratch().join("follow"));
    wait_until("lines come as they are written", seconds(20), || {
        let text = follow.output();
        holds(text.contains("line 0\n") && text.contains("line 40\n"), text.len())
    });
    let text = follow.output();
    for (expected, line) in text.lines().enumerate().take(40) {
        assert_eq!(line, format!("line {expected}"), "no line is lost or doubled");
    }

    assert_eq!(joey.kubectl(&["exec", "talks", "--", "sh", "-c", "echo out; echo err >&2; exit 5"]).code, 5);
    let outcome = joey.kubectl(&["exec", "talks", "--", "sh", "-c", "echo out; echo err >&2"]);
    assert_eq!(outcome.stdout, "out\n");
    assert!(outcome.stderr.contains("err"));
    let fed = joey.kubectl_with_input(&["exec", "-i", "talks", "--", "wc", "-c"], &"x".repeat(300_000)).ok();
    assert_eq!(fed.trim(), "300000");
    let missing = joey.kubectl(&["exec", "talks", "--", "no-such-program"]);
    assert_ne!(missing.code, 0);
    assert!(missing.stderr.contains("no-such-program"), "{}", missing.stderr);
}

#[test]
fn a_followed_log_ends_with_its_container() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let followed = |arguments: &[&str]| {
        let mut follow = Program::start(&mut joey.kubectl_command(arguments), &joey.scratch().join("follow"));
        move || (follow.wait(seconds(30)), follow.output())
    };
    let all: String = (1..=20_000).map(|number| format!("{number}\n")).collect();
    joey.run_pod("brief", &registry.demo(), &["sh", "-c", "sleep 3; seq 1 20000"]);
    assert_eq!(followed(&["logs", "-f", "brief"])(), (0, all.clone()), "it ends while it is followed");
    joey.kubectl(&["wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/brief", "--timeout=30s"]).ok();
    assert_eq!(joey.kubectl(&["logs", "-f", "brief"]).ok(), all, "it had ended before");
    assert_eq!(joey.joey(&["logs", "-f", "brief.default"]).ok(), all);

    // A container that is started again: the log followed is that of its present run.
    let mut again = pod("again", &registry.demo(), &["sh", "-c", "echo run; sleep 3"]);
    again["spec"]["restartPolicy"] = "Always".into();
    joey.apply(&again);
    joey.wait_for("again", "Ready", seconds(60));
    assert_eq!(joey.kubectl(&["logs", "-f", "again"]).ok(), "run\n");

    // One that is deleted meanwhile; the image asks for SIGQUIT.
    joey.run_pod(
        "deleted",
        &registry.demo(),
        &["sh", "-c", "trap 'echo end; exit 0' QUIT; echo begin; sleep 1000 & wait"],
    );
    let mut follow =
        Program::start(&mut joey.kubectl_command(&["logs", "-f", "deleted"]), &joey.scratch().join("ends"));
    wait_until("it is followed", seconds(20), || holds(follow.output() == "begin\n", follow.output()));
    joey.kubectl(&["delete", "pod", "deleted", "--timeout=30s"]).ok();
    assert_eq!((follow.wait(seconds(30)), follow.output().as_str()), (0, "begin\nend\n"));
}

#[test]
fn what_keeps_a_pod_from_running_is_told_as_a_kubelet_tells_it() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let column = |name: &str| {
        let line = joey.kubectl(&["get", "pod", name, "--no-headers"]).ok();
        line.split_whitespace().nth(2).unwrap_or_default().to_owned()
    };
    joey.apply(&pod("malformed", "Bad//Ref:::", &[]));
    wait_until("the image's name is told", seconds(20), || {
        holds(column("malformed") == "InvalidImageName", column("malformed"))
    });
    let status = joey.get("pod", "malformed")["status"].clone();
    assert_eq!(status["phase"], "Pending");
    let message = status["containerStatuses"][0]["state"]["waiting"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("couldn't parse image name") && message.contains("Bad//Ref:::"), "{message}");
    wait_until("it is an event", seconds(10), || {
        let events = joey.kubectl(&["describe", "pod", "malformed"]).ok();
        holds(events.contains("InspectFailed") && events.contains("Error: InvalidImageName"), events)
    });
    let refused = joey.kubectl(&["logs", "malformed"]).fails(1);
    assert!(refused.contains("is waiting to start: InvalidImageName"), "{refused}");
    // Mended, it runs, and nothing of its trouble is left in its conditions.
    joey.kubectl(&["set", "image", "pod/malformed", &format!("main={}", registry.demo())]).ok();
    let mended = joey.wait_for("malformed", "Ready", seconds(60));
    assert_eq!(column("malformed"), "Running");
    for condition in mended["status"]["conditions"].as_array().expect("a list") {
        assert!(condition["reason"].is_null() && condition["message"].is_null(), "{condition}");
    }

    let mut object = pod("refused", &registry.demo(), &[]);
    object["spec"]["setHostnameAsFQDN"] = true.into();
    joey.apply(&object);
    wait_until("it is refused", seconds(20), || holds(column("refused") == "UnsupportedPod", column("refused")));
    for (name, command, word) in [
        ("fails", &["sh", "-c", "exit 3"][..], "Error"),
        ("absent", &["no-such-program"], "StartError"),
        ("done", &["true"], "Completed"),
    ] {
        joey.apply(&pod(name, &registry.demo(), command));
        wait_until(&format!("Pod {name} is {word}"), seconds(20), || holds(column(name) == word, column(name)));
    }
    let outcome = joey.kubectl(&["exec", "malformed", "--", "no-such-program"]);
    assert!(
        outcome.code != 0 && outcome.stderr.contains("\"no-such-program\": executable file not found"),
        "{outcome:?}"
    );
    joey.kubectl(&["exec", "done", "--", "true"]).fails(1);
}

#[test]
fn a_terminal_is_a_terminal() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.run_pod("term", &registry.demo(), &["sleep", "1000"]);
    let kubectl = joey_tests::joey::kubectl().display().to_string();
    // The size follows the connection (remotecommand sends it as a message of its own), so the command looks until it is there.
    let inside = "tty; n=0; until [ \"$(stty size 2>/dev/null)\" = \"33 77\" ] || [ $n -ge 3000 ]; do n=$((n+1)); done; \
                  stty size; echo $TERM; read x; echo got-$x";
    let line = format!(
        "stty rows 33 cols 77; {kubectl} --kubeconfig {}/kubeconfig exec -it term -- sh -c '{inside}'",
        joey.data().display()
    );
    // `script` gives the command a terminal of its own.
    let mut command = Command::new("script");
    command.args(["-qec", &line, "/dev/null"]).env("HOME", joey.scratch()).env("TERM", "xterm");
    let seen = joey_tests::program::run_with_input(&mut command, b"bounce\n").ok();
    for part in ["/dev/pts/0", "33 77", "got-bounce"] {
        assert!(seen.contains(part), "{part} in {seen}");
    }
}

#[test]
fn watches_begin_where_they_are_told_and_miss_nothing() {
    let joey = Joey::start();
    let list = joey.kubectl(&["get", "--raw", "/api/v1/namespaces/default/configmaps"]).json();
    let revision = list["metadata"]["resourceVersion"].as_str().expect("a list has a resourceVersion").to_owned();
    for number in 0..5 {
        joey.kubectl(&["create", "configmap", &format!("w{number}")]).ok();
    }
    joey.kubectl(&["delete", "configmap", "w2"]).ok();
    let path = format!(
        "/api/v1/namespaces/default/configmaps?watch=true&resourceVersion={revision}&allowWatchBookmarks=true&timeoutSeconds=2"
    );
    let text = joey.kubectl(&["get", "--raw", &path]).ok();
    let events: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("a watch sends an object a line")).collect();
    let seen: Vec<_> = events
        .iter()
        .filter(|event| event["type"] != "BOOKMARK")
        .map(|e| {
            format!("{} {}", e["type"].as_str().unwrap_or(""), e["object"]["metadata"]["name"].as_str().unwrap_or(""))
        })
        .collect();
    assert_eq!(seen, ["ADDED w0", "ADDED w1", "ADDED w2", "ADDED w3", "ADDED w4", "DELETED w2"]);

    let watch = Program::start(&mut joey.kubectl_command(&["get", "configmap", "-w"]), &joey.scratch().join("watch"));
    wait_until("the watch has begun", seconds(10), || holds(watch.output().contains("w4"), watch.output()));
    joey.kubectl(&["create", "configmap", "later"]).ok();
    wait_until("it shows what comes later", seconds(10), || holds(watch.output().contains("later"), watch.output()));
}

#[test]
fn pages_of_a_list_hold_together() {
    let joey = Joey::start();
    let objects: Vec<_> = (0..25)
        .map(|i| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": format!("p{i:02}")}}))
        .collect();
    joey.apply(&json!({"apiVersion": "v1", "kind": "List", "items": objects}));
    let paged = joey.kubectl(&["get", "configmap", "--chunk-size=10", "-o", "name"]).ok();
    let whole = joey.kubectl(&["get", "configmap", "--chunk-size=0", "-o", "name"]).ok();
    assert_eq!(paged, whole);
    assert!(whole.lines().count() >= 25);
    let first = joey.kubectl(&["get", "--raw", "/api/v1/namespaces/default/configmaps?limit=10"]).json();
    assert_eq!(first["items"].as_array().map(Vec::len), Some(10));
    assert!(first["metadata"]["continue"].is_string(), "{}", first["metadata"]);
}

#[test]
fn discovery_and_explain() {
    let joey = Joey::start();
    let resources = joey.kubectl(&["api-resources"]).ok();
    for kind in ["pods", "namespaces", "nodes", "events", "configmaps", "secrets", "serviceaccounts", "leases"] {
        assert!(resources.lines().any(|line| line.starts_with(kind)), "{kind} in {resources}");
    }
    let explained = joey.kubectl(&["explain", "pod.spec.containers"]).ok();
    assert!(explained.contains("containers") && explained.contains("image"), "{explained}");
    assert!(joey.kubectl(&["cluster-info"]).ok().contains(&joey.listen().to_string()));
    assert!(joey.kubectl(&["version"]).ok().contains("Server Version"));
    let nodes = joey.kubectl(&["get", "nodes"]).ok();
    assert!(nodes.contains(" Ready"), "{nodes}");
}

#[test]
fn field_selectors_and_wait() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.apply(&pod("brief", &registry.demo(), &["true"]));
    joey.kubectl(&["wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/brief", "--timeout=30s"]).ok();
    joey.run_pod("long", &registry.demo(), &["sleep", "1000"]);
    let select = |field: &str| joey.kubectl(&["get", "pods", "--field-selector", field, "-o", "name"]).ok();
    assert_eq!(select("status.phase=Running").trim(), "pod/long");
    assert_eq!(select("status.phase!=Running").trim(), "pod/brief");
    assert_eq!(select("metadata.name=brief").trim(), "pod/brief");
    let node = joey.get("pod", "long")["spec"]["nodeName"].as_str().expect("it is bound").to_owned();
    assert_eq!(select(&format!("spec.nodeName={node}")).lines().count(), 2);
    joey.kubectl(&["delete", "pod", "long", "--wait=false"]).ok();
    joey.kubectl(&["wait", "--for=delete", "pod/long", "--timeout=30s"]).ok();
}

#[test]
fn callers_without_rights_get_health_and_version_only() {
    let joey = Joey::start();
    let status = |path: &str, header: Option<&str>| {
        let mut command = Command::new("curl");
        command.args(["-sk", "-o", "/dev/null", "-w", "%{http_code}"]);
        if let Some(header) = header {
            command.args(["-H", header]);
        }
        run(command.arg(format!("https://{}{path}", joey.listen()))).ok()
    };
    for open in ["/healthz", "/livez", "/readyz", "/version"] {
        assert_eq!(status(open, None), "200", "{open}");
    }
    for closed in ["/api", "/apis", "/api/v1/pods", "/api/v1/namespaces/default/secrets", "/openapi/v3", "/metrics"] {
        assert!(matches!(status(closed, None).as_str(), "401" | "403"), "{closed}");
    }
    assert_eq!(status("/api/v1/pods", Some("Authorization: Bearer wrong")), "401");

    // A service account's token opens what it was made for and no more.
    wait_until("the default service account is there", seconds(10), || {
        let outcome = joey.kubectl(&["get", "serviceaccount", "default"]);
        holds(outcome.code == 0, outcome.stderr)
    });
    let outcome = joey.kubectl(&["create", "token", "default"]);
    if outcome.code == 0 {
        let header = format!("Authorization: Bearer {}", outcome.stdout.trim());
        assert_eq!(status("/api/v1/namespaces/default/secrets", Some(&header)), "403");
    }
    let kubeconfig = std::fs::metadata(joey.data().join("kubeconfig")).expect("it is there");
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&kubeconfig.permissions()) & 0o777, 0o600);
}

#[test]
fn a_changed_pod_is_waited_for_and_told_of() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.run_pod("web", &registry.demo(), &["sleep", "1000"]);
    let other = format!("{}-other", registry.demo());
    joey.kubectl(&["set", "image", "pod/web", &format!("{}={other}", container(&joey))]).ok();
    // kubectl waits for conditions that speak of the changed specification.
    joey.kubectl(&["wait", "--for=condition=Ready", "pod/web", "--timeout=20s"]).ok();
    let pod = joey.get("pod", "web");
    assert_eq!(pod["status"]["observedGeneration"], pod["metadata"]["generation"]);
    wait_until("an event says that the image stays", seconds(20), || {
        let events = joey.kubectl(&["get", "events", "--field-selector=reason=ChangeWithoutEffect"]).ok();
        holds(events.contains("keeps the image it was started with"), events)
    });
}

fn container(joey: &Joey) -> String {
    joey.get("pod", "web")["spec"]["containers"][0]["name"].as_str().expect("a name").to_owned()
}
