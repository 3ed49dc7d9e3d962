//! One network namespace: made by a thread of its own that ends afterwards, held in [`crate::holder`].
//!
//! Inside are `lo` and `eth0` with a /32 address; everything goes to the gateway 169.254.1.1, which is no real address but
//! a static neighbour entry with the host end's hardware address. IPv6 is off. No process ever has to enter a namespace for it
//! to be ready.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use crate::error::NetworkError;

/// Where every instance sends what is not for itself (the customary address of routed Pods).
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The interface inside.
pub(crate) const INSIDE: &str = "eth0";
const LOOPBACK_INDEX: u32 = 1;
const THIS_NAMESPACE: &str = "/proc/thread-self/ns/net";
/// `statfs` type of namespace files (linux/magic.h: NSFS_MAGIC).
const NSFS: i64 = 0x6e73_6673;

/// What a namespace is made of.
pub(crate) struct Plan {
    pub(crate) address: Ipv4Addr,
    /// Name of the host's end.
    pub(crate) outside: String,
    pub(crate) group: u32,
}

/// The hardware address inside: locally administered, the IPv4 address in its last four bytes.
pub(crate) fn inside_mac(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x6a, a, b, c, d]
}

fn outside_mac(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x06, 0x6a, a, b, c, d]
}

/// Makes the namespace and both ends of its pair; holding it and the host's route are the caller's.
pub(crate) async fn make(plan: Plan) -> Result<OwnedFd, NetworkError> {
    let (done, result) = tokio::sync::oneshot::channel();
    let object = plan.address.to_string();
    std::thread::Builder::new()
        .name("netns".to_owned())
        .spawn(move || {
            let _ = done.send(make_on_this_thread(&plan));
        })
        .map_err(NetworkError::io("start thread for", &object))?;
    result.await.unwrap_or_else(|_| Err(NetworkError::io("make", object)(std::io::Error::other("its thread panicked"))))
}

/// Leaves this thread in the new namespace: it must end afterwards.
fn make_on_this_thread(plan: &Plan) -> Result<OwnedFd, NetworkError> {
    let object = &plan.address.to_string();
    let open = || File::open(THIS_NAMESPACE).map_err(NetworkError::io("open", THIS_NAMESPACE));
    let host = open()?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(NetworkError::errno("unshare network for", object))?;
    for conf in ["all", "default"] {
        // Absent where the kernel has no IPv6.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{conf}/disable_ipv6"), "1");
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(NetworkError::io("start runtime for", object))?
        .block_on(furnish(plan, &host))?;
    Ok(open()?.into())
}

async fn furnish(plan: &Plan, host: &File) -> Result<(), NetworkError> {
    let object = &plan.outside;
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::io("open netlink for", object))?;
    let connection = tokio::spawn(connection);
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(plan.outside.clone())
        .address(outside_mac(plan.address).to_vec())
        .link_group(plan.group)
        .setns_by_fd(host.as_raw_fd())
        .build();
    let pair = LinkVeth::new(INSIDE, &plan.outside)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .address(inside_mac(plan.address).to_vec())
        .up()
        .build();
    handle.link().add(pair).execute().await.map_err(NetworkError::netlink("add", object))?;
    let index = if_nametoindex(INSIDE).map_err(NetworkError::errno("find eth0 of", object))?;
    let loopback = LinkUnspec::new_with_index(LOOPBACK_INDEX).up().build();
    handle.link().set(loopback).execute().await.map_err(NetworkError::netlink("start lo of", object))?;
    let address = IpAddr::V4(plan.address);
    handle
        .address()
        .add(index, address, 32)
        .execute()
        .await
        .map_err(NetworkError::netlink("add address of", object))?;
    let neighbour = handle.neighbours().add(index, IpAddr::V4(GATEWAY)).link_layer_address(&outside_mac(plan.address));
    neighbour.execute().await.map_err(NetworkError::netlink("add gateway of", object))?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(GATEWAY).output_interface(index).onlink().build();
    handle.route().add(route).execute().await.map_err(NetworkError::netlink("add default route of", object))?;
    connection.abort();
    Ok(())
}

/// Whether `path` holds a namespace.
pub(crate) fn is_held(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|stat| stat.filesystem_type().0 == NSFS)
}
