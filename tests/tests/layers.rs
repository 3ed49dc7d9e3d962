//! Point 9: layers that are broken or hostile, as whoever made the Pod reads of them, and odd ones that are neither.

use joey_tests::image::{Entry, Image, Layer, Packing};
use joey_tests::joey::pod;
use joey_tests::served::Served;
use joey_tests::{Joey, Settings, holds, seconds, wait_until};
use serde_json::json;

/// A tar header of any type and size field with a right checksum.
fn header(kind: u8, name: &str, size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_mode(0o644);
    header.set_size(size);
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn refused_layers() -> Vec<(&'static str, Layer, &'static str)> {
    let gzip = |entries: &[Entry]| Layer::new(entries, Packing::Gzip);
    let honest = [Entry::file("a", &[7; 200_000])];
    let noise: Vec<u8> = (0..50_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let noisy = [Entry::file("noise", &noise)];
    let half = |packing| {
        let layer = Layer::new(&noisy, packing);
        let half = layer.bytes.len() / 2;
        layer.cut(half)
    };
    let mut torn = Layer::new(&noisy, Packing::Gzip);
    let middle = torn.bytes.len() / 2;
    torn.bytes[middle..middle + 64].fill(0xff);
    let mut checksum = header(b'0', "a", 0);
    checksum[0] = b'b';
    let mut open = header(b'0', "a", 5000);
    open.extend_from_slice(&[1; 700]);
    vec![
        ("dots", gzip(&[Entry::file("../../mark", b"x")]), "leads out of the root"),
        (
            "link",
            gzip(&[Entry::symlink("out", "/tmp"), Entry::file("out/mark", b"x")]),
            "leads through a symbolic link",
        ),
        ("hard", gzip(&[Entry::hard_link("passwd", "../../etc/passwd")]), "leads out of the root"),
        ("host", gzip(&[Entry::hard_link("passwd", "/etc/passwd")]), "not a file of this layer"),
        ("later", gzip(&[Entry::hard_link("early", "late"), Entry::file("late", b"")]), "not a file of this layer"),
        ("folder", gzip(&[Entry::dir("d"), Entry::hard_link("l", "d")]), "not a file of this layer"),
        ("hidden", gzip(&[Entry::file("../.wh.mark", b"")]), "leads out of the root"),
        ("name", gzip(&[Entry::file(&"n".repeat(300), b"")]), "longer than 255"),
        ("path", gzip(&[Entry::file(&"deep/".repeat(900), b"")]), "longer than 4096"),
        ("device", gzip(&[Entry::device("d", 1 << 20, 3)]), "impossible number"),
        ("owner", gzip(&[Entry::file("a", b"").owner(u64::from(u32::MAX), 0)]), "impossible owner"),
        ("root", gzip(&[Entry::symlink("/", "/etc")]), "something else than a directory"),
        ("cut-gzip", half(Packing::Gzip), "ends early"),
        ("cut-zstd", half(Packing::Zstd), "ends early"),
        ("cut-tar", Layer::of_archive(&open, Packing::Gzip), "ends in the middle"),
        ("torn", torn, "layer sha256:"),
        ("text", Layer::of_archive(&[7; 4096], Packing::Gzip), "layer sha256:"),
        ("sum", Layer::of_archive(&checksum, Packing::Zstd), "checksum is wrong"),
        ("kind", Layer::of_archive(&header(b'!', "a", 0), Packing::Plain), "unknown type"),
        ("pax", Layer::of_archive(&header(b'x', "a", 1 << 34), Packing::Gzip), "larger than 1 MiB"),
        ("longname", Layer::of_archive(&header(b'L', "a", 1 << 30), Packing::Gzip), "larger than 1 MiB"),
        ("huge", Layer::of_archive(&header(b'0', "a", 0o77_777_777_777), Packing::Gzip), "larger than"),
        ("zeros", Layer::of_zeros("zeros", 256 << 20), "larger than 67108864 bytes"),
        ("false", Layer { diff_id: format!("sha256:{}", "0".repeat(64)), ..gzip(&honest) }, "has digest"),
    ]
}

#[test]
fn each_broken_layer_is_told_by_the_pod_s_events() {
    let served = Served::start();
    let settings = Settings { arguments: vec!["--max-layer-bytes".into(), "64Mi".into()], ..Settings::default() };
    let joey = Joey::start_with(settings);
    let layers = refused_layers();
    let mut digests = Vec::new();
    for (name, layer, _) in &layers {
        digests.push(layer.digest());
        let image = served.add(&format!("{name}:1"), &Image::new(vec![layer.clone()], json!({})));
        joey.apply(&pod(name, &image, &[]));
    }
    for ((name, _, part), digest) in layers.iter().zip(&digests) {
        let text = wait_until(&format!("{name} is told"), seconds(60), || {
            let text = joey.kubectl(&["describe", "pod", name]).ok();
            let events = text.split_once("\nEvents:").map_or("", |(_, events)| events).to_owned();
            if events.contains("Failed") { Ok(events) } else { Err(text) }
        });
        assert!(text.contains(part), "{name}: {part:?} in {text}");
        // The layer is named, or where only its unpacked bytes are wrong, the digest they should have.
        assert!(text.contains(&digest[..19]) || text.contains("000000"), "{name}: its layer is named in {text}");
        assert!(text.contains(&format!("{name}:1")), "{name}: the image is named in {text}");
        assert!(text.contains("; "), "{name}: the way out is named in {text}");
        let waiting = joey.get("pod", name)["status"]["containerStatuses"][0]["state"]["waiting"].clone();
        let reason = waiting["reason"].as_str().unwrap_or_default();
        assert!(matches!(reason, "ErrImagePull" | "ImagePullBackOff"), "{name}: {waiting}");
        joey.kubectl(&["delete", "pod", name, "--wait=false", "--grace-period=0"]).ok();
    }
    wait_until("nothing half made stays", seconds(20), || {
        let folders = ["layers", "tmp", "partial", "blobs"].map(|name| joey.data().join("images").join(name));
        let entries = folders.iter().flat_map(|folder| std::fs::read_dir(folder).into_iter().flatten().flatten());
        let left: Vec<_> = entries.map(|entry| entry.path()).collect();
        holds(left.is_empty(), left)
    });
    wait_until("the instances are gone", seconds(20), || {
        let instances = joey.joey(&["ps", "-o", "json"]).json();
        holds(instances.as_array().is_some_and(Vec::is_empty), instances)
    });
}

#[test]
fn odd_layers_are_taken_as_others_take_them() {
    let served = Served::start();
    let joey = Joey::start();
    let lower = Layer::new(
        &[
            Entry::dir("opaque/"),
            Entry::file("opaque/old", b"old"),
            Entry::dir("usr/"),
            Entry::dir("usr/lib/").mode(0o751),
            Entry::file("usr/lib/old", b"old"),
            Entry::symlink("lib", "usr/lib"),
        ],
        Packing::Zstd,
    );
    let long = format!("long/{}", "n".repeat(200));
    let upper = Layer::new(
        &[
            Entry::file("/absolute", b"inside"),
            Entry::file("twice", b"first"),
            Entry::file("twice", b"second"),
            Entry::symlink("away", "../../../../etc/passwd"),
            Entry::file(".wh.never", b""),
            Entry::file("opaque/new", b"new"),
            Entry::file("opaque/.wh..wh..opq", b""),
            Entry::device("zero", 1, 5),
            Entry::file(&long, b"long"),
            Entry::file("lib/new", b"new"),
            Entry::file("lib/.wh.old", b""),
        ],
        Packing::Gzip,
    );
    // A folder whose size field says that contents follow, which never do.
    let mut sized = header(b'5', "sized/", 512);

    sized.extend(header(b'0', "behind", 0));
    sized.extend([0; 1024]);
    let sized = Layer::of_archive(&sized, Packing::Plain);
    let config = json!({"Env": ["PATH=/bin"], "Cmd": ["sleep", "1000"]});
    let image = served.add("odd:1", &Image::new(vec![Layer::shell(), lower, upper, sized], config));
    let script = "cd /; cat absolute twice long/*; echo; ls opaque usr/lib; readlink lib; readlink away; stat -c '%n %a' usr/lib; \
                  stat -c '%F %t %T' zero; ls -d behind sized";
    joey.apply(&pod("odd", &image, &["sh", "-c", script]));
    wait_until("it ends", seconds(60), || {
        let phase = joey.get("pod", "odd")["status"]["phase"].clone();
        holds(phase == "Succeeded" || phase == "Failed", phase)
    });
    let expected = "insidesecondlong\nopaque:\nnew\n\nusr/lib:\nnew\nusr/lib\n../../../../etc/passwd\nusr/lib 751\n\
                    character special file 1 5\nbehind\nsized\n";
    assert_eq!(joey.kubectl(&["logs", "odd"]).ok(), expected);
}

#[test]
fn a_million_files_take_bounded_memory() {
    let served = Served::start();
    let mut joey = Joey::start();
    let mut archive = Vec::with_capacity(600 << 20);
    for number in 0..1_000_001_u32 {
        archive.extend(header(b'0', &format!("d{}/{number}", number / 1000), 0));
    }
    let layer = Layer::of_archive(&archive, Packing::Zstd);
    drop(archive);
    let image = served.add("million:1", &Image::new(vec![layer], json!({})));
    let refused = joey.joey(&["image", "pull", &image]).fails(1);
    assert!(refused.contains("more than 1000000 entries"), "{refused}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", joey.program().pid())).expect("it runs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the kernel counts");
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(peak < 512 << 10, "{peak} KiB");
}
