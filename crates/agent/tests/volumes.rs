//! Volumes with the real agent and real processes: contents that change as a whole, places within volumes that nobody leads out
//! of them, owners, sizes. Needs root and Debian's busybox-static.

use std::os::unix::fs::{MetadataExt, symlink};
use std::time::Duration;

use base64::Engine as _;
use joey_api::agent::{AgentMount, AgentState, AgentVolume};
use joey_api::instance::{ContainerState, FileContent, LogOptions, WireRestartPolicy};
use joey_sandbox::conformance::{Bench, container, exec, logs, running, state_where, termination};
use joey_sandbox::{AgentClient, CreateRequest};

mod ground;
use ground::ground;

fn file(path: &str, text: &str, mode: u32) -> FileContent {
    let base64 = base64::engine::general_purpose::STANDARD.encode(text);
    FileContent { path: path.to_owned(), base64, mode, user: None }
}

fn files(name: &str, files: Vec<FileContent>) -> AgentVolume {
    AgentVolume { name: name.to_owned(), files: Some(files), ..AgentVolume::default() }
}

fn empty(name: &str) -> AgentVolume {
    AgentVolume { name: name.to_owned(), ..AgentVolume::default() }
}

fn mount(volume: &str, path: &str, sub_path: Option<&str>) -> AgentMount {
    AgentMount {
        volume: volume.to_owned(),
        path: path.to_owned(),
        sub_path: sub_path.map(str::to_owned),
        ..AgentMount::default()
    }
}

/// A request with these volumes, and mounts of them in its container.
fn request(
    bench: &Bench,
    number: u64,
    script: &str,
    volumes: Vec<AgentVolume>,
    mounts: Vec<AgentMount>,
) -> CreateRequest {
    let mut request = bench.request(number, script);
    request.config.volumes = volumes;
    request.config.containers[0].mounts = mounts;
    request
}

async fn started(bench: &Bench, request: &CreateRequest) -> AgentClient {
    AgentClient::new(bench.create(request).await.agent().clone())
}

async fn output(agent: &AgentClient) -> String {
    termination(agent, 0).await;
    logs(agent, "main", &LogOptions::default()).await
}

/// A reader that looks at two files of one generation again and again; it says what should not be.
const READER: &str = "while :; do cd -P /v/..data || { echo no data; continue; }; a=$(cat a); b=$(cat sub/b); \
    [ \"$a\" = \"$b\" ] || echo \"mixed $a $b\"; [ -n \"$a\" ] || echo missing; \
    t=$(cat /v/a) || echo no top; [ \"${#t}\" = 4 ] || echo \"torn $t\"; done";

#[tokio::test]
async fn contents_change_as_a_whole() {
    let Some(ground) = ground("swap") else { return };
    let bench = &ground.0;
    let generation =
        |number: u32| vec![file("a", &format!("{number:04}"), 0o644), file("sub/b", &format!("{number:04}"), 0o600)];
    let shown = vec![mount("v", "/v", None), mount("v", "/one", Some("a"))];
    let request = request(bench, 1, "sleep 1000", vec![files("v", generation(0))], shown);
    let agent = started(bench, &request).await;
    running(&agent).await;
    for number in 1..200 {
        assert!(agent.renew_volume("v", generation(number)).await.unwrap());
        assert!(!agent.renew_volume("v", generation(number)).await.unwrap(), "the same again changes nothing");
    }
    let sh = async |script: &str| exec(&agent, &["sh", "-c", script]).await.0;
    assert_eq!(sh("cat /v/a /v/sub/b; stat -c %a /v/sub/b").await, "01990199600\n");
    assert_eq!(sh("cat /one").await, "0000", "what is mounted by itself stays what it was");
    assert_eq!(sh("readlink /v/a; ls /v").await, "..data/a\na\nsub\n");
    let (_, status) = exec(&agent, &["sh", "-c", "echo x > /v/a || echo x > /v/new || rm /v/a"]).await;
    assert_ne!(status.exit_code, Some(0), "it can only be read");
    // A key that is gone, and one that is new.
    agent.renew_volume("v", vec![file("c", "new!", 0o644)]).await.unwrap();
    assert_eq!(sh("ls /v; cat /v/c").await, "c\nnew!");
    for wrong in [vec![file("../x", "", 0o644)], vec![file("a", "", 0o644), file("a/b", "", 0o644)]] {
        assert!(agent.renew_volume("v", wrong).await.is_err());
    }
    assert!(agent.renew_volume("none", Vec::new()).await.is_err());
    assert_eq!(sh("cat /v/c").await, "new!");
    bench.destroy(&request).await;
}

#[tokio::test]
async fn a_reader_never_sees_a_mix() {
    let Some(ground) = ground("mix") else { return };
    let bench = &ground.0;
    let generation =
        |number: u32| vec![file("a", &format!("{number:04}"), 0o644), file("sub/b", &format!("{number:04}"), 0o644)];
    let request = request(bench, 1, READER, vec![files("v", generation(0))], vec![mount("v", "/v", None)]);
    let agent = started(bench, &request).await;
    running(&agent).await;
    let end = std::time::Instant::now() + Duration::from_secs(3);
    let mut number = 0;
    while std::time::Instant::now() < end {
        number += 1;
        agent.renew_volume("v", generation(number % 10_000)).await.unwrap();
        // A reader is slower than a thousand changes a second, which nobody makes.
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    let log = logs(&agent, "main", &LogOptions::default()).await;
    assert_eq!(log, "", "after {number} changes");
    bench.destroy(&request).await;
}

#[tokio::test]
async fn the_group_owns_what_is_in_volumes() {
    let Some(ground) = ground("group") else { return };
    let bench = &ground.0;
    let script = "stat -Lc '%n %a %g' /v /v/..data/. /v/key /v/sub/. /v/sub/other /disk /memory; touch /disk/x /memory/x; \
                  mkdir /disk/d; stat -c '%n %g' /disk/x /disk/d /memory/x; cat /v/key";
    let volumes = vec![
        files("v", vec![file("key", "k\n", 0o400), file("sub/other", "o", 0o644)]),
        empty("disk"),
        AgentVolume { memory: true, ..empty("memory") },
    ];
    let mounts = vec![mount("v", "/v", None), mount("disk", "/disk", None), mount("memory", "/memory", None)];
    let mut request = request(bench, 1, script, volumes, mounts);
    request.config.fs_group = Some(4000);
    request.config.containers[0].user = "1000:1000".to_owned();
    request.config.containers[0].supplemental_groups = vec![4000];
    let text = output(&started(bench, &request).await).await;
    // Modes as the kubelet's SetVolumeOwnership makes them.
    let expected = "/v 2755 4000\n/v/..data/. 2755 4000\n/v/key 440 4000\n/v/sub/. 2755 4000\n/v/sub/other 644 4000\n\
                    /disk 2777 4000\n/memory 3777 4000\n/disk/x 4000\n/disk/d 4000\n/memory/x 4000\nk\n";
    assert_eq!(text, expected);
    bench.destroy(&request).await;
}

#[tokio::test]
async fn places_within_volumes() {
    let Some(ground) = ground("within") else { return };
    let bench = &ground.0;
    let script = "stat -c %a /sub /deep; cat /key; touch /sub/x && ls /all /all/a/b; touch /key || echo closed";
    let mounts = vec![
        mount("disk", "/all", None),
        mount("disk", "/sub", Some("made")),
        mount("disk", "/deep", Some("a/b/c")),
        mount("v", "/key", Some("dir/key")),
    ];
    let volumes = vec![empty("disk"), files("v", vec![file("dir/key", "value\n", 0o644)])];
    let request_ = request(bench, 1, script, volumes.clone(), mounts);
    let text = output(&started(bench, &request_).await).await;
    assert!(text.starts_with("777\n777\nvalue\n") && text.contains("/all:\na\nmade\n\n/all/a/b:\nc\n"), "{text}");
    assert!(text.contains("closed"), "{text}");
    bench.destroy(&request_).await;

    // What is not there cannot be made where nothing can be written: the container waits for it.
    let request_ = request(bench, 2, "cat /key/late", volumes, vec![mount("v", "/key", Some("late"))]);
    let agent = started(bench, &request_).await;
    let waits = |state: &AgentState| match &state.containers[0].state {
        ContainerState::Waiting { reason, message } if reason == "CreateContainerConfigError" => Some(message.clone()),
        _ => None,
    };
    let state = state_where(&agent, |state| waits(state).is_some()).await;
    assert!(waits(&state).unwrap().contains("subPath \"late\" for volumeMount \"v\""), "{state:?}");
    agent.renew_volume("v", vec![file("late/late", "there\n", 0o644)]).await.unwrap();
    agent.restart("main").await.unwrap();
    assert_eq!(output(&agent).await, "there\n");
    bench.destroy(&request_).await;
}

/// CVE-2017-1002101: a link in a volume is no way out of it.
#[tokio::test]
async fn links_in_a_volume_lead_nowhere() {
    let Some(ground) = ground("links") else { return };
    let bench = &ground.0;
    for (number, leads_to) in (1..).zip(["/", "../..", "/proc/self/root", "/etc/passwd", "../../agent.json", "nowhere"])
    {
        let request =
            request(bench, number, "ls /v; cat /v", vec![empty("disk")], vec![mount("disk", "/v", Some("link/x"))]);
        let volume = request.dir.join("volumes/disk");
        std::fs::create_dir_all(&volume).unwrap();
        symlink(leads_to, volume.join("link")).unwrap();
        let agent = started(bench, &request).await;
        let refused = |state: &AgentState| {
            matches!(&state.containers[0].state,
            ContainerState::Waiting { reason, .. } if reason == "CreateContainerConfigError")
        };
        let state = state_where(&agent, refused).await;
        let ContainerState::Waiting { message, .. } = &state.containers[0].state else { panic!("{state:?}") };
        assert!(!message.contains(&bench.dir.display().to_string()), "{message}");
        bench.destroy(&request).await;
    }
}

/// CVE-2021-25741: another container swaps a directory for a link while the mount is made, again and again.
#[tokio::test]
async fn links_that_come_and_go_lead_nowhere() {
    let Some(ground) = ground("race") else { return };
    let bench = &ground.0;
    let attack = "cd /all; mkdir -p real/in; touch real/in/mine; while :; do rm -rf link; ln -s / link; rm link; \
                  ln -s ../../../.. link; rm link; mkdir -p link/in; touch link/in/mine; done";
    // Names alone: what they name may be gone already.
    let victim = "cd /v; echo *";
    let mut request = request(bench, 1, victim, vec![empty("disk")], vec![mount("disk", "/v", Some("link/in"))]);
    request.config.restart_policy = WireRestartPolicy::Never;
    let mut attacker = container("attacker", attack, &bench.layers);
    attacker.mounts = vec![mount("disk", "/all", None)];
    request.config.containers.push(attacker);
    let agent = started(bench, &request).await;
    let (mut runs, mut seen) = (0, 0);
    let end = std::time::Instant::now() + Duration::from_secs(6);
    while std::time::Instant::now() < end {
        let settled = |state: &AgentState| {
            !matches!(&state.containers[0].state, ContainerState::Running { .. })
                && !matches!(&state.containers[0].state, ContainerState::Waiting { reason, .. } if reason == "ContainerCreating")
        };
        let state = state_where(&agent, settled).await;
        if let ContainerState::Terminated(end) = &state.containers[0].state {
            let text = logs(&agent, "main", &LogOptions::default()).await;
            assert!(matches!(text.as_str(), "" | "*\n" | "mine\n"), "{text} {end:?}");
            seen += 1;
        }
        runs += 1;
        let before = state.containers[0].restart_count;
        agent.restart("main").await.unwrap();
        let again = |state: &AgentState| state.containers[0].restart_count > before || !settled(state);
        // One that waits to be made again has no count.
        let _ = tokio::time::timeout(Duration::from_millis(200), state_where(&agent, again)).await;
    }
    assert!(runs > 10 && seen > 0, "{runs} attempts, {seen} of them began");
    bench.destroy(&request).await;
}

#[tokio::test]
async fn what_takes_too_much_room_is_evicted() {
    let Some(ground) = ground("evicted") else { return };
    let bench = &ground.0;
    let evicted = async |request: &CreateRequest| {
        let agent = started(bench, request).await;
        let ended = |state: &AgentState| {
            state.failed.is_some() && matches!(state.containers[0].state, ContainerState::Terminated(_))
        };
        let state = state_where(&agent, ended).await;
        assert!(state.events.iter().any(|event| event.reason == "Evicted" && event.warning), "{state:?}");
        bench.destroy(request).await;
        let failed = state.failed.unwrap();
        assert_eq!(failed.reason, "Evicted");
        failed.message
    };
    let script = "dd if=/dev/zero of=/v/big bs=1M count=3 2>/dev/null; ln /v/big /v/again; sleep 1000";
    let volume = AgentVolume { size_limit_bytes: Some(1 << 20), ..empty("v") };
    let request_ = request(bench, 1, script, vec![volume], vec![mount("v", "/v", None)]);
    assert_eq!(evicted(&request_).await, "Usage of EmptyDir volume \"v\" exceeds the limit \"1Mi\". ");

    let mut request_ = request(bench, 2, "dd if=/dev/zero of=/tmp/big bs=1M count=3; sleep 1000", vec![], vec![]);
    request_.config.containers[0].resources.ephemeral_storage_bytes = Some(2 << 20);
    assert_eq!(
        evicted(&request_).await,
        "Pod ephemeral local storage usage exceeds the total limit of containers 2Mi. "
    );

    // Logs count too; and a neighbour with room of its own does not help.
    let mut request_ = request(bench, 3, "seq 1 300000; sleep 1000", vec![], vec![]);
    let mut neighbour = container("neighbour", "sleep 1000", &bench.layers);
    request_.config.containers[0].resources.ephemeral_storage_bytes = Some(1_000_000);
    neighbour.resources.ephemeral_storage_bytes = Some(1 << 30);
    request_.config.containers.push(neighbour);
    assert_eq!(evicted(&request_).await, "Container main exceeded its local ephemeral storage limit \"1M\". ");

    // Who stays below his limits stays.
    let script = "dd if=/dev/zero of=/v/small bs=1M count=1 2>/dev/null; sleep 5; echo stayed";
    let volume = AgentVolume { size_limit_bytes: Some(3 << 20), ..empty("v") };
    let request_ = request(bench, 4, script, vec![volume], vec![mount("v", "/v", None)]);
    assert_eq!(output(&started(bench, &request_).await).await, "stayed\n");
    bench.destroy(&request_).await;
}

#[tokio::test]
async fn memory_and_images_as_volumes() {
    let Some(ground) = ground("kinds") else { return };
    let bench = &ground.0;
    let (lower, upper) = (bench.dir.join("lower"), bench.dir.join("over"));
    for (layer, name, text) in [(&lower, "below", "hidden"), (&lower, "data/a", "old"), (&upper, "data/a", "new")] {
        let place = layer.join(name);
        std::fs::create_dir_all(place.parent().unwrap()).unwrap();
        std::fs::write(place, text).unwrap();
    }
    std::fs::copy(bench.layers[0].path.join("bin/busybox"), lower.join("data/busybox")).unwrap();
    let layers = [&upper, &lower].map(|layer| layer.display().to_string()).to_vec();
    let volumes = vec![
        AgentVolume { memory: true, size_limit_bytes: Some(1 << 20), ..empty("m") },
        AgentVolume { layers: layers.clone(), ..empty("two") },
        AgentVolume { layers: layers[1..].to_vec(), ..empty("one") },
    ];
    let mounts = vec![
        mount("m", "/m", None),
        mount("two", "/two", None),
        mount("one", "/one", None),
        mount("two", "/data", Some("data")),
    ];
    let script = "cat /two/below /two/data/a /one/data/a /data/a; echo; ls /one; touch /two/x || echo closed; \
                  /data/busybox true || echo not-started; dd if=/dev/zero of=/m/x bs=1M count=2 2>&1 | grep -c space; \
                  grep -c ' /two ' /proc/self/mountinfo";
    let request = request(bench, 1, script, volumes, mounts);
    let text = output(&started(bench, &request).await).await;
    for part in ["hiddennewoldnew\n", "\nbelow\ndata\n", "closed\n", "not-started\n", "1\n1\n"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(std::fs::metadata(lower.join("data/a")).unwrap().size() == 3, "layers are not touched");
    bench.destroy(&request).await;
}
