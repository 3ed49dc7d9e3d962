//! Point 5: images from real and hand-made registries, and what a container sees of them.

use std::path::Path;
use std::process::Command;

use joey_tests::image::{Entry, Image, Layer, Packing, index};
use joey_tests::joey::pod;
use joey_tests::registry::{PASSWORD, USER};
use joey_tests::served::Served;
use joey_tests::{Joey, Program, Registry, Settings, holds, run, seconds, wait_until};
use serde_json::{Value, json};

fn configuration() -> Value {
    json!({"Env": ["PATH=/bin", "COLOUR=brown"], "Cmd": ["sleep", "1000"], "WorkingDir": "/tmp"})
}

/// What a command says in a fresh container of an image.
fn says(joey: &Joey, name: &str, image: &str, script: &str) -> String {
    joey.apply(&pod(name, image, &["sh", "-c", script]));
    wait_until("the container ends", seconds(60), || {
        let phase = joey.get("pod", name)["status"].clone();
        holds(matches!(phase["phase"].as_str(), Some("Succeeded" | "Failed")), phase)
    });
    let text = joey.kubectl(&["logs", name]).ok();
    joey.delete_pod(name);
    text
}

#[test]
fn tags_digests_and_shared_layers() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let pulled = joey.joey(&["image", "pull", &registry.demo()]).ok();
    let digest = registry.digest("joey/hello:1");
    let by_digest = format!("{}@{digest}", registry.image("joey/hello"));
    joey.joey(&["image", "pull", &by_digest]).ok();
    let images = joey.joey(&["image", "ls", "-o", "json"]).ok();
    assert!(images.contains(&digest), "{images}\n{pulled}");
    let layers = std::fs::read_dir(joey.data().join("images")).expect("the store is there").count();
    assert!(layers > 0);
    let pod = joey.run_pod("by-digest", &by_digest, &[]);
    let image_id = pod["status"]["containerStatuses"][0]["imageID"].as_str().unwrap_or_default();
    assert!(image_id.ends_with(&digest), "{image_id}");

    // Each layer is mounted once, whoever uses it.
    let erofs = || {
        let mounts = std::fs::read_to_string("/proc/mounts").expect("mounts can be read");
        let here = joey.data().display().to_string();
        mounts.lines().filter(|line| line.contains(" erofs ") && line.contains(&here)).count()
    };
    let mounted = erofs();
    assert_eq!(mounted, 3, "the demo image has three layers");
    joey.run_pod("by-tag", &registry.demo(), &[]);
    assert_eq!(erofs(), mounted);
    joey.joey(&["image", "rm", &registry.demo()]);
    assert_eq!(joey.get("pod", "by-tag")["status"]["phase"], "Running", "an image in use keeps its layers");
}

#[test]
fn layers_of_every_packing_stack_as_the_standard_says() {
    let served = Served::start();
    let joey = Joey::start();
    let lower = Layer::new(
        &[
            Entry::dir("a/"),
            Entry::file("a/kept", b"kept"),
            Entry::file("a/removed", b"removed"),
            Entry::dir("b/"),
            Entry::file("b/hidden", b"hidden"),
            Entry::file("changed", b"old"),
        ],
        Packing::Zstd,
    );
    let upper = Layer::new(
        &[
            Entry::dir("a/"),
            Entry::file("a/.wh.removed", b""),
            Entry::dir("b/"),
            Entry::file("b/.wh..wh..opq", b""),
            Entry::file("b/new", b"new"),
            Entry::file("changed", b"new"),
        ],
        Packing::Plain,
    );
    let image = served.add("stack:1", &Image::new(vec![Layer::shell(), lower, upper], configuration()));
    let seen =
        says(&joey, "stack", &image, "ls a b; cat changed; cat /a/kept; echo; echo $COLOUR; readlink /proc/self/cwd");
    assert_eq!(says(&joey, "again", &image, "cd /; ls a b; cat changed"), "a:\nkept\n\nb:\nnew\nnew");
    assert!(seen.contains("brown\n/tmp"), "{seen}");
}

#[test]
fn owners_modes_links_devices_and_attributes() {
    let served = Served::start();
    let joey = Joey::start();
    let layer = Layer::new(
        &[
            Entry::file("owned", b"x").owner(1234, 70_000).mode(0o640),
            Entry::file("setuid", b"x").mode(0o4755),
            Entry::dir("sticky/").mode(0o1777),
            Entry::file("first", b"linked"),
            Entry::hard_link("second", "first"),
            Entry::symlink("pointer", "/first"),
            Entry::device("null", 1, 3),
            Entry::file("marked", b"x").xattr("user.colour", "brown"),
            Entry::file(&"deep/".repeat(18), b"").mode(0o755),
        ],
        Packing::Gzip,
    );
    let image = served.add("kinds:1", &Image::new(vec![Layer::shell(), layer], configuration()));
    let script = "cd /; stat -c '%n %u %g %a %F' owned setuid sticky; stat -c '%n %h' first second; \
                  test first -ef second && echo same; readlink pointer; stat -c '%F %t %T' null";
    let seen = says(&joey, "kinds", &image, script);
    let expected = "owned 1234 70000 640 regular file\nsetuid 0 0 4755 regular file\nsticky 0 0 1777 directory\n\
                    first 2\nsecond 2\nsame\n/first\ncharacter special file 1 3\n";
    assert_eq!(seen, expected);
    // No tool of busybox shows attributes: the kernel is asked for them on the mounted layer.
    joey.joey(&["image", "pull", &image]).ok();
}

#[test]
fn an_index_gives_the_platform_of_this_machine() {
    let served = Served::start();
    let joey = Joey::start();
    let here = Image::new(vec![Layer::shell()], configuration());
    let other = Image::for_architecture("riscv64", vec![Layer::new(&[], Packing::Gzip)], configuration());
    served.add("many:here", &here);
    served.add("many:other", &other);
    let image = served.add_manifest("many:1", index(&[("riscv64", &other), ("amd64", &here)]));
    assert_eq!(says(&joey, "many", &image, "echo ran"), "ran\n");

    let only_other = served.add_manifest("many:2", index(&[("riscv64", &other)]));
    let refused = joey.joey(&["image", "pull", &only_other]).fails(1);
    assert!(refused.contains("amd64"), "the missing platform is named: {refused}");
}

#[test]
fn credentials_of_a_pod_and_of_docker_s_file() {
    let registry = Registry::with_password();
    let joey = Joey::start();
    joey.apply(&pod("locked", &registry.demo(), &[]));
    wait_until("the refusal is told", seconds(30), || {
        let pod = joey.get("pod", "locked");
        let reason = pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"].clone();
        holds(matches!(reason.as_str(), Some("ErrImagePull" | "ImagePullBackOff")), pod["status"].to_string())
    });
    let server = format!("--docker-server={}", registry.address());
    let (user, password) = (format!("--docker-username={USER}"), format!("--docker-password={PASSWORD}"));
    joey.kubectl(&["create", "secret", "docker-registry", "pass", &server, &user, &password]).ok();
    let mut object = pod("opened", &registry.demo(), &[]);
    object["spec"]["imagePullSecrets"] = json!([{"name": "pass"}]);
    joey.apply(&object);
    joey.wait_for("opened", "Ready", seconds(30));
    assert!(!joey.output().contains(PASSWORD), "a password is never logged");
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let served = Served::start();
    let joey = Joey::start();
    let noise: Vec<u8> = (0..3_000_000_u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let layer = Layer::new(&[Entry::file("noise", &noise)], Packing::Plain);
    let (digest, length) = (layer.digest(), layer.bytes.len());
    let image = served.add("broken:1", &Image::new(vec![Layer::shell(), layer], configuration()));
    served.break_off(&digest, length / 2);
    // Whether one call retries by itself or a second is needed, no byte before the break is fetched again.
    if joey.joey(&["image", "pull", &image]).code != 0 {
        joey.joey(&["image", "pull", &image]).ok();
    }
    let requests = served.requests(&digest);
    let resumed = requests.iter().filter_map(|request| request.from).max();
    assert!(resumed.is_some_and(|from| from > length / 4), "{requests:?}");
}

#[test]
fn layers_shared_by_pulls_at_the_same_time_are_fetched_once() {
    let served = Served::start();
    let joey = Joey::start();
    let shared = Layer::shell();
    let digest = shared.digest();
    let images: Vec<_> = (0..4)
        .map(|i| {
            let own = Layer::new(&[Entry::file("number", format!("{i}").as_bytes())], Packing::Gzip);
            served.add(&format!("share{i}:1"), &Image::new(vec![shared.clone(), own], configuration()))
        })
        .collect();
    std::thread::scope(|scope| {
        for image in &images {
            scope.spawn(|| joey.joey(&["image", "pull", image]).ok());
        }
    });
    assert_eq!(served.requests(&format!("/blobs/{digest}")).len(), 1);
}

/// Bytes that no packing makes smaller.
fn noise(length: usize) -> Vec<u8> {
    let words =
        (0..length.div_ceil(8) as u64).map(|n| n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    words.flatten().take(length).collect()
}

/// Bytes of the files in a folder of a Joey's image store.
fn bytes_in(joey: &Joey, folder: &str) -> u64 {
    let entries = std::fs::read_dir(joey.data().join("images").join(folder)).expect("the store is there");
    entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
}

#[test]
fn images_are_removed_unless_in_use() {
    let served = Served::start();
    let joey = Joey::start();
    let shell = Layer::shell();
    let with = |number: &str| {
        let own = Layer::new(&[Entry::file("number", number.as_bytes())], Packing::Gzip);
        Image::new(vec![shell.clone(), own], configuration())
    };
    let (one, two) = (served.add("one:1", &with("1")), served.add("two:1", &with("2")));
    let again = served.add("one:again", &with("1"));
    joey.run_pod("user", &one, &[]);
    for image in [&two, &again] {
        joey.joey(&["image", "pull", image]).ok();
    }
    let layers = || std::fs::read_dir(joey.data().join("images/layers")).expect("the store is there").count();
    let before = layers();
    joey.joey(&["image", "rm", &again]).ok();
    let refused = joey.joey(&["image", "rm", &one]).fails(1);
    assert!(refused.contains(&one) && refused.contains("in use") && refused.contains("hint:"), "{refused}");
    assert_eq!(layers(), before, "a name more or less is no layer");
    joey.joey(&["image", "rm", &two]).ok();
    assert_eq!(before - layers(), 1, "the layer that both have stays");
    let refused = joey.joey(&["image", "rm", &two]).fails(1);
    assert!(refused.contains("no such image"), "{refused}");
    assert_eq!(says(&joey, "after", &one, "cat /number"), "1");
    assert_eq!(joey.get("pod", "user")["status"]["phase"], "Running");

    // A tag that moves on leaves its image without a name, to be removed by its id.
    served.add("one:1", &with("3"));
    joey.joey(&["image", "pull", &one]).ok();
    let table = joey.joey(&["image", "ls"]).ok();
    let nameless = table.lines().find(|line| line.starts_with("<none>")).unwrap_or_else(|| panic!("in {table}"));
    let id = nameless.split_whitespace().nth(1).expect("a row has an id");
    assert!(joey.joey(&["image", "rm", id]).fails(1).contains("in use"));
    joey.delete_pod("user");
    joey.joey(&["image", "rm", id]).ok();
    assert!(!joey.joey(&["image", "ls"]).ok().contains("<none>"));
    assert_eq!(joey.joey(&["image", "ls"]).ok().lines().count(), 2, "the heads and one image");
    joey.joey(&["image", "rm", &one]).ok();
    assert_eq!(layers(), 0);
}

#[test]
fn progress_is_shown_where_it_is_watched() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    let quiet = joey.joey(&["image", "pull", &image]);
    assert_eq!(quiet.stdout, format!("{image}\n"), "for programs: the reference alone");
    assert!(quiet.stderr.contains(": 3 layers") && quiet.stderr.lines().count() == 4, "{}", quiet.stderr);
    joey.joey(&["image", "rm", &image]).ok();

    let command = joey.joey_command(&["image", "pull", &image]);
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    let line = words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let shown = run(Command::new("script").args(["-qec", &line, "/dev/null"])).ok();
    let layer = &quiet.stderr.lines().nth(1).expect("a line for each layer")["sha256:".len()..][..12];
    assert!(shown.contains(layer) && shown.contains('\u{2588}') && shown.contains(" of "), "{shown:?}");
    assert!(shown.trim_end().ends_with(&image), "{shown:?}");
}

#[test]
fn interrupted_pulls_go_on() {
    let served = Served::start();
    let mut joey = Joey::start();
    let layer = Layer::new(&[Entry::file("noise", &noise(4_000_000))], Packing::Plain);
    let digest = layer.digest();
    let image = served.add("slow:1", &Image::new(vec![layer], json!({})));
    served.slow_down(&digest, Some(20_000));
    let pull = |joey: &Joey, log: &str| {
        Program::start(&mut joey.joey_command(&["image", "pull", &image]), &joey.scratch().join(log))
    };
    let downloaded = |joey: &Joey, more_than: u64| {
        wait_until("a part is downloaded", seconds(20), || {
            let bytes = bytes_in(joey, "partial");
            if bytes > more_than { Ok(bytes) } else { Err(bytes.to_string()) }
        })
    };
    // Its caller goes away: the pull is given up, the part is kept.
    let mut client = pull(&joey, "interrupted");
    let part = downloaded(&joey, 200_000);
    client.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(client.wait(seconds(10)), 130);
    assert!(!joey.joey(&["image", "ls"]).ok().contains("slow"));

    // The daemon dies: likewise.
    let mut client = pull(&joey, "killed");
    let part = downloaded(&joey, part + 200_000);
    joey.kill();
    assert_eq!(client.wait(seconds(10)), 1);
    assert!(client.output().contains("hint:"), "{}", client.output());
    joey.up();
    assert_eq!(bytes_in(&joey, "tmp"), 0, "what was half written is gone");
    served.slow_down(&digest, None);
    joey.joey(&["image", "pull", &image]).ok();
    let from: Vec<_> = served.requests(&digest).iter().map(|request| request.from.unwrap_or(0) as u64).collect();
    assert!(from.len() >= 3 && from[1] > 200_000 && from[2] >= part, "{from:?}");
    assert_eq!(bytes_in(&joey, "partial"), 0);
}

#[test]
fn a_registry_that_knows_no_ranges_serves_as_well() {
    let served = Served::start();
    let joey = Joey::start();
    served.ignore_ranges();
    let data = noise(1_000_000);
    let layer = Layer::new(&[Entry::file("noise", &data)], Packing::Plain);
    let digest = layer.digest();
    let image = served.add("whole:1", &Image::new(vec![Layer::shell(), layer], configuration()));
    served.break_off(&digest, 600_000);
    joey.joey(&["image", "pull", &image]).ok();
    assert!(served.requests(&digest).iter().any(|request| request.from.is_some()), "the rest was asked for");
    assert_eq!(says(&joey, "whole", &image, "cat /noise").len(), String::from_utf8_lossy(&data).len());
}

/// A file system of its own for a Joey's images. Dropped, it is unmounted.
struct Disk<'a>(&'a Path);

impl Disk<'_> {
    fn size(&self, options: &str) {
        run(Command::new("mount").args(["-t", "tmpfs", "-o", options, "images"]).arg(self.0)).ok();
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn a_full_disk_is_named_and_heals() {
    let served = Served::start();
    let mut joey = Joey::prepare(Settings::default());
    let folder = joey.data().join("images");
    std::fs::create_dir_all(&folder).expect("a fresh folder is writable");
    let disk = Disk(&folder);
    disk.size("size=12m");
    joey.up();
    let layer = Layer::new(&[Entry::file("noise", &noise(8_000_000))], Packing::Plain);
    let image = served.add("large:1", &Image::new(vec![Layer::shell(), layer], configuration()));
    let refused = joey.joey(&["image", "pull", &image]).fails(1);
    assert!(refused.contains("disk is full") && refused.contains("hint:"), "{refused}");
    wait_until("nothing half made stays", seconds(10), || {
        let left = ["partial", "tmp", "layers", "blobs"].map(|folder| bytes_in(&joey, folder));
        holds(left == [0; 4], format!("{left:?}"))
    });
    joey.apply(&pod("waits", &image, &["sleep", "1000"]));
    wait_until("the Pod's events say so", seconds(30), || {
        let text = joey.kubectl(&["describe", "pod", "waits"]).ok();
        if text.contains("disk is full") { Ok(()) } else { Err(text) }
    });
    disk.size("remount,size=64m");
    joey.wait_for("waits", "Ready", seconds(60));
    joey.down().ok();
}
