//! Point 7: what flows in and out of containers, by both protocols of kubectl and by joey's own commands.

use std::process::Command;

use joey_tests::joey::pod;
use joey_tests::program::run_with_input;
use joey_tests::{Joey, Registry, holds, seconds, wait_until};
use serde_json::json;

/// Three megabytes of lines.
fn megabytes() -> Vec<u8> {
    (0..).flat_map(|number: u32| format!("line {number} of many\n").into_bytes()).take(3_000_000).collect()
}

/// kubectl's words at -v=6 show an upgrade of `verb`, none of another, and that nothing was fallen back to: GET is a
/// websocket, POST is SPDY.
#[track_caller]
fn upgraded_by(verb: &str, path: &str, words: &str) {
    let upgrades: Vec<_> = words.lines().filter(|line| line.contains(path) && line.contains("101 Switching")).collect();
    let fits = |line: &&str| line.contains(&format!(" {verb} ")) || line.contains(&format!("verb=\"{verb}\""));
    assert!(!upgrades.is_empty() && upgrades.iter().all(fits), "{path} by {verb}: {words}");
    assert!(!words.contains("RemoteCommand fallback"), "{words}");
}

/// A container that counts what its first caller writes.
fn counts(name: &str, image: &str) -> serde_json::Value {
    let mut object = pod(name, image, &["sh", "-c", "wc -c; echo over"]);
    object["spec"]["containers"][0]["stdin"] = json!(true);
    object["spec"]["containers"][0]["stdinOnce"] = json!(true);
    object
}

#[test]
fn commands_are_entered_joined_and_fed_by_both_protocols() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.apply(&pod("box", &registry.demo(), &["sleep", "1000"]));
    let ways: Vec<(String, &str, &str)> = (0..joey.kubectls().len())
        .flat_map(|kubectl| {
            [("true", "GET"), ("false", "POST")].map(|(way, verb)| (format!("way-{kubectl}-{way}"), way, verb))
        })
        .collect();
    for (name, _, _) in &ways {
        joey.apply(&counts(name, &registry.demo()));
    }
    joey.wait_for("box", "Ready", seconds(60));
    let big = megabytes();
    let text = String::from_utf8_lossy(&big).into_owned();
    let file = joey.scratch().join("big");
    std::fs::write(&file, &big).expect("a fresh folder is writable");
    for (number, (name, way, verb)) in ways.iter().enumerate() {
        // Each second way is the next kubectl.
        let call = |arguments: &[&str], input: &[u8]| {
            let mut command = joey.kubectls().swap_remove(number / 2);
            command.arg("-v=6").args(arguments).env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", way);
            run_with_input(&mut command, input)
        };
        let there_and_back = ["exec", "-i", "box", "--", "sh", "-c", "cat; echo said >&2; exit 7"];
        let entered = call(&there_and_back, &big);
        assert_eq!(entered.code, 7, "{name}: {}", entered.stderr);
        assert!(entered.stdout == text, "{name}: {} bytes came back", entered.stdout.len());
        assert!(entered.stderr.lines().any(|line| line == "said"), "{name}: {}", entered.stderr);
        upgraded_by(verb, "/exec?", &entered.stderr);

        joey.wait_for(name, "Ready", seconds(60));
        let joined = call(&["attach", "-i", name], &big);
        upgraded_by(verb, "/attach?", &joined.stderr);
        assert_eq!(joined.ok(), "3000000\nover\n", "{name}");

        let (to, back) = (format!("box:/tmp/{name}"), joey.scratch().join(format!("back-{name}")));
        let sent = call(&["cp", &file.display().to_string(), &to], b"");
        upgraded_by(verb, "/exec?", &sent.stderr);
        sent.ok();
        let fetched = call(&["cp", &to, &back.display().to_string()], b"");
        upgraded_by(verb, "/exec?", &fetched.stderr);
        fetched.ok();
        assert!(std::fs::read(&back).is_ok_and(|bytes| bytes == big), "{name}: what was copied there and back differs");
    }
}

/// Runs `joey ARGUMENTS` on a terminal of its own, with `input` typed into it.
fn on_a_terminal(joey: &Joey, arguments: &[&str], input: &str) -> joey_tests::Outcome {
    let command = joey.joey_command(arguments);
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    let line = words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let mut command = Command::new("script");
    command.args(["-qec", &line, "/dev/null"]).env("TERM", "xterm").env_remove("KUBECONFIG");
    run_with_input(&mut command, input.as_bytes())
}

#[test]
fn joey_enters_joins_and_debugs() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.apply(&pod("box", &registry.demo(), &["sleep", "1000"]));
    joey.apply(&counts("counts", &registry.demo()));
    for name in ["box", "counts"] {
        joey.wait_for(name, "Ready", seconds(60));
    }
    let big = megabytes();
    let there_and_back = ["exec", "-i", "box.default", "--", "sh", "-c", "cat; echo said >&2; exit 7"];
    let entered = joey.joey_with_input(&there_and_back, &big);
    assert_eq!((entered.code, entered.stderr.as_str()), (7, "said\n"));
    assert!(entered.stdout.as_bytes() == big, "{} bytes came back", entered.stdout.len());
    assert!(joey.joey(&["exec", "-t", "box.default", "--", "tty"]).ok().starts_with("/dev/pts/"));
    let typed = "\necho got-$((40+2))\nexit 3\n";
    let shell = on_a_terminal(&joey, &["exec", "-it", "box.default", "--", "sh"], typed);
    assert!(shell.code == 3 && shell.stdout.contains("got-42"), "{shell:?}");

    assert_eq!(joey.joey_with_input(&["attach", "-i", "counts.default"], &big).ok(), "3000000\nover\n");
    let refused = joey.joey(&["attach", "-i", "box.default"]).fails(1);
    assert!(refused.contains("made without a standard input") && refused.contains("hint: "), "{refused}");
    let refused = joey.joey(&["attach", "-t", "box.default"]).fails(1);
    assert!(refused.contains("made without a terminal"), "{refused}");

    let image = registry.demo();
    let look = ["debug", "box.default", "--image", image.as_str(), "--target", "main", "-it", "--", "sh"];
    let looked = on_a_terminal(&joey, &look, "\nps\nexit 5\n");
    assert!(looked.code == 5 && looked.stdout.contains("sleep 1000"), "it sees the target: {looked:?}");
    let pipe = ["debug", "box.default", "--image", image.as_str(), "-i", "-c", "piped", "--", "sh"];
    let piped = joey.joey_with_input(&pipe, b"echo piped-$((40+2))\nexit 4\n");
    assert!(piped.code == 4 && piped.stdout.contains("piped-42"), "{piped:?}");
}

/// How it ended kubectl asks the Pod: to attach to it ends well.
#[test]
fn a_pod_that_is_joined_and_fails_is_told_once() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = format!("--image={}", registry.demo());
    let script = "sleep 1; echo said; exit 2";
    let run = ["run", "brief", &image, "--restart=Never", "-i", "--rm", "--command", "--", "sh", "-c", script];
    let outcome = joey.kubectl(&run);
    assert_eq!(outcome.code, 2, "{outcome:?}");
    assert_eq!(outcome.stdout.matches("said").count(), 1, "{outcome:?}");
    assert!(!outcome.stderr.contains("couldn't attach"), "{outcome:?}");
}

#[test]
fn joey_tells_logs_in_every_way() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let script = "echo line 1; echo line 2; sleep 2; echo line 3; echo line 4; \
                  until test -e /tmp/end; do sleep 0.1; done; echo end; exit 1";
    let mut object = pod("talks", &registry.demo(), &["sh", "-c", script]);
    object["spec"]["restartPolicy"] = "Always".into();
    joey.apply(&object);
    joey.wait_for("talks", "Ready", seconds(60));
    let logs = |more: &[&str]| joey.joey(&[&["logs", "talks.default"][..], more].concat());
    let all = "line 1\nline 2\nline 3\nline 4\n";
    wait_until("it has said all", seconds(10), || holds(logs(&[]).stdout == all, logs(&[]).stdout));
    assert_eq!(logs(&["--tail", "2"]).ok(), "line 3\nline 4\n");
    assert_eq!(logs(&["--tail", "0"]).ok(), "");
    assert_eq!(logs(&["--limit-bytes", "10"]).ok(), "line 1\nlin");
    let stamped = logs(&["--timestamps"]).ok();
    assert!(stamped.lines().all(|line| line.contains("Z line ")), "{stamped}");
    let third = stamped.lines().nth(2).and_then(|line| line.split(' ').next()).expect("a time").to_owned();
    assert_eq!(logs(&["--since", &third]).ok(), "line 3\nline 4\n");
    assert_eq!(logs(&["--since", "1h", "--tail", "1"]).ok(), "line 4\n");
    wait_until("all of it is older", seconds(10), || {
        let young = logs(&["--since", "1s"]).ok();
        holds(young.is_empty(), young)
    });
    let refused = logs(&["--since", "nonsense"]).fails(2);
    assert!(refused.contains("nonsense"), "{refused}");
    assert!(logs(&["--previous"]).fails(1).contains("no previous run"));
    joey.kubectl(&["exec", "talks", "--", "touch", "/tmp/end"]).ok();
    wait_until("its first run can be read", seconds(30), || {
        let previous = logs(&["--previous"]).stdout;
        holds(previous == format!("{all}end\n"), previous)
    });
    assert_eq!(logs(&["--previous", "--tail", "1"]).ok(), "end\n");
}
