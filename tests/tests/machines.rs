//! Class `rund` on the whole system: Pods in virtual machines, as users see them. What a class must do in all is the conformance suite's
//! (`crates/agent/tests/rund.rs`).

use std::time::Instant;

use joey_tests::host::{process_runs, process_start};
use joey_tests::joey::{Settings, pod};
use joey_tests::{Joey, Registry, holds, seconds, wait_until};
use serde_json::{Value, json};

/// A Pod in a machine.
fn machine(name: &str, image: &str, command: &[&str]) -> Value {
    let mut object = pod(name, image, command);
    object["spec"]["runtimeClassName"] = json!("rund");
    object
}

fn start() -> Option<(Registry, Joey)> {
    let registry = Registry::with_demo_image();
    Joey::start_with_machines(Settings::default()).map(|joey| (registry, joey))
}

fn events(joey: &Joey, name: &str) -> String {
    joey.kubectl(&["get", "events", "-o", "json", "--field-selector", &format!("involvedObject.name={name}")]).ok()
}

#[test]
fn a_pod_in_a_machine_is_a_pod() {
    let Some((registry, joey)) = start() else { return };
    let image = registry.demo();
    joey.apply(
        &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"key": "old"}}),
    );
    let mut object = machine("whole", &image, &["sh", "-c", "cat /work/first; nginx -g 'daemon off;'"]);
    let mounts = json!([{"name": "work", "mountPath": "/work"}, {"name": "settings", "mountPath": "/settings"}]);
    object["spec"]["volumes"] =
        json!([{"name": "work", "emptyDir": {}}, {"name": "settings", "configMap": {"name": "settings"}}]);
    object["spec"]["initContainers"] = json!([{
        "name": "first", "image": image, "command": ["sh", "-c", "echo from first > /work/first"], "volumeMounts": mounts,
    }]);
    let main = &mut object["spec"]["containers"][0];
    main["volumeMounts"] = mounts.clone();
    main["resources"] = json!({"limits": {"memory": "128Mi", "cpu": "1"}});
    main["readinessProbe"] = json!({"httpGet": {"path": "/", "port": 80}, "periodSeconds": 1});
    let side = json!({"name": "side", "image": image, "command": ["sh", "-c", "while :; do sleep 1; done"], "volumeMounts": mounts});
    object["spec"]["containers"].as_array_mut().expect("containers").push(side);
    joey.apply(&object);
    let ready = joey.wait_for("whole", "Ready", seconds(90));
    let inside = |container: &str, script: &str| {
        joey.kubectl(&["exec", "whole", "-c", container, "--", "sh", "-c", script]).ok().trim().to_owned()
    };
    let own = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("this kernel has a release");
    assert_ne!(inside("main", "uname -r"), own.trim());
    assert_eq!(inside("side", "cat /work/first; hostname"), "from first\nwhole");
    assert_eq!(joey.kubectl(&["logs", "whole", "-c", "main"]).ok().lines().next(), Some("from first"));
    let address = ready["status"]["podIP"].as_str().expect("an address").to_owned();
    // From the host, from another Pod, and back.
    let page = joey_tests::run(std::process::Command::new("curl").args([
        "-fsS",
        "--max-time",
        "10",
        &format!("http://{address}/"),
    ]));
    assert!(page.ok().contains("Joey"));
    joey.run_pod("beside", &image, &["nginx", "-g", "daemon off;"]);
    let beside = joey.get("pod", "beside")["status"]["podIP"].as_str().expect("an address").to_owned();
    for (from, to) in [("beside", &address), ("whole", &beside)] {
        let said = joey.kubectl(&["exec", from, "--", "timeout", "10", "wget", "-qO-", &format!("http://{to}/")]).ok();
        assert!(said.contains("Joey"), "{from}: {said}");
    }
    // What changes while it runs.
    joey.apply(
        &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"key": "new"}}),
    );
    wait_until("the ConfigMap is renewed", seconds(20), || holds(inside("side", "cat /settings/key") == "new", "old"));
    joey.kubectl(&["debug", "whole", "--image", &image, "--target", "main", "-c", "look", "--", "sleep", "1000"]).ok();
    wait_until("the debug container runs", seconds(30), || {
        let status = joey.get("pod", "whole")["status"]["ephemeralContainerStatuses"][0]["state"].clone();
        holds(status["running"].is_object(), status)
    });
    assert!(inside("look", "cat /proc/1/cmdline").contains("nginx"), "it sees what it looks at");
    // Files both ways.
    let file = joey.scratch().join("file");
    std::fs::write(&file, vec![7; 3 << 20]).expect("a file");
    joey.kubectl(&["cp", &file.display().to_string(), "whole:/tmp/file", "-c", "main"]).ok();
    let back = joey.scratch().join("back");
    joey.kubectl(&["cp", "whole:/tmp/file", &back.display().to_string(), "-c", "main"]).ok();
    assert_eq!(std::fs::read(back).expect("it came back"), std::fs::read(file).expect("a file"));
    let instance: Value = joey.joey(&["describe", "whole.default", "-o", "json"]).json();
    assert!(instance["status"]["timings"]["sandbox.guest"].is_u64(), "{}", instance["status"]["timings"]);
    joey.delete_pod("whole");
}

#[test]
fn machines_outlive_the_daemon_and_are_adopted() {
    let Some((registry, mut joey)) = start() else { return };
    let count = ["sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.1; done"];
    for name in ["a", "b"] {
        joey.apply(&machine(name, &registry.demo(), &count));
    }
    let monitor = |joey: &Joey, name: &str| {
        let instance = joey.instance_of(name)["id"].as_str().expect("an id").to_owned();
        let record = joey.data().join("instances").join(instance).join("vm/vmm.pid");
        let text = std::fs::read_to_string(record).expect("a record");
        text.split(' ').next().and_then(|pid| pid.parse::<u32>().ok()).expect("a process")
    };
    let mut known = Vec::new();
    for name in ["a", "b"] {
        joey.wait_for(name, "Ready", seconds(90));
        let pid = monitor(&joey, name);
        known.push((pid, process_start(pid)));
    }
    for _ in 0..2 {
        joey.kill();
        assert!(known.iter().all(|(pid, _)| process_runs(*pid)), "machines go on without it");
        let begin = Instant::now();
        joey.up();
        wait_until("all Pods are adopted", seconds(10), || {
            let entered = |name| joey.kubectl(&["exec", name, "--", "true"]).code == 0;
            holds(["a", "b"].into_iter().all(entered), "not all can be entered")
        });
        assert!(begin.elapsed() < seconds(10), "adopted after {:?}", begin.elapsed());
        for (name, before) in ["a", "b"].iter().zip(&known) {
            let pid = monitor(&joey, name);
            assert_eq!(&(pid, process_start(pid)), before, "the same machine");
        }
    }
    for name in ["a", "b"] {
        let log = joey.kubectl(&["logs", name]).ok();
        assert!(
            log.lines().enumerate().all(|(number, line)| line == number.to_string()),
            "no line is missing or doubled"
        );
        assert_eq!(joey.get("pod", name)["status"]["containerStatuses"][0]["restartCount"], 0);
    }
    // One that is killed is made again where its Pod says so.
    let mut again = machine("again", &registry.demo(), &["sleep", "1000"]);
    again["spec"]["restartPolicy"] = json!("Always");
    joey.apply(&again);
    joey.wait_for("again", "Ready", seconds(60));
    // Only who started one is told by the kernel how it ended.
    for (name, ends, reason) in [("a", true, "MachineLost"), ("again", false, "MachineKilled")] {
        let pid = i32::try_from(monitor(&joey, name)).expect("a process id");
        let begin = Instant::now();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("it runs");
        wait_until("the loss is told", seconds(5), || {
            let events = events(&joey, name);
            holds(events.contains(reason), events)
        });
        assert!(begin.elapsed() < seconds(3), "noticed after {:?}", begin.elapsed());
        match ends {
            true => wait_until("the Pod has failed", seconds(10), || {
                let phase = joey.get("pod", name)["status"]["phase"].clone();
                holds(phase == "Failed", phase)
            }),
            false => wait_until("the Pod runs again", seconds(60), || {
                let status = joey.get("pod", name)["status"]["containerStatuses"][0].clone();
                holds(status["restartCount"] == 1 && status["ready"] == true, status)
            }),
        }
    }
}

#[test]
fn what_runs_machines_is_told() {
    let Some((_registry, joey)) = start() else { return };
    let hosts: Value = joey.joey(&["host", "ls", "-o", "json"]).json();
    let machines = hosts[0]["machines"].as_str().expect("it has machines");
    assert!(machines.contains("QEMU") && (machines.contains("emulated") || machines.contains("KVM")), "{machines}");
    drop(joey);
    // Without a guest there is no class, and it says what to do.
    let joey = Joey::start();
    let refused = joey.joey(&["run", "--class", "rund", "--name", "none", "registry.example/none:1"]);
    assert!(refused.clone().fails(1).contains("joey guest build"), "{refused:?}");
}
