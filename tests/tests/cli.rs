//! The command line: help, completion, exit codes, the shape of errors, machine-readable output.

use std::process::Command;

use joey_tests::{Joey, Program, Registry, Settings, holds, programs, run, seconds, wait_until};
use serde_json::{Value, json};

fn joey(arguments: &[&str]) -> joey_tests::Outcome {
    run(Command::new(programs().join("joey")).args(arguments).env("NO_COLOR", "1"))
}

/// Every verb of a first-form Joey.
const VERBS: [&str; 22] = [
    "up",
    "down",
    "run",
    "ps",
    "describe",
    "logs",
    "exec",
    "attach",
    "cp",
    "port-forward",
    "debug",
    "diagnose",
    "top",
    "events",
    "restart",
    "rm",
    "image",
    "host",
    "vnode",
    "bench",
    "version",
    "completion",
];

#[test]
fn help_names_every_verb_and_every_verb_has_help() {
    let help = joey(&["--help"]).ok();
    for verb in VERBS {
        assert!(help.contains(verb), "{verb} in {help}");
        assert!(joey(&[verb, "--help"]).ok().contains("Usage"), "{verb} --help");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(joey(&["completion", shell]).ok().contains("joey"), "{shell}");
    }
}

#[test]
fn the_version_tells_what_executes_machines() {
    // Without a daemon it is told all the same, and machines are not guessed at.
    let away = joey(&["version", "--data-dir", "/nonexistent/joey"]).ok();
    assert!(away.contains(env!("CARGO_PKG_VERSION")), "{away}");
    assert!(away.contains("virtual machines: not known: no joey answers at /nonexistent/joey"), "{away}");
    let away: Value = joey(&["version", "--data-dir", "/nonexistent/joey", "-o", "json"]).json();
    assert_eq!((&away["machines"]["known"], &away["version"]), (&json!(false), &json!(env!("CARGO_PKG_VERSION"))));
    assert!(away["machines"]["emulated"].is_null() && away["machines"]["by"].is_null(), "{away}");
    // One that has no guest says why it has no machines.
    let running = Joey::start();
    let told = running.joey(&["version"]).ok();
    assert!(told.contains("virtual machines: none: ") && told.contains("joey guest build"), "{told}");
    let told: Value = running.joey(&["version", "-o", "json"]).json();
    assert!(told["machines"]["known"] == true && told["machines"]["by"].is_null(), "{told}");
    drop(running);
    // What has them says the same as the list of hosts, and loudly where nothing but software executes them.
    let Some(running) = Joey::start_with_machines(Settings::default()) else { return };
    let hosts: Value = running.joey(&["host", "ls", "-o", "json"]).json();
    let told: Value = running.joey(&["version", "-o", "json"]).json();
    assert_eq!(told["machines"]["by"], hosts[0]["machines"]);
    let emulated = hosts[0]["machines"].as_str().expect("it has machines").contains("emulated");
    assert_eq!(told["machines"]["emulated"], emulated, "{told}");
    assert_eq!(running.joey(&["version"]).ok().contains("EMULATED"), emulated);
}

#[test]
fn wrong_usage_is_2_and_failure_is_1() {
    for wrong in
        [&["no-such-verb"][..], &["run"], &["up", "--no-such-flag"], &["logs"], &["ps", "-o", "no-such-format"]]
    {
        let outcome = joey(wrong);
        assert_eq!(outcome.code, 2, "{wrong:?}: {}", outcome.stderr);
        assert!(outcome.stdout.is_empty(), "errors do not go to standard output");
    }
    let away = joey(&["ps", "--data-dir", "/nonexistent/joey"]);
    let error = away.fails(1);
    assert!(error.starts_with("error: ") && error.contains("hint: "), "{error}");
    let wrong = joey(&["up", "--data-dir", "/nonexistent/joey", "--pod-range", "not-a-range"]);
    assert_eq!(wrong.code, 2, "{}", wrong.stderr);
    // Told at once: nothing is asked for what cannot be meant.
    let malformed = joey(&["run", "Bad//Ref:::", "--data-dir", "/nonexistent/joey"]);
    let error = malformed.fails(2);
    assert!(error.contains("Bad//Ref:::"), "{error}");
}

#[test]
fn errors_name_the_object_and_output_is_for_machines() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    for verb in [&["describe", "absent"][..], &["logs", "absent"], &["rm", "absent"], &["exec", "absent", "--", "true"]]
    {
        let error = joey.joey(verb).fails(1);
        assert!(error.starts_with("error: ") && error.contains("absent"), "{verb:?}: {error}");
    }
    assert_eq!(joey.joey(&["ps", "-o", "json"]).json().as_array().map(Vec::len), Some(0));
    joey.joey(&["run", &registry.demo(), "--name", "shown", "--env", "COLOUR=brown"]).ok();
    let list = joey.joey(&["ps", "-o", "json"]).json();
    assert_eq!(list[0]["spec"]["name"], "shown");
    assert!(joey.joey(&["ps", "-o", "yaml"]).ok().contains("name: shown"));
    let described = joey.joey(&["describe", "shown"]).ok();
    assert!(described.contains("shown") && described.contains(&registry.demo()), "{described}");
    assert_eq!(joey.joey(&["exec", "shown", "--", "sh", "-c", "echo $COLOUR; exit 4"]).code, 4);
    assert!(joey.joey(&["host", "ls", "-o", "json"]).json().is_array());
    let events = joey.joey(&["events", "shown", "-o", "json"]).json();
    assert!(events.as_array().expect("a list").iter().any(|event| event["reason"] == "Started"), "{events}");
    let pulled = joey.joey(&["image", "pull", &registry.demo(), "-o", "json"]).json();
    assert!(pulled["references"].to_string().contains("joey/hello"), "{pulled}");

    let error = joey.joey(&["exec", "shown", "--", "no-such-program"]).fails(127);
    assert!(error.contains("\"no-such-program\": executable file not found"), "{error}");
    joey.joey(&["exec", "shown", "--", "/etc/passwd"]).fails(126);
    let error = joey.joey(&["exec", "shown", "-c", "beside", "--", "true"]).fails(1);
    assert!(error.contains("beside") && error.contains("hint: its containers are: shown"), "{error}");
    // One that is not there does not keep the others.
    let outcome = joey.joey(&["rm", "absent", "shown", "--grace", "1"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (1, "shown\n"), "{outcome:?}");
    assert!(outcome.stderr.contains("\"absent\""), "{outcome:?}");
}

#[test]
fn what_does_not_start_is_told_and_does_not_stay_unasked() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let nothing = registry.image("joey/nothing:1");
    let error = joey.joey(&["run", "--rm", &nothing]).fails(1);
    assert!(error.contains("joey/nothing") && !error.contains("joey rm"), "{error}");
    let error = joey.joey(&["run", "--rm", &registry.demo(), "--command", "no-such-program"]).fails(1);
    assert!(error.contains("no-such-program"), "{error}");
    assert_eq!(joey.joey(&["run", "--rm", &registry.demo(), "--command", "sh", "--", "-c", "exit 9"]).code, 9);
    // Joined from its start: it reads what is said here, once, and its end is this one's.
    let script = "pwd; read line; echo got $line; exit 4";
    let shell = ["run", "-i", "--rm", &registry.demo(), "--workdir", "/etc", "--command", "sh", "--", "-c", script];
    let joined = joey.joey_with_input(&shell, b"word\n");
    assert_eq!((joined.code, joined.stdout.as_str()), (4, "/etc\ngot word\n"), "{joined:?}");
    let kept = ["run", "-i", "--name", "kept", &registry.demo(), "--command", "cat"];
    assert_eq!(joey.joey_with_input(&kept, b"to and fro\n").ok(), "to and fro\n");
    assert!(joey.joey(&["describe", "kept"]).ok().contains("Succeeded"), "it is run once");
    joey.joey(&["rm", "kept"]).ok();
    let full = [
        "run",
        "--rm",
        "--disk",
        "2Mi",
        &registry.demo(),
        "--command",
        "sh",
        "--",
        "-c",
        "dd if=/dev/zero of=/f; sleep 60",
    ];
    assert!(joey.joey(&full).fails(1).contains("Evicted"));
    assert!(joey.joey(&["run", "--disk", "1k", &registry.demo()]).fails(2).contains("at least 1Mi"));
    assert!(joey.joey(&["run", "-it", &registry.demo()]).fails(2).contains("-t needs a terminal"));
    wait_until("what was to be removed is gone", seconds(10), || {
        let left = joey.joey(&["ps", "-o", "json"]).ok();
        holds(left.trim() == "[]", left)
    });

    let error = joey.joey(&["run", &nothing, "--name", "stuck"]).fails(1);
    assert!(error.contains("joey/nothing") && error.contains("hint: "), "{error}");
    let error = joey.joey(&["logs", "stuck"]).fails(1);
    assert!(error.contains("has not run yet") && error.contains("joey/nothing"), "{error}");
    let error = joey.joey(&["run", &registry.demo(), "--name", "wrong", "--command", "no-such-program"]).fails(1);
    assert!(error.contains("no-such-program") && error.contains("joey rm wrong"), "{error}");
    joey.joey(&["rm", "-f", "stuck", "wrong"]).ok();
}

#[test]
fn an_interrupted_run_removes_what_it_started() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let mut command = joey.joey_command(&["run", "--rm", &registry.demo(), "--name", "brief", "--command", "sh"]);
    command.args(["--", "-c", "echo here; sleep 1000"]);
    let mut run = Program::start(&mut command, &joey.scratch().join("run"));
    assert!(
        joey.joey(&["run", "-d", &registry.demo(), "--name", "late", "--restart", "never", "--command", "hostname"])
            .code
            == 0
    );
    assert_eq!(joey.joey(&["logs", "-f", "late"]).ok(), "late\n", "it is followed from before its start");
    wait_until("it says something", seconds(20), || holds(run.output() == "here\n", run.output()));
    run.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(run.wait(seconds(10)), 130);
    wait_until("it is gone", seconds(10), || holds(joey.joey(&["describe", "brief"]).code == 1, "it is there"));
}

#[test]
fn bench_tells_what_pods_take() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    let started = joey.joey(&["bench", "start", "--count", "2", "--image", &image, "-o", "json"]).json();
    for key in ["running_ms", "ready_ms", "pods_per_minute", "memory_per_pod_kib", "idle_memory_kib"] {
        assert!(!started[key].is_null(), "{key} in {started}");
    }
    let arguments = ["bench", "probes", "--count", "2", "--seconds", "3", "--image", &image, "-o", "json"];
    for (probe, asked) in [("none", 0), ("http", 4), ("exec", 4)] {
        let told = joey.joey(&[&arguments[..], &["--probe", probe]].concat()).json();
        assert_eq!((&told["probe"], &told["probes_per_second"]), (&probe.into(), &asked.into()), "{told}");
        let spent = told["cpu_percent_per_pod"].as_f64().expect("a number");
        assert!(spent < 20.0 && (asked == 0 || spent > 0.0), "{told}");
    }
    assert!(joey.joey(&["ps"]).ok().lines().count() == 1, "nothing is left of it");
}
