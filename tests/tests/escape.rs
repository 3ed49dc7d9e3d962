//! Point 6: known ways out of containers, tried for real, and what of the host and of other Pods can be seen from inside.
//!
//! Each replay says what the attack does and why it fails here. A replay that cannot even begin is checked to say so: a test
//! that fails to attack proves nothing.

use std::path::{Path, PathBuf};

use joey_tests::arena::{Arena, Class};
use joey_tests::image::Entry;
use joey_tests::{holds, programs, seconds, wait_until};
use serde_json::json;

/// A test of each replay in each class: what is tried is the same, and so is what has to come of it.
///
/// In a machine the kernel is the Pod's own: what an attack wins there is the machine, and the way out of that is looked at in
/// `machine_walls.rs`. That a container does not even win its machine is looked at inside ([`untouched`]).
///
/// Who asks for a volume over the kernel's mounts is refused before there is a sandbox, whatever the class, and is tried once.
macro_rules! replays {
    ($($replay:ident)+) => {
        mod runc {
            $(#[test]
            fn $replay() {
                super::$replay(super::Class::Runc);
            })+
        }

        mod rund {
            $(#[test]
            fn $replay() {
                super::$replay(super::Class::Rund);
            })+
        }
    };
}

replays! {
    the_runtimes_program_is_not_overwritten
    no_release_agent_is_set
    no_descriptor_of_the_runtime_is_left
    the_kernels_mounts_do_not_go_into_a_volume
    the_kernels_mounts_are_not_covered
    masks_are_made_of_the_real_null_device
    a_terminal_is_bound_nowhere
    writes_to_proc_are_not_redirected
    nothing_of_the_host_is_seen
}

/// Whether a container with this reason never ran: what ended by itself has the reason `Error`.
fn never_ran(reason: &str) -> bool {
    matches!(reason, "StartError" | "CreateContainerError" | "CreateContainerConfigError")
}

fn read(path: impl AsRef<Path>) -> Vec<u8> {
    std::fs::read(path.as_ref()).unwrap_or_else(|error| panic!("{}: {error}", path.as_ref().display()))
}

/// Files of the host that the attacks go for, with what is in them.
fn prizes() -> Vec<(PathBuf, Vec<u8>)> {
    let agent = programs().join("joey-agent");
    ["/proc/sys/kernel/core_pattern", "/etc/hostname"]
        .iter()
        .map(PathBuf::from)
        .chain([agent])
        .filter(|path| path.exists())
        .map(|path| (path.clone(), read(&path)))
        .collect()
}

/// What was gone for is as it was: on the host, and in the machines of Pods that run, which begin with the kernel's own word.
#[track_caller]
fn untouched(arena: &Arena, prizes: &[(PathBuf, Vec<u8>)], running: &[&str]) {
    for (path, before) in prizes {
        assert!(read(path) == *before, "{} was changed", path.display());
    }
    for pod in running.iter().filter(|_| arena.class == Class::Rund) {
        assert_eq!(arena.inside(pod, "cat /proc/sys/kernel/core_pattern").ok(), "core\n", "{pod}");
    }
}

/// CVE-2019-5736: the program that enters a container is the runtime itself. The container makes what is executed a link to
/// /proc/self/exe, so that the runtime's own file is executed inside, and another process opens that file by /proc/PID/exe and
/// writes to it as soon as nobody executes it any more.
///
/// Here: who enters is not dumpable before it is the container's program, so /proc/PID/exe cannot be opened; and what
/// is executed as the agent is a copy in memory that is sealed, so that no file of the host is behind it and writing fails.
fn the_runtimes_program_is_not_overwritten(class: Class) {
    let Some(arena) = Arena::new(class) else { return };
    let image = arena.image("evil", &[Entry::symlink("bin/evil", "/proc/self/exe")], json!({}));
    let prizes = prizes();
    // Opens every program that is not busybox for reading, keeps it open, and then writes to what it has. It notes whom it met:
    // who enters and may not be looked at, and programs of others. Those that are gone, and busybox, are its own.
    let watcher = "while :; do for exe in /proc/[0-9]*/exe; do \
                     case $(readlink -v $exe 2>&1) in *busybox*|*'No such'*|'') ;; \
                     *denied*) echo closed >> /tmp/met;; \
                     *) echo foreign >> /tmp/met; \
                       (exec 7<$exe && for try in 1 2 3 4 5 6 7 8 9; do \
                         (echo overwritten > /proc/self/fd/7) 2>/dev/null && echo done >> /tmp/won; done) 2>/dev/null;; \
                     esac; done; done";
    arena.run_pod("evil", &image, &["sh", "-c", watcher]);
    let mut rounds = 0;
    // An attack that never met anybody would prove nothing.
    let met = wait_until("it met who enters", seconds(120), || {
        // The agent's program inside the container says how it is used, and harms nobody.
        arena.inside("evil", "true").ok();
        let _ = arena.joey.kubectl(&["exec", "evil", "--", "/bin/evil"]);
        rounds += 1;
        let met = arena.inside("evil", "busybox sort /tmp/met | busybox uniq -c").stdout;
        holds(rounds >= 20 && met.contains("closed") && met.contains("foreign"), &met).map(|()| met)
    });
    println!("met in {rounds} rounds:\n{met}");
    // It can be held still inside, by the container itself: then it is seen for certain.
    let held =
        arena.inside("evil", "(exec -a x /bin/evil --dir /tmp/none) ; /proc/self/exe true; ls -l /proc/1/exe").stdout;
    assert!(held.contains("busybox"), "{held}");
    assert_ne!(arena.inside("evil", "test -e /tmp/won").code, 0, "something was overwritten");
    untouched(&arena, &prizes, &["evil"]);
    let agent = arena.inside("evil", "/bin/evil --dir /none; echo x > /proc/self/exe");
    assert_ne!(agent.code, 0);
    // The agent goes on.
    assert_eq!(arena.inside("evil", "echo fine").ok(), "fine\n");
}

/// CVE-2022-0492: version 1 of cgroups starts a program of the host, as root, when a cgroup with `release_agent` becomes empty.
/// A container that can mount a hierarchy read-write, by new namespaces if need be, names the program.
///
/// Here: no new namespaces and no mounts by the system call filter, hierarchies read-only, no capability for it.
fn no_release_agent_is_set(class: Class) {
    let Some(arena) = Arena::new(class) else { return };
    let image = arena.image("cgroups", &[], json!({}));
    arena.run_pod("cgroups", &image, &[]);
    let marker = format!("/tmp/{}", joey_tests::unique("released"));
    let payload = format!("#!/bin/sh\ntouch {marker}\n");
    for script in [
        "busybox mkdir -p /tmp/c && busybox mount -t cgroup -o rdma cgroup /tmp/c",
        "busybox mkdir -p /tmp/c && busybox mount -t cgroup -o memory cgroup /tmp/c",
        "busybox unshare -Urm sh -c 'busybox mkdir -p /tmp/c; busybox mount -t cgroup -o rdma cgroup /tmp/c'",
        "busybox unshare -m true",
        "busybox mount -o remount,rw /sys/fs/cgroup",
        "busybox mount -o remount,rw,bind /sys/fs/cgroup/memory",
    ] {
        assert_ne!(arena.inside("cgroups", script).code, 0, "{script}");
    }
    // Whatever is there to write to refuses.
    let script = format!(
        "printf '{}' > /tmp/p; busybox chmod +x /tmp/p; won=1; for f in $(busybox find /sys/fs/cgroup -name release_agent -o -name \
         notify_on_release -o -name cgroup.procs); do (echo /tmp/p > $f) 2>/dev/null && {{ echo $f; won=0; }}; done; exit $won",
        payload.replace('\n', "\\n")
    );
    let outcome = arena.inside("cgroups", &script);
    assert_ne!(outcome.code, 0, "written: {}", outcome.stdout);
    assert!(!Path::new(&marker).exists());
}

/// CVE-2024-21626: descriptors of the runtime stay open in what becomes the container's process, and a working directory of
/// /proc/self/fd/N is one of them: the process stands in a directory of the host, from where `..` leads to its root.
///
/// Here: all descriptors of the agent are closed before anything that the container decides on happens, and a working directory
/// that the kernel cannot name from the root is refused.
fn no_descriptor_of_the_runtime_is_left(class: Class) {
    let Some(arena) = Arena::new(class) else { return };
    let image = arena.image("cwd", &[], json!({}));
    arena.run_pod("still", &image, &[]);
    let mut begun = 0;
    for number in 3..12 {
        let name = format!("cwd-{number}");
        let dir = format!("/proc/self/fd/{number}");
        let mut object = arena.pod(
            &name,
            &image,
            &["sh", "-c", "busybox pwd -P; ls ../../../../../../etc; cat ../../../../../../../etc/shadow"],
        );
        object["spec"]["containers"][0]["workingDir"] = json!(dir);
        arena.joey.apply(&object);
        let (reason, said) = arena.end(&name);
        begun += usize::from(reason == "StartError");
        assert!(!said.contains("root:") && !said.contains("passwd-"), "{dir}: {reason}: {said}");
        arena.joey.delete_pod(&name);
        // The same by a link in the container and an exec that goes there.
        let script = format!("cd {dir} 2>/dev/null && ls ../../../../../etc && cat ../../../../../etc/shadow");
        assert_ne!(arena.inside("still", &script).code, 0, "{dir}");
    }
    assert!(begun > 6, "{begun} of 9 were refused at their start");
    let image = arena.image("cwd-image", &[], json!({"WorkingDir": "/proc/self/fd/7/../../.."}));
    arena.joey.apply(&arena.pod("by-image", &image, &["cat", "etc/shadow"]));
    let (reason, said) = arena.end("by-image");
    assert!(reason == "StartError" && said.is_empty(), "{reason}: {said}");
}

/// Pods of such images, with a volume at such places, do not start; who writes to the kernel's settings inside would have won. A
/// container beside offers the volume as a /proc, a /sys and a /dev of its own.
#[track_caller]
fn kernels_mounts_stay(class: Class, cases: &[(Vec<Entry>, &str)]) {
    let Some(arena) = Arena::new(class) else { return };
    let prizes = prizes();
    let plain = arena.image("offers", &[], json!({}));
    let offers = "busybox mkdir -p /v/proc/self/attr /v/proc/sys/kernel /v/sys /v/pts /v/shm; \
                  touch /v/proc/self/attr/exec /v/proc/sys/kernel/core_pattern; sleep 1000";
    for (number, (entries, mount)) in cases.iter().enumerate() {
        let name = format!("kernel-{number}");
        let image = arena.image(&name, entries, json!({}));
        let script = "busybox cat /proc/kcore | busybox head -c 1; echo x > /proc/sys/kernel/core_pattern && echo WON";
        let mut object = arena.pod(&name, &image, &["sh", "-c", script]);
        object["spec"]["volumes"] = json!([{"name": "shared", "emptyDir": {}}]);
        object["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "shared", "mountPath": mount}]);
        let beside = json!({"name": "offers", "image": plain, "command": ["sh", "-c", offers],
            "volumeMounts": [{"name": "shared", "mountPath": "/v"}]});
        object["spec"]["containers"].as_array_mut().expect("a list").push(beside);
        arena.joey.apply(&object);
        let (reason, said) = arena.end(&name);
        // "Error" alone is a program that ran and failed.
        assert!(
            reason.ends_with("Error") && reason != "Error",
            "{name} with {entries:?} and {mount} started: {reason} {said}"
        );
        assert!(!said.contains("WON"), "{name}: {said}");
        arena.joey.delete_pod(&name);
    }
    untouched(&arena, &prizes, &[]);
}

/// CVE-2023-27561: an image whose /proc (or /sys) is a link to a place that a volume shares with another container leads the
/// runtime's mount of /proc there; what is masked is then not in force where the container finds its /proc.
///
/// Here: the kernel's mounts go to places that are opened without following any link; an image with such links does not start,
/// and no volume is mounted through one.
fn the_kernels_mounts_do_not_go_into_a_volume(class: Class) {
    kernels_mounts_stay(
        class,
        &[
            (vec![Entry::symlink("proc", "/shared/proc")], "/shared"),
            (vec![Entry::symlink("proc", "shared")], "/shared"),
            (vec![Entry::symlink("sys", "/shared/sys")], "/shared"),
            (vec![Entry::symlink("dev", "/shared")], "/shared"),
            (vec![Entry::dir("x/"), Entry::symlink("x/y", "/proc")], "/x/y"),
        ],
    );
}

/// CVE-2023-28642: where /proc is a link inside the image, or is covered by a mount of the specification's, the runtime writes
/// what confines the process to files that are not the kernel's, and the process starts unconfined.
///
/// Here: the same images do not start, and no volume may lie over the kernel's mounts or below them.
fn the_kernels_mounts_are_not_covered(class: Class) {
    kernels_mounts_stay(
        class,
        &[
            (vec![Entry::dir("bad-proc/"), Entry::symlink("proc", "/bad-proc")], "/shared"),
            (vec![Entry::dir("bad-sys/"), Entry::symlink("sys", "bad-sys")], "/shared"),
            (vec![Entry::dir("x/"), Entry::symlink("x/y", "/proc/sys")], "/x/y"),
            (vec![Entry::dir("x/"), Entry::symlink("x/y", "/proc/self/attr")], "/x/y"),
            (vec![Entry::dir("x/"), Entry::symlink("x/y", "/sys")], "/x/y"),
        ],
    );
}

/// Who asks openly for a volume over the kernel's mounts is told so.
#[test]
fn a_volume_over_the_kernels_mounts_is_refused() {
    let Some(arena) = Arena::new(Class::Runc) else { return };
    let image = arena.image("asks", &[], json!({}));
    for (number, mount) in ["/proc", "/proc/sys", "/sys", "/"].into_iter().enumerate() {
        let name = format!("asks-{number}");
        let mut object = arena.pod(&name, &image, &["true"]);
        object["spec"]["volumes"] = json!([{"name": "shared", "emptyDir": {}}]);
        object["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "shared", "mountPath": mount}]);
        arena.joey.apply(&object);
        wait_until(&format!("a volume over {mount} is refused"), seconds(20), || {
            let status = arena.joey.get("pod", &name)["status"].clone();
            holds(status["reason"] == "UnsupportedPod", status)
        });
    }
}

/// CVE-2025-31133: the runtime masks files by binding the container's /dev/null over them. Who replaces that /dev/null by a link
/// in time has any file of /proc bound there, read-write: core_pattern, from which the host starts programs.
///
/// Here: /dev is made anew in memory, the null device in it is made by number and never looked up through a link, and all
/// of it happens before anything is mounted that another container can write to. /dev/null is checked to be the device again
/// when streams are opened.
fn masks_are_made_of_the_real_null_device(class: Class) {
    let Some(arena) = Arena::new(class) else { return };
    let prizes = prizes();
    let entries = [
        Entry::dir("dev/"),
        Entry::symlink("dev/null", "/proc/sys/kernel/core_pattern"),
        Entry::symlink("dev/zero", "/proc/sysrq-trigger"),
    ];
    let image = arena.image("null", &entries, json!({}));
    arena.run_pod("null", &image, &[]);
    assert_eq!(
        arena.inside("null", "stat -c %F /dev/null; busybox stat -c %t:%T /dev/null").ok().lines().last(),
        Some("1:3")
    );
    for script in [
        "echo x > /proc/sys/kernel/core_pattern",
        "busybox head -c 1 /proc/kcore | busybox grep .",
        "echo b > /proc/sysrq-trigger",
    ] {
        assert_ne!(arena.inside("null", script).code, 0, "{script}");
    }
    // A volume over /dev that another container of the Pod keeps changing while containers start.
    let mut object = arena.pod(
        "race",
        &image,
        &[
            "sh",
            "-c",
            "while :; do busybox ln -sf /proc/sys/kernel/core_pattern /v/null; \
        busybox rm -f /v/null; busybox mknod /v/null c 1 3; busybox rm -f /v/null; touch /v/null; done",
        ],
    );
    object["spec"]["restartPolicy"] = json!("Always");
    object["spec"]["volumes"] = json!([{"name": "v", "emptyDir": {}}]);
    object["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
    // The volume is the victim's /dev: a mark made there is the other one's /v/won.
    let script = "echo x > /proc/sys/kernel/core_pattern && echo WON > /dev/won; \
                  busybox head -c 1 /proc/kcore | busybox grep . && echo WON > /dev/won; exit 1";
    let victim = json!({"name": "victim", "image": image, "command": ["sh", "-c", script],
        "volumeMounts": [{"name": "v", "mountPath": "/dev"}]});
    object["spec"]["containers"].as_array_mut().expect("a list").push(victim);
    arena.joey.apply(&object);
    wait_until("the victim was tried", arena.patience(), || {
        let status = arena.joey.get("pod", "race")["status"].clone();
        let victim =
            status["containerStatuses"].as_array().into_iter().flatten().find(|c| c["name"] == "victim").cloned();
        let tried = victim.is_some_and(|victim| {
            victim["restartCount"].as_u64().is_some_and(|count| count >= 1)
                || victim["lastState"].is_object()
                || victim["state"]["waiting"]["reason"].as_str().is_some_and(|reason| reason.ends_with("Error"))
        });
        holds(tried, status)
    });
    // A word of its own: kubectl fails with the same code as a test that does not hold.
    let look = "test -e /v/won && cat /v/won || echo none";
    let won = arena.joey.kubectl(&["exec", "race", "-c", "main", "--", "sh", "-c", look]).ok();
    assert_eq!(won, "none\n", "a mask gave way");
    untouched(&arena, &prizes, &["null", "race"]);
}

/// CVE-2025-52565: for a container with a terminal the runtime binds /dev/pts/N to /dev/console before masks are in force, and
/// whoever puts a link there in time has another file bound, writable.
///
/// Here: nothing is bound to /dev/console, and a terminal is opened through the descriptor of its other side, by no name.
fn a_terminal_is_bound_nowhere(class: Class) {
    let Some(arena) = Arena::new(class) else { return };
    let prizes = prizes();
    let entries = [
        Entry::dir("dev/"),
        Entry::symlink("dev/console", "/proc/sys/kernel/core_pattern"),
        Entry::dir("dev/pts/"),
        Entry::symlink("dev/pts/0", "/proc/sysrq-trigger"),
        Entry::symlink("dev/ptmx", "/proc/sys/kernel/core_pattern"),
    ];
    let image = arena.image("console", &entries, json!({}));
    let mut object = arena.pod("console", &image, &["sh", "-c", "busybox tty; sleep 1000"]);
    object["spec"]["containers"][0]["tty"] = json!(true);
    arena.joey.apply(&object);
    arena.joey.wait_for("console", "Ready", arena.patience());
    assert_ne!(arena.inside("console", "ls -l /dev/console").code, 0, "it is there");
    assert_ne!(arena.inside("console", "echo x > /proc/sys/kernel/core_pattern").code, 0);
    let table = arena.inside("console", "cat /proc/self/mountinfo").ok();
    assert!(!table.contains("core_pattern") && !table.contains("/dev/console"), "{table}");
    wait_until("it has a terminal of its own", seconds(5), || {
        let log = arena.joey.kubectl(&["logs", "console"]).ok();
        holds(log.contains("/dev/pts/0"), log)
    });
    untouched(&arena, &prizes, &["console"]);
}

/// CVE-2025-52881: the runtime writes to files of /proc (labels, limits, kernel settings). A container that shares a mount has
/// those writes led to other files of /proc: to /proc/sysrq-trigger, which stops the host, or to core_pattern.
///
/// Here: nothing is written to any /proc once a process stands where a container has a say; what is written (the place in the
/// kernel's choice of victims, kernel settings) goes to the agent's own /proc, before.
fn writes_to_proc_are_not_redirected(class: Class) {
    let Some(arena) = Arena::new(class) else { return };
    let prizes = prizes();
    // Places that a runtime may write to at a start or an exec, each a link to something worse.
    let entries = [
        Entry::dir("etc/"),
        Entry::symlink("etc/hosts", "/proc/sys/kernel/core_pattern"),
        Entry::symlink("etc/resolv.conf", "/proc/sysrq-trigger"),
        Entry::symlink("etc/hostname", "/proc/self/attr/exec"),
    ];
    let image = arena.image("attr", &entries, json!({}));
    let mut object = arena.pod("attr", &image, &["sleep", "1000"]);
    object["spec"]["securityContext"] = json!({"sysctls": [{"name": "net.ipv4.tcp_syncookies", "value": "1"}]});
    arena.joey.apply(&object);
    let (reason, _) = arena.end("attr");
    assert!(never_ran(&reason), "files of /proc were covered: {reason}");
    // A shared volume whose links another container keeps changing, mounted where files are made.
    let image = arena.image("attr-race", &[], json!({}));
    let swap = "while :; do busybox rm -rf /v/a; busybox ln -s /proc/self/attr /v/a; busybox rm -f /v/a; \
                busybox ln -s /proc/sys/kernel /v/a; busybox rm -f /v/a; busybox mkdir /v/a; done";
    let mut object = arena.pod("swap", &image, &["sh", "-c", swap]);
    object["spec"]["restartPolicy"] = json!("Always");
    object["spec"]["volumes"] = json!([{"name": "v", "emptyDir": {}}, {"name": "w", "emptyDir": {}}]);
    object["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
    let victim = json!({"name": "victim", "image": image, "command": ["sh", "-c", "echo pattern > /v/a/core_pattern; exit 1"],
        "terminationMessagePath": "/v/a/core_pattern", "workingDir": "/v/a/x",
        "volumeMounts": [{"name": "v", "mountPath": "/v"}, {"name": "w", "mountPath": "/v/a/w"}]});
    object["spec"]["containers"].as_array_mut().expect("a list").push(victim);
    arena.joey.apply(&object);
    wait_until("the victim was tried", arena.patience(), || {
        let status = arena.joey.get("pod", "swap")["status"].clone();
        let tried = status["containerStatuses"].as_array().into_iter().flatten().any(|container| {
            container["name"] == "victim"
                && (container["restartCount"].as_u64().is_some_and(|count| count >= 1)
                    || container["state"]["waiting"]["reason"].as_str().is_some_and(|reason| reason.ends_with("Error")))
        });
        holds(tried, status)
    });
    untouched(&arena, &prizes, &["swap"]);
}

/// What a container finds of the host when it looks: its descriptors, its mounts, its processes, its addresses.
fn nothing_of_the_host_is_seen(class: Class) {
    let Some(arena) = Arena::new(class) else { return };
    let image = arena.image("looks", &[], json!({}));
    arena.run_pod("other", &image, &["sleep", "98765"]);
    let mut object = arena.pod("looks", &image, &["sleep", "1000"]);
    object["spec"]["volumes"] =
        json!([{"name": "disk", "emptyDir": {}}, {"name": "memory", "emptyDir": {"medium": "Memory"}}]);
    object["spec"]["containers"][0]["volumeMounts"] =
        json!([{"name": "disk", "mountPath": "/disk"}, {"name": "memory", "mountPath": "/memory"}]);
    arena.joey.apply(&object);
    arena.joey.wait_for("looks", "Ready", arena.patience());
    let data = arena.joey.data().display().to_string();
    let inside = |script: &str| arena.inside("looks", script);

    // Descriptors: streams and nothing else, in the first process and in one that an exec brings.
    for who in ["1", "self"] {
        let found = inside(&format!("for fd in /proc/{who}/fd/*; do readlink $fd; done; true")).ok();
        let strange: Vec<_> =
            found.lines().filter(|line| !line.starts_with("pipe:[") && *line != "/dev/null").collect();
        assert!(strange.iter().all(|line| line.starts_with("/proc/") && line.ends_with("/fd")), "{who}: {found}");
    }
    // Mounts: no place of the host in any of them.
    let table = inside("cat /proc/self/mountinfo").ok();
    assert!(table.contains(" /disk "), "{table}");
    for line in table.lines() {
        assert!(!line.contains(&data) && !line.contains("/instances/") && !line.contains("/layers/"), "{line}");
    }
    assert_ne!(inside(&format!("ls {data}")).code, 0);
    // Processes: the container's own, and no argument of anybody that names a place of the host.
    let processes = inside("for p in /proc/[0-9]*; do busybox tr '\\0' ' ' < $p/cmdline; echo; done").stdout;
    assert!(processes.contains("sleep 1000") && !processes.contains("98765"), "{processes}");
    for part in ["joey", data.as_str()] {
        assert!(!processes.contains(part), "{part}: {processes}");
    }
    // The tables of the kernel that are the container's own say nothing of others.
    for file in ["cgroup", "environ", "mounts", "mountstats", "comm", "status"] {
        let text = inside(&format!("cat /proc/1/{file}")).stdout;
        assert!(!text.contains(&data) && !text.contains("/instances/"), "{file}: {text}");
    }
    assert!(inside("cat /proc/1/cgroup").ok().lines().all(|line| line.ends_with(":/")), "its cgroups are roots");
    let sockets = inside("cat /proc/net/unix").stdout;
    assert!(!sockets.contains("joey") && !sockets.contains("agent.sock"), "{sockets}");
    // What the agent keeps for itself.
    for script in [
        "busybox find / -xdev -name agent.sock | busybox grep .",
        "busybox find / -xdev -name agent.json | busybox grep .",
        "cat /proc/1/root/etc/shadow",
        "ls /proc/1/root/run/joey",
        "busybox mknod /tmp/d b 254 0 && busybox head -c 1 /tmp/d",
        "busybox dmesg",
        "busybox chroot /proc/1/root ls /root/.ssh",
    ] {
        assert_ne!(inside(script).code, 0, "{script}: {}", inside(script).stdout);
    }
    // Processes that enter are nobody's to look at until they are the container's program.
    let watcher = "i=0; while [ $i -lt 200 ]; do for p in /proc/[0-9]*; do cat $p/cmdline 2>/dev/null | busybox tr '\\0' ' '; \
                   readlink $p/cwd $p/root $p/exe 2>/dev/null; done; i=$((i+1)); done | busybox sort -u";
    let looking = {
        let mut command = arena.joey.kubectl_command(&["exec", "looks", "--", "sh", "-c", watcher]);
        std::thread::spawn(move || joey_tests::run(&mut command))
    };
    for _ in 0..10 {
        inside("true").ok();
    }
    let seen = looking.join().expect("it ends").stdout;
    assert!(!seen.contains(&data) && !seen.contains("memfd"), "{seen}");
}
