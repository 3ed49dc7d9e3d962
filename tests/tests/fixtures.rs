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
