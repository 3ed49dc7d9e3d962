//! Class `rund` with real machines: the conformance suite, and what only a machine can show. Needs root, QEMU, `mkfs.erofs`, Debian's
//! busybox-static, apt-get for the kernel, and the agent as `scripts/build.sh` links it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use joey_guest::{Guests, Kernel, Request};
use joey_hypervisor::qemu::Qemu;
use joey_hypervisor::{Acceleration, Boot};
use joey_sandbox::conformance::{self, exec, running};
use joey_sandbox::{AgentClient, Layer, RundConfig, rund};

mod ground;
use ground::{Ground, Stuff, stuff};

/// How long a template may take until it is there.
const TEMPLATE: Duration = Duration::from_secs(60);

/// A layer as a file that holds it.
fn image(folder: &Path) -> Layer {
    let image = folder.with_extension("erofs");
    let made = Command::new("mkfs.erofs").arg(&image).arg(folder).output().expect("mkfs.erofs (package erofs-utils)");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let sum: String = folder.file_name().unwrap().to_string_lossy().bytes().map(|byte| format!("{byte:02x}")).collect();
    Layer { path: Path::new("/layers").join(sum), image }
}

/// What machines boot, made once for all tests of this program.
fn boot() -> Option<Boot> {
    let agent = Path::new(env!("CARGO_BIN_EXE_joey-agent")).with_file_name("static").join("joey-agent");
    if !agent.exists() {
        eprintln!("SKIPPED: needs {}, which scripts/build.sh makes", agent.display());
        return None;
    }
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("guests");
    std::fs::create_dir_all(&dir).unwrap();
    let known = std::fs::read_dir(&dir).unwrap().flatten().map(|entry| entry.path());
    let package = known.into_iter().find(|path| path.extension().is_some_and(|kind| kind == "deb"));
    let package = package.unwrap_or_else(|| joey_guest::fetch_package(&dir, None).expect("the kernel's package"));
    let guests = Guests::open(dir).unwrap();
    let built = guests.build(&Request { kernel: Kernel::Package(package), agent }).expect("a guest");
    Some(Boot { id: built.guest.id, kernel: built.guest.kernel, initramfs: built.guest.initramfs })
}

/// One test at a time: emulated machines want the host's processors, and what is noticed in time is measured.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

async fn ground(name: &str) -> Option<Ground> {
    let Stuff { dir, layer, further, cgroup_root, agent_binary } = stuff(name)?;
    let boot = boot()?;
    let program = PathBuf::from("/usr/bin/qemu-system-x86_64");
    if !program.exists() {
        eprintln!("SKIPPED: needs Debian's qemu-system-x86");
        return None;
    }
    let qemu = Qemu::open(program, agent_binary, Acceleration::Emulated).await.expect("it is a QEMU");
    let config = RundConfig {
        hypervisor: Arc::new(qemu),
        boot: Ok(boot),
        cgroup_root: cgroup_root.clone(),
        dir: dir.join("machines"),
    };
    let class = rund(config).await.expect("the class opens");
    let (layers, further) = (vec![image(&layer)], vec![image(&further)]);
    Some(Ground(conformance::Bench { class, dir, layers, further, cgroup_root }))
}

/// Makes machines until one is a copy of a template.
async fn warm(ground: &Ground) {
    let end = Instant::now() + TEMPLATE;
    for number in 900.. {
        let request = ground.0.request(number, "sleep 1000");
        let sandbox = ground.0.create(&request).await;
        let copied = sandbox.phases().iter().any(|(name, _)| name == "copy");
        ground.0.destroy(&request).await;
        if copied {
            return;
        }
        assert!(Instant::now() < end, "no template was made");
    }
}

#[tokio::test]
async fn conforms() {
    let _turn = TURN.lock().await;
    let Some(ground) = ground("machine").await else { return };
    // The first one boots, and the others are copies.
    conformance::all(&ground.0).await;
    warm(&ground).await;
    conformance::whole(&ground.0).await;
    let left: Vec<_> = std::fs::read_dir(&ground.0.dir).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("i-")), "{left:?}");
}

#[tokio::test]
async fn the_kernel_is_its_own_and_copies_differ() {
    let _turn = TURN.lock().await;
    let Some(ground) = ground("copies").await else { return };
    warm(&ground).await;
    let mut drawn = Vec::new();
    for number in [1, 2] {
        let request = ground.0.request(number, "sleep 1000");
        let sandbox = ground.0.create(&request).await;
        assert!(sandbox.phases().iter().any(|(name, _)| name == "copy"), "{:?}", sandbox.phases());
        let agent = AgentClient::new(sandbox.agent().clone());
        running(&agent).await;
        let (release, _) = exec(&agent, &["uname", "-r"]).await;
        let own = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_ne!(release, own);
        let (random, _) = exec(
            &agent,
            &["sh", "-c", "dd if=/dev/urandom bs=16 count=1 2>/dev/null | md5sum; cat /proc/sys/kernel/random/uuid"],
        )
        .await;
        drawn.push(random);
        let (time, _) = exec(&agent, &["date", "+%s"]).await;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        assert!(time.trim().parse::<u64>().is_ok_and(|time| time.abs_diff(now) <= 2), "{time} and {now}");
        ground.0.destroy(&request).await;
    }
    assert_ne!(drawn[0], drawn[1]);
}

#[tokio::test]
async fn ends_are_noticed_and_told_apart() {
    let _turn = TURN.lock().await;
    let Some(ground) = ground("ends").await else { return };
    let bench = &ground.0;
    for (number, signal, reason) in [(1, libc::SIGKILL, "MachineKilled"), (2, libc::SIGSTOP, "MachineHung")] {
        let request = bench.request(number, "sleep 1000");
        let sandbox = bench.create(&request).await;
        running(&AgentClient::new(sandbox.agent().clone())).await;
        let pid = i32::try_from(sandbox.pid().unwrap()).unwrap();
        let began = Instant::now();
        // SAFETY: integers; the process is the test's own machine.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
        tokio::time::timeout(Duration::from_secs(10), sandbox.exited()).await.expect("it is noticed");
        assert!(began.elapsed() < Duration::from_millis(2500), "{:?}", began.elapsed());
        let told = async {
            loop {
                match bench.class.loss(&request.instance, &request.dir) {
                    Some(loss) if loss.reason == reason => return,
                    _ => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(5), told).await.expect("the right reason");
        bench.destroy(&request).await;
    }
}

#[tokio::test]
async fn a_monitor_is_in_jail() {
    let _turn = TURN.lock().await;
    let Some(ground) = ground("jail").await else { return };
    let bench = &ground.0;
    let request = bench.request(1, "sleep 1000");
    let sandbox = bench.create(&request).await;
    let pid = sandbox.pid().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim().to_owned();
    let user: u32 = field("Uid:").split_whitespace().next().unwrap().parse().unwrap();
    assert!(user >= 0x6a00_0000, "{user:#x}");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set).trim_start_matches('0'), "", "{set} {}", field(set));
    }
    assert_eq!((field("NoNewPrivs:").as_str(), field("Seccomp:").as_str()), ("1", "2"));
    for kind in ["mnt", "pid", "net", "ipc", "uts"] {
        let link = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_ne!(link(&pid.to_string()), link("self"), "{kind}");
    }
    let seen = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert!(!seen.contains("/instances/") && !seen.contains(" /etc ") && !seen.contains(" /root"), "{seen}");
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(cgroup.contains(&format!("{}/vmm", request.instance)), "{cgroup}");
    bench.destroy(&request).await;
}
