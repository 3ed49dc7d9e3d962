//! What is done to a container while it lives: probes, hooks, and how its end is told. Field meanings and limits are those of
//! the Kubernetes API (v1 `Probe`, `Lifecycle`); ports are numbers here, names were looked up before.

use joey_model::{ErrorKind, Fault};
use serde::{Deserialize, Serialize};

use crate::instance::Resources;

/// One thing to do to a container, or to ask of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Action {
    /// A program in the container; good when it exits 0.
    #[serde(rename_all = "camelCase")]
    Exec { command: Vec<String> },
    /// A GET; good when the answer is 200 to 399. Certificates are not checked, as under the kubelet.
    HttpGet(HttpGet),
    /// Good when the connection is taken.
    #[serde(rename_all = "camelCase")]
    TcpSocket {
        /// The instance's own address when not given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        host: Option<String>,
        port: u16,
    },
    /// `grpc.health.v1.Health/Check`; good when it answers SERVING.
    #[serde(rename_all = "camelCase")]
    Grpc {
        port: u16,
        #[serde(default)]
        service: String,
    },
    /// Waits; for hooks only.
    #[serde(rename_all = "camelCase")]
    Sleep { seconds: u32 },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpGet {
    /// The instance's own address when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    pub port: u16,
    /// Path and query, from `/` on.
    pub path: String,
    #[serde(default)]
    pub https: bool,
    /// Name and value, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<(String, String)>,
}

/// An action that is asked again and again. Seconds and counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Probe {
    pub action: Action,
    #[serde(default)]
    pub initial_delay_seconds: u32,
    #[serde(default = "one")]
    pub timeout_seconds: u32,
    #[serde(default = "ten")]
    pub period_seconds: u32,
    #[serde(default = "one")]
    pub success_threshold: u32,
    #[serde(default = "three")]
    pub failure_threshold: u32,
    /// Grace of an end that this probe brings; the instance's own when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub termination_grace_period_seconds: Option<u32>,
}

fn one() -> u32 {
    1
}

fn three() -> u32 {
    3
}

fn ten() -> u32 {
    10
}

/// A program that is run once in its time, and again when it failed: [`crate::hooks`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hook {
    /// Program and arguments, as in [`Action::Exec`].
    pub command: Vec<String>,
    /// After so long it is killed and has failed.
    #[serde(default = "minute")]
    pub timeout_seconds: u32,
}

fn minute() -> u32 {
    60
}

/// Probes and hooks of a container.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lifecycle {
    /// While it has not been good, the other probes wait; when it fails, the container is ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub startup: Option<Probe>,
    /// When it fails, the container is ended and started again by its policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub liveness: Option<Probe>,
    /// While it fails, the container is not ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness: Option<Probe>,
    /// Done in the container before its main process: while it has not been good, that does not start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_start: Option<Hook>,
    /// Done when the container has started and is ready: before it was good, the container does not count as ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_online: Option<Hook>,
    /// Done as soon as the container's process runs; when it fails, the container is ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_start: Option<Action>,
    /// Done before the container is asked to end, within its grace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_stop: Option<Action>,
    /// `SIGTERM`, `15` …; the image's when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
}

/// Where a container's last words are taken from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LastWords {
    /// File in the container; its last 4096 bytes at most are read.
    pub path: String,
    /// When the file is empty and the container failed: the end of its log, at most 2048 bytes or 80 lines.
    #[serde(default)]
    pub or_log: bool,
}

impl Default for LastWords {
    fn default() -> Self {
        Self { path: "/dev/termination-log".to_owned(), or_log: false }
    }
}

/// Exit codes after which a container is started again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RestartRule {
    pub exit_codes: Vec<i32>,
    /// It holds for every code but these.
    #[serde(default)]
    pub all_others: bool,
}

impl RestartRule {
    pub fn holds(&self, exit_code: i32) -> bool {
        self.exit_codes.contains(&exit_code) != self.all_others
    }
}

/// Amounts whose change starts the container again; the others change while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct RestartOnResize {
    pub cpu: bool,
    pub memory: bool,
}

impl RestartOnResize {
    pub fn is_never(&self) -> bool {
        *self == Self::default()
    }

    /// Whether this change starts the container again.
    pub fn holds(self, before: &Resources, now: &Resources) -> bool {
        (self.cpu && before.cpu_milli != now.cpu_milli) || (self.memory && before.memory_bytes != now.memory_bytes)
    }
}

/// What a container is to its instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Role {
    #[default]
    Main,
    /// Runs to its end before those after it start.
    Init,
    /// Started in its place among the init containers, and runs until the main ones have ended.
    Sidecar,
    /// Added to an instance that runs, to look at it; never started again, and of no weight for how the instance is.
    Debug,
}

/// What all containers together may leave on the disk, given what each may: the larger of what those that run at once may, and
/// what one that runs before them may with the sidecars before it (Kubernetes' `PodLimits`). Nothing where none has a limit.
pub fn storage_limit(of_containers: impl Iterator<Item = (Role, Option<u64>)>) -> Option<u64> {
    let more = |all: Option<u64>, bytes: Option<u64>| match (all, bytes) {
        (Some(all), Some(bytes)) => Some(all.saturating_add(bytes)),
        (all, bytes) => all.or(bytes),
    };
    let (mut together, mut sidecars, mut before) = (None, None, None);
    for (role, bytes) in of_containers {
        match role {
            Role::Init => before = before.max(more(sidecars, bytes)),
            Role::Sidecar => (together, sidecars) = (more(together, bytes), more(sidecars, bytes)),
            Role::Main => together = more(together, bytes),
            Role::Debug => {}
        }
    }
    together.max(before)
}

/// Why a container waits for what it is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Held {
    /// As its state tells it: `CreateContainerConfigError`, `InvalidImageName` …
    pub reason: String,
    pub message: String,
}

impl Held {
    pub fn fault(&self) -> Fault {
        Fault::new(ErrorKind::Retryable, &self.reason, &self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_of_all_containers() {
        let limit = |all: &[(Role, Option<u64>)]| storage_limit(all.iter().copied());
        assert_eq!(limit(&[(Role::Main, None), (Role::Sidecar, None)]), None);
        assert_eq!(limit(&[(Role::Main, Some(3)), (Role::Sidecar, Some(4)), (Role::Main, None)]), Some(7));
        assert_eq!(limit(&[(Role::Init, Some(9)), (Role::Init, Some(2)), (Role::Main, Some(3))]), Some(9));
        assert_eq!(limit(&[(Role::Sidecar, Some(3)), (Role::Init, Some(9)), (Role::Main, Some(4))]), Some(12));
        assert_eq!(limit(&[(Role::Debug, Some(1)), (Role::Init, Some(2)), (Role::Main, None)]), Some(2));
    }

    #[test]
    fn amounts_that_change_restart_where_it_is_said() {
        let of = |cpu: u64, bytes: u64| Resources {
            cpu_milli: Some(cpu),
            memory_bytes: Some(bytes),
            ..Resources::default()
        };
        let memory = RestartOnResize { cpu: false, memory: true };
        assert!(memory.holds(&of(1, 1), &of(1, 2)) && !memory.holds(&of(1, 1), &of(2, 1)));
        let cpu = RestartOnResize { cpu: true, memory: false };
        assert!(cpu.holds(&of(1, 1), &of(2, 1)) && !cpu.holds(&of(1, 1), &of(1, 2)));
        assert!(!RestartOnResize::default().holds(&of(1, 1), &of(2, 2)));
    }
}
