//! Cgroups as the agent uses them: making, limiting, joining, counting. v1 hierarchies or the unified v2 one.
//!
//! ```text
//! /joey/i-…               the instance
//! ├─ agent                this process: limits on the containers never slow it
//! ├─ CONTAINER            where the instance has no limits as a whole
//! └─ containers           where it has: they are this cgroup's
//!    └─ CONTAINER
//! ```

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use joey_api::agent::AgentConfig;
use joey_api::instance::{Limits, Resources};

use crate::sys;

const ROOT: &str = "/sys/fs/cgroup";
const CONTROLLERS: [&str; 4] = ["memory", "cpu", "cpuacct", "pids"];
/// Those that v2 has to be told to pass on.
const PASSED: [&str; 4] = ["memory", "cpu", "pids", "io"];
/// How long killed processes may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Length of a CPU period in microseconds, the kernel's and Kubernetes' default.
const PERIOD: u64 = 100_000;
/// What a container that names no limit counts for beside those that do, in thousandths of a core: they get what they may have.
pub const UNSAID: u64 = 100;

/// A cgroup by its name below the controllers' roots.
#[derive(Debug, Clone)]
pub struct Cgroup {
    name: String,
    unified: bool,
    /// The cgroup of v1 that limits the disk for it. That controller does not add up what children do, so all share one.
    disk: Option<PathBuf>,
}

impl Cgroup {
    pub fn new(name: &str) -> Self {
        let unified = Path::new(ROOT).join("cgroup.controllers").exists();
        Self { name: name.trim_matches('/').to_owned(), unified, disk: None }
    }

    /// The one above all containers of an instance.
    pub fn of_containers(config: &AgentConfig) -> Self {
        let instance = Self::new(&config.cgroup);
        if config.limits == Limits::default() {
            return instance;
        }
        let all = instance.child("containers");
        let disk = (config.limits.has_disk() && !all.unified).then(|| Path::new(ROOT).join("blkio").join(&all.name));
        Self { disk, ..all }
    }

    pub fn child(&self, name: &str) -> Self {
        Self { name: format!("{}/{name}", self.name), unified: self.unified, disk: self.disk.clone() }
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
        self.places().iter().chain(&self.disk).try_for_each(std::fs::create_dir_all)
    }

    /// Takes it away, when nothing is in it any more.
    pub fn remove(&self) -> io::Result<()> {
        self.places().iter().try_for_each(|place| match std::fs::remove_dir(place) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        })
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
        self.places().iter().chain(&self.disk).try_for_each(|place| std::fs::write(place.join(file), "0"))
    }

    /// Sets a container's limits.
    pub fn limit(&self, limits: &Resources) -> io::Result<()> {
        self.bound(limits)?;
        if limits.cpu_milli.is_none() {
            // A host without the controller runs what asks for no limit.
            let _ = self.weigh(UNSAID);
        }
        if limits.pids.is_none() {
            // What was ended may have been kept from forking: `end_all`.
            let _ = std::fs::write(self.place("pids").join("pids.max"), "max");
        }
        if self.unified && limits.memory_bytes.is_some() {
            // The container as a whole runs out of memory, not its unlucky process: as the kubelet on v2.
            let _ = std::fs::write(self.place("").join("memory.oom.group"), "1");
        }
        Ok(())
    }

    /// Makes it and sets the limits of all containers together; `dir` lies on the disk that is limited.
    pub fn limit_all(&self, limits: &Limits, dir: &Path) -> io::Result<()> {
        self.make()?;
        self.bound(&limits.resources())?;
        if !limits.has_disk() {
            return Ok(());
        }
        let disk = disk_of(dir)?;
        let (bytes, operations) = (limits.disk_bytes_per_second, limits.disk_operations_per_second);
        let written = |file: PathBuf, text: String| {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            std::fs::write(file, text)
                .map_err(|error| io::Error::new(error.kind(), format!("cannot set {name} of disk {disk}: {error}")))
        };
        match &self.disk {
            None => {
                let word = |name: &str, rate: Option<u64>| rate.map(|rate| format!(" r{name}={rate} w{name}={rate}"));
                let words = [word("bps", bytes), word("iops", operations)].into_iter().flatten().collect::<String>();
                written(self.place("").join("io.max"), format!("{disk}{words}"))
            }
            Some(place) => {
                for (kind, rate) in [("bps", bytes), ("iops", operations)] {
                    let Some(rate) = rate else { continue };
                    for way in ["read", "write"] {
                        written(place.join(format!("blkio.throttle.{way}_{kind}_device")), format!("{disk} {rate}"))?;
                    }
                }
                Ok(())
            }
        }
    }

    /// Sets limits, also where others were set before. Memory includes swap; a limit that the kernel does not have is skipped
    /// only for swap.
    fn bound(&self, limits: &Resources) -> io::Result<()> {
        let write = |controller: &str, file: &str, text: String| {
            std::fs::write(self.place(controller).join(file), text)
                .map_err(|error| io::Error::new(error.kind(), format!("cannot set {file}: {error}")))
        };
        if let Some(bytes) = limits.memory_bytes {
            match self.unified {
                true => {
                    write("memory", "memory.max", bytes.to_string())?;
                    let _ = write("memory", "memory.swap.max", "0".to_owned());
                }
                false => {
                    // Never may the sum with swap be below the other: it goes first on the way up, last on the way down.
                    let _ = write("memory", "memory.memsw.limit_in_bytes", bytes.to_string());
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

    /// Its share of the CPU beside its siblings' when all want more than there is: in proportion to `cpu_milli`. A core is the
    /// kernel's default (1024 of v1's shares, 100 of v2's weight).
    pub fn weigh(&self, cpu_milli: u64) -> io::Result<()> {
        let (file, share) = match self.unified {
            true => ("cpu.weight", (cpu_milli / 10).clamp(1, 10_000)),
            false => ("cpu.shares", (cpu_milli.saturating_mul(1024) / 1000).clamp(2, 262_144)),
        };
        std::fs::write(self.place("cpu").join(file), share.to_string())
            .map_err(|error| io::Error::new(error.kind(), format!("cannot set {file}: {error}")))
    }

    /// Brings the limits of a living container to these, also where there were none or shall be none any more.
    pub fn resize(&self, limits: &Resources) -> io::Result<()> {
        if let (Some(bytes), true) = (limits.memory_bytes, self.unified) {
            make_room(&self.place("memory"), bytes)?;
        }
        self.lift(limits);
        self.limit(limits)
    }

    /// Takes away the limits that these do not name.
    pub fn lift(&self, limits: &Resources) {
        let set = |controller: &str, file: &str, text: &str| {
            // What was never made has no limit.
            let _ = std::fs::write(self.place(controller).join(file), text);
        };
        match (limits.memory_bytes, self.unified) {
            (None, true) => set("memory", "memory.max", "max"),
            (None, false) => {
                set("memory", "memory.memsw.limit_in_bytes", "-1");
                set("memory", "memory.limit_in_bytes", "-1");
            }
            (Some(_), _) => {}
        }
        match (limits.cpu_milli, self.unified) {
            (None, true) => set("cpu", "cpu.max", &format!("max {PERIOD}")),
            (None, false) => set("cpu", "cpu.cfs_quota_us", "-1"),
            (Some(_), _) => {}
        }
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

    /// Ids of the processes in it, as this process sees them.
    pub fn processes(&self) -> Vec<u32> {
        let text = std::fs::read_to_string(self.place("pids").join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Kills what is in it until nothing is: for containers that no namespace of processes ends with. Nothing in it forks
    /// meanwhile, so that no chain of processes is faster.
    pub async fn end_all(&self) {
        let most = self.place("pids").join("pids.max");
        let before = std::fs::read_to_string(&most);
        let _ = std::fs::write(&most, "0");
        if self.unified {
            // All at once, where the kernel knows it.
            let _ = std::fs::write(self.place("").join("cgroup.kill"), "1");
        }
        let ended = tokio::time::timeout(END_LIMIT, async {
            loop {
                let found: Vec<_> = self.processes().into_iter().filter_map(sys::Target::open).collect();
                if found.is_empty() {
                    return;
                }
                // Opened first and seen here afterwards: a number that came to mean another process is not killed.
                let now = self.processes();
                found.iter().filter(|target| now.contains(&target.pid())).for_each(sys::Target::kill);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        // What would not end may not fork on; the next run sets the limit again.
        if let (Ok(()), Ok(before)) = (ended, before) {
            let _ = std::fs::write(most, before.trim());
        }
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

/// Whether what is in use in a cgroup of v2 leaves room for a limit of memory. A limit below it would end processes there; v1
/// gives back what it can and refuses then, and so does this.
fn make_room(place: &Path, bytes: u64) -> io::Result<()> {
    let excess = || {
        let text = std::fs::read_to_string(place.join("memory.current")).unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or(0).saturating_sub(bytes)
    };
    let asked = excess();
    if asked > 0 {
        let _ = std::fs::write(place.join("memory.reclaim"), asked.to_string());
    }
    match excess() {
        0 => Ok(()),
        _ => {
            let busy = io::Error::from_raw_os_error(libc::EBUSY);
            Err(io::Error::new(busy.kind(), format!("cannot set memory.max: {busy}")))
        }
    }
}

/// `MAJOR:MINOR` of the whole disk that a directory lies on, as the controllers want it.
fn disk_of(dir: &Path) -> io::Result<String> {
    use std::os::unix::fs::MetadataExt;
    let number = |device: u64| format!("{}:{}", libc::major(device), libc::minor(device));
    let mut device = std::fs::metadata(dir)?.dev();
    if libc::major(device) == 0 {
        // Some file systems have a number of their own: the disk is the one they were mounted from.
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let wanted = number(device);
        let source = mounts.lines().filter(|line| line.split(' ').nth(2) == Some(&wanted)).find_map(|line| {
            std::fs::metadata(line.split(" - ").nth(1)?.split(' ').nth(1)?).ok().map(|meta| meta.rdev())
        });
        device = source.filter(|device| *device != 0).ok_or_else(|| {
            io::Error::other("what is written lies on no disk of this host, so no limit of the disk can hold")
        })?;
    }
    let place = PathBuf::from(format!("/sys/dev/block/{}", number(device)));
    match place.join("partition").exists() {
        true => Ok(std::fs::read_to_string(place.join("../dev"))?.trim().to_owned()),
        false => Ok(number(device)),
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
        assert_eq!(missing("cpuset cpu io memory hugetlb pids rdma\n", "memory pids\n"), "+cpu +io");
        assert_eq!(missing("cpu memory pids\n", "cpu memory pids\n"), "");
        assert!(disk_of(Path::new("/proc")).is_err());
        assert_eq!(missing("cpuset memory pids\n", "\n"), "+memory +pids");
    }

    #[test]
    fn a_limit_of_memory_below_what_is_in_use_is_refused() {
        let place = std::env::temp_dir().join(format!("joey-agent-room-{}", std::process::id()));
        std::fs::create_dir_all(&place).unwrap();
        std::fs::write(place.join("memory.current"), "5000000\n").unwrap();
        make_room(&place, 5_000_000).unwrap();
        assert!(!place.join("memory.reclaim").exists(), "nothing is taken where there is room");
        let refused = make_room(&place, 4_000_000).unwrap_err();
        assert!(refused.to_string().starts_with("cannot set memory.max: Device or resource busy"), "{refused}");
        assert_eq!(std::fs::read_to_string(place.join("memory.reclaim")).unwrap(), "1000000");
        std::fs::remove_dir_all(place).unwrap();
    }
}
