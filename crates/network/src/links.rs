//! The host's side of links, through rtnetlink: routes and neighbours of instances, ifb devices, deletion.
//!
//! The kernel does what a netlink message asks while it is sent, which may take tens of milliseconds: a thread sends them.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::OnceLock;

use futures::TryStreamExt;
use ipnet::Ipv4Net;
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteScope};
use rtnetlink::{Handle, LinkIfb, LinkUnspec, RouteMessageBuilder};
use tokio::sync::{OnceCell, oneshot};

use crate::error::NetworkError;
use crate::program::run;

/// A netlink connection to the host's namespace, with its thread.
pub(crate) struct Links {
    handle: Handle,
    /// Looked for once.
    ifb_driver: OnceCell<()>,
    /// Dropped, it ends the thread.
    _connection: oneshot::Sender<()>,
}

impl Links {
    pub(crate) async fn open() -> Result<Self, NetworkError> {
        let failed = NetworkError::io("open", "netlink connection");
        let (opened, handle) = oneshot::channel();
        let (connection, mut ended) = oneshot::channel();
        let serve = async move {
            let (connection, handle, _) = match rtnetlink::new_connection() {
                Ok(connection) => connection,
                Err(error) => return drop(opened.send(Err(error))),
            };
            let _ = opened.send(Ok(handle));
            tokio::select! {
                _ = connection => {}
                _ = &mut ended => {}
            }
        };
        let run = move || match tokio::runtime::Builder::new_current_thread().enable_io().build() {
            Ok(runtime) => runtime.block_on(serve),
            Err(error) => tracing::error!(%error, "cannot start the runtime of netlink"),
        };
        let answer = match std::thread::Builder::new().name("netlink".to_owned()).spawn(run) {
            Ok(_) => handle.await.unwrap_or_else(|_| Err(std::io::Error::other("its thread ended"))),
            Err(error) => Err(error),
        };
        Ok(Self { handle: answer.map_err(failed)?, ifb_driver: OnceCell::new(), _connection: connection })
    }

    pub(crate) fn exists(name: &str) -> bool {
        Path::new("/sys/class/net").join(name).exists()
    }

    /// Names of the host's interfaces that begin with `prefix`.
    pub(crate) fn with_prefix(prefix: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir("/sys/class/net") else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect()
    }

    /// Makes the host's end `name` carry `address`: strict reverse path, no IPv6, static neighbour, route.
    pub(crate) async fn route(&self, name: &str, address: Ipv4Addr, mac: [u8; 6]) -> Result<(), NetworkError> {
        let strict = format!("/proc/sys/net/ipv4/conf/{name}/rp_filter");
        std::fs::write(&strict, "1").map_err(NetworkError::io("write", &strict))?;
        let index = if_nametoindex(name).map_err(NetworkError::errno("find", name))?;
        without_ipv6(&self.handle, index).await.map_err(NetworkError::netlink("keep IPv6 off", name))?;
        let up = LinkUnspec::new_with_index(index).up().build();
        self.handle.link().set(up).execute().await.map_err(NetworkError::netlink("start", name))?;
        self.handle
            .neighbours()
            .add(index, IpAddr::V4(address))
            .link_layer_address(&mac)
            .replace()
            .execute()
            .await
            .map_err(NetworkError::netlink("add neighbour of", name))?;
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, 32)
            .output_interface(index)
            .scope(RouteScope::Link)
            .build();
        self.handle.route().add(route).replace().execute().await.map_err(NetworkError::netlink("add route of", name))
    }

    pub(crate) async fn add_ifb(&self, name: &str, group: u32) -> Result<(), NetworkError> {
        self.ifb_driver.get_or_init(load_ifb).await;
        let message = LinkIfb::new(name).link_group(group).up().build();
        self.handle.link().add(message).execute().await.map_err(NetworkError::netlink("add", name))
    }

    /// Destinations that the host routes other than by default, in every table, each with the index of its interface.
    pub(crate) async fn routes(&self) -> Result<Vec<(Ipv4Net, Option<u32>)>, NetworkError> {
        let mut answer = self.handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
        let mut routes = Vec::new();
        while let Some(route) = answer.try_next().await.map_err(NetworkError::netlink("list", "routes"))? {
            let (mut destination, mut interface) = (None, None);
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = Some(*address),
                    RouteAttribute::Oif(index) => interface = Some(*index),
                    _ => {}
                }
            }
            let net =
                destination.and_then(|address| Ipv4Net::new(address, route.header.destination_prefix_length).ok());
            routes.extend(net.filter(|net| net.prefix_len() > 0).map(|net| (net, interface)));
        }
        Ok(routes)
    }

    /// Deletes an interface; one that is not there is no error.
    pub(crate) async fn delete(&self, name: &str) -> Result<(), NetworkError> {
        let Ok(index) = if_nametoindex(name) else { return Ok(()) };
        match self.handle.link().del(index).execute().await {
            Err(_) if !Self::exists(name) => Ok(()),
            result => result.map_err(NetworkError::netlink("delete", name)),
        }
    }

    /// Deletes every interface of a group at once: the kernel waits for its readers once, not once an interface.
    pub(crate) async fn delete_group(&self, group: u32) -> Result<(), NetworkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(group));
        self.handle
            .link()
            .del_with_message(message)
            .execute()
            .await
            .map_err(NetworkError::netlink("delete interfaces of group", group))
    }
}

/// The kernel would load the driver by itself for the first ifb device, which then makes two more of its own that stay for ever:
/// it is loaded without them. Where that cannot be done it is built in, or the kernel does it its way.
async fn load_ifb() {
    if !Path::new("/sys/module/ifb").exists()
        && let Err(error) = run("modprobe", &["ifb", "numifbs=0"], "").await
    {
        tracing::debug!(%error, "the driver of ifb devices was not loaded");
    }
}

/// Keeps an interface that is still down from ever giving itself an IPv6 address; [`crate::rules`] drop what comes in all the same.
///
/// Not by the switch `disable_ipv6`: its writer runs in circles for as long as anybody else changes any interface.
pub(crate) async fn without_ipv6(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    if !has_ipv6() {
        return Ok(());
    }
    let none = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    let message = LinkUnspec::new_with_index(index).append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![none]));
    handle.link().set(message.build()).execute().await
}

/// Whether this kernel speaks IPv6.
pub(crate) fn has_ipv6() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| Path::new("/proc/sys/net/ipv6").exists())
}
