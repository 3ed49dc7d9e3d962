//! Point 9: what is wrong is refused or reported with the object's name and a way out, and nothing half made stays.

use joey_tests::image::{Entry, Image, Layer, Packing};
use joey_tests::joey::pod;
use joey_tests::registry::free_address;
use joey_tests::served::Served;
use joey_tests::{Joey, Registry, Settings, holds, seconds, wait_until};
use serde_json::{Value, json};

/// What is told about a Pod that does not start: its containers' waiting reasons, its conditions and its events.
fn told(joey: &Joey, name: &str, part: &str) -> String {
    wait_until(&format!("{part} is told about Pod {name}"), seconds(60), || {
        let mut text = joey.get("pod", name)["status"].to_string();
        text += &joey.kubectl(&["describe", "pod", name]).ok();
        if text.contains(part) { Ok(text) } else { Err(text) }
    })
}

#[test]
fn images_that_cannot_be_had() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let away = free_address();
    for (name, image, part) in [
        ("unknown", registry.image("joey/nothing:1"), "joey/nothing"),
        ("untagged", registry.image("joey/hello:none"), "hello:none"),
        ("undigested", format!("{}@sha256:{}", registry.image("joey/hello"), "0".repeat(64)), "sha256:000"),
        ("away", format!("{away}/joey/hello:1"), &*away.to_string()),
    ] {
        joey.apply(&pod(name, &image, &[]));
        let text = told(&joey, name, "ErrImagePull");
        assert!(text.contains(part), "{part} in {text}");
        joey.delete_pod(name);
    }
    joey.apply(&pod("malformed", "UPPER//case", &[]));
    // Which of the checks on its way refuses it is not the point; the object and what is wrong with it are named.
    let text = told(&joey, "malformed", "UPPER//case");
    wait_until("the malformed name is refused in words", seconds(30), || {
        let text = joey.get("pod", "malformed")["status"].to_string();
        holds(text.contains("InvalidImageName") || text.contains("is not valid"), text)
    });
    assert!(text.contains("main"), "the container is named: {text}");
    joey.delete_pod("malformed");
    let error = joey.joey(&["run", &registry.image("joey/nothing:1"), "--name", "nothing"]);
    assert!(error.code != 0 || joey.joey(&["describe", "nothing"]).ok().contains("joey/nothing"));
}

#[test]
fn bytes_that_are_not_what_their_digest_says() {
    let served = Served::start();
    let joey = Joey::start();
    let layer = Layer::new(&[Entry::file("a", b"honest")], Packing::Gzip);
    let digest = layer.digest();
    let image = served.add("false:1", &Image::new(vec![layer], json!({})));
    served.falsify(&digest, Layer::new(&[Entry::file("a", b"forged")], Packing::Gzip).bytes);
    let refused = joey.joey(&["image", "pull", &image]).fails(1);
    assert!(refused.contains(&digest[..19]) || refused.contains("digest"), "{refused}");

    let torn = Layer::of_archive(&[7; 4096], Packing::Gzip);
    let refused = joey.joey(&["image", "pull", &served.add("torn:1", &Image::new(vec![torn], json!({})))]).fails(1);
    assert!(refused.contains("layer") || refused.contains("sha256:"), "{refused}");
    let images = joey.joey(&["image", "ls", "-o", "json"]).ok();
    assert!(!images.contains("false") && !images.contains("torn"), "{images}");
}

#[test]
fn hostile_layers_do_not_leave_their_root() {
    let served = Served::start();
    let joey = Joey::start();
    let mark = joey.scratch().join("mark");
    let path = mark.display().to_string();
    let up = format!("{}{}", "../".repeat(12), path.trim_start_matches('/'));
    let hostile = [
        ("absolute", vec![Entry::file(&path, b"x")]),
        ("dots", vec![Entry::file(&up, b"x")]),
        ("link", vec![Entry::symlink("out", &joey.scratch().display().to_string()), Entry::file("out/mark", b"x")]),
        ("hard", vec![Entry::hard_link("passwd", "../../../../etc/passwd")]),
        ("whiteout", vec![Entry::file("../.wh.mark", b"")]),
    ];
    for (name, entries) in hostile {
        let image = Image::new(vec![Layer::new(&entries, Packing::Gzip)], json!({}));
        let outcome = joey.joey(&["image", "pull", &served.add(&format!("{name}:1"), &image)]);
        assert!(matches!(outcome.code, 0 | 1), "{name}: {outcome:?}");
        assert!(!mark.exists(), "{name} wrote outside its root");
    }
    assert!(std::fs::metadata("/etc/passwd").is_ok());
}

#[test]
fn gigabytes_of_zeros_are_bounded() {
    let served = Served::start();
    let settings = Settings { arguments: vec!["--max-layer-bytes".into(), "64Mi".into()], ..Settings::default() };
    let joey = Joey::start_with(settings);
    let image = Image::new(vec![Layer::of_zeros("zeros", 2 << 30)], json!({}));
    let refused = joey.joey(&["image", "pull", &served.add("zeros:1", &image)]).fails(1);
    assert!(refused.contains("64") || refused.contains("larger") || refused.contains("limit"), "{refused}");
}

#[test]
fn another_architecture_is_named() {
    let served = Served::start();
    let joey = Joey::start();
    let layer = Layer::new(&[Entry::file("a", b"x")], Packing::Gzip);
    let image = served.add("arm:1", &Image::for_architecture("arm64", vec![layer], json!({})));
    let refused = joey.joey(&["image", "pull", &image]).fails(1);
    assert!(refused.contains("arm64") && refused.contains("amd64"), "{refused}");
}

#[test]
fn pods_that_may_not_be() {
    let joey = Joey::start();
    let with = |path: &str, value: Value| {
        let mut object = pod("refused", "nginx", &[]);
        *object.pointer_mut(path).unwrap_or_else(|| panic!("{path} is there")) = value;
        object
    };
    let container = |field: &str, value: Value| {
        let mut object = pod("refused", "nginx", &[]);
        object["spec"]["containers"][0][field] = value;
        object
    };
    let spec = |field: &str, value: Value| {
        let mut object = pod("refused", "nginx", &[]);
        object["spec"][field] = value;
        object
    };
    for (object, part) in [
        (with("/metadata/name", json!("Not_A_Name")), "Not_A_Name"),
        (with("/spec/containers", json!([])), "containers"),
        (container("image", json!("")), "image"),
        (container("securityContext", json!({"privileged": true})), "privileged"),
        (spec("hostNetwork", json!(true)), "hostNetwork"),
        (spec("hostPID", json!(true)), "hostPID"),
        (spec("volumes", json!([{"name": "v", "hostPath": {"path": "/"}}])), "hostPath"),
        (spec("restartPolicy", json!("Sometimes")), "restartPolicy"),
        (container("volumeMounts", json!([{"name": "absent", "mountPath": "/a"}])), "absent"),
    ] {
        let outcome = joey.kubectl_with_input(&["apply", "-f", "-"], &object.to_string());
        if outcome.code != 0 {
            assert!(outcome.stderr.contains(part), "{part} in {}", outcome.stderr);
            continue;
        }
        // Accepted by the API, it must be refused by the node, in words.
        told(&joey, "refused", part);
        joey.delete_pod("refused");
    }
    assert_eq!(joey.joey(&["ps", "-o", "json"]).json().as_array().map(Vec::len).unwrap_or(0), 0);
}

#[test]
fn a_name_that_is_taken() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.joey(&["run", &registry.demo(), "--name", "web"]).ok();
    let refused = joey.joey(&["run", &registry.demo(), "--name", "web"]).fails(1);
    assert!(refused.contains("web") && refused.contains("hint:"), "{refused}");
    joey.run_pod("web", &registry.demo(), &[]);
    let refused = joey.kubectl_with_input(&["create", "-f", "-"], &pod("web", "x", &[]).to_string()).fails(1);
    assert!(refused.contains("AlreadyExists") && refused.contains("web"), "{refused}");
}

#[test]
fn an_exhausted_range_is_told_and_heals() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start_with(Settings { range: Some(small_range()), ..Settings::default() });
    let names: Vec<_> = (0..10).map(|number| format!("n{number}")).collect();
    for name in &names {
        joey.apply(&pod(name, &registry.demo(), &[]));
    }
    let running = || {
        let list = joey.kubectl(&["get", "pods", "-o", "json"]).json();
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        pods.iter().filter(|pod| pod["status"]["phase"] == "Running").count()
    };
    wait_until("the range is full", seconds(60), || holds(running() >= 3, running()));
    // A Pod that is Pending may be about to start: the one is looked for that is told to lack an address.
    let waiting = wait_until("a Pod waits for an address", seconds(60), || {
        let list = joey.kubectl(&["get", "pods", "-o", "json"]).json();
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        let pending = pods.iter().filter(|pod| pod["status"]["phase"] == "Pending");
        let mut names = pending.filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned));
        let lacks = |name: &String| {
            let text = joey.get("pod", name).to_string() + &joey.kubectl(&["describe", "pod", name]).stdout;
            // The scheduler knows how many addresses a node has; what comes past it is refused by the network.
            text.contains("Unschedulable") || text.contains("AddressesExhausted")
        };
        names.find(lacks).ok_or_else(|| list["items"].to_string())
    });
    for name in names.iter().filter(|name| **name != waiting) {
        joey.kubectl(&["delete", "pod", name, "--wait=false"]).ok();
    }
    joey.wait_for(&waiting, "Ready", seconds(60));
}

/// Eight addresses, of which a host can give out fewer than ten.
fn small_range() -> String {
    let [a, b]: [u8; 2] = rand::random();
    format!("198.{}.{b}.0/29", 18 + (a & 1))
}

#[test]
fn nothing_half_made_stays() {
    let served = Served::start();
    let mut joey = Joey::start();
    let settled = joey.traces();
    let noexec = Layer::new(&[Entry::file("text", b"not a program")], Packing::Gzip);
    let image = served.add("noexec:1", &Image::new(vec![noexec], json!({"Cmd": ["/text"]})));
    joey.apply(&pod("noexec", &image, &[]));
    wait_until("its failure is told", seconds(30), || {
        let text = joey.get("pod", "noexec")["status"].to_string();
        let known = ["StartError", "CreateContainerError", "RunContainerError", "ContainerCannotRun"];
        holds(known.iter().any(|reason| text.contains(reason)), text)
    });
    joey.delete_pod("noexec");
    let kinds = ["process ", "cgroup ", "mount "];
    let is_root = |name: &str| name.starts_with("joey-");
    wait_until("its traces are gone", seconds(10), || {
        let now = joey.traces();
        let left: Vec<_> = now
            .difference(&settled)
            .filter(|trace| kinds.iter().any(|kind| trace.starts_with(kind)))
            // Kept for the next Pod until `joey down`: mounted layers, and the cgroup that holds those of all Pods.
            .filter(|trace| !trace.contains("/layers/"))
            .filter(|trace| !(trace.starts_with("cgroup ") && trace.rsplit('/').next().is_some_and(is_root)))
            .collect();
        holds(left.is_empty(), left)
    });
    joey.down().ok();
    assert!(joey.traces().is_empty(), "{:?}", joey.traces());
}
