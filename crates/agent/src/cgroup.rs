//! Cgroups as the agent uses them: making, limiting, joining, counting. v1 hierarchies or the unified v2 one.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use joey_api::instance::Resources;

const ROOT: &str = "/sys/fs/cgroup";
const CONTROLLERS: [&str; 4] = ["memory", "cpu", "cpuacct", "pids"];
/// Those that v2 has to be told to pass on.
const PASSED: [&str; 3] = ["memory", "cpu", "pids"];

/// Length of a CPU period in microseconds, the kernel's and Kubernetes' default.
const PERIOD: u64 = 100_000;

/// A cgroup by its name below the controllers' roots.
#[derive(Debug, Clone)]
pub struct Cgroup {
    name: String,
    unified: bool,
}

impl Cgroup {
    pub fn new(name: &str) -> Self {
        let unified = Path::new(ROOT).join("cgroup.controllers").exists();
        Self { name: name.trim_matches('/').to_owned(), unified }
    }

    pub fn child(&self, name: &str) -> Self {
        Self { name: format!("{}/{name}", self.name), unified: self.unified }
    }

    fn place(&self, controller: &str) -> PathBuf {
        let root = Path::new(ROOT);
        if self.unified { root.join(&self.name) } else { root.join(controller).join(&self.name) }
    }

    fn places(&self) -> Vec<PathBuf> {
        match self.unified {
            true => vec![self.place("")],
            false => CONTROLLERS
                .iter()
                .filter(|controller| Path::new(ROOT).join(controller).is_dir())
                .map(|controller| self.place(controller))
                .collect(),
        }
    }

    /// Makes the cgroup; on v2 each of its ancestors passes the controllers on before it gets a child.
    ///
    /// The ancestors hold no processes, so that the kernel lets them: instances are made below the mount's root, which alone
    /// is free of that rule, wherever the daemon itself runs.
    pub fn make(&self) -> io::Result<()> {
        if self.unified {
            let mut at = PathBuf::from(ROOT);
            for part in Path::new(&self.name) {
                pass_on(&at)?;
                at.push(part);
                match std::fs::create_dir(&at) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                    _ => {}
                }
            }
            return Ok(());
        }
        self.places().iter().try_for_each(std::fs::create_dir_all)
    }

    /// Where a clone puts its child at once, for clone3(2)'s CLONE_INTO_CGROUP: moving a process between cgroups of v2 waits for
    /// all readers of a lock that every fork takes. Nothing on v1, where the child has to [`join`](Self::join).
    pub fn entrance(&self) -> io::Result<Option<File>> {
        self.unified.then(|| File::open(self.place(""))).transpose()
    }

    /// Moves the calling process into it.
    pub fn join(&self) -> io::Result<()> {
        // v1 moves a lone thread through `tasks` without the lock of all processes, which takes a grace period of RCU.
        let file = if self.unified { "cgroup.procs" } else { "tasks" };
        self.places().iter().try_for_each(|place| std::fs::write(place.join(file), "0"))
    }

    /// Sets the limits. Memory includes swap; a limit that the kernel does not have is skipped only for swap.
    pub fn limit(&self, limits: &Resources) -> io::Result<()> {
        let write = |controller: &str, file: &str, text: String| {
            std::fs::write(self.place(controller).join(file), text)
                .map_err(|error| io::Error::new(error.kind(), format!("cannot set {file}: {error}")))
        };
        if let Some(bytes) = limits.memory_bytes {
            match self.unified {
                true => {
                    write("memory", "memory.max", bytes.to_string())?;
                    let _ = write("memory", "memory.swap.max", "0".to_owned());
                    // The container as a whole runs out of memory, not its unlucky process: as the kubelet on v2.
                    let _ = write("memory", "memory.oom.group", "1".to_owned());
                }
                false => {
                    write("memory", "memory.limit_in_bytes", bytes.to_string())?;
                    let _ = write("memory", "memory.memsw.limit_in_bytes", bytes.to_string());
                }
            }
        }
        if let Some(milli) = limits.cpu_milli {
            self.weigh(milli)?;
            // The kernel takes no quota below a millisecond.
            let quota = (milli * PERIOD / 1000).max(1000);
            match self.unified {
                true => write("cpu", "cpu.max", format!("{quota} {PERIOD}"))?,
                false => {
                    write("cpu", "cpu.cfs_period_us", PERIOD.to_string())?;
                    write("cpu", "cpu.cfs_quota_us", quota.to_string())?;
                }
            }
        }
        if let Some(pids) = limits.pids {
            write("pids", "pids.max", pids.to_string())?;
        }
        Ok(())
    }

    /// Its share of the CPU beside its siblings' when all want more than there is: in proportion to `cpu_milli`. Without a word
    /// it is a core's, the kernel's default (1024 of v1's shares, 100 of v2's weight).
    pub fn weigh(&self, cpu_milli: u64) -> io::Result<()> {
        let (file, share) = match self.unified {
            true => ("cpu.weight", (cpu_milli / 10).clamp(1, 10_000)),
            false => ("cpu.shares", (cpu_milli.saturating_mul(1024) / 1000).clamp(2, 262_144)),
        };
        std::fs::write(self.place("cpu").join(file), share.to_string())
            .map_err(|error| io::Error::new(error.kind(), format!("cannot set {file}: {error}")))
    }

    /// How many processes in it the kernel killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let file = if self.unified { "memory.events" } else { "memory.oom_control" };
        self.field("memory", file, "oom_kill")
    }

    /// CPU used, in nanoseconds.
    pub fn cpu_nanoseconds(&self) -> u64 {
        match self.unified {
            true => self.field("", "cpu.stat", "usage_usec") * 1000,
            false => self.number("cpuacct", "cpuacct.usage"),
        }
    }

    /// Memory that cannot be taken away: usage less inactive file pages, in bytes.
    pub fn working_set(&self) -> u64 {
        let (usage, inactive) = match self.unified {
            true => ("memory.current", "inactive_file"),
            false => ("memory.usage_in_bytes", "total_inactive_file"),
        };
        self.number("memory", usage).saturating_sub(self.field("memory", "memory.stat", inactive))
    }

    fn number(&self, controller: &str, file: &str) -> u64 {
        let text = std::fs::read_to_string(self.place(controller).join(file)).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    fn field(&self, controller: &str, file: &str, name: &str) -> u64 {
        let text = std::fs::read_to_string(self.place(controller).join(file)).unwrap_or_default();
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok()).unwrap_or(0)
    }
}

/// Lets the children of a v2 cgroup have the controllers that it has itself. What is passed on already is not written again: a
/// write waits until removed cgroups below have gone for good.
fn pass_on(place: &Path) -> io::Result<()> {
    let read = |file: &str| std::fs::read_to_string(place.join(file));
    let (own, passed) = (read("cgroup.controllers")?, read("cgroup.subtree_control")?);
    let wanted = missing(&own, &passed);
    if wanted.is_empty() {
        return Ok(());
    }
    std::fs::write(place.join("cgroup.subtree_control"), &wanted).map_err(|error| {
        io::Error::new(error.kind(), format!("cannot pass {wanted} on below {}: {error}", place.display()))
    })
}

/// What has to be written to `cgroup.subtree_control`: controllers that are there and not passed on. One that the host lacks is
/// missed by the limit that needs it.
fn missing(own: &str, passed: &str) -> String {
    let has = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
    let wanted = PASSED.iter().filter(|name| has(own, name) && !has(passed, name));
    wanted.map(|name| format!("+{name}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_there_and_not_passed_on_is_asked_for() {
        assert_eq!(missing("cpuset cpu io memory hugetlb pids rdma\n", "memory pids\n"), "+cpu");
        assert_eq!(missing("cpu memory pids\n", "cpu memory pids\n"), "");
        assert_eq!(missing("cpuset memory pids\n", "\n"), "+memory +pids");
    }
}
