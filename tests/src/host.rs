//! What the host looks like: mounts, network namespaces, cgroups, interfaces, nft tables, processes. Taken before a test and
//! after it, so that nothing stays behind.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::program::run;

/// Everything on the host that Joey makes and must take away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traces {
    found: BTreeSet<String>,
}

impl Traces {
    /// Looks at the host now.
    pub fn now() -> Self {
        let mut found = BTreeSet::new();
        mounts(&mut found);
        cgroups(&mut found);
        interfaces(&mut found);
        rules(&mut found);
        namespaces(&mut found);
        agents(&mut found);
        Self { found }
    }

    /// What is here and was not there in `before`.
    pub fn since(&self, before: &Self) -> Vec<String> {
        self.found.difference(&before.found).cloned().collect()
    }
}

fn mounts(found: &mut BTreeSet<String>) {
    for line in read("/proc/self/mountinfo").lines() {
        if let Some(point) = line.split(' ').nth(4) {
            found.insert(format!("mount {point}"));
        }
    }
}

fn cgroups(found: &mut BTreeSet<String>) {
    let mut folders = vec![std::path::PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let path = entry.path();
            if is_folder && path.to_string_lossy().contains("joey") {
                found.insert(format!("cgroup {}", path.display()));
            }
            if is_folder {
                folders.push(path);
            }
        }
    }
}

fn interfaces(found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
        found.insert(format!("interface {}", entry.file_name().to_string_lossy()));
    }
}

fn rules(found: &mut BTreeSet<String>) {
    for table in run(Command::new("nft").args(["list", "tables"])).stdout.lines() {
        found.insert(format!("nft {table}"));
    }
    for line in run(Command::new("ip").args(["route", "show"])).stdout.lines() {
        found.insert(format!("route {}", line.trim()));
    }
}

fn namespaces(found: &mut BTreeSet<String>) {
    for folder in ["/run/joey", "/run/netns"] {
        for suffix in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let names = suffix.path().join("netns");
            for entry in std::fs::read_dir(&names).into_iter().flatten().flatten() {
                found.insert(format!("namespace {}", entry.path().display()));
            }
        }
    }
}

fn agents(found: &mut BTreeSet<String>) {
    for pid in processes() {
        let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        if program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("joey-agent")) {
            found.insert(format!("process {pid} {}", program.display()));
        }
    }
}

/// The ids of all processes.
pub fn processes() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Whether a process is there and not a zombie.
pub fn process_runs(pid: u32) -> bool {
    let stat = read(format!("/proc/{pid}/stat"));
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// When a process started, in clock ticks after the machine's start: with the pid it names one process for good.
pub fn process_start(pid: u32) -> Option<u64> {
    let stat = read(format!("/proc/{pid}/stat"));
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

/// The identity of a process's namespace: `net:[4026531840]`.
pub fn namespace(pid: u32, kind: &str) -> String {
    let link = std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap_or_default();
    link.to_string_lossy().into_owned()
}

/// The cgroup `name` of an instance, of this controller.
pub fn cgroup(instance: &str, controller: &str, name: &str) -> Option<PathBuf> {
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let root = if unified { PathBuf::from("/sys/fs/cgroup") } else { Path::new("/sys/fs/cgroup").join(controller) };
    let joeys = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    joeys.map(|joey| joey.join(instance).join(name)).find(|place| place.is_dir())
}

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
