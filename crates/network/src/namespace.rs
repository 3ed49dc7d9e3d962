//! One network namespace: made by a thread of its own that ends afterwards, held in [`crate::holder`].
//!
//! Inside are `lo` and `eth0` with a /32 address; everything goes to the gateway 169.254.1.1, which is no real address but
//! a static neighbour entry with the host end's hardware address. `eth0` has no IPv6 address. No process ever has to enter a namespace for it
//! to be ready.
//!
//! `eth0` is up before its peer, so it has no carrier at first. When the peer comes up the kernel tells it in the background,
//! and throws away what is sent until then: the thread waits for that, so that the first packet of a new instance arrives.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use futures::{Stream, StreamExt, TryStreamExt};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkMessage, State};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, MulticastGroup, RouteMessageBuilder};
use tokio::sync::oneshot;

use crate::error::NetworkError;
use crate::links;

/// Where every instance sends what is not for itself (the customary address of routed Pods).
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The interface inside.
pub(crate) const INSIDE: &str = "eth0";
const LOOPBACK_INDEX: u32 = 1;
const THIS_NAMESPACE: &str = "/proc/thread-self/ns/net";
/// `statfs` type of namespace files (linux/magic.h: NSFS_MAGIC).
const NSFS: i64 = 0x6e73_6673;
/// How long the kernel may take to tell an interface that its peer is up; it takes microseconds.
const CARRIER_LIMIT: Duration = Duration::from_secs(10);

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

/// The hardware address of the host's end, which the gateway has inside.
pub(crate) fn outside_mac(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x06, 0x6a, a, b, c, d]
}

/// A namespace that is whole but for the host's end of its pair, which is still down.
pub(crate) struct Namespace {
    object: String,
    /// Asks the thread inside to wait for the carrier; dropped, it ends the thread.
    peer_is_up: oneshot::Sender<()>,
    carried: oneshot::Receiver<Result<(), NetworkError>>,
}

impl Namespace {
    /// Resolves when packets pass both ways. The host's end must be up.
    pub(crate) async fn carries(self) -> Result<(), NetworkError> {
        let failed = |kind: std::io::ErrorKind| NetworkError::io("wait for the carrier of", &self.object)(kind.into());
        let _ = self.peer_is_up.send(());
        match tokio::time::timeout(CARRIER_LIMIT, self.carried).await {
            Ok(Ok(carried)) => carried,
            Ok(Err(_)) => Err(failed(std::io::ErrorKind::BrokenPipe)),
            Err(_) => Err(failed(std::io::ErrorKind::TimedOut)),
        }
    }
}

/// Makes the namespace and both ends of its pair; holding it and the host's end are the caller's.
pub(crate) async fn make(plan: Plan) -> Result<(OwnedFd, Namespace), NetworkError> {
    let (made, result) = oneshot::channel();
    let (peer_is_up, go_on) = oneshot::channel();
    let (answer, carried) = oneshot::channel();
    let object = plan.outside.clone();
    std::thread::Builder::new()
        .name("netns".to_owned())
        .spawn(move || match make_on_this_thread(&plan) {
            Ok((netns, inside)) => {
                let _ = made.send(Ok(netns));
                inside.wait(&plan.outside, go_on, answer);
            }
            Err(error) => drop(made.send(Err(error))),
        })
        .map_err(NetworkError::io("start thread for", &object))?;
    let netns = result
        .await
        .unwrap_or_else(|_| Err(NetworkError::io("make", &object)(std::io::Error::other("its thread panicked"))))?;
    Ok((netns, Namespace { object, peer_is_up, carried }))
}

/// What the thread needs to wait for the carrier.
struct Inside {
    runtime: tokio::runtime::Runtime,
    handle: Handle,
    index: u32,
    events: Events,
}

type Events = Box<dyn Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + Unpin>;

impl Inside {
    fn wait(
        mut self,
        object: &str,
        go_on: oneshot::Receiver<()>,
        mut answer: oneshot::Sender<Result<(), NetworkError>>,
    ) {
        let told = self.runtime.block_on(async {
            go_on.await.ok()?;
            tokio::select! {
                carried = carrier(&self.handle, self.index, &mut self.events) => Some(carried),
                () = answer.closed() => None,
            }
        });
        if let Some(carried) = told {
            let _ = answer.send(carried.map_err(NetworkError::netlink("wait for the carrier of", object)));
        }
    }
}

/// Leaves this thread in the new namespace: it must end afterwards.
fn make_on_this_thread(plan: &Plan) -> Result<(OwnedFd, Inside), NetworkError> {
    let object = &plan.address.to_string();
    let open = || File::open(THIS_NAMESPACE).map_err(NetworkError::io("open", THIS_NAMESPACE));
    let host = open()?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(NetworkError::errno("unshare network for", object))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(NetworkError::io("start runtime for", object))?;
    let (handle, index, events) = runtime.block_on(furnish(plan, &host))?;
    Ok((open()?.into(), Inside { runtime, handle, index, events }))
}

async fn furnish(plan: &Plan, host: &File) -> Result<(Handle, u32, Events), NetworkError> {
    let object = &plan.outside;
    // Subscribed before the peer can come up, so that its carrier is not missed.
    let (connection, handle, messages) = rtnetlink::new_multicast_connection(&[MulticastGroup::Link])
        .map_err(NetworkError::io("open netlink for", object))?;
    // Ends with the runtime.
    tokio::spawn(connection);
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(plan.outside.clone())
        .address(outside_mac(plan.address).to_vec())
        .link_group(plan.group)
        .setns_by_fd(host.as_raw_fd())
        .build();
    let pair = LinkVeth::new(INSIDE, &plan.outside)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .address(inside_mac(plan.address).to_vec())
        .build();
    handle.link().add(pair).execute().await.map_err(NetworkError::netlink("add", object))?;
    let index = if_nametoindex(INSIDE).map_err(NetworkError::errno("find eth0 of", object))?;
    links::without_ipv6(&handle, index).await.map_err(NetworkError::netlink("keep IPv6 off", object))?;
    let up = LinkUnspec::new_with_index(index).up().build();
    handle.link().set(up).execute().await.map_err(NetworkError::netlink("start eth0 of", object))?;
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
    Ok((handle, index, Box::new(messages.map(|(message, _)| message))))
}

/// Waits until the interface is operational: then the kernel has taken its queue into use.
///
/// Asked, newer kernels (from 6.7) first do what the carrier's coming has left to do; older ones do it by themselves soon, and
/// tell.
async fn carrier(handle: &Handle, index: u32, events: &mut Events) -> Result<(), rtnetlink::Error> {
    if handle.link().get().match_index(index).execute().try_next().await?.is_some_and(|link| is_operational(&link)) {
        return Ok(());
    }
    while let Some(message) = events.next().await {
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) = message.payload
            && link.header.index == index
            && is_operational(&link)
        {
            return Ok(());
        }
    }
    Err(rtnetlink::Error::RequestFailed)
}

fn is_operational(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::OperState(State::Up)))
}

/// Whether `path` holds a namespace.
pub(crate) fn is_held(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|stat| stat.filesystem_type().0 == NSFS)
}
