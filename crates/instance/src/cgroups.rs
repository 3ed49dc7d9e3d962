//! The root of all instances' cgroups: which instances have one, and its removal. What is inside is the sandbox's matter.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use joey_model::InstanceId;

const MOUNT: &str = "/sys/fs/cgroup";

/// `root` in every hierarchy that has it: the unified one alone where that is what is mounted (a folder below it is another
/// cgroup, not another hierarchy), or each of version 1.
fn places(root: &str) -> Vec<PathBuf> {
    let mut hierarchies = vec![PathBuf::from(MOUNT)];
    if !Path::new(MOUNT).join("cgroup.controllers").exists() {
        hierarchies.extend(std::fs::read_dir(MOUNT).into_iter().flatten().flatten().map(|entry| entry.path()));
    }
    let root = root.trim_start_matches('/');
    hierarchies.into_iter().map(|hierarchy| hierarchy.join(root)).filter(|place| place.is_dir()).collect()
}

/// Instances that own a cgroup below `root`.
pub(crate) fn owners(root: &str) -> BTreeSet<InstanceId> {
    let name = |path: &Path| path.file_name()?.to_str().and_then(|name| InstanceId::parse(name).ok());
    let entries = places(root).into_iter().filter_map(|place| std::fs::read_dir(place).ok()).flatten().flatten();
    entries.filter_map(|entry| name(&entry.path())).collect()
}

/// Removes the root where it is empty.
pub(crate) fn remove(root: &str) {
    for place in places(root) {
        if let Err(error) = std::fs::remove_dir(&place) {
            tracing::warn!(cgroup = %place.display(), %error, "cgroup cannot be removed");
        }
    }
}
