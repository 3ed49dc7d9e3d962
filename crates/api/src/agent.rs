//! The agent protocol: what a sandbox's agent is told and what it tells. HTTP/2 with prior knowledge over a unix socket or a
//! virtio port; bodies are JSON unless said otherwise.
//!
//! | call | body | answer |
//! | --- | --- | --- |
//! | `GET /v1/state` | | [`AgentState`] |
//! | `GET /v1/watch` | | [`AgentState`] a line: now, and after every change |
//! | `POST /v1/stop?grace=S` | | 202; SIGTERM, then SIGKILL after S seconds; nothing is restarted; called again, the shorter grace counts |
//! | `POST /v1/shutdown` | | 202; kills what is left and exits |
//! | `POST /v1/containers/C/restart` | | 202; ends the container by SIGTERM and grace, starts it again without back-off |
//! | `POST /v1/containers/C/exec` | query [`ExecQuery`], body frames | frames |
//! | `POST /v1/containers/C/attach` | query [`ExecQuery`] (no command), body frames | frames |
//! | `GET /v1/containers/C/logs` | query [`crate::instance::LogOptions`] | bytes; ends when the run ended, unless `follow` |
//! | `GET /v1/usage` | | [`crate::instance::Usage`] |
//! | `POST /v1/forward?port=N` | bytes | bytes of a connection to that port on loopback |
//! | `GET /v1/containers/C/files?path=P` | | what is at that path of the container, as tar; its first name is the path's last |
//! | `PUT /v1/containers/C/files?path=P` | tar | 204; unpacked into the directory P, or as P where there is none |
//! | `PUT /v1/containers/C` | [`AgentContainer`] | 202; a further [`Role::Debug`] container is started, or one that is there is started again as this |
//! | `PUT /v1/containers/C/resources` | [`Resources`] | 204; the limits from now on, by a new run where `restartOnResize` says so |
//! | `POST /v1/capture` | query [`CaptureRequest`]; any byte ends it | packets as pcapng, with what was lost at the end |
//! | `GET /v1/cores`, `PUT /v1/cores` | nothing, [`CoreSettings`] | [`Cores`] |
//! | `POST /v1/cores` | query [`Crash`], [`CoreWritten`] when it is done | 204; from the kernel's handler of crashes |
//! | `GET /v1/cores/NAME` | | the core's bytes |
//! | `GET /v1/collected` | | [`CollectedStream`]s: how far those go that are kept for a host that does not see them |
//! | `GET /v1/collected/C/S` | query [`Place`] | `BYTES.LINES` in hexadecimal digits, a line feed, and whole records that begin there; what is before the place asked for is the host's, and let go of |
//! | `PUT /v1/deadline` | [`Deadline`] | 204; when everything is ended from now on |
//! | `PUT /v1/volumes/V` | [`VolumeFiles`] | [`VolumeUpdated`]; one atomic change for all who look, nothing when they are the same |
//!
//! [`CaptureRequest`]: crate::diagnosis::CaptureRequest
//! [`CoreSettings`]: crate::diagnosis::CoreSettings
//! [`Cores`]: crate::diagnosis::Cores
//! [`Crash`]: crate::diagnosis::Crash
//! [`CoreWritten`]: crate::diagnosis::CoreWritten
//!
//! Errors carry [`crate::error::ErrorBody`]. The agent reads [`AgentConfig`] from `agent.json` in its directory at start, and
//! starts the containers by itself: nobody has to tell it to.

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::instance::{ContainerState, FileContent, InstanceEvent, Limits, Resources, Termination, WireRestartPolicy};
use crate::lifecycle::{LastWords, Lifecycle, RestartOnResize, RestartRule, Role};

/// Version of `agent.json` and of the protocol; an agent refuses another.
pub const VERSION: u32 = 1;

/// Everything the agent needs, written by the host before the agent starts. Mode 0600: it may hold secrets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentConfig {
    pub version: u32,
    pub instance: String,
    pub hostname: String,
    /// The instance's address, for /etc/hosts and `EnvVar::address`.
    pub address: Option<IpAddr>,
    pub containers: Vec<AgentContainer>,
    pub volumes: Vec<AgentVolume>,
    /// The group that owns what is in the volumes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs_group: Option<u32>,
    pub restart_policy: WireRestartPolicy,
    pub termination_grace_period_seconds: u32,
    /// The containers share one namespace of processes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub share_processes: bool,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sysctls: BTreeMap<String, String>,
    /// Limits on all containers together.
    #[serde(default)]
    pub limits: Limits,
    /// When everything is ended because its time is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// Ports that debuggers connect to: while one is connected, a failing liveness probe does not count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub debug_ports: Vec<u16>,
    /// Cores of processes that crash are written there: [`crate::diagnosis::CoreSettings`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub core_pattern: Option<String>,
    /// Text of /etc/resolv.conf and /etc/hosts inside every container.
    pub resolv_conf: String,
    pub hosts: String,
    /// Cgroup below each controller's root (v1) or the unified root (v2): `/joey/i-…`. Containers get children of it.
    pub cgroup: String,
    /// Largest log file before rotation in bytes, and how many files a run has, the one being written among them.
    pub log_max_bytes: u64,
    pub log_max_files: u32,
}

/// A container with its image's configuration already merged in.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentContainer {
    pub name: String,
    #[serde(default)]
    pub role: Role,
    /// The container whose processes it sees and belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The instance's own when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_policy: Option<WireRestartPolicy>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub restart_rules: Vec<RestartRule>,
    #[serde(default)]
    pub lifecycle: Lifecycle,
    #[serde(default)]
    pub last_words: LastWords,
    /// Image reference as given, and `REGISTRY/REPOSITORY@DIGEST` of what it resolved to; empty while it is held.
    pub image: String,
    pub image_id: String,
    /// Mounted read-only layers, topmost first (overlay's `lowerdir` order).
    pub layers: Vec<String>,
    /// Program and arguments, `$(NAME)` expanded; none while it is held.
    pub args: Vec<String>,
    /// `NAME=value`, names unique.
    pub env: Vec<String>,
    pub working_dir: String,
    /// The image's or spec's user: `user`, `uid`, `user:group`; names are looked up in the root's /etc/passwd and group.
    pub user: String,
    pub supplemental_groups: Vec<u32>,
    #[serde(default)]
    pub strict_groups: bool,
    pub run_as_non_root: bool,
    pub read_only_root: bool,
    pub no_new_privileges: bool,
    /// Capability names without `CAP_`, already reduced to the allowed ones.
    pub capabilities: Vec<String>,
    pub stdin: bool,
    #[serde(default)]
    pub stdin_once: bool,
    pub tty: bool,
    pub resources: Resources,
    #[serde(default, skip_serializing_if = "RestartOnResize::is_never")]
    pub restart_on_resize: RestartOnResize,
    /// Signal that asks it to end: `SIGTERM`, `15` …
    pub stop_signal: String,
    pub mounts: Vec<AgentMount>,
    #[serde(default, skip_serializing_if = "Collected::is_nothing")]
    pub collected: Collected,
}

impl AgentContainer {
    /// What it runs is not known yet, its image is not here: it waits until it is put as a whole.
    pub fn is_held(&self) -> bool {
        self.args.is_empty()
    }
}

/// The segments of a container's output, among those of its sources: no source's name.
pub const OUTPUT: &str = "_output";

/// What of a container is kept as numbered segments in `collect/`, for the host to carry to a sink: see `joey_hidecar`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Collected {
    /// Its output.
    pub output: bool,
    /// Files in it: the name of each source, and the paths.
    pub files: BTreeMap<String, String>,
}

/// A stream of segments, and how many bytes of it there are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CollectedStream {
    pub container: String,
    /// [`OUTPUT`], or the name of a source of files.
    pub source: String,
    pub bytes: u64,
}

/// The bytes and the records of a stream before a place in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Place {
    pub bytes: u64,
    pub lines: u64,
}

impl Collected {
    /// The names of its streams.
    pub fn streams(&self) -> impl Iterator<Item = &str> {
        self.output.then_some(OUTPUT).into_iter().chain(self.files.keys().map(String::as_str))
    }

    pub fn is_nothing(&self) -> bool {
        !self.output && self.files.is_empty()
    }
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentMount {
    pub volume: String,
    pub path: String,
    pub read_only: bool,
    /// What of the volume is shown: a relative path without `..`, looked up within the volume when the container starts. What
    /// is missing becomes a directory where the volume can be written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sub_path: Option<String>,
}

/// A volume, made by the agent: an empty directory on its disk unless something else is said.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentVolume {
    pub name: String,
    /// An empty directory in memory.
    pub memory: bool,
    /// The size of the memory; what more than that on the disk ends the sandbox as `Evicted`.
    pub size_limit_bytes: Option<u64>,
    /// Files in memory, which containers can read only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<Vec<FileContent>>,
    /// An image's mounted layers, topmost first, which containers can read only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<String>,
    /// What a server has, mounted by the sandbox's own kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nfs: Option<AgentNfs>,
}

/// A path of a server of NFS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentNfs {
    /// As the user calls it, and where it is.
    pub server: String,
    pub address: std::net::Ipv4Addr,
    pub path: String,
    pub read_only: bool,
}

/// New contents of a volume of files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeFiles {
    pub files: Vec<FileContent>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeUpdated {
    /// False: they were the same already.
    pub changed: bool,
}

/// The whole truth about the sandbox's containers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentState {
    pub version: u32,
    /// Grows with every change, from 1 in each sandbox.
    pub sequence: u64,
    pub containers: Vec<AgentContainerState>,
    /// Oldest first, at most 32.
    pub events: Vec<InstanceEvent>,
    /// A stop was asked for; when every container is terminated nothing more will happen.
    pub stopping: bool,
    /// When everything is ended because its time is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// Why everything was ended without being asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<Failed>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failed {
    /// `DeadlineExceeded Evicted`
    pub reason: String,
    pub message: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentContainerState {
    pub name: String,
    pub state: ContainerState,
    pub last_termination: Option<Termination>,
    pub restart_count: u32,
    /// When the process of the present run was started, to the microsecond.
    pub running_since: Option<Timestamp>,
    /// Its hook after the start and its startup probe were good; and it is ready to serve.
    #[serde(default)]
    pub started: bool,
    #[serde(default)]
    pub ready: bool,
    /// What it is made from, and its limits, now.
    #[serde(default)]
    pub image_id: String,
    #[serde(default)]
    pub image: String,
    #[serde(default)]
    pub resources: Resources,
}

/// When everything is ended because its time is over; never where nothing is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Deadline {
    pub at: Option<Timestamp>,
}

/// Query of exec and attach; `command` repeats.
pub type ExecQuery = crate::instance::ExecRequest;
