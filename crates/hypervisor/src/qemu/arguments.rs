//! The command line of a machine's monitor: what is inside the jail under which name, and which devices there are.

use joey_api::vmm::{SENT, TAP};
use serde_json::json;

use super::Qemu;
use crate::{Acceleration, Machine};

/// Changes with what is below, so that templates of another form are not taken.
pub(super) const FORM: &str = "6";
/// Places in the jail.
pub(super) const KERNEL: &str = "/boot/kernel";
pub(super) const INITRAMFS: &str = "/boot/initramfs";
pub(super) const DISK: &str = "/disk";
pub(super) const DESCRIPTOR: &str = "/layers/disk";
/// Slots of a machine: its own disk, and three for layers.
pub(super) const SLOTS: u32 = 4;
/// MiB for translated instructions, which take memory as they come: 33 are what a start takes, and when there is no room for more, all
/// of them go.
const TRANSLATED: u32 = 64;
/// Bytes of the console that are kept for who looks for what went wrong.
const CONSOLE: u32 = 16 << 10;

/// What a monitor is sent as open files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    Qmp,
    Port,
    Memory,
    /// Of a template.
    State,
    /// Of an encrypted disk.
    Key,
    /// What stands in for libraries.
    Capstone,
    Pmem,
    /// The plugin, and the pipe by which it waits.
    Lean,
    Held,
}

/// The number that it has in the monitor; all are sent in this order.
pub(super) fn number(what: Sent, sent: &[Sent]) -> Option<i32> {
    let at = sent.iter().position(|one| *one == what)?;
    i32::try_from(at).ok().map(|at| SENT + at)
}

/// The place of what was sent.
pub(super) fn opened(what: Sent, sent: &[Sent]) -> Option<String> {
    number(what, sent).map(|number| format!("/proc/self/fd/{number}"))
}

/// The place of a layer.
pub(super) fn layer(number: usize) -> String {
    format!("/layers/{number}")
}

/// The monitor's arguments for a machine.
pub(super) fn of(qemu: &Qemu, machine: &Machine, sent: &[Sent]) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| args.extend(words.iter().map(|word| (*word).to_owned()));
    let (size, copy) = (machine.shape.memory_bytes, machine.template.is_some());
    let opened = |what| opened(what, sent);
    let socket = |what, name: &str| {
        let fd = number(what, sent).unwrap_or(-1);
        format!("socket,id={name},fd={fd},server=on,wait=off")
    };
    add(&["-name", &machine.name, "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]);
    add(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    // Without a second controller of interrupts there are eight places for devices, of which seven are taken, instead of 24.
    add(&["-M", "microvm,memory-backend=memory,ioapic2=off,x-option-roms=off"]);
    match qemu.acceleration {
        Acceleration::Kvm => add(&["-accel", "kvm", "-cpu", "host,migratable=on,+invtsc"]),
        Acceleration::Emulated => {
            // The level that distributions are built for (x86-64-v2), and a timer that does not end a sleep of the processor.
            let cpu = "qemu64,+arat,+cx16,+lahf-lm,+popcnt,+sse4.1,+sse4.2,+ssse3";
            // A thread for each processor, also for a single one: plugins are told only by such that it idles.
            add(&["-accel", &format!("tcg,thread=multi,tb-size={TRANSLATED}"), "-cpu", cpu]);
            if let Some(plugin) = opened(Sent::Lean) {
                let mut plugin = format!("file={plugin}");
                let memory = number(Sent::Memory, sent).filter(|_| qemu.has_known_threads());
                for (name, number) in [("memory", memory), ("held", number(Sent::Held, sent))] {
                    plugin.extend(number.map(|number| format!(",{name}={number}")));
                }
                add(&["-plugin", &plugin]);
            }
        }
    }
    add(&["-smp", &machine.shape.cpus.to_string(), "-m", &format!("{}k", size >> 10)]);
    // What one that is to be a template writes is what its copies begin with.
    let share = if machine.to_be_saved { "on" } else { "off" };
    let place = opened(Sent::Memory).unwrap_or_default();
    let memory = format!("memory-backend-file,id=memory,size={size},mem-path={place},share={share}");
    add(&["-object", &memory]);
    if copy {
        // It moved from nowhere. Linux may wait for ever when its interface goes down while it announces where it is (6.12,
        // `virtnet_close`).
        add(&["-incoming", "defer", "-global", "migration.announce-rounds=0"]);
    } else {
        add(&["-kernel", KERNEL, "-initrd", INITRAMFS, "-append", &command_line(qemu)]);
    }
    add(&["-chardev", &socket(Sent::Qmp, "qmp"), "-mon", "chardev=qmp,mode=control"]);
    add(&["-chardev", &format!("ringbuf,id=console,size={CONSOLE}"), "-serial", "chardev:console"]);
    add(&["-device", "virtio-serial-device,max_ports=2"]);
    add(&["-chardev", &socket(Sent::Port, "port")]);
    add(&["-device", &format!("virtserialport,nr=1,chardev=port,name={}", joey_api::guest::PORT)]);
    if let Some(key) = opened(Sent::Key) {
        add(&["-object", &format!("secret,id=key,file={key}")]);
    }
    for slot in 0..SLOTS {
        for node in nodes(machine, slot) {
            add(&["-blockdev", &node.to_string()]);
        }
        // What is given back to the file is nothing: it ends with the machine.
        add(&["-device", &format!("virtio-blk-device,id=disk{slot},drive=slot{slot},discard=off,write-zeroes=off")]);
    }
    // The guest sets its own; copies have the template's until then.
    let [a, b, c, d, e, f] = machine.network.as_ref().map_or([2, 0, 0, 0, 0, 1], |network| network.mac);
    let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
    add(&["-netdev", &format!("tap,id=net,fd={TAP}"), "-device", &format!("virtio-net-device,netdev=net,mac={mac}")]);
    add(&["-device", "virtio-balloon-device,id=balloon,free-page-reporting=on,deflate-on-oom=on"]);
    args
}

/// The nodes of a slot: what is in it, and on top the one that the device keeps.
fn nodes(machine: &Machine, slot: u32) -> Vec<serde_json::Value> {
    let below = first(slot);
    let contents = match slot {
        0 if machine.disk_key.is_some() => {
            let file = json!({ "driver": "file", "filename": DISK, "discard": "ignore" });
            json!({ "driver": "luks", "node-name": below, "key-secret": "key", "file": file })
        }
        0 if machine.disk.is_some() => {
            json!({ "driver": "file", "node-name": below, "filename": DISK, "discard": "ignore" })
        }
        1 if !machine.layers.is_empty() => {
            let descriptor = json!({ "driver": "file", "filename": DESCRIPTOR, "read-only": true });
            json!({ "driver": "vmdk", "node-name": below, "read-only": true, "file": descriptor })
        }
        _ => {
            json!({ "driver": "null-co", "node-name": below, "size": 512, "read-zeroes": true, "read-only": slot > 0 })
        }
    };
    vec![contents, slot_node(slot, &below)]
}

/// What is in a slot when the machine starts.
pub(super) fn first(slot: u32) -> String {
    format!("in{slot}")
}

/// The node of a slot with this one below it.
pub(super) fn slot_node(slot: u32, below: &str) -> serde_json::Value {
    json!({ "driver": "raw", "node-name": format!("slot{slot}"), "read-only": slot > 0, "file": below })
}

/// The kernel's. What is said of the time is for machines that have no other clock to compare with; a machine that cannot go on ends.
fn command_line(qemu: &Qemu) -> String {
    // Tables of names and files are as large as for 64 MiB: each entry that comes first takes a page of a copy.
    let mut line = "quiet console=ttyS0 rdinit=/init panic=-1 reboot=t random.trust_cpu=on cryptomgr.notests \
                    page_reporting.page_reporting_order=2 dhash_entries=8192 ihash_entries=4096"
        .to_owned();
    if qemu.acceleration == Acceleration::Emulated {
        line.push_str(&format!(" tsc_early_khz={} tsc=reliable no_timer_check", qemu.tsc_khz));
    }
    line
}
