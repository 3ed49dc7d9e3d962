//! What a class must do that runs real processes: containers beside and after each other, what is asked of them from outside, volumes,
//! limits, and what comes while they run. Roots have busybox's `sh`, `sleep`, `cat`, `id`, `dd`, `grep`, `mknod`, `hostname`, `touch`.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use joey_api::agent::{AgentMount, AgentVolume};
use joey_api::frame::{CLOSE, STDIN, encode};
use joey_api::instance::{ContainerState, ExecRequest, FileContent, LogOptions, Resources};
use joey_api::lifecycle::{Action, Probe, Role};

use super::{Bench, LIMIT, container, exec, logs, read_frames, running, state_where, termination};
use crate::AgentClient;

/// Every case for a class with real processes.
pub async fn whole(bench: &Bench) {
    closed_in(bench).await;
    containers_after_and_beside_each_other(bench).await;
    input_and_output(bench).await;
    files_both_ways(bench).await;
    volumes_that_change(bench).await;
    ports_and_usage(bench).await;
    limits(bench).await;
    containers_that_come_later(bench).await;
}

async fn closed_in(bench: &Bench) {
    let request = bench.request(11, "sleep 1000");
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    let sh = async |script: &str| exec(&agent, &["sh", "-c", script]).await;
    let (text, _) = sh("cat /proc/1/status /proc/self/status").await;
    if bench.on_linux {
        assert_eq!(text.matches("Seccomp:\t2").count(), 2, "{text}");
    }
    assert_eq!(text.matches("CapEff:\t00000000a80425fb").count(), 2, "{text}");
    assert_eq!(text.matches("CapBnd:\t00000000a80425fb").count(), 2, "{text}");
    let (text, _) = sh("hostname; cat /etc/resolv.conf; ls /proc | grep -c '^[0-9]*$'").await;
    assert!(text.starts_with("bench\nnameserver 192.0.2.1\n"), "{text}");
    for (script, fails) in [
        ("mount -t tmpfs none /tmp", true),
        ("echo 1 > /proc/sys/kernel/pid_max", true),
        ("mknod /tmp/disk b 254 0 && dd if=/tmp/disk of=/dev/null count=1", true),
        ("mknod /dev/disk b 254 0 && dd if=/dev/disk of=/dev/null count=1", true),
        ("echo b > /proc/sysrq-trigger", true),
        ("echo fine > /tmp/file && echo fine > /dev/null", false),
    ] {
        let (text, status) = sh(script).await;
        assert_eq!(status.exit_code != Some(0), fails, "{script}: {text} {status:?}");
    }
    let (_, status) = exec(&agent, &["nothing"]).await;
    assert_eq!(status.exit_code, Some(127));
    bench.destroy(&request).await;
}

async fn containers_after_and_beside_each_other(bench: &Bench) {
    let mut request = bench.request(12, "echo main; until [ -e /shared/side ]; do sleep 0.1; done; exit 3");
    let mount = || AgentMount { volume: "shared".to_owned(), path: "/shared".to_owned(), ..AgentMount::default() };
    request.config.volumes.push(AgentVolume { name: "shared".to_owned(), ..AgentVolume::default() });
    let mut init = container("first", "echo first; touch /shared/first", &bench.layers);
    let mut side = container("side", "cat /shared/first && touch /shared/side; sleep 1000", &bench.layers);
    (init.role, side.role) = (Role::Init, Role::Sidecar);
    let probe = |script: &str| Probe {
        action: Action::Exec { command: ["sh", "-c", script].map(str::to_owned).to_vec() },
        initial_delay_seconds: 0,
        timeout_seconds: 10,
        period_seconds: 1,
        success_threshold: 1,
        failure_threshold: 30,
        termination_grace_period_seconds: None,
    };
    side.lifecycle.startup = Some(probe("[ -e /shared/side ]"));
    for one in [&mut init, &mut side] {
        one.mounts.push(mount());
    }
    let main = &mut request.config.containers[0];
    main.mounts.push(mount());
    request.config.containers.splice(0..0, [init, side]);
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    assert_eq!(termination(&agent, 0).await.exit_code, 0);
    assert_eq!(termination(&agent, 2).await.exit_code, 3);
    // The last main container has ended, and so does the one beside it.
    let ended = termination(&agent, 1).await;
    assert!(ended.signal.is_some(), "{ended:?}");
    assert_eq!(logs(&agent, "first", &LogOptions::default()).await, "first\n");
    assert_eq!(logs(&agent, "main", &LogOptions::default()).await, "main\n");
    bench.destroy(&request).await;
}

async fn input_and_output(bench: &Bench) {
    let mut request = bench.request(13, "while read line; do echo got $line; done; echo over");
    request.config.containers[0].stdin = true;
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    let frames = [encode(STDIN, b"one\ntwo\n"), encode(CLOSE, b"")].map(Bytes::from);
    let attach = ExecRequest { stdin: true, stdout: true, stderr: true, ..ExecRequest::default() };
    let frames = futures::stream::iter(frames).chain(futures::stream::pending());
    let attached = async {
        let answer = agent.attach("main", &attach, frames).await.expect("attach");
        read_frames(answer).await
    };
    let (text, _) = tokio::time::timeout(LIMIT, attached).await.expect("the container ends");
    assert!(text.ends_with("over\n"), "{text}");
    assert_eq!(logs(&agent, "main", &LogOptions::default()).await, "got one\ngot two\nover\n");
    bench.destroy(&request).await;

    let request = bench.request(14, "sleep 1000");
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    let command = ["sh", "-c", "read line; echo $line; [ -t 0 ] && echo terminal; tty"].map(str::to_owned).to_vec();
    let exec = ExecRequest { command, stdin: true, stdout: true, tty: true, ..ExecRequest::default() };
    let frames = futures::stream::iter([Bytes::from(encode(STDIN, b"typed\n"))]).chain(futures::stream::pending());
    let run = async { read_frames(agent.exec("main", &exec, frames).await.expect("exec")).await };
    let (text, status) = tokio::time::timeout(LIMIT, run).await.expect("exec ends");
    assert!(
        text.contains("typed") && text.contains("terminal") && (!bench.on_linux || text.contains("/dev/")),
        "{text} {status:?}"
    );
    bench.destroy(&request).await;
}

async fn files_both_ways(bench: &Bench) {
    let request = bench.request(15, "sleep 1000");
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    let (_, status) =
        exec(&agent, &["sh", "-c", "dd if=/dev/urandom of=/tmp/many bs=65536 count=32 iflag=fullblock"]).await;
    assert_eq!(status.exit_code, Some(0));
    let read = |path: &'static str| {
        let agent = agent.clone();
        async move {
            let parts: Vec<Bytes> =
                agent.read_files("main", path).await.expect("files").try_collect().await.expect("tar");
            parts.concat()
        }
    };
    let archive = read("/tmp/many").await;
    assert!(archive.len() > 2 << 20, "{}", archive.len());
    let again =
        futures::stream::iter(archive.chunks(10_000).map(|part| Ok(Bytes::copy_from_slice(part))).collect::<Vec<_>>());
    let (_, status) = exec(&agent, &["sh", "-c", "mkdir /tmp/back"]).await;
    assert_eq!(status.exit_code, Some(0));
    agent.write_files("main", "/tmp/back", again).await.expect("files are taken in");
    let (text, status) = exec(&agent, &["sh", "-c", "cmp /tmp/many /tmp/back/many && echo same"]).await;
    assert_eq!((text.as_str(), status.exit_code), ("same\n", Some(0)));
    bench.destroy(&request).await;
}

async fn volumes_that_change(bench: &Bench) {
    let file =
        |text: &str| FileContent { path: "key".to_owned(), base64: STANDARD.encode(text), mode: 0o644, user: None };
    let mut request = bench.request(16, "sleep 1000");
    let files = AgentVolume { name: "settings".to_owned(), files: Some(vec![file("old")]), ..AgentVolume::default() };
    let memory = AgentVolume {
        name: "memory".to_owned(),
        memory: true,
        size_limit_bytes: Some(1 << 20),
        ..AgentVolume::default()
    };
    request.config.volumes.extend([files, memory]);
    for (volume, path) in [("settings", "/settings"), ("memory", "/memory")] {
        let mount = AgentMount { volume: volume.to_owned(), path: path.to_owned(), ..AgentMount::default() };
        request.config.containers[0].mounts.push(mount);
    }
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    assert_eq!(exec(&agent, &["cat", "/settings/key"]).await.0, "old");
    assert!(agent.renew_volume("settings", vec![file("new")]).await.expect("renewed"));
    assert_eq!(exec(&agent, &["cat", "/settings/key"]).await.0, "new");
    let (text, status) = exec(&agent, &["sh", "-c", "dd if=/dev/zero of=/memory/much bs=65536 count=32"]).await;
    assert_ne!(status.exit_code, Some(0), "{text}");
    bench.destroy(&request).await;
}

async fn ports_and_usage(bench: &Bench) {
    let script = "dd if=/dev/zero of=/dev/null bs=1000 count=20000; while true; do echo hello | nc -l -p 7000; done";
    let request = bench.request(17, script);
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    let heard = async {
        loop {
            let said = match agent.forward(7000, futures::stream::pending()).await {
                Ok(bytes) => bytes.take(1).try_collect::<Vec<_>>().await.unwrap_or_default().concat(),
                Err(_) => Vec::new(),
            };
            if said == b"hello\n" {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, heard).await.expect("the port answers");
    let usage = agent.usage().await.expect("usage");
    let of_main = usage.containers.iter().find(|one| one.name == "main").expect("it is counted");
    assert!(of_main.cpu_nanoseconds > 0 && of_main.memory_working_set_bytes > 0, "{usage:?}");
    bench.destroy(&request).await;
}

async fn limits(bench: &Bench) {
    let mut request = bench.request(18, "exec dd if=/dev/zero of=/dev/null bs=100000000 count=1");
    request.config.containers[0].resources =
        Resources { memory_bytes: Some(24 << 20), pids: Some(20), ..Resources::default() };
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    let ended = termination(&agent, 0).await;
    assert_eq!(ended.reason, "OOMKilled", "{ended:?}");
    bench.destroy(&request).await;
}

async fn containers_that_come_later(bench: &Bench) {
    let request = bench.request(19, "sleep 1000");
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    // Layers that it has are no news.
    sandbox.provide(bench.layers.clone()).await.expect("layers are known");
    sandbox.provide(bench.further.clone()).await.expect("further layers are shown");
    sandbox.provide(bench.further.clone()).await.expect("and are known then");
    let mut debug =
        container("look", "cat /further; sleep 1000", &[bench.further.clone(), bench.layers.clone()].concat());
    debug.role = Role::Debug;
    agent.put(&debug).await.expect("a debug container");
    state_where(&agent, |state| {
        state.containers.get(1).is_some_and(|one| matches!(one.state, ContainerState::Running { .. }))
    })
    .await;
    let said = async {
        while logs(&agent, "look", &LogOptions::default()).await != "further\n" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, said).await.expect("it shows the further layer");
    bench.destroy(&request).await;
}
