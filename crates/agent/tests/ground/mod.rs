//! What tests with the real agent stand on: class `runc` with a root made of busybox, a directory and a cgroup of their own,
//! and nothing left of them at the end.

// Each test program uses what it needs of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use joey_sandbox::conformance::Bench;
use joey_sandbox::{Layer, RuncConfig, runc};

/// A bench that removes its directory and cgroup root at the end.
pub struct Ground(pub Bench);

impl Drop for Ground {
    fn drop(&mut self) {
        let name = self.0.cgroup_root.trim_start_matches('/').to_owned();
        for controller in ["memory", "cpu", "cpuacct", "pids", ""] {
            let root = Path::new("/sys/fs/cgroup").join(controller).join(&name);
            // Tests leave nothing, which they look at themselves; one that panics leaves all, and a template may be in the making.
            for _ in 0..200 {
                if end_all(&root) {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            let _ = std::fs::remove_dir(root);
        }
        let _ = std::fs::remove_dir_all(&self.0.dir);
    }
}

/// Kills what is in a cgroup tree and removes it; true when nothing is left.
fn end_all(place: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(place) else { return true };
    for child in entries.flatten().filter(|entry| entry.path().is_dir()) {
        end_all(&child.path());
    }
    let pids = std::fs::read_to_string(place.join("cgroup.procs")).unwrap_or_default();
    for pid in pids.lines().filter_map(|line| line.parse::<i32>().ok()) {
        // SAFETY: integers, and a null status; the pid is that of a process in the test's own cgroup.
        unsafe {
            libc::kill(pid, libc::SIGKILL);
            libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG);
        }
    }
    std::fs::remove_dir(place).is_ok()
}

/// What both kinds of ground are made of.
pub struct Stuff {
    pub dir: PathBuf,
    /// A root, and another folder that is to come upon it.
    pub layer: PathBuf,
    pub further: PathBuf,
    pub cgroup_root: String,
    pub agent_binary: PathBuf,
}

/// The agent as it was built with the tests: beside the folder that they are in.
pub fn agent() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let agent = own.ancestors().nth(2).unwrap().join("joey-agent");
    assert!(agent.exists(), "{} is missing: cargo build -p joey-agent, as the tests are built", agent.display());
    agent
}

pub fn stuff(name: &str) -> Option<Stuff> {
    // SAFETY: takes nothing and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let Some(busybox) = ["/bin/busybox", "/usr/bin/busybox"].iter().find(|path| Path::new(path).exists()) else {
        eprintln!("SKIPPED: needs Debian's busybox-static");
        return None;
    };
    if !root {
        eprintln!("SKIPPED: needs root");
        return None;
    }
    let unique = format!("joey-test-{name}-{}", std::process::id());
    let dir = std::env::temp_dir().join(&unique);
    let layer = dir.join("layer");
    for place in ["bin", "etc", "tmp", "secret"] {
        std::fs::create_dir_all(layer.join(place)).unwrap();
    }
    std::fs::copy(busybox, layer.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "sleep", "cat", "ls", "mount", "id", "hostname", "grep", "mknod", "seq", "stty", "ps", "dd", "chmod",
        "touch", "readlink", "ln", "stat", "rm", "mkdir", "cmp", "tty", "nc", "uname", "md5sum", "date", "tr", "sync",
        "sort", "uniq",
    ] {
        std::os::unix::fs::symlink("busybox", layer.join("bin").join(applet)).unwrap();
    }
    std::fs::write(layer.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/var/www:/bin/sh\n").unwrap();
    std::fs::write(layer.join("bin/garbage"), [0u8; 64]).unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(layer.join("bin/garbage"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let cgroup_root = format!("/{unique}");
    let agent_binary = agent();
    let further = dir.join("further");
    std::fs::create_dir_all(&further).unwrap();
    std::fs::write(further.join("further"), "further\n").unwrap();
    Some(Stuff { dir, layer, further, cgroup_root, agent_binary })
}

pub fn ground(name: &str) -> Option<Ground> {
    let Stuff { dir, layer, further, cgroup_root, agent_binary } = stuff(name)?;
    let class = runc(RuncConfig { agent_binary, cgroup_root: cgroup_root.clone() });
    let folder = |folder: PathBuf| vec![Layer { image: folder.clone(), path: folder }];
    Some(Ground(Bench { class, dir, layers: folder(layer), further: folder(further), cgroup_root, on_linux: true }))
}

/// A debugger as the kernel sees one: it traces a process until it is dropped.
pub struct Tracer(i32);

impl Tracer {
    pub fn attach(pid: u32) -> Self {
        let pid = i32::try_from(pid).unwrap();
        // SAFETY: integers and null pointers, as PTRACE_SEIZE takes them.
        let done = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        Self(pid)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // SAFETY: integers and null pointers; a traced process is let go when it stands still.
        unsafe {
            libc::ptrace(libc::PTRACE_INTERRUPT, self.0, 0, 0);
            libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL);
            libc::ptrace(libc::PTRACE_DETACH, self.0, 0, 0);
        }
    }
}
