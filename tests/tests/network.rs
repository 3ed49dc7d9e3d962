//! Point 7: addresses, who reaches whom, and bandwidth.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use joey_tests::joey::pod;
use joey_tests::{Joey, Registry, run, seconds, traffic, wait_until};
use serde_json::json;

/// A Pod that gives zeros on port 9000 to whoever connects, and takes what comes on port 9001.
const ENDS: &str = "nc -ll -p 9000 -e cat /dev/zero & nc -ll -p 9001 -e sh -c 'cat >/dev/null' & wait";

fn address(joey: &Joey, pod: &str) -> String {
    joey.get("pod", pod)["status"]["podIP"].as_str().expect("a running Pod has an address").to_owned()
}

#[test]
fn everyone_is_reached_who_should_be() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.run_pod("one", &registry.demo(), &[]);
    joey.run_pod("two", &registry.demo(), &[]);
    let (one, two) = (address(&joey, "one"), address(&joey, "two"));
    assert_ne!(one, two);
    let prefix = joey.range().rsplit_once('.').expect("a range has dots").0.to_owned();
    assert!(one.starts_with(&prefix) && two.starts_with(&prefix), "{one} {two} in {}", joey.range());
    // Host to Pod, Pod to Pod.
    wait_until("it serves", seconds(5), || traffic::page(&format!("{one}:80"), "/"));
    let fetched = joey.kubectl(&["exec", "one", "--", "timeout", "5", "wget", "-qO-", &format!("http://{two}/")]).ok();
    assert!(fetched.contains("Hello from Joey"));
    // What a Pod calls itself is its address.
    assert!(joey.kubectl(&["exec", "one", "--", "ip", "addr"]).ok().contains(&one));
    assert!(joey.kubectl(&["exec", "one", "--", "cat", "/etc/hosts"]).ok().contains(&one));
}

#[test]
fn outside_is_reached_through_nat_and_a_false_source_is_not_heard() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.run_pod("out", &registry.demo(), &["sleep", "1000"]);
    // "Outside" is a network namespace behind an interface of the host, with no route back to the Pods' range.
    let outside = Outside::new();
    let server = outside.serve();
    let fetch = format!("timeout 5 wget -qO- http://{server}/");
    let seen = wait_until("outside answers", seconds(10), || {
        let outcome = joey.kubectl(&["exec", "out", "--", "sh", "-c", &fetch]);
        if outcome.code == 0 { Ok(outcome.stdout) } else { Err(outcome.stderr) }
    });
    assert_eq!(seen.trim(), outside.host, "outside sees the host's address");
    let forged = "ip addr add 198.51.100.7/32 dev eth0 && ping -c 1 -W 1 -I 198.51.100.7 ";
    assert_ne!(joey.kubectl(&["exec", "out", "--", "sh", "-c", &format!("{forged}{}", outside.host)]).code, 0);
}

/// A neighbour of the host: a namespace joined to it by a pair of interfaces.
struct Outside {
    name: String,
    host: String,
    address: String,
}

impl Outside {
    fn new() -> Self {
        let name = joey_tests::unique("out");
        let octet = rand::random::<u8>();
        let (host, address) = (format!("192.0.2.{}", octet & 0xfc | 1), format!("192.0.2.{}", octet & 0xfc | 2));
        let ip = |arguments: &str| run(Command::new("ip").args(arguments.split(' '))).ok();
        ip(&format!("netns add {name}"));
        ip(&format!("link add {name} type veth peer name eth0 netns {name}"));
        ip(&format!("addr add {host}/30 dev {name}"));
        ip(&format!("link set {name} up"));
        ip(&format!("-n {name} addr add {address}/30 dev eth0"));
        ip(&format!("-n {name} link set eth0 up"));
        Self { name, host, address }
    }

    /// Starts a server there that answers each caller with the caller's address.
    fn serve(&self) -> String {
        let (namespace, address) = (format!("/run/netns/{}", self.name), format!("{}:80", self.address));
        let server = std::thread::spawn(move || {
            let namespace = std::fs::File::open(namespace).expect("the namespace is there");
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("root enters namespaces");
            // A thread's children and sockets belong to the namespace it is in.
            traffic::mirror(&address)
        });
        server.join().expect("the server starts");
        self.address.clone()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
        let _ = Command::new("ip").args(["link", "del", &self.name]).output();
    }
}

#[test]
fn five_megabits_each_way() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    joey.joey(&["run", &image, "--name", "capped", "--bandwidth", "5M", "--command", "sh", "--", "-c", ENDS]).ok();
    measure(&address_of_instance(&joey, "capped"), 5e6);
}

fn address_of_instance(joey: &Joey, name: &str) -> String {
    wait_until("it has an address", seconds(30), || {
        let instance = joey.joey(&["describe", name, "-o", "json"]).json();
        instance["status"]["address"].as_str().map(str::to_owned).ok_or_else(|| instance.to_string())
    })
}

#[test]
fn faster_caps_hold_too() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    for (cap, rate, tries) in [("100M", 1e8, 1), ("1G", 1e9, 5)] {
        joey.joey(&["run", &image, "--name", "fast", "--bandwidth", cap, "--command", "sh", "--", "-c", ENDS]).ok();
        measure_tries(&address_of_instance(&joey, "fast"), rate, tries);
        joey.joey(&["rm", "fast", "--force"]).ok();
    }
}

#[test]
fn the_annotations_cap_too() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let mut object = pod("annotated", &registry.demo(), &["sh", "-c", ENDS]);
    object["metadata"]["annotations"] =
        json!({"kubernetes.io/ingress-bandwidth": "20M", "kubernetes.io/egress-bandwidth": "20M"});
    joey.apply(&object);
    // A neighbour that takes all the machine gives it: both cores, and its network, without a cap.
    joey.apply(&pod(
        "noise",
        &registry.demo(),
        &["sh", "-c", &format!("while :; do :; done & while :; do :; done & {ENDS}")],
    ));
    for name in ["annotated", "noise"] {
        joey.wait_for(name, "Ready", seconds(30));
    }
    let noise = address(&joey, "noise");
    let flows = ["9000", "9001"].map(|port| {
        let end = format!("{noise}:{port}");
        wait_until("the neighbour listens", seconds(10), || {
            std::net::TcpStream::connect(&end).map(drop).map_err(|error| error.to_string())
        });
        end
    });
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // As long as something is measured, also when that fails.
        let _ends = Ends(&over);
        let meanwhile = |rate: fn(&str, Duration) -> f64, flow| {
            let over = &over;
            move || {
                while !over.load(Ordering::Relaxed) {
                    rate(flow, seconds(2));
                }
            }
        };
        scope.spawn(meanwhile(traffic::receive_rate, &flows[0]));
        scope.spawn(meanwhile(traffic::send_rate, &flows[1]));
        measure_tries(&address(&joey, "annotated"), 20e6, 3);
    });
}

/// Says that something is over when it is dropped.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Each direction alone and both at once, within a tenth of the cap.
fn measure(address: &str, cap: f64) {
    measure_tries(address, cap, 1);
}

/// As `measure`; never above the cap, and up to it in one of so many tries: of rates that are near what two cores can, what else the
/// machine does takes some.
fn measure_tries(address: &str, cap: f64, tries: u32) {
    wait_until("both ends listen", seconds(10), || {
        let reach = |port| std::net::TcpStream::connect(format!("{address}:{port}")).map(drop);
        reach(9000).and_then(|()| reach(9001)).map_err(|error| error.to_string())
    });
    let out = || traffic::receive_rate(&format!("{address}:9000"), seconds(4));
    let into = || traffic::send_rate(&format!("{address}:9001"), seconds(4));
    let alone = || (out(), into());
    let both = || {
        std::thread::scope(|scope| {
            let out = scope.spawn(out);
            let into = into();
            (out.join().expect("a measurement does not panic"), into)
        })
    };
    reaches("alone", cap, tries, alone);
    reaches("both at once", cap, tries, both);
}

fn reaches(when: &str, cap: f64, tries: u32, rates: impl Fn() -> (f64, f64)) {
    let mut seen = Vec::new();
    for _ in 0..tries {
        let (out, into) = rates();
        seen.push(format!("{:.2} Mbit/s out of the Pod, {:.2} into it", out / 1e6, into / 1e6));
        assert!(out.max(into) < cap * 1.1, "{when}: {seen:?}");
        if out.min(into) > cap * 0.9 {
            return;
        }
    }
    panic!("{when}: {seen:?}");
}
