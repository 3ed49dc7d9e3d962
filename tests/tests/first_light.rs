//! Points 1 to 3: `joey up` and `joey down`, and one Pod through the whole chain, by kubectl and by `joey run`.

use joey_tests::host::{namespace, process_runs};
use joey_tests::joey::pod;
use joey_tests::{Joey, Registry, holds, repository, seconds, traffic, wait_until};

#[test]
fn a_pod_runs_all_the_way_through() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let text = std::fs::read_to_string(repository().join("examples/hello.yaml")).expect("the example is there");
    let text = text.replace("127.0.0.1:5055/joey/hello:1", &registry.demo());
    joey.kubectl_with_input(&["apply", "-f", "-"], &text).ok();
    joey.kubectl(&["wait", "--for=condition=Ready", "pod/hello", "--timeout=60s"]).ok();

    let pod = joey.get("pod", "hello");
    assert_eq!(pod["status"]["phase"], "Running");
    assert_eq!(pod["status"]["qosClass"], "Guaranteed");
    let address = pod["status"]["podIP"].as_str().expect("a running Pod has an address");
    assert!(traffic::page(&format!("{address}:80"), "/").unwrap().contains("Hello from Joey"));
    wait_until("the request is in the log", seconds(5), || {
        let log = joey.kubectl(&["logs", "hello"]).ok();
        holds(log.contains("GET / HTTP/1.0\" 200"), log)
    });
    assert_eq!(joey.kubectl(&["exec", "hello", "--", "hostname"]).ok().trim(), "hello");
    let wide = joey.kubectl(&["get", "pods", "-o", "wide"]).ok();
    assert!(wide.contains("hello") && wide.contains("1/1") && wide.contains(address), "{wide}");

    // The same object as the pool sees it: one instance, named after the Pod, with a process on this host.
    let pid = joey.pid_of("hello.default");
    assert!(process_runs(pid));
    assert_ne!(namespace(pid, "net"), namespace(std::process::id(), "net"));
    joey.delete_pod("hello");
    wait_until("its process is gone", seconds(10), || holds(!process_runs(pid), pid));
    assert!(joey.joey(&["ps", "-o", "json"]).ok().find("hello.default").is_none());
}

#[test]
fn joey_run_starts_an_instance_without_kubernetes() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.joey(&["run", &registry.demo(), "--name", "web"]).ok();
    let address = wait_until("it runs", seconds(30), || {
        let instance = joey.joey(&["describe", "web", "-o", "json"]).json();
        let address = instance["status"]["address"].as_str().map(str::to_owned);
        holds(instance["status"]["phase"] == "Running", &instance)?;
        address.ok_or_else(|| instance.to_string())
    });
    wait_until("it serves its page", seconds(10), || traffic::page(&format!("{address}:80"), "/"));
    assert!(joey.joey(&["ps"]).ok().contains("web"));
    assert_eq!(joey.joey(&["exec", "web", "--", "hostname"]).ok().trim(), "web");
    wait_until("its log is there", seconds(5), || {
        let log = joey.joey(&["logs", "web"]).ok();
        holds(log.contains("GET /"), log)
    });
    joey.joey(&["rm", "web"]).ok();
    joey.joey(&["describe", "web"]).fails(1);
}

#[test]
fn sigterm_leaves_pods_running_and_down_leaves_nothing() {
    let registry = Registry::with_demo_image();
    let mut joey = Joey::start();
    joey.run_pod("stays", &registry.demo(), &[]);
    let pid = joey.pid_of("stays.default");
    let address = joey.get("pod", "stays")["status"]["podIP"].as_str().unwrap_or_default().to_owned();
    let ready_lines = joey.output().lines().filter(|line| line.contains("ready")).count();
    assert_eq!(ready_lines, 1, "one line says that it is ready:\n{}", joey.output());

    for kind in ["mount", "cgroup", "interface", "nft", "route", "namespace", "directory", "process"] {
        assert!(joey.traces().iter().any(|trace| trace.starts_with(kind)), "{kind} in {:?}", joey.traces());
    }
    assert_eq!(joey.stop(), 0, "SIGTERM is a clean end");
    assert!(process_runs(pid), "the Pod goes on");
    assert!(traffic::page(&format!("{address}:80"), "/").is_ok(), "and answers");

    joey.up();
    assert_eq!(joey.pid_of("stays.default"), pid, "it was adopted, not started anew");
    joey.down().ok();
    assert!(!process_runs(pid));
    assert!(joey.traces().is_empty(), "{:?}", joey.traces());
    // Also when nothing runs any more.
    joey.joey(&["down"]).ok();
}

#[test]
fn down_works_without_a_running_joey() {
    let registry = Registry::with_demo_image();
    let mut joey = Joey::start();
    let mut object = pod("orphan", &registry.demo(), &[]);
    object["spec"]["restartPolicy"] = "Always".into();
    joey.apply(&object);
    joey.wait_for("orphan", "Ready", seconds(60));
    let pid = joey.pid_of("orphan.default");
    joey.kill();
    assert!(process_runs(pid));
    joey.down().ok();
    assert!(!process_runs(pid));
    assert!(joey.traces().is_empty(), "{:?}", joey.traces());

    joey.up();
    wait_until("the Pod is back, and its restart is counted", seconds(60), || {
        let container = joey.get("pod", "orphan")["status"]["containerStatuses"][0].clone();
        holds(container["restartCount"] == 1 && container["state"]["running"].is_object(), container)
    });
}

#[test]
fn two_containers_share_a_sandbox_and_an_exit_code_is_told() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let mut object = pod("pair", &registry.demo(), &[]);
    let second = serde_json::json!({
        "name": "beside", "image": registry.demo(),
        "command": ["sh", "-c", "until wget -qO- http://127.0.0.1/ >/tmp/page; do :; done; cat /tmp/page; exit 3"],
    });
    object["spec"]["containers"].as_array_mut().expect("a list").push(second);
    joey.apply(&object);
    let status = wait_until("the second container ends", seconds(30), || {
        let pod = joey.get("pod", "pair");
        let all = pod["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
        let beside = all.into_iter().find(|status| status["name"] == "beside").unwrap_or_default();
        if beside["state"]["terminated"].is_object() { Ok(beside) } else { Err(pod["status"].to_string()) }
    });
    assert_eq!(status["state"]["terminated"]["exitCode"], 3);
    assert_eq!(status["state"]["terminated"]["reason"], "Error");
    assert!(joey.kubectl(&["logs", "pair", "-c", "beside"]).ok().contains("Hello from Joey"));
}
