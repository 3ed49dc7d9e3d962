//! What every class must do, written once against the traits. A class's own test calls [`all`] with a [`Bench`].
//!
//! Scripts are arguments of `sh -c` and use nothing but `echo`, `sleep` and `exit`, which the fake understands too.

mod whole;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use joey_api::agent::{AgentConfig, AgentContainer, AgentState, Collected, VERSION};
use joey_api::frame::{Decoder, ExecStatus, STATUS, STDOUT};
use joey_api::instance::{ContainerState, ExecRequest, LogOptions, Resources, Termination, WireRestartPolicy};
use joey_api::lifecycle::{LastWords, Lifecycle, RestartOnResize, Role};
use joey_model::InstanceId;

use crate::{AgentClient, CreateRequest, Layer, Sandbox, SandboxClass};

pub use whole::whole;

/// What a class's test supplies.
pub struct Bench {
    pub class: Arc<dyn SandboxClass>,
    /// An empty directory for instances' directories.
    pub dir: PathBuf,
    /// Layers with `/bin/sh`, topmost first.
    pub layers: Vec<Layer>,
    /// A layer that is not among them, with a file `/further` that says `further`; none for a class without processes.
    pub further: Vec<Layer>,
    pub cgroup_root: String,
    /// Whether its containers are on a Linux, which says that it filters their system calls, and knows terminals by name.
    pub on_linux: bool,
}

/// The bound of each wait.
pub const LIMIT: Duration = Duration::from_secs(20);

impl Bench {
    /// A request for an instance with one container `main` that runs `script`.
    ///
    /// # Panics
    /// When the instance's directory cannot be written.
    pub fn request(&self, number: u64, script: &str) -> CreateRequest {
        let bits = u64::from(std::process::id()) << 16 | number;
        let instance = InstanceId::from_bits(bits);
        let dir = self.dir.join(instance.as_str());
        std::fs::create_dir_all(dir.join("volumes")).expect("the bench's directory is writable");
        let config = AgentConfig {
            version: VERSION,
            instance: instance.to_string(),
            hostname: "bench".to_owned(),
            address: None,
            containers: vec![container("main", script, &self.layers)],
            volumes: Vec::new(),
            fs_group: None,
            restart_policy: WireRestartPolicy::Never,
            termination_grace_period_seconds: 2,
            share_processes: false,
            sysctls: Default::default(),
            limits: Default::default(),
            deadline: None,
            debug_ports: Vec::new(),
            core_pattern: None,
            resolv_conf: "nameserver 192.0.2.1\n".to_owned(),
            hosts: "127.0.0.1 localhost\n".to_owned(),
            cgroup: format!("{}/{instance}", self.cgroup_root),
            log_max_bytes: 1 << 20,
            log_max_files: 3,
        };
        CreateRequest {
            instance,
            dir,
            network: None,
            layers: self.layers.clone(),
            disk_bytes: None,
            encrypted_disk: false,
            config,
        }
    }

    /// Writes `agent.json` and creates the sandbox.
    ///
    /// # Panics
    /// When either fails.
    pub async fn create(&self, request: &CreateRequest) -> Arc<dyn Sandbox> {
        let json = serde_json::to_vec(&request.config).expect("a configuration is JSON");
        std::fs::write(request.dir.join("agent.json"), json).expect("the directory is writable");
        self.class.create(request.clone()).await.expect("the sandbox is made")
    }

    /// Destroys the sandbox and its directory.
    ///
    /// # Panics
    /// When the class cannot.
    pub async fn destroy(&self, request: &CreateRequest) {
        for _ in 0..2 {
            self.class.destroy(&request.instance, &request.dir).await.expect("destroy is idempotent");
        }
        std::fs::remove_dir_all(&request.dir).expect("nothing is mounted in the directory");
    }
}

/// A container that runs a script with the default capabilities.
pub fn container(name: &str, script: &str, layers: &[Layer]) -> AgentContainer {
    let capabilities = [
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "KILL",
        "AUDIT_WRITE",
    ];
    AgentContainer {
        name: name.to_owned(),
        role: Role::Main,
        target: None,
        restart_policy: None,
        restart_rules: Vec::new(),
        lifecycle: Lifecycle::default(),
        last_words: LastWords::default(),
        image: "bench".to_owned(),
        image_id: String::new(),
        layers: layers.iter().map(|layer| layer.path.display().to_string()).collect(),
        args: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        env: vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned()],
        working_dir: "/".to_owned(),
        user: String::new(),
        supplemental_groups: Vec::new(),
        strict_groups: false,
        run_as_non_root: false,
        read_only_root: false,
        no_new_privileges: false,
        capabilities: capabilities.map(str::to_owned).to_vec(),
        stdin: false,
        stdin_once: false,
        tty: false,
        resources: Resources::default(),
        restart_on_resize: RestartOnResize::default(),
        stop_signal: "SIGTERM".to_owned(),
        mounts: Vec::new(),
        collected: Collected::default(),
    }
}

/// Every case.
pub async fn all(bench: &Bench) {
    exit_codes_and_logs(bench).await;
    stop_and_exec(bench).await;
    adoption_and_destruction(bench).await;
}

async fn exit_codes_and_logs(bench: &Bench) {
    for (number, code) in [(1, 0), (2, 7)] {
        let request = bench.request(number, &format!("echo one; echo two; exit {code}"));
        let sandbox = bench.create(&request).await;
        let agent = AgentClient::new(sandbox.agent().clone());
        let ended = termination(&agent, 0).await;
        assert_eq!((ended.exit_code, ended.signal), (code, None));
        assert_eq!(ended.reason, if code == 0 { "Completed" } else { "Error" });
        assert_eq!(logs(&agent, "main", &LogOptions::default()).await, "one\ntwo\n");
        bench.destroy(&request).await;
    }
}

async fn stop_and_exec(bench: &Bench) {
    let request = bench.request(3, "sleep 1000");
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    let (text, status) = exec(&agent, &["/bin/sh", "-c", "echo inside; exit 5"]).await;
    assert_eq!((text.as_str(), status.exit_code), ("inside\n", Some(5)));
    agent.stop(1).await.expect("stop is accepted");
    let ended = termination(&agent, 0).await;
    assert!(ended.signal.is_some() && ended.exit_code > 128, "{ended:?}");
    agent.shutdown().await.expect("shutdown is accepted");
    tokio::time::timeout(LIMIT, sandbox.exited()).await.expect("the agent ends");
    bench.destroy(&request).await;
}

async fn adoption_and_destruction(bench: &Bench) {
    let request = bench.request(4, "sleep 1000");
    drop(bench.create(&request).await);
    let sandbox = bench.class.adopt(&request.instance, &request.dir).await.expect("adopt").expect("it still runs");
    running(&AgentClient::new(sandbox.agent().clone())).await;
    bench.destroy(&request).await;
    tokio::time::timeout(LIMIT, sandbox.exited()).await.expect("destruction is noticed");
    assert!(bench.class.adopt(&request.instance, &request.dir).await.expect("adopt").is_none());
}

/// Waits for a state.
///
/// # Panics
/// When it does not come within [`LIMIT`].
pub async fn state_where(agent: &AgentClient, wanted: impl Fn(&AgentState) -> bool) -> AgentState {
    let mut states = agent.watch().await.expect("watch");
    let mut last = None;
    let found = async {
        while let Some(state) = states.next().await {
            let state = state.expect("a state");
            if wanted(&state) {
                return state;
            }
            last = Some(state);
        }
        panic!("the watch ended");
    };
    match tokio::time::timeout(LIMIT, found).await {
        Ok(state) => state,
        Err(_) => panic!("the state did not come; last: {last:?}"),
    }
}

/// Waits until the first container runs.
pub async fn running(agent: &AgentClient) -> AgentState {
    state_where(agent, |state| matches!(state.containers[0].state, ContainerState::Running { .. })).await
}

/// Waits until a container has ended for good.
pub async fn termination(agent: &AgentClient, container: usize) -> Termination {
    let ended = |state: &AgentState| matches!(state.containers[container].state, ContainerState::Terminated(_));
    match state_where(agent, ended).await.containers.swap_remove(container).state {
        ContainerState::Terminated(ended) => ended,
        _ => unreachable!("the state was waited for"),
    }
}

/// A container's log as text.
pub async fn logs(agent: &AgentClient, container: &str, options: &LogOptions) -> String {
    let chunks: Vec<_> =
        agent.logs(container, options).await.expect("logs").try_collect().await.expect("the log is whole");
    String::from_utf8_lossy(&chunks.concat()).into_owned()
}

/// Runs a command without input in `main`: its standard output and how it ended.
pub async fn exec(agent: &AgentClient, command: &[&str]) -> (String, ExecStatus) {
    let command = command.iter().map(|&word| word.to_owned()).collect();
    let request = ExecRequest { command, stdout: true, stderr: true, ..ExecRequest::default() };
    let run = async {
        let answer = agent.exec("main", &request, futures::stream::pending()).await.expect("exec");
        read_frames(answer).await
    };
    tokio::time::timeout(LIMIT, run).await.expect("exec ends")
}

/// Reads frames up to the status.
pub async fn read_frames(mut answer: crate::client::ByteStream) -> (String, ExecStatus) {
    let (mut decoder, mut text) = (Decoder::default(), Vec::new());
    while let Some(bytes) = answer.next().await {
        decoder.push(&bytes.expect("bytes"));
        while let Some((channel, payload)) = decoder.next_frame().expect("a frame") {
            match channel {
                STDOUT => text.extend(payload),
                STATUS => {
                    let status = serde_json::from_slice(&payload).expect("a status");
                    return (String::from_utf8_lossy(&text).into_owned(), status);
                }
                _ => {}
            }
        }
    }
    panic!("the stream ended without a status");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_fake_conforms() {
        let dir = std::env::temp_dir().join(format!("joey-fake-{}", std::process::id()));
        let bench = Bench {
            class: crate::fake::fake(),
            dir: dir.clone(),
            layers: Vec::new(),
            further: Vec::new(),
            cgroup_root: "/none".into(),
            on_linux: false,
        };
        all(&bench).await;
        std::fs::remove_dir_all(dir).unwrap();
    }
}
