//! The command line: help, completion, exit codes, the shape of errors, machine-readable output.

use std::process::Command;

use joey_tests::{Joey, Registry, programs, run};

fn joey(arguments: &[&str]) -> joey_tests::Outcome {
    run(Command::new(programs().join("joey")).args(arguments).env("NO_COLOR", "1"))
}

/// Every verb of a first-form Joey.
const VERBS: [&str; 21] = [
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
    assert!(joey(&["version"]).ok().contains(env!("CARGO_PKG_VERSION")));
    for shell in ["bash", "zsh", "fish"] {
        assert!(joey(&["completion", shell]).ok().contains("joey"), "{shell}");
    }
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
}
