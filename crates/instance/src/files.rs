//! Files an instance is given: volumes with contents, and the texts of /etc/hosts and /etc/resolv.conf.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use base64::Engine as _;
use joey_api::instance::{InstanceSpec, VolumeSource};
use joey_api::validate::relative_path_is_safe;

use crate::persist::write_private;

/// Where systemd-resolved tells the real name servers, when /etc/resolv.conf names its own stub.
const UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";

/// Makes `volumes/NAME` below `dir` for every volume. What an interrupted attempt left is written again.
pub(crate) fn make_volumes(dir: &Path, spec: &InstanceSpec) -> io::Result<()> {
    let root = dir.join("volumes");
    make_dir(&root, 0o755)?;
    for volume in &spec.volumes {
        let place = root.join(&volume.name);
        match &volume.source {
            // Every user of the containers may write, as into the kubelet's.
            VolumeSource::EmptyDir { .. } => make_dir(&place, 0o777)?,
            VolumeSource::Files(files) => {
                make_dir(&place, 0o755)?;
                for file in files {
                    write_content(&place, &file.path, &file.base64, file.mode)?;
                }
            }
        }
    }
    Ok(())
}

fn write_content(root: &Path, path: &str, base64: &str, mode: u32) -> io::Result<()> {
    if !relative_path_is_safe(path) {
        return Err(io::Error::other("a file's path leaves its volume"));
    }
    let bytes = base64::engine::general_purpose::STANDARD.decode(base64).map_err(io::Error::other)?;
    let target = root.join(path);
    if let Some(parent) = Path::new(path).parent() {
        let mut place = root.to_owned();
        for part in parent.components() {
            place.push(part);
            make_dir(&place, 0o755)?;
        }
    }
    let file = write_private(&target, &bytes)?;
    file.set_permissions(fs::Permissions::from_mode(mode & 0o777))
}

/// Makes a directory with exactly this mode, whatever the umask.
fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => fs::set_permissions(path, fs::Permissions::from_mode(mode)),
    }
}

/// Text of /etc/hosts.
pub(crate) fn hosts(spec: &InstanceSpec, hostname: &str, address: Option<IpAddr>) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    if let Some(address) = address {
        text.push_str(&format!("{address}\t{hostname}\n"));
    }
    for alias in &spec.network.host_aliases {
        text.push_str(&format!("{}\t{}\n", alias.address, alias.hostnames.join("\t")));
    }
    text
}

/// Text of /etc/resolv.conf: what the specification says, else the host's own.
pub(crate) fn resolv_conf(spec: &InstanceSpec, host: &Path) -> String {
    let Some(dns) = &spec.network.dns else { return host_resolv_conf(host) };
    let mut text: String = dns.nameservers.iter().map(|server| format!("nameserver {server}\n")).collect();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

fn host_resolv_conf(host: &Path) -> String {
    let text = fs::read_to_string(host).unwrap_or_default();
    // A server on the host's loopback is nobody inside.
    match reachable(&text) {
        true => text,
        false => fs::read_to_string(UPSTREAM).unwrap_or(text),
    }
}

fn reachable(text: &str) -> bool {
    let mut servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver")).map(str::trim);
    servers.any(|server| server.parse::<IpAddr>().is_ok_and(|address| !address.is_loopback()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(change: serde_json::Value) -> InstanceSpec {
        let mut spec = json!({"name": "web", "containers": []});
        spec.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn volumes_are_written_with_their_modes_and_again() {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(json!({"volumes": [
            {"name": "v", "source": {"files": [{"path": "a/b", "base64": "aGk=", "mode": 0o440}]}},
            {"name": "e", "source": {"emptyDir": {}}}]}));
        for _ in 0..2 {
            make_volumes(dir.path(), &spec).unwrap();
        }
        let mode = |path: &str| fs::metadata(dir.path().join(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!(fs::read(dir.path().join("volumes/v/a/b")).unwrap(), b"hi");
        assert_eq!((mode("volumes/v/a/b"), mode("volumes/v/a"), mode("volumes/e")), (0o440, 0o755, 0o777));
    }

    #[test]
    fn a_path_cannot_leave_its_volume() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["../x", "/x", "a/../../x"] {
            let file = json!({"path": path, "base64": "aGk=", "mode": 0o644});
            let spec = spec(json!({"volumes": [{"name": "v", "source": {"files": [file]}}]}));
            assert!(make_volumes(dir.path(), &spec).is_err(), "{path}");
        }
        assert!(!dir.path().join("x").exists());
    }

    #[test]
    fn texts() {
        let spec = spec(
            json!({"network": {"dns": {"nameservers": ["10.0.0.1"], "searches": ["a", "b"], "options": ["ndots:5"]},
            "hostAliases": [{"address": "10.1.1.1", "hostnames": ["x", "y"]}]}}),
        );
        assert_eq!(resolv_conf(&spec, Path::new("/none")), "nameserver 10.0.0.1\nsearch a b\noptions ndots:5\n");
        let text = hosts(&spec, "web", "10.0.0.2".parse().ok());
        assert!(text.contains("10.0.0.2\tweb\n") && text.contains("10.1.1.1\tx\ty\n"));
        assert!(!reachable("nameserver 127.0.0.53\n") && reachable("nameserver 127.0.0.53\nnameserver 9.9.9.9\n"));
    }
}
