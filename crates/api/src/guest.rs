//! What the agent of a virtual machine is told: it is the first process of a guest that knows nothing yet, on the port named
//! [`PORT`], or on its socket [`VSOCK_PORT`] where the machine has no such port; there the calls of [`crate::agent`] follow.
//!
//! | call | body | answer |
//! | --- | --- | --- |
//! | `PUT /v1/sandbox` | [`Sandbox`] | [`Begun`]; the guest is this instance's from now on and starts its containers. Once only |
//! | `PUT /v1/rehearsal` | nothing | 204; it has run a container of nothing on the disk in slot 0 and let go of that: the next one begins faster. Before there is an instance |
//! | `PUT /v1/layers` | [`LayerDisk`] | 204; further layers, on a disk that was put into a slot. Those it has stay |
//!
//! A slot is a disk of the machine, counted in the order of its devices. Their contents are not looked at before a call names them.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::agent::AgentConfig;

/// The name of the port, as the machine's device has it.
pub const PORT: &str = "joey.agent";
/// Where the agent listens, for the host alone, in a machine that has a socket device (vsock(7)) in the place of the port.
pub const VSOCK_PORT: u32 = 1024;
/// A word of the kernel's command line: this machine ends when it is switched off, and begins anew when it is restarted. The others
/// end with a restart, and cannot be switched off.
pub const POWER_OFF: &str = "joey.end=off";
/// The reason for which an agent refuses what it cannot do before it has been told of an instance (409).
pub const NO_INSTANCE: &str = "NoInstance";
/// The slot of the disk that is written.
pub const DISK_SLOT: u32 = 0;
/// The slots of layers, of any machine; most have fewer.
pub const LAYER_SLOTS: std::ops::Range<u32> = 1..32;
/// Where layers are mounted in the guest, each by its name.
pub const LAYERS: &str = "/layers";
/// The instance's directory in the guest.
pub const INSTANCE: &str = "/instance";

/// The cgroup of the instance in the guest: [`AgentConfig::cgroup`] says the same.
pub const CGROUP: &str = "/instance";

/// Everything that makes a guest the machine of one instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sandbox {
    pub version: u32,
    /// The time now: a guest's clock is as old as the template that it is a copy of.
    pub now: Timestamp,
    /// Random bytes in base64: copies of one template have drawn the same ones.
    pub entropy: String,
    pub network: Option<Interface>,
    /// Each in a slot of its own.
    pub layers: Vec<LayerDisk>,
    /// Modules that the kernel needs for what the configuration asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<ModuleDisk>,
    /// Most bytes of a core; without it there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub core_bytes: Option<u64>,
    pub config: AgentConfig,
}

/// What the beginning took, in microseconds, in the order of doing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Begun {
    pub phases: Vec<(String, u64)>,
}

/// The guest's only interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Interface {
    pub mac: [u8; 6],
    pub address: std::net::Ipv4Addr,
    pub gateway: std::net::Ipv4Addr,
    pub gateway_mac: [u8; 6],
    pub mtu: u32,
}

/// Layers one behind the other on one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LayerDisk {
    pub slot: u32,
    pub layers: Vec<Layer>,
}

/// Files of modules on one disk, behind the layers that may be there too, in the order in which they are loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModuleDisk {
    pub slot: u32,
    pub modules: Vec<Extent>,
}

/// Bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Extent {
    pub offset: u64,
    pub length: u64,
}

/// An EROFS image among them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Layer {
    /// Hexadecimal digits: where it is mounted, below [`LAYERS`].
    pub name: String,
    /// Where on the disk, in bytes: multiples of 512.
    pub offset: u64,
    pub length: u64,
}
