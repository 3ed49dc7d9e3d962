//! Memory of an idle machine that is worth more to the host: copies of files on its disks that nothing uses. The host has them too, so the
//! next reader finds them there. What is free goes back to the host by itself (free page reporting of the balloon's driver).

use std::convert::Infallible;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a machine is looked at, when it has just done something and at most, for a look is work itself; and how long after files were
/// let go of others are, the first time and at most: what is read again soon is let go of less and less often.
const WINDOW: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(640));
/// Below such a part of its processors' time a machine idles.
const IDLE_PART: u64 = 20;
/// Bytes that are worth letting go of, and a change that is worth a closer look.
const WORTH: u64 = 2 << 20;
/// How long after its begin what a machine has read counts as that of its start.
const START: Duration = Duration::from_secs(60);
/// Bytes that are let go of at a time, and how long others have the processor in between: the kernel looks for them meanwhile.
const STEP: u64 = 1 << 20;
const BREATH: Duration = Duration::from_millis(5);

/// Lets go of what the processes of this cgroup have read, whenever the machine idles.
pub async fn let_go_when_idle(cgroup: &Path) -> Infallible {
    let processors = std::thread::available_parallelism().map_or(1, |number| number.get() as u64);
    let began = Instant::now();
    let (mut window, mut pause, mut not_before) = (WINDOW.0, WINDOW.0, began);
    let (mut before, mut looked_at) = (Times::now(processors), 0);
    loop {
        tokio::time::sleep(window).await;
        if Times::now(processors).idled_since(before) {
            let changed = window == WINDOW.1 || taken(cgroup).abs_diff(looked_at) > WORTH;
            if changed && Instant::now() >= not_before {
                let files = fs::read_to_string(cgroup.join("memory.stat"));
                let files = files.map_or_else(|_| Files::default(), |stat| Files::of(&stat));
                // What a start took goes, mapped or not: what is used again is mapped again.
                let bytes = if began.elapsed() < START { files.all } else { files.all.saturating_sub(files.mapped) };
                if bytes > WORTH {
                    let_go(cgroup, bytes).await;
                    pause = (pause * 2).min(WINDOW.1);
                    not_before = Instant::now() + pause;
                }
                looked_at = taken(cgroup);
            }
            window = (window * 2).min(WINDOW.1);
        } else {
            window = WINDOW.0;
        }
        before = Times::now(processors);
    }
}

/// Bytes of memory that the processes of a cgroup have taken: a number, where to tell what for is work.
fn taken(cgroup: &Path) -> u64 {
    let taken = fs::read_to_string(cgroup.join("memory.current")).ok();
    taken.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

/// Has the kernel let go of so much, of what was not used for longest.
async fn let_go(cgroup: &Path, bytes: u64) {
    for at in (0..bytes).step_by(STEP as usize) {
        let step = STEP.min(bytes - at);
        // An error says that there was less.
        if fs::write(cgroup.join("memory.reclaim"), step.to_string()).is_err() {
            return;
        }
        tokio::time::sleep(BREATH).await;
    }
}

/// Bytes of files on disks that are in memory (Documentation/admin-guide/cgroup-v2.rst, memory.stat).
#[derive(Debug, Default, PartialEq, Eq)]
struct Files {
    all: u64,
    /// Of them, by processes.
    mapped: u64,
}

impl Files {
    fn of(stat: &str) -> Self {
        let of = |name: &str| {
            let line = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|number| number.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        // Those that lie in memory alone are no copies of anything.
        let all = of("file").saturating_sub(of("shmem"));
        Self { all, mapped: of("file_mapped").min(all) }
    }
}

/// What the processors have had and what of it they have idled, in hundredths of seconds.
#[derive(Debug, Clone, Copy, Default)]
struct Times {
    all: u64,
    idle: u64,
}

impl Times {
    /// `/proc/stat` would tell more after a walk through all interrupts that there could be: here a disk that is waited for is work.
    fn now(processors: u64) -> Self {
        fs::read_to_string("/proc/uptime").map_or_else(|_| Self::default(), |text| Self::of(&text, processors))
    }

    /// How long the machine has been up, and how long its processors have idled together (proc_uptime(5)).
    fn of(text: &str, processors: u64) -> Self {
        let mut numbers = text.split_whitespace().map(|number| number.replace('.', "").parse::<u64>().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        Self { all: next() * processors, idle: next() }
    }

    fn idled_since(self, before: Self) -> bool {
        let all = self.all.saturating_sub(before.all);
        let busy = all.saturating_sub(self.idle.saturating_sub(before.idle));
        all > 0 && busy * IDLE_PART < all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_lie_in_memory_alone_are_not_counted() {
        let stat = "anon 100\nfile 9000\nkernel 7\nshmem 1000\nfile_mapped 3000\nfile_dirty 0\n";
        assert_eq!(Files::of(stat), Files { all: 8000, mapped: 3000 });
        assert_eq!(Files::of("file 10\nshmem 4\nfile_mapped 10\n"), Files { all: 6, mapped: 6 });
        assert_eq!(Files::of(""), Files::default());
    }

    #[test]
    fn a_machine_idles_when_its_processors_do() {
        let at = |up: &str, idle: &str| Times::of(&format!("{up} {idle}\n"), 2);
        assert!(at("20.00", "39.10").idled_since(at("10.00", "20.00")));
        assert!(!at("20.00", "39.00").idled_since(at("10.00", "20.00")), "a twentieth");
        assert!(!at("10.00", "20.00").idled_since(at("10.00", "20.00")), "no time has passed");
        assert!(!Times::of("nothing", 2).idled_since(at("0.01", "0.01")));
        assert!(Times::now(1).all > 0, "this kernel tells");
    }
}
