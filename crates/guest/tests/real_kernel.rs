//! A guest of the kernel that Debian has for virtual machines, with a real static program as its agent.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use joey_guest::{Guest, Guests, Kernel, Request, fetch_package};

fn room() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// The package, downloaded once and kept; `None` where there is no apt.
fn package() -> Option<&'static Path> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let folder = room().join("kernel");
        let is_package = |path: &PathBuf| path.extension().is_some_and(|end| end == "deb");
        let kept = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path()).find(is_package);
        if kept.is_some() {
            return kept;
        }
        if !Path::new("/usr/bin/apt-get").exists() || !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs root on a Debian, or a kernel package in {}", folder.display());
            return None;
        }
        Some(fetch_package(&folder, None).unwrap())
    });
    found.as_deref()
}

/// A program that is linked statically, or dynamically.
fn program(is_static: bool) -> PathBuf {
    let folder = tempfile::tempdir_in(room()).unwrap();
    let (source, built) = (folder.path().join("agent.rs"), folder.path().join("agent"));
    fs::write(&source, "fn main() {}").unwrap();
    let feature = if is_static { "target-feature=+crt-static" } else { "target-feature=-crt-static" };
    let status = Command::new("rustc").args(["-C", feature, "-o"]).arg(&built).arg(&source).status().unwrap();
    assert!(status.success());
    let place = room().join(if is_static { "agent-static" } else { "agent-dynamic" });
    fs::rename(&built, &place).unwrap();
    place
}

fn agent() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| program(true))
}

fn request(package: &Path, agent: &Path) -> Request {
    Request { kernel: Kernel::Package(package.to_owned()), agent: agent.to_owned() }
}

/// What is in an initramfs: names and contents, in order.
fn entries(guest: &Guest) -> Vec<(String, Vec<u8>)> {
    let mut rest: Box<dyn Read> = Box::new(File::open(&guest.initramfs).unwrap());
    let mut found = Vec::new();
    loop {
        let mut reader = cpio::NewcReader::new(rest).unwrap();
        if reader.entry().is_trailer() {
            return found;
        }
        let (name, mut contents) = (reader.entry().name().to_owned(), Vec::new());
        reader.read_to_end(&mut contents).unwrap();
        found.push((name, contents));
        rest = reader.finish().unwrap();
    }
}

/// `NAME` of `[PATH/]NNN-NAME.ko`.
fn module_name(file: &str) -> &str {
    file.rsplit('/').next().unwrap()[4..].strip_suffix(".ko").unwrap()
}

/// What a module says it depends on, found without looking at its sections.
fn depends(module: &[u8]) -> Vec<String> {
    let key = b"depends=";
    let at = module.windows(key.len()).position(|part| part == key).expect("a module tells what it depends on");
    let text = module[at + key.len()..].split(|&byte| byte == 0).next().unwrap();
    String::from_utf8_lossy(text).split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// Checks that every module comes after what it needs, of what is in `order` or `before`.
fn check_order(before: &[String], order: &[(String, Vec<u8>)]) {
    let places: HashMap<&str, usize> = order.iter().enumerate().map(|(at, (name, _))| (name.as_str(), at)).collect();
    for (at, (name, bytes)) in order.iter().enumerate() {
        assert!(!before.contains(name), "{name} is there twice");
        for needed in depends(bytes) {
            let is_there = places.get(needed.as_str()).is_some_and(|place| *place < at) || before.contains(&needed);
            assert!(is_there, "{name} comes before {needed}");
        }
    }
}

#[test]
fn a_real_package_becomes_a_guest() {
    let Some(package) = package() else { return };
    let dir = tempfile::tempdir_in(room()).unwrap();
    let guests = Guests::open(dir.path()).unwrap();
    let started = Instant::now();
    let built = guests.build(&request(package, agent())).unwrap();
    let (guest, took) = (built.guest, started.elapsed());
    assert!(built.fresh);

    let kernel = fs::read(&guest.kernel).unwrap();
    assert!(kernel.starts_with(b"\x7fELF") && kernel.len() as u64 == guest.kernel_bytes);
    let note = [&4u32.to_le_bytes()[..], &8u32.to_le_bytes(), &18u32.to_le_bytes(), b"Xen\0"].concat();
    assert!(kernel.windows(note.len()).any(|part| part == note), "it has a PVH entry");
    assert!(guest.release.ends_with("-cloud-amd64") && package.to_str().unwrap().contains(&guest.release));

    let entries = entries(&guest);
    let names: Vec<_> = entries.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names[..9], ["dev", "modules", "proc", "run", "sys", "tmp", "dev/console", "dev/null", "init"]);
    assert!(entries[8].1 == fs::read(agent()).unwrap());
    let modules: Vec<_> =
        entries[9..].iter().map(|(name, bytes)| (module_name(name).to_owned(), bytes.clone())).collect();
    assert!(modules.iter().map(|(name, _)| name).eq(&guest.modules));
    for name in ["virtio_mmio", "virtio_blk", "virtio_net", "erofs", "overlay", "virtio_balloon", "virtio_rng"] {
        assert!(guest.modules.iter().any(|module| module == name), "{name}");
    }
    check_order(&[], &modules);
    assert!(modules[0].1.ends_with(b"~Module signature appended~\n"));

    let mut extra_bytes = 0;
    for group in ["nfs", "netfilter", "net"] {
        let read = |path: &PathBuf| (module_name(path.to_str().unwrap()).to_owned(), fs::read(path).unwrap());
        let order: Vec<_> = guest.extra[group].iter().map(read).collect();
        check_order(&guest.modules, &order);
        extra_bytes += order.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
    }
    let again = Instant::now();
    assert!(!guests.build(&request(package, agent())).unwrap().fresh);
    eprintln!(
        "built in {took:?}, found in {:?}; vmlinux {} bytes, initramfs {}, {} base modules, extra modules {extra_bytes}",
        again.elapsed(),
        guest.kernel_bytes,
        guest.initramfs_bytes,
        guest.modules.len(),
    );

    let mut changed = fs::read(agent()).unwrap();
    changed.push(0);
    let other = dir.path().join("agent");
    fs::write(&other, changed).unwrap();
    let built = guests.build(&request(package, &other)).unwrap();
    assert!(built.fresh && built.guest.id != guest.id);
    assert_eq!(guests.current().unwrap(), Some(built.guest));
    assert_eq!(guests.list().unwrap().len(), 2);
}

#[test]
fn a_program_that_needs_libraries_is_no_agent() {
    let Some(package) = package() else { return };
    let dir = tempfile::tempdir_in(room()).unwrap();
    let guests = Guests::open(dir.path()).unwrap();
    let error = guests.build(&request(package, &program(false))).unwrap_err().to_string();
    assert!(error.contains("linked dynamically"), "{error}");
}

const DIRECTORY: &str = "JOEY_GUEST_TEST_DIRECTORY";

/// Not a test by itself: the process that the next one kills.
#[test]
fn a_process_that_builds() {
    if let (Some(dir), Some(package)) = (std::env::var_os(DIRECTORY), package()) {
        Guests::open(dir).unwrap().build(&request(package, agent())).unwrap();
    }
}

/// Whether there is such a file in what is being made.
fn is_being_made(dir: &Path, file: &str) -> bool {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let new = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(".new-"));
    new.map(|entry| entry.path().join(file)).any(|path| path.exists())
}

#[test]
fn a_build_that_is_killed_leaves_nothing_that_is_taken_for_whole() {
    let Some(package) = package() else { return };
    let dir = tempfile::tempdir_in(room()).unwrap();
    let guests = Guests::open(dir.path()).unwrap();
    for file in ["", "vmlinux", "initramfs", "extra/netfilter", "guest.json"] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_process_that_builds"])
            .env(DIRECTORY, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(120);
        while !is_being_made(dir.path(), file) && child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "no {file} in time");
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let whole = guests.list().unwrap();
        let built = guests.build(&request(package, agent())).unwrap();
        assert_eq!(built.fresh, whole.is_empty(), "killed at {file:?}");
        assert!(!is_being_made(dir.path(), ""), "killed at {file:?}");
        assert!(built.guest.kernel_bytes > 0 && entries(&built.guest).len() == 9 + built.guest.modules.len());
        fs::remove_file(dir.path().join("current")).unwrap();
        guests.remove(&built.guest.id).unwrap();
    }
}
