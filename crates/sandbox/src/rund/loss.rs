//! Why a machine ended: found out while it is watched, and told from what that left.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use joey_hypervisor::{Ended, Vm};
use joey_model::InstanceId;
use joey_process::cgroup;
use tokio::sync::watch;

use crate::Loss;

/// Between two questions whether the monitor answers, and how long it has for that: what hangs is found out within both.
const ASKED: Duration = Duration::from_millis(800);
const PATIENCE: Duration = Duration::from_millis(1000);
/// How long one that does something may have no answer.
const LONGEST: Duration = Duration::from_secs(30);
/// What was found out, in the machine's directory.
const HUNG: &str = "hung";
const ENDED: &str = "ended";

/// Watches a machine to its end, and ends one whose monitor hangs. True when it has ended and what is known of that is kept.
pub(super) fn watch(instance: &InstanceId, vm: &Arc<dyn Vm>, dir: &Path) -> watch::Receiver<bool> {
    let (over, seen) = watch::channel(false);
    let (instance, vm, dir) = (instance.clone(), vm.clone(), dir.to_owned());
    tokio::spawn(async move {
        let hangs = hangs(&vm);
        let how = tokio::select! {
            how = vm.ended() => how,
            () = hangs => {
                tracing::warn!(%instance, "the monitor of a machine hangs and is ended");
                let _ = std::fs::write(dir.join(HUNG), "");
                vm.kill();
                vm.ended().await
            }
        };
        let word = match how {
            Some(Ended::Exited(code)) => format!("exited {code}"),
            Some(Ended::Killed(signal)) => format!("killed {signal}"),
            // Only the process that started it is told.
            None => "unknown ?".to_owned(),
        };
        // Where the directory is gone already nobody asks.
        let _ = std::fs::write(dir.join(ENDED), word);
        over.send_replace(true);
    });
    seen
}

/// Resolves when the monitor hangs: it does not answer, and does nothing else either. On a busy host one that works may have no
/// time to answer.
async fn hangs(vm: &Arc<dyn Vm>) {
    let mut silent: Option<Instant> = None;
    loop {
        tokio::time::sleep(ASKED).await;
        let before = work(vm.pid());
        if tokio::time::timeout(PATIENCE, vm.answers()).await.is_ok() {
            silent = None;
            continue;
        }
        let since = *silent.get_or_insert_with(Instant::now);
        let after = work(vm.pid());
        // One that wants a processor and gets none is not at fault.
        if (after.wanting == 0 && after == before) || since.elapsed() > LONGEST {
            return;
        }
    }
}

/// What the threads of a process are at.
#[derive(Debug, Default, PartialEq, Eq)]
struct Work {
    /// Threads that want a processor, or have one.
    wanting: usize,
    /// Ticks that they had.
    done: u64,
}

fn work(pid: u32) -> Work {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stats = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok());
    let mut all = Work::default();
    for stat in stats {
        let mut fields = stat[stat.rfind(')').unwrap_or(0)..].split_whitespace().skip(1);
        // The state, and the fields 14 and 15 of proc(5) stat: ticks in user and kernel mode.
        all.wanting += usize::from(fields.next() == Some("R"));
        all.done += fields.skip(10).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum::<u64>();
    }
    all
}

/// Why the machine of this directory ended.
pub(super) fn of(dir: &Path, vmm: &str) -> Option<Loss> {
    let lost = |reason, message: &str| Some(Loss { reason, message: message.to_owned() });
    if dir.join(HUNG).exists() {
        return lost("MachineHung", "hung: its monitor did not answer and was ended");
    }
    if cgroup::oom_kills(vmm) > 0 {
        return lost("MachineOutOfMemory", "was ended by the host's kernel: it took more memory than it may");
    }
    let how = std::fs::read_to_string(dir.join(ENDED)).unwrap_or_default();
    match how.split_once(' ') {
        Some(("exited", "0")) => lost("MachineCrashed", "ended itself: its kernel or its agent failed"),
        Some(("exited", code)) => lost("MachineCrashed", &format!("ended: its monitor failed with code {code}")),
        Some(("killed", signal)) => lost("MachineKilled", &format!("was killed by signal {signal}")),
        Some(("unknown", _)) => lost("MachineLost", "ended; the joey that started it could have told how"),
        _ => lost("MachineLost", "ended while nobody looked"),
    }
}
