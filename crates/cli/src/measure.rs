//! What processes use, as the kernel tells it in `/proc`: proportional memory and CPU time. No instance and no service here.

use std::path::Path;
use std::time::Duration;

/// Proportional memory of a process in KiB (proc(5), `smaps_rollup`): what it shares is divided by those who share it.
pub fn memory_kib(pid: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// CPU time a process has used so far, of all its threads (proc(5), fields 14 and 15 of `stat`).
pub fn cpu_time(pid: i32) -> Option<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses and may hold anything.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks: u64 = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    // SAFETY: sysconf only reads a constant of the system.
    let a_second = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).ok()?;
    Some(Duration::from_secs_f64(ticks as f64 / a_second as f64))
}

/// CPU time of a process with one thread, to the nanosecond where the kernel counts it (its sched-stats.rst, `schedstat` of a
/// process): what takes little shows up in no clock tick.
pub fn cpu_time_of_one_thread(pid: i32) -> Option<Duration> {
    let exact = || -> Option<Duration> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
        text.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
    };
    exact().or_else(|| cpu_time(pid))
}

/// Every process in a cgroup below one whose name `chosen` accepts.
pub fn all_processes(chosen: impl Fn(&str) -> bool) -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| is_inside(*pid, &chosen)).collect()
}

fn is_inside(pid: i32, chosen: impl Fn(&str) -> bool) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    text.lines().any(|line| line.split('/').skip(1).any(&chosen))
}

/// Every process that runs `program` in a cgroup below one whose name `chosen` accepts; not those that one of them has made and that
/// are on their way to be another program.
pub fn processes(program: &str, chosen: impl Fn(&str) -> bool) -> Vec<i32> {
    let runs = |pid: &i32| {
        let link = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        // A program replaced on disk since is told with " (deleted)" behind its name, as is one that was sealed in memory.
        let name = Path::file_name(&link).and_then(|name| name.to_str()).unwrap_or_default();
        let name = name.strip_suffix(" (deleted)").unwrap_or(name);
        name.strip_prefix("memfd:").unwrap_or(name) == program
    };
    let found: Vec<i32> = all_processes(chosen).into_iter().filter(runs).collect();
    let parent = |pid: &i32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        text.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse::<i32>().ok()
    };
    let begun_by_one = |pid: &&i32| parent(pid).is_none_or(|parent| found.contains(&parent));
    found.iter().filter(|pid| !begun_by_one(pid)).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_and_time() {
        let pid = std::process::id().cast_signed();
        assert!(memory_kib(pid).expect("this process is there") > 100);
        assert!(cpu_time(pid).is_some());
        assert!(cpu_time_of_one_thread(pid).is_some_and(|time| !time.is_zero()));
        assert_eq!(memory_kib(i32::MAX), None);
    }
}
