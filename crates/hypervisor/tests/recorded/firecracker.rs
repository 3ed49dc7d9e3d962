//! Firecracker's driver against its document.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use joey_api::vmm::Interface;
use joey_hypervisor::firecracker::Firecracker;
use joey_hypervisor::{Hypervisor, HypervisorError, Machine};
use serde_json::{Value, json};

use crate::server::{Act, Played, Stage};
use crate::{Bench, MEMORY, REMEMBERED, contents, ends, fails, hangs, heard, is_remembered, speaks, template};

const STATE: &[u8] = b"the state of its devices";

fn effect(played: &Played, request: &str, body: Option<&Value>, _: Option<OwnedFd>) -> Result<Value, String> {
    let text = |name: &str| body.and_then(|body| body.pointer(name)).and_then(Value::as_str).unwrap_or_default();
    match request {
        "GET /" => {
            let state =
                json!({ "app_name": "Firecracker", "id": "anonymous", "state": "Running", "vmm_version": "1.16.0" });
            return Ok(state);
        }
        "PUT /actions" => {
            assert_eq!(played.jail.interface, Interface::Named);
            let told = played.told.lock().unwrap();
            let memory = told["PUT /machine-config"]["mem_size_mib"].as_u64();
            assert_eq!(
                (memory, &told["PUT /network-interfaces/net"]["host_dev_name"]),
                (Some(MEMORY >> 20), &json!("tap"))
            );
            assert!(text("/action_type") == "InstanceStart" && told.contains_key("PUT /boot-source"));
            played.listen(told["PUT /vsock"]["uds_path"].as_str().unwrap())?;
        }
        "PUT /snapshot/create" => {
            let mut memory = vec![0; MEMORY as usize];
            let (words, at) = REMEMBERED;
            memory[at as usize..][..words.len()].copy_from_slice(words);
            played.write(text("/mem_file_path"), &memory)?;
            played.write(text("/snapshot_path"), STATE)?;
        }
        "PUT /snapshot/load" => {
            let (memory, state) =
                (played.place(text("/mem_backend/backend_path"))?, played.place(text("/snapshot_path"))?);
            is_remembered(&memory.0)?;
            assert_eq!((contents(&state.0).as_slice(), text("/mem_backend/backend_type")), (STATE, "File"));
            assert_eq!(body.unwrap()["resume_vm"], true);
            // What was saved names these, and they must be there.
            for path in ["/disk".to_owned()].into_iter().chain((1..13).map(|slot| format!("/slots/{slot}"))) {
                let (place, _) = played.place(&path)?;
                assert!(place.metadata().unwrap().len() >= 512, "{path}");
            }
            played.listen("/run/vsock.sock")?;
        }
        _ => {}
    }
    Ok(Value::Null)
}

fn stage() -> Stage {
    Stage::new(include_str!("firecracker.json"), effect)
}

fn hypervisor(stage: Stage) -> (Firecracker, Arc<Stage>) {
    let stage = Arc::new(stage);
    let program = PathBuf::from("/usr/bin/firecracker");
    (Firecracker::known(program, stage.clone(), "Firecracker v1.16.0".to_owned()), stage)
}

fn boot_requests() -> Vec<String> {
    let drives = (0..13).map(|slot| format!("PUT /drives/slot{slot}"));
    let first = ["PUT /machine-config", "PUT /boot-source"].map(str::to_owned).into_iter();
    let last = ["PUT /network-interfaces/net", "PUT /vsock", "PUT /balloon", "PUT /actions"].map(str::to_owned);
    first.chain(drives).chain(last).collect()
}

#[tokio::test]
async fn a_machine_boots_and_takes_a_layer() {
    let Some(bench) = Bench::new() else { return };
    let (hypervisor, stage) = hypervisor(Stage { deaf: 3, ..stage() });
    let machine = bench.whole("one");
    let dir = machine.dir.clone();
    let vm = hypervisor.start(machine).await.unwrap();
    assert_eq!(heard(&stage), boot_requests());
    speaks(&*vm).await;
    vm.answers().await.unwrap();
    let layer = bench.file("further", 8192);
    vm.insert(3, vec![layer.clone()]).await.unwrap();
    assert_eq!(heard(&stage), ["GET /", "PATCH /drives/slot3"]);
    assert_eq!(contents(&dir.join("slots/3")), contents(&layer));
    let error = vm.insert(4, vec![layer.clone(), layer]).await.unwrap_err();
    assert!(matches!(error, HypervisorError::Host { .. }), "{error}");
    let error = vm.freeze().await.unwrap_err();
    assert!(matches!(error, HypervisorError::Host { .. }), "{error}");
    ends(&*vm).await;
    assert!(vm.answers().await.is_err() && vm.connect().await.is_err());
}

#[tokio::test]
async fn a_copy_of_a_template_has_its_own_disks() {
    let Some(bench) = Bench::new() else { return };
    let (hypervisor, stage) = hypervisor(stage());
    let template = template(&hypervisor, &bench).await;
    let saved = boot_requests().into_iter().chain(["PATCH /vm".to_owned(), "PUT /snapshot/create".to_owned()]);
    assert_eq!(heard(&stage), saved.collect::<Vec<_>>());
    for name in ["one", "two"] {
        let machine = Machine { template: Some(template.clone()), ..bench.whole(name) };
        let vm = hypervisor.start(machine).await.unwrap();
        assert_eq!(heard(&stage), ["PUT /snapshot/load"]);
        speaks(&*vm).await;
        let error = vm.freeze().await.unwrap_err();
        assert!(matches!(error, HypervisorError::Host { .. }), "{error}");
        ends(&*vm).await;
    }
}

#[tokio::test]
async fn what_it_refuses_is_told_in_its_words() {
    let Some(bench) = Bench::new() else { return };
    let refused = Act::Refuse(400, json!({ "fault_message": "Unable to open or create the tap" }));
    let acts = [("PUT /network-interfaces/net", refused)].into();
    let (hypervisor, _) = hypervisor(Stage { acts, ..stage() });
    let error = fails(&hypervisor, bench.whole("one")).await.to_string();
    assert!(error.contains("machine one failed to start: /network-interfaces/net: Unable to open"), "{error}");
}

#[tokio::test]
async fn one_that_ends_in_the_middle_leaves_its_words() {
    let Some(bench) = Bench::new() else { return };
    let acts = [("PUT /vsock", Act::Die("Error: cannot bind"))].into();
    let (hypervisor, _) = hypervisor(Stage { acts, ..stage() });
    let error = fails(&hypervisor, bench.whole("one")).await.to_string();
    assert!(error.contains("Error: cannot bind"), "{error}");
}

#[tokio::test]
async fn one_that_hangs_is_given_up() {
    let Some(bench) = Bench::new() else { return };
    let reached = Arc::new(tokio::sync::Notify::new());
    let acts = [("PUT /balloon", Act::Hang(reached.clone()))].into();
    let (hanging, _) = hypervisor(Stage { acts, ..stage() });
    let error = hangs(&hanging, bench.whole("one"), &reached).await;
    assert!(matches!(error, HypervisorError::Silent { .. }), "{error}");
    let acts = [("GET /", Act::Hang(reached.clone()))].into();
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
    machine.layers.insert(13, vec![bench.file("layer", 4096)]);
    assert!(matches!(fails(&hypervisor, machine).await, HypervisorError::Host { .. }));
    let mut machine = bench.whole("two");
    machine.shape.cpus = 33;
    assert!(matches!(fails(&hypervisor, machine).await, HypervisorError::Host { .. }));
    assert!(heard(&stage).is_empty());
    assert_eq!(hypervisor.room().slots, 1..13);
}
