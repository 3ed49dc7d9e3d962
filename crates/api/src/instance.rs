//! Instances on the wire: a group of containers that share a sandbox, an address and a fate.

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::image::RegistryCredential;
use crate::lifecycle::{Held, LastWords, Lifecycle, RestartOnResize, RestartRule, Role};
use crate::logs::Logs;
pub use crate::sizes::Limits;

/// What a user asks for. Immutable after creation but for labels, annotations and the contents of volumes of files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct InstanceSpec {
    /// A DNS subdomain, unique among living instances. The virtual node uses `POD.NAMESPACE`.
    pub name: String,
    /// Calls with the same token are the same call: the second returns the instance of the first. The Pod's UID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_token: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Sandbox class; `runc` when not given.
    #[serde(default = "default_class")]
    pub class: String,
    /// Host name inside; the first label of `name` when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// What follows the host name in its full name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Programs that ask for the host name are told the full one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub full_hostname: bool,
    /// The containers see each other's processes and may signal them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub share_processes: bool,
    /// Kernel settings of the instance's own namespaces, by their names with dots: [`crate::validate::SYSCTLS`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sysctls: BTreeMap<String, String>,
    /// Limits on all containers together.
    #[serde(default)]
    pub limits: Limits,
    /// Sizes by name or as `CPU-MEMORY`: the first that the host knows and has takes the place of what `limits` does not say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub use_specs: Vec<String>,
    /// In the order of their start: those that prepare and accompany come before the main ones.
    pub containers: Vec<ContainerSpec>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
    /// The group that owns what is in the volumes; containers have it by `Security::supplemental_groups`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs_group: Option<u32>,
    #[serde(default)]
    pub restart_policy: WireRestartPolicy,
    /// Seconds between SIGTERM and SIGKILL.
    #[serde(default = "default_grace")]
    pub termination_grace_period_seconds: u32,
    /// Seconds after its creation when everything is ended and the instance has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_deadline_seconds: Option<u64>,
    /// Ports that debuggers connect to: while one is connected, a failing liveness probe does not count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub debug_ports: Vec<u16>,
    /// Cores of processes that crash are written there: [`crate::diagnosis::CoreSettings`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub core_pattern: Option<String>,
    /// Where it takes the place of one that is gone: with what its containers' restart counts begin.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub restarts_before: BTreeMap<String, u32>,
    /// What is collected of its logs, and for which sink.
    #[serde(default)]
    pub logs: Logs,
    #[serde(default)]
    pub network: NetworkSpec,
    /// Used for pulling this instance's images; never returned by a read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub credentials: Vec<RegistryCredential>,
}

impl InstanceSpec {
    /// An instance of these containers, as Kubernetes would default it.
    pub fn new(name: &str, containers: Vec<ContainerSpec>) -> Self {
        Self {
            name: name.to_owned(),
            client_token: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            class: default_class(),
            hostname: None,
            domain: None,
            full_hostname: false,
            share_processes: false,
            sysctls: BTreeMap::new(),
            limits: Limits::default(),
            use_specs: Vec::new(),
            containers,
            volumes: Vec::new(),
            fs_group: None,
            restart_policy: WireRestartPolicy::default(),
            termination_grace_period_seconds: default_grace(),
            active_deadline_seconds: None,
            debug_ports: Vec::new(),
            core_pattern: None,
            restarts_before: BTreeMap::new(),
            logs: Logs::default(),
            network: NetworkSpec::default(),
            credentials: Vec::new(),
        }
    }
}

fn default_class() -> String {
    "runc".to_owned()
}

fn default_grace() -> u32 {
    30
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum WireRestartPolicy {
    #[default]
    Always,
    OnFailure,
    Never,
}

impl From<WireRestartPolicy> for joey_model::RestartPolicy {
    fn from(policy: WireRestartPolicy) -> Self {
        match policy {
            WireRestartPolicy::Always => Self::Always,
            WireRestartPolicy::OnFailure => Self::OnFailure,
            WireRestartPolicy::Never => Self::Never,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ContainerSpec {
    /// A DNS label, unique in the instance.
    pub name: String,
    #[serde(default)]
    pub role: Role,
    /// The container whose processes a [`Role::Debug`] container sees and belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    pub image: String,
    #[serde(default)]
    pub pull_policy: PullPolicy,
    /// Replaces the image's entrypoint.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Replaces the image's arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// In order; later values may refer to earlier ones as `$(NAME)`, expanded on the host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<EnvVar>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    #[serde(default)]
    pub stdin: bool,
    /// The input is closed for good when the first caller who attached to it goes away.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stdin_once: bool,
    #[serde(default)]
    pub tty: bool,
    #[serde(default)]
    pub resources: Resources,
    #[serde(default, skip_serializing_if = "RestartOnResize::is_never")]
    pub restart_on_resize: RestartOnResize,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<Mount>,
    #[serde(default)]
    pub security: Security,
    /// The instance's own when not given; a sidecar's is `Always`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_policy: Option<WireRestartPolicy>,
    /// Ends after which it is started again whatever the policy says; the first that matches counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub restart_rules: Vec<RestartRule>,
    #[serde(default)]
    pub lifecycle: Lifecycle,
    #[serde(default)]
    pub last_words: LastWords,
    /// Ports the container says it serves; information only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
    /// Why it is not to be started yet: the whole of it comes later, as a change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<Held>,
}

impl ContainerSpec {
    /// A container that runs what its image says.
    pub fn new(name: &str, image: &str) -> Self {
        Self { name: name.to_owned(), image: image.to_owned(), ..Self::default() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum PullPolicy {
    Always,
    #[default]
    IfNotPresent,
    Never,
}

/// A variable; exactly one of `value` and `address` is given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EnvVar {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// The instance's own address, known once it has one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub address: bool,
}

/// Limits, enforced; nothing given means no limit of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Resources {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_milli: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids: Option<u64>,
    /// Bytes of its writable layer and its logs; more ends the instance as `Evicted`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ephemeral_storage_bytes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mount {
    pub volume: String,
    /// Absolute path inside the container.
    pub path: String,
    #[serde(default)]
    pub read_only: bool,
    /// A part of the volume: a relative path without `..`, looked up once, so that new contents of files are not seen there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sub_path: Option<String>,
    /// As `sub_path`, with `$(NAME)` of the container's variables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sub_path_expr: Option<String>,
}

/// Who a container's process is and what it may do. Nothing given: the image's user, the default capabilities.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Security {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub supplemental_groups: Vec<u32>,
    /// Groups that the image gives its user do not count.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub strict_groups: bool,
    #[serde(default)]
    pub run_as_non_root: bool,
    #[serde(default)]
    pub read_only_root: bool,
    #[serde(default)]
    pub no_new_privileges: bool,
    /// Names without `CAP_`; only of the default set can be dropped (`ALL` drops every one).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drop_capabilities: Vec<String>,
    /// Names without `CAP_`, of the default set only: kept after a drop of `ALL`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub add_capabilities: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Volume {
    pub name: String,
    pub source: VolumeSource,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum VolumeSource {
    /// Files whose contents are given here; read-only inside (configMap, secret, projected, downwardAPI).
    Files(Vec<FileContent>),
    /// An empty directory on the host's disk or in memory that lives as long as the instance.
    #[serde(rename_all = "camelCase")]
    EmptyDir {
        #[serde(default)]
        memory: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size_limit_bytes: Option<u64>,
    },
    /// What is in an image; read-only inside, and no program in it can be started.
    #[serde(rename_all = "camelCase")]
    Image {
        reference: String,
        #[serde(default)]
        pull_policy: PullPolicy,
    },
    /// What a server of NFS, version 4, has at a path. The sandbox's own kernel mounts it, so the class must have one.
    #[serde(rename_all = "camelCase")]
    Nfs {
        server: String,
        path: String,
        #[serde(default)]
        read_only: bool,
    },
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FileContent {
    /// Relative, without `..`.
    pub path: String,
    /// Standard base64.
    pub base64: String,
    /// Permission bits, such as 0o644.
    pub mode: u32,
    /// The user who owns it; root when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<u32>,
}

impl std::fmt::Debug for FileContent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileContent").field("path", &self.path).field("mode", &self.mode).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetworkSpec {
    /// Cap on traffic into the instance, bits per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress_bits_per_second: Option<u64>,
    /// Cap on traffic out of the instance, bits per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_bits_per_second: Option<u64>,
    /// Cap on packets into the instance, a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress_packets_per_second: Option<u64>,
    /// Cap on packets out of the instance, a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_packets_per_second: Option<u64>,
    /// Name servers and search domains for /etc/resolv.conf; the host's own when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns: Option<Dns>,
    /// Further lines of /etc/hosts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_aliases: Vec<HostAlias>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Dns {
    /// What the host has comes first.
    pub host: bool,
    pub nameservers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HostAlias {
    pub address: String,
    pub hostnames: Vec<String>,
}

/// An instance as the service knows it. `spec` comes without credentials and file contents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Instance {
    pub id: String,
    pub spec: InstanceSpec,
    pub status: InstanceStatus,
    pub created_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted_at: Option<Timestamp>,
    /// Store revision of the last change; watches resume after it.
    pub revision: u64,
}

/// `Pending Starting Running Succeeded Failed Terminating`, as [`joey_model::Phase`] draws them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum WirePhase {
    #[default]
    Pending,
    Starting,
    Running,
    Succeeded,
    Failed,
    Terminating,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceStatus {
    pub phase: WirePhase,
    /// Why it is not (yet) running: `ErrImagePull`, `AddressesExhausted`, `AgentLost` …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// What its virtual machine booted, where it is in one: an id of `joey guest ls`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<String>,
    #[serde(default)]
    pub containers: Vec<ContainerStatus>,
    /// What happened on the way, oldest first, at most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<InstanceEvent>,
    /// Microseconds from the host's acceptance to the end of each phase of the last start: `images network sandbox running`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub timings: BTreeMap<String, u64>,
}

/// A step worth telling: `Scheduled Pulling Pulled Created Started Killing BackOff Failed`, as the kubelet names them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceEvent {
    pub at: Timestamp,
    pub warning: bool,
    pub reason: String,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerStatus {
    pub name: String,
    #[serde(default)]
    pub role: Role,
    pub state: ContainerState,
    /// It has started, and it is ready to serve, as its probes see it.
    #[serde(default)]
    pub started: bool,
    #[serde(default)]
    pub ready: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_termination: Option<Termination>,
    pub restart_count: u32,
    /// Image reference as given.
    pub image: String,
    /// `REGISTRY/REPOSITORY@DIGEST` of what runs, once known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub image_id: String,
    /// `joey://INSTANCE/CONTAINER/RESTARTS`, once started.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub container_id: String,
    /// The limits in force, once known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ContainerState {
    /// `ContainerCreating ErrImagePull ImagePullBackOff InvalidImageName ErrImageNeverPull CreateContainerError CrashLoopBackOff`
    Waiting {
        reason: String,
        message: String,
    },
    #[serde(rename_all = "camelCase")]
    Running {
        started_at: Timestamp,
        /// Process id on the host.
        pid: u32,
    },
    Terminated(Termination),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Termination {
    /// 128 plus the signal's number where a signal ended it.
    pub exit_code: i32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// `Completed Error OOMKilled StartError`
    pub reason: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    pub finished_at: Timestamp,
}

/// A line of a watch: `GET /v1/instances?watch=true[&revision=N]`, a JSON object a line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "type")]
pub enum WatchEvent {
    /// The instance as it now is (created or changed).
    Set { instance: Box<Instance> },
    /// It is gone, with everything it owned.
    Gone { id: String, name: String, revision: u64 },
    /// All that existed when the watch began has been sent; what follows are changes.
    Synced { revision: u64 },
}

/// Query of `GET …/containers/C/logs`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LogOptions {
    pub follow: bool,
    /// The run before the present one.
    pub previous: bool,
    /// Only the last so many lines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tail: Option<u64>,
    /// Only lines from this time on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// Each line begins with its RFC 3339 time.
    pub timestamps: bool,
    /// Stop after so many bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_bytes: Option<u64>,
}

/// Query of `POST …/containers/C/exec`; bodies are frames (`frame`).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ExecRequest {
    pub command: Vec<String>,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// What an instance uses now.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// Nanoseconds of CPU used since the start.
    pub cpu_nanoseconds: u64,
    /// Bytes of memory that cannot be taken away (usage less inactive file pages).
    pub memory_working_set_bytes: u64,
    pub received_bytes: u64,
    pub sent_bytes: u64,
    /// The same of each container that runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub containers: Vec<ContainerUsage>,
}

/// What one container uses now.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerUsage {
    pub name: String,
    pub cpu_nanoseconds: u64,
    pub memory_working_set_bytes: u64,
}

/// A host of the pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Host {
    pub name: String,
    pub ready: bool,
    pub cpu_milli: u64,
    pub memory_bytes: u64,
    /// Of the disk that instances are on; 0: not told.
    #[serde(default)]
    pub storage_bytes: u64,
    pub kernel: String,
    pub architecture: String,
    pub classes: Vec<String>,
    /// Classes that it does not have, and why.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub classes_missing: BTreeMap<String, String>,
    /// What executes virtual machines: program, whether by KVM or emulated, and their kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machines: Option<String>,
    pub instances: usize,
    /// Bits per second, CPU and memory are summed over instances.
    pub address_range: String,
    pub addresses_free: u64,
}
