//! Point 5: each limit is held within 10 % while a neighbour takes whatever it can get. Bandwidth is in `network`.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use joey_tests::host::cgroup;
use joey_tests::joey::pod;
use joey_tests::{Joey, Registry, holds, run, seconds, wait_until};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use serde_json::{Value, json};

/// Keeps both cores, the disk and the memory of a cgroup busy.
const NOISE: &str = "while :; do :; done & while :; do :; done & \
                     while :; do dd if=/dev/zero of=/noise bs=64k count=64 oflag=direct 2>/dev/null; done";

fn within(what: &str, found: f64, wanted: f64) {
    let part = found / wanted;
    assert!((0.9..=1.1).contains(&part), "{what}: {found:.1} is {:.0} % of {wanted:.1}", part * 100.0);
}

/// A number in the cgroup of one of a Pod's containers, by its file of version 1 or 2.
fn number(joey: &Joey, pod: &str, container: &str, files: [(&str, &str, &str); 2]) -> u64 {
    let id = joey.instance_of(pod)["id"].as_str().expect("an instance has an id").to_owned();
    let unified = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let (controller, file, field) = files[usize::from(unified)];
    let place: PathBuf = cgroup(&id, controller, container).unwrap_or_else(|| panic!("{pod} has no {container}"));
    let text = std::fs::read_to_string(place.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    let line = text.lines().find(|line| line.starts_with(field)).unwrap_or_default();
    line.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{file}: {text}"))
}

fn with(mut object: Value, annotations: Value, resources: Value) -> Value {
    object["metadata"]["annotations"] = annotations;
    object["spec"]["containers"][0]["resources"] = resources;
    object
}

/// A Joey with one Pod that has no limits and no mercy.
fn noisy() -> (Registry, Joey) {
    let (registry, joey) = (Registry::with_demo_image(), Joey::start());
    joey.run_pod("noise", &registry.demo(), &["sh", "-c", NOISE]);
    (registry, joey)
}

#[test]
fn cpu_memory_and_processes() {
    let (registry, joey) = noisy();
    let image = registry.demo();
    let none = json!({});
    let busy = pod("busy", &image, &["sh", "-c", "while :; do :; done & while :; do :; done"]);
    joey.apply(&with(busy, none.clone(), json!({"limits": {"cpu": "300m"}})));
    // The whole Pod has the limit, whichever container wants it.
    let mut both = pod("both", &image, &["sh", "-c", "while :; do :; done"]);
    let second = json!({"name": "second", "image": image, "command": ["sh", "-c", "while :; do :; done"]});
    both["spec"]["containers"].as_array_mut().expect("a list").push(second);
    both["spec"]["resources"] = json!({"limits": {"cpu": "400m"}});
    joey.apply(&both);
    for name in ["busy", "both"] {
        joey.wait_for(name, "Ready", seconds(30));
    }
    let files = [("cpuacct", "cpuacct.usage", ""), ("", "cpu.stat", "usage_usec")];
    let unit = if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() { 1e6 } else { 1e9 };
    let used = |pod: &str, container: &str| number(&joey, pod, container, files) as f64 / unit;
    // Never more than the limit; all of it as soon as the machine does nothing else of weight.
    let shares = wait_until("both have what they may have", seconds(30), || {
        let (begin, first) = (Instant::now(), (used("busy", "main"), used("both", "containers")));
        wait_until("two seconds pass", seconds(3), || holds(begin.elapsed() >= seconds(2), ""));
        let elapsed = begin.elapsed().as_secs_f64();
        let part = |now: f64, before: f64, limit: f64| (now - before) / elapsed / limit;
        let parts = [part(used("busy", "main"), first.0, 0.3), part(used("both", "containers"), first.1, 0.4)];
        assert!(
            parts.iter().all(|part| *part <= 1.1),
            "cores of a container and of a Pod, as parts of their limits: {parts:?}"
        );
        if parts.iter().all(|part| *part >= 0.9) { Ok(parts) } else { Err(format!("{parts:?}")) }
    });
    println!("cores of a container and of a Pod, as parts of their limits: {shares:?}");

    let greedy = pod("greedy", &image, &["sh", "-c", "tail -c 200m /dev/zero; sleep 1000"]);
    joey.apply(&with(greedy, none, json!({"limits": {"memory": "64Mi"}})));
    let peak = wait_until("it is killed for memory", seconds(30), || {
        let files = [("memory", "memory.max_usage_in_bytes", ""), ("", "memory.peak", "")];
        let kills = [("memory", "memory.oom_control", "oom_kill "), ("", "memory.events", "oom_kill ")];
        let status = joey.get("pod", "greedy")["status"].clone();
        holds(status["containerStatuses"][0]["containerID"].is_string(), &status)?;
        holds(number(&joey, "greedy", "main", kills) > 0, "no kill")?;
        Ok(number(&joey, "greedy", "main", files))
    });
    within("bytes of memory", peak as f64, (64 << 20) as f64);

    // A shell that cannot fork ends, what it started goes on.
    let bomb = "sh -c 'i=0; while [ $i -lt 200 ]; do sleep 1000 & i=$((i+1)); done'; exec sleep 1000";
    let mut many = with(pod("many", &image, &["sh", "-c", bomb]), json!({"joey.dev/pids": "50"}), json!({}));
    let second = json!({"name": "second", "image": image, "command": ["sh", "-c", bomb]});
    many["spec"]["containers"].as_array_mut().expect("a list").push(second);
    many["spec"]["restartPolicy"] = json!("Always");
    joey.apply(&many);
    let files = [("pids", "pids.current", ""), ("", "pids.current", "")];
    let peak = AtomicU64::new(0);
    wait_until("it has all it may have", seconds(15), || {
        let status = joey.get("pod", "many")["status"].clone();
        holds(status["containerStatuses"][0]["containerID"].is_string(), &status)?;
        let now = number(&joey, "many", "containers", files);
        peak.fetch_max(now, Ordering::Relaxed);
        holds(now >= 48, now)
    });
    within("processes", peak.load(Ordering::Relaxed) as f64, 50.0);
    assert_eq!(joey.kubectl(&["exec", "noise", "--", "sh", "-c", "true & wait; echo fine"]).ok(), "fine\n");
}

/// Megabytes a second, or operations a second, of a `dd` in a Pod, by the machine's clock.
fn disk_rate(joey: &Joey, pod: &str, count: f64, dd: &str) -> f64 {
    let script = format!("read a x </proc/uptime; dd {dd} 2>/dev/null || exit 1; read b x </proc/uptime; echo $a $b");
    let text = joey.kubectl(&["exec", pod, "--", "sh", "-c", &script]).ok();
    let times: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    count / (times[1] - times[0])
}

#[test]
fn disk() {
    let (registry, joey) = noisy();
    let image = registry.demo();
    let mut slow =
        with(pod("slow", &image, &["sleep", "1000"]), json!({"joey.dev/disk-bytes-per-second": "8Mi"}), json!({}));
    slow["spec"]["volumes"] = json!([{"name": "v", "emptyDir": {}}]);
    slow["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
    joey.apply(&slow);
    slow["metadata"]["name"] = json!("few");
    slow["metadata"]["annotations"] = json!({"joey.dev/disk-operations-per-second": "100"});
    joey.apply(&slow);
    // The same with a disk of its own.
    slow["metadata"]["name"] = json!("own");
    let (slowly, room) =
        (json!({"joey.dev/disk-bytes-per-second": "8Mi"}), json!({"limits": {"ephemeral-storage": "256Mi"}}));
    joey.apply(&with(slow, slowly, room));
    for name in ["slow", "few", "own"] {
        joey.wait_for(name, "Ready", seconds(30));
    }
    let mib = |pod: &str, dd: &str| disk_rate(&joey, pod, 24.0, dd);
    within("MiB written a second", mib("slow", "if=/dev/zero of=/v/f bs=256k count=96 oflag=direct"), 8.0);
    within("MiB read a second", mib("slow", "if=/v/f of=/dev/null bs=256k count=96 iflag=direct"), 8.0);
    within("MiB written a second into the root", mib("slow", "if=/dev/zero of=/f bs=256k count=96 oflag=direct"), 8.0);
    for (place, what) in [("/f", "root"), ("/v/f", "volume")] {
        let rate = mib("own", &format!("if=/dev/zero of={place} bs=256k count=96 oflag=direct"));
        within(&format!("MiB written a second into the {what} on a disk of its own"), rate, 8.0);
    }
    let operations = |dd: &str| disk_rate(&joey, "few", 250.0, dd);
    joey.kubectl(&["exec", "few", "--", "sh", "-c", "dd if=/dev/zero of=/v/f bs=1M count=4; sync /v/f"]).ok();
    let written = operations("if=/dev/zero of=/v/f bs=4k count=250 oflag=direct conv=notrunc");
    within("operations a second", written, 100.0);
}

#[test]
fn what_a_pod_leaves_on_the_disk() {
    const LIMIT: u64 = 96;
    let (registry, joey) = noisy();
    // As fast as it can, into its root and into a volume; what is removed and still open takes room like all else.
    let writer = |name: &str, script: &str| {
        let mut object = pod(name, &registry.demo(), &["sh", "-c", &format!("{script}; sleep 1000")]);
        object["spec"]["volumes"] = json!([{"name": "v", "emptyDir": {}}]);
        object["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
        joey.apply(&with(object, json!({}), json!({"limits": {"ephemeral-storage": format!("{LIMIT}Mi")}})));
    };
    writer("greedy", "head -c 1024m /dev/zero > /v/f; head -c 1024m /dev/zero > /f");
    writer(
        "sly",
        "exec 3>/gone; rm /gone; head -c 48m /dev/zero >&3; dd if=/dev/zero of=/v/f bs=64k; \
         echo $((48 * 1048576 + $(stat -c %s /v/f)))",
    );
    let status = wait_until("it is evicted", seconds(60), || {
        let status = joey.get("pod", "greedy")["status"].clone();
        holds(status["phase"] == "Failed", &status).map(|()| status)
    });
    assert_eq!(status["reason"], "Evicted", "{status}");
    let log = wait_until("there is no room left", seconds(60), || {
        let log = joey.kubectl(&["logs", "sly"]).ok();
        holds(log.lines().last().is_some_and(|line| line.parse::<u64>().is_ok()), &log).map(|()| log)
    });
    assert!(log.contains("No space left on device"), "{log}");
    let written: u64 = log.lines().last().and_then(|line| line.parse().ok()).expect("a figure");
    let taken = |pod: &str| {
        let id = joey.instance_of(pod)["id"].as_str().expect("an instance has an id").to_owned();
        let file = joey.data().join("instances").join(id).join("disk.img");
        std::fs::metadata(file).expect("it has a disk of its own").blocks() * 512
    };
    for (what, bytes) in
        [("written", written), ("of the host's disk", taken("sly")), ("and by the other", taken("greedy"))]
    {
        println!("{what}: {} MiB of {LIMIT}", bytes >> 20);
        assert!((LIMIT << 20..=(LIMIT << 20) * 11 / 10).contains(&bytes), "{what}: {bytes} of {LIMIT} MiB");
    }
    for name in ["sly", "noise"] {
        assert_eq!(joey.get("pod", name)["status"]["phase"], "Running", "{name} goes on");
    }
}

/// Echo requests to an address, about ten thousand a second, until told to stop; who answers is counted.
struct Flood {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Flood {
    fn of(address: Ipv4Addr) -> Self {
        let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp);
        let sender = UdpSocket::from(raw.expect("root opens raw sockets"));
        let receiver = sender.try_clone().expect("a socket can be shared");
        receiver.set_read_timeout(Some(Duration::from_millis(50))).expect("a deadline can be set");
        let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stops, counted) = ((stop.clone(), stop.clone()), answers.clone());
        let send = std::thread::spawn(move || {
            // Type 8, code 0, the sum of the four words that follow, identifier and sequence.
            let packet = [8, 0, 0xe6, 0xfd, 0x11, 0x02, 0, 0];
            while !stops.0.load(Ordering::Relaxed) {
                let begin = Instant::now();
                for _ in 0..50 {
                    let _ = sender.send_to(&packet, (address, 0));
                }
                while begin.elapsed() < Duration::from_millis(5) {
                    std::thread::yield_now();
                }
            }
        });
        let receive = std::thread::spawn(move || {
            let mut packet = [0; 256];
            while !stops.1.load(Ordering::Relaxed) {
                if let Ok((length, from)) = receiver.recv_from(&mut packet)
                    && from.ip() == std::net::IpAddr::V4(address)
                    && packet[..length].get(20) == Some(&0)
                {
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self { stop, answers, threads: vec![send, receive] }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[test]
fn packets_each_way() {
    let (registry, joey) = (Registry::with_demo_image(), Joey::start());
    let image = registry.demo();
    let mut address = std::collections::HashMap::new();
    for (name, annotations) in [
        ("noise", json!({})),
        ("into", json!({"joey.dev/ingress-packets-per-second": "1k"})),
        ("out", json!({"joey.dev/egress-packets-per-second": "1k", "kubernetes.io/egress-bandwidth": "100M"})),
    ] {
        joey.apply(&with(pod(name, &image, &["sleep", "1000"]), annotations, json!({})));
        let pod = joey.wait_for(name, "Ready", seconds(30));
        let text = pod["status"]["podIP"].as_str().expect("a running Pod has an address").to_owned();
        address.insert(name, text.parse::<Ipv4Addr>().expect("it is one"));
    }
    // Packets that went to the Pod, as the host's end of its pair counts them.
    let received = |pod: &str| -> u64 {
        let route = run(Command::new("ip").args(["-o", "route", "get", &address[pod].to_string()])).ok();
        let words: Vec<&str> = route.split_whitespace().collect();
        let device = words.iter().position(|word| *word == "dev").map(|at| words[at + 1]).expect("it has a route");
        let count = std::fs::read_to_string(format!("/sys/class/net/{device}/statistics/tx_packets"));
        count.expect("interfaces count").trim().parse().expect("a number")
    };
    let over = |what: &str, mut count: Box<dyn FnMut() -> u64 + '_>| -> f64 {
        let warm = Instant::now();
        wait_until("the bucket is empty", seconds(1), || holds(warm.elapsed() >= Duration::from_millis(300), what));
        let (begin, first) = (Instant::now(), count());
        wait_until("three seconds pass", seconds(4), || holds(begin.elapsed() >= seconds(3), what));
        (count() - first) as f64 / begin.elapsed().as_secs_f64()
    };
    let _noise = Flood::of(address["noise"]);
    let flood = Flood::of(address["into"]);
    within("packets in", over("in", Box::new(|| received("into"))), 1000.0);
    drop(flood);
    let flood = Flood::of(address["out"]);
    within("packets out", over("out", Box::new(|| flood.answers.load(Ordering::Relaxed))), 1000.0);
    let before = received("noise");
    wait_until("the neighbour is not held", seconds(2), || {
        let now = received("noise") - before;
        holds(now > 3000, now)
    });
}
