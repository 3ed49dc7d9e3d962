//! What the program is told that makes jails for virtual machine monitors (`joey-agent jail`): a message on the socket that is its
//! standard input, after one for each descriptor that goes with it. What goes wrong it says on its standard output.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::instance::Resources;

/// What the machine's interface is called in its network namespace.
pub const TAP_NAME: &str = "tap";
/// The descriptor that is the machine's interface on the host's side.
pub const TAP: i32 = 10;
/// The first of the descriptors that were sent, in the order of their sending.
pub const SENT: i32 = 11;

/// What is to be done. It waits for one, however long that takes, and ends without one when the socket does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Order {
    /// Make this jail and become the monitor in it; the descriptors are the monitor's.
    Start(Box<Jail>),
    /// Give a machine that runs already what an instance has; the descriptor is the monitor's network namespace.
    Give(Giving),
}

/// The jail of one monitor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Jail {
    /// What the process is called.
    pub title: String,
    /// The file that tells which process it is: its id and its start (field 22 of proc(5) stat).
    pub record: PathBuf,
    /// Its cgroup below each controller's root, and the limits of it.
    pub cgroup: String,
    pub limits: Resources,
    /// The user and group it runs as.
    pub user: u32,
    /// The network namespace whose interface `eth0` is joined with the machine's; without one the machine's leads nowhere.
    pub netns: Option<PathBuf>,
    /// The hardware address of the machine's interface.
    pub mac: Option<[u8; 6]>,
    #[serde(default)]
    pub interface: Interface,
    /// All it sees of the host beside what every program needs to start.
    pub files: Vec<Bind>,
    /// Whether it may use the kernel's virtual machines.
    pub kvm: bool,
    /// Whether the machine's memory begins with what others begin with too: the monitor gives parts of it back to the host without
    /// taking them out of the file, as it would like to (and may not: it is sealed).
    pub shared_memory: bool,
    /// Bytes of the longest file that it may write.
    pub longest_file: u64,
    pub program: PathBuf,
    pub args: Vec<String>,
    /// Its environment, `NAME=VALUE` each.
    pub env: Vec<String>,
}

/// What a machine that runs already gets from outside of it when it becomes an instance's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Giving {
    /// The monitor, which the caller keeps from being another process by then.
    pub pid: u32,
    /// Where it is, and its limits from now on.
    pub cgroup: String,
    pub limits: Resources,
    /// Bytes of the longest file that it may write from now on.
    pub longest_file: u64,
    /// The namespace whose interface `eth0` is joined with the machine's, which moves there, and the hardware address of that.
    pub network: Option<(PathBuf, [u8; 6])>,
}

/// How the monitor comes by the host's side of the machine's interface.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Interface {
    /// As the descriptor [`TAP`].
    #[default]
    Descriptor,
    /// Through who starts it, who gets the descriptor back in a message on the socket: for a monitor that takes it with a request.
    Returned,
    /// By its name [`TAP_NAME`]: the monitor stays in the network namespace `netns`, which has the interface, and may open
    /// `/dev/net/tun`. Where there is no `netns`, it has a namespace of its own with nothing else in it. What breaks out of such a
    /// machine can make sockets in that namespace, as the machine's programs could if they were containers; it has no right there.
    Named,
}

/// A file or directory of the host, shown in the jail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bind {
    pub from: PathBuf,
    /// An absolute path.
    pub to: PathBuf,
    pub writable: bool,
}
