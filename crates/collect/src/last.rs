//! What containers wrote into their files and an agent that was killed did not come to: found by the host, before it removes what a
//! sandbox leaves.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use joey_api::agent::{AgentConfig, AgentContainer};

use crate::files::{Files, MAX_ENTRIES};
use crate::sys;

/// Bytes taken in of one container; more than its segments hold.
const BUDGET: usize = 64 << 20;

/// Looks once into the writable layers and the directories on the disk that a sandbox without processes left in `instance`. What
/// was in memory went with the agent.
pub fn last_look(instance: &Path) -> io::Result<()> {
    if !instance.join(crate::DIRECTORY).exists() {
        return Ok(());
    }
    let config: AgentConfig = match std::fs::read(instance.join("agent.json")) {
        Ok(bytes) => serde_json::from_slice(&bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for container in config.containers.iter().filter(|container| !container.collected.files.is_empty()) {
        // One that ended took its layer with it; what it left elsewhere is looked at all the same.
        let runs = std::fs::read_dir(instance.join("upper").join(&container.name));
        let layers = runs.into_iter().flatten().flatten().map(|run| run.path().join("data"));
        for root in layers.chain([PathBuf::from("/nowhere")]) {
            look(instance, container, &root)?;
        }
    }
    Ok(())
}

fn look(instance: &Path, container: &AgentContainer, layer: &Path) -> io::Result<()> {
    let (mut budget, mut entries) = (BUDGET, MAX_ENTRIES);
    for (name, path) in &container.collected.files {
        // What is not there has nothing to be found.
        let Ok((root, prefix)) = place(instance, container, path, layer) else { continue };
        let mut files = Files::after(instance, &container.name, &[(name.clone(), path.clone())].into())?;
        for source in &mut files.sources {
            source.names.drain(..prefix.components().count() - 1);
            source.once = true;
            source.prefix.clone_from(&prefix);
        }
        files.find_within(root.as_fd(), &mut entries);
        while budget > 0 {
            match files.take(true)? {
                0 => break,
                taken => budget = budget.saturating_sub(taken),
            }
        }
        files.end_run()?;
    }
    Ok(())
}

/// The directory in which a source's files are, and where that is for the container: a volume, or else its own layer. Links that it
/// planted there lead nowhere else.
fn place(instance: &Path, container: &AgentContainer, path: &str, layer: &Path) -> io::Result<(File, PathBuf)> {
    let over = container.mounts.iter().filter(|mount| Path::new(path).starts_with(&mount.path) && mount.path != path);
    let Some(mount) = over.max_by_key(|mount| mount.path.len()) else {
        return Ok((File::open(layer)?, PathBuf::from("/")));
    };
    let volume = File::open(instance.join("volumes").join(&mount.volume))?;
    let shown = match &mount.sub_path {
        Some(path) => sys::open_in_root(volume.as_fd(), Path::new(path), libc::O_DIRECTORY)?,
        None => volume,
    };
    Ok((shown, PathBuf::from(&mount.path)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::Segments;

    #[test]
    fn what_an_agent_did_not_come_to_is_found_and_nothing_of_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        let sources = json!({"own": "/var/log/*.log", "shared": "/data/deep/*.log", "led": "/led/*.log"});
        let mount = |path: &str, sub: &str| json!({"volume": "v", "path": path, "readOnly": false, "subPath": sub});
        let container = json!({"name": "web", "image": "", "imageId": "", "layers": [], "args": [], "env": [], "workingDir": "",
            "user": "", "supplementalGroups": [], "runAsNonRoot": false, "readOnlyRoot": false, "noNewPrivileges": false,
            "capabilities": [], "stdin": false, "tty": false, "resources": {}, "stopSignal": "", "mounts":
            [mount("/data", "sub"), mount("/led", "link")], "collected": {"output": false, "files": sources}});
        let config = json!({"version": 1, "instance": "i", "hostname": "", "address": null, "containers": [container], "volumes": [],
            "restartPolicy": "Always", "terminationGracePeriodSeconds": 1, "resolvConf": "", "hosts": "", "cgroup": "",
            "logMaxBytes": 0, "logMaxFiles": 0});
        for path in ["collect", "host", "upper/web/3/data/var/log", "volumes/v/sub/deep"] {
            fs::create_dir_all(at(path)).unwrap();
        }
        fs::write(at("agent.json"), config.to_string()).unwrap();
        fs::write(at("host/secret.log"), "of the host\n").unwrap();
        std::os::unix::fs::symlink(at("host"), at("volumes/v/link")).unwrap();
        std::os::unix::fs::symlink(at("host/secret.log"), at("upper/web/3/data/var/log/out.log")).unwrap();
        fs::write(at("upper/web/3/data/var/log/a.log"), "own\nno end").unwrap();
        fs::write(at("volumes/v/sub/deep/b.log"), "shared\n").unwrap();
        last_look(dir.path()).unwrap();
        last_look(dir.path()).unwrap();
        let check = |source: &str, wanted: &[&str]| {
            let all = Segments::of(dir.path(), "web", source).all().unwrap();
            let text: String = all.iter().map(|segment| fs::read_to_string(&segment.path).unwrap()).collect();
            // Without the time and the inode.
            let seen: Vec<&str> =
                text.lines().map(|line| line.split_once(' ').unwrap().1.split_once(':').unwrap().1).collect();
            assert_eq!(seen, wanted);
        };
        check("own", &["0:/var/log/a.log F own", "4:/var/log/a.log P no end"]);
        check("shared", &["0:/data/deep/b.log F shared"]);
        check("led", &[]);
    }
}
