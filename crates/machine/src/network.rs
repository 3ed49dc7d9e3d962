//! The machine's interface: what the host's side of it expects (`joey_network`), set by the oldest calls of the kernel.

use std::ffi::c_char;
use std::io;
use std::mem::zeroed;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use joey_api::guest::Interface;

use crate::machine;
use joey_kernel::sys;

/// What containers know it by.
const NAME: &str = "eth0";
/// linux/if_arp.h: what an address of Ethernet is marked with.
const ETHERNET: libc::sa_family_t = 1;

/// Gives the interface its driver and starts it, without an address. A machine may have none.
pub fn prepare() -> io::Result<()> {
    let Some(device) = machine::devices(machine::INTERFACE)?.into_iter().next() else { return Ok(()) };
    machine::bind(&device, "virtio_net")?;
    let name = machine::named(&device, "net")?;
    let socket = socket()?;
    if name != NAME {
        ask(&socket, &name, libc::SIOCSIFNAME, |request| {
            // SAFETY: all kinds of this union are plain bytes, and this one is as long as a name.
            write_name(unsafe { &mut request.ifr_ifru.ifru_newname }, NAME);
        })?;
    }
    // No IPv6 address, as in every instance.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{NAME}/disable_ipv6"), "1");
    let up = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    ask(&socket, NAME, libc::SIOCSIFFLAGS, |request| request.ifr_ifru.ifru_flags = up)
}

/// Takes the interface its addresses and routes, and starts it again without.
pub fn let_go() -> io::Result<()> {
    let socket = socket()?;
    ask(&socket, NAME, libc::SIOCSIFADDR, |request| request.ifr_ifru.ifru_addr = internet(Ipv4Addr::UNSPECIFIED))?;
    // What has no address of its own, routes and neighbours, goes when it is down.
    ask(&socket, NAME, libc::SIOCSIFFLAGS, |request| request.ifr_ifru.ifru_flags = 0)?;
    let up = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    ask(&socket, NAME, libc::SIOCSIFFLAGS, |request| request.ifr_ifru.ifru_flags = up)
}

/// Gives the interface its addresses and routes: everything goes to the gateway, whose hardware address never changes.
pub fn bring_up(wanted: &Interface) -> io::Result<()> {
    let socket = socket()?;
    ask(&socket, NAME, libc::SIOCSIFHWADDR, |request| request.ifr_ifru.ifru_hwaddr = hardware(wanted.mac))?;
    ask(&socket, NAME, libc::SIOCSIFMTU, |request| request.ifr_ifru.ifru_mtu = wanted.mtu as libc::c_int)?;
    ask(&socket, NAME, libc::SIOCSIFADDR, |request| request.ifr_ifru.ifru_addr = internet(wanted.address))?;
    let whole = internet(Ipv4Addr::BROADCAST);
    ask(&socket, NAME, libc::SIOCSIFNETMASK, |request| request.ifr_ifru.ifru_netmask = whole)?;
    neighbour(&socket, wanted)?;
    let direct = route(wanted.gateway, Ipv4Addr::BROADCAST, None);
    let default = route(Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED, Some(wanted.gateway));
    let device = sys::c(NAME)?;
    for mut entry in [direct, default] {
        entry.rt_dev = device.as_ptr().cast_mut();
        // SAFETY: the structure and the name it points to live through the call.
        sys::check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT as _, &raw const entry) }.into())?;
    }
    Ok(())
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: integers; the descriptor is new and nobody else's.
    unsafe {
        let fd = sys::check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0).into())?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// A call on an interface, by what `change` puts into its request.
fn ask(socket: &OwnedFd, name: &str, number: libc::c_ulong, change: impl FnOnce(&mut libc::ifreq)) -> io::Result<()> {
    let mut request = request(name)?;
    change(&mut request);
    // SAFETY: the structure is a whole one and lives through the call.
    sys::check(unsafe { libc::ioctl(socket.as_raw_fd(), number as _, &raw mut request) }.into()).map(drop)
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: all zeros are a request of no name.
    let mut request: libc::ifreq = unsafe { zeroed() };
    write_name(&mut request.ifr_name, name);
    Ok(request)
}

fn write_name(place: &mut [c_char; libc::IFNAMSIZ], name: &str) {
    for (place, byte) in place.iter_mut().zip(name.bytes()) {
        *place = byte as c_char;
    }
}

fn hardware(address: [u8; 6]) -> libc::sockaddr {
    let mut data = [0; 14];
    for (place, byte) in data.iter_mut().zip(address) {
        *place = byte as c_char;
    }
    libc::sockaddr { sa_family: ETHERNET, sa_data: data }
}

fn internet(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (place, byte) in data[2..].iter_mut().zip(address.octets()) {
        *place = byte as c_char;
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

/// The gateway's hardware address, for ever: nobody is asked for it.
fn neighbour(socket: &OwnedFd, wanted: &Interface) -> io::Result<()> {
    // linux/if_arp.h: ATF_COM and ATF_PERM.
    const COMPLETE: libc::c_int = 2;
    const PERMANENT: libc::c_int = 4;
    // SAFETY: all zeros are an entry that says nothing.
    let mut entry: libc::arpreq = unsafe { zeroed() };
    entry.arp_pa = internet(wanted.gateway);
    entry.arp_ha = hardware(wanted.gateway_mac);
    entry.arp_flags = COMPLETE | PERMANENT;
    for (place, byte) in entry.arp_dev.iter_mut().zip(NAME.bytes()) {
        *place = byte as c_char;
    }
    // SAFETY: the structure lives through the call.
    sys::check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSARP as _, &raw const entry) }.into()).map(drop)
}

fn route(to: Ipv4Addr, mask: Ipv4Addr, gateway: Option<Ipv4Addr>) -> libc::rtentry {
    // SAFETY: all zeros are a route to nowhere.
    let mut entry: libc::rtentry = unsafe { zeroed() };
    entry.rt_dst = internet(to);
    entry.rt_genmask = internet(mask);
    entry.rt_flags = libc::RTF_UP;
    match gateway {
        Some(gateway) => {
            entry.rt_gateway = internet(gateway);
            entry.rt_flags |= libc::RTF_GATEWAY;
        }
        None => entry.rt_flags |= libc::RTF_HOST,
    }
    entry
}
