//! Pulls from a registry that lies, and what the stored layers look like when mounted. Root is needed for mounts; where it
//! is missing those tests say so and pass.

mod registry;

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use joey_image::{Config, Images, Problem};
use joey_model::ImageRef;
use registry::{Answer, Layer, Registry, sha256};

async fn open(dir: &Path) -> Images {
    let mut config = Config::new(dir.join("images"), dir.join("layers"));
    config.idle_timeout = Duration::from_millis(400);
    config.max_layer_bytes = 8 << 20;
    Images::open(config).await.unwrap()
}

fn reference(registry: &Registry, tag: &str) -> ImageRef {
    ImageRef::parse(&format!("{}/team/app:{tag}", registry.address)).unwrap()
}

fn stored_files(dir: &Path, folder: &str) -> usize {
    std::fs::read_dir(dir.join("images").join(folder)).unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_keeps_everything() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let big: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
    let mut layer = Layer::new();
    layer.file("bin/su", b"#!", 0o4755, (0, 0));
    layer.file("data/big", &big, 0o640, (1000, 4_000_000));
    layer.file("data/zeros", &vec![0; 100_000], 0o644, (0, 0));
    layer.link("data/same", "data/big");
    layer.symlink("data/link", "../../etc/passwd");
    layer.device("dev/null", b'3', (1, 3));
    layer.device("pipe", b'6', (0, 0));
    layer.pax(&[("SCHILY.xattr.user.colour", b"gr\0een"), ("mtime", b"1700000000.5")]);
    layer.file("attributed", b"x", 0o600, (7, 8));
    layer.file(&format!("deep/{}", "long-name/".repeat(30).trim_end_matches('/')), b"y", 0o644, (0, 0));
    for n in 0..1500 {
        layer.file(&format!("many/entry-{n:05}"), format!("{n}").as_bytes(), 0o644, (0, 0));
    }
    layer.file("many/!first", b"", 0o644, (0, 0));
    layer.file(".wh.gone", b"", 0, (0, 0));
    layer.file("opaque/.wh..wh..opq", b"", 0, (0, 0));
    registry.image("1", &[layer.gzip()]);
    let images = open(dir.path()).await;
    let image = images.pull(&reference(&registry, "1"), &[], |_| {}).await.unwrap();
    let file = dir.path().join(format!("images/layers/{}.erofs", image.layers[0].hex()));
    match std::process::Command::new("fsck.erofs").arg(&file).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(_) => eprintln!("SKIPPED: fsck.erofs (erofs-utils) is needed to check the image"),
    }
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("SKIPPED: root is needed to mount");
    }
    let mounts = images.mount(&image).await.unwrap();
    let root = &mounts[0].folder;
    let stat = |path: &str| std::fs::symlink_metadata(root.join(path)).unwrap();
    assert_eq!(stat("bin/su").permissions().mode(), 0o104_755);
    assert_eq!((stat("data/big").uid(), stat("data/big").gid(), stat("data/big").nlink()), (1000, 4_000_000, 2));
    assert_eq!(stat("data/big").ino(), stat("data/same").ino());
    assert!(std::fs::read(root.join("data/same")).unwrap() == big);
    assert!(std::fs::read(root.join("data/zeros")).unwrap() == vec![0; 100_000]);
    assert_eq!(std::fs::read_link(root.join("data/link")).unwrap(), Path::new("../../etc/passwd"));
    assert!(stat("dev/null").file_type().is_char_device() && stat("dev/null").rdev() == 0x103);
    assert!(stat("pipe").file_type().is_fifo());
    assert_eq!((stat("attributed").mtime(), stat("attributed").mtime_nsec()), (1_700_000_000, 500_000_000));
    let deep = format!("deep/{}", "long-name/".repeat(30));
    assert_eq!(std::fs::read(root.join(deep.trim_end_matches('/'))).unwrap(), b"y");
    assert_eq!(std::fs::read_dir(root.join("many")).unwrap().count(), 1501);
    for n in (0..1500).step_by(13) {
        assert_eq!(std::fs::read_to_string(root.join(format!("many/entry-{n:05}"))).unwrap(), n.to_string());
    }
    assert!(stat("gone").file_type().is_char_device() && stat("gone").rdev() == 0);
    assert!(stat(".").nlink() > 5 && stat(".").ino() != 0);
    let xattr = |path: &str, name: &str| {
        let output = std::process::Command::new("python3")
            .args(["-c", "import os,sys;sys.stdout.buffer.write(os.getxattr(sys.argv[1],sys.argv[2]))"])
            .args([root.join(path).as_os_str(), name.as_ref()])
            .output();
        output.unwrap().stdout
    };
    assert_eq!(xattr("attributed", "user.colour"), b"gr\0een");
    assert_eq!(xattr("opaque", "trusted.overlay.opaque"), b"y");

    // Another process finds the mounts and mounts nothing twice.
    let again = open(dir.path()).await;
    let found = again.find(&reference(&registry, "1")).await.unwrap();
    assert_eq!(again.mount(&found).await.unwrap(), mounts);
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let point = mounts[0].folder.to_str().unwrap();
    assert_eq!(table.lines().filter(|line| line.split(' ').nth(4) == Some(point)).count(), 1);
    let started = std::time::Instant::now();
    for _ in 0..1000 {
        let image = again.find(&reference(&registry, "1")).await.unwrap();
        again.mount(&image).await.unwrap();
    }
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    again.unmount_all().await.unwrap();
    assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(point));
    let refused = again.remove(&found.reference.to_string(), std::slice::from_ref(&found.id)).await.unwrap_err();
    assert_eq!(refused.problem, Problem::InUse);
    again.remove(&found.reference.to_string(), &[]).await.unwrap();
    assert_eq!((stored_files(dir.path(), "layers"), stored_files(dir.path(), "blobs")), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_layers_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let images = open(dir.path()).await;
    let mut cases: Vec<(&str, Vec<u8>, &str)> = Vec::new();
    let mut layer = Layer::new();
    layer.raw_path(b"../../evil", b"x");
    cases.push(("dots", layer.gzip().blob, "out of the root"));
    let mut layer = Layer::new();
    layer.symlink("out", "/etc");
    layer.file("out/passwd", b"x", 0o644, (0, 0));
    cases.push(("symlink", layer.gzip().blob, "symbolic link"));
    let mut layer = Layer::new();
    layer.link("mine", "etc/shadow");
    cases.push(("hardlink", layer.gzip().blob, "not a file of this layer"));
    let mut layer = Layer::new();
    layer.file("bomb", &vec![0; 9 << 20], 0o644, (0, 0));
    cases.push(("bomb", layer.gzip().blob, "larger than"));
    let mut layer = Layer::new();
    layer.file("a", &[7; 5000], 0o644, (0, 0));
    let mut cut = layer.gzip().blob;
    cut.truncate(cut.len() / 2);
    cases.push(("cut", cut, "layer sha256:"));
    for (tag, blob, expected) in cases {
        let diff_id = format!("sha256:{}", "0".repeat(64));
        registry.image(tag, &[registry::Built { blob, diff_id }]);
        let error = images.pull(&reference(&registry, tag), &[], |_| {}).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{tag}: {error}");
        let fault = joey_model::Fault::from(&error);
        assert!(fault.reason == "ErrImagePull" && fault.hint.is_some(), "{tag}: {fault:?}");
        for folder in ["layers", "tmp", "blobs", "partial"] {
            assert_eq!(stored_files(dir.path(), folder), 0, "{tag}: {folder}");
        }
    }
    let mut layer = Layer::new();
    layer.file("a", b"a", 0o644, (0, 0));
    let mut built = layer.gzip();
    built.diff_id = format!("sha256:{}", "1".repeat(64));
    registry.image("diff", &[built]);
    let error = images.pull(&reference(&registry, "diff"), &[], |_| {}).await.unwrap_err();
    assert!(matches!(error.problem, Problem::Digest { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_downloads_resume_and_lies_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let images = open(dir.path()).await;
    let noise: Vec<u8> = (0..400_000u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8).collect();
    let mut layer = Layer::new();
    layer.file("noise", &noise, 0o644, (0, 0));
    let built = layer.plain();
    let path = format!("/v2/team/app/blobs/{}", sha256(&built.blob));
    registry.image("1", std::slice::from_ref(&built));

    // Silence after a third: given up in time, kept, and resumed by the next pull (here: another process).
    registry.set(&path, Answer::HangAfter(built.blob.clone(), built.blob.len() / 3));
    let error = images.pull(&reference(&registry, "1"), &[], |_| {}).await.unwrap_err();
    assert!(matches!(error.problem, Problem::Unavailable { .. }), "{error}");
    assert_eq!(stored_files(dir.path(), "partial"), 1);
    registry.set(&path, Answer::Body(built.blob.clone()));
    let images = open(dir.path()).await;
    let (one, two) = (reference(&registry, "1"), reference(&registry, "1"));
    let before = registry.count(&path);
    let (a, b) = tokio::join!(images.pull(&one, &[], |_| {}), images.pull(&two, &[], |_| {}));
    assert_eq!(a.unwrap().layers, b.unwrap().layers);
    assert_eq!(registry.count(&path) - before, 1, "two pulls share one download");
    assert!(registry.ranges(&path).iter().any(|&from| from > 0), "the rest was asked for");
    assert_eq!(stored_files(dir.path(), "partial"), 0);

    // Other bytes of the same length.
    let mut other = Layer::new();
    other.file("noise", &noise[1..], 0o644, (0, 0));
    let other = other.plain();
    registry.image("2", std::slice::from_ref(&other));
    let mut wrong = other.blob.clone();
    wrong[1000] ^= 1;
    registry.set(&format!("/v2/team/app/blobs/{}", sha256(&other.blob)), Answer::Body(wrong));
    let error = images.pull(&reference(&registry, "2"), &[], |_| {}).await.unwrap_err();
    assert!(matches!(error.problem, Problem::Digest { .. }), "{error}");

    let missing = images.pull(&reference(&registry, "none"), &[], |_| {}).await.unwrap_err();
    assert!(matches!(missing.problem, Problem::NotFound { .. }), "{missing}");
    let nobody = ImageRef::parse("127.0.0.1:1/team/app").unwrap();
    let error = images.pull(&nobody, &[], |_| {}).await.unwrap_err();
    assert!(matches!(error.problem, Problem::Unavailable { .. }), "{error}");
    let by_digest = format!("{}/team/app@sha256:{}", registry.address, "2".repeat(64));
    registry.set(&format!("/v2/team/app/manifests/sha256:{}", "2".repeat(64)), Answer::Body(b"{}".to_vec()));
    let error = images.pull(&ImageRef::parse(&by_digest).unwrap(), &[], |_| {}).await.unwrap_err();
    assert!(matches!(error.problem, Problem::Digest { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_stay_with_their_registry() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, elsewhere) = (Registry::start(), Registry::start());
    let images = open(dir.path()).await;
    let mut layer = Layer::new();
    layer.file("a", b"a", 0o644, (0, 0));
    let built = layer.zstd();
    registry.image("1", std::slice::from_ref(&built));
    registry.require("Basic dTpw");
    let path = format!("/v2/team/app/blobs/{}", sha256(&built.blob));
    registry.set(&path, Answer::Redirect(format!("http://{}/blob", elsewhere.address)));
    elsewhere.set("/blob", Answer::Body(built.blob.clone()));
    let name = reference(&registry, "1");
    let error = images.pull(&name, &[], |_| {}).await.unwrap_err();
    assert!(matches!(error.problem, Problem::Denied { anonymous: true, .. }), "{error}");
    let credential = |password: &str| joey_api::image::RegistryCredential {
        registry: registry.address.clone(),
        username: "u".to_owned(),
        password: password.to_owned(),
    };
    let error = images.pull(&name, &[credential("no")], |_| {}).await.unwrap_err();
    assert!(matches!(error.problem, Problem::Denied { anonymous: false, .. }), "{error}");
    images.pull(&name, &[credential("p")], |_| {}).await.unwrap();
    assert_eq!(elsewhere.authorizations(), 0, "credentials followed a redirect");

    // Nor does who is redirected to get them by asking.
    let images = open(&dir.path().join("second")).await;
    elsewhere.require("Basic dTpw");
    let error = images.pull(&name, &[credential("p")], |_| {}).await.unwrap_err();
    assert!(error.to_string().contains(&format!("{}, to which it redirects", elsewhere.address)), "{error}");
    assert_eq!(elsewhere.authorizations(), 0, "credentials were given where a redirect led");
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_a_layer_does_not_list_stay_as_they_were() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("SKIPPED: root is needed to mount");
    }
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let (mut lower, mut upper) = (Layer::new(), Layer::new());
    lower.directory("tmp", 0o1777, (0, 0));
    lower.directory("home", 0o751, (3, 4));
    lower.directory("home/kanga", 0o700, (1000, 1000));
    lower.directory("away", 0o700, (5, 5));
    lower.symlink("out", "/etc");
    upper.file("tmp/x", b"x", 0o600, (0, 0));
    upper.file("home/kanga/pocket/roo", b"roo", 0o600, (1000, 1000));
    upper.file(".wh.away", b"", 0, (0, 0));
    upper.file("away/again", b"", 0o600, (0, 0));
    upper.file("out/ward", b"", 0o600, (0, 0));
    registry.image("1", &[lower.gzip(), upper.gzip()]);
    let images = open(dir.path()).await;
    let image = images.pull(&reference(&registry, "1"), &[], |_| {}).await.unwrap();
    let mounts = images.mount(&image).await.unwrap();
    assert_eq!(mounts.len(), 4, "two layers, the way around a link, and the cover");
    assert_eq!(images.mount(&image).await.unwrap(), mounts);
    let merged = dir.path().join("merged");
    std::fs::create_dir(&merged).unwrap();
    let lower: Vec<&str> = mounts.iter().map(|mount| mount.folder.to_str().unwrap()).collect();
    let options = format!("lowerdir={}", lower.join(":"));
    let flags = nix::mount::MsFlags::MS_RDONLY;
    nix::mount::mount(Some("overlay"), &merged, Some("overlay"), flags, Some(options.as_str())).unwrap();
    let seen: Vec<_> = ["tmp", "home", "home/kanga", "home/kanga/pocket", "away"]
        .iter()
        .map(|name| std::fs::symlink_metadata(merged.join(name)).unwrap())
        .map(|metadata| (metadata.mode() & 0o7777, metadata.uid(), metadata.gid()))
        .collect();
    let whole = merged.join("tmp/x").exists() && merged.join("home/kanga/pocket/roo").exists();
    let link = std::fs::read_link(merged.join("out"));
    let behind = std::fs::symlink_metadata(merged.join("etc/ward")).map(|metadata| metadata.mode() & 0o7777);
    nix::mount::umount(&merged).unwrap();
    assert_eq!(seen, [(0o1777, 0, 0), (0o751, 3, 4), (0o700, 1000, 1000), (0o755, 0, 0), (0o755, 0, 0)]);
    assert!(whole);
    assert_eq!(link.unwrap(), Path::new("/etc"), "a link of a lower layer stays");
    assert_eq!(behind.unwrap(), 0o600, "and is followed inside the image");
    images.remove(&image.id.to_string(), &[]).await.unwrap();
    assert_eq!(stored_files(dir.path(), "layers"), 0);
    images.unmount_all().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_in_use_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let mut layer = Layer::new();
    layer.file("a", b"a", 0o644, (0, 0));
    registry.image("1", &[layer.gzip()]);
    let images = open(dir.path()).await;
    let name = reference(&registry, "1");
    let image = images.pull(&name, &[], |_| {}).await.unwrap();
    let refused = images.remove(&name.to_string(), std::slice::from_ref(&image.id)).await.unwrap_err();
    assert!(matches!(refused.problem, Problem::InUse), "{refused}");
    assert!(images.find(&name).await.is_some());
    images.remove(&name.to_string(), &[]).await.unwrap();
    assert_eq!(stored_files(dir.path(), "layers"), 0);
}
