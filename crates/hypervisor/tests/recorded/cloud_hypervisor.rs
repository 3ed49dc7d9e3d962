//! Cloud Hypervisor's driver against its document.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use joey_api::vmm::Interface;
use joey_hypervisor::cloud_hypervisor::CloudHypervisor;
use joey_hypervisor::{Hypervisor, HypervisorError, Machine};
use serde_json::{Value, json};

use crate::server::{Act, Played, Stage};
use crate::{Bench, MEMORY, REMEMBERED, contents, ends, fails, hangs, heard, is_remembered, speaks, template};

const STATE: &str = r#"{"snapshots": "the state of its devices"}"#;
const CONFIG: &str = "config";

/// Disks that the machine has.
fn add_disk(played: &Played, disk: &Value) {
    let mut told = played.told.lock().unwrap();
    let config = told.get_mut(CONFIG).expect("there is a machine");
    match config["disks"].as_array_mut() {
        Some(disks) => disks.push(disk.clone()),
        None => config["disks"] = json!([disk]),
    }
}

fn keep(played: &Played, config: &Value) {
    played.told.lock().unwrap().insert(CONFIG.to_owned(), config.clone());
}

fn restore(played: &Played, from: &str) -> Result<(), String> {
    let dir = from.strip_prefix("file://").ok_or("it is no file")?;
    let read = |name: &str| Ok::<_, String>(contents(&played.place(&format!("{dir}/{name}"))?.0));
    let config: Value = serde_json::from_slice(&read("config.json")?).map_err(|error| error.to_string())?;
    played.check_config(&config)?;
    assert_eq!(read("state.json")?, STATE.as_bytes());
    let zone = &config["memory"]["zones"][0];
    assert_eq!((&zone["shared"], zone["size"].as_u64()), (&json!(false), Some(MEMORY)));
    is_remembered(&played.place(zone["file"].as_str().unwrap())?.0)?;
    assert!(config["disks"].as_array().is_none_or(Vec::is_empty) && config.get("net").is_none());
    played.listen(config["vsock"]["socket"].as_str().unwrap())?;
    keep(played, &config);
    Ok(())
}

fn snapshot(played: &Played, to: &str) -> Result<(), String> {
    let dir = to.strip_prefix("file://").ok_or("it is no file")?;
    let config = played.told.lock().unwrap()[CONFIG].clone();
    let zone = &config["memory"]["zones"][0];
    assert_eq!((&config["memory"]["size"], &zone["shared"]), (&json!(0), &json!(true)));
    // What the machine wrote into its memory while it ran: that of a zone with a file is there already.
    let (place, writable) = played.place(zone["file"].as_str().unwrap())?;
    let (words, at) = REMEMBERED;
    assert!(writable);
    std::fs::File::options().write(true).open(place).unwrap().write_all_at(words, at).unwrap();
    played.write(&format!("{dir}/config.json"), config.to_string().as_bytes())?;
    played.write(&format!("{dir}/state.json"), STATE.as_bytes())
}

fn effect(played: &Played, request: &str, body: Option<&Value>, descriptor: Option<OwnedFd>) -> Result<Value, String> {
    let text = |name: &str| body.and_then(|body| body.get(name)).and_then(Value::as_str).unwrap_or_default();
    match request.strip_prefix("PUT /api/v1/").unwrap_or(request) {
        "vm.create" => keep(played, body.expect("it has a body")),
        "vm.boot" => {
            let socket = played.told.lock().unwrap()[CONFIG]["vsock"]["socket"].as_str().unwrap().to_owned();
            played.listen(&socket)?;
        }
        "vm.snapshot" => snapshot(played, text("destination_url"))?,
        "vm.restore" => restore(played, text("source_url"))?,
        "vm.add-disk" => {
            add_disk(played, body.expect("it has a body"));
            return Ok(json!({ "id": text("id"), "bdf": "0000:00:05.0" }));
        }
        "vm.add-net" => {
            assert_eq!(played.jail.interface, Interface::Returned);
            let tap = descriptor.expect("it goes along");
            assert_eq!(
                std::fs::read_link(format!("/proc/self/fd/{}", tap.as_raw_fd())).unwrap(),
                PathBuf::from("/dev/zero")
            );
            assert_eq!(text("mac"), "02:00:0a:58:00:09");
            return Ok(json!({ "id": text("id"), "bdf": "0000:00:06.0" }));
        }
        "GET /api/v1/vm.info" => {
            return Ok(json!({ "config": played.told.lock().unwrap()[CONFIG], "state": "Running" }));
        }
        "GET /api/v1/vmm.ping" => return Ok(json!({ "version": "v53.0" })),
        _ => {}
    }
    Ok(Value::Null)
}

fn stage() -> Stage {
    Stage::new(include_str!("cloud_hypervisor.json"), effect)
}

fn hypervisor(stage: Stage) -> (CloudHypervisor, Arc<Stage>) {
    let stage = Arc::new(stage);
    let program = PathBuf::from("/usr/bin/cloud-hypervisor");
    (CloudHypervisor::known(program, stage.clone(), "cloud-hypervisor v53.0".to_owned()), stage)
}

fn asked(stage: &Stage) -> Vec<String> {
    heard(stage).iter().map(|request| request.replace("/api/v1/", "")).collect()
}

#[tokio::test]
async fn a_machine_boots_and_takes_a_layer() {
    let Some(bench) = Bench::new() else { return };
    let (hypervisor, stage) = hypervisor(Stage { deaf: 2, ..stage() });
    let machine = bench.whole("one");
    let dir = machine.dir.clone();
    let vm = hypervisor.start(machine).await.unwrap();
    assert_eq!(asked(&stage), ["PUT vm.create", "PUT vm.add-net", "PUT vm.boot"]);
    speaks(&*vm).await;
    vm.answers().await.unwrap();
    let layer = bench.file("further", 8192);
    vm.insert(3, vec![layer.clone()]).await.unwrap();
    assert_eq!(asked(&stage), ["GET vmm.ping", "GET vm.info", "PUT vm.add-disk"]);
    assert_eq!(contents(&dir.join("slots/3")), contents(&layer));
    // Slots are disks in their order: none is left out, or put in twice.
    for slot in [3, 5] {
        let error = vm.insert(slot, vec![layer.clone()]).await.unwrap_err();
        assert!(matches!(error, HypervisorError::Host { .. }), "{error}");
    }
    assert!(vm.freeze().await.is_err());
    ends(&*vm).await;
    assert!(vm.answers().await.is_err() && vm.connect().await.is_err());
}

#[tokio::test]
async fn a_copy_of_a_template_gets_its_devices_when_it_runs() {
    let Some(bench) = Bench::new() else { return };
    let (hypervisor, stage) = hypervisor(stage());
    let template = template(&hypervisor, &bench).await;
    assert_eq!(asked(&stage), ["PUT vm.create", "PUT vm.boot", "PUT vm.pause", "PUT vm.snapshot"]);
    for name in ["one", "two"] {
        let machine = Machine { template: Some(template.clone()), ..bench.whole(name) };
        let vm = hypervisor.start(machine).await.unwrap();
        let added = ["PUT vm.add-disk"; 3];
        let all = [&["PUT vm.restore", "PUT vm.resume"][..], &added, &["PUT vm.add-net"]].concat();
        assert_eq!(asked(&stage), all);
        speaks(&*vm).await;
        vm.insert(3, vec![bench.file("layer", 4096)]).await.unwrap();
        ends(&*vm).await;
        asked(&stage);
    }
}

#[tokio::test]
async fn what_it_refuses_is_told_in_its_words() {
    let Some(bench) = Bench::new() else { return };
    for words in [json!(["Error from API", "The VM could not boot", "Cannot open /disk"]), json!("Cannot open /disk")] {
        let acts = [("PUT /api/v1/vm.boot", Act::Refuse(500, words))].into();
        let (hypervisor, _) = hypervisor(Stage { acts, ..stage() });
        let name = format!("machine{}", bench.dir.path().read_dir().unwrap().count());
        let error = fails(&hypervisor, bench.whole(&name)).await.to_string();
        assert!(error.contains("failed to start: /api/v1/vm.boot: ") && error.contains("Cannot open /disk"), "{error}");
    }
}

#[tokio::test]
async fn one_that_ends_in_the_middle_leaves_its_words() {
    let Some(bench) = Bench::new() else { return };
    let acts = [("PUT /api/v1/vm.add-net", Act::Die("thread 'vmm' panicked"))].into();
    let (hypervisor, _) = hypervisor(Stage { acts, ..stage() });
    let error = fails(&hypervisor, bench.whole("one")).await.to_string();
    assert!(error.contains("thread 'vmm' panicked"), "{error}");
}

#[tokio::test]
async fn one_that_hangs_is_given_up() {
    let Some(bench) = Bench::new() else { return };
    let reached = Arc::new(tokio::sync::Notify::new());
    let acts = [("PUT /api/v1/vm.create", Act::Hang(reached.clone()))].into();
    let (hanging, _) = hypervisor(Stage { acts, ..stage() });
    let error = hangs(&hanging, bench.whole("one"), &reached).await;
    assert!(matches!(error, HypervisorError::Silent { .. }), "{error}");
    let acts = [("GET /api/v1/vmm.ping", Act::Hang(reached.clone()))].into();
    let (hanging, _) = hypervisor(Stage { acts, ..stage() });
    let vm = hanging.start(bench.whole("two")).await.unwrap();
    tokio::time::pause();
    let error = vm.answers().await.unwrap_err();
    assert!(matches!(error, HypervisorError::Silent { .. }), "{error}");
    tokio::time::resume();
    ends(&*vm).await;
}

#[tokio::test]
async fn what_it_has_no_room_for_is_refused() {
    let Some(bench) = Bench::new() else { return };
    let (hypervisor, stage) = hypervisor(stage());
    let mut machine = bench.whole("one");
    machine.layers.insert(5, vec![bench.file("layer", 4096)]);
    assert!(matches!(fails(&hypervisor, machine).await, HypervisorError::Host { .. }));
    let machine = Machine { disk: None, ..bench.whole("two") };
    assert!(matches!(fails(&hypervisor, machine).await, HypervisorError::Host { .. }));
    assert!(asked(&stage).is_empty());
    assert_eq!(hypervisor.room().slots, 1..21);
}
