//! Point 9: what containers print and write into files reaches a sink, each line at least once and in order, whoever is killed
//! meanwhile; what a sink that is down for long costs is bounded, and what is lost is told.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use joey_tests::host::{process_runs, processes};
use joey_tests::intake::Intake;
use joey_tests::joey::pod;
use joey_tests::kafka::{self, Kafka};
use joey_tests::{Joey, Registry, Settings, holds, run, seconds, wait_until};
use serde_json::{Value, json};

/// A Joey with these sinks; those of no name go to `web`.
fn joey_with(sinks: Value, logs: Value) -> Joey {
    let settings = Settings::default();
    let mut joey = Joey::prepare(settings);
    let file = joey.scratch().join("joey.yaml");
    // JSON is YAML too.
    std::fs::write(&file, json!({"logs": logs, "sinks": sinks}).to_string()).expect("a fresh folder is writable");
    joey.arguments(&["--config", &file.display().to_string()]);
    joey.up();
    joey
}

fn with_env(mut pod: Value, env: &[(&str, &str)]) -> Value {
    let env: Vec<Value> = env.iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
    pod["spec"]["containers"][0]["env"] = env.into();
    pod
}

/// The number at the end of each message.
fn numbers(records: &[Value]) -> Vec<u64> {
    let number = |record: &Value| record["message"].as_str()?.rsplit(' ').next()?.parse().ok();
    records.iter().filter_map(number).collect()
}

/// Each at least once, and none before the one before it was there.
#[track_caller]
fn assert_whole(what: &str, numbers: &[u64], count: u64) {
    let mut next = 0;
    for number in numbers {
        assert!(*number <= next, "{what}: {number} came before {next}");
        next = next.max(number + 1);
    }
    assert_eq!(next, count, "{what}: all came");
}

fn wait_for_last(what: &str, intake: &Intake, source: &str, last: u64) {
    wait_until(what, seconds(40), || {
        let found = numbers(&intake.of(source));
        holds(found.contains(&last), found.last())
    });
}

#[test]
fn every_line_comes_in_order_whatever_is_killed() {
    let (registry, intake) = (Registry::with_demo_image(), Intake::start());
    let dir = tempfile::tempdir().expect("a temporary folder");
    let token = dir.path().join("token");
    std::fs::write(&token, "a-secret\n").expect("a fresh folder is writable");
    let sinks = json!({
        "web": {"http": {"url": intake.url(), "tokenFile": token}},
        "here": {"file": {"directory": dir.path().join("logs")}},
    });
    let mut joey = joey_with(sinks, json!({"default": "web"}));
    // A line each time to both, and every hundredth time the file is rotated as logrotate does it.
    let script = "mkdir -p /var/log/app; i=0; while [ $i -lt 600 ]; do echo line $i; echo file $i >>/var/log/app/a.log; \
                  i=$((i+1)); [ $((i%100)) = 0 ] && mv /var/log/app/a.log /var/log/app/old.$i; sleep 0.02; done; echo end >&2; \
                  sleep 1000";
    let mut object = with_env(
        pod("web", &registry.demo(), &["sh", "-c", script]),
        &[
            ("aliyun_logs_out", "stdout-only"),
            ("aliyun_logs_out_tags", "team=shop"),
            ("aliyun_logs_app", "/var/log/app/*.log"),
        ],
    );
    let annotation = json!([{"name": "errors", "from": "stderr-only", "sink": "here"}]);
    object["metadata"]["annotations"] = json!({"joey.dev/logs": annotation.to_string()});
    joey.apply(&object);
    wait_until("the first lines come", seconds(30), || holds(intake.of("app").len() > 5, intake.records().len()));
    assert!(intake.headers().contains("Bearer a-secret") && intake.headers().contains("application/x-ndjson"));
    joey.kill();
    intake.answer(503);
    joey.up();
    let before = intake.requests();
    wait_until("the sink is asked while it is down", seconds(20), || holds(intake.requests() > before, before));
    joey.kill();
    intake.answer(200);
    joey.up();
    wait_until("the container has done its work", seconds(60), || {
        let log = joey.kubectl(&["logs", "web"]).stdout;
        holds(log.contains("\nend"), log.lines().last())
    });
    intake.answer(503);
    // The last lines are not taken when the Pod goes, nor when the daemon ends for good.
    joey.kubectl(&["exec", "web", "--", "sh", "-c", "echo file 600 >>/var/log/app/a.log"]).ok();
    joey.delete_pod("web");
    joey.kill();
    intake.answer(200);
    joey.up();
    wait_for_last("the last line of a Pod that is gone", &intake, "app", 600);
    assert_whole("files", &numbers(&intake.of("app")), 601);
    assert_whole("output", &numbers(&intake.of("out")), 600);
    let (out, app) = (intake.of("out")[0].clone(), intake.of("app")[0].clone());
    let id = out["instance"].as_str().expect("an instance has an id").to_owned();
    let shown = json!({"time": out["time"], "instance": id, "namespace": "default", "pod": "web", "container": "main", "source": "out",
        "stream": "stdout", "tags": {"team": "shop"}, "message": "line 0"});
    assert_eq!(out, shown);
    assert_eq!((&app["path"], &app["offset"]), (&json!("/var/log/app/a.log"), &json!(0)));
    let file = std::fs::read_to_string(dir.path().join("logs/joey.ndjson")).expect("the file sink has a file");
    let error: Value = serde_json::from_str(file.lines().next().expect("it has a record")).expect("a record is JSON");
    assert_eq!((&error["message"], &error["source"]), (&json!("end"), &json!("errors")));
    wait_until("nothing is left behind", seconds(20), || {
        let left: Vec<_> = std::fs::read_dir(joey.data().join("instances/left-logs")).expect("it is there").collect();
        holds(left.is_empty(), left)
    });
}

/// The agent of an instance, on the host.
fn agent_of(instance: &str) -> u32 {
    let title = format!("joey-agent {instance}");
    let is_it =
        |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|text| text.contains(&title));
    processes().into_iter().find(is_it).expect("an instance has an agent")
}

#[test]
fn what_is_written_before_an_agent_is_killed_comes() {
    let (registry, intake) = (Registry::with_demo_image(), Intake::start());
    let joey = joey_with(json!({"web": {"http": {"url": intake.url()}}}), json!({"default": "web"}));
    let script = "echo out 0; sleep 1000";
    let sources =
        [("aliyun_logs_own", "/var/log/*.log"), ("aliyun_logs_data", "/data/x/*"), ("aliyun_logs_out", "stdout")];
    let mut object = with_env(pod("dies", &registry.demo(), &["sh", "-c", script]), &sources);
    object["spec"]["volumes"] = json!([{"name": "v", "emptyDir": {}}]);
    object["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "v", "mountPath": "/data", "subPath": "deep"}]);
    joey.apply(&object);
    joey.wait_for("dies", "Ready", seconds(60));
    let agent = agent_of(joey.instance_of("dies")["id"].as_str().expect("an instance has an id"));
    let write = "mkdir -p /var/log /data/x; i=0; while [ $i -lt 500 ]; do echo $i >>/var/log/a.log; echo $i >>/data/x/y; i=$((i+1)); done";
    joey.kubectl(&["exec", "dies", "--", "sh", "-c", write]).ok();
    run(std::process::Command::new("kill").args(["-9", &agent.to_string()])).ok();
    wait_until("the agent is gone", seconds(10), || holds(!process_runs(agent), agent));
    for (source, count) in [("own", 500), ("data", 500), ("out", 1)] {
        wait_for_last("the last line", &intake, source, count - 1);
        assert_whole(source, &numbers(&intake.of(source)), count);
    }
}

#[test]
fn a_container_that_comes_later_is_collected_as_it_says_then() {
    let (registry, intake) = (Registry::with_demo_image(), Intake::start());
    let joey = joey_with(json!({"web": {"http": {"url": intake.url()}}}), json!({"default": "web"}));
    let mut object = pod("pair", &registry.demo(), &["sleep", "1000"]);
    object["spec"]["volumes"] = json!([{"name": "v", "emptyDir": {}}]);
    object["spec"]["containers"].as_array_mut().expect("a list").push(json!({
        "name": "late", "image": registry.demo(), "command": ["sh", "-c", "echo out 0; echo 0 >/data/x; sleep 1000"],
        "env": [{"name": "aliyun_logs_data", "valueFrom": {"configMapKeyRef": {"name": "where", "key": "data"}}},
                {"name": "aliyun_logs_out", "value": "stdout"}],
        "volumeMounts": [{"name": "v", "mountPath": "/data"}],
    }));
    joey.apply(&object);
    wait_until("one runs and the other one waits", seconds(30), || {
        let status = joey.get("pod", "pair")["status"].clone();
        let state = |at: usize| status["containerStatuses"][at]["state"].clone();
        let waits = state(1)["waiting"]["reason"] == "CreateContainerConfigError";
        holds(waits && state(0)["running"].is_object(), status)
    });
    joey.kubectl(&["create", "configmap", "where", "--from-literal=data=/data/*"]).ok();
    for source in ["out", "data"] {
        wait_for_last("the first line", &intake, source, 0);
    }
    let agent = agent_of(joey.instance_of("pair")["id"].as_str().expect("an instance has an id"));
    let write = "i=1; while [ $i -lt 500 ]; do echo $i >>/data/x; i=$((i+1)); done";
    joey.kubectl(&["exec", "pair", "-c", "late", "--", "sh", "-c", write]).ok();
    run(std::process::Command::new("kill").args(["-9", &agent.to_string()])).ok();
    wait_for_last("the last line", &intake, "data", 499);
    assert_whole("data", &numbers(&intake.of("data")), 500);
}

#[test]
fn nothing_but_the_containers_own_files_is_collected() {
    let (registry, intake) = (Registry::with_demo_image(), Intake::start());
    let joey = joey_with(json!({"web": {"http": {"url": intake.url()}}}), json!({"default": "web"}));
    let secret = joey.scratch().join("secret.log");
    std::fs::write(&secret, "the host's\n").expect("a fresh folder is writable");
    let secret = secret.display().to_string();
    let script = format!(
        "mkdir -p /l /d; ln -s {secret} /l/a.log; ln -s ../../../../..{secret} /l/b.log; ln -s /proc/1/root{secret} /l/c.log; \
         ln -s /proc/self/environ /l/d.log; ln -s /proc/1/fd /l/dir; ln -s / /d/top; mkfifo /l/fifo.log; mknod /l/null.log c 1 3; \
         ln -s /l/e.log /l/e.log; echo fine 0 >/l/own.log; ln -s /l/own.log /l/twice.log; \
         while :; do rm -f /l/f.log; ln -s {secret} /l/f.log; rm -f /l/f.log; echo fine 0 >/l/f.log; sleep 0.01; done & sleep 1000"
    );
    let sources = [
        ("aliyun_logs_l", "/l/*.log"),
        ("aliyun_logs_dir", "/l/dir/*"),
        ("aliyun_logs_top", &format!("/d/top{secret}")),
        ("aliyun_logs_proc", "/proc/*/environ"),
        ("aliyun_logs_sys", "/sys/kernel/*"),
        ("aliyun_logs_dots", "/l/../../etc/passwd"),
        ("aliyun_logs_elsewhere", "relative"),
    ];
    joey.apply(&with_env(pod("bad", &registry.demo(), &["sh", "-c", &script]), &sources));
    wait_until("its own file comes", seconds(30), || holds(!intake.of("l").is_empty(), ""));
    let looks = intake.requests();
    wait_until("it is looked at again and again", seconds(30), || {
        // A new file each time, so that there is something to tell.
        holds(intake.requests() > looks + 4, intake.requests())
    });
    for record in intake.records() {
        assert_eq!((&record["source"], &record["message"]), (&json!("l"), &json!("fine 0")), "{record}");
    }
    let events = joey.kubectl(&["get", "events", "-o", "jsonpath={.items[*].message}"]).ok();
    for name in ["dots", "elsewhere"] {
        assert!(events.contains(&format!("log source \"{name}\"")), "{events}");
    }
    // A sink that is not there is told, and the container runs.
    let mut object = with_env(pod("lost", &registry.demo(), &["sleep", "1000"]), &[("aliyun_logs_a", "stdout")]);
    object["metadata"]["annotations"] = json!({"joey.dev/log-sink": "nowhere"});
    joey.apply(&object);
    joey.wait_for("lost", "Ready", seconds(30));
    wait_until("it is told", seconds(10), || {
        let events = joey.kubectl(&["get", "events", "-o", "jsonpath={.items[*].message}"]).ok();
        holds(events.contains("no log sink \"nowhere\"; it has: web"), events)
    });
}

#[test]
fn a_record_that_is_refused_for_good_does_not_stop_the_others() {
    let (registry, intake) = (Registry::with_demo_image(), Intake::start());
    let joey = joey_with(json!({"web": {"http": {"url": intake.url()}}}), json!({"default": "web"}));
    let script = "i=0; while [ $i -lt 50 ]; do echo $i; i=$((i+1)); done; echo poison; echo 50; sleep 1000";
    joey.apply(&with_env(pod("bad", &registry.demo(), &["sh", "-c", script]), &[("aliyun_logs_out", "stdout")]));
    wait_for_last("the line after it", &intake, "out", 50);
    assert_whole("the others", &numbers(&intake.of("out")), 51);
    wait_until("it is told", seconds(10), || {
        let events = joey.kubectl(&["get", "events", "-o", "jsonpath={.items[*].message}"]).ok();
        holds(events.contains("1 records of log source \"out\" are lost"), events)
    });
}

#[test]
fn a_record_that_the_sink_cannot_bear_holds_up_its_own_instance_alone() {
    let (registry, intake) = (Registry::with_demo_image(), Intake::start());
    let joey = joey_with(json!({"web": {"http": {"url": intake.url()}}}), json!({"default": "web"}));
    let prints = |name: &str, script: &str| {
        let variable = format!("aliyun_logs_{name}");
        joey.apply(&with_env(pod(name, &registry.demo(), &["sh", "-c", script]), &[(variable.as_str(), "stdout")]));
    };
    prints("bad", "echo unbearable; sleep 1000");
    wait_until("it is refused", seconds(40), || holds(intake.requests() > 0, intake.requests()));
    prints("good", "i=0; while [ $i -lt 50 ]; do echo $i; i=$((i+1)); sleep 0.1; done; sleep 1000");
    wait_for_last("what others print", &intake, "good", 49);
    assert_whole("the others", &numbers(&intake.of("good")), 50);
    assert_eq!(intake.of("bad"), Vec::<Value>::new());
}

/// Bytes on the disk of all files below, each once.
fn disk(dir: &Path, seen: &mut BTreeSet<(u64, u64)>) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => disk(&entry.path(), seen),
            Ok(meta) if seen.insert((meta.dev(), meta.ino())) => meta.blocks() * 512,
            _ => 0,
        })
        .sum()
}

/// Memory of a process that is nobody else's, in KiB.
fn own_memory(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let of = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok())
    };
    of("Private_Dirty:").unwrap_or(0) + of("Private_Clean:").unwrap_or(0)
}

#[test]
fn a_sink_that_is_down_for_long_costs_bounded_memory_and_disk_and_the_loss_is_told() {
    let (registry, intake) = (Registry::with_demo_image(), Intake::start());
    intake.answer(503);
    let sinks = json!({"web": {"http": {"url": intake.url()}}});
    let mut joey = joey_with(sinks, json!({"default": "web", "keepBytes": "4Mi"}));
    let wait_for_done = |joey: &Joey, name: &str| {
        let done = |pod: &Value| pod["status"]["phase"] == "Succeeded";
        wait_until("it has written all", seconds(120), || {
            holds(done(&joey.get("pod", name)), joey.get("pod", name)["status"].to_string())
        });
    };
    let lines = |count: u32, to: &str| {
        format!("i=0; while [ $i -lt {count} ]; do printf '%01000d %d\\n' 0 $i; i=$((i+1)); done {to}")
    };
    joey.run_pod("idle", &registry.demo(), &["sleep", "1000"]);
    let (memory, pid) = (own_memory(joey.program().pid()), joey.program().pid());
    // 77 MiB of output, of which 50 are kept, and 31 MiB of a file, of which 16 are.
    let sources = [("aliyun_logs_out", "stdout"), ("aliyun_logs_file", "/f")];
    let script = format!("{}; {}; sleep 2", lines(80_000, ""), lines(32_000, ">/f"));
    joey.apply(&with_env(pod("much", &registry.demo(), &["sh", "-c", &script]), &sources));
    wait_for_done(&joey, "much");
    let id = joey.instance_of("much")["id"].as_str().expect("an instance has an id").to_owned();
    let used = disk(&joey.data().join("instances").join(&id), &mut BTreeSet::new());
    assert!(used < 72 << 20, "{used} bytes: 50 MiB of output and 16 of files, and a little");
    let (grown, agent) = (own_memory(pid).saturating_sub(memory), own_memory(agent_of(&id)));
    assert!(grown < 8 << 10 && agent < 4 << 10, "{grown} KiB more of joey, {agent} of the agent");
    // One more goes with 10 MiB untold, of which 4 may stay.
    joey.apply(&with_env(
        pod("gone", &registry.demo(), &["sh", "-c", &lines(10_000, "")]),
        &[("aliyun_logs_gone", "stdout")],
    ));
    wait_for_done(&joey, "gone");
    joey.delete_pod("gone");
    wait_until("what it left is given up", seconds(40), || {
        let left = disk(&joey.data().join("instances/left-logs"), &mut BTreeSet::new());
        let output = joey.output();
        holds(left <= 4 << 20 && output.contains("logs that it left behind are given up"), (left, output))
    });
    intake.answer(200);
    let counted = |source: &str| {
        let records = intake.of(source);
        let lost: u64 = records.iter().filter_map(|record| record["lost"].as_u64()).sum();
        (numbers(&records).into_iter().collect::<BTreeSet<_>>().len() as u64, lost)
    };
    let found: BTreeMap<&str, (u64, u64)> = wait_until("all that was kept comes", seconds(120), || {
        let found = BTreeMap::from(["out", "file", "gone"].map(|source| (source, counted(source))));
        let whole = |source: &str, count: u64| found[source].0 + found[source].1 >= count;
        holds(whole("out", 80_000) && whole("file", 32_000) && whole("gone", 10_000), &found).map(|()| found)
    });
    // What is in the one batch that was waiting is told though it is counted as lost too.
    for (source, count) in [("out", 80_000), ("file", 32_000), ("gone", 10_000)] {
        let (told, lost) = found[source];
        assert!(told + lost <= count + 600 && lost > 0, "{source}: {found:?}");
    }
    wait_until("it is told", seconds(10), || {
        let events = joey.kubectl(&["get", "events", "-o", "jsonpath={.items[*].message}"]).ok();
        let told = "records of log source \"out\" are lost: sink \"web\" did not take them";
        holds(events.contains(told), events)
    });
}

#[test]
fn the_example_of_the_page_runs() {
    let page =
        std::fs::read_to_string(joey_tests::repository().join("docs/log-collection.md")).expect("the page is there");
    let blocks: Vec<&str> = page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    let registry = Registry::with_demo_image();
    let mut joey = Joey::prepare(Settings::default());
    let (file, logs) = (joey.scratch().join("logs.yaml"), joey.scratch().join("logs"));
    let configuration = blocks[0].replace("/var/log/joey", &logs.display().to_string());
    std::fs::write(&file, configuration).expect("a fresh folder is writable");
    joey.arguments(&["--config", &file.display().to_string()]);
    joey.up();
    let object = blocks[1].replace("127.0.0.1:5055/joey/hello:1", &registry.demo());
    joey.kubectl_with_input(&["apply", "-f", "-"], &object).ok();
    let records = wait_until("both records come", seconds(60), || {
        let text = std::fs::read_to_string(logs.join("joey.ndjson")).unwrap_or_default();
        let records: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).expect("a record is JSON")).collect();
        holds(records.len() >= 2, &records).map(|()| records)
    });
    let shown =
        page.split("```json\n").nth(1).and_then(|rest| rest.split("```").next()).expect("the page shows records");
    let plain = |mut record: Value| {
        (record["time"], record["instance"]) = (Value::Null, Value::Null);
        record.to_string()
    };
    let shown: BTreeSet<String> =
        shown.lines().map(|line| plain(serde_json::from_str(line).expect("it shows JSON"))).collect();
    assert_eq!(records.into_iter().map(plain).collect::<BTreeSet<_>>(), shown, "as the page shows them");
    // The other configuration of the page is one too: its files are missed, and nothing else.
    let other = joey.scratch().join("other.yaml");
    std::fs::write(&other, blocks[2]).expect("a fresh folder is writable");
    let told = joey.joey(&["up", "--listen", "127.0.0.1:0", "--config", &other.display().to_string()]).fails(1);
    assert!(told.contains("is in use"), "{told}");
}

#[test]
fn records_reach_a_real_kafka_over_its_end() {
    let Some(mut kafka) = Kafka::start() else { return };
    let registry = Registry::with_demo_image();
    kafka.make_topic("joey", 3);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let password = dir.path().join("password");
    std::fs::write(&password, kafka::PASSWORD).expect("a fresh folder is writable");
    let brokers = [kafka.address().to_string()];
    let sink = json!({"brokers": brokers, "topic": "joey", "user": kafka::USER, "passwordFile": password});
    let joey = joey_with(json!({"bus": {"kafka": sink}}), json!({"default": "bus"}));
    // The second half comes when Kafka is gone.
    let script = "i=0; while [ $i -lt 400 ]; do [ $i -ne 200 ] || until test -e /gone; do sleep 0.1; done; \
                  echo line $i; i=$((i+1)); done; sleep 1000";
    joey.apply(&with_env(pod("web", &registry.demo(), &["sh", "-c", script]), &[("aliyun_logs_out", "stdout")]));
    joey.wait_for("web", "Ready", seconds(60));
    wait_until("the first records come", seconds(30), || holds(!kafka.records("joey").is_empty(), joey.output()));
    kafka.kill();
    joey.kubectl(&["exec", "web", "--", "touch", "/gone"]).ok();
    wait_until("the sink is down", seconds(40), || holds(joey.output().contains("sink does not take records"), ""));
    kafka.up();
    let found = wait_until("the last one comes", seconds(120), || {
        let records: Vec<Value> =
            kafka.records("joey").iter().filter_map(|text| serde_json::from_str(text).ok()).collect();
        let found = numbers(&records);
        holds(found.contains(&399), found.last()).map(|()| found)
    });
    assert_whole("records of Kafka", &found, 400);
}
