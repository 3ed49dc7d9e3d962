//! The fixtures themselves, held against programs that others made: what Joey is tested with must be right.

use std::process::Command;

use joey_tests::image::{Entry, Image, Layer, Packing, index};
use joey_tests::served::Served;
use joey_tests::{Registry, holds, run, seconds, source, wait_until};
use serde_json::json;

fn skopeo(arguments: &[&str]) -> joey_tests::Outcome {
    run(Command::new("skopeo").args(arguments))
}

#[test]
fn skopeo_and_umoci_take_hand_made_images() {
    let served = Served::start();
    let lower = Layer::new(
        &[Entry::dir("a/"), Entry::file("a/gone", b"x"), Entry::file("kept", b"kept").owner(7, 8).mode(0o4750)],
        Packing::Gzip,
    );
    let upper = Layer::new(
        &[Entry::file("a/.wh.gone", b""), Entry::hard_link("twin", "kept"), Entry::device("null", 1, 3)],
        Packing::Plain,
    );
    let image = Image::new(vec![lower, upper], json!({"Cmd": ["/kept"]}));
    let other = Image::for_architecture("riscv64", vec![], json!({}));
    served.add("hand:here", &image);
    served.add("hand:other", &other);
    let name = served.add_manifest("hand:1", index(&[("riscv64", &other), ("amd64", &image)]));
    let dir = tempfile::TempDir::with_prefix("joey-fixture-").expect("a temporary folder");
    let layout = format!("{}/layout", dir.path().display());
    skopeo(&["copy", "-q", "--src-tls-verify=false", &format!("docker://{name}"), &format!("oci:{layout}:x")]).ok();
    let root = dir.path().join("root");
    run(Command::new("umoci").args(["raw", "unpack", "--image", &format!("{layout}:x")]).arg(&root)).ok();
    assert!(!root.join("a/gone").exists());
    let stat = run(Command::new("stat").args(["-c", "%u %g %a %h"]).arg(root.join("twin"))).ok();
    assert_eq!(stat.trim(), "7 8 4750 2");
    assert!(!served.requests("/manifests/sha256:").is_empty());
}

#[test]
fn a_falsified_blob_is_refused_and_a_broken_one_noticed() {
    let served = Served::start();
    let layer = Layer::new(&[Entry::file("a", &[7; 100_000])], Packing::Zstd);
    let digest = layer.digest();
    let name = served.add("bad:1", &Image::new(vec![layer], json!({})));
    let dir = tempfile::TempDir::with_prefix("joey-fixture-").expect("a temporary folder");
    let target = format!("oci:{}/layout:x", dir.path().display());
    served.falsify(&digest, vec![1, 2, 3]);
    assert_ne!(skopeo(&["copy", "-q", "--src-tls-verify=false", &format!("docker://{name}"), &target]).code, 0);
}

#[test]
fn registries_open_and_closed() {
    let open = Registry::with_demo_image();
    assert!(open.digest("joey/hello:1").starts_with("sha256:"));
    let closed = Registry::with_password();
    let refused = skopeo(&["inspect", "--tls-verify=false", &format!("docker://{}", closed.demo())]);
    assert_ne!(refused.code, 0);
    assert_eq!(open.digest("joey/hello:1"), closed.digest("joey/hello:1"));
}

#[test]
fn waiting_ends_and_functions_are_found() {
    let begin = std::time::Instant::now();
    wait_until("a moment passes", seconds(2), || holds(begin.elapsed().as_millis() > 50, ""));
    let text = "impl A {\n    pub async fn one(\n        x: u8,\n    ) {\n        x\n    }\n}\n\nfn two() {}\n";
    let found: Vec<_> = source::functions(text).into_iter().map(|f| (f.name, f.line, f.length)).collect();
    assert_eq!(found, [("one".to_owned(), 2, 5), ("two".to_owned(), 9, 1)]);
}

#[test]
fn a_capped_rate_is_measured_as_it_is() {
    let name = joey_tests::unique("rt");
    let ip = |arguments: &str| run(Command::new("ip").args(arguments.split(' '))).ok();
    let _guard = Namespace(name.clone());
    ip(&format!("netns add {name}"));
    ip(&format!("link add {name} type veth peer name eth0 netns {name}"));
    ip(&format!("addr add 198.51.100.1/30 dev {name}"));
    ip(&format!("link set {name} up"));
    ip(&format!("-n {name} addr add 198.51.100.2/30 dev eth0"));
    ip(&format!("-n {name} link set eth0 up"));
    for command in [format!("qdisc add dev {name}"), format!("-n {name} qdisc add dev eth0")] {
        let cap = format!("{command} root tbf rate 5mbit burst 16kb latency 50ms");
        run(Command::new("tc").args(cap.split(' '))).ok();
    }
    let busybox = joey_tests::repository().join(".tools/demo-files/root/bin/busybox");
    let log = tempfile::NamedTempFile::new().expect("a temporary file");
    let start = |arguments: &str| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &name]).arg(&busybox).args(arguments.split(' '));
        joey_tests::Program::start(&mut command, log.path())
    };
    let _ends = [start("nc -ll -p 9000 -e cat /dev/zero"), start("nc -ll -p 9001 -e dd of=/dev/null")];
    let reach = |port| std::net::TcpStream::connect(format!("198.51.100.2:{port}")).map(drop);
    wait_until("both ends listen", seconds(5), || {
        reach(9000).and_then(|()| reach(9001)).map_err(|error| error.to_string())
    });
    let out = joey_tests::traffic::receive_rate("198.51.100.2:9000", seconds(3)) / 1e6;
    let into = joey_tests::traffic::send_rate("198.51.100.2:9001", seconds(3)) / 1e6;
    assert!((4.0..5.3).contains(&out) && (4.0..5.3).contains(&into), "{out} Mbit/s came, {into} went");
}

/// A network namespace and the interface that leads to it.
struct Namespace(String);

impl Drop for Namespace {
    fn drop(&mut self) {
        // What a server has started for a connection outlives it.
        let inside = Command::new("ip").args(["netns", "pids", &self.0]).output();
        let inside = inside.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        for pid in inside.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
        let _ = Command::new("ip").args(["link", "del", &self.0]).output();
    }
}
