//! Point 6: what a container may see and do, what stops it, and what the agent beside it keeps.

use joey_tests::host::{namespace, process_runs};
use joey_tests::joey::pod;
use joey_tests::{Joey, Registry, holds, seconds, wait_until};
use serde_json::json;

#[test]
fn namespaces_of_its_own_and_nothing_of_the_host() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.run_pod("box", &registry.demo(), &["sleep", "1000"]);
    let pid = joey.pid_of("box.default");
    for kind in ["pid", "mnt", "net", "uts", "ipc", "cgroup"] {
        assert_ne!(namespace(pid, kind), namespace(std::process::id(), kind), "{kind} namespace");
    }
    let inside = |script: &str| joey.kubectl(&["exec", "box", "--", "sh", "-c", script]);
    let processes = inside("ps -o pid,args | grep -c .").ok();
    assert!(processes.trim().parse::<u32>().is_ok_and(|count| count < 8), "{processes}");
    assert_eq!(inside("cat /proc/1/comm").ok().trim(), "sleep");
    assert_eq!(inside("hostname").ok().trim(), "box");
    // Masked, read-only, forbidden.
    assert_eq!(inside("cat /proc/kcore | wc -c").stdout.trim(), "0");
    assert_ne!(inside("echo 1 > /proc/sys/kernel/panic").code, 0);
    assert_ne!(inside("echo b > /proc/sysrq-trigger").code, 0);
    assert_ne!(inside("mount -t tmpfs none /mnt").code, 0);
    assert_ne!(inside("unshare -U true").code, 0);
    assert_ne!(inside("ls /sys/firmware/* 2>/dev/null | grep .").code, 0);
    let status = inside("grep -E '^(CapEff|CapBnd|Seccomp):' /proc/1/status").ok();
    // The default set: chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, net_raw,
    // sys_chroot, mknod, audit_write, setfcap.
    assert!(status.contains("CapEff:\t00000000a80425fb") && status.contains("CapBnd:\t00000000a80425fb"), "{status}");
    assert!(status.contains("Seccomp:\t2"), "{status}");
    let devices = inside("ls /dev").ok();
    for absent in ["sda", "vda", "kvm", "mem", "kmsg", "loop0", "fuse"] {
        assert!(!devices.lines().any(|name| name == absent), "{absent} in {devices}");
    }
    let escaped = inside("mknod /tmp/disk b 254 0 && head -c 1 /tmp/disk");
    assert_ne!(escaped.code, 0, "a device node opens no device");
}

#[test]
fn limits_are_enforced() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let mut object = pod("greedy", &registry.demo(), &["sh", "-c", "sleep 1; tail -c 200m /dev/zero"]);
    object["spec"]["containers"][0]["resources"] = json!({"limits": {"memory": "32Mi", "cpu": "100m"}});
    joey.apply(&object);
    let state = wait_until("it is stopped", seconds(60), || {
        let pod = joey.get("pod", "greedy");
        let state = pod["status"]["containerStatuses"][0]["state"]["terminated"].clone();
        if state.is_object() { Ok(state) } else { Err(pod["status"].to_string()) }
    });
    assert_eq!(state["reason"], "OOMKilled", "{state}");
    assert_eq!(state["exitCode"], 137);

    let mut object = pod("busy", &registry.demo(), &["sh", "-c", "while :; do :; done"]);
    object["spec"]["containers"][0]["resources"] = json!({"limits": {"memory": "32Mi", "cpu": "200m"}});
    joey.apply(&object);
    joey.wait_for("busy", "Ready", seconds(30));
    let pid = joey.pid_of("busy.default");
    let used = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
        let fields: Vec<_> = stat.rsplit_once(") ").expect("stat has a name").1.split(' ').collect();
        fields[11].parse::<u64>().unwrap_or(0) + fields[12].parse::<u64>().unwrap_or(0)
    };
    let (begin, first) = (std::time::Instant::now(), used());
    wait_until("three seconds pass", seconds(4), || holds(begin.elapsed() >= seconds(3), ""));
    // Ticks of a hundredth of a second.
    let share = (used() - first) as f64 / 100.0 / begin.elapsed().as_secs_f64();
    assert!((0.1..0.3).contains(&share), "a fifth of a core is allowed, {share:.2} was used");
}

#[test]
fn exit_codes_signals_and_grace() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let ends = |name: &str, script: &str| {
        joey.apply(&pod(name, &registry.demo(), &["sh", "-c", script]));
        wait_until("it ends", seconds(30), || {
            let pod = joey.get("pod", name);
            let state = pod["status"]["containerStatuses"][0]["state"]["terminated"].clone();
            if state.is_object() { Ok((pod["status"]["phase"].clone(), state)) } else { Err(pod["status"].to_string()) }
        })
    };
    let (phase, state) = ends("fine", "exit 0");
    assert_eq!((&phase, &state["exitCode"], &state["reason"]), (&json!("Succeeded"), &json!(0), &json!("Completed")));
    let (phase, state) = ends("wrong", "exit 42");
    assert_eq!((&phase, &state["exitCode"], &state["reason"]), (&json!("Failed"), &json!(42), &json!("Error")));
    let (_, state) = ends("killed", "kill -9 $$; sleep 5");
    assert!(matches!(state["exitCode"].as_i64(), Some(137 | 0)), "{state}");

    // The signal the demo image asks for, SIGQUIT, first, and time to act on it.
    joey.run_pod(
        "polite",
        &registry.demo(),
        &["sh", "-c", "trap 'echo bye; exit 0' QUIT; while :; do sleep 0.1; done"],
    );
    let pid = joey.pid_of("polite.default");
    joey.kubectl(&["delete", "pod", "polite", "--grace-period=20", "--timeout=15s"]).ok();
    assert!(!process_runs(pid), "it ended at once, long before its grace was over");
    joey.run_pod("stubborn", &registry.demo(), &["sh", "-c", "trap '' QUIT TERM; while :; do sleep 0.1; done"]);
    let begin = std::time::Instant::now();
    joey.kubectl(&["delete", "pod", "stubborn", "--grace-period=2", "--timeout=15s"]).ok();
    assert!(begin.elapsed() >= seconds(2), "its grace is kept");
}

#[test]
fn a_failing_container_is_restarted_with_back_off() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let mut object = pod("flaky", &registry.demo(), &["sh", "-c", "echo run; exit 1"]);
    object["spec"]["restartPolicy"] = json!("Always");
    joey.apply(&object);
    let status = wait_until("it was restarted and waits", seconds(60), || {
        let pod = joey.get("pod", "flaky");
        let status = pod["status"]["containerStatuses"][0].clone();
        let restarted = status["restartCount"].as_u64().is_some_and(|count| count >= 1);
        let waits = status["state"]["waiting"]["reason"] == "CrashLoopBackOff";
        if restarted && waits { Ok(status) } else { Err(pod["status"].to_string()) }
    });
    assert_eq!(status["lastState"]["terminated"]["exitCode"], 1);
    assert!(joey.kubectl(&["logs", "flaky", "--previous"]).ok().contains("run"));
}

#[test]
fn logs_are_cri_formatted_and_rotated() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let script = "echo out; echo err >&2; printf unfinished; line=$(head -c 8000 /dev/zero | tr '\\0' x); \
                  yes $line | head -c 80000000; echo; echo last; sleep 1000";
    joey.run_pod("loud", &registry.demo(), &["sh", "-c", script]);
    for run in 0..3 {
        wait_until("this run has said all", seconds(60), || {
            let restarts = joey.get("pod", "loud")["status"]["containerStatuses"][0]["restartCount"].as_u64();
            let tail = joey.kubectl(&["logs", "loud", "--tail=1"]).ok();
            holds(restarts == Some(run) && tail == "last\n", format!("{restarts:?} {}", tail.len()))
        });
        if run < 2 {
            joey.joey(&["restart", "loud.default"]).ok();
            let shown = joey.joey(&["describe", "loud.default", "-o", "json"]).json();
            assert_eq!(shown["status"]["containers"][0]["restartCount"], run + 1, "it has restarted: {shown}");
        }
    }
    let mut files = Vec::new();
    collect(&joey.data().join("instances"), &mut files);
    assert_eq!(files.len(), 10, "five files of each of the last two runs: {files:?}");
    let total: u64 = files.iter().filter_map(|file| std::fs::metadata(file).ok()).map(|meta| meta.len()).sum();
    assert!(total < 110 << 20, "{total} bytes are kept");
    let text = std::fs::read_to_string(&files[0]).expect("a log is text");
    let line = text.lines().next().expect("it has lines");
    let fields: Vec<_> = line.splitn(4, ' ').collect();
    assert!(
        fields[0].ends_with('Z') && matches!(fields[1], "stdout" | "stderr") && matches!(fields[2], "F" | "P"),
        "{line}"
    );
}

fn collect(folder: &std::path::Path, files: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.to_string_lossy().contains("/logs/") {
            files.push(path);
        }
    }
}

#[test]
fn volumes_environment_and_users() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.kubectl(&["create", "configmap", "settings", "--from-literal=colour=brown"]).ok();
    joey.kubectl(&["create", "secret", "generic", "word", "--from-literal=key=honey"]).ok();
    let script = "cat /settings/colour; echo; cat /word/key; echo; echo $COLOUR $KEY $NAME; id -u; id -g; \
                  touch /scratch/x && echo scratch; touch /settings/x || echo read-only; touch /x || echo closed";
    let mut object = pod("mounts", &registry.demo(), &["sh", "-c", script]);
    object["spec"]["volumes"] = json!([
        {"name": "settings", "configMap": {"name": "settings"}}, {"name": "word", "secret": {"secretName": "word"}},
        {"name": "scratch", "emptyDir": {}},
    ]);
    let container = &mut object["spec"]["containers"][0];
    container["volumeMounts"] = json!([
        {"name": "settings", "mountPath": "/settings"}, {"name": "word", "mountPath": "/word"},
        {"name": "scratch", "mountPath": "/scratch"},
    ]);
    container["env"] = json!([
        {"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "colour"}}},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "word", "key": "key"}}},
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
    ]);
    container["securityContext"] = json!({"runAsUser": 1000, "runAsGroup": 2000, "readOnlyRootFilesystem": true});
    joey.apply(&object);
    joey.kubectl(&["wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/mounts", "--timeout=60s"]).ok();
    let log = joey.kubectl(&["logs", "mounts"]).ok();
    for part in ["brown\nhoney\nbrown honey mounts\n1000\n2000\n", "scratch\n", "read-only\n", "closed\n"] {
        assert!(log.contains(part), "{part} in {log}");
    }
}
