//! Point 8: core dumps and captures of packets, as files that gdb, tcpdump and Wireshark open, and whose they are not.

use std::net::{TcpStream, UdpSocket};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use joey_tests::joey::pod;
use joey_tests::{Joey, Program, Registry, Settings, holds, repository, run, seconds, traffic, wait_until};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const PATTERN: &str = "/proc/sys/kernel/core_pattern";

const AT_ONCE: &str = "/proc/sys/kernel/core_pipe_limit";

/// What the host does with its own crashes while a test runs; dropped, it is what it was.
struct HostPattern {
    pattern: String,
    at_once: String,
}

impl HostPattern {
    fn set(pattern: &str) -> Self {
        let read = |place| std::fs::read_to_string(place).expect("every kernel has one");
        let before = Self { pattern: read(PATTERN), at_once: read(AT_ONCE) };
        std::fs::write(PATTERN, pattern).expect("root sets it");
        before
    }
}

impl Drop for HostPattern {
    fn drop(&mut self) {
        let _ = std::fs::write(PATTERN, &self.pattern);
        let _ = std::fs::write(AT_ONCE, &self.at_once);
    }
}

fn pattern() -> String {
    std::fs::read_to_string(PATTERN).expect("every kernel has one").trim_end().to_owned()
}

fn with_cores(size: &str) -> Joey {
    Joey::start_with(Settings { arguments: vec!["--core-dumps".into(), size.into()], ..Settings::default() })
}

/// A process of the host crashes in `dir`, with cores wanted; its process id.
fn crash_of_host(dir: &Path) -> String {
    let script = "ulimit -c unlimited; echo $$; kill -SEGV $$";
    let ended = run(Command::new("sh").args(["-c", script]).current_dir(dir));
    assert_eq!(ended.code, 139, "{ended:?}");
    ended.stdout.trim().to_owned()
}

#[track_caller]
fn is_core(file: &Path) {
    let bytes = std::fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    // ELF, and of type ET_CORE.
    assert!(bytes.starts_with(b"\x7fELF") && bytes[16..18] == [4, 0], "{} is no core", file.display());
}

fn cores(joey: &Joey, instance: &str) -> Value {
    joey.joey(&["diagnose", "core", "ls", instance, "-o", "json"]).json()
}

#[test]
fn a_core_is_kept_and_gdb_reads_it() {
    let registry = Registry::with_demo_image();
    let host = HostPattern::set("host-core-%e-%p");
    let mut joey = with_cores("64Mi");
    assert!(pattern().starts_with('|'), "{}", pattern());
    for name in ["web", "other"] {
        joey.joey(&["run", &registry.demo(), "--name", name]).ok();
    }
    let crash = |joey: &Joey, name: &str| joey.joey(&["exec", name, "--", "sh", "-c", "kill -SEGV $$"]).fails(139);
    crash(&joey, "web");
    assert_eq!(cores(&joey, "web"), json!({"settings": {"enabled": false}, "dumps": []}), "nobody asked for it");
    joey.joey(&["diagnose", "core", "get", "web"]).fails(1);

    joey.joey(&["diagnose", "core", "enable", "web"]).ok();
    crash(&joey, "other");
    crash(&joey, "web");
    let found = cores(&joey, "web");
    assert_eq!(found["dumps"].as_array().map(Vec::len), Some(1), "{found}");
    let name = found["dumps"][0]["name"].as_str().expect("a name").to_owned();
    assert!(name.starts_with("web.sh.") && name.contains(".SIGSEGV.") && name.ends_with(".core"), "{name}");
    assert!(joey.joey(&["diagnose", "core", "ls", "web"]).ok().contains(&name));
    assert_eq!(cores(&joey, "other")["dumps"], json!([]));
    wait_until("it is told", seconds(10), || {
        let events = joey.joey(&["events", "web"]).ok();
        holds(events.contains("CoreDumped") && events.contains("SIGSEGV") && events.contains(&name), events)
    });

    let fetched = run(joey.joey_command(&["diagnose", "core", "get", "web"]).current_dir(joey.scratch())).ok();
    assert_eq!(fetched.trim(), name);
    let file = joey.scratch().join(&name);
    is_core(&file);
    assert_eq!(file.metadata().expect("it is there").permissions().mode() & 0o777, 0o600);
    let program = repository().join(".tools/demo-files/root/bin/busybox");
    let read = run(Command::new("gdb").args(["-batch", "-ex", "info registers rip"]).args([&program, &file])).ok();
    assert!(read.contains("SIGSEGV") && read.contains("rip"), "{read}");

    // The host's own crashes go where they went, also while no daemon runs, and an instance's still come.
    joey.kill();
    let pid = crash_of_host(joey.scratch());
    is_core(&joey.scratch().join(format!("host-core-sh-{pid}")));
    joey.up();
    crash(&joey, "web");
    joey.joey(&["diagnose", "core", "disable", "web"]).ok();
    crash(&joey, "web");
    assert_eq!(cores(&joey, "web")["dumps"].as_array().map(Vec::len), Some(2));
    let absent = joey.joey(&["diagnose", "core", "get", "web", "absent.core"]).fails(1);
    assert!(absent.contains("absent.core"), "{absent}");
    joey.down().ok();
    assert_eq!(pattern(), "host-core-%e-%p", "it is given back");
    drop(host);
}

#[test]
fn a_core_is_written_where_the_annotation_says() {
    let registry = Registry::with_demo_image();
    let script = std::env::temp_dir().join(joey_tests::unique("handler"));
    let told = script.with_extension("told");
    let text = format!("#!/bin/sh\n(echo \"$@\"; head -c 4; cat >/dev/null) > {}\n", told.display());
    std::fs::write(&script, text).expect("there is a place for it");
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).expect("it is ours");
    let host = HostPattern::set(&format!("|{} %s %e end", script.display()));
    let mut joey = with_cores("1Mi");
    let mut object = pod("crashes", &registry.demo(), &["sleep", "1000"]);
    object["metadata"]["annotations"] = json!({"k8s.aliyun.com/eci-core-pattern": "/data/core"});
    object["spec"]["volumes"] = json!([{"name": "data", "emptyDir": {}}]);
    object["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "data", "mountPath": "/data"}]);
    object["spec"]["containers"][0]["securityContext"] = json!({"runAsUser": 1000});
    joey.apply(&object);
    joey.wait_for("crashes", "Ready", seconds(60));
    let inside = |script: &str| joey.kubectl(&["exec", "crashes", "--", "sh", "-c", script]);
    let pid = inside("echo $$; kill -ABRT $$").stdout.trim().to_owned();
    let core = format!("/data/core.{pid}");
    assert_eq!(inside(&format!("stat -c '%u %a' {core}")).ok().trim(), "1000 600");
    let copy = joey.scratch().join("copy");
    joey.joey(&["cp", &format!("crashes.default:{core}"), &copy.display().to_string()]).ok();
    is_core(&copy);
    assert!(copy.metadata().expect("it is there").size() <= 1 << 20);
    assert_eq!(cores(&joey, "crashes.default")["dumps"], json!([]), "nothing is kept besides");
    wait_until("it is told", seconds(10), || {
        let events = joey.kubectl(&["get", "events", "--field-selector", "involvedObject.name=crashes"]).ok();
        holds(events.contains("CoreDumped") && events.contains(&core), events)
    });

    // No link is followed, nothing of others is written over, and it is said.
    joey.joey(&["diagnose", "core", "enable", "crashes.default", "--pattern", "/data/%p/core"]).ok();
    inside("mkdir /data/$$; ln -s /data/prize /data/$$/core; kill -ABRT $$");
    wait_until("it is told", seconds(10), || {
        let events = joey.joey(&["events", "crashes.default"]).ok();
        holds(events.contains("could not be written"), events)
    });
    assert_ne!(inside("test -e /data/prize").code, 0, "a link was followed");

    // What is larger than the host allows is cut.
    joey.joey(&["diagnose", "core", "enable", "crashes.default"]).ok();
    inside("x=$(head -c 6000000 /dev/zero | tr '\\0' x); kill -ABRT $$");
    let found = cores(&joey, "crashes.default");
    assert_eq!(found["dumps"][0]["bytes"], 1 << 20, "{found}");
    assert!(found["dumps"][0]["name"].as_str().is_some_and(|name| name.ends_with(".core.cut")), "{found}");

    // The host's own handler has its crashes with what it asked for, and none of an instance's.
    assert!(!told.exists());
    crash_of_host(joey.scratch());
    let heard = wait_until("the host's handler hears of it", seconds(10), || {
        std::fs::read(&told).map_err(|error| error.to_string())
    });
    assert_eq!(heard, b"11 sh end\n\x7fELF");
    for (value, why) in [("|/bin/sh", "programs and sockets"), ("/data/", "must name a file")] {
        object["metadata"] = json!({"name": "wrong", "annotations": {"k8s.aliyun.com/eci-core-pattern": value}});
        joey.apply(&object);
        wait_until("it is refused", seconds(20), || {
            let status = joey.get("pod", "wrong")["status"].clone();
            let said = status["message"].as_str().is_some_and(|message| message.contains(why));
            holds(status["phase"] == "Failed" && said, status)
        });
        joey.delete_pod("wrong");
    }
    // Joey gives back what it took, and then the test does.
    joey.down().ok();
    drop(host);
    for file in [script, told] {
        let _ = std::fs::remove_file(file);
    }
}

#[test]
fn without_the_hosts_leave_there_are_no_cores() {
    let registry = Registry::with_demo_image();
    let before = pattern();
    let joey = Joey::start();
    assert_eq!(pattern(), before, "nobody allowed it");
    joey.joey(&["run", &registry.demo(), "--name", "web"]).ok();
    let refused = joey.joey(&["diagnose", "core", "enable", "web"]).fails(1);
    assert!(
        refused.contains("not allowed") && refused.contains("hint: ") && refused.contains("--core-dumps"),
        "{refused}"
    );
    let refused = joey.joey(&["run", &registry.demo(), "--core-pattern", "/core"]).fails(1);
    assert!(refused.contains("not allowed"), "{refused}");
    assert!(joey.joey(&["run", &registry.demo(), "--core-pattern", "|x"]).fails(2).contains("must be a path"));
    assert!(joey.joey(&["diagnose", "core", "enable", "web", "--pattern", "|x"]).fails(2).contains("must be a path"));
    joey.joey(&["diagnose", "core", "disable", "web"]).ok();
    let joey = Joey::prepare(Settings { take_down: false, ..Settings::default() });
    for (size, why) in [("much", "amount"), ("1k", "at least 1Mi")] {
        assert!(joey.joey(&["up", "--core-dumps", size]).fails(2).contains(why), "{size}");
    }
}

/// Lines of Debian's tcpdump for a file; Wireshark's own reader finds as many packets.
fn packets(file: &Path) -> Vec<String> {
    let text = run(Command::new("tcpdump").args(["-nr"]).arg(file)).ok();
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    let wireshark = run(Command::new("tshark").args(["-n", "-r"]).arg(file)).ok();
    assert_eq!(wireshark.lines().count(), lines.len(), "tshark and tcpdump differ:\n{wireshark}\n{text}");
    lines
}

#[test]
fn a_capture_has_what_its_filter_says() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let web = joey.run_pod("web", &registry.demo(), &[]);
    let address = web["status"]["podIP"].as_str().expect("it has an address").to_owned();
    let serves = format!("{address}:80");
    wait_until("it serves", seconds(10), || traffic::page(&serves, "/"));
    let begin = |name: &str, more: &[&str]| {
        let file = joey.scratch().join(name);
        let path = file.display().to_string();
        let arguments = [&["diagnose", "tcpdump", "web.default", "-w", &path], more].concat();
        let log = joey.scratch().join(format!("{name}.log"));
        let program = Program::start(&mut joey.joey_command(&arguments), &log);
        wait_until("it has begun", seconds(10), || {
            holds(file.metadata().is_ok_and(|meta| meta.len() > 0), program.output())
        });
        (program, file)
    };
    let from = format!("{address}/32");
    let captures = [
        begin("tcp", &["-i", "eth0", "--port", "80", "--protocol", "tcp"]),
        begin("udp", &["--protocol", "udp", "--dest", &from, "--dest-port", "5300", "--snap-length", "60"]),
        begin("icmp", &["-i", "lo", "--protocol", "icmp"]),
        begin("none", &["--source", "203.0.113.0/24", "--size", "10M"]),
    ];
    let full = joey.joey(&["diagnose", "tcpdump", "web.default", "-w", "/dev/null"]).fails(1);
    assert!(full.contains("4 captures are running"), "{full}");
    traffic::page(&serves, "/").expect("it serves");
    assert!(TcpStream::connect(format!("{address}:81")).is_err(), "nothing listens there");
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a port");
    for port in [5300, 5301] {
        socket.send_to(&[7; 200], (address.as_str(), port)).expect("it is sent");
    }
    joey.kubectl(&["exec", "web", "--", "ping", "-c", "3", "127.0.0.1"]).ok();
    let ended = captures.map(|(mut program, file)| {
        program.signal(Signal::SIGINT);
        assert_eq!(program.wait(seconds(10)), 0, "{}", program.output());
        let lines = packets(&file);
        let said = format!("{} packets captured, 0 lost", lines.len());
        assert!(program.output().contains(&said), "{said}: {} {lines:?}", program.output());
        lines
    });
    let [tcp, udp, icmp, none] = &ended;
    let fields = ["-n", "-Y", "http.request", "-T", "fields", "-e", "http.request.method", "-e", "ip.dst", "-r"];
    let asked = run(Command::new("tshark").args(fields).arg(joey.scratch().join("tcp"))).ok();
    assert_eq!(asked.trim(), format!("GET\t{address}"), "Wireshark takes the packets apart");
    assert!(
        tcp.iter().any(|line| line.contains("HTTP: GET")) && tcp.iter().all(|line| line.contains(".80")),
        "{tcp:?}"
    );
    assert!(udp.len() == 1 && udp[0].contains(&format!("{address}.5300: UDP, length 200")), "{udp:?}");
    assert_eq!(icmp.len(), 6, "each once: {icmp:?}");
    assert!(icmp.iter().all(|line| line.contains("ICMP echo")), "{icmp:?}");
    assert_eq!(none, &Vec::<String>::new());

    // Through a pipe, to a limit. Who goes away without a word takes no place any more.
    for _ in 0..4 {
        drop(begin("gone", &[]));
        let _ = std::fs::remove_file(joey.scratch().join("gone"));
    }
    let joey_words = joey.joey_command(&["diagnose", "tcpdump", "web.default", "--packets", "2", "--duration", "30"]);
    let words: Vec<_> = std::iter::once(joey_words.get_program()).chain(joey_words.get_args()).collect();
    let line = words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let piped = joey.scratch().join("piped");
    let log = joey.scratch().join("piped.log");
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{line} | tcpdump -nr - > {}", piped.display())]);
    let mut program = Program::start(&mut command, &log);
    wait_until("two packets are there", seconds(20), || {
        let _ = traffic::page(&serves, "/");
        program.ended().ok_or_else(|| std::fs::read_to_string(&log).unwrap_or_default())
    });
    let text = std::fs::read_to_string(piped).expect("it was written");
    assert_eq!(text.lines().count(), 2, "{text}");
}

#[test]
fn what_cannot_be_captured_is_said() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.joey(&["run", &registry.demo(), "--name", "web"]).ok();
    let wrong = |more: &[&str], code: i32| {
        joey.joey(&[&["diagnose", "tcpdump", "web", "-w", "/dev/null", "--duration", "1"], more].concat()).fails(code)
    };
    for (more, why) in [
        (["--protocol", "sctp"], "none of tcp, udp and icmp"),
        (["--source", "10.0.0.0/33"], "neither an address nor a range"),
        (["--host", "web"], "neither an address nor a range"),
        (["--port", "70000"], "70000"),
        (["--size", "much"], "--size"),
    ] {
        let said = wrong(&more, 2);
        assert!(said.contains(why), "{more:?}: {said}");
    }
    let said = wrong(&["--interface", "eth9"], 1);
    assert!(said.contains("no interface \"eth9\"") && said.contains("hint: the instance has: lo, eth0"), "{said}");
    assert!(wrong(&["--snap-length", "3"], 1).contains("snap length"));
    assert!(joey.joey(&["diagnose", "tcpdump", "absent", "-w", "/dev/null"]).fails(1).contains("absent"));
    let away = registry.image("joey/none:1");
    joey.joey(&["run", &away, "--name", "waits", "--detach"]).ok();
    for verb in [&["tcpdump", "waits", "-w", "/dev/null"][..], &["core", "ls", "waits"]] {
        let said = joey.joey(&[&["diagnose"], verb].concat()).fails(1);
        assert!(said.contains("no running sandbox"), "{said}");
    }
}
