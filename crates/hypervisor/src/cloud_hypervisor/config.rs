//! What Cloud Hypervisor is told of a machine, and what is changed in what it saved of one.

use std::io;

use joey_api::guest::POWER_OFF;
use joey_api::vmm::SENT;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::grounds::{self, DISK, INITRAMFS, KERNEL, VSOCK};
use crate::{Machine, Network};

/// Changes with what is below, so that templates of another form are not taken.
pub(super) const FORM: &str = "1";
/// Slots of a machine: its own disk, and twenty for layers. A bus has 32 places, and the others are the bridge, the interface, the socket,
/// the balloon, and the monitor's own.
pub(super) const SLOTS: u32 = 21;
/// Places in the jail.
pub(super) const MEMORY: &str = "/memory";
pub(super) const TEMPLATE: &str = "/template";
/// The machine's own number; each has a host of its own.
const CID: u32 = 3;

/// The disks of a machine in the order of their slots, which have no gap.
pub(super) fn disks(machine: &Machine) -> io::Result<Vec<Value>> {
    let own = machine.disk.iter().map(|_| disk(0, DISK, false));
    let disks: Vec<Value> = own.chain(machine.layers.keys().map(|slot| layer(*slot))).collect();
    let in_order = machine.layers.keys().zip(1..SLOTS).all(|(slot, number)| *slot == number);
    match in_order && disks.len() <= SLOTS as usize && (machine.disk.is_some() || machine.layers.is_empty()) {
        true => Ok(disks),
        false => Err(io::Error::other("slots are filled from the machine's own disk on, without gaps")),
    }
}

/// The disk of layers in a slot.
pub(super) fn layer(slot: u32) -> Value {
    disk(slot, &grounds::slot(slot), true)
}

fn disk(slot: u32, path: &str, readonly: bool) -> Value {
    // What kind of image it is, is not to be guessed from what the guest writes.
    json!({ "id": format!("slot{slot}"), "path": path, "readonly": readonly, "image_type": "Raw" })
}

/// The interface; its descriptor goes along with the request.
pub(super) fn interface(network: &Network) -> Value {
    json!({ "id": "net", "mac": grounds::mac(network.mac), "num_queues": 2 })
}

/// A machine that boots.
pub(super) fn boot(machine: &Machine, disks: Vec<Value>) -> Value {
    let (cpus, size) = (machine.shape.cpus, machine.shape.memory_bytes);
    let memory = match machine.to_be_saved {
        true => json!({ "size": 0, "zones": [{ "id": "memory", "size": size, "file": MEMORY, "shared": true }] }),
        false => json!({ "size": size }),
    };
    json!({
        "cpus": { "boot_vcpus": cpus, "max_vcpus": cpus },
        "memory": memory,
        "payload": { "kernel": KERNEL, "initramfs": INITRAMFS, "cmdline": command_line() },
        "disks": disks,
        "rng": { "src": "/dev/urandom" },
        "balloon": { "size": 0, "deflate_on_oom": true, "free_page_reporting": true },
        "serial": { "mode": "Null" },
        "console": { "mode": "Off" },
        "vsock": { "id": "vsock", "cid": CID, "socket": VSOCK },
    })
}

fn command_line() -> String {
    format!("quiet console=ttyS0 rdinit=/init panic=-1 random.trust_cpu=on cryptomgr.notests {POWER_OFF}")
}

/// What is kept of a machine beside its memory: the two files that the monitor wrote.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Saved {
    config: Value,
    /// Nobody's but the monitor's.
    pub state: String,
}

impl Saved {
    pub(super) fn new(config: &[u8], state: Vec<u8>) -> io::Result<Self> {
        Ok(Self { config: serde_json::from_slice(config)?, state: String::from_utf8(state).map_err(io::Error::other)? })
    }

    pub(super) fn read(bytes: &[u8]) -> io::Result<Self> {
        Ok(serde_json::from_slice(bytes)?)
    }

    pub(super) fn write(&self) -> io::Result<Vec<u8>> {
        Ok(serde_json::to_vec(self)?)
    }

    /// The configuration of a copy: it reads the memory that was passed as a descriptor, and keeps what it changes to itself.
    pub(super) fn config_of_copy(&self) -> io::Result<Value> {
        let mut config = self.config.clone();
        match config.pointer_mut("/memory/zones").and_then(Value::as_array_mut).map(Vec::as_mut_slice) {
            Some([Value::Object(zone)]) => {
                zone.insert("file".to_owned(), format!("/proc/self/fd/{SENT}").into());
                zone.insert("shared".to_owned(), false.into());
            }
            _ => return Err(io::Error::other("the template's memory is not one file")),
        }
        Ok(config)
    }
}
