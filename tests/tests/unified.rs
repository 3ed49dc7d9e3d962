//! Point 6 on cgroup v2 and the kernel of a fresh Debian 12, in a virtual machine: limits, devices, what a container sees, kill and
//! re-adoption, and that nothing stays behind. The machine that runs the tests may have v1.
//!
//! The virtual machine runs once; each test looks at a part of what was seen in it.

use joey_tests::guest::Guest;
use serde_json::json;

#[test]
fn the_machine_is_what_the_tests_are_about() {
    let Some(guest) = Guest::seen() else { return };
    assert!(guest.text("kernel").ends_with("amd64"), "{}", guest.text("kernel"));
    // CGROUP2_SUPER_MAGIC.
    assert_eq!(guest.text("cgroup.kind"), "63677270");
    for controller in ["cpu", "memory", "pids", "io"] {
        assert!(guest.text("cgroup.controllers").split(' ').any(|name| name == controller), "{controller}");
    }
    assert!(guest.text("up").starts_with("joey is ready"), "{}", guest.console());
    assert_eq!(guest.text("import"), "registry.example/hello:1");
    guest.text("end");
}

#[test]
fn a_pod_runs_in_cgroups_of_its_own() {
    let Some(guest) = Guest::seen() else { return };
    assert!(guest.text("web.run").starts_with("web 10.244."), "{}", guest.text("web.run"));
    assert!(guest.text("web.page").contains("<h1>Hello from Joey</h1>"), "{}", guest.text("web.page"));
    assert_eq!(guest.text("web.exec"), "hello from web");
    assert_eq!(guest.text("web.cgroups"), "agent/ web/");
    assert!(guest.text("web.processes").starts_with("nginx nginx"), "{}", guest.text("web.processes"));
    assert_eq!(guest.text("web.agent"), "joey-agent");
    // It is not the process that was started, which was outside of its cgroup.
    assert_eq!(guest.text("web.agent.parent"), "joey");
    assert_eq!(guest.text("web.zombies"), "");
    assert_eq!(guest.text("web.above"), "", "no process lies where controllers are passed on");
    for (file, wanted) in [
        ("memory.max", "67108864"),
        ("memory.swap.max", "0"),
        ("memory.oom.group", "1"),
        ("cpu.max", "50000 100000"),
        ("cpu.weight", "50"),
        ("pids.max", "4096"),
        ("weight.of.instance", "50"),
    ] {
        assert_eq!(guest.text(&format!("web.{file}")), wanted, "{file}");
    }
    let usage = guest.json("web.usage");
    assert!(usage["cpuNanoseconds"].as_u64().is_some_and(|used| used > 1_000_000), "{usage}");
    let memory = usage["memoryWorkingSetBytes"].as_u64().unwrap_or_default();
    assert!((500_000..64 << 20).contains(&memory), "{usage}");
}

#[test]
fn a_container_sees_its_own_cgroup_and_cannot_change_it() {
    let Some(guest) = Guest::seen() else { return };
    assert_eq!(guest.text("view.self"), "0::/", "a further process is where the first one is");
    assert_eq!(guest.text("view.init"), "0::/");
    assert_eq!(guest.text("view.memory"), "67108864");
    assert_eq!(guest.text("view.below"), "", "no other cgroup is in sight");
    let mount = guest.text("view.mount");
    assert!(mount.contains(" /sys/fs/cgroup ro,") && mount.contains(" - cgroup2 "), "{mount}");
    for (name, done) in [("view.write", "written"), ("view.make", "made"), ("view.remount", "remounted")] {
        let said = guest.text(name);
        assert!(!said.contains(done) && !said.is_empty(), "{name}: {said}");
    }
}

#[test]
fn device_nodes_open_no_devices() {
    let Some(guest) = Guest::seen() else { return };
    assert_eq!(guest.text("devices.opened"), "0");
    let refused: u32 = guest.text("devices.refused").parse().expect("a number");
    assert!(refused >= 40, "five places, four devices, read and write: {refused} were refused");
    let own = guest.text("devices.own");
    assert!(own.starts_with("4 ") && own.contains("null") && !own.contains("vda"), "{own}");
}

#[test]
fn limits_are_enforced() {
    let Some(guest) = Guest::seen() else { return };
    let greedy = guest.json("greedy")["status"]["containers"][0]["state"]["terminated"].clone();
    assert_eq!((&greedy["reason"], &greedy["exitCode"]), (&json!("OOMKilled"), &json!(137)));
    assert!(guest.number("greedy.events", "oom_kill") >= 1);
    let peak: f64 = guest.text("greedy.peak").parse().expect("a number");
    let part = peak / f64::from(32 << 20);
    assert!((0.9..=1.1).contains(&part), "{peak} bytes of memory are {part:.2} of 32 MiB");

    let clock = |name: &str| -> f64 {
        let first = guest.text(name).split(' ').next().unwrap_or_default();
        first.parse().unwrap_or_else(|_| panic!("{name} begins with a time: {first}"))
    };
    let used = guest.number("busy.after", "usage_usec") - guest.number("busy.before", "usage_usec");
    let share = used as f64 / 1e6 / (clock("busy.after") - clock("busy.before"));
    assert!((0.18..=0.22).contains(&share), "a fifth of a core is allowed, {share:.3} was used");
    assert!(guest.number("busy.after", "nr_throttled") > guest.number("busy.before", "nr_throttled"));

    assert!(guest.number("bomb.events", "max") >= 1, "the kernel refused to make more processes");
    let processes: u32 = guest.text("bomb.processes").parse().expect("a number");
    assert!((2..=16).contains(&processes), "{processes} of 16");
    assert_eq!(guest.text("rm.left"), "0", "what was removed is gone");
}

#[test]
fn the_disk_is_held_for_buffered_writes_too() {
    let Some(guest) = Guest::seen() else { return };
    let max = guest.text("slow.max");
    assert!(max.starts_with(guest.text("slow.disk")) && max.contains("wbps=8388608"), "{max}");
    for (name, at_least) in [("slow.buffered", 32.0), ("slow.direct", 16.0)] {
        let seen: Vec<f64> = guest.text(name).split(' ').filter_map(|word| word.parse().ok()).collect();
        let &[began, first, ended, all] = seen.as_slice() else { panic!("{name}: {}", guest.text(name)) };
        let (megabytes, seconds) = ((all - first) / f64::from(1 << 20), ended - began);
        let rate = megabytes / seconds;
        assert!(megabytes >= at_least && (7.2..=8.8).contains(&rate), "{name}: {rate:.2} MiB a second of 8; {seen:?}");
    }
}

#[test]
fn a_crash_leaves_a_core() {
    let Some(guest) = Guest::seen() else { return };
    let cores = guest.json("crash.cores");
    let (name, bytes) = (cores["dumps"][0]["name"].to_string(), cores["dumps"][0]["bytes"].to_string());
    assert!(name.contains("web.sh.") && name.contains("SIGSEGV"), "{cores}");
    assert_eq!(guest.text("crash.written"), bytes);
    assert_eq!(guest.text("crash.of.machine"), "ELF", "its own go where they went");
    assert_eq!(guest.text("left.pattern"), "core 0");
}

#[test]
fn a_killed_daemon_is_followed_by_one_that_adopts() {
    let Some(guest) = Guest::seen() else { return };
    assert_eq!(guest.text("killed.service"), "", "no container and no agent was in the daemon's cgroup");
    assert!(guest.text("again").starts_with("joey is ready"));
    let pids: Vec<_> = guest.text("web.process").split(' ').collect();
    assert!(pids.len() == 2 && pids[0] == pids[1], "the container went on: {pids:?}");
    let web = guest.json("web.again");
    assert_eq!(web["status"]["phase"], "Running");
    assert_eq!(web["status"]["containers"][0]["state"]["running"]["pid"].to_string(), pids[0]);
    assert_eq!(guest.text("web.exec.again"), "hello from web");
    let doomed = guest.json("doomed")["status"]["containers"][0]["state"]["terminated"].clone();
    assert_eq!((&doomed["reason"], &doomed["exitCode"]), (&json!("Error"), &json!(137)), "killed, but not for memory");
    let log = guest.text("clock.log");
    assert!(log.ends_with("lines") && !log.contains("gap"), "{log}");
}

#[test]
fn down_leaves_nothing_behind() {
    let Some(guest) = Guest::seen() else { return };
    assert!(guest.text("down").ends_with("nothing is left running"), "{}", guest.text("down"));
    for what in ["cgroups", "mounts", "tables", "loops", "processes", "run"] {
        assert_eq!(guest.text(&format!("left.{what}")), "", "{what}");
    }
    assert_eq!(guest.text("left.interfaces"), "eth0 lo", "only the machine's own are left");
}
