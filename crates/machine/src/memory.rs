//! Memory of an idle machine that is worth more to the host: copies of files on its disks that nothing uses. The host has them too, so the
//! next reader finds them there. What is free goes back to the host by itself (free page reporting of the balloon's driver).

use std::convert::Infallible;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a machine is looked at, the first time and at most: what is read again soon is let go of less and less often.
const WINDOW: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(640));
/// Below such a part of its processors' time a machine idles.
const IDLE_PART: u64 = 20;
/// Bytes that are worth letting go of.
const WORTH: u64 = 2 << 20;
/// How long after its begin what a machine has read counts as that of its start.
const START: Duration = Duration::from_secs(60);
/// Bytes that are let go of at a time, and how long others have the processor in between: the kernel looks for them meanwhile.
const STEP: u64 = 1 << 20;
const BREATH: Duration = Duration::from_millis(5);

/// Lets go of what the processes of this cgroup have read, whenever the machine idles.
pub async fn let_go_when_idle(cgroup: &Path) -> Infallible {
    let (began, mut window, mut before) = (Instant::now(), WINDOW.0, Times::now().unwrap_or_default());
    loop {
        tokio::time::sleep(window).await;
        let now = Times::now().unwrap_or_default();
        let files =
            fs::read_to_string(cgroup.join("memory.stat")).map_or_else(|_| Files::default(), |stat| Files::of(&stat));
        // What a start took goes, mapped or not: what is used again is mapped again.
        let bytes = if began.elapsed() < START { files.all } else { files.all.saturating_sub(files.mapped) };
        if now.idled_since(before) && bytes > WORTH {
            let_go(cgroup, bytes).await;
            window = (window * 2).min(WINDOW.1);
        }
        before = Times::now().unwrap_or_default();
    }
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

/// What the processors have spent, in ticks.
#[derive(Debug, Clone, Copy, Default)]
struct Times {
    all: u64,
    idle: u64,
}

impl Times {
    fn now() -> io::Result<Self> {
        fs::read_to_string("/proc/stat").map(|text| Self::of(&text))
    }

    /// The first line tells of all processors (proc_stat(5)).
    fn of(text: &str) -> Self {
        let numbers = text.lines().next().unwrap_or_default().split_whitespace().skip(1);
        // What guests of this machine take is part of its own, and comes after the eighth.
        let numbers: Vec<u64> = numbers.take(8).filter_map(|number| number.parse().ok()).collect();
        // The fourth and the fifth: idle, also while a disk is waited for.
        Self { all: numbers.iter().sum(), idle: numbers.iter().skip(3).take(2).sum() }
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
        let at = |busy: u64, idle: u64| Times::of(&format!("cpu  {busy} 0 0 {idle} 0 0 0 0 50 50\ncpu0 1 2 3\n"));
        assert!(at(104, 1996).idled_since(at(100, 1000)));
        assert!(!at(200, 1900).idled_since(at(100, 1000)));
        assert!(!at(100, 1000).idled_since(at(100, 1000)), "no time has passed");
        assert!(!Times::of("nothing").idled_since(at(1, 1)));
    }
}
