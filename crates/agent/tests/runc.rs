//! Class `runc` with the real agent and real processes: the conformance suite and what only real isolation can show.
//! Needs root and Debian's busybox-static.

use std::path::Path;

use joey_api::agent::{AgentMount, AgentVolume};
use joey_api::instance::{ContainerState, LogOptions, Resources, WireRestartPolicy};
use joey_sandbox::AgentClient;
use joey_sandbox::conformance::{self, exec, logs, running, state_where, termination};

mod ground;
use ground::ground;

#[tokio::test]
async fn conforms() {
    let Some(ground) = ground("conform") else { return };
    conformance::all(&ground.0).await;
    conformance::whole(&ground.0).await;
    // The hierarchy of memory on v1, the only one on v2.
    let name = ground.0.cgroup_root.trim_start_matches('/');
    let left = Path::new("/sys/fs/cgroup/memory").join(name);
    let left = if left.exists() { left } else { Path::new("/sys/fs/cgroup").join(name) };
    let left: Vec<_> = std::fs::read_dir(left).unwrap().flatten().filter(|e| e.path().is_dir()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_container_is_closed_in() {
    let Some(ground) = ground("closed") else { return };
    let bench = &ground.0;
    let request = bench.request(1, "sleep 1000");
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    // The agent itself sees nothing of the host but what it needs.
    let seen = std::fs::read_to_string(format!("/proc/{}/mountinfo", sandbox.pid().unwrap())).unwrap();
    assert!(!seen.contains(" /dev ") && !seen.contains(" /run"), "{seen}");
    let sh = async |script: &str| exec(&agent, &["sh", "-c", script]).await;
    let (text, _) = sh("cat /proc/1/status /proc/self/status").await;
    assert_eq!(text.matches("Seccomp:\t2").count(), 2, "{text}");
    assert_eq!(text.matches("CapEff:\t00000000a80425fb").count(), 2, "{text}");
    assert_eq!(text.matches("CapBnd:\t00000000a80425fb").count(), 2, "{text}");
    let (text, _) = sh("cat /proc/1/cmdline; ls /proc | grep -c '^[0-9]*$'; hostname; ls /dev /proc/self/fd").await;
    assert!(text.starts_with("/bin/sh") || text.starts_with("sleep"), "{text}");
    assert!(text.contains("bench\n"), "{text}");
    for (script, fails) in [
        ("mount -t tmpfs none /tmp", true),
        ("echo 1 > /proc/sys/kernel/pid_max", true),
        ("echo x > /sys/kernel/mm/ksm/run", true),
        ("mknod /tmp/disk b 254 0 && dd if=/tmp/disk of=/dev/null count=1", true),
        ("mknod /dev/disk b 254 0 && dd if=/dev/disk of=/dev/null count=1", true),
        ("echo b > /proc/sysrq-trigger", true),
        ("echo fine > /tmp/file && echo fine > /dev/null && cat /etc/resolv.conf", false),
    ] {
        let (text, status) = sh(script).await;
        assert_eq!(status.exit_code != Some(0), fails, "{script}: {text} {status:?}");
    }
    let (text, _) = sh("cat /proc/kcore | dd bs=1 count=1 2>/dev/null").await;
    assert_eq!(text, "");
    let (text, status) = exec(&agent, &["nothing"]).await;
    assert_eq!((text.as_str(), status.exit_code), ("", Some(127)));
    assert!(status.message.unwrap().contains("executable file not found"));
    let (_, status) = exec(&agent, &["/bin/garbage"]).await;
    assert_eq!((status.exit_code, status.message.is_some()), (Some(126), true));
    let (_, status) = exec(&agent, &["sh", "-c", "kill -9 $$"]).await;
    assert_eq!(status.exit_code, Some(137));
    bench.destroy(&request).await;
}

#[tokio::test]
async fn devices_are_the_containers_own() {
    let Some(ground) = ground("devices") else { return };
    let bench = &ground.0;
    let mut request = bench.request(1, "sleep 1000");
    request.config.volumes = vec![AgentVolume { name: "v".into(), ..AgentVolume::default() }];
    request.config.containers[0].mounts =
        vec![AgentMount { volume: "v".into(), path: "/v".into(), ..AgentMount::default() }];
    std::fs::create_dir_all(request.dir.join("volumes/v")).unwrap();
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    // The host's own device must not be what a container's root changes.
    let mode = |path: &str| std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(path).unwrap().permissions());
    let before = mode("/dev/null");
    let (text, status) = exec(&agent, &["sh", "-c", "stat -c %a /dev/null; chmod 600 /dev/null"]).await;
    assert_eq!((text.as_str(), status.exit_code), ("666\n", Some(0)));
    assert_eq!(mode("/dev/null"), before);
    // Everything but the few nodes is closed to devices, whatever file system it is.
    let (table, _) = exec(&agent, &["cat", "/proc/self/mountinfo"]).await;
    let open: Vec<&str> = table
        .lines()
        .filter(|line| !line.split(' ').nth(5).unwrap().split(',').any(|option| option == "nodev"))
        .map(|line| line.split(' ').nth(4).unwrap())
        .filter(|place| {
            !["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"].contains(place)
        })
        .filter(|place| !place.starts_with("/proc/") && *place != "/dev/pts")
        .collect();
    assert_eq!(open, Vec::<&str>::new(), "{table}");
    for place in ["/tmp", "/dev", "/dev/shm", "/v"] {
        let script = format!("mknod {place}/disk b 254 0; mknod {place}/n c 1 3; cat {place}/disk || cat {place}/n");
        let (_, status) = exec(&agent, &["sh", "-c", &script]).await;
        assert_ne!(status.exit_code, Some(0), "{place}");
    }
    bench.destroy(&request).await;
}

#[tokio::test]
async fn an_image_cannot_lead_mounts_elsewhere() {
    let Some(ground) = ground("links") else { return };
    let bench = &ground.0;
    let link = |from: &Path, to: &str| std::os::unix::fs::symlink(to, from).unwrap();
    let mut number = 0;
    for (made, starts, works) in [
        // Out of the root and back: what does not exist is made inside.
        (vec![("etc", "../../../../new/etc")], true, "cat /new/etc/resolv.conf"),
        (vec![("etc/resolv.conf", "../run/resolve/stub.conf")], true, "cat /run/resolve/stub.conf"),
        (vec![("etc/hosts", "/proc/self/root/found")], true, "cat /found"),
        (vec![("etc/resolv.conf", "/tmp/a"), ("tmp/a", "/tmp/b"), ("tmp/b", "/tmp/a")], false, ""),
        // What holds the container must not be covered or reached.
        (vec![("etc/hosts", "/proc/self/attr/exec")], false, ""),
        (vec![("etc/resolv.conf", "/proc/sys/kernel/core_pattern")], false, ""),
        (vec![("proc", "/tmp")], false, ""),
        (vec![("dev", "/tmp")], false, ""),
        (vec![("sys", "/proc")], false, ""),
    ] {
        number += 1;
        let layer = ground.0.dir.join(format!("layer{number}"));
        for place in ["etc", "tmp"] {
            if !made.iter().any(|(from, _)| *from == place) {
                std::fs::create_dir_all(layer.join(place)).unwrap();
            }
        }
        std::fs::create_dir_all(&layer).unwrap();
        made.iter().for_each(|(from, to)| link(&layer.join(from), to));
        let mut request = bench.request(number, works);
        request.config.containers[0].layers.insert(0, layer.display().to_string());
        let sandbox = bench.create(&request).await;
        let ended = termination(&AgentClient::new(sandbox.agent().clone()), 0).await;
        assert_eq!(ended.exit_code, if starts { 0 } else { 128 }, "{made:?}: {ended:?}");
        let dir = bench.dir.display().to_string();
        assert!(!ended.message.contains(&dir), "{ended:?}");
        bench.destroy(&request).await;
    }
    for path in ["/proc", "/proc/sys/kernel", "/sys", "/", "/sys/firmware"] {
        number += 1;
        let mut request = bench.request(number, "true");
        request.config.volumes = vec![AgentVolume { name: "v".into(), memory: true, ..AgentVolume::default() }];
        let mount = AgentMount { volume: "v".into(), path: path.into(), ..AgentMount::default() };
        request.config.containers[0].mounts = vec![mount];
        let sandbox = bench.create(&request).await;
        let ended = termination(&AgentClient::new(sandbox.agent().clone()), 0).await;
        // A masked place is another file system already, and belongs to the container.
        assert_eq!(ended.exit_code, if path == "/sys/firmware" { 0 } else { 128 }, "{path}: {ended:?}");
        bench.destroy(&request).await;
    }
}

#[tokio::test]
async fn what_cannot_be_made_waits() {
    let Some(ground) = ground("waits") else { return };
    let bench = &ground.0;
    for (number, user, non_root, expected) in [
        (1, "", true, "CreateContainerConfigError"),
        (2, "nobody-here", false, "CreateContainerError"),
        (3, "4294967295", true, "CreateContainerError"),
    ] {
        let mut request = bench.request(number, "true");
        request.config.containers[0].user = user.into();
        request.config.containers[0].run_as_non_root = non_root;
        let sandbox = bench.create(&request).await;
        let agent = AgentClient::new(sandbox.agent().clone());
        let waits = |state: &joey_api::agent::AgentState| matches!(&state.containers[0].state, ContainerState::Waiting { reason, .. } if reason == expected);
        state_where(&agent, waits).await;
        agent.stop(0).await.unwrap();
        assert_eq!(termination(&agent, 0).await.reason, expected);
        bench.destroy(&request).await;
    }
}

#[tokio::test]
async fn processes_begin_with_nothing_of_the_agent() {
    let Some(ground) = ground("begin") else { return };
    let bench = &ground.0;
    let script = "readlink /proc/self/fd/3 /proc/self/fd/4 /proc/self/fd/5 /proc/self/fd/9; ls -l /proc/self/fd | grep -c -- '->'";
    let mut request = bench.request(1, &format!("{script}; sleep 1000"));
    request.config.containers[0].no_new_privileges = true;
    request.config.containers[0].capabilities = Vec::new();
    let mut other = conformance::container("other", "echo shared > /dev/shm/file; sleep 1000", &bench.layers);
    other.working_dir = "/made/for/it".into();
    request.config.containers.push(other);
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    state_where(&agent, |state| state.containers.iter().all(|one| matches!(one.state, ContainerState::Running { .. })))
        .await;
    // Its own streams; the directory that ls reads is closed when ls looks at what it found.
    let (text, _) = exec(&agent, &["sh", "-c", script]).await;
    assert_eq!(text, "3\n");
    let (text, _) = exec(&agent, &["sh", "-c", "cat /proc/self/status /proc/1/status; cat /dev/shm/file"]).await;
    for (line, count) in [("NoNewPrivs:\t1", 2), ("Seccomp:\t2", 2), ("CapBnd:\t0000000000000000", 2), ("shared", 1)] {
        assert_eq!(text.matches(line).count(), count, "{line}: {text}");
    }
    // No way out by descriptors, by the program's own file or through what is hidden.
    for script in [
        "cat /proc/1/root/etc/shadow",
        "cat /proc/self/fd/7/../../etc/shadow",
        "echo x >> /proc/self/exe",
        "cat /sys/firmware/*",
        "ls /sys/devices/virtual/powercap/*",
        "echo x > /sys/fs/cgroup/memory/memory.limit_in_bytes",
        "echo x > /sys/fs/cgroup/memory.max",
    ] {
        let (text, status) = exec(&agent, &["sh", "-c", script]).await;
        assert_ne!(status.exit_code, Some(0), "{script}: {text}");
    }
    bench.destroy(&request).await;

    for (number, place) in [(2, "/proc/self/fd/7"), (3, "/proc/self/fd/3/../.."), (4, "/etc/passwd")] {
        let mut request = bench.request(number, "true");
        request.config.containers[0].working_dir = place.into();
        let sandbox = bench.create(&request).await;
        let ended = termination(&AgentClient::new(sandbox.agent().clone()), 0).await;
        assert_eq!((ended.reason.as_str(), ended.exit_code), ("StartError", 128), "{place}: {ended:?}");
        bench.destroy(&request).await;
    }
}

#[tokio::test]
async fn attached_input_reaches_the_container_and_ends() {
    let Some(ground) = ground("attach") else { return };
    let bench = &ground.0;
    let mut request = bench.request(1, "cat; exit 6");
    request.config.containers[0].stdin = true;
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    let query = joey_api::agent::ExecQuery { stdin: true, stdout: true, stderr: true, ..Default::default() };
    // Who goes away does not end the input; who says CLOSE does.
    drop(agent.attach("main", &query, futures::stream::empty()).await.unwrap());
    let mut frames = joey_api::frame::encode(joey_api::frame::STDIN, b"said\n");
    frames.extend(joey_api::frame::encode(joey_api::frame::CLOSE, b""));
    let outgoing =
        futures::StreamExt::chain(futures::stream::iter([bytes::Bytes::from(frames)]), futures::stream::pending());
    let answer = agent.attach("main", &query, outgoing).await.unwrap();
    let (text, status) = tokio::time::timeout(conformance::LIMIT, conformance::read_frames(answer)).await.unwrap();
    assert_eq!((text.as_str(), status.exit_code), ("said\n", Some(6)));
    bench.destroy(&request).await;
}

#[tokio::test]
async fn many_layers_fit() {
    let Some(ground) = ground("layers") else { return };
    let bench = &ground.0;
    let mut request = bench.request(1, "cat /layers/1 /layers/180");
    for number in 1..=180 {
        let layer = bench.dir.join(format!("a layer, with: a long name {number}"));
        std::fs::create_dir_all(layer.join("layers")).unwrap();
        std::fs::write(layer.join(format!("layers/{number}")), format!("{number}\n")).unwrap();
        request.config.containers[0].layers.push(layer.display().to_string());
    }
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    termination(&agent, 0).await;
    assert_eq!(logs(&agent, "main", &LogOptions::default()).await, "1\n180\n");
    bench.destroy(&request).await;
}

#[tokio::test]
async fn programs_that_cannot_start_say_why() {
    let Some(ground) = ground("start") else { return };
    let bench = &ground.0;
    for (number, program, said) in [
        (1, "/no/such", "exec: \"/no/such\": no such file or directory: not found"),
        (2, "foo", "exec: \"foo\": executable file not found in $PATH: not found"),
        (3, "/bin/garbage", "exec: \"/bin/garbage\": exec format error"),
        (4, "/secret", "exec: \"/secret\": permission denied"),
    ] {
        let mut request = bench.request(number, "");
        request.config.containers[0].args = vec![program.to_owned()];
        let sandbox = bench.create(&request).await;
        let ended = termination(&AgentClient::new(sandbox.agent().clone()), 0).await;
        assert_eq!((ended.reason.as_str(), ended.message.as_str()), ("StartError", said));
        bench.destroy(&request).await;
    }
}

#[tokio::test]
async fn limits_users_volumes_and_restarts() {
    let Some(ground) = ground("limits") else { return };
    let bench = &ground.0;
    let mut request = bench.request(1, "dd if=/dev/zero of=/dev/null bs=200M count=1; sleep 1000");
    request.config.containers[0].resources =
        Resources { memory_bytes: Some(64 << 20), cpu_milli: Some(500), pids: Some(50), ..Resources::default() };
    request.config.containers[0].args =
        ["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"].map(Into::into).into();
    let sandbox = bench.create(&request).await;
    let ended = termination(&AgentClient::new(sandbox.agent().clone()), 0).await;
    assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "OOMKilled"));
    bench.destroy(&request).await;

    let mut request =
        bench.request(2, "id -u; id -g; echo $HOME; cat /v/file; echo x > /m/x && echo memory; echo x > /v/x");
    std::fs::create_dir_all(request.dir.join("volumes/files")).unwrap();
    std::fs::write(request.dir.join("volumes/files/file"), "content\n").unwrap();
    let volume = |name: &str, memory: bool| {
        let size_limit_bytes = memory.then_some(1 << 20);
        AgentVolume { name: name.into(), memory, size_limit_bytes, ..AgentVolume::default() }
    };
    request.config.volumes = vec![volume("files", false), volume("memory", true)];
    let mount = |volume: &str, path: &str, read_only| AgentMount {
        volume: volume.into(),
        path: path.into(),
        read_only,
        ..AgentMount::default()
    };
    request.config.containers[0].mounts = vec![mount("files", "/v", true), mount("memory", "/m", false)];
    request.config.containers[0].user = "web".into();
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    assert_eq!(termination(&agent, 0).await.exit_code, 1);
    let text = logs(&agent, "main", &LogOptions::default()).await;
    // The two streams are two pipes: their order among each other is not kept.
    assert!(text.contains("33\n34\n/var/www\n") && text.contains("memory\n"), "{text}");
    assert!(text.contains("content\n") && text.contains("Read-only"), "{text}");
    bench.destroy(&request).await;

    let mut request = bench.request(3, "echo run; exit 3");
    request.config.restart_policy = WireRestartPolicy::Always;
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    let backing_off = |state: &joey_api::agent::AgentState| matches!(&state.containers[0].state, ContainerState::Waiting { reason, .. } if reason == "CrashLoopBackOff");
    // The first restart comes at once, the second waits.
    state_where(&agent, |state| state.containers[0].restart_count == 1 && backing_off(state)).await;
    agent.restart("main").await.unwrap();
    let state = state_where(&agent, |state| state.containers[0].restart_count == 2 && backing_off(state)).await;
    assert_eq!(state.containers[0].last_termination.as_ref().unwrap().exit_code, 3);
    let previous = LogOptions { previous: true, ..LogOptions::default() };
    assert_eq!(logs(&agent, "main", &previous).await, "run\n");
    // Only this run and the one before it are kept.
    agent.restart("main").await.unwrap();
    state_where(&agent, |state| state.containers[0].restart_count == 3 && backing_off(state)).await;
    assert!(!request.dir.join("logs/main/1.log").exists() && request.dir.join("logs/main/2.log").exists());
    bench.destroy(&request).await;
}

#[tokio::test]
async fn a_followed_log_ends_with_its_run() {
    let Some(ground) = ground("follow") else { return };
    let bench = &ground.0;
    let follow = LogOptions { follow: true, ..LogOptions::default() };
    let followed = async |agent: &AgentClient| {
        let log = logs(agent, "main", &follow);
        tokio::time::timeout(conformance::LIMIT, log).await.expect("the log ends by itself")
    };
    let all: String = (1..=3000).map(|number| format!("{number}\n")).collect();

    let request = bench.request(1, "sleep 1; seq 1 3000");
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    assert_eq!(followed(&agent).await, all, "it ends while it is followed");
    termination(&agent, 0).await;
    assert_eq!(followed(&agent).await, all, "it had ended before");
    bench.destroy(&request).await;

    let mut request = bench.request(2, "sleep 1; echo run; exit 3");
    request.config.restart_policy = WireRestartPolicy::Always;
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    for run in 0..2 {
        state_where(&agent, |state| state.containers[0].restart_count == run).await;
        running(&agent).await;
        assert_eq!(followed(&agent).await, "run\n", "run {run} ends while it is followed");
        assert_eq!(followed(&agent).await, "run\n", "run {run} waits for the next one");
        agent.restart("main").await.unwrap();
    }
    bench.destroy(&request).await;

    let mut request = bench.request(3, "");
    request.config.containers[0].args = vec!["/no/such".to_owned()];
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    assert_eq!(followed(&agent).await, "", "there was nothing to start");
    bench.destroy(&request).await;
}

#[tokio::test]
async fn logs_rotate_and_are_read_in_order() {
    let Some(ground) = ground("logs") else { return };
    let bench = &ground.0;
    let mut request = bench.request(1, "seq 1 2000");
    request.config.log_max_bytes = 40 << 10;
    request.config.log_max_files = 5;
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    termination(&agent, 0).await;
    let all: String = (1..=2000).map(|number| format!("{number}\n")).collect();
    assert_eq!(logs(&agent, "main", &LogOptions::default()).await, all);
    assert!(request.dir.join("logs/main/0.log.1").exists());
    let tail = LogOptions { tail: Some(2), ..LogOptions::default() };
    assert_eq!(logs(&agent, "main", &tail).await, "1999\n2000\n");
    let limited = LogOptions { limit_bytes: Some(3), follow: true, ..LogOptions::default() };
    assert_eq!(logs(&agent, "main", &limited).await, "1\n2");
    bench.destroy(&request).await;
}

#[tokio::test]
async fn terminals() {
    let Some(ground) = ground("tty") else { return };
    let bench = &ground.0;
    let mut request = bench.request(1, "stty size; sleep 1000");
    request.config.containers[0].tty = true;
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    let mut frames = joey_api::frame::encode(joey_api::frame::RESIZE, br#"{"Width":91,"Height":17}"#);
    frames.extend(joey_api::frame::encode(joey_api::frame::STDIN, b"stty size; exit 4\n"));
    let outgoing =
        futures::StreamExt::chain(futures::stream::iter([bytes::Bytes::from(frames)]), futures::stream::pending());
    let query = joey_api::agent::ExecQuery {
        command: vec!["sh".into()],
        stdin: true,
        stdout: true,
        tty: true,
        ..Default::default()
    };
    let answer = agent.exec("main", &query, outgoing).await.unwrap();
    let (text, status) = tokio::time::timeout(conformance::LIMIT, conformance::read_frames(answer)).await.unwrap();
    assert!(text.contains("17 91"), "{text}");
    assert_eq!(status.exit_code, Some(4));
    bench.destroy(&request).await;
}
