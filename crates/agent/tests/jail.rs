//! How a monitor comes by its machine's interface: the real jail, with a shell in the place of the monitor.

use std::fs::{self, DirBuilder};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use joey_api::instance::Resources;
use joey_api::vmm::{Bind, Interface, Jail};
use joey_hypervisor::{Jailer, Started, Starter};

const USER: u32 = 0x6a00_1234;
const MAC: [u8; 6] = [2, 0, 10, 88, 0, 9];
/// Tests that start any are alone: they look at who waits.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
/// What it sees, and whether it can open the device that interfaces are named by.
const LOOK: &str = "{ ls /sys/class/net 2>&- || cut -d: -f1 -s /proc/net/dev; ls -l /proc/self/fd/10 2>&-; \
                    (exec 3<>/dev/net/tun) 2>&- && echo opens; } > /run/seen.new; mv /run/seen.new /run/seen; \
                    while :; do sleep 1000; done";

/// A network namespace with an interface named as a Pod's, and a directory.
struct Ground {
    name: String,
    dir: PathBuf,
}

impl Ground {
    /// `None`: it cannot be had here.
    fn new(name: &str) -> Option<Self> {
        let name = format!("joey-jail-{}-{name}", std::process::id());
        let ran = |words: &str| Command::new("ip").args(words.split(' ')).status().is_ok_and(|status| status.success());
        // SAFETY: takes nothing and cannot fail.
        let root = unsafe { libc::geteuid() } == 0;
        let made = root && ran(&format!("netns add {name}"));
        if !made || !ran(&format!("-n {name} link add eth0 type veth peer name outside")) {
            let _ = made && ran(&format!("netns del {name}"));
            eprintln!("SKIPPED: needs root, the command ip, and network namespaces");
            return None;
        }
        let dir = std::env::temp_dir().join(&name);
        DirBuilder::new().mode(0o755).create(&dir).unwrap();
        fs::create_dir(dir.join("run")).unwrap();
        chown(dir.join("run"), Some(USER), Some(USER)).unwrap();
        Some(Self { name, dir })
    }

    /// Starts the shell, and reads what it saw.
    async fn look(&self, interface: Interface, has_netns: bool) -> (Started, String) {
        self.look_by(&Jailer::new(PathBuf::from(env!("CARGO_BIN_EXE_joey-agent"))), interface, has_netns).await
    }

    async fn look_by(&self, jailer: &Jailer, interface: Interface, has_netns: bool) -> (Started, String) {
        let _ = fs::remove_file(self.dir.join("run/seen"));
        let jail = Jail {
            title: "sh".to_owned(),
            record: self.dir.join("pid"),
            cgroup: format!("/{}", self.name),
            limits: Resources::default(),
            user: USER,
            netns: has_netns.then(|| Path::new("/run/netns").join(&self.name)),
            mac: has_netns.then_some(MAC),
            interface,
            files: vec![Bind { from: self.dir.join("run"), to: PathBuf::from("/run"), writable: true }],
            kvm: false,
            shared_memory: false,
            longest_file: 1 << 20,
            program: PathBuf::from("/bin/sh"),
            args: vec!["-c".to_owned(), LOOK.to_owned()],
            env: Vec::new(),
        };
        let started = jailer.start(jail, &[], &self.dir.join("errors")).await.unwrap();
        let errors = || fs::read_to_string(self.dir.join("errors")).unwrap_or_default();
        let look = || fs::read_to_string(self.dir.join("run/seen")).ok();
        let seen = until(|| format!("it sees nothing: {}", errors()), look).await;
        (started, seen)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

async fn end(ground: &Ground, started: &Started) {
    let name = format!("/{}", ground.name);
    started.process.kill();
    tokio::time::timeout(Duration::from_secs(20), started.process.ended()).await.expect("it ends");
    started.process.reap();
    joey_process::cgroup::kill_all(&name).await.unwrap();
    joey_process::cgroup::remove(&name).await.unwrap();
}

/// Names of interfaces among what was seen.
fn interfaces(seen: &str) -> Vec<&str> {
    let mut names: Vec<&str> =
        seen.lines().map(str::trim).filter(|name| ["eth0", "joey", "tap"].contains(name)).collect();
    names.sort_unstable();
    names
}

#[tokio::test]
async fn the_interface_is_a_descriptor_comes_back_or_has_a_name() {
    let _alone = ALONE.lock().await;
    let Some(ground) = Ground::new("interface") else { return };
    let (started, seen) = ground.look(Interface::Descriptor, true).await;
    assert!(seen.contains("/dev/net/tun") && started.tap.is_none(), "{seen}");
    assert!(interfaces(&seen).is_empty() && !seen.contains("opens"), "{seen}");
    end(&ground, &started).await;

    let (started, seen) = ground.look(Interface::Returned, true).await;
    let tap = started.tap.as_ref().expect("it came back");
    let link = fs::read_link(format!("/proc/self/fd/{}", tap.as_raw_fd())).unwrap();
    assert!(link.ends_with("net/tun") && !seen.contains("net/tun") && interfaces(&seen).is_empty(), "{seen}");
    end(&ground, &started).await;
    drop(started);

    // Twice, as a machine that is booted after a copy of it failed.
    for _ in 0..2 {
        let (started, seen) = ground.look(Interface::Named, true).await;
        assert!(interfaces(&seen) == ["eth0", "joey", "tap"] && seen.contains("opens"), "{seen}");
        assert!(!seen.contains("/dev/net/tun") && started.tap.is_none(), "{seen}");
        end(&ground, &started).await;
    }
    let (started, seen) = ground.look(Interface::Named, false).await;
    assert!(interfaces(&seen) == ["tap"] && seen.contains("opens"), "{seen}");
    end(&ground, &started).await;
}

/// Those of this process's that wait for an order.
fn waiting() -> Vec<u32> {
    let tasks = format!("/proc/{}/task", std::process::id());
    let children = |task: fs::DirEntry| fs::read_to_string(task.path().join("children")).unwrap_or_default();
    let all: Vec<String> = fs::read_dir(tasks).unwrap().flatten().map(children).collect();
    let is_called =
        |pid: &u32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == b"joey-agent\0jail\0");
    all.iter().flat_map(|line| line.split_whitespace()).filter_map(|pid| pid.parse().ok()).filter(is_called).collect()
}

async fn until<T>(wrong: impl Fn() -> String, mut found: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < end, "{}", wrong());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn one_waits_for_the_next_order_and_ends_with_who_would_give_it() {
    let _alone = ALONE.lock().await;
    let Some(ground) = Ground::new("ahead") else { return };
    until(|| "others wait".to_owned(), || waiting().is_empty().then_some(())).await;
    let jailer = Jailer::new(PathBuf::from(env!("CARGO_BIN_EXE_joey-agent")));
    let (started, _) = ground.look_by(&jailer, Interface::Descriptor, true).await;
    end(&ground, &started).await;
    let mine = |before: &[u32]| waiting().into_iter().find(|pid| !before.contains(pid));
    let first = until(|| "none waits".to_owned(), || mine(&[])).await;
    let (started, _) = ground.look_by(&jailer, Interface::Descriptor, true).await;
    end(&ground, &started).await;
    assert!(!waiting().contains(&first), "it had the order");
    // Without it another one is called.
    let second = until(|| "none waits".to_owned(), || mine(&[first])).await;
    assert!(Command::new("kill").args(["-KILL", &second.to_string()]).status().unwrap().success());
    let has_ended = || fs::read_to_string(format!("/proc/{second}/stat")).map_or(true, |stat| stat.contains(") Z "));
    until(|| "it does not end".to_owned(), || has_ended().then_some(())).await;
    let (started, _) = ground.look_by(&jailer, Interface::Descriptor, true).await;
    end(&ground, &started).await;
    let third = until(|| "none waits".to_owned(), || mine(&[first, second])).await;
    drop(jailer);
    until(|| "it goes on waiting".to_owned(), || (!waiting().contains(&third)).then_some(())).await;
}

#[test]
fn without_anybody_to_give_an_order_it_ends() {
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut waits = Command::new("timeout");
    waits.args(["20", env!("CARGO_BIN_EXE_joey-agent"), "jail"]).stdin(OwnedFd::from(far)).stdout(Stdio::piped());
    let waits = waits.spawn().unwrap();
    drop(near);
    let output = waits.wait_with_output().unwrap();
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
}
