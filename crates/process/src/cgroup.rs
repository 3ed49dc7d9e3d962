//! An instance's cgroups as seen from outside: killing what is in them and removing them, on v1, v2 and hybrid hosts.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::process::Process;

const ROOT: &str = "/sys/fs/cgroup";

/// Kills every process in the cgroup and below until none is left. The caller sets the bound.
pub async fn kill_all(name: &str) -> io::Result<()> {
    let places = places(name);
    for place in &places {
        // v2 kills a whole tree at once; elsewhere the file does not exist.
        let _ = std::fs::write(place.join("cgroup.kill"), "1");
    }
    loop {
        let mut pids = BTreeSet::new();
        for place in &places {
            collect(place, &mut pids)?;
        }
        if pids.is_empty() {
            return Ok(());
        }
        let processes: Vec<Process> = pids.into_iter().filter_map(|pid| Process::open(pid).ok()).collect();
        processes.iter().for_each(Process::kill);
        for process in &processes {
            process.ended().await;
        }
        // A zombie leaves its cgroup when it is reaped, which is somebody else's to do.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// How many processes in the cgroup the kernel killed for want of memory.
pub fn oom_kills(name: &str) -> u64 {
    // Version 2 counts what is below too, and version 1 has another file.
    let files = ["memory.events", "memory.oom_control"];
    let count = |text: String| text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
    let texts = places(name).into_iter().flat_map(|place| files.map(|file| std::fs::read_to_string(place.join(file))));
    texts.flatten().filter_map(count).max().unwrap_or(0)
}

/// Removes the cgroup and everything below it from every hierarchy; a cgroup that is not there is no error.
pub async fn remove(name: &str) -> io::Result<()> {
    for place in places(name) {
        let mut tries = 0;
        while let Err(error) = remove_tree(&place) {
            // The kernel takes a moment to let go of the cgroup of a process that has just ended and signals it nowhere.
            tries += 1;
            if error.raw_os_error() != Some(libc::EBUSY) || tries > 500 {
                return Err(error);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    Ok(())
}

/// The cgroup's directory in every hierarchy that has it.
fn places(name: &str) -> Vec<PathBuf> {
    let name = name.trim_start_matches('/');
    let mut roots = vec![PathBuf::from(ROOT)];
    if let Ok(entries) = std::fs::read_dir(ROOT)
        && !Path::new(ROOT).join("cgroup.controllers").exists()
    {
        // Links such as `cpu -> cpu,cpuacct` name a hierarchy twice, which does no harm.
        roots.extend(entries.flatten().map(|entry| entry.path()));
    }
    roots.into_iter().map(|root| root.join(name)).filter(|place| place.is_dir()).collect()
}

fn collect(place: &Path, pids: &mut BTreeSet<u32>) -> io::Result<()> {
    match std::fs::read_to_string(place.join("cgroup.procs")) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)) => {}
        Err(error) => return Err(error),
    }
    children(place)?.iter().try_for_each(|child| collect(child, pids))
}

fn remove_tree(place: &Path) -> io::Result<()> {
    children(place)?.iter().try_for_each(|child| remove_tree(child))?;
    match std::fs::remove_dir(place) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

fn children(place: &Path) -> io::Result<Vec<PathBuf>> {
    match std::fs::read_dir(place) {
        Ok(entries) => Ok(entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
