//! Templates and the machines that are kept for instances to come.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use joey_sandbox::AgentClient;
use joey_sandbox::conformance::{exec, running};

use crate::ground::{self, Ground};
use crate::measure::translated;
use crate::{TEMPLATE, TURN, cgroup_of, class, is_a, sleeping, warm};

/// How long it may take until a template is there whose machine has rested.
const RESTED: Duration = Duration::from_secs(150);

/// The monitors of machines that are ready, have begun, or are being made for that.
pub fn ready(ground: &Ground) -> Vec<i32> {
    let warm = std::fs::read_dir(ground.0.dir.join("machines/warm")).unwrap().flatten();
    warm.filter_map(|entry| std::fs::read_to_string(entry.path().join("vmm.pid")).ok()?.split(' ').next()?.parse().ok())
        .collect()
}

#[tokio::test]
async fn one_that_is_ready_is_taken() {
    let _turn = TURN.lock().await;
    let Some(ground) = crate::ground("ready").await else { return };
    let bench = &ground.0;
    let end = Instant::now() + TEMPLATE;
    let (request, sandbox) = loop {
        let mut request = bench.request(1, "sleep 1000");
        request.disk_bytes = Some(100 << 20);
        request.config.containers[0].resources.cpu_milli = Some(500);
        let sandbox = bench.create(&request).await;
        if is_a(&*sandbox, &["give"]) && !is_a(&*sandbox, &["copy"]) {
            break (request, sandbox);
        }
        bench.destroy(&request).await;
        assert!(Instant::now() < end, "none was ever ready");
    };
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    // What it was made without, it has got: disk and limits; and what it rehearsed is gone.
    let (disk, _) = exec(&agent, &["stat", "-f", "-c", "%b %S", "/"]).await;
    let bytes: u64 = disk.split_whitespace().map(|number| number.parse::<u64>().unwrap()).product();
    assert!((100 << 20..=130 << 20).contains(&bytes), "{disk}");
    let (seen, _) = exec(&agent, &["sh", "-c", "ls /; hostname; cat /proc/mounts"]).await;
    assert!(!seen.contains("rehears"), "{seen}");
    let pid = sandbox.pid().unwrap();
    let own = cgroup_of(pid);
    assert!(own.contains("/warm-"), "{own}");
    let place = own.lines().find_map(|line| line.split(':').nth(2).filter(|name| name.contains("/warm-"))).unwrap();
    let quota = [format!("/sys/fs/cgroup/cpu{place}/cpu.cfs_quota_us"), format!("/sys/fs/cgroup{place}/cpu.max")];
    let quota = quota.iter().find_map(|path| std::fs::read_to_string(path).ok()).expect("a limit of the processor");
    assert!(quota.starts_with("50000"), "{quota}");
    // Another class on the same directory, as after a kill of the process before: what is an instance's stays, the others end.
    let others = ready(&ground);
    let _again = class(&ground.0.dir, &bench.cgroup_root, ground::agent()).await.expect("what machines need is there");
    for other in others {
        let command = std::fs::read(format!("/proc/{other}/cmdline")).unwrap_or_default();
        assert!(!command.starts_with(b"qemu warm-"), "machine {other} is left");
    }
    running(&agent).await;
    bench.destroy(&request).await;
    let gone = async {
        while Path::new(&format!("/proc/{pid}")).exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), gone).await.expect("it has ended");
    assert!(!Path::new("/sys/fs/cgroup/memory").join(place.trim_start_matches('/')).exists(), "{place} is left");
    assert!(!Path::new("/sys/fs/cgroup").join(place.trim_start_matches('/')).exists(), "{place} is left");
}

#[tokio::test]
async fn one_that_ended_while_it_was_ready_is_none() {
    let _turn = TURN.lock().await;
    let Some(ground) = crate::ground("spent").await else { return };
    warm(&ground).await;
    let bench = &ground.0;
    let end = Instant::now() + TEMPLATE;
    let killed = loop {
        // Its socket is there from the start; its directory is listed before it is ready, which makes no difference here.
        if let Some(pid) = ready(&ground).first() {
            break *pid;
        }
        assert!(Instant::now() < end, "none was ever ready");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    // SAFETY: integers; the process is the test's own machine.
    assert_eq!(unsafe { libc::kill(killed, libc::SIGKILL) }, 0);
    for number in 1..4 {
        let (request, sandbox, _) = sleeping(bench, number).await;
        assert_ne!(sandbox.pid(), u32::try_from(killed).ok());
        bench.destroy(&request).await;
    }
}

/// The monitors of machines that are kept, once one of them is ready and none of them translates anything more.
async fn settled(ground: &Ground) -> Vec<i32> {
    let mut before = Vec::new();
    let settled = async {
        loop {
            let now: Vec<_> = ready(ground).into_iter().map(|pid| (pid, translated(pid.unsigned_abs()))).collect();
            if !now.is_empty() && now == before && now.iter().any(|(_, bytes)| *bytes > 16 << 20) {
                return now.into_iter().map(|(pid, _)| pid).collect();
            }
            before = now;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    };
    tokio::time::timeout(TEMPLATE, settled).await.expect("machines are kept ready")
}

#[tokio::test]
async fn one_that_hangs_when_it_is_taken_is_made_up_for_and_that_is_said() {
    let _turn = TURN.lock().await;
    let Some(ground) = crate::ground("stuck").await else { return };
    warm(&ground).await;
    let bench = &ground.0;
    let end = Instant::now() + TEMPLATE;
    for number in 1.. {
        // All that are there: which one is taken is the pool's affair.
        let stopped = settled(&ground).await;
        // SAFETY: integers; the processes are the test's own machines.
        stopped.iter().for_each(|pid| assert_eq!(unsafe { libc::kill(*pid, libc::SIGSTOP) }, 0));
        let (request, sandbox, _) = sleeping(bench, number).await;
        let (said, pid) = (sandbox.remark(), sandbox.pid().unwrap());
        bench.destroy(&request).await;
        // Those that were not taken yet end as ready ones do.
        for pid in stopped.iter() {
            // SAFETY: as above; some have ended.
            let _ = unsafe { libc::kill(*pid, libc::SIGCONT) };
        }
        if let Some(said) = said {
            assert!(said.contains("kept ready could not be taken"), "{said}");
            assert!(!stopped.contains(&i32::try_from(pid).unwrap()));
            return;
        }
        assert!(Instant::now() < end, "none was taken");
    }
}

/// The monitor whose record is in this directory.
fn recorded(dir: &Path) -> Option<i32> {
    std::fs::read_to_string(dir.join("vmm.pid")).ok()?.split(' ').next()?.parse().ok()
}

/// What is in a directory, if there is such a directory.
fn entries(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Resolves when this has a value.
async fn soon<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let looked = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(RESTED, looked).await.unwrap_or_else(|_| panic!("{what}: not within {RESTED:?}"))
}

/// The machine that a template is made of.
async fn template_maker(templates: &Path) -> i32 {
    soon("a template is being made", || entries(templates).iter().find_map(|dir| recorded(dir))).await
}

/// Whether the template that is kept is of a machine that had rested, and nothing else is left of that.
fn has_rested(templates: &Path) -> bool {
    let whole = entries(templates).into_iter().filter(|dir| dir.extension().is_none());
    let keys = whole.filter_map(|dir| std::fs::read_to_string(dir.join("key")).ok());
    let keys: Vec<bool> = keys.map(|key| key.lines().next().unwrap_or_default().ends_with(" rested")).collect();
    keys == [true] && !entries(templates).iter().any(|dir| recorded(dir).is_some())
}

/// The monitor of the machine that has begun and waits, another one than this.
async fn begun(ground: &Ground, other: Option<i32>) -> i32 {
    let waits = |pid: &i32| Some(*pid) != other && translated(pid.unsigned_abs()) < 1 << 20;
    let found = soon("one has begun", || ready(ground).into_iter().find(waits)).await;
    assert!(joey_hypervisor::quiet(found.unsigned_abs(), TEMPLATE).await, "it waits");
    found
}

/// Waits until the template's machine has rested, and machines that were kept ready before that are made anew.
pub async fn rested(ground: &Ground) {
    let templates = ground.0.dir.join("machines/templates");
    let before = ready(ground);
    soon("it has rested", || has_rested(&templates).then_some(())).await;
    let anew = || before.iter().all(|pid| !ready(ground).contains(pid)).then_some(());
    soon("they are made anew", anew).await;
    settled(ground).await;
}

fn send(pid: i32, signal: i32) {
    // SAFETY: integers; the process is the test's own machine.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

#[tokio::test]
async fn a_template_is_saved_again_when_its_machine_has_rested() {
    let _turn = TURN.lock().await;
    let Some(ground) = crate::ground("rested").await else { return };
    let bench = &ground.0;
    warm(&ground).await;
    let templates = bench.dir.join("machines/templates");
    assert!(!has_rested(&templates), "the first one is there long before that");
    rested(&ground).await;
    let (request, sandbox, _) = sleeping(bench, 9).await;
    assert!(is_a(&*sandbox, &["give"]) && !is_a(&*sandbox, &["copy"]), "{:?}", sandbox.phases());
    bench.destroy(&request).await;
    let again = class(&bench.dir, &bench.cgroup_root, ground::agent()).await.expect("what machines need is there");
    for number in 1..4 {
        let mut request = bench.request(number, "sleep 1000");
        // A disk that no machine that is kept can be given.
        request.disk_bytes = Some(20 << 30);
        let sandbox = again.create(request.clone()).await.expect("it is made");
        assert!(is_a(&*sandbox, &["copy"]) && sandbox.remark().is_none(), "{:?}", sandbox.phases());
        let agent = AgentClient::new(sandbox.agent().clone());
        running(&agent).await;
        assert_eq!(exec(&agent, &["sh", "-c", "echo $((6 * 7))"]).await.0, "42\n");
        bench.destroy(&request).await;
    }
}

#[tokio::test]
async fn a_template_whose_machine_never_rested_is_used_and_made_again_by_the_next_daemon() {
    let _turn = TURN.lock().await;
    let Some(mut ground) = crate::ground("rests").await else { return };
    warm(&ground).await;
    let templates = ground.0.dir.join("machines/templates");
    let maker = template_maker(&templates).await;
    send(maker, libc::SIGKILL);
    soon("nothing is left of it", || entries(&templates).iter().all(|dir| recorded(dir).is_none()).then_some(())).await;
    assert!(!has_rested(&templates));
    // A class that is to make sandboxes has one begin of what was used, where nobody has asked for one yet.
    let next = class(&ground.0.dir, &ground.0.cgroup_root, ground::agent()).await;
    ground.0.class = next.expect("what machines need is there");
    ground.0.class.prepare();
    let bench = &ground.0;
    let killed = begun(&ground, None).await;
    send(killed, libc::SIGKILL);
    // One that ended while it waited is made up for.
    let next = begun(&ground, Some(killed)).await;
    let (request, sandbox, agent) = sleeping(bench, 1).await;
    assert_eq!(sandbox.pid(), Some(next.unsigned_abs()));
    assert!(is_a(&*sandbox, &["copy"]) && is_a(&*sandbox, &["give"]), "{:?}", sandbox.phases());
    assert_eq!(exec(&agent, &["sh", "-c", "echo $((6 * 7))"]).await.0, "42\n");
    bench.destroy(&request).await;
    soon("another template is made", || has_rested(&templates).then_some(())).await;
}

#[tokio::test]
async fn one_that_has_begun_and_hangs_is_made_up_for_and_nothing_is_left_of_it() {
    let _turn = TURN.lock().await;
    let Some(mut ground) = crate::ground("hangs").await else { return };
    warm(&ground).await;
    let next = class(&ground.0.dir, &ground.0.cgroup_root, ground::agent()).await;
    ground.0.class = next.expect("what machines need is there");
    ground.0.class.prepare();
    let bench = &ground.0;
    let pid = begun(&ground, None).await;
    let dirs = entries(&bench.dir.join("machines/warm"));
    let dir = dirs.into_iter().find(|dir| recorded(dir) == Some(pid)).expect("it has a directory");
    send(pid, libc::SIGSTOP);
    let (request, sandbox, _) = sleeping(bench, 1).await;
    let said = sandbox.remark().expect("that is said");
    assert!(said.contains("kept ready could not be taken"), "{said}");
    assert_ne!(sandbox.pid(), Some(pid.unsigned_abs()));
    let cgroup = Path::new("/sys/fs/cgroup/memory").join(bench.cgroup_root.trim_start_matches('/'));
    let unified = Path::new("/sys/fs/cgroup").join(bench.cgroup_root.trim_start_matches('/'));
    let name = dir.file_name().expect("a name");
    let left = [dir.clone(), cgroup.join(name), unified.join(name), PathBuf::from(format!("/proc/{pid}"))];
    soon("nothing is left of it", || (!left.iter().any(|path| path.exists())).then_some(())).await;
    bench.destroy(&request).await;
}
