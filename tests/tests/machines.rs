//! Class `rund` on the whole system: Pods in virtual machines, as users see them. What a class must do in all is the conformance suite's
//! (`crates/sandbox/tests/rund/main.rs`).

use std::time::Instant;

use joey_tests::host::{process_runs, process_start};
use joey_tests::intake::Intake;
use joey_tests::joey::{Settings, pod};
use joey_tests::nfs::NfsServer;
use joey_tests::{Joey, Registry, holds, run, seconds, wait_until};
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

fn seconds_since_epoch() -> u64 {
    std::time::UNIX_EPOCH.elapsed().expect("a time after 1970").as_secs()
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
    // It took seconds to boot, and knows what time it is all the same.
    let before = seconds_since_epoch();
    let told: u64 = inside("main", "date +%s").parse().expect("seconds");
    let after = seconds_since_epoch();
    assert!((before - 1..=after + 1).contains(&told), "its clock says {told}, and the host's {before} to {after}");
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
fn a_daemon_killed_while_it_makes_a_machine_costs_the_pod_nothing() {
    let Some((registry, mut joey)) = start() else { return };
    for step in ["machine.made", "machine.told"] {
        joey.kill();
        joey.crash_at(Some(step));
        joey.up();
        let name = step.replace('.', "-");
        let mut once = machine(&name, &registry.demo(), &["sh", "-c", "echo begun; exec sleep 1000"]);
        once["spec"]["restartPolicy"] = json!("Never");
        joey.apply(&once);
        wait_until("the daemon is killed there", seconds(90), || holds(joey.program().ended().is_some(), step));
        joey.crash_at(None);
        joey.up();
        joey.wait_for(&name, "Ready", seconds(90));
        let status = joey.get("pod", &name)["status"]["containerStatuses"][0].clone();
        assert_eq!(status["restartCount"], 0, "{step}: {status}");
        // It is ready when its process runs, which is before that has said anything.
        wait_until("it has begun once", seconds(30), || {
            let said = joey.kubectl(&["logs", &name]).ok();
            holds(said == "begun\n", said)
        });
        joey.kubectl(&["delete", "pod", &name, "--grace-period=1"]).ok();
    }
    joey.down().ok();
    assert!(joey.traces().is_empty(), "{:?}", joey.traces());
}

#[test]
fn logs_of_machines_reach_their_sink_and_crashes_leave_cores() {
    let intake = Intake::start();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("joey.yaml");
    let sinks = json!({"logs": {"default": "web"}, "sinks": {"web": {"http": {"url": intake.url()}}}});
    std::fs::write(&file, sinks.to_string()).expect("a fresh folder is writable");
    let arguments = ["--config", &file.display().to_string(), "--core-dumps", "8Mi"].map(str::to_owned).to_vec();
    let registry = Registry::with_demo_image();
    let Some(mut joey) = Joey::start_with_machines(Settings { arguments, ..Settings::default() }) else { return };
    let script = "mkdir /log; i=0; while [ $i -lt 300 ]; do echo out $i; echo file $i >>/log/a; i=$((i+1)); sleep 0.02; done; \
                  sleep 1000";
    let mut object = machine("logs", &registry.demo(), &["sh", "-c", script]);
    object["spec"]["containers"][0]["env"] =
        json!([{"name": "aliyun_logs_out", "value": "stdout"}, {"name": "aliyun_logs_app", "value": "/log/*"}]);
    joey.apply(&object);
    joey.wait_for("logs", "Ready", seconds(90));
    wait_until("the first lines come", seconds(30), || holds(intake.of("app").len() > 5, intake.records().len()));
    joey.kill();
    joey.up();
    wait_until("all of it is written", seconds(60), || {
        let log = joey.kubectl(&["logs", "logs", "--tail", "1"]).stdout;
        holds(log.trim() == "out 299", log)
    });
    // A crash is seen by the machine's own kernel.
    joey.joey(&["diagnose", "core", "enable", "logs.default"]).ok();
    assert_ne!(joey.kubectl(&["exec", "logs", "--", "sh", "-c", "kill -SEGV $$"]).code, 0);
    let core = run(joey.joey_command(&["diagnose", "core", "get", "logs.default"]).current_dir(joey.scratch())).ok();
    assert!(core.starts_with("main.sh.") && core.contains(".SIGSEGV."), "{core}");
    let bytes = std::fs::read(joey.scratch().join(core.trim())).expect("it was fetched");
    assert!(bytes.starts_with(b"\x7fELF") && bytes[16..18] == [4, 0], "it is a core");
    // The last words come, though the machine is gone a moment later.
    joey.kubectl(&["exec", "logs", "--", "sh", "-c", "echo file 300 >>/log/a"]).ok();
    joey.delete_pod("logs");
    for (source, count) in [("app", 301), ("out", 300)] {
        let number = |record: &Value| record["message"].as_str()?.rsplit(' ').next()?.parse::<u64>().ok();
        let seen = || intake.of(source).iter().filter_map(number).collect::<Vec<_>>();
        wait_until("the last line comes", seconds(30), || holds(seen().contains(&(count - 1)), seen().last().copied()));
        let mut next = 0;
        for number in seen() {
            assert!(number <= next, "{source}: {number} came before {next}");
            next = next.max(number + 1);
        }
        assert_eq!(next, count, "{source}");
    }
}

/// A Pod in a machine with a volume of a server's.
fn with_nfs(name: &str, image: &str, server: &str, path: &str, command: &[&str]) -> Value {
    let mut object = machine(name, image, command);
    object["spec"]["volumes"] = json!([{"name": "far", "nfs": {"server": server, "path": path}}]);
    object["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "far", "mountPath": "/far"}]);
    object
}

#[test]
fn what_a_server_of_nfs_has_is_mounted_by_the_machine() {
    let Some(mut server) = NfsServer::start() else { return };
    let Some((registry, joey)) = start() else { return };
    let (image, address) = (registry.demo(), server.address.to_string());
    let told = |name: &str, words: &str| {
        wait_until("it is told why", seconds(60), || {
            let events = events(&joey, name);
            holds(
                events.contains("FailedMount") && events.contains("MountVolume.SetUp failed") && events.contains(words),
                events,
            )
        });
    };
    std::fs::write(server.export().join("greeting"), "from far\n").expect("it is the test's");
    let mut object = with_nfs("far", &image, &address, "/export", &["sh", "-c", "cat /far/greeting; sleep 1000"]);
    let volumes = object["spec"]["volumes"].as_array_mut().expect("volumes");
    volumes.push(json!({"name": "closed", "nfs": {"server": address, "path": "/export", "readOnly": true}}));
    object["spec"]["containers"][0]["volumeMounts"].as_array_mut().expect("mounts").extend([
        json!({"name": "closed", "mountPath": "/closed"}),
        json!({"name": "far", "mountPath": "/part", "subPath": "made/part"}),
    ]);
    joey.apply(&object);
    joey.wait_for("far", "Ready", seconds(90));
    wait_until("it is read", seconds(20), || {
        let log = joey.kubectl(&["logs", "far"]).ok();
        holds(log == "from far\n", log)
    });
    let inside = |script: &str| joey.kubectl(&["exec", "far", "--", "sh", "-c", script]);
    inside("echo back > /far/answer; echo part > /part/file").ok();
    assert_eq!(std::fs::read_to_string(server.export().join("answer")).expect("it was written"), "back\n");
    assert_eq!(std::fs::read_to_string(server.export().join("made/part/file")).expect("it was written"), "part\n");
    assert_ne!(inside("echo more > /closed/more").code, 0, "it can only be read");
    assert!(inside("grep /far /proc/mounts").ok().contains("vers=4.1"));
    // What was written last reaches the server, and nothing of the machine stays there.
    inside("dd if=/dev/zero of=/far/large bs=1M count=8").ok();
    joey.delete_pod("far");
    assert_eq!(std::fs::metadata(server.export().join("large")).expect("it was written").len(), 8 << 20);
    wait_until("the server is let go of", seconds(10), || holds(server.connections() == 0, server.connections()));

    // What is not there is told and tried again.
    joey.apply(&with_nfs("later", &image, &address, "/export/later", &["sleep", "1000"]));
    told("later", "the server has nothing of that name");
    std::fs::create_dir(server.export().join("later")).expect("it is the test's");
    joey.wait_for("later", "Ready", seconds(60));
    joey.delete_pod("later");
    server.end();
    joey.apply(&with_nfs("gone", &image, &address, "/export", &["sleep", "1000"]));
    told("gone", "refused");
    joey.apply(&with_nfs("unknown", &image, "no-such-server.invalid", "/export", &["sleep", "1000"]));
    told("unknown", "has no address");
    // Whoever waits for a server can be deleted.
    let begin = Instant::now();
    ["gone", "unknown"].iter().for_each(|name| joey.delete_pod(name));
    assert!(begin.elapsed() < seconds(20), "{:?}", begin.elapsed());

    let mut object = with_nfs("shared", &image, &address, "/export", &["sleep", "1000"]);
    object["spec"]["runtimeClassName"] = Value::Null;
    joey.apply(&object);
    wait_until("it is refused", seconds(20), || {
        let status = joey.get("pod", "shared")["status"].clone();
        let said = status["message"].as_str().is_some_and(|message| message.contains("runtimeClassName: rund"));
        holds(status["phase"] == "Failed" && said, status)
    });
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

/// Another agent for guests: the same with a byte more, which no loader looks at.
fn other_agent(joey: &Joey) -> String {
    let own = joey_tests::programs().join("joey-agent");
    let place = joey.scratch().join("joey-agent");
    let mut bytes = std::fs::read(own).expect("the agent");
    bytes.push(0);
    std::fs::write(&place, bytes).expect("another agent");
    place.display().to_string()
}

#[test]
fn a_new_guest_is_taken_up_pod_by_pod() {
    let Some((registry, mut joey)) = start() else { return };
    let serve = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"];
    for (name, policy) in [("first", "Always"), ("second", "Always"), ("once", "OnFailure")] {
        let mut object = machine(name, &registry.demo(), &serve);
        object["spec"]["restartPolicy"] = json!(policy);
        joey.apply(&object);
    }
    for name in ["first", "second", "once"] {
        joey.wait_for(name, "Ready", seconds(90));
    }
    let guest = |joey: &Joey, name: &str| joey.instance_of(name)["status"]["guest"].clone();
    let before = guest(&joey, "first");
    assert!(before.is_string(), "{before}");
    let package = std::fs::read_dir(joey.data().join("guests/packages")).expect("packages").flatten().next();
    let package = package.expect("the kernel's package").path().display().to_string();
    let agent = other_agent(&joey);
    let upgrade = ["guest", "upgrade", "--package", &package, "--agent", &agent, "-o", "json"];
    let none = joey.joey(&["guest", "upgrade", "--dry-run"]).ok();
    assert!(none.contains("0 instances would begin anew"), "{none}");
    let told: Value = joey.joey(&upgrade).json();
    let (after, renewed) = (told["guest"]["id"].clone(), told["renewed"].as_array().expect("a list").clone());
    assert_ne!(after, before);
    assert_eq!((renewed.len(), told["left"][0]["name"].as_str()), (2, Some("once.default")), "{told}");
    for (name, expected, restarts) in [("first", &after, 1), ("second", &after, 1), ("once", &before, 0)] {
        assert_eq!(guest(&joey, name), *expected, "{name}");
        let pod = joey.wait_for(name, "Ready", seconds(60));
        assert_eq!(pod["status"]["containerStatuses"][0]["restartCount"], restarts, "{name}");
    }
    let again: Value = joey.joey(&upgrade).json();
    assert_eq!(again["renewed"], json!([]), "it is done");
    // A daemon that is killed in the middle goes on where it was.
    joey.kill();
    joey.crash_at(Some("instance-renewing"));
    joey.up();
    joey.renew("first");
    wait_until("the daemon ends in the middle", seconds(20), || holds(joey.program().ended().is_some(), "it runs"));
    joey.crash_at(None);
    joey.up();
    wait_until("the Pod runs anew", seconds(60), || {
        let status = joey.get("pod", "first")["status"]["containerStatuses"][0].clone();
        holds(status["restartCount"] == 2 && status["state"]["running"].is_object(), status)
    });
}
