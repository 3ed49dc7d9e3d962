//! The life of a Pod as kubectl tells it: init containers, sidecars, probes, hooks, last words, deadlines, back-off.

use joey_tests::joey::pod;
use joey_tests::{Joey, Program, Registry, holds, seconds, wait_until};
use serde_json::{Value, json};

/// READY, STATUS and RESTARTS as `kubectl get pods` prints them.
fn columns(joey: &Joey, name: &str) -> (String, String, String) {
    let line = joey.kubectl(&["get", "pod", name, "--no-headers"]).ok();
    let mut words = line.split_whitespace().skip(1).map(str::to_owned);
    let mut next = || words.next().unwrap_or_default();
    (next(), next(), next())
}

#[track_caller]
fn shows(joey: &Joey, name: &str, ready: &str, status: &str) {
    wait_until(&format!("{name} shows {ready} {status}"), seconds(40), || {
        let seen = columns(joey, name);
        holds((seen.0.as_str(), seen.1.as_str()) == (ready, status), seen)
    });
}

/// A Pod with a folder that all its containers share.
fn shared(name: &str, image: &str, inits: &[Value], command: &[&str]) -> Value {
    let mut object = pod(name, image, command);
    object["spec"]["volumes"] = json!([{"name": "all", "emptyDir": {}}]);
    object["spec"]["initContainers"] = inits.into();
    for kind in ["containers", "initContainers"] {
        for container in object["spec"][kind].as_array_mut().into_iter().flatten() {
            container["volumeMounts"] = json!([{"name": "all", "mountPath": "/all"}]);
        }
    }
    object
}

fn container(name: &str, image: &str, script: &str) -> Value {
    json!({"name": name, "image": image, "command": ["sh", "-c", script]})
}

fn touch(joey: &Joey, pod: &str, container: &str, file: &str) {
    joey.kubectl(&["exec", pod, "-c", container, "--", "touch", file]).ok();
}

fn events(joey: &Joey, pod: &str) -> String {
    let field = format!("involvedObject.name={pod}");
    joey.kubectl(&["get", "events", "--field-selector", &field]).ok()
}

#[test]
fn init_containers_and_sidecars_go_first() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    let mut side = container("side", &image, "trap 'exit 0' TERM QUIT; echo side; while :; do sleep 0.1; done");
    side["restartPolicy"] = "Always".into();
    side["startupProbe"] =
        json!({"exec": {"command": ["test", "-e", "/all/side"]}, "periodSeconds": 1, "failureThreshold": 100});
    let one = container("one", &image, "echo one; until test -e /all/one; do sleep 0.1; done");
    let two = container("two", &image, "echo two; until test -e /all/two; do sleep 0.1; done");
    joey.apply(&shared("steps", &image, &[one, side, two], &[]));
    shows(&joey, "steps", "0/2", "Init:0/3");
    assert!(joey.joey(&["ps"]).ok().contains("Init:0/3"));
    let now = joey.get("pod", "steps");
    assert_eq!(now["status"]["phase"], "Pending");
    assert_eq!(now["status"]["containerStatuses"][0]["state"]["waiting"]["reason"], "PodInitializing");
    touch(&joey, "steps", "one", "/all/one");
    shows(&joey, "steps", "0/2", "Init:1/3");
    touch(&joey, "steps", "side", "/all/side");
    shows(&joey, "steps", "1/2", "Init:2/3");
    touch(&joey, "steps", "two", "/all/two");
    shows(&joey, "steps", "2/2", "Running");
    let conditions = joey.wait_for("steps", "Initialized", seconds(5));
    assert_eq!(conditions["status"]["initContainerStatuses"][0]["state"]["terminated"]["reason"], "Completed");
    assert!(joey.joey(&["ps"]).ok().contains("2/2"));

    // The logs of all of them, each by name and all at once.
    for (name, text) in [("one", "one\n"), ("side", "side\n"), ("two", "two\n")] {
        assert_eq!(joey.kubectl(&["logs", "steps", "-c", name]).ok(), text);
    }
    let all = joey.kubectl(&["logs", "steps", "--all-containers", "--prefix"]).ok();
    assert!(all.contains("steps/one] one") && all.contains("steps/side] side"), "{all}");
    joey.kubectl(&["delete", "pod", "steps", "--grace-period=10", "--wait=false"]).ok();
    joey.kubectl(&["wait", "--for=delete", "pod/steps", "--timeout=30s"]).ok();
}

#[test]
fn ends_and_failures_have_their_words() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    joey.apply(&shared("init-error", &image, &[container("one", &image, "exit 3")], &["true"]));
    let mut loops = shared("init-loops", &image, &[container("one", &image, "exit 1")], &["true"]);
    loops["spec"]["restartPolicy"] = "Always".into();
    joey.apply(&loops);
    joey.apply(&pod("done", &image, &["true"]));
    let mut half = pod("half", &image, &["sleep", "1000"]);
    half["spec"]["containers"].as_array_mut().expect("a list").push(container("brief", &image, "exit 0"));
    joey.apply(&half);
    let mut crash = pod("crash", &image, &["sh", "-c", "exit 1"]);
    crash["spec"]["restartPolicy"] = "Always".into();
    joey.apply(&crash);
    let mut greedy = pod("greedy", &image, &["sh", "-c", "tail -c 200m /dev/zero"]);
    greedy["spec"]["containers"][0]["resources"] = json!({"limits": {"memory": "32Mi"}});
    joey.apply(&greedy);
    let mut late = pod("late", &image, &["sh", "-c", "trap 'exit 0' TERM QUIT; while :; do sleep 0.1; done"]);
    late["spec"]["activeDeadlineSeconds"] = 2.into();
    joey.apply(&late);

    shows(&joey, "init-error", "0/1", "Init:Error");
    assert_eq!(joey.get("pod", "init-error")["status"]["phase"], "Failed");
    shows(&joey, "init-loops", "0/1", "Init:CrashLoopBackOff");
    shows(&joey, "done", "0/1", "Completed");
    shows(&joey, "half", "1/2", "NotReady");
    shows(&joey, "crash", "0/1", "CrashLoopBackOff");
    assert_ne!(columns(&joey, "crash").2, "0");
    shows(&joey, "greedy", "0/1", "OOMKilled");
    wait_until("its time is over", seconds(20), || {
        let late = joey.get("pod", "late")["status"].clone();
        holds((&late["phase"], &late["reason"]) == (&json!("Failed"), &json!("DeadlineExceeded")), late)
    });

    joey.run_pod("slow", &image, &["sh", "-c", "trap '' TERM QUIT; while :; do sleep 0.1; done"]);
    joey.kubectl(&["delete", "pod", "slow", "--grace-period=4", "--wait=false"]).ok();
    shows(&joey, "slow", "1/1", "Terminating");
    joey.kubectl(&["wait", "--for=delete", "pod/slow", "--timeout=30s"]).ok();
}

#[test]
fn probes_gate_hold_and_restart() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let mut object = pod("probed", &registry.demo(), &[]);
    object["spec"]["restartPolicy"] = "Always".into();
    let container = &mut object["spec"]["containers"][0];
    let often = |mut probe: Value, failures: u32| {
        probe["periodSeconds"] = 1.into();
        probe["failureThreshold"] = failures.into();
        probe
    };
    container["startupProbe"] = often(json!({"exec": {"command": ["test", "-e", "/tmp/up"]}}), 100);
    container["readinessProbe"] = often(json!({"httpGet": {"path": "/ready", "port": 80}}), 1);
    container["livenessProbe"] = often(json!({"exec": {"command": ["test", "!", "-e", "/tmp/ill"]}}), 1);
    joey.apply(&object);
    shows(&joey, "probed", "0/1", "Running");
    let status = || joey.get("pod", "probed")["status"]["containerStatuses"][0].clone();
    assert_eq!(status()["started"], false);
    // The page is there, but who has not started is not asked.
    touch(&joey, "probed", "main", "/var/www/ready");
    wait_until("the startup probe was asked", seconds(10), || {
        let events = events(&joey, "probed");
        holds(events.contains("Startup probe failed"), events)
    });
    assert_eq!((&status()["started"], &status()["ready"]), (&json!(false), &json!(false)));
    touch(&joey, "probed", "main", "/tmp/up");
    joey.wait_for("probed", "Ready", seconds(20));
    joey.kubectl(&["exec", "probed", "--", "rm", "/var/www/ready"]).ok();
    shows(&joey, "probed", "0/1", "Running");
    touch(&joey, "probed", "main", "/var/www/ready");
    joey.wait_for("probed", "Ready", seconds(20));
    assert_eq!(status()["restartCount"], 0);
    touch(&joey, "probed", "main", "/tmp/ill");
    wait_until("it was restarted", seconds(30), || holds(status()["restartCount"] == 1, status()));
    let said = events(&joey, "probed");
    for part in ["Liveness probe failed", "Readiness probe failed: HTTP probe failed with statuscode: 404", "Killing"] {
        assert!(said.contains(part), "{part} in {said}");
    }

    // A port that somebody listens at, and one that nobody does.
    for (name, port, word) in [("open", 80, "1/1"), ("closed", 81, "0/1")] {
        let mut object = pod(name, &registry.demo(), &[]);
        object["spec"]["containers"][0]["readinessProbe"] = often(json!({"tcpSocket": {"port": port}}), 1);
        joey.apply(&object);
        shows(&joey, name, word, "Running");
    }
}

#[test]
fn hooks_and_last_words() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    let script = "echo main; trap 'echo asked; exit 0' TERM QUIT; while :; do sleep 0.1; done";
    let mut object = shared("hooked", &image, &[], &["sh", "-c", script]);
    object["spec"]["containers"][0]["lifecycle"] = json!({
        "postStart": {"exec": {"command": ["sh", "-c", "echo begun > /all/post; echo post > /proc/1/fd/1"]}},
        "preStop": {"exec": {"command": ["sh", "-c", "echo pre > /proc/1/fd/1; sleep 1"]}},
    });
    joey.apply(&object);
    joey.wait_for("hooked", "Ready", seconds(30));
    assert_eq!(joey.kubectl(&["exec", "hooked", "--", "cat", "/all/post"]).ok(), "begun\n");
    let follow = Program::start(&mut joey.kubectl_command(&["logs", "-f", "hooked"]), &joey.scratch().join("hooked"));
    wait_until("the log is followed", seconds(10), || holds(follow.output().contains("main"), follow.output()));
    joey.kubectl(&["delete", "pod", "hooked", "--grace-period=10", "--timeout=30s"]).ok();
    let text = follow.output();
    let (pre, asked) = (text.find("pre\n"), text.find("asked\n"));
    assert!(pre.is_some() && pre < asked, "the hook comes before the signal: {text}");

    joey.apply(&pod("words", &image, &["sh", "-c", "echo -n farewell > /dev/termination-log; exit 1"]));
    let mut logged = pod("logged", &image, &["sh", "-c", "echo said at last; exit 1"]);
    logged["spec"]["containers"][0]["terminationMessagePolicy"] = "FallbackToLogsOnError".into();
    joey.apply(&logged);
    for (name, message) in [("words", "farewell"), ("logged", "said at last\n")] {
        wait_until("it has ended with its words", seconds(30), || {
            let state = joey.get("pod", name)["status"]["containerStatuses"][0]["state"].clone();
            holds(state["terminated"]["message"] == message, state)
        });
    }
}

#[test]
fn hooks_before_the_start_and_before_traffic() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    let mut object = shared("staged", &image, &[], &["sh", "-c", "echo main; while :; do sleep 0.1; done"]);
    let mut helper = container("helper", &image, "while :; do sleep 0.1; done");
    helper["volumeMounts"] = json!([{"name": "all", "mountPath": "/all"}]);
    object["spec"]["containers"].as_array_mut().expect("a list").push(helper);
    object["metadata"]["annotations"] = json!({
        "joey.dev/pre-start.main": "echo preparing; until test -e /all/go; do sleep 0.1; done",
        "joey.dev/pre-online.main": r#"{"command": ["sh", "-c", "echo warming; test -e /all/warm"], "timeoutSeconds": 5}"#,
    });
    joey.apply(&object);
    let log = |text: &str| {
        wait_until("the hook's words are in the log", seconds(20), || {
            let said = joey.kubectl(&["logs", "staged", "-c", "main"]).stdout;
            holds(said.starts_with(text), said)
        });
    };
    shows(&joey, "staged", "1/2", "PreStartHook");
    log("[preStart] preparing\n");
    let described = joey.kubectl(&["describe", "pod", "staged"]).ok();
    assert!(described.contains("Running preStart hook of container main"), "{described}");
    assert!(joey.joey(&["logs", "staged.default", "-c", "main"]).ok().starts_with("[preStart] preparing"));
    touch(&joey, "staged", "helper", "/all/go");
    shows(&joey, "staged", "1/2", "Running");
    wait_until("the hook before traffic was tried", seconds(20), || {
        let said = events(&joey, "staged");
        holds(said.contains("FailedPreOnlineHook") && said.contains("tried again in"), said)
    });
    log("[preStart] preparing\nmain\n[preOnline] warming\n");
    touch(&joey, "staged", "helper", "/all/warm");
    joey.wait_for("staged", "Ready", seconds(20));

    let mut fails = pod("unprepared", &image, &["sh", "-c", "echo never"]);
    fails["metadata"]["annotations"] = json!({"joey.dev/pre-start.main": "echo missing; exit 3"});
    joey.apply(&fails);
    shows(&joey, "unprepared", "0/1", "PreStartHookError");
    let status = joey.get("pod", "unprepared")["status"].clone();
    let end = &status["containerStatuses"][0]["state"]["terminated"];
    assert_eq!((&status["phase"], &end["exitCode"]), (&json!("Failed"), &json!(3)));
    assert_eq!(joey.kubectl(&["logs", "unprepared"]).ok(), "[preStart] missing\n");

    let refused = |name: &str, annotations: Value| {
        let mut bad = pod(name, &image, &[]);
        bad["metadata"]["annotations"] = annotations;
        joey.kubectl_with_input(&["apply", "-f", "-"], &bad.to_string()).fails(1)
    };
    let said = refused("wrong", json!({"joey.dev/pre-start.web": "true", "joey.dev/pre-online.main": "[ -e /x ]"}));
    for part in ["metadata.annotations[joey.dev/pre-start.web]", "there are main", "begins like JSON"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    let said = refused("unprepared", json!({"joey.dev/pre-start.main": "true"}));
    assert!(said.contains("fixed for the Pod's life; delete the Pod and create it with another"), "{said}");
}
