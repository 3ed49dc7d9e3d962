//! The host's side of links, through rtnetlink: routes and neighbours of instances, ifb devices, deletion.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::RouteScope;
use rtnetlink::{Handle, LinkIfb, LinkUnspec, RouteMessageBuilder};
use tokio::task::AbortHandle;

use crate::error::NetworkError;

/// A netlink connection to the host's namespace.
pub(crate) struct Links {
    handle: Handle,
    connection: AbortHandle,
}

impl Links {
    pub(crate) fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(NetworkError::io("open", "netlink connection"))?;
        Ok(Self { handle, connection: tokio::spawn(connection).abort_handle() })
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
        set("ipv4", name, "rp_filter", "1")?;
        set("ipv6", name, "disable_ipv6", "1")?;
        let index = if_nametoindex(name).map_err(NetworkError::errno("find", name))?;
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
        let message = LinkIfb::new(name).link_group(group).up().build();
        self.handle.link().add(message).execute().await.map_err(NetworkError::netlink("add", name))
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

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Writes one of an interface's switches. A kernel without IPv6 has nothing to switch off.
fn set(family: &str, interface: &str, switch: &str, value: &str) -> Result<(), NetworkError> {
    let path = format!("/proc/sys/net/{family}/conf/{interface}/{switch}");
    match std::fs::write(&path, value) {
        Err(error) if family == "ipv6" && error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(NetworkError::io("write", path)),
    }
}
