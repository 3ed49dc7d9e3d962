//! What stacking an image's layers may cost: in looks, in bytes, and for others. Root is needed for mounts; where it is
//! missing these tests say so and pass.

mod registry;

use std::path::Path;
use std::time::{Duration, Instant};

use joey_image::{Config, Images, Problem};
use joey_model::ImageRef;
use registry::{Answer, Layer, Registry, sha256};

async fn open(dir: &Path, change: impl FnOnce(&mut Config)) -> Images {
    let mut config = Config::new(dir.join("images"), dir.join("layers"));
    change(&mut config);
    Images::open(config).await.unwrap()
}

fn reference(registry: &Registry, tag: &str) -> ImageRef {
    ImageRef::parse(&format!("{}/team/app:{tag}", registry.address)).unwrap()
}

fn files(dir: &Path, folder: &str) -> usize {
    std::fs::read_dir(dir.join("images").join(folder)).unwrap().count()
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: root is needed to mount");
    }
    root
}

/// Thousands of directories it does not list, each a link below, each to a path of two thousand parts.
fn tangled() -> [registry::Built; 2] {
    let (mut lower, mut upper) = (Layer::new(), Layer::new());
    let deep = "a/".repeat(49);
    lower.directory(&deep, 0o755, (0, 0));
    for number in 0..3000 {
        lower.symlink(&format!("p{number}"), &format!("{}q", "a/../".repeat(18)));
        upper.file(&format!("p{number}/f"), b"", 0o644, (0, 0));
    }
    lower.symlink("q", "r0");
    for number in 0..38 {
        lower.symlink(&format!("r{number}"), &format!("{deep}../../{}r{}", "../".repeat(60), number + 1));
    }
    lower.symlink("r38", &deep);
    [lower.gzip(), upper.gzip()]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tangled_image_is_refused_and_holds_up_nobody() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    registry.image("tangled", &tangled());
    let mut plain = Layer::new();
    plain.file("a", b"a", 0o644, (0, 0));
    registry.image("plain", &[plain.gzip()]);
    let images = open(dir.path(), |_| {}).await;
    let name = reference(&registry, "tangled");
    let image = images.pull(&name, &[], |_| {}).await.unwrap();

    let mount = tokio::spawn({
        let (images, image) = (images.clone(), image.clone());
        async move { images.mount(&image).await }
    });
    let writing = Instant::now();
    while files(dir.path(), "tmp") == 0 {
        assert!(writing.elapsed() < Duration::from_secs(20) && !mount.is_finished(), "the work has begun");
        tokio::task::yield_now().await;
    }
    let other = images.pull(&reference(&registry, "plain"), &[], |_| {}).await.unwrap();
    images.mount(&other).await.unwrap();
    images.remove(&other.reference.to_string(), &[]).await.unwrap();
    assert!(!mount.is_finished(), "others went on meanwhile");

    // Whoever wants the same waits; who no longer does is not worked for.
    let started = Instant::now();
    assert!(tokio::time::timeout(Duration::from_millis(10), images.mount(&image)).await.is_err());
    mount.abort();
    while files(dir.path(), "tmp") > 0 {
        assert!(started.elapsed() < Duration::from_secs(5), "it is given up");
        tokio::task::yield_now().await;
    }
    let started = Instant::now();
    let error = images.mount(&image).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    assert!(matches!(error.problem, Problem::Tangled { .. }), "{error}");
    assert!(error.to_string().contains(&name.to_string()) && error.to_string().contains("looks"), "{error}");
    assert!(joey_model::Fault::from(&error).hint.is_some());
    images.remove(&name.to_string(), &[]).await.unwrap();
    assert_eq!((files(dir.path(), "layers"), files(dir.path(), "tmp")), (0, 0));
    images.unmount_all().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_behind_links_count_as_the_image_s_own() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let big: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
    let (mut lower, mut upper) = (Layer::new(), Layer::new());
    lower.directory("usr/lib", 0o755, (0, 0));
    lower.symlink("lib", "usr/lib");
    upper.file("lib/big", &big, 0o644, (0, 0));
    registry.image("1", &[lower.gzip(), upper.gzip()]);
    let name = reference(&registry, "1");

    let images = open(dir.path(), |_| {}).await;
    let image = images.pull(&name, &[], |_| {}).await.unwrap();
    assert_eq!(images.list()[0].size, image.size);
    images.mount(&image).await.unwrap();
    let size = images.list()[0].size;
    assert!(size > image.size + 3_000_000 && size < image.size + 3_200_000, "{size} for {}", image.size);
    assert_eq!(images.summary(&image).size, size);
    images.remove(&name.to_string(), &[]).await.unwrap();
    assert_eq!(files(dir.path(), "layers"), 0);

    let images = open(dir.path(), |config| config.max_image_bytes = 5_000_000).await;
    let image = images.pull(&name, &[], |_| {}).await.unwrap();
    let error = images.mount(&image).await.unwrap_err();
    assert_eq!(error.problem, Problem::ImageTooLarge { limit: 5_000_000 });
    assert_eq!((files(dir.path(), "tmp"), images.list()[0].size), (0, image.size));
    images.remove(&name.to_string(), &[]).await.unwrap();
    assert_eq!(files(dir.path(), "layers"), 0);
    images.unmount_all().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_may_hide_all_below_it() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let (mut lower, mut upper) = (Layer::new(), Layer::new());
    lower.file("old", b"", 0o644, (0, 0));
    upper.file(".wh..wh..opq", b"", 0, (0, 0));
    upper.file("new", b"", 0o644, (0, 0));
    registry.image("1", &[lower.gzip(), upper.gzip()]);
    let images = open(dir.path(), |_| {}).await;
    let image = images.pull(&reference(&registry, "1"), &[], |_| {}).await.unwrap();
    let mounts = images.mount(&image).await.unwrap();
    assert_eq!(mounts.len(), 1, "{mounts:?}");
    assert!(mounts[0].folder.join("new").exists());
    images.unmount_all().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_given_up_leave_what_the_next_can_trust() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let noise: Vec<u8> = (0..6_000_000u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8).collect();
    let mut layer = Layer::new();
    layer.file("noise", &noise, 0o644, (0, 0));
    let built = layer.plain();
    let path = format!("/v2/team/app/blobs/{}", sha256(&built.blob));
    registry.image("1", std::slice::from_ref(&built));
    let images = open(dir.path(), |_| {}).await;
    let name = reference(&registry, "1");
    for part in 1..=12 {
        // So much that the thread that writes is behind when its pull goes away.
        registry.set(&path, Answer::HangAfter(built.blob.clone(), built.blob.len() * part / 14));
        let goal = (built.blob.len() * part / 14) as u64;
        let reached = tokio::sync::Notify::new();
        let pull = images.pull(&name, &[], |event| {
            if let joey_api::image::PullEvent::Layer { done, .. } = event
                && done >= goal
            {
                reached.notify_one();
            }
        });
        tokio::select! {
            ended = pull => panic!("{ended:?}"),
            () = reached.notified() => {}
            () = tokio::time::sleep(Duration::from_secs(20)) => panic!("part {part} does not come"),
        }
    }
    registry.set(&path, Answer::Body(built.blob.clone()));
    images.pull(&name, &[], |_| {}).await.unwrap();
    let starts = registry.ranges(&path);
    assert!(starts.len() >= 13 && starts[1..].is_sorted() && starts[1] > 0, "nothing was fetched anew: {starts:?}");
    assert_eq!((files(dir.path(), "partial"), files(dir.path(), "tmp")), (0, 0));
}
