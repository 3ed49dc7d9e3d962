//! Class `runc`: the agent is a process on the host, and containers are namespaces and cgroups below it.

mod layers;
mod program;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use joey_gvisor::Runtime;
use joey_model::{InstanceId, checkpoint};
use joey_rpc::Client;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

use crate::{AgentClient, CreateRequest, Layer, Sandbox, SandboxClass, SandboxError};
use joey_process::{Process, cgroup};

/// How long an agent may take until it answers. It takes milliseconds; this bounds a host in trouble.
const START_LIMIT: Duration = Duration::from_secs(20);

/// How long an agent may take to end when it is asked to: longer than it lets calls that run come to their end.
const END_LIMIT: Duration = Duration::from_secs(3);

/// How long killed processes may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, Clone)]
pub struct RuncConfig {
    /// The program `joey-agent`.
    pub agent_binary: PathBuf,
    /// The cgroup below which every instance has one: `/joey`.
    pub cgroup_root: String,
}

/// The class on this host.
pub fn runc(config: RuncConfig) -> Arc<dyn SandboxClass> {
    Arc::new(Runc::new(config, None))
}

/// Agents that are processes beside the sandbox, and the containers' or their runtime's parents.
pub(crate) struct Runc {
    config: RuncConfig,
    /// What runs the containers, where agents do not themselves.
    runtime: Option<Runtime>,
    program: OnceLock<OwnedFd>,
}

struct RuncSandbox {
    instance: InstanceId,
    client: Client,
    pid: u32,
    gone: watch::Receiver<bool>,
}

#[async_trait]
impl Sandbox for RuncSandbox {
    fn agent(&self) -> &Client {
        &self.client
    }

    async fn exited(&self) {
        // An error means that the watcher is gone, which it is only after it saw the end.
        let _ = self.gone.clone().wait_for(|gone| *gone).await;
    }

    async fn provide(&self, layers: Vec<Layer>) -> Result<(), SandboxError> {
        let (pid, gone) = (self.pid, self.gone.clone());
        let shown = tokio::task::spawn_blocking(move || match *gone.borrow() {
            true => Err(io::ErrorKind::NotFound.into()),
            false => layers::show(pid, layers.into_iter().map(|layer| layer.path).collect()),
        });
        let operation = "show further layers to the agent";
        let failed = |source| SandboxError::Host { instance: self.instance.clone(), operation, source };
        shown.await.map_err(|error| failed(io::Error::other(error)))?.map_err(failed)
    }

    fn pid(&self) -> Option<u32> {
        Some(self.pid)
    }
}

#[async_trait]
impl SandboxClass for Runc {
    fn name(&self) -> &'static str {
        "runc"
    }

    async fn create(&self, request: CreateRequest) -> Result<Arc<dyn Sandbox>, SandboxError> {
        let made = self.start(&request).await;
        if made.is_err()
            && let Err(error) = self.destroy(&request.instance, &request.dir).await
        {
            tracing::warn!(instance = %request.instance, %error, "a half-made sandbox could not be taken down");
        }
        made
    }

    async fn adopt(&self, instance: &InstanceId, dir: &Path) -> Result<Option<Arc<dyn Sandbox>>, SandboxError> {
        let host = |operation| move |source| SandboxError::Host { instance: instance.clone(), operation, source };
        match Process::recorded(&dir.join("agent.pid")).map_err(host("read the agent's record"))? {
            Some(process) => Ok(Some(watched(instance, process, None, dir).map_err(host("watch the agent"))?)),
            None => Ok(None),
        }
    }

    async fn destroy(&self, instance: &InstanceId, dir: &Path) -> Result<(), SandboxError> {
        let host = |operation| move |source| SandboxError::Host { instance: instance.clone(), operation, source };
        let name = format!("{}/{instance}", self.config.cgroup_root);
        if let Some(agent) = Process::recorded(&dir.join("agent.pid")).map_err(host("read the agent's record"))? {
            // Asked first: those who follow a log get the rest of it.
            let asked = AgentClient::new(Client::unix(dir.join("agent.sock")));
            let ended = async {
                if asked.shutdown().await.is_ok() {
                    agent.ended().await;
                }
            };
            let _ = tokio::time::timeout(END_LIMIT, ended).await;
            agent.kill();
            if tokio::time::timeout(KILL_LIMIT, agent.ended()).await.is_err() {
                return Err(SandboxError::Unkillable { instance: instance.clone() });
            }
        }
        let emptied = tokio::time::timeout(KILL_LIMIT, cgroup::kill_all(&name)).await;
        emptied
            .map_err(|_| SandboxError::Unkillable { instance: instance.clone() })?
            .map_err(host("end the processes"))?;
        cgroup::remove(&name).await.map_err(host("remove the cgroups"))?;
        for file in ["agent.sock", "agent.pid"] {
            match std::fs::remove_file(dir.join(file)) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(host("remove the agent's files")(source));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Runc {
    pub(crate) fn new(config: RuncConfig, runtime: Option<Runtime>) -> Self {
        Self { config, runtime, program: OnceLock::new() }
    }

    async fn start(&self, request: &CreateRequest) -> Result<Arc<dyn Sandbox>, SandboxError> {
        let instance = &request.instance;
        let (child, ready) =
            self.spawn(request).map_err(|source| SandboxError::Spawn { instance: instance.clone(), source })?;
        let said = match tokio::time::timeout(START_LIMIT, first_line(ready)).await {
            Ok(said) => said.unwrap_or_default(),
            Err(_) => "it did not answer in time".to_owned(),
        };
        if said != "ready" {
            end(child);
            let message = if said.is_empty() { last_words(&request.dir.join("agent.err")) } else { said };
            return Err(SandboxError::Agent { instance: instance.clone(), message });
        }
        let host = |operation| move |source| SandboxError::Host { instance: instance.clone(), operation, source };
        // On cgroup v2 the agent is a second child, which took the first one's place.
        match Process::recorded(&request.dir.join("agent.pid")).map_err(host("read the agent's record"))? {
            Some(process) => watched(instance, process, Some(child), &request.dir).map_err(host("watch the agent")),
            None => {
                end(child);
                let message = last_words(&request.dir.join("agent.err"));
                Err(SandboxError::Agent { instance: instance.clone(), message })
            }
        }
    }

    /// The path of the agent's sealed copy, made at the first use: a container that gets hold of an agent's /proc/PID/exe
    /// cannot write through it, and agents share one copy in memory.
    fn program(&self) -> io::Result<PathBuf> {
        if self.program.get().is_none() {
            // Of two that race here one copy is dropped again.
            let _ = self.program.set(program::sealed(&self.config.agent_binary)?);
        }
        let fd = self.program.get().map_or(-1, |fd| fd.as_raw_fd());
        Ok(PathBuf::from(format!("/proc/self/fd/{fd}")))
    }

    /// Starts the agent; its standard output says `ready` or why not, and then closes.
    fn spawn(&self, request: &CreateRequest) -> io::Result<(Child, OwnedFd)> {
        let (reader, writer) = io::pipe()?;
        let errors = OpenOptions::new().create(true).append(true).mode(0o600).open(request.dir.join("agent.err"))?;
        let mut command = Command::new(self.program()?);
        command.arg0("joey-agent");
        command.arg("--dir").arg(&request.dir);
        if let Some(network) = &request.network {
            command.arg("--netns").arg(&network.netns);
        }
        if let Some(Runtime { program, platform, inside }) = &self.runtime {
            command.arg("--runsc").arg(program).arg("--platform").arg(platform).arg("--inside").arg(inside);
        }
        if let Some(step) = checkpoint::armed_in_agents() {
            command.arg("--crash-at").arg(step);
        }
        command.env_clear().stdin(Stdio::null()).stdout(writer).stderr(errors);
        let child = command.spawn()?;
        Ok((child, reader.into()))
    }
}

/// Ends what a failed start leaves, and takes its end: the process that was started and, on cgroup v2, the agent it made. Both
/// are in the group that the first one leads.
fn end(mut child: Child) {
    let group = child.id();
    let _ = child.kill();
    // SAFETY: integers only. The group's number is not given away before the child's end is taken.
    unsafe { libc::kill(-group.cast_signed(), libc::SIGKILL) };
    tokio::task::spawn_blocking(move || {
        let _ = child.wait();
        // SAFETY: integers, and a null pointer for an answer that nobody wants.
        while unsafe { libc::waitid(libc::P_PGID, group, std::ptr::null_mut(), libc::WEXITED) } == 0 {}
    });
}

/// Watches the agent until it is gone, and reaps it where it is this process's child. `child` is what this process started.
fn watched(instance: &InstanceId, process: Process, child: Option<Child>, dir: &Path) -> io::Result<Arc<dyn Sandbox>> {
    if let Some(mut child) = child.filter(|child| child.id() != process.pid()) {
        // It has ended, or is about to: it had nothing to do but to make the agent.
        child.wait()?;
    }
    let (gone, seen) = watch::channel(false);
    let pid = process.pid();
    let client = Client::unix(dir.join("agent.sock"));
    tokio::spawn(async move {
        process.ended().await;
        process.reap();
        gone.send_replace(true);
    });
    Ok(Arc::new(RuncSandbox { instance: instance.clone(), client, pid, gone: seen }))
}

async fn first_line(ready: OwnedFd) -> io::Result<String> {
    let mut pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(ready)?;
    let mut text = Vec::new();
    let mut buffer = [0; 512];
    while text.len() < 4096 && !text.contains(&b'\n') {
        match pipe.read(&mut buffer).await? {
            0 => break,
            count => text.extend_from_slice(&buffer[..count]),
        }
    }
    Ok(String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned())
}

/// The end of what the agent wrote to its standard error.
fn last_words(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let tail = &bytes[bytes.len().saturating_sub(1024)..];
    match String::from_utf8_lossy(tail).trim() {
        "" => "it ended without a word".to_owned(),
        words => words.to_owned(),
    }
}
