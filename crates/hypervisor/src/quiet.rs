//! Waiting until a machine does nothing more: what it has begun with is not done by each of its copies.

use std::path::Path;
use std::time::Duration;

/// How long nothing is to be done: longer than the kernel in a machine waits between the parts of what it does by and by (its grace
/// periods, some 10 ms each).
const WINDOW: Duration = Duration::from_millis(250);
/// What part of that is nothing: one that idles, emulated, takes 1 % of a processor.
const PART: u32 = 25;

/// Resolves when the process has wanted no processor for a while, or after `limit`; false: it wanted one all the time, or that is not known.
pub async fn quiet(pid: u32, limit: Duration) -> bool {
    let quiet = async {
        let mut before = wanted(Path::new(&format!("/proc/{pid}/task")));
        loop {
            tokio::time::sleep(WINDOW).await;
            let now = wanted(Path::new(&format!("/proc/{pid}/task")));
            // What has ended meanwhile took its part of the sum with it.
            let passed = before.zip(now).and_then(|(before, now)| now.checked_sub(before));
            if passed.is_some_and(|passed| passed < WINDOW / PART) {
                return;
            }
            before = now;
        }
    };
    tokio::time::timeout(limit, quiet).await.is_ok()
}

/// How long the threads that there are have run, and waited for a processor (sched-stats.rst in the kernel's documentation); `None` where
/// that is not known, or while one of them runs or waits (proc(5), field 3 of stat): it waits for longer than is counted yet.
fn wanted(threads: &Path) -> Option<Duration> {
    let mut sum = 0;
    for thread in std::fs::read_dir(threads).ok()? {
        let thread = thread.ok()?.path();
        let stat = std::fs::read_to_string(thread.join("stat")).ok()?;
        let told = std::fs::read_to_string(thread.join("schedstat")).ok()?;
        if stat.rsplit_once(") ")?.1.starts_with('R') {
            return None;
        }
        let mut numbers = told.split_whitespace().map(str::parse::<u64>);
        sum += numbers.next()?.ok()? + numbers.next()?.ok()?;
    }
    Some(Duration::from_nanos(sum))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    struct Ends(Child);

    impl Drop for Ends {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[tokio::test]
    async fn who_works_or_waits_to_is_not_quiet() {
        let limit = Duration::from_secs(2);
        let sleeps = Ends(Command::new("sleep").arg("60").spawn().unwrap());
        assert!(quiet(sleeps.0.id(), limit).await);
        let works = || Ends(Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap());
        // One that has the least of a processor wants it all the same.
        let one = works();
        let niced = Command::new("renice").args(["-n", "19", "-p", &one.0.id().to_string()]).output().unwrap();
        assert!(niced.status.success());
        let _others: Vec<Ends> = (0..4).map(|_| works()).collect();
        assert!(!quiet(one.0.id(), limit).await);
        assert!(!quiet(u32::MAX, Duration::from_millis(600)).await, "there is no such process");
    }
}
