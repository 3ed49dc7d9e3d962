//! Class `rund` with real machines: the conformance suite, and what only a machine can show. Needs root, QEMU, `mkfs.erofs`, Debian's
//! busybox-static, apt-get for the kernel, and the agent as `scripts/build.sh` links it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use joey_api::agent::Collected;
use joey_api::diagnosis::{CaptureRequest, CoreSettings, Cores};
use joey_api::instance::{ExecRequest, LogOptions};
use joey_collect::Segments;
use joey_guest::{Guests, Kernel, Request};
use joey_hypervisor::qemu::Qemu;
use joey_hypervisor::{Acceleration, Boot, Jailer};
use joey_sandbox::conformance::{self, exec, running, state_where};
use joey_sandbox::{AgentClient, CreateRequest, Guest, Layer, RundConfig, Sandbox, SandboxClass, rund};

#[path = "../../../agent/tests/ground/mod.rs"]
mod ground;
use ground::{Ground, Stuff, stuff};

mod kept;
mod measure;
use measure::{own_memory, same_as_in_template, translated};

/// Most bytes of a core.
const CORE: u64 = 2 << 20;
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
    let agent = ground::agent().with_file_name("static").join("joey-agent");
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
    let class = class(&dir, &cgroup_root, agent_binary).await?;
    let (layers, further) = (vec![image(&layer)], vec![image(&further)]);
    Some(Ground(conformance::Bench { class, dir, layers, further, cgroup_root, on_linux: true }))
}

async fn class(dir: &Path, cgroup_root: &str, agent_binary: PathBuf) -> Option<Arc<dyn SandboxClass>> {
    let boot = boot()?;
    let program = PathBuf::from("/usr/bin/qemu-system-x86_64");
    if !program.exists() {
        eprintln!("SKIPPED: needs Debian's qemu-system-x86");
        return None;
    }
    let qemu = Qemu::open(program, Jailer::new(agent_binary), Acceleration::Emulated).await.expect("it is a QEMU");
    let config = RundConfig {
        hypervisor: Arc::new(qemu),
        guest: Arc::new(move || Ok(Guest { boot: boot.clone(), nfs_modules: Vec::new() })),
        cgroup_root: cgroup_root.to_owned(),
        dir: dir.join("machines"),
        core_bytes: Some(CORE),
    };
    Some(rund(config).await.expect("the class opens"))
}

/// Makes machines until one is a copy of a template.
async fn warm(ground: &Ground) {
    let end = Instant::now() + TEMPLATE;
    for number in 900.. {
        let request = ground.0.request(number, "sleep 1000");
        let sandbox = ground.0.create(&request).await;
        let copied = is_a(&*sandbox, &["copy", "give"]);
        ground.0.destroy(&request).await;
        if copied {
            return;
        }
        assert!(Instant::now() < end, "no template was made");
    }
}

/// Whether it was made in one of these ways.
fn is_a(sandbox: &dyn Sandbox, ways: &[&str]) -> bool {
    sandbox.phases().iter().any(|(name, _)| ways.contains(&name.as_str()))
}

fn cgroup_of(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap()
}

/// An instance that runs and does nothing, and the talk with its agent.
async fn sleeping(bench: &conformance::Bench, number: u64) -> (CreateRequest, Arc<dyn Sandbox>, AgentClient) {
    let request = bench.request(number, "sleep 1000");
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    (request, sandbox, agent)
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
        assert!(is_a(&*sandbox, &["copy", "give"]), "{:?}", sandbox.phases());
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
    // At SIGTERM a monitor ends in order, as it does when the machine's kernel or agent fails.
    let ends =
        [(1, libc::SIGKILL, "MachineKilled"), (2, libc::SIGSTOP, "MachineHung"), (3, libc::SIGTERM, "MachineCrashed")];
    for (number, signal, reason) in ends {
        let (request, sandbox, _) = sleeping(bench, number).await;
        let pid = i32::try_from(sandbox.pid().unwrap()).unwrap();
        let began = Instant::now();
        // SAFETY: integers; the process is the test's own machine.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
        tokio::time::timeout(Duration::from_secs(10), sandbox.exited()).await.expect("it is noticed");
        assert!(began.elapsed() < Duration::from_millis(2500), "{:?}", began.elapsed());
        told(bench, &request, reason).await;
        bench.destroy(&request).await;
    }
}

/// Waits until the class tells this of the machine's end.
async fn told(bench: &conformance::Bench, request: &CreateRequest, reason: &str) {
    let told = async {
        loop {
            match bench.class.loss(&request.instance, &request.dir) {
                Some(loss) if loss.reason == reason => return,
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), told).await.expect("the right reason");
}

/// Writes files into memory: of a MiB of noise, of two MiB of nothing, and of pages of both kinds by turns.
const WRITE: &str = "cd /dev/shm && dd if=/dev/urandom of=random bs=64k count=16 && dd if=/dev/zero of=zeros bs=64k count=32 \
                     && for i in 1 2 3 4 5 6 7 8; do dd if=/dev/zero bs=4k count=1; dd if=/dev/urandom bs=4k count=1; done >mixed";

#[tokio::test]
async fn one_that_idles_gives_back_what_was_translated_and_one_that_is_ready_does_not() {
    let _turn = TURN.lock().await;
    let Some(ground) = ground("lean").await else { return };
    let bench = &ground.0;
    warm(&ground).await;
    // Those that are ready stay the same from then on.
    kept::rested(&ground).await;
    let (request, sandbox, agent) = sleeping(bench, 1).await;
    let pid = sandbox.pid().unwrap();
    let (translated_at_first, own) = (translated(pid), own_memory(pid));
    assert!(translated_at_first > 16 << 20, "{translated_at_first}");
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    assert!(maps.contains("libglib") && !maps.contains("libcapstone") && !maps.contains("libpmem"), "{maps}");
    // Pages that change, stay as they are in the template, and become so again.
    let sums = ["sh", "-c", "cd /dev/shm && sha256sum random zeros mixed"];
    let written = exec(&agent, &["sh", "-c", WRITE]).await;
    assert_eq!(written.1.exit_code, Some(0), "{written:?}");
    let before = exec(&agent, &sums).await;
    assert_eq!(before.0.lines().count(), 3, "{before:?}");
    let same_at_first = same_as_in_template(pid);
    assert!(same_at_first > 1 << 20, "{same_at_first}");
    let given_back = async {
        while translated(pid) > 8 << 20 || same_as_in_template(pid) > same_at_first / 2 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(150), given_back).await.expect("it is given back");
    assert!(own_memory(pid) + (10 << 20) < own, "{own} and {}", own_memory(pid));
    // It goes on as before.
    assert_eq!(exec(&agent, &sums).await, before);
    assert_eq!(exec(&agent, &["sh", "-c", "echo $((6 * 7))"]).await.0, "42\n");
    bench.destroy(&request).await;
    // One that became ready before that has idled for longer than it takes.
    let idle = kept::ready(&ground).into_iter().map(|pid| translated(pid.unsigned_abs())).max();
    assert!(idle.is_some_and(|bytes| bytes > 16 << 20), "{idle:?}");
}

/// Writes sixty MiB into memory.
const FILL: [&str; 3] = ["sh", "-c", "dd if=/dev/urandom of=/dev/shm/much bs=1M count=60 2>/dev/null"];

#[tokio::test]
async fn memory_that_is_free_inside_comes_back() {
    let _turn = TURN.lock().await;
    let Some(ground) = ground("memory").await else { return };
    let bench = &ground.0;
    warm(&ground).await;
    let (request, sandbox, agent) = sleeping(bench, 1).await;
    let pid = sandbox.pid().unwrap();
    let before = own_memory(pid);
    exec(&agent, &FILL).await;
    let filled = own_memory(pid);
    assert!(filled > before + (55 << 20), "{before} and {filled}");
    exec(&agent, &["rm", "/dev/shm/much"]).await;
    let back = async {
        while own_memory(pid) > filled - (40 << 20) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), back).await.expect("the host has it back");
    bench.destroy(&request).await;
}

#[tokio::test]
async fn one_that_the_host_has_no_memory_for_is_told_from_others() {
    let _turn = TURN.lock().await;
    let Some(ground) = ground("short").await else { return };
    let bench = &ground.0;
    let (request, sandbox, agent) = sleeping(bench, 1).await;
    let vmm = format!("{}/{}/vmm", bench.cgroup_root, request.instance);
    let files = [
        (format!("/sys/fs/cgroup/memory{vmm}"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
        (format!("/sys/fs/cgroup{vmm}"), "memory.max", "memory.current"),
    ];
    let (place, limit, usage) = files.iter().find(|(place, limit, _)| Path::new(place).join(limit).exists()).unwrap();
    let used: u64 = std::fs::read_to_string(Path::new(place).join(usage)).unwrap().trim().parse().unwrap();
    std::fs::write(Path::new(place).join(limit), (used + (24 << 20)).to_string()).unwrap();
    let writes = ExecRequest { command: FILL.map(str::to_owned).into(), stdout: true, ..ExecRequest::default() };
    // It is over before all of that is written.
    let _answer = agent.exec("main", &writes, futures::stream::pending()).await;
    tokio::time::timeout(Duration::from_secs(10), sandbox.exited()).await.expect("it is noticed");
    told(bench, &request, "MachineOutOfMemory").await;
    bench.destroy(&request).await;
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
    let cgroup = cgroup_of(pid);
    assert!(cgroup.contains(&format!("{}/vmm", request.instance)), "{cgroup}");
    bench.destroy(&request).await;
}

/// Lets a process crash inside, which the agent has been told of when it has ended.
async fn crash(agent: &AgentClient, script: &str) -> Cores {
    let (text, status) = exec(agent, &["sh", "-c", script]).await;
    assert!(status.exit_code.is_some_and(|code| code > 128), "{text} {status:?}");
    agent.cores(None).await.expect("the cores")
}

#[tokio::test]
async fn crashes_leave_cores() {
    let _turn = TURN.lock().await;
    let Some(ground) = ground("cores").await else { return };
    let bench = &ground.0;
    let (request, _sandbox, agent) = sleeping(bench, 1).await;
    assert_eq!(crash(&agent, "kill -SEGV $$").await, Cores::default(), "nobody asked for it");
    let keep = CoreSettings { enabled: true, pattern: None };
    agent.cores(Some(&keep)).await.expect("they are kept");
    let kept = crash(&agent, "kill -SEGV $$").await.dumps;
    let [core] = &kept[..] else { panic!("one core: {kept:?}") };
    assert!(core.name.starts_with("main.sh.") && core.name.contains(".SIGSEGV."), "{core:?}");
    let bytes: Vec<_> = agent.core(&core.name).await.expect("a core").try_collect().await.expect("all of it");
    let bytes = bytes.concat();
    // ELF, and of type ET_CORE.
    assert!(bytes.starts_with(b"\x7fELF") && bytes[16..18] == [4, 0] && bytes.len() as u64 == core.bytes);
    let told = |state: &joey_api::agent::AgentState| {
        state.events.iter().any(|event| event.reason == "CoreDumped" && event.message.contains(&core.name))
    };
    state_where(&agent, told).await;
    // At most so many bytes, and four of them.
    let large = crash(&agent, "x=$(dd if=/dev/zero bs=1M count=6 | tr '\\0' x); kill -ABRT $$").await.dumps;
    assert!(large[0].name.ends_with(".core.cut") && large[0].bytes == CORE, "{large:?}");
    for _ in 0..4 {
        crash(&agent, "kill -ABRT $$").await;
    }
    assert_eq!(agent.cores(None).await.expect("the cores").dumps.len(), 4);
    // Into the container, as the process's own user, and through no link.
    agent.cores(Some(&CoreSettings { enabled: true, pattern: Some("/tmp/core".into()) })).await.expect("a pattern");
    let (text, _) = exec(&agent, &["sh", "-c", "sh -c 'kill -ABRT $$'; stat -c '%n %a %u' /tmp/core.*"]).await;
    assert!(text.starts_with("/tmp/core.") && text.trim().ends_with(" 600 0"), "{text}");
    let script = "sh -c 'ln -s /tmp/prize /tmp/core.$$; kill -ABRT $$'; stat -c %n /tmp/prize";
    let (text, status) = exec(&agent, &["sh", "-c", script]).await;
    assert_ne!(status.exit_code, Some(0), "a link was followed: {text}");
    bench.destroy(&request).await;
}

#[tokio::test]
async fn packets_are_captured() {
    let _turn = TURN.lock().await;
    let Some(ground) = ground("packets").await else { return };
    let bench = &ground.0;
    let (request, _sandbox, agent) = sleeping(bench, 1).await;
    let wanted = CaptureRequest { port: Some(4711), packets: Some(1), ..CaptureRequest::default() };
    let capture = agent.capture(&wanted, futures::stream::pending()).await.expect("a capture");
    exec(&agent, &["nc", "127.0.0.1", "4711"]).await;
    let file = tokio::time::timeout(conformance::LIMIT, capture.try_collect::<Vec<_>>()).await;
    let file = file.expect("it ends by itself").expect("all of it").concat();
    // The section header of pcapng, and the port as TCP has it.
    assert!(file.starts_with(&[0x0a, 0x0d, 0x0d, 0x0a]) && file.windows(2).any(|part| part == 4711u16.to_be_bytes()));
    bench.destroy(&request).await;
}

#[tokio::test]
async fn what_is_collected_in_a_machine_is_on_the_host() {
    let _turn = TURN.lock().await;
    let Some(ground) = ground("collected").await else { return };
    let bench = &ground.0;
    let script = "mkdir /log; for i in $(seq 0 99); do echo out $i; echo file $i >> /log/a; done; sleep 1000";
    let mut request = bench.request(1, script);
    request.config.containers[0].collected =
        Collected { output: true, files: [("files".to_owned(), "/log/*".to_owned())].into() };
    std::fs::create_dir(request.dir.join(joey_collect::DIRECTORY)).unwrap();
    let all = |source: &str| {
        let segments = Segments::of(&request.dir, "main", source).all().unwrap();
        segments.iter().map(|one| std::fs::read_to_string(&one.path).unwrap()).collect::<String>()
    };
    // A second machine goes on in the same streams.
    for count in [100, 200] {
        let sandbox = bench.create(&request).await;
        let agent = AgentClient::new(sandbox.agent().clone());
        running(&agent).await;
        let fetched = async {
            while all("_output").lines().count() < count {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(conformance::LIMIT, fetched).await.expect("the output comes");
        // The last words, which nobody has time to fetch before the end.
        exec(&agent, &["sh", "-c", "echo last words >> /log/a"]).await;
        bench.class.destroy(&request.instance, &request.dir).await.expect("it ends");
        let runs = count / 100;
        let numbers = (0..runs).flat_map(|_| 0..100);
        let (output, files) = (all("_output"), all("files"));
        assert_eq!(output.matches(" stdout F out ").count(), count);
        assert!(
            output.lines().zip(numbers).all(|(line, number)| line.ends_with(&format!(" F out {number}"))),
            "{output}"
        );
        assert_eq!(
            (files.matches(" F file ").count(), files.matches(" F last words").count()),
            (count, runs),
            "{files}"
        );
    }
    bench.destroy(&request).await;
}

#[tokio::test]
async fn who_follows_a_log_gets_all_of_it() {
    let _turn = TURN.lock().await;
    let Some(ground) = ground("followed").await else { return };
    let bench = &ground.0;
    let request = bench.request(1, "seq 1 20000; touch /tmp/done; sleep 1000");
    let sandbox = bench.create(&request).await;
    let agent = AgentClient::new(sandbox.agent().clone());
    running(&agent).await;
    exec(&agent, &["sh", "-c", "until [ -e /tmp/done ]; do sleep 0.1; done"]).await;
    let follow = LogOptions { follow: true, ..LogOptions::default() };
    let followed = agent.logs("main", &follow).await.expect("a log");
    let (destroyed, log) = tokio::join!(
        bench.class.destroy(&request.instance, &request.dir),
        tokio::time::timeout(conformance::LIMIT, followed.try_collect::<Vec<_>>()),
    );
    destroyed.expect("it ends");
    let log = log.expect("the log ends").expect("in order").concat();
    let wanted: String = (1..=20_000).map(|number| format!("{number}\n")).collect();
    assert!(log == wanted.as_bytes(), "{} bytes of {}", log.len(), wanted.len());
    bench.destroy(&request).await;
}

#[tokio::test]
async fn an_encrypted_disk_holds_no_text() {
    let _turn = TURN.lock().await;
    if !Path::new("/usr/bin/qemu-img").exists() {
        eprintln!("SKIPPED: needs Debian's qemu-utils");
        return;
    }
    let Some(ground) = ground("encrypted").await else { return };
    let bench = &ground.0;
    warm(&ground).await;
    for (number, encrypted) in [(1, false), (2, true)] {
        let mut request = bench.request(number, "sleep 1000");
        (request.encrypted_disk, request.disk_bytes) = (encrypted, Some(64 << 20));
        let sandbox = bench.create(&request).await;
        let agent = AgentClient::new(sandbox.agent().clone());
        running(&agent).await;
        let script =
            "for i in $(seq 5000); do echo a-$((1000+1))-marker; done > /tmp/text; sync; sort /tmp/text | uniq -c";
        let (text, _) = exec(&agent, &["sh", "-c", script]).await;
        assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["5000", "a-1001-marker"]);
        let disk = std::fs::read(request.dir.join("vm/disk")).expect("it has a disk");
        assert_eq!(disk.windows(13).any(|part| part == b"a-1001-marker"), !encrypted);
        assert_eq!(disk.starts_with(b"LUKS"), encrypted);
        bench.destroy(&request).await;
    }
}
