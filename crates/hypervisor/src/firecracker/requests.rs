//! What Firecracker is told, in the order of its document.

use std::io;

use joey_api::vmm::{SENT, TAP_NAME};
use serde_json::{Value, json};

use crate::Machine;
use crate::grounds::{self, DISK, INITRAMFS, KERNEL, SAVED, VSOCK};

/// Changes with what is below, so that templates of another form are not taken.
pub(super) const FORM: &str = "1";
/// Slots of a machine: its own disk, and twelve for layers. There are interrupts for 19 devices (5 to 23), of which the monitor takes
/// some itself; interface, socket and balloon are the others.
pub(super) const SLOTS: u32 = 13;
/// Bytes of a disk with nothing in it: a page, whole sectors.
pub(super) const FIRST: u64 = 4096;
/// `vcpu_count` in `MachineConfiguration`.
const MOST_CPUS: u32 = 32;
/// The machine's own number; each has a host of its own.
const CID: u32 = 3;
/// A request: its path, and its body.
type Put = (String, Value);

pub(super) fn drive_id(slot: u32) -> String {
    format!("slot{slot}")
}

/// Whether it can be such a machine.
pub(super) fn check(machine: &Machine) -> io::Result<()> {
    let cpus = machine.shape.cpus;
    if cpus > MOST_CPUS {
        return Err(io::Error::other(format!("it has {MOST_CPUS} processors at most, and not {cpus}")));
    }
    match machine.layers.keys().find(|slot| !(1..SLOTS).contains(*slot)) {
        Some(slot) => Err(io::Error::other(format!("it has {} slots for layers, and none is {slot}", SLOTS - 1))),
        None => Ok(()),
    }
}

/// What a machine boots from and with.
pub(super) fn boot(machine: &Machine) -> Vec<Put> {
    let shape = machine.shape;
    let put = |path: &str, body| (path.to_owned(), body);
    let mut all = vec![
        put(
            "/machine-config",
            json!({ "vcpu_count": shape.cpus, "mem_size_mib": shape.memory_bytes >> 20, "smt": false }),
        ),
        put(
            "/boot-source",
            json!({ "kernel_image_path": KERNEL, "initrd_path": INITRAMFS, "boot_args": COMMAND_LINE }),
        ),
    ];
    for slot in 0..SLOTS {
        let id = drive_id(slot);
        let path = if slot == 0 { DISK.to_owned() } else { grounds::slot(slot) };
        let drive = json!({
            "drive_id": id,
            "path_on_host": path,
            "is_root_device": false,
            "is_read_only": slot > 0,
            // What the guest flushes is not forced to the host's disk: it ends with the machine.
            "cache_type": "Unsafe",
            "io_engine": "Sync",
        });
        all.push((format!("/drives/{id}"), drive));
    }
    let mut interface = json!({ "iface_id": "net", "host_dev_name": TAP_NAME });
    if let Some(network) = &machine.network {
        interface["guest_mac"] = grounds::mac(network.mac).into();
    }
    all.push(put("/network-interfaces/net", interface));
    all.push(put("/vsock", json!({ "guest_cid": CID, "uds_path": VSOCK })));
    all.push(put("/balloon", json!({ "amount_mib": 0, "deflate_on_oom": true, "free_page_reporting": true })));
    all.push(put("/actions", json!({ "action_type": "InstanceStart" })));
    all
}

/// Begins a copy of what was passed as descriptors: memory and state.
pub(super) fn load() -> Put {
    let passed = |number: i32| format!("/proc/self/fd/{}", SENT + number);
    let memory = json!({ "backend_type": "File", "backend_path": passed(0) });
    ("/snapshot/load".to_owned(), json!({ "snapshot_path": passed(1), "mem_backend": memory, "resume_vm": true }))
}

/// Writes memory and state of a machine that is paused.
pub(super) fn save() -> Put {
    let body = json!({
        "snapshot_type": "Full",
        "snapshot_path": format!("{SAVED}/state"),
        "mem_file_path": format!("{SAVED}/memory"),
    });
    ("/snapshot/create".to_owned(), body)
}

/// The kernel's. The keyboard's controller is what ends the machine, and nothing else of it is looked for.
const COMMAND_LINE: &str = "quiet console=ttyS0 rdinit=/init panic=-1 reboot=k random.trust_cpu=on cryptomgr.notests \
                            i8042.noaux i8042.nomux i8042.dumbkbd";
