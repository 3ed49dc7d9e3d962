//! What one Joey has on the host outside of its files: mounts, network namespaces, cgroups, interfaces, routes, nft tables,
//! processes. Only its own are seen, so that several tests and a Joey of the machine's own can be there at the same time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::program::run;

/// What of one Joey is told apart from everybody else's.
#[derive(Debug, Clone)]
pub struct Belongings {
    data: PathBuf,
    range: String,
    /// Names its cgroups, its run directory and its nft table.
    name: String,
}

impl Belongings {
    /// Those of the Joey with this data directory, which is not the usual one, and this range of addresses.
    pub fn new(data: &Path, range: &str) -> Self {
        // FNV-1a of the path, folded: how a data directory names what is outside of it.
        let hash = data.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let name = format!("joey-{:08x}", (hash >> 32) ^ (hash & 0xffff_ffff));
        Self { data: data.to_owned(), range: range.to_owned(), name }
    }

    /// Everything it has on the host now; nothing after `joey down`.
    pub fn found(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        self.mounts(&mut found);
        self.cgroups(&mut found);
        self.interfaces(&mut found);
        self.rules(&mut found);
        self.namespaces(&mut found);
        self.processes(&mut found);
        found
    }

    fn run_dir(&self) -> PathBuf {
        Path::new("/run/joey").join(&self.name)
    }

    fn mounts(&self, found: &mut BTreeSet<String>) {
        for line in read("/proc/self/mountinfo").lines() {
            let point = Path::new(line.split(' ').nth(4).unwrap_or_default());
            if point.starts_with(&self.data) || point.starts_with(self.run_dir()) {
                found.insert(format!("mount {}", point.display()));
            }
        }
    }

    fn cgroups(&self, found: &mut BTreeSet<String>) {
        let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    continue;
                }
                if path.iter().any(|part| part == self.name.as_str()) {
                    found.insert(format!("cgroup {}", path.display()));
                }
                folders.push(path);
            }
        }
    }

    /// An interface's name ends with the address it was made for.
    fn interfaces(&self, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let address = name.len().checked_sub(8).and_then(|at| u32::from_str_radix(name.get(at..)?, 16).ok());
            if name.starts_with('j') && address.is_some_and(|address| self.has(Ipv4Addr::from(address))) {
                found.insert(format!("interface {name}"));
            }
        }
    }

    fn rules(&self, found: &mut BTreeSet<String>) {
        let table = self.name.replace('-', "_");
        for line in run(Command::new("nft").args(["list", "tables"])).stdout.lines() {
            if line.split(' ').any(|word| word == table) {
                found.insert(format!("nft {line}"));
            }
        }
        for line in run(Command::new("ip").args(["route", "show"])).stdout.lines() {
            let address = line.split([' ', '/']).next().and_then(|address| address.parse().ok());
            if address.is_some_and(|address| self.has(address)) {
                found.insert(format!("route {}", line.trim()));
            }
        }
    }

    fn namespaces(&self, found: &mut BTreeSet<String>) {
        if self.run_dir().exists() {
            found.insert(format!("directory {}", self.run_dir().display()));
        }
        for entry in std::fs::read_dir(self.run_dir().join("netns")).into_iter().flatten().flatten() {
            found.insert(format!("namespace {}", entry.path().display()));
        }
    }

    /// Agents, and all that runs in its cgroups.
    fn processes(&self, found: &mut BTreeSet<String>) {
        let data = self.data.display().to_string();
        for pid in processes() {
            let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            let is_agent = program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("joey-agent"));
            let here = read(format!("/proc/{pid}/cgroup")).contains(&format!("/{}/", self.name));
            if here || is_agent && read(format!("/proc/{pid}/cmdline")).contains(&data) {
                found.insert(format!("process {pid} {}", program.display()));
            }
        }
    }

    /// Running processes by instance and by the cgroup of it that they are in: `agent`, or a container's name.
    pub fn running(&self) -> BTreeMap<(String, String), Vec<u32>> {
        let mut found: BTreeMap<_, Vec<u32>> = BTreeMap::new();
        for pid in processes() {
            let text = read(format!("/proc/{pid}/cgroup"));
            let below = text.lines().find_map(|line| line.split_once(&format!("/{}/", self.name)));
            let Some((instance, rest)) = below.and_then(|(_, below)| below.split_once('/')) else { continue };
            if process_runs(pid) {
                let name = rest.rsplit('/').next().unwrap_or(rest);
                found.entry((instance.to_owned(), name.to_owned())).or_default().push(pid);
            }
        }
        found
    }

    /// The instances that have a cgroup, of whatever controller.
    pub fn with_cgroups(&self) -> BTreeSet<String> {
        let root = Path::new("/sys/fs/cgroup");
        let controllers = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
        let roots = controllers.chain([root.to_owned()]).map(|controller| controller.join(&self.name));
        let entries = roots.flat_map(|root| std::fs::read_dir(root).into_iter().flatten().flatten());
        let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        folders.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    fn has(&self, address: Ipv4Addr) -> bool {
        let (base, bits) = self.range.split_once('/').expect("a range has a length");
        let base: Ipv4Addr = base.parse().expect("a range begins with an address");
        let shift = 32 - bits.parse::<u32>().expect("a length is a number");
        u32::from(address) >> shift == u32::from(base) >> shift
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

/// Whether a process is the first one of its own namespace.
pub fn is_first(pid: u32) -> bool {
    let status = read(format!("/proc/{pid}/status"));
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    ids.split_whitespace().count() > 1 && ids.split_whitespace().last() == Some("1")
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

/// What a cgroup of an instance is held to; `None` where it is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Confines {
    pub cpu_milli: Option<u64>,
    pub memory: Option<u64>,
    pub pids: Option<u64>,
    /// Written a second, like what is read.
    pub disk_bytes: Option<u64>,
    pub disk_operations: Option<u64>,
}

impl Confines {
    /// Those of the cgroup `name` of an instance, by the files of version 1 or 2.
    pub fn of(instance: &str, name: &str) -> Self {
        let text = |controller: &str, files: [&str; 2]| {
            let place = cgroup(instance, controller, name).unwrap_or_default();
            files.iter().map(|file| read(place.join(file))).find(|text| !text.is_empty()).unwrap_or_default()
        };
        let first = |text: String| text.split_whitespace().next().and_then(|word| word.parse::<u64>().ok());
        // `MAJOR:MINOR RATE`, or `MAJOR:MINOR rbps=RATE wbps=RATE riops=RATE wiops=RATE`.
        let disk = |text: String, word: &str| {
            text.split_whitespace()
                .skip(1)
                .find_map(|found| found.strip_prefix(word).unwrap_or(found).parse::<u64>().ok())
        };
        Self {
            // Of a period of 100 ms.
            cpu_milli: first(text("cpu", ["cpu.cfs_quota_us", "cpu.max"])).map(|quota| quota / 100),
            // Version 1 says "none" by a number.
            memory: first(text("memory", ["memory.limit_in_bytes", "memory.max"])).filter(|bytes| *bytes < 1 << 50),
            pids: first(text("pids", ["pids.max", "pids.max"])),
            disk_bytes: disk(text("blkio", ["blkio.throttle.write_bps_device", "io.max"]), "wbps="),
            disk_operations: disk(text("blkio", ["blkio.throttle.write_iops_device", "io.max"]), "wiops="),
        }
    }
}

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
