//! Class `gvisor` with the real runsc: the conformance suite, and what only this class shows. Needs root, Debian's `runsc` and
//! busybox-static, and the agent as `scripts/build.sh` links it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use joey_api::agent::AgentState;
use joey_api::instance::{ContainerState, ExecRequest, InstanceSpec, WireRestartPolicy};
use joey_api::lifecycle::{Action, Probe, Role};
use joey_sandbox::conformance::{self, exec, running, state_where, termination};
use joey_sandbox::{AgentClient, RuncConfig, Runtime, gvisor};

#[path = "../../agent/tests/ground/mod.rs"]
mod ground;
use ground::{Ground, Stuff, stuff};

/// The releases that it is shown with: Debian's, and one of nearly four years later that `scripts/newer-runsc.sh` builds where there is Go.
const RELEASES: [&str; 2] = ["/usr/bin/runsc", concat!(env!("CARGO_MANIFEST_DIR"), "/../../.tools/newer-runsc/runsc")];

fn grounds(name: &str) -> impl Iterator<Item = Ground> {
    RELEASES.iter().enumerate().filter_map(move |(at, program)| ground(&format!("{name}{at}"), at, Path::new(program)))
}

fn ground(name: &str, at: usize, program: &Path) -> Option<Ground> {
    let Stuff { dir, layer, further, cgroup_root, agent_binary } = stuff(name)?;
    let inside = agent_binary.with_file_name("static").join("joey-agent");
    for (needed, how) in [(program, "Debian's package runsc, scripts/newer-runsc.sh"), (&inside, "scripts/build.sh")] {
        if !needed.exists() {
            eprintln!("SKIPPED: needs {} ({how})", needed.display());
            return None;
        }
    }
    static PLATFORMS: [OnceLock<String>; RELEASES.len()] = [const { OnceLock::new() }; RELEASES.len()];
    let choose = || joey_sandbox::choose(program, &inside, &dir.join("probe")).expect("a platform works");
    let platform = PLATFORMS[at].get_or_init(choose).clone();
    assert!(!dir.join("probe").exists(), "nothing is left of what it was tried with");
    let config = RuncConfig { agent_binary, cgroup_root: cgroup_root.clone() };
    let class = gvisor(config, Ok(Runtime { program: program.to_owned(), platform, inside }));
    let folder = |folder: PathBuf| vec![joey_sandbox::Layer { image: folder.clone(), path: folder }];
    let (layers, further) = (folder(layer), folder(further));
    Some(Ground(conformance::Bench { class, dir, layers, further, cgroup_root, on_linux: false }))
}

#[tokio::test]
async fn conforms() {
    for ground in grounds("gvisor") {
        conformance::all(&ground.0).await;
        conformance::whole(&ground.0).await;
    }
}

#[tokio::test]
async fn what_it_cannot_do_is_refused_before_anything_starts() {
    for ground in grounds("refused") {
        let bench = &ground.0;
        let mut spec = InstanceSpec::new("refused", Vec::new());
        assert!(bench.class.refuses(&spec).is_none());
        spec.sysctls.insert("net.core.somaxconn".to_owned(), "128".to_owned());
        let fault = bench.class.refuses(&spec).expect("it is refused");
        assert_eq!(fault.kind, joey_model::ErrorKind::Invalid);
        assert!(fault.message.contains("sysctl net.core.somaxconn") && fault.hint.is_some(), "{fault:?}");
        let config = RuncConfig { agent_binary: PathBuf::new(), cgroup_root: bench.cgroup_root.clone() };
        let absent = gvisor(config, Err("runsc is missing (Debian's package runsc)".to_owned()));
        assert!(absent.missing().expect("it says why").contains("runsc"));
        let request = bench.request(2, "sleep 1000");
        assert!(absent.create(request.clone()).await.is_err());
        absent.destroy(&request.instance, &request.dir).await.expect("there is nothing to destroy");
        std::fs::remove_dir_all(&request.dir).unwrap();
    }
}

#[tokio::test]
async fn a_container_sees_another_kernel_and_nothing_of_the_host() {
    for ground in grounds("other") {
        let bench = &ground.0;
        // An image whose folder for temporary files is a link to what the agent has too.
        let layer = &bench.layers[0].path;
        std::fs::remove_dir(layer.join("tmp")).unwrap();
        std::os::unix::fs::symlink("/etc", layer.join("tmp")).unwrap();
        let request = bench.request(1, "echo why > /dev/termination-log; cat /proc/version; ls /tmp/ ; sleep 1000");
        let sandbox = bench.create(&request).await;
        let agent = AgentClient::new(sandbox.agent().clone());
        running(&agent).await;
        let (seen, _) = exec(&agent, &["cat", "/proc/version", "/proc/mounts", "/proc/self/mountinfo"]).await;
        let own = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert!(seen.starts_with("Linux version") && !seen.contains(own.trim()), "{seen}");
        assert!(!seen.contains(&*bench.dir.to_string_lossy()) && !seen.contains("bundle"), "{seen}");
        let (seen, _) = exec(&agent, &["ls", "/tmp/", "/"]).await;
        assert!(seen.contains("passwd") && !seen.contains("last-words") && !seen.contains("joey-agent"), "{seen}");
        // Copying follows links within the root alone.
        assert!(agent.read_files("main", "/tmp/passwd").await.is_ok());
        for path in [request.dir.join("agent.json"), bench.dir.clone()] {
            assert!(agent.read_files("main", &path.to_string_lossy()).await.is_err(), "{}", path.display());
        }
        let (_, status) = exec(&agent, &["sh", "-c", "kill -9 -1; kill -9 1"]).await;
        assert!(status.exit_code.is_some());
        agent.stop(1).await.unwrap();
        assert_eq!(termination(&agent, 0).await.message, "why\n");
        bench.destroy(&request).await;
    }
}

#[tokio::test]
async fn containers_of_a_pod_see_each_other_as_they_should() {
    for ground in grounds("several") {
        let bench = &ground.0;
        for shared in [false, true] {
            let mut request = bench.request(1, "echo memory > /dev/shm/file; sleep 1001");
            request.config.share_processes = shared;
            request.config.containers.push(conformance::container("second", "sleep 1002", &bench.layers));
            let sandbox = bench.create(&request).await;
            let agent = AgentClient::new(sandbox.agent().clone());
            let run = |state: &AgentState| {
                state.containers.iter().all(|one| matches!(one.state, ContainerState::Running { .. }))
            };
            state_where(&agent, run).await;
            let mut debug = conformance::container("look", "sleep 1003", &bench.layers);
            (debug.role, debug.target) = (Role::Debug, Some("second".to_owned()));
            agent.put(&debug).await.expect("a debug container");
            state_where(&agent, |state| state.containers.len() == 3 && run(state)).await;
            let seen = |name: &'static str| {
                let agent = agent.clone();
                let command = ["sh", "-c", "ps; cat /dev/shm/file"].map(str::to_owned).to_vec();
                let request = ExecRequest { command, stdout: true, ..ExecRequest::default() };
                async move {
                    let answer = agent.exec(name, &request, futures::stream::pending()).await.unwrap();
                    conformance::read_frames(answer).await.0
                }
            };
            let (main, look) = (seen("main").await, seen("look").await);
            assert!(main.contains("sleep 1001") && main.contains("sleep 1002") == shared, "{main}");
            assert!(look.contains("sleep 1002") && look.contains("sleep 1001") == shared, "{look}");
            assert!(main.contains("memory") && look.contains("memory"), "{main} {look}");
            bench.destroy(&request).await;
        }
    }
}

#[tokio::test]
async fn a_sandbox_that_dies_is_made_again_and_one_without_its_agent_ends() {
    for ground in grounds("dies") {
        let bench = &ground.0;
        let mut request = bench.request(1, "sleep 1000");
        request.config.restart_policy = WireRestartPolicy::Always;
        let sandbox = bench.create(&request).await;
        let agent = AgentClient::new(sandbox.agent().clone());
        running(&agent).await;
        let kernels = || processes(&request.config.cgroup, "boot");
        let first = kernels();
        assert_eq!(first.len(), 1, "{first:?}");
        kill(first[0]);
        let again = state_where(&agent, |state| {
            let one = &state.containers[0];
            one.restart_count == 1 && matches!(one.state, ContainerState::Running { .. })
        });
        let last = again.await.containers.swap_remove(0).last_termination.unwrap();
        assert_eq!((last.exit_code, last.signal), (137, Some(9)));
        assert_eq!(exec(&agent, &["sh", "-c", "echo here"]).await.0, "here\n");
        kill(sandbox.pid().unwrap());
        let ended = async {
            while !processes(&request.config.cgroup, "").is_empty() {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(conformance::LIMIT, ended).await.expect("all of it ends");
        bench.destroy(&request).await;
    }
}

fn kill(pid: u32) {
    // SAFETY: integers; the process is the test's own.
    assert_eq!(unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) }, 0);
}

/// Processes of `runsc` in an instance's sandbox that have this word in their command line.
fn processes(cgroup: &str, word: &str) -> Vec<u32> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let of = |pid: &u32, file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let here = |pid: &u32| of(pid, "cgroup").contains(&format!("{cgroup}/sandbox")) && !of(pid, "cmdline").is_empty();
    pids.filter(here).filter(|pid| of(pid, "cmdline").split('\0').any(|part| word.is_empty() || part == word)).collect()
}

#[tokio::test]
async fn probes_ask_inside_and_what_is_late_is_ended_there() {
    for ground in grounds("probes") {
        let bench = &ground.0;
        let mut request = bench.request(1, "sleep 1; while true; do nc -l -p 7000 < /etc/hostname; done");
        let probe = |action| Probe {
            action,
            initial_delay_seconds: 0,
            timeout_seconds: 1,
            period_seconds: 1,
            success_threshold: 1,
            failure_threshold: 1000,
            termination_grace_period_seconds: None,
        };
        let main = &mut request.config.containers[0].lifecycle;
        main.readiness = Some(probe(Action::TcpSocket { host: Some("127.0.0.1".to_owned()), port: 7000 }));
        main.liveness = Some(probe(Action::Exec { command: ["sleep", "999"].map(str::to_owned).to_vec() }));
        let sandbox = bench.create(&request).await;
        let agent = AgentClient::new(sandbox.agent().clone());
        state_where(&agent, |state| state.containers[0].ready).await;
        let late = |state: &AgentState| state.events.iter().any(|event| event.message.contains("timed out"));
        let told = state_where(&agent, |state| state.containers[0].ready && late(state)).await;
        assert!(told.events.iter().any(|event| event.message.contains("connection refused")), "{:?}", told.events);
        let (running, _) = exec(&agent, &["sh", "-c", "ps | grep -c '[s]leep 999'"]).await;
        assert!(matches!(running.trim(), "0" | "1"), "those that were late stayed: {running}");
        bench.destroy(&request).await;
    }
}
