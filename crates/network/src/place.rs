//! The run directory: what is durable about networks. It is a private tmpfs, because namespaces end with the boot too.
//!
//! ```text
//! netns/ADDRESS      namespace, bind mounted
//! ready/ADDRESS      the namespace is whole: a namespace without it is half made and taken down
//! assigned/INSTANCE  symbolic link to ADDRESS
//! cursor             first address never given out
//! ip_forward         the host's setting before it was changed
//! ```

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use joey_model::InstanceId;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::NetworkError;

pub(crate) struct Place {
    root: PathBuf,
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
        for folder in ["netns", "ready", "assigned"] {
            let path = root.join(folder);
            std::fs::create_dir_all(&path).map_err(NetworkError::io("create", path.display()))?;
        }
        Ok(Self { root: root.to_owned() })
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

    pub(crate) fn is_ready(&self, address: Ipv4Addr) -> bool {
        self.root.join("ready").join(address.to_string()).exists()
    }

    pub(crate) fn assign(&self, id: &InstanceId, address: Ipv4Addr) -> Result<(), NetworkError> {
        let path = self.assigned_path(id);
        remove(&path)?;
        std::os::unix::fs::symlink(address.to_string(), &path).map_err(NetworkError::io("create", path.display()))
    }

    pub(crate) fn unassign(&self, id: &InstanceId) -> Result<(), NetworkError> {
        remove(&self.assigned_path(id))
    }

    /// Addresses of every namespace, half made or whole.
    pub(crate) fn namespaces(&self) -> Vec<Ipv4Addr> {
        names(&self.root.join("netns")).iter().filter_map(|name| name.parse().ok()).collect()
    }

    pub(crate) fn assignments(&self) -> Vec<(InstanceId, Ipv4Addr)> {
        names(&self.root.join("assigned"))
            .iter()
            .filter_map(|name| {
                let id = InstanceId::parse(name).ok()?;
                let target = std::fs::read_link(self.assigned_path(&id)).ok()?;
                Some((id, target.to_str()?.parse().ok()?))
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
