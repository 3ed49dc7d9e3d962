//! What a Pod's containers go through, with the real agent and real processes: order, hooks, probes, last words, deadlines.
//! Needs root and Debian's busybox-static.

use std::time::{Duration, Instant};

use joey_api::agent::{AgentContainer, AgentMount, AgentState, AgentVolume, Deadline};
use joey_api::instance::{ContainerState, LogOptions, Resources, WireRestartPolicy};
use joey_api::lifecycle::{Action, Hook, LastWords, Probe, RestartOnResize, Role};
use joey_sandbox::conformance::{Bench, container, exec, logs, running, state_where, termination};
use joey_sandbox::{AgentClient, CreateRequest};

mod ground;
use ground::ground;

/// Containers by name, role and script, with a volume that all of them see.
fn pod(bench: &Bench, number: u64, policy: WireRestartPolicy, containers: &[(&str, Role, &str)]) -> CreateRequest {
    let mut request = bench.request(number, "");
    request.config.restart_policy = policy;
    request.config.volumes = vec![AgentVolume { name: "all".to_owned(), memory: true, ..AgentVolume::default() }];
    let mount = AgentMount { volume: "all".to_owned(), path: "/all".to_owned(), ..AgentMount::default() };
    let made = containers.iter().map(|(name, role, script)| AgentContainer {
        role: *role,
        restart_policy: (*role == Role::Sidecar).then_some(WireRestartPolicy::Always),
        mounts: vec![mount.clone()],
        ..container(name, script, &bench.layers)
    });
    request.config.containers = made.collect();
    request
}

fn shell(script: &str) -> Action {
    Action::Exec { command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec() }
}

/// Asked every second, believed at once.
fn probe(script: &str) -> Probe {
    Probe {
        action: shell(script),
        initial_delay_seconds: 0,
        timeout_seconds: 1,
        period_seconds: 1,
        success_threshold: 1,
        failure_threshold: 1,
        termination_grace_period_seconds: None,
    }
}

async fn started(bench: &Bench, request: &CreateRequest) -> AgentClient {
    AgentClient::new(bench.create(request).await.agent().clone())
}

fn waits(state: &AgentState, container: usize, reason: &str) -> bool {
    matches!(&state.containers[container].state, ContainerState::Waiting { reason: told, .. } if told == reason)
}

fn has_event(state: &AgentState, reason: &str, words: &str) -> bool {
    state.events.iter().any(|event| event.reason == reason && event.message.contains(words))
}

#[tokio::test]
async fn init_containers_in_order_then_the_others() {
    let Some(ground) = ground("inits") else { return };
    let bench = &ground.0;
    let request = pod(
        bench,
        1,
        WireRestartPolicy::Never,
        &[
            ("first", Role::Init, "sleep 0.3; echo first >> /all/order"),
            ("second", Role::Init, "echo second >> /all/order"),
            ("main", Role::Main, "cat /all/order"),
        ],
    );
    let agent = started(bench, &request).await;
    assert_eq!(termination(&agent, 2).await.exit_code, 0);
    assert_eq!(logs(&agent, "main", &LogOptions::default()).await, "first\nsecond\n");
    let state = agent.state().await.unwrap();
    assert!(state.containers[..2].iter().all(|init| init.ready), "what is done is ready: {state:?}");
    bench.destroy(&request).await;
}

#[tokio::test]
async fn a_failed_init_container_holds_the_rest_back() {
    let Some(ground) = ground("initfails") else { return };
    let bench = &ground.0;
    let containers = [("init", Role::Init, "exit 3"), ("main", Role::Main, "touch /all/ran")];
    let never = pod(bench, 1, WireRestartPolicy::Never, &containers);
    let agent = started(bench, &never).await;
    assert_eq!(termination(&agent, 0).await.exit_code, 3);
    assert!(waits(&agent.state().await.unwrap(), 1, "PodInitializing"));
    bench.destroy(&never).await;

    let always = pod(bench, 2, WireRestartPolicy::Always, &containers);
    let agent = started(bench, &always).await;
    let state = state_where(&agent, |state| waits(state, 0, "CrashLoopBackOff")).await;
    assert_eq!(state.containers[0].restart_count, 1, "the first restart comes at once, the second waits");
    assert!(waits(&state, 1, "PodInitializing"), "{state:?}");
    bench.destroy(&always).await;
}

const SIDECAR: &str = "trap 'echo side ends >> /all/order; exit 0' TERM; echo side >> /all/order; \
                       while true; do sleep 0.05; done";

#[tokio::test]
async fn sidecars_begin_before_and_end_after() {
    let Some(ground) = ground("sidecar") else { return };
    let bench = &ground.0;
    let mut request = pod(
        bench,
        1,
        WireRestartPolicy::Never,
        &[
            ("side", Role::Sidecar, SIDECAR),
            ("main", Role::Main, "echo main >> /all/order; sleep 0.3; echo main ends >> /all/order"),
        ],
    );
    request.config.containers[0].lifecycle.startup = Some(probe("test -s /all/order"));
    let agent = started(bench, &request).await;
    let side = termination(&agent, 0).await;
    assert_eq!(side.exit_code, 0, "{side:?}");
    assert_eq!(order(&request, &agent).await, "side\nmain\nmain ends\nside ends\n");
    bench.destroy(&request).await;

    let request = pod(
        bench,
        2,
        WireRestartPolicy::Always,
        &[
            ("side", Role::Sidecar, SIDECAR),
            (
                "main",
                Role::Main,
                "trap 'sleep 0.3; echo main ends >> /all/order; exit 0' TERM; while true; do sleep 0.05; done",
            ),
        ],
    );
    let agent = started(bench, &request).await;
    state_where(&agent, |state| state.containers.iter().all(|container| container.ready)).await;
    // The traps are set soon after the shells run.
    exec(&agent, &["/bin/sh", "-c", "while ! test -s /all/order; do sleep 0.05; done; sleep 0.2"]).await;
    agent.stop(5).await.unwrap();
    termination(&agent, 0).await;
    assert_eq!(order(&request, &agent).await, "side\nmain ends\nside ends\n");
    bench.destroy(&request).await;
}

/// The order the containers wrote down.
async fn order(request: &CreateRequest, agent: &AgentClient) -> String {
    agent.state().await.unwrap();
    std::fs::read_to_string(shared(request, "order")).unwrap()
}

/// A file of the volume that all containers share: seen from outside through the agent's own mounts.
fn shared(request: &CreateRequest, name: &str) -> String {
    let pid = std::fs::read_to_string(request.dir.join("agent.pid")).unwrap();
    let pid = pid.split_whitespace().next().unwrap();
    format!("/proc/{pid}/root{}/volumes/all/{name}", request.dir.display())
}

#[tokio::test]
async fn a_container_of_which_nothing_is_known_waits_until_it_is_put() {
    let Some(ground) = ground("held") else { return };
    let bench = &ground.0;
    let containers = [
        ("first", Role::Init, "echo first >> /all/order"),
        ("main", Role::Main, "echo main >> /all/order; sleep 1000"),
        ("late", Role::Main, "echo late >> /all/order; sleep 1000"),
    ];
    let mut request = pod(bench, 1, WireRestartPolicy::Never, &containers);
    let whole = request.config.containers.clone();
    let known =
        |at: usize| AgentContainer { name: whole[at].name.clone(), role: whole[at].role, ..AgentContainer::default() };
    [0, 2].into_iter().for_each(|at| request.config.containers[at] = known(at));
    let agent = started(bench, &request).await;
    let state = state_where(&agent, |state| waits(state, 0, "ContainerCreating")).await;
    assert!(waits(&state, 1, "PodInitializing") && waits(&state, 2, "PodInitializing"), "{state:?}");
    assert!(agent.put(&known(2)).await.is_err(), "what is put is whole");
    agent.put(&whole[0]).await.unwrap();
    let runs = |state: &AgentState, at: usize| matches!(state.containers[at].state, ContainerState::Running { .. });
    state_where(&agent, |state| runs(state, 1) && waits(state, 2, "ContainerCreating")).await;
    // Asked for again it changes nothing more.
    for _ in 0..2 {
        agent.put(&whole[2]).await.unwrap();
    }
    let state = state_where(&agent, |state| runs(state, 2)).await;
    assert!(state.containers.iter().all(|container| container.restart_count == 0), "{state:?}");
    let written = |order: &str| std::fs::read_to_string(shared(&request, "order")).unwrap() == order;
    let all = async {
        while !written("first\nmain\nlate\n") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), all).await.expect("each of them has run once, in their order");
    bench.destroy(&request).await;

    // One that never comes ends with the others.
    let mut request = pod(bench, 2, WireRestartPolicy::Always, &containers[1..]);
    request.config.containers[1] = known(2);
    let agent = started(bench, &request).await;
    state_where(&agent, |state| runs(state, 0) && waits(state, 1, "ContainerCreating")).await;
    agent.stop(1).await.unwrap();
    let ended = |state: &AgentState| {
        matches!(&state.containers[1].state,
        ContainerState::Terminated(end) if end.reason == "ContainerStatusUnknown")
    };
    state_where(&agent, ended).await;
    bench.destroy(&request).await;
}

#[tokio::test]
async fn hooks_are_done_in_their_time() {
    let Some(ground) = ground("hooks") else { return };
    let bench = &ground.0;
    let main = "trap 'echo asked >> /all/order; exit 0' TERM; touch /all/set; while true; do sleep 0.05; done";
    let mut request = pod(bench, 1, WireRestartPolicy::Always, &[("main", Role::Main, main)]);
    let lifecycle = &mut request.config.containers[0].lifecycle;
    lifecycle.post_start = Some(shell("while ! test -e /all/set; do sleep 0.05; done; echo started >> /all/order"));
    lifecycle.pre_stop = Some(shell("sleep 0.2; echo hook >> /all/order"));
    let agent = started(bench, &request).await;
    state_where(&agent, |state| state.containers[0].ready).await;
    agent.stop(5).await.unwrap();
    assert_eq!(termination(&agent, 0).await.exit_code, 0);
    assert_eq!(order(&request, &agent).await, "started\nhook\nasked\n");
    bench.destroy(&request).await;
}

#[tokio::test]
async fn a_hook_before_the_end_has_the_grace_and_no_more() {
    let Some(ground) = ground("slowhook") else { return };
    let bench = &ground.0;
    let mut request = pod(bench, 1, WireRestartPolicy::Always, &[("main", Role::Main, "sleep 1000")]);
    request.config.containers[0].lifecycle.pre_stop = Some(shell("sleep 1000"));
    let agent = started(bench, &request).await;
    running(&agent).await;
    let asked = Instant::now();
    agent.stop(1).await.unwrap();
    let end = termination(&agent, 0).await;
    let took = asked.elapsed();
    assert!(end.exit_code > 128, "{end:?}");
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(5), "{took:?}");
    assert!(has_event(&agent.state().await.unwrap(), "FailedPreStopHook", "grace period"));
    bench.destroy(&request).await;
}

#[tokio::test]
async fn a_failed_hook_after_the_start_ends_the_container() {
    let Some(ground) = ground("badhook") else { return };
    let bench = &ground.0;
    let mut request = pod(bench, 1, WireRestartPolicy::Never, &[("main", Role::Main, "sleep 1000")]);
    request.config.containers[0].lifecycle.post_start = Some(shell("echo it is broken; exit 4"));
    let agent = started(bench, &request).await;
    assert!(termination(&agent, 0).await.exit_code > 128);
    assert!(has_event(&agent.state().await.unwrap(), "FailedPostStartHook", "it is broken"));
    bench.destroy(&request).await;
}

fn hook(script: &str, timeout_seconds: u32) -> Option<Hook> {
    Some(Hook { command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(), timeout_seconds })
}

/// Waits until the log of `main` is this.
async fn says(agent: &AgentClient, text: &str) {
    let limit = Instant::now() + Duration::from_secs(10);
    loop {
        let said = logs(agent, "main", &LogOptions::default()).await;
        if said == text {
            return;
        }
        assert!(Instant::now() < limit, "{said}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_hook_before_the_start_prepares_the_container() {
    let Some(ground) = ground("prestart") else { return };
    let bench = &ground.0;
    for (number, share_processes) in [(1, false), (2, true)] {
        let main = "touch /all/ran; cat /made; id -u; sleep 1000";
        let mut request = pod(bench, number, WireRestartPolicy::Always, &[("main", Role::Main, main)]);
        request.config.share_processes = share_processes;
        let container = &mut request.config.containers[0];
        container.env.push("WORD=warm".to_owned());
        let script =
            "echo $WORD; id -u > /made; sleep 1234 & while ! test -e /all/go; do sleep 0.05; done; echo -n done >&2";
        container.lifecycle.pre_start = hook(script, 60);
        let agent = started(bench, &request).await;
        let state = state_where(&agent, |state| waits(state, 0, "PreStartHook")).await;
        assert!(has_event(&state, "PreStartHook", "Running preStart hook of container main"), "{state:?}");
        // What it says is seen while it runs.
        says(&agent, "[preStart] warm\n").await;
        assert!(!std::fs::exists(shared(&request, "ran")).unwrap());
        std::fs::write(shared(&request, "go"), "").unwrap();
        running(&agent).await;
        says(&agent, "[preStart] warm\n[preStart] done\n0\n0\n").await;
        let (listed, _) = exec(&agent, &["/bin/sh", "-c", "ps | grep -c 'sleep 123[4]'"]).await;
        assert_eq!(listed.trim(), "0", "what the hook left running is gone");
        bench.destroy(&request).await;
    }
}

#[tokio::test]
async fn a_failed_hook_before_the_start_keeps_the_container_from_it() {
    let Some(ground) = ground("badprestart") else { return };
    let bench = &ground.0;
    let containers = [("main", Role::Main, "touch /all/ran")];
    for (number, script, limit, code, words) in [
        (1, "echo it is broken; exit 7", 60, 7, "it exited with 7"),
        (2, "sleep 777", 1, 137, "did not end within 1 s"),
    ] {
        let mut request = pod(bench, number, WireRestartPolicy::Never, &containers);
        request.config.containers[0].lifecycle.pre_start = hook(script, limit);
        let agent = started(bench, &request).await;
        let end = termination(&agent, 0).await;
        assert_eq!((end.exit_code, end.reason.as_str()), (code, "PreStartHookError"), "{end:?}");
        assert!(end.message.contains(words), "{end:?}");
        assert!(has_event(&agent.state().await.unwrap(), "FailedPreStartHook", words));
        assert!(!std::fs::exists(shared(&request, "ran")).unwrap());
        bench.destroy(&request).await;
    }
    let mut request = pod(bench, 3, WireRestartPolicy::Always, &containers);
    request.config.containers[0].lifecycle.pre_start =
        Some(Hook { command: vec!["/bin/nosuch".to_owned()], timeout_seconds: 60 });
    let agent = started(bench, &request).await;
    let state = state_where(&agent, |state| waits(state, 0, "CrashLoopBackOff")).await;
    let last = state.containers[0].last_termination.clone().unwrap();
    assert_eq!((last.exit_code, last.reason.as_str()), (128, "PreStartHookError"));
    assert!(last.message.contains("/bin/nosuch"), "{last:?}");
    bench.destroy(&request).await;

    // A stop does not wait for a hook that does not heed it longer than the grace.
    let mut request = pod(bench, 4, WireRestartPolicy::Always, &containers);
    request.config.containers[0].lifecycle.pre_start = hook("trap '' TERM; while true; do sleep 0.05; done", 600);
    let agent = started(bench, &request).await;
    state_where(&agent, |state| waits(state, 0, "PreStartHook")).await;
    let asked = Instant::now();
    agent.stop(1).await.unwrap();
    assert_eq!(termination(&agent, 0).await.reason, "PreStartHookError");
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    bench.destroy(&request).await;
}

#[tokio::test]
async fn a_container_is_ready_after_its_hook_and_not_before() {
    let Some(ground) = ground("preonline") else { return };
    let bench = &ground.0;
    let mut request = pod(bench, 1, WireRestartPolicy::Always, &[("main", Role::Main, "echo main; sleep 1000")]);
    let lifecycle = &mut request.config.containers[0].lifecycle;
    lifecycle.readiness = Some(probe("test -e /all/ready"));
    lifecycle.pre_online = hook("touch /all/tried; test -e /all/online || { echo cold; exit 3; }", 60);
    let agent = started(bench, &request).await;
    state_where(&agent, |state| has_event(state, "Unhealthy", "Readiness probe failed")).await;
    assert!(!std::fs::exists(shared(&request, "tried")).unwrap(), "who is not healthy is not asked");
    std::fs::write(shared(&request, "ready"), "").unwrap();
    let state = state_where(&agent, |state| has_event(state, "FailedPreOnlineHook", "it exited with 3")).await;
    assert!(state.containers[0].started && !state.containers[0].ready, "{state:?}");
    let text = logs(&agent, "main", &LogOptions::default()).await;
    assert!(text.starts_with("main\n[preOnline] cold\n"), "{text}");
    std::fs::write(shared(&request, "online"), "").unwrap();
    let state = state_where(&agent, |state| state.containers[0].ready).await;
    assert!(has_event(&state, "PreOnlineHook", "succeeded") && state.containers[0].restart_count == 0, "{state:?}");
    // From then on readiness is the probe's matter alone.
    std::fs::remove_file(shared(&request, "online")).unwrap();
    std::fs::remove_file(shared(&request, "ready")).unwrap();
    state_where(&agent, |state| !state.containers[0].ready).await;
    std::fs::write(shared(&request, "ready"), "").unwrap();
    state_where(&agent, |state| state.containers[0].ready).await;
    bench.destroy(&request).await;
}

#[tokio::test]
async fn probes_make_ready_started_and_restarted() {
    let Some(ground) = ground("probes") else { return };
    let bench = &ground.0;
    let mut request = pod(bench, 1, WireRestartPolicy::Always, &[("main", Role::Main, "sleep 1000")]);
    let lifecycle = &mut request.config.containers[0].lifecycle;
    lifecycle.startup = Some(Probe { failure_threshold: 100, ..probe("test -e /all/started") });
    lifecycle.readiness = Some(probe("test -e /all/ready"));
    lifecycle.liveness = Some(probe("! test -e /all/ill || { echo feeling ill; exit 1; }"));
    let agent = started(bench, &request).await;
    let state = state_where(&agent, |state| has_event(state, "Unhealthy", "Startup probe failed")).await;
    assert!(!state.containers[0].started && !state.containers[0].ready, "{state:?}");
    exec(&agent, &["/bin/sh", "-c", "touch /all/started"]).await;
    let state = state_where(&agent, |state| state.containers[0].started).await;
    assert!(!state.containers[0].ready, "{state:?}");
    exec(&agent, &["/bin/sh", "-c", "touch /all/ready"]).await;
    state_where(&agent, |state| state.containers[0].ready).await;
    exec(&agent, &["/bin/sh", "-c", "rm /all/ready 2>/dev/null || /bin/busybox rm /all/ready"]).await;
    state_where(&agent, |state| !state.containers[0].ready && state.containers[0].started).await;
    exec(&agent, &["/bin/sh", "-c", "touch /all/ill"]).await;
    let state = state_where(&agent, |state| state.containers[0].restart_count > 0).await;
    assert!(has_event(&state, "Unhealthy", "Liveness probe failed: feeling ill"), "{state:?}");
    assert!(has_event(&state, "Killing", "failed liveness probe, will be restarted"), "{state:?}");
    bench.destroy(&request).await;
}

#[tokio::test]
async fn a_probe_that_hangs_is_ended_in_time() {
    let Some(ground) = ground("hang") else { return };
    let bench = &ground.0;
    let mut request = pod(bench, 1, WireRestartPolicy::Always, &[("main", Role::Main, "sleep 1000")]);
    request.config.containers[0].lifecycle.readiness = Some(probe("sleep 777"));
    let agent = started(bench, &request).await;
    state_where(&agent, |state| has_event(state, "Unhealthy", "timed out after 1 s")).await;
    // The one that is asked now may run; those before it are gone.
    let (listed, _) = exec(&agent, &["/bin/sh", "-c", "ps | grep -c 'sleep 77[7]'"]).await;
    assert!(listed.trim().parse::<u32>().unwrap() <= 2, "{listed}");
    bench.destroy(&request).await;
}

#[tokio::test]
async fn while_a_process_is_traced_liveness_does_not_count() {
    let Some(ground) = ground("traced") else { return };
    let bench = &ground.0;
    let mut request = pod(bench, 1, WireRestartPolicy::Always, &[("main", Role::Main, "sleep 1000")]);
    request.config.containers[0].lifecycle.liveness =
        Some(Probe { initial_delay_seconds: 1, ..probe("! test -e /all/ill") });
    let agent = started(bench, &request).await;
    let state = running(&agent).await;
    let ContainerState::Running { pid, .. } = state.containers[0].state else { unreachable!() };
    let debugger = ground::Tracer::attach(pid);
    exec(&agent, &["/bin/sh", "-c", "touch /all/ill"]).await;
    let state = state_where(&agent, |state| has_event(state, "Unhealthy", "does not count while process")).await;
    assert_eq!(state.containers[0].restart_count, 0);
    drop(debugger);
    state_where(&agent, |state| state.containers[0].restart_count == 1).await;
    bench.destroy(&request).await;
}

#[tokio::test]
async fn last_words_are_told() {
    let Some(ground) = ground("words") else { return };
    let bench = &ground.0;
    for (number, script, or_log, told) in [
        (1, "echo noise; echo -n from the file > /dev/termination-log; exit 1", false, "from the file"),
        (2, "echo the log says; echo why; exit 1", true, "the log says\nwhy\n"),
        (3, "echo the log says; exit 0", true, ""),
        (4, "echo the log says; exit 1", false, ""),
    ] {
        let mut request = pod(bench, number, WireRestartPolicy::Never, &[("main", Role::Main, script)]);
        request.config.containers[0].last_words = LastWords { or_log, ..LastWords::default() };
        let agent = started(bench, &request).await;
        assert_eq!(termination(&agent, 0).await.message, told, "{script}");
        bench.destroy(&request).await;
    }
    let long = "/bin/busybox seq 100000 > /words; exit 2";
    let mut request = pod(bench, 5, WireRestartPolicy::Never, &[("main", Role::Main, long)]);
    request.config.containers[0].last_words = LastWords { path: "/words".to_owned(), or_log: false };
    let agent = started(bench, &request).await;
    let message = termination(&agent, 0).await.message;
    assert_eq!((message.len(), message.ends_with("\n100000\n")), (4096, true), "{message}");
    bench.destroy(&request).await;
}

#[tokio::test]
async fn a_pod_whose_time_is_over_has_failed() {
    let Some(ground) = ground("deadline") else { return };
    let bench = &ground.0;
    let mut request = pod(bench, 1, WireRestartPolicy::Always, &[("main", Role::Main, "sleep 1000")]);
    request.config.deadline = Some(jiff::Timestamp::now() + jiff::SignedDuration::from_secs(1));
    let agent = started(bench, &request).await;
    termination(&agent, 0).await;
    let failed = agent.state().await.unwrap().failed.expect("a reason");
    assert_eq!(failed.reason, "DeadlineExceeded");
    bench.destroy(&request).await;

    // What has ended by itself keeps its end.
    let request = pod(bench, 2, WireRestartPolicy::Never, &[("main", Role::Main, "exit 0")]);
    let agent = started(bench, &request).await;
    assert_eq!(termination(&agent, 0).await.exit_code, 0);
    let at = Some(jiff::Timestamp::now());
    agent.end_at(Deadline { at }).await.unwrap();
    // The agent does one thing after another: what the deadline does has been done when it answers.
    agent.usage().await.unwrap();
    let state = agent.state().await.unwrap();
    assert_eq!((state.deadline, state.failed), (at, None));
    bench.destroy(&request).await;
}

#[tokio::test]
async fn a_neighbour_of_what_cannot_be_made_starts() {
    let Some(ground) = ground("neighbour") else { return };
    let bench = &ground.0;
    let containers = [("main", Role::Main, "sleep 1000"), ("other", Role::Main, "sleep 1000")];
    let mut request = pod(bench, 1, WireRestartPolicy::Always, &containers);
    request.config.containers[0].run_as_non_root = true;
    request.config.containers[0].lifecycle.post_start = Some(shell("exit 0"));
    let agent = started(bench, &request).await;
    let runs = |state: &AgentState| matches!(state.containers[1].state, ContainerState::Running { .. });
    let state = state_where(&agent, runs).await;
    assert!(waits(&state, 0, "CreateContainerConfigError"), "{state:?}");
    bench.destroy(&request).await;
}

#[tokio::test]
async fn a_restart_before_the_first_run_ends_no_run() {
    let Some(ground) = ground("early") else { return };
    let bench = &ground.0;
    let init = "while ! test -e /all/go; do sleep 0.05; done";
    let main = "trap 'touch /all/asked; exit 0' TERM; touch /all/runs; while true; do sleep 0.05; done";
    let containers = [("init", Role::Init, init), ("main", Role::Main, main)];
    let request = pod(bench, 1, WireRestartPolicy::Always, &containers);
    let agent = started(bench, &request).await;
    running(&agent).await;
    agent.restart("main").await.unwrap();
    std::fs::write(shared(&request, "go"), "").unwrap();
    // It would be asked to end as soon as it runs, which is before it says so.
    let wait = "while ! test -e /all/runs; do sleep 0.05; done; sleep 0.2";
    state_where(&agent, |state| matches!(state.containers[1].state, ContainerState::Running { .. })).await;
    exec(&agent, &["/bin/sh", "-c", wait]).await;
    let state = agent.state().await.unwrap();
    assert!(
        !std::fs::exists(shared(&request, "asked")).unwrap() && state.containers[1].restart_count == 0,
        "{state:?}"
    );
    // One that runs is restarted.
    agent.restart("main").await.unwrap();
    state_where(&agent, |state| state.containers[1].restart_count == 1).await;
    bench.destroy(&request).await;
}

/// Shells that each start the next one and end.
const CHAIN: &str = "echo '/bin/sh /all/chain & ' > /all/chain; /bin/sh /all/chain";

#[tokio::test]
async fn what_forks_on_and_on_ends_with_its_container() {
    let Some(ground) = ground("chain") else { return };
    let bench = &ground.0;
    // With and without a limit of its own, which the next run has again.
    for (number, pids) in [(1, None), (2, Some(64))] {
        let main = format!("test -e /all/again && exec sleep 1000; touch /all/again; {CHAIN}; sleep 0.2; exit 1");
        let mut request = pod(bench, number, WireRestartPolicy::Always, &[("main", Role::Main, &main)]);
        request.config.share_processes = true;
        request.config.containers[0].resources.pids = pids;
        let agent = started(bench, &request).await;
        state_where(&agent, |state| {
            let main = &state.containers[0];
            main.restart_count == 1 && matches!(main.state, ContainerState::Running { .. })
        })
        .await;
        let (listed, status) = exec(&agent, &["/bin/sh", "-c", "ps | grep -c '[0-9A-Z] */bin/sh /all/chai[n]'"]).await;
        assert_eq!(listed.trim(), "0", "{status:?}");
        bench.destroy(&request).await;
    }
}

#[tokio::test]
async fn a_change_of_resources_restarts_who_wants_it() {
    let Some(ground) = ground("resize") else { return };
    let bench = &ground.0;
    let mut request = pod(bench, 1, WireRestartPolicy::Always, &[("main", Role::Main, "sleep 1000")]);
    let container = &mut request.config.containers[0];
    container.resources = Resources { memory_bytes: Some(64 << 20), pids: Some(64), ..Resources::default() };
    container.restart_on_resize = RestartOnResize { cpu: false, memory: true };
    let mut wanted = container.resources;
    let agent = started(bench, &request).await;
    running(&agent).await;
    wanted.pids = Some(128);
    agent.limit("main", &wanted).await.unwrap();
    let state = agent.state().await.unwrap();
    assert!(has_event(&state, "ResizeCompleted", "main") && state.containers[0].restart_count == 0, "{state:?}");
    wanted.memory_bytes = Some(96 << 20);
    agent.limit("main", &wanted).await.unwrap();
    let state = state_where(&agent, |state| {
        let main = &state.containers[0];
        main.restart_count == 1 && matches!(main.state, ContainerState::Running { .. })
    })
    .await;
    assert!(has_event(&state, "Killing", "resize requires restart"), "{state:?}");
    assert_eq!(state.containers[0].resources, wanted);
    bench.destroy(&request).await;
}
