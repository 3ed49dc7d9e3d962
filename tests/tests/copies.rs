//! Copies of templates that fail, of class `rund` on the whole system: the Pod runs all the same, in a machine that is booted, and its
//! events say why.

use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use joey_tests::arena::{Arena, Class};
use joey_tests::{Joey, holds, pause, seconds, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Pods after each other until one of them was to be a copy: a machine that is booted, or was kept ready, is none.
const TRIES: usize = 5;
/// How long it may take until a template is kept whose machine has rested.
const RESTED: Duration = seconds(150);

/// An arena in which a template was made and kept.
fn with_template() -> Option<(Arena, String, PathBuf)> {
    let arena = Arena::new(Class::Rund)?;
    let image = arena.image("copies", &[], json!({}));
    arena.run_pod("first", &image, &[]);
    let templates = arena.joey.data().join("machines/templates");
    let template = wait_until("a template is kept", RESTED, || {
        let all = std::fs::read_dir(&templates).into_iter().flatten().flatten().map(|entry| entry.path());
        let kept = all.filter(|path| path.extension().is_none()).find(|path| has_rested(path));
        kept.ok_or_else(|| arena.joey.output().lines().last().unwrap_or_default().to_owned())
    });
    arena.joey.delete_pod("first");
    Some((arena, image, template))
}

/// What the Pod's events say of its machine.
fn remark(joey: &Joey, name: &str) -> Option<String> {
    let selector = format!("involvedObject.name={name}");
    let events: Value = joey.kubectl(&["get", "events", "-o", "json", "--field-selector", &selector]).json();
    let said = events["items"].as_array()?.iter().find(|event| event["reason"] == "SandboxRemark")?;
    said["message"].as_str().map(str::to_owned)
}

/// How the Pod's machine came to be: the phases of its start.
fn phases(joey: &Joey, name: &str) -> String {
    joey.instance_of(name)["status"]["timings"].to_string()
}

/// Runs Pods until one could not be a copy; each of them has to run.
#[track_caller]
fn until_one_fails(arena: &Arena, image: &str, apply: impl Fn(&Value)) {
    let mut seen = Vec::new();
    for number in 0..TRIES {
        let name = format!("pod-{number}");
        apply(&arena.pod(&name, image, &[]));
        arena.joey.wait_for(&name, "Ready", arena.patience());
        assert_eq!(arena.inside(&name, "echo it runs").ok(), "it runs\n");
        let phases = phases(&arena.joey, &name);
        let said = remark(&arena.joey, &name);
        arena.joey.delete_pod(&name);
        if let Some(said) = said {
            assert!(said.contains("no copy of a template could be made") && said.contains("booted"), "{said}");
            assert!(phases.contains("sandbox.start") && !phases.contains("sandbox.copy"), "{phases}");
            return;
        }
        seen.push(phases);
        // A template that is there already is read by a new daemon while the first machine boots.
        pause(seconds(1));
    }
    panic!("no copy failed: {seen:#?}");
}

/// Turns over bits of a file all through its first MiB.
fn damage(path: &Path) {
    let file = File::options().read(true).write(true).open(path);
    let file = file.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut bytes = vec![0; 1 << 20];
    let count = file.read_at(&mut bytes, 0).expect("it can be read");
    bytes.iter_mut().skip(64).step_by(97).for_each(|byte| *byte ^= 0x55);
    file.write_all_at(&bytes[..count], 0).expect("it can be written");
}

/// Whether the machine that the template in this place was made of had rested: it stays as it is then.
fn has_rested(template: &Path) -> bool {
    let key = std::fs::read_to_string(template.join("key")).unwrap_or_default();
    key.lines().next().is_some_and(|made_of| made_of.ends_with(" rested"))
}

/// Another template is kept in the place of this one, and its machine had rested.
fn until_another_one_is_kept(template: &Path, is_another: impl Fn() -> std::io::Result<bool>) {
    wait_until("another template is kept", RESTED, || {
        let kept = has_rested(template) && is_another().is_ok_and(|is_another| is_another);
        holds(kept, "it is the same, or none")
    });
}

/// Another template is made in the place of one that is not whole, of which there are copies again.
fn until_there_are_copies_again(arena: &Arena, image: &str) {
    wait_until("there are copies again", seconds(120), || {
        let name = joey_tests::unique("again");
        arena.run_pod(&name, image, &[]);
        let phases = phases(&arena.joey, &name);
        arena.joey.delete_pod(&name);
        holds(phases.contains("sandbox.copy") || phases.contains("sandbox.give"), phases)
    });
}

#[test]
fn a_template_that_was_damaged_on_the_disk_is_made_again() {
    let Some((mut arena, image, template)) = with_template() else { return };
    for file in ["memory", "state"] {
        arena.joey.kill();
        let made = || std::fs::metadata(template.join("key"))?.modified();
        let before = made().expect("a key");
        damage(&template.join(file));
        arena.joey.up();
        until_there_are_copies_again(&arena, &image);
        until_another_one_is_kept(&template, || Ok(made()? > before));
    }
}

#[test]
fn a_template_that_no_copy_can_be_made_of_is_given_up() {
    let Some((mut arena, image, template)) = with_template() else { return };
    arena.joey.kill();
    // Whole as far as can be told, and nothing that a monitor can read.
    let (key, state) = (template.join("key"), template.join("state"));
    damage(&state);
    let damaged = std::fs::read(&state).expect("a state");
    let digest = digest(&template);
    let text = std::fs::read_to_string(&key).expect("a key");
    std::fs::write(&key, format!("{}\n{digest}", text.lines().next().expect("a line"))).expect("it can be written");
    arena.joey.up();
    until_one_fails(&arena, &image, |object| drop(arena.joey.apply(object)));
    until_there_are_copies_again(&arena, &image);
    until_another_one_is_kept(&template, || Ok(std::fs::read(&state)? != damaged));
}

/// What a template's key says of its contents.
fn digest(template: &Path) -> String {
    let mut hash = Sha256::new_with_prefix(std::fs::read(template.join("state")).expect("a state"));
    let mut memory = BufReader::with_capacity(1 << 20, File::open(template.join("memory")).expect("memory"));
    let (mut page, mut at) = ([0; 4096], 0_u64);
    while memory.read_exact(&mut page).is_ok() {
        if page != [0; 4096] {
            hash.update(at.to_le_bytes());
            hash.update(page);
        }
        at += 4096;
    }
    format!("{:x}", hash.finalize())
}

/// The monitors that instances have, and whether they were kept ready for whoever comes.
fn monitors(instances: &Path) -> Vec<(i32, bool)> {
    let dirs = std::fs::read_dir(instances).into_iter().flatten().flatten();
    let records = dirs.filter_map(|dir| std::fs::read_to_string(dir.path().join("vm/vmm.pid")).ok());
    let pids = records.filter_map(|text| text.split(' ').next().and_then(|pid| pid.parse::<i32>().ok()));
    let known = pids.filter_map(|pid| Some((pid, std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)));
    known.map(|(pid, cgroup)| (pid, cgroup.contains("/warm-"))).collect()
}

#[test]
fn a_monitor_that_is_killed_while_it_copies_is_made_up_for() {
    let Some((mut arena, image, _)) = with_template() else { return };
    let instances = arena.joey.data().join("instances");
    until_one_fails(&arena, &image, |object| {
        let mut seen: Vec<i32> = monitors(&instances).into_iter().map(|(pid, _)| pid).collect();
        let place = instances.clone();
        // It looks before there is anything: a copy is made in less time than kubectl takes to end.
        let killer = std::thread::spawn(move || {
            wait_until("a copy is killed", seconds(30), || {
                for (pid, warm) in monitors(&place) {
                    if !seen.contains(&pid) {
                        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it runs");
                        seen.push(pid);
                        // A machine that was kept ready is followed by a copy, and that by one that is booted.
                        return holds(!warm, "one that was kept ready");
                    }
                }
                Err("none".to_owned())
            });
        });
        arena.joey.apply(object);
        killer.join().expect("a copy was killed");
    });
    // Who ends everything has no copy begin, though one was used lately.
    arena.run_pod("last", &image, &[]);
    arena.joey.kill();
    arena.joey.down().ok();
    assert!(arena.joey.traces().is_empty(), "{:?}", arena.joey.traces());
}
