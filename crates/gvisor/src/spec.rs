//! What `runsc` is told of a container: `config.json` of the OCI runtime specification, as far as gVisor heeds it.

use std::path::{Path, PathBuf};

use joey_api::agent::AgentContainer;
use joey_kernel::identity::Identity;
use serde_json::{Value, json};

use crate::HOLDER;

/// Where the agent's program is in the sandbox's first container.
pub const INSIDE: &str = "/joey-agent";

/// How the processes of a container are seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Processes {
    /// All containers see each other's.
    Shared,
    /// Those of the container of that name and who looks at it.
    Of(String),
}

/// A place of the host that is shown at a path of the container beside its root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    pub source: PathBuf,
    pub path: String,
}

/// The program of a process, and who it is.
pub struct Who<'a> {
    pub args: &'a [String],
    pub env: &'a [String],
    pub identity: &'a Identity,
    pub terminal: bool,
}

/// The sandbox's first container: nothing but the agent, as nobody, with no capabilities.
pub fn holder(hostname: &str, root: &Path) -> Value {
    let process = json!({
        "user": { "uid": 65_534, "gid": 65_534 },
        "args": [INSIDE, "inside"],
        "env": [],
        "cwd": "/",
        "capabilities": {},
        "noNewPrivileges": true,
    });
    let annotations = json!({ "io.kubernetes.cri.container-type": "sandbox" });
    config(&process, hostname, (root, true), &[], None, &annotations)
}

/// A container of the sandbox.
pub fn container(process: &Value, hostname: &str, root: (&Path, bool), binds: &[Bind], processes: &Processes) -> Value {
    let annotations = json!({
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": HOLDER,
    });
    config(process, hostname, root, binds, Some(processes), &annotations)
}

fn config(
    process: &Value,
    hostname: &str,
    (root, read_only): (&Path, bool),
    binds: &[Bind],
    processes: Option<&Processes>,
    annotations: &Value,
) -> Value {
    let mut namespaces = vec![
        json!({ "type": "ipc" }),
        json!({ "type": "uts" }),
        json!({ "type": "mount" }),
        // The one that the caller is in, whose interfaces the sandbox takes over.
        json!({ "type": "network", "path": "/proc/self/ns/net" }),
    ];
    match processes {
        None => namespaces.push(json!({ "type": "pid" })),
        // gVisor takes a path as a name: who bears the same one is in the same namespace.
        Some(Processes::Of(name)) => namespaces.push(json!({ "type": "pid", "path": format!("/joey/{name}") })),
        // Without one it is the first container's.
        Some(Processes::Shared) => {}
    }
    let mut mounts = vec![json!({ "destination": "/proc", "type": "proc", "source": "proc" })];
    for Bind { source, path } in binds {
        mounts.push(json!({ "destination": path, "type": "bind", "source": source, "options": ["bind"] }));
    }
    json!({
        "ociVersion": "1.0.2",
        "process": process,
        "root": { "path": root, "readonly": read_only },
        "hostname": hostname,
        "mounts": mounts,
        "linux": { "namespaces": namespaces },
        "annotations": annotations,
    })
}

/// A process of a container.
pub fn process(container: &AgentContainer, who: &Who<'_>) -> Value {
    let names: Vec<_> = container.capabilities.iter().map(|name| format!("CAP_{name}")).collect();
    // What a user other than root has of them after a start of a program that has none of its own.
    let held = if who.identity.uid == 0 { names.as_slice() } else { &[] };
    let working_dir = if container.working_dir.is_empty() { "/" } else { &container.working_dir };
    json!({
        "terminal": who.terminal,
        "user": {
            "uid": who.identity.uid,
            "gid": who.identity.gid,
            "additionalGids": who.identity.groups,
            "umask": 0o022,
        },
        "args": who.args,
        "env": who.env,
        "cwd": working_dir,
        "capabilities": { "bounding": names, "effective": held, "permitted": held, "inheritable": [], "ambient": [] },
        "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 1024, "hard": 524_288 }],
        "noNewPrivileges": container.no_new_privileges,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn someone(uid: u32) -> Identity {
        Identity { uid, gid: 7, groups: vec![8], home: "/".to_owned() }
    }

    #[test]
    fn only_root_holds_capabilities_from_the_start() {
        let container = AgentContainer { capabilities: vec!["CHOWN".to_owned()], ..AgentContainer::default() };
        for (uid, held) in [(0, json!(["CAP_CHOWN"])), (33, json!([]))] {
            let identity = someone(uid);
            let who = Who { args: &[], env: &[], identity: &identity, terminal: false };
            let process = process(&container, &who);
            assert_eq!(process["capabilities"]["effective"], held);
            assert_eq!(process["capabilities"]["bounding"], json!(["CAP_CHOWN"]));
            assert_eq!(process["user"]["uid"], json!(uid));
            assert_eq!(process["cwd"], json!("/"));
        }
    }

    #[test]
    fn processes_are_shared_by_name_alone() {
        let root = (Path::new("/root"), false);
        let kind = |processes: &Processes| {
            let config = container(&json!({}), "host", root, &[], processes);
            let all = config["linux"]["namespaces"].as_array().cloned().unwrap_or_default();
            all.into_iter().find(|one| one["type"] == "pid")
        };
        assert_eq!(kind(&Processes::Shared), None);
        let own = kind(&Processes::Of("main".to_owned())).unwrap();
        assert_eq!(own["path"], json!("/joey/main"));
        assert!(holder("host", Path::new("/root"))["process"]["capabilities"].as_object().unwrap().is_empty());
    }
}
