//! Point 8: `kill -9` of `joey up` at any moment loses nothing.

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use joey_tests::host::{process_runs, process_start};
use joey_tests::image::{Entry, Image, Layer, Packing};
use joey_tests::joey::{Settings, pod};
use joey_tests::served::Served;
use joey_tests::source::checkpoints;
use joey_tests::{Joey, Registry, holds, pause, run, seconds, wait_until};
use serde_json::{Value, json};

/// A Pod that counts, ten lines a second.
const COUNT: [&str; 3] = ["sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.1; done"];

fn assert_no_gap(log: &str) {
    for (expected, line) in log.lines().enumerate() {
        assert_eq!(line, expected.to_string(), "a line is missing or doubled");
    }
}

#[test]
fn pods_outlive_the_daemon_and_are_adopted() {
    let registry = Registry::with_demo_image();
    let mut joey = Joey::start();
    let names = ["a", "b", "c"];
    for name in names {
        joey.run_pod(name, &registry.demo(), &COUNT);
    }
    let identity =
        |joey: &Joey| names.map(|name| joey.pid_of(&format!("{name}.default"))).map(|pid| (pid, process_start(pid)));
    let before = identity(&joey);
    for _ in 0..3 {
        joey.kill();
        assert!(before.iter().all(|(pid, _)| process_runs(*pid)), "Pods go on without it");
        // From the start of the process: its own start, adoption, and a command in each Pod.
        let begin = Instant::now();
        joey.up();
        wait_until("all Pods are adopted", seconds(5), || {
            let entered = |name| joey.kubectl(&["exec", name, "--", "true"]).code == 0;
            holds(names.into_iter().all(entered), "not all can be entered")
        });
        assert!(begin.elapsed() < seconds(5), "adopted after {:?}", begin.elapsed());
        assert_eq!(identity(&joey), before, "the same processes");
    }
    for name in names {
        assert_no_gap(&joey.kubectl(&["logs", name]).ok());
        assert_eq!(joey.get("pod", name)["status"]["containerStatuses"][0]["restartCount"], 0);
    }
}

#[test]
fn what_ends_while_the_daemon_is_away_is_told_afterwards() {
    let registry = Registry::with_demo_image();
    let mut joey = Joey::start();
    joey.run_pod("ends", &registry.demo(), &["sh", "-c", "sleep 2; echo done; exit 9"]);
    let pid = joey.pid_of("ends.default");
    joey.kill();
    wait_until("it ends", seconds(10), || holds(!process_runs(pid), pid));
    joey.up();
    let state = wait_until("its end is told", seconds(10), || {
        let pod = joey.get("pod", "ends");
        let state = pod["status"]["containerStatuses"][0]["state"]["terminated"].clone();
        if state.is_object() { Ok(state) } else { Err(pod["status"].to_string()) }
    });
    assert_eq!(state["exitCode"], 9);
    assert_eq!(joey.kubectl(&["logs", "ends"]).ok(), "done\n");
}

#[test]
fn killed_at_random_moments_of_creation_and_deletion() {
    let registry = Registry::with_demo_image();
    let mut joey = Joey::start();
    for round in 0..6 {
        let names: Vec<_> = (0..4).map(|number| format!("r{round}-{number}")).collect();
        for name in &names {
            joey.apply(&pod(name, &registry.demo(), &COUNT));
        }
        pause(Duration::from_millis(rand::random::<u64>() % 400));
        joey.kill();
        joey.up();
        for name in &names {
            joey.wait_for(name, "Ready", seconds(60));
            assert_no_gap(&joey.kubectl(&["logs", name]).ok());
        }
        for name in &names {
            joey.kubectl(&["delete", "pod", name, "--wait=false", "--grace-period=1"]).ok();
        }
        pause(Duration::from_millis(rand::random::<u64>() % 1500));
        joey.kill();
        joey.up();
        wait_until("all are gone", seconds(60), || {
            let left = joey.kubectl(&["get", "pods", "-o", "name"]).ok() + &joey.joey(&["ps", "-o", "json"]).ok();
            holds(!left.contains("r0") && !left.contains(&format!("r{round}-")), left)
        });
    }
    joey.down().ok();
    assert!(joey.traces().is_empty(), "{:?}", joey.traces());
}

/// An image of which no layer is on the host yet, so that the steps of a pull are reached too.
fn fresh_image(served: &Served, name: &str) -> String {
    let own = Layer::new(&[Entry::file("name", name.as_bytes())], Packing::Gzip);
    let config = json!({"Env": ["PATH=/bin"]});
    served.add(&format!("{name}:1"), &Image::new(vec![Layer::shell(), own], config))
}

/// A Pod that takes every step of creation, change and deletion: with caps, and with a ConfigMap of its name to show.
fn eventful(name: &str, image: &str) -> Value {
    let mut object = pod(name, image, &COUNT);
    object["metadata"]["annotations"] =
        json!({"kubernetes.io/ingress-bandwidth": "50M", "kubernetes.io/egress-bandwidth": "50M"});
    object["spec"]["volumes"] = json!([{"name": "shown", "configMap": {"name": name}}]);
    object["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "shown", "mountPath": "/shown"}]);
    object
}

/// Makes, changes and deletes a Pod until the armed step ends `joey up` or time is up. The uid of the Pod that was acknowledged
/// and not asked to go.
fn provoke(joey: &mut Joey, name: &str, object: &str) -> Option<String> {
    let (mut acknowledged, mut leaving) = (None, false);
    let pod = format!("pod/{name}");
    let end = Instant::now() + seconds(40);
    for round in 1.. {
        if Instant::now() >= end || joey.program().ended().is_some() {
            break;
        }
        // The step may lie in the start, in the creation or in the deletion: any of these calls may find nobody.
        let apply = ["--request-timeout=2s", "apply", "-f", "-", "-o", "jsonpath={.metadata.uid}"];
        let applied = joey.kubectl_with_input(&apply, object);
        if applied.code != 0 {
            continue;
        }
        // What was asked to go before may go yet.
        acknowledged = Some(applied.stdout).filter(|_| !leaving);
        if joey.kubectl(&["wait", "--for=condition=Ready", &pod, "--timeout=10s"]).code != 0 {
            continue;
        }
        let value = round.to_string();
        let change = json!({"data": {"value": value}}).to_string();
        if joey.kubectl(&["--request-timeout=2s", "patch", "configmap", name, "-p", &change]).code == 0 {
            wait_until("the change is shown", seconds(30), || {
                let seen = joey.kubectl(&["exec", name, "--", "cat", "/shown/value"]).stdout;
                holds(seen == value || joey.program().ended().is_some(), seen)
            });
        }
        joey.renew(name);
        if joey.program().ended().is_none() {
            acknowledged = None;
            leaving = joey.kubectl(&["delete", &pod, "--grace-period=1", "--timeout=10s"]).code != 0;
        }
    }
    acknowledged
}

#[test]
fn killed_at_each_durable_step() {
    // Those of agents and of machines are for other tests.
    let own = |step: &String| !step.starts_with("agent.") && !step.starts_with("machine.");
    let steps: Vec<_> = checkpoints().into_iter().filter(own).collect();
    assert!(steps.len() >= 6, "creation and deletion have durable steps: {steps:?}");
    let (registry, served) = (Registry::with_demo_image(), Served::start());
    // Most of the time is waiting for what the kill left to be noticed: several are killed side by side.
    let reached: Vec<String> = std::thread::scope(|scope| {
        let shares = (0..SIDE_BY_SIDE).map(|first| steps.iter().skip(first).step_by(SIDE_BY_SIDE).cloned().collect());
        let threads = shares.map(|share: Vec<String>| scope.spawn(|| killed_at(share, &registry, &served)));
        let threads: Vec<_> = threads.collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("its steps were survived")).collect()
    });
    let missed: Vec<_> = steps.iter().filter(|step| !reached.contains(step)).collect();
    assert!(missed.is_empty(), "these steps were never reached: {missed:?}");
}

const SIDE_BY_SIDE: usize = 3;

/// Kills one joey at each of these steps; those that were reached.
fn killed_at(steps: Vec<String>, registry: &Registry, served: &Served) -> Vec<String> {
    let mut joey = Joey::start();
    joey.run_pod("steady", &registry.demo(), &COUNT);
    let steady = joey.pid_of("steady.default");
    let mut reached = Vec::new();
    for step in &steps {
        let name = format!("at-{}", step.replace(['.', '_'], "-"));
        let object = eventful(&name, &fresh_image(served, &name));
        joey.kubectl(&["create", "configmap", &name, "--from-literal=value=0"]).ok();
        joey.kill();
        joey.crash_at(Some(step));
        joey.launch();
        let acknowledged = provoke(&mut joey, &name, &object.to_string());
        if joey.program().ended().is_some() {
            reached.push(step.clone());
        } else {
            joey.kill();
        }
        joey.crash_at(None);
        joey.up();
        assert!(process_runs(steady), "{step}: another Pod never notices");
        if let Some(uid) = acknowledged {
            let kept = joey.get("pod", &name);
            assert_eq!(kept["metadata"]["uid"], uid, "{step}: a Pod that was acknowledged is lost: {kept}");
        }
        // Finished or undone: the Pod can be had, and can go.
        wait_until("the Pod can be had", seconds(60), || {
            let outcome = joey.kubectl_with_input(&["apply", "-f", "-"], &object.to_string());
            let wait = joey.kubectl(&["wait", "--for=condition=Ready", &format!("pod/{name}"), "--timeout=10s"]);
            holds(outcome.code == 0 && wait.code == 0, format!("{step}: {}{}", outcome.stderr, wait.stderr))
        });
        joey.kubectl(&["delete", "pod", &name, "--grace-period=1", "--timeout=30s"]).ok();
    }
    assert_no_gap(&joey.kubectl(&["logs", "steady"]).ok());
    joey.down().ok();
    assert!(joey.traces().is_empty(), "{:?}", joey.traces());
    reached
}

#[test]
fn one_data_directory_has_one_joey() {
    let joey = Joey::start();
    let refused = joey.joey(&["up", "--listen", "127.0.0.1:0"]).fails(1);
    assert!(refused.contains(&joey.data().display().to_string()) || refused.contains("already"), "{refused}");
    assert_eq!(joey.kubectl(&["get", "--raw", "/readyz"]).code, 0, "the first goes on");
}

/// A disk for instances that is small, mounted before Joey starts and taken away after it.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mounted(place: std::path::PathBuf) -> Self {
        std::fs::create_dir_all(&place).expect("a place to mount at");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m,mode=0700", "small"]).arg(&place)).ok();
        Self(place)
    }

    fn fill(&self) {
        let mut ballast = std::fs::File::create(self.0.join("ballast")).expect("a last file");
        while ballast.write_all(&[1; 512]).is_ok() {}
    }

    fn make_room(&self) {
        std::fs::remove_file(self.0.join("ballast")).expect("the ballast is there");
    }

    fn entries(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).expect("the disk is mounted").flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_refuses_clearly_and_leaves_nothing_half_made() {
    let registry = Registry::with_demo_image();
    let mut joey = Joey::prepare(Settings::default());
    let disk = SmallDisk::mounted(joey.data().join("instances"));
    joey.up();
    joey.run_pod("first", &registry.demo(), &COUNT);
    let pid = joey.pid_of("first.default");
    disk.fill();
    let there = disk.entries();
    let refused = joey.joey(&["run", &registry.demo(), "--name", "second"]).fails(1);
    assert!(refused.contains("disk is full") && refused.contains("hint: free space"), "{refused}");
    assert_eq!(disk.entries(), there, "nothing half made");
    assert!(!joey.joey(&["ps", "-o", "json"]).ok().contains("second"), "nothing is remembered of it");
    // A Pod waits, says why, and starts when there is room.
    joey.apply(&pod("third", &registry.demo(), &COUNT));
    wait_until("its wait is explained", seconds(30), || {
        let told = joey.kubectl(&["get", "events", "-o", "jsonpath={.items[*].reason}"]).ok();
        holds(told.contains("DiskFull"), told)
    });
    assert!(process_runs(pid), "the first goes on");
    disk.make_room();
    joey.wait_for("third", "Ready", seconds(60));
    joey.joey(&["run", &registry.demo(), "--name", "second", "--detach"]).ok();
    assert_eq!(joey.pid_of("first.default"), pid);
    joey.down().ok();
    drop(disk);
    assert!(joey.traces().is_empty(), "{:?}", joey.traces());
}
