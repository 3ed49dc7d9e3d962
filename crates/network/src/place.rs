//! The run directory: what is durable about networks. It is a private tmpfs, because namespaces end with the boot too.
//!
//! ```text
//! holder             mount namespace that holds the network namespaces
//! netns              symbolic link to the folder in there with a file an ADDRESS, valid while the daemon lives
//! ready/ADDRESS      the namespace is whole: a namespace without it is half made and taken down
//! assigned/INSTANCE  symbolic link to ADDRESS, or to ADDRESS+CAPS while these caps are not in place yet: bits in and out, and
//!                    where there are such caps packets in and out
//! limited/ADDRESS    its packets have caps, which are to be lifted
//! cursor             first address never given out
//! ip_forward         the host's setting before it was changed
//! ```

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use joey_model::InstanceId;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::bandwidth::Bandwidth;
use crate::error::NetworkError;

pub(crate) struct Place {
    root: PathBuf,
}

/// What is recorded of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Assignment {
    pub(crate) address: Ipv4Addr,
    /// Caps that are to be put in place.
    pub(crate) due: Bandwidth,
}

impl std::fmt::Display for Assignment {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}", self.address)?;
        if self.due.is_unlimited() {
            return Ok(());
        }
        // A cap of 0 cannot be: it stands for none.
        write!(formatter, "+{}+{}", self.due.ingress.unwrap_or(0), self.due.egress.unwrap_or(0))?;
        match self.due.has_packets() {
            true => {
                write!(formatter, "+{}+{}", self.due.ingress_packets.unwrap_or(0), self.due.egress_packets.unwrap_or(0))
            }
            false => Ok(()),
        }
    }
}

impl Assignment {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('+');
        let address = parts.next()?.parse().ok()?;
        let mut cap = || parts.next().and_then(|part| part.parse().ok()).filter(|&rate| rate > 0);
        let due = Bandwidth { ingress: cap(), egress: cap(), ingress_packets: cap(), egress_packets: cap() };
        Some(Self { address, due })
    }
}

impl Place {
    pub(crate) fn open(root: &Path) -> Result<Self, NetworkError> {
        std::fs::create_dir_all(root).map_err(NetworkError::io("create", root.display()))?;
        if !is_mount_point(root) {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("joey"), root, Some("tmpfs"), flags, Some("mode=0700,size=64m"))
                .map_err(NetworkError::errno("mount", root.display()))?;
        }
        mount(None::<&str>, root, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)
            .map_err(NetworkError::errno("make private", root.display()))?;
        for folder in ["ready", "assigned", "limited"] {
            let path = root.join(folder);
            std::fs::create_dir_all(&path).map_err(NetworkError::io("create", path.display()))?;
        }
        Ok(Self { root: root.to_owned() })
    }

    pub(crate) fn holder(&self) -> PathBuf {
        self.root.join("holder")
    }

    pub(crate) fn namespaces_link(&self) -> PathBuf {
        self.root.join("netns")
    }

    pub(crate) fn netns(&self, address: Ipv4Addr) -> PathBuf {
        self.root.join("netns").join(address.to_string())
    }

    fn assigned_path(&self, id: &InstanceId) -> PathBuf {
        self.root.join("assigned").join(id.as_str())
    }

    pub(crate) fn set_ready(&self, address: Ipv4Addr) -> Result<(), NetworkError> {
        let path = self.root.join("ready").join(address.to_string());
        std::fs::write(&path, "").map_err(NetworkError::io("create", path.display()))
    }

    pub(crate) fn clear_ready(&self, address: Ipv4Addr) -> Result<(), NetworkError> {
        remove(&self.root.join("ready").join(address.to_string()))
    }

    pub(crate) fn set_limited(&self, address: Ipv4Addr) -> Result<(), NetworkError> {
        let path = self.root.join("limited").join(address.to_string());
        std::fs::write(&path, "").map_err(NetworkError::io("create", path.display()))
    }

    pub(crate) fn clear_limited(&self, address: Ipv4Addr) -> Result<(), NetworkError> {
        remove(&self.root.join("limited").join(address.to_string()))
    }

    pub(crate) fn is_limited(&self, address: Ipv4Addr) -> bool {
        self.root.join("limited").join(address.to_string()).exists()
    }

    pub(crate) fn is_ready(&self, address: Ipv4Addr) -> bool {
        self.root.join("ready").join(address.to_string()).exists()
    }

    /// Records an assignment; one that is there is replaced, and a reader finds either.
    pub(crate) fn assign(&self, id: &InstanceId, assignment: Assignment) -> Result<(), NetworkError> {
        let path = self.assigned_path(id);
        // Not a valid id, so that it is never read as one.
        let new = self.root.join("assigned").join(format!("{id}.new"));
        remove(&new)?;
        std::os::unix::fs::symlink(assignment.to_string(), &new)
            .and_then(|()| std::fs::rename(&new, &path))
            .map_err(NetworkError::io("create", path.display()))
    }

    pub(crate) fn unassign(&self, id: &InstanceId) -> Result<(), NetworkError> {
        remove(&self.assigned_path(id))
    }

    /// Addresses of every namespace, half made or whole.
    pub(crate) fn namespaces(&self) -> Vec<Ipv4Addr> {
        names(&self.root.join("netns")).iter().filter_map(|name| name.parse().ok()).collect()
    }

    pub(crate) fn assignments(&self) -> Vec<(InstanceId, Assignment)> {
        names(&self.root.join("assigned"))
            .iter()
            .filter_map(|name| {
                let id = InstanceId::parse(name).ok()?;
                let target = std::fs::read_link(self.assigned_path(&id)).ok()?;
                Some((id, Assignment::parse(target.to_str()?)?))
            })
            .collect()
    }

    pub(crate) fn cursor(&self) -> Option<Ipv4Addr> {
        std::fs::read_to_string(self.root.join("cursor")).ok()?.trim().parse().ok()
    }

    pub(crate) fn set_cursor(&self, cursor: Ipv4Addr) -> Result<(), NetworkError> {
        let path = self.root.join("cursor");
        std::fs::write(&path, cursor.to_string()).map_err(NetworkError::io("write", path.display()))
    }

    /// Remembers the host's forwarding switch before it is changed for the first time.
    pub(crate) fn remember_forwarding(&self, value: &str) -> Result<(), NetworkError> {
        let path = self.root.join("ip_forward");
        if path.exists() {
            return Ok(());
        }
        std::fs::write(&path, value).map_err(NetworkError::io("write", path.display()))
    }

    pub(crate) fn forwarding_before(&self) -> Option<String> {
        std::fs::read_to_string(self.root.join("ip_forward")).ok()
    }

    /// Removes the directory with everything in it.
    pub(crate) fn remove(&self) -> Result<(), NetworkError> {
        while is_mount_point(&self.root) {
            umount2(&self.root, MntFlags::MNT_DETACH).map_err(NetworkError::errno("unmount", self.root.display()))?;
        }
        match std::fs::remove_dir(&self.root) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(NetworkError::io("remove", self.root.display())(error))
            }
            _ => Ok(()),
        }
    }
}

fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn remove(path: &Path) -> Result<(), NetworkError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(NetworkError::io("remove", path.display())(error))
        }
        _ => Ok(()),
    }
}

fn is_mount_point(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| std::fs::metadata(path).map(|meta| meta.dev()).ok();
    path.parent().is_some_and(|parent| device(path) != device(parent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assignments_as_text() {
        let address = Ipv4Addr::new(10, 9, 0, 2);
        for (due, text) in [
            (Bandwidth::default(), "10.9.0.2"),
            (Bandwidth { egress: Some(7), ..Bandwidth::default() }, "10.9.0.2+0+7"),
            (Bandwidth { ingress: Some(5), egress: Some(7), ..Bandwidth::default() }, "10.9.0.2+5+7"),
            (Bandwidth { ingress: Some(5), egress_packets: Some(9), ..Bandwidth::default() }, "10.9.0.2+5+0+0+9"),
        ] {
            let assignment = Assignment { address, due };
            assert_eq!(assignment.to_string(), text);
            assert_eq!(Assignment::parse(text), Some(assignment));
        }
        assert_eq!(Assignment::parse("nonsense"), None);
    }
}
