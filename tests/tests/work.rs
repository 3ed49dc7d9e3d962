//! Point 7 and 4 of a Pod's life: forwarding ports, copying files, debugging, figures, logs, and what changes in place.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use joey_tests::host::process_runs;
use joey_tests::joey::pod;
use joey_tests::{Joey, Outcome, Program, Registry, holds, run, seconds, traffic, wait_until};
use serde_json::{Value, json};

/// Where `text` says that it listens for the port `remote`.
fn listening(program: &Program, remote: u16) -> String {
    wait_until("it listens", seconds(20), || {
        let text = program.output();
        let end = format!(" -> {remote}");
        let of = |line: &str| Some(line.strip_prefix("Forwarding from ")?.strip_suffix(&end)?.to_owned());
        let found = text.lines().filter(|line| line.contains("127.0.0.1:")).find_map(of);
        found.ok_or(text)
    })
}

#[test]
fn ports_are_forwarded() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.run_pod("web", &registry.demo(), &[]);
    let big = "dd if=/dev/urandom of=/var/www/big bs=1M count=16 2>/dev/null; md5sum < /var/www/big";
    let sum = joey.kubectl(&["exec", "web", "--", "sh", "-c", big]).ok();
    let fetched = |address: &str| {
        let script = format!("curl -sf --max-time 60 http://{address}/big | md5sum");
        run(Command::new("sh").args(["-c", &script])).ok()
    };
    let mut number = 0;
    for websockets in ["true", "false"] {
        for mut command in joey.kubectls() {
            number += 1;
            command.args(["port-forward", "pod/web", ":80", ":81"]).env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websockets);
            let program = Program::start(&mut command, &joey.scratch().join(format!("forward-{number}")));
            let address = listening(&program, 80);
            assert!(traffic::page(&address, "/").unwrap().contains("Hello from Joey"));
            // Connections beside each other, each with an answer of its own.
            std::thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| assert!(traffic::page(&address, "/").unwrap().contains("Hello from Joey")));
                }
            });
            assert_eq!(fetched(&address), sum, "websockets {websockets}");
            let closed = listening(&program, 81);
            assert!(traffic::page(&closed, "/").is_err());
            wait_until("it says why", seconds(10), || {
                let text = program.output();
                holds(text.contains("connection refused"), text)
            });
        }
    }
    let mut command = joey.joey_command(&["port-forward", "web.default", "0:80"]);
    let program = Program::start(&mut command, &joey.scratch().join("forward-joey"));
    let address = listening(&program, 80);
    assert!(traffic::page(&address, "/").unwrap().contains("Hello from Joey"));
    assert_eq!(fetched(&address), sum);
    let address: SocketAddr = address.parse().expect("an address");
    let taken = joey.joey(&["port-forward", "web.default", &format!("{}:80", address.port())]).fails(1);
    assert!(taken.contains("cannot be listened at"), "{taken}");
    assert_eq!(joey.joey(&["port-forward", "web.default", "none"]).code, 2);
    joey.joey(&["port-forward", "absent", "0:80"]).fails(1);
}

/// A file of bytes that no text has, and its MD5.
fn random_file(joey: &Joey, name: &str, megabytes: usize) -> (PathBuf, String) {
    let path = joey.scratch().join(name);
    let bytes: Vec<u8> = (0..megabytes << 20).map(|_| rand::random()).collect();
    std::fs::write(&path, bytes).expect("a fresh folder is writable");
    let sum = run(Command::new("md5sum").arg(&path)).ok();
    (path, sum.split_whitespace().next().unwrap_or_default().to_owned())
}

fn md5(joey: &Joey, pod: &str, path: &str) -> String {
    let text = joey.kubectl(&["exec", pod, "--", "md5sum", path]).ok();
    text.split_whitespace().next().unwrap_or_default().to_owned()
}

fn md5_here(path: &std::path::Path) -> String {
    run(Command::new("md5sum").arg(path)).ok().split_whitespace().next().unwrap_or_default().to_owned()
}

#[test]
fn files_are_copied_both_ways() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.run_pod("box", &registry.demo(), &["sleep", "1000"]);
    let (file, sum) = random_file(&joey, "random", 24);
    let (here, back) = (file.display().to_string(), joey.scratch().join("back"));
    let back_text = back.display().to_string();
    joey.kubectl(&["cp", &here, "box:/tmp/kubectl"]).ok();
    assert_eq!(md5(&joey, "box", "/tmp/kubectl"), sum);
    joey.kubectl(&["cp", "box:/tmp/kubectl", &back_text]).ok();
    assert_eq!(md5_here(&back), sum);

    // Without tar in the container.
    joey.kubectl(&["exec", "box", "--", "rm", "/bin/tar"]).ok();
    joey.joey(&["cp", &here, "box.default:/tmp/joey"]).ok();
    assert_eq!(md5(&joey, "box", "/tmp/joey"), sum);
    std::fs::remove_file(&back).expect("it is there");
    joey.joey(&["cp", "box.default:/tmp/joey", &back_text]).ok();
    assert_eq!(md5_here(&back), sum);

    // Directories, with modes and links.
    let inside = "mkdir -p /tree/a/b; echo one > /tree/a/one; echo two > /tree/a/b/two; chmod 750 /tree/a/one; ln -s one /tree/a/link";
    joey.kubectl(&["exec", "box", "--", "sh", "-c", inside]).ok();
    let out = joey.scratch().join("out");
    let copied = joey.joey(&["cp", "box.default:/tree", &out.display().to_string()]);
    assert!(copied.stderr.contains("link"), "what is left out is named: {}", copied.stderr);
    copied.ok();
    assert_eq!(std::fs::read_to_string(out.join("a/b/two")).expect("it is there"), "two\n");
    assert!(std::fs::symlink_metadata(out.join("a/link")).is_err(), "no link is made here");
    joey.joey(&["cp", &out.display().to_string(), "box.default:/tmp"]).ok();
    assert_eq!(joey.kubectl(&["exec", "box", "--", "cat", "/tmp/out/a/b/two"]).ok(), "two\n");
    assert_eq!(joey.kubectl(&["exec", "box", "--", "stat", "-c", "%a", "/tmp/out/a/one"]).ok(), "750\n");

    let missing = joey.joey(&["cp", "box.default:/nowhere", &back_text]).fails(1);
    assert!(missing.contains("/nowhere"), "{missing}");
    let missing = joey.joey(&["cp", &here, "box.default:/nowhere/at/all"]).fails(1);
    assert!(missing.contains("no such directory"), "{missing}");
    assert_eq!(joey.joey(&["cp", "/a", "/b"]).code, 2);
}

#[test]
fn no_link_leads_a_copy_out_of_the_container() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    joey.run_pod("trap", &registry.demo(), &["sleep", "1000"]);
    let mark = joey_tests::unique("mark");
    let host = joey.scratch().join(&mark);
    std::fs::create_dir(&host).expect("a fresh folder is writable");
    std::fs::write(host.join("secret"), "the host's").expect("a fresh folder is writable");
    let up = "../".repeat(12);
    let script = format!(
        "ln -s {up}{0} /up; ln -s {0} /direct; ln -s /proc/1/root{0} /root-of-one; ln -s /proc/self/root{0} /own-root; \
         ln -s /proc/self/cwd/{up}{0} /own-dir",
        host.display()
    );
    joey.kubectl(&["exec", "trap", "--", "sh", "-c", &script]).ok();
    let (planted, _) = random_file(&joey, "planted", 1);
    for link in ["up", "direct", "root-of-one", "own-root", "own-dir"] {
        let out = joey.scratch().join(format!("out-{link}"));
        joey.joey(&["cp", &format!("trap.default:/{link}/secret"), &out.display().to_string()]).fails(1);
        assert!(!out.exists(), "{link}");
        joey.joey(&["cp", &planted.display().to_string(), &format!("trap.default:/{link}/planted")]).fails(1);
    }
    assert!(!host.join("planted").exists(), "nothing reached the host");
    // What such a link leads to within the container's root is the container's.
    joey.kubectl(&["exec", "trap", "--", "sh", "-c", &format!("mkdir -p {0}; echo own > {0}/secret", host.display())])
        .ok();
    let out = joey.scratch().join("own");
    joey.joey(&["cp", "trap.default:/up/secret", &out.display().to_string()]).ok();
    assert_eq!(std::fs::read_to_string(out).expect("it was copied"), "own\n");
}

fn debug_status(joey: &Joey, pod: &str, name: &str) -> Value {
    let all = joey.get("pod", pod)["status"]["ephemeralContainerStatuses"].as_array().cloned().unwrap_or_default();
    all.into_iter().find(|status| status["name"] == name).unwrap_or_default()
}

#[test]
fn a_running_pod_is_debugged() {
    let registry = Registry::with_demo_image();
    registry.push(&joey_tests::registry::demo_layout(), "joey/tools:1");
    let joey = Joey::start();
    joey.run_pod("web", &registry.demo(), &[]);
    let tools = registry.image("joey/tools:1");
    let before = joey.pid_of("web.default");
    let image = format!("--image={tools}");
    let look = "ps -o pid,args; hostname; wget -qO- http://127.0.0.1/; ls /proc/1/root/var/www; sleep 1000";
    // One that may trace what it sees, as the documentation has it, and that keeps nothing else from changing.
    let traces = ["debug", "web", &image, "--target=main", "--profile=general", "-c", "traces", "--", "sleep", "1000"];
    joey.kubectl(&traces).ok();
    joey.kubectl(&["label", "pod", "web", "seen=yes"]).ok();
    joey.kubectl(&["debug", "web", &image, "--target=main", "-c", "look", "--", "sh", "-c", look]).ok();
    wait_until("it may trace", seconds(30), || {
        let status = debug_status(&joey, "web", "traces");
        holds(status["state"]["running"].is_object(), status)
    });
    wait_until("it runs", seconds(30), || {
        let status = debug_status(&joey, "web", "look");
        holds(status["state"]["running"].is_object(), status)
    });
    let log = wait_until("it sees the target", seconds(10), || {
        let log = joey.kubectl(&["logs", "web", "-c", "look"]).ok();
        if log.contains("index.html") { Ok(log) } else { Err(log) }
    });
    for part in ["nginx", "web\n", "Hello from Joey"] {
        assert!(log.contains(part), "{part} in {log}");
    }
    assert_eq!(joey.pid_of("web.default"), before, "the target goes on");
    assert_eq!(joey.kubectl(&["exec", "web", "-c", "look", "--", "id", "-u"]).ok(), "0\n");

    // With a terminal, as people do it; one that ends by itself leaves the Pod as it was.
    let kubectl = joey_tests::joey::kubectl().display().to_string();
    let config = joey.data().join("kubeconfig");
    let line = format!("{kubectl} --kubeconfig {} debug -it web {image} -c shell -- sh", config.display());
    let mut command = Command::new("script");
    command.args(["-qec", &line, "/dev/null"]).env("HOME", joey.scratch()).env("TERM", "xterm");
    let seen = joey_tests::program::run_with_input(&mut command, b"\necho got-$((40+2))\nexit 3\n");
    assert!(seen.stdout.contains("got-42"), "{}", seen.stdout);
    wait_until("its end is told", seconds(10), || {
        let status = debug_status(&joey, "web", "shell");
        holds(status["state"]["terminated"]["exitCode"] == 3, status)
    });
    let web = joey.get("pod", "web");
    assert_eq!(web["status"]["phase"], "Running");
    assert_eq!(web["status"]["containerStatuses"][0]["restartCount"], 0);

    let refused = joey.kubectl(&["debug", "web", &image, "--target=absent", "-c", "no", "--", "true"]).fails(1);
    assert!(refused.contains("targetContainerName") && refused.contains("Not found"), "{refused}");
    let remove = r#"[{"op":"remove","path":"/spec/ephemeralContainers"}]"#;
    let path = ["patch", "pod", "web", "--type=json", "-p", remove];
    assert!(joey.kubectl(&path).fails(1).contains("pod updates may not change fields"), "they stay");

    let name =
        joey.joey(&["debug", "web.default", "--image", &tools, "--target", "main", "--", "sh", "-c", "ps; sleep 99"]);
    let name = name.ok().trim().to_owned();
    wait_until("its log is there", seconds(10), || {
        let log = joey.joey(&["logs", "web.default", "-c", &name]).ok();
        holds(log.contains("nginx: master process"), log)
    });
    let look = joey.joey(&["debug", "web.default", "--image", "127.0.0.1:1/none:1"]).fails(1);
    assert!(look.contains("none:1"), "{look}");
    joey.delete_pod("web");
}

#[test]
fn a_debug_container_survives_a_killed_daemon() {
    let registry = Registry::with_demo_image();
    let mut joey = Joey::start();
    joey.run_pod("web", &registry.demo(), &[]);
    let image = format!("--image={}", registry.demo());
    joey.kubectl(&["debug", "web", &image, "--target=main", "-c", "look", "--", "sleep", "1000"]).ok();
    let running = |joey: &Joey| {
        let status = debug_status(joey, "web", "look");
        if status["state"]["running"].is_object() { Ok(status["containerID"].clone()) } else { Err(status.to_string()) }
    };
    let before = wait_until("it runs", seconds(30), || running(&joey));
    joey.kill();
    joey.up();
    assert_eq!(wait_until("it still runs", seconds(20), || running(&joey)), before);
    assert_eq!(joey.kubectl(&["exec", "web", "-c", "look", "--", "echo", "here"]).ok(), "here\n");
}

#[test]
fn usage_is_told() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let mut busy = pod("busy", &registry.demo(), &["sh", "-c", "while :; do :; done"]);
    busy["spec"]["containers"][0]["resources"] = json!({"limits": {"memory": "32Mi", "cpu": "200m"}});
    busy["spec"]["containers"].as_array_mut().expect("a list").push(json!({
        "name": "idle", "image": registry.demo(), "command": ["sleep", "1000"]}));
    joey.apply(&busy);
    joey.wait_for("busy", "Ready", seconds(60));
    let milli =
        |text: &str| text.trim_end_matches('m').parse::<u32>().unwrap_or_else(|_| panic!("no thousandths: {text}"));
    let top = joey.kubectl(&["top", "pod", "--no-headers"]).ok();
    let words: Vec<&str> = top.split_whitespace().collect();
    assert_eq!(words[0], "busy", "{top}");
    assert!((100..300).contains(&milli(words[1])) && words[2].ends_with("Mi"), "{top}");
    let containers = joey.kubectl(&["top", "pod", "busy", "--containers", "--no-headers"]).ok();
    let of = |name: &str| {
        let line = containers.lines().find(|line| line.split_whitespace().nth(1) == Some(name));
        milli(line.unwrap_or_else(|| panic!("{containers}")).split_whitespace().nth(2).unwrap_or_default())
    };
    assert!((100..300).contains(&of("main")) && of("idle") < 20, "{containers}");
    let nodes = joey.kubectl(&["top", "node", "--no-headers"]).ok();
    assert!(nodes.contains("joey") && nodes.contains('%'), "{nodes}");
    let raw = joey.kubectl(&["get", "--raw", "/apis/metrics.k8s.io/v1beta1/namespaces/default/pods/busy"]).json();
    assert_eq!((&raw["kind"], &raw["metadata"]["name"]), (&json!("PodMetrics"), &json!("busy")));
    joey.kubectl(&["get", "--raw", "/apis/metrics.k8s.io/v1beta1/namespaces/default/pods/absent"]).fails(1);
    let lines = joey.joey(&["top", "-o", "json"]).json();
    assert!((100..300).contains(&lines[0]["cpuMilli"].as_u64().unwrap_or(0)), "{lines}");
    assert!(joey.joey(&["top", "busy.default", "--containers"]).ok().contains("idle"));
    assert!(joey.joey(&["events", "busy.default"]).ok().contains("Started"));
}

fn patch(joey: &Joey, pod: &str, body: &Value, more: &[&str]) -> Outcome {
    let body = body.to_string();
    joey.kubectl(&[&["patch", "pod", pod, "-p", &body][..], more].concat())
}

#[test]
fn what_may_change_changes_in_place() {
    let registry = Registry::with_demo_image();
    registry.push(&joey_tests::registry::demo_layout(), "joey/hello:2");
    let mut joey = Joey::start();
    let mut object = pod("pair", &registry.demo(), &["sleep", "1000"]);
    object["spec"]["restartPolicy"] = "Always".into();
    let limits = json!({"memory": "64Mi", "cpu": "500m"});
    object["spec"]["containers"][0]["resources"] = json!({"limits": limits});
    object["spec"]["containers"].as_array_mut().expect("a list").push(json!({
        "name": "other", "image": registry.demo(), "command": ["sleep", "1000"], "resources": {"limits": limits}}));
    joey.apply(&object);
    joey.wait_for("pair", "Ready", seconds(60));
    let status = |joey: &Joey, name: &str| {
        let all = joey.get("pod", "pair")["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
        all.into_iter().find(|status| status["name"] == name).unwrap_or_default()
    };
    let other = status(&joey, "other");
    let first = joey.pid_of("pair.default");

    // Labels and annotations touch nothing that runs.
    joey.kubectl(&["label", "pod", "pair", "colour=brown"]).ok();
    joey.kubectl(&["annotate", "pod", "pair", "note=1"]).ok();
    assert_eq!(joey.pid_of("pair.default"), first);

    // Limits: the same process with other limits.
    let more = json!({"memory": "96Mi", "cpu": "250m"});
    let resized = json!({"spec": {"containers": [{"name": "main", "resources": {"limits": more, "requests": more}}]}});
    patch(&joey, "pair", &resized, &["--subresource=resize"]).ok();
    let limit = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max";
    wait_until("the limit is in force", seconds(20), || {
        let text = joey.kubectl(&["exec", "pair", "-c", "main", "--", "sh", "-c", limit]).ok();
        holds(text.trim() == (96 << 20).to_string(), text)
    });
    wait_until("it is told", seconds(20), || {
        let told = status(&joey, "main")["resources"]["limits"].clone();
        holds(told == more, told)
    });
    assert_eq!(joey.pid_of("pair.default"), first, "nothing was restarted");
    let class = json!({"spec": {"containers": [{"name": "main", "resources": {"requests": {"cpu": "100m"}}}]}});
    let refused = patch(&joey, "pair", &class, &["--subresource=resize"]).fails(1);
    assert!(refused.contains("QOS Class may not change"), "{refused}");
    // An image: that container alone is started again.
    let image = registry.image("joey/hello:2");
    joey.kubectl(&["set", "image", "pod/pair", &format!("main={image}")]).ok();
    wait_until("it runs from the other image", seconds(40), || {
        let now = status(&joey, "main");
        holds(now["image"] == image && now["restartCount"] == 1 && now["ready"] == true, now)
    });
    assert!(!process_runs(first));
    assert_eq!(status(&joey, "other"), other, "the other one goes on");
    // kubectl waits for conditions that speak of the changed specification.
    joey.kubectl(&["wait", "--for=condition=Ready", "pod/pair", "--timeout=20s"]).ok();
    let told = joey.get("pod", "pair");
    assert_eq!(told["status"]["observedGeneration"], told["metadata"]["generation"]);
    let text = joey.kubectl(&["exec", "pair", "-c", "main", "--", "sh", "-c", limit]).ok();
    assert_eq!(text.trim(), (96 << 20).to_string(), "limits stay");

    // An image that is not there: what runs goes on, and the Pod says why.
    let second = joey.pid_of("pair.default");
    joey.kubectl(&["set", "image", "pod/pair", &format!("main={}", registry.image("joey/none:1"))]).ok();
    wait_until("it is said", seconds(20), || {
        let events = joey.kubectl(&["get", "events", "--field-selector", "involvedObject.name=pair"]).ok();
        holds(events.contains("joey/none:1") && events.contains("Failed"), events)
    });
    assert_eq!(joey.pid_of("pair.default"), second);
    joey.kubectl(&["set", "image", "pod/pair", &format!("main={image}")]).ok();

    // All else is refused in Kubernetes' words, and nothing happens.
    let words = "pod updates may not change fields other than `spec.containers[*].image`";
    for body in [
        json!({"spec": {"containers": [{"name": "main", "command": ["true"]}]}}),
        json!({"spec": {"containers": [{"name": "main", "env": [{"name": "A", "value": "b"}]}]}}),
        json!({"spec": {"containers": [{"name": "main", "resources": {"limits": {"cpu": "1"}}}]}}),
        json!({"spec": {"hostname": "other"}}),
        json!({"spec": {"terminationGracePeriodSeconds": 9}}),
    ] {
        let refused = patch(&joey, "pair", &body, &[]).fails(1);
        assert!(refused.contains(words), "{body}: {refused}");
    }
    assert_eq!(joey.pid_of("pair.default"), second);

    // Over a killed daemon everything stays as it is.
    joey.kill();
    joey.up();
    wait_until("it is known again", seconds(20), || {
        let now = status(&joey, "main");
        holds(now["image"] == image && now["restartCount"] == 1, now)
    });
    assert_eq!(joey.pid_of("pair.default"), second);

    let deadline = |seconds: u32| json!({"spec": {"activeDeadlineSeconds": seconds}});
    patch(&joey, "pair", &deadline(600), &[]).ok();
    let longer = patch(&joey, "pair", &deadline(700), &[]).fails(1);
    assert!(longer.contains("must be less than or equal to previous value"), "{longer}");
    patch(&joey, "pair", &deadline(1), &[]).ok();
    wait_until("its time is over", seconds(20), || {
        let status = joey.get("pod", "pair")["status"].clone();
        holds(status["reason"] == "DeadlineExceeded" && status["phase"] == "Failed", status)
    });
}

#[test]
fn logs_in_every_way() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let script = "echo line 1; echo line 2; sleep 2; for i in 3 4 5; do echo line $i; done; until test -e /tmp/more; do sleep 0.1; done; echo later; \
                  until test -e /tmp/end; do sleep 0.1; done; echo end; exit 1";
    let mut object = pod("talks", &registry.demo(), &["sh", "-c", script]);
    object["spec"]["restartPolicy"] = "Always".into();
    object["spec"]["initContainers"] =
        json!([{"name": "first", "image": registry.demo(), "command": ["echo", "prepared"]}]);
    joey.apply(&object);
    joey.wait_for("talks", "Ready", seconds(60));
    let logs = |more: &[&str]| joey.kubectl(&[&["logs", "talks", "-c", "main"][..], more].concat()).ok();
    let all = "line 1\nline 2\nline 3\nline 4\nline 5\n";
    wait_until("it has said all", seconds(10), || holds(logs(&[]) == all, logs(&[])));
    assert_eq!(joey.kubectl(&["logs", "talks", "-c", "first"]).ok(), "prepared\n");
    assert_eq!(logs(&["--tail=2"]), "line 4\nline 5\n");
    assert_eq!(logs(&["--limit-bytes=10"]), "line 1\nlin");
    assert_eq!(logs(&["--tail=0"]), "");
    let stamped = logs(&["--timestamps"]);
    // kubectl passes times on in whole seconds.
    let third = stamped.lines().nth(2).and_then(|line| line.split(' ').next()).expect("a time").to_owned();
    assert!(stamped.lines().all(|line| line.contains("Z line ")), "{stamped}");
    assert_eq!(logs(&[&format!("--since-time={third}")]), "line 3\nline 4\nline 5\n");
    assert_eq!(logs(&["--since=1h"]), all);
    let follow = Program::start(
        &mut joey.kubectl_command(&["logs", "-f", "--all-containers", "--since=1h", "talks"]),
        &joey.scratch().join("follow"),
    );
    wait_until("it follows", seconds(10), || holds(follow.output().contains("line 5"), follow.output()));
    joey.kubectl(&["exec", "talks", "-c", "main", "--", "touch", "/tmp/more"]).ok();
    wait_until("what comes later", seconds(10), || holds(follow.output().contains("later"), follow.output()));
    let whole = joey.joey(&["logs", "talks.default", "--all-containers"]).ok();
    assert!(whole.contains("[first] prepared\n") && whole.contains("[main] line 5\n"), "{whole}");
    assert_eq!(joey.joey(&["logs", "talks.default", "--limit-bytes", "6"]).ok(), "line 1");
    joey.kubectl(&["exec", "talks", "-c", "main", "--", "touch", "/tmp/end"]).ok();
    wait_until("it runs again", seconds(30), || {
        let status = joey.get("pod", "talks")["status"]["containerStatuses"][0].clone();
        holds(status["restartCount"] == 1 && status["state"]["running"].is_object(), status)
    });
    let previous = logs(&["--previous"]);
    assert!(previous.starts_with(all) && previous.ends_with("later\nend\n"), "{previous}");
    let none = joey.kubectl(&["logs", "talks", "-c", "first", "--previous"]);
    assert!(none.code != 0 && none.stderr.contains("previous"), "{}", none.stderr);
}
