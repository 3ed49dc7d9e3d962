//! The way of a machine's packets: its interface and the Pod's are ports of one bridge in the Pod's network namespace, so that what is
//! outside of the namespace sees the machine as it would see a process in it.

use std::ffi::c_char;
use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use joey_api::vmm::TAP_NAME as TAP;
use joey_kernel::sys;

use crate::link;

const BRIDGE: &str = "joey";
const INSIDE: &str = "eth0";
/// linux/if_arp.h: what an address of Ethernet is marked with.
const ETHERNET: libc::sa_family_t = 1;
/// linux/sockios.h
const SIOCBRADDBR: libc::c_ulong = 0x89a0;
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
/// linux/if_tun.h
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOWNER: libc::c_ulong = 0x4004_54cc;

/// Makes the machine's interface in the namespace and comes back from there. `mac` is what the machine will bear.
pub fn tap(netns: &Path, mac: Option<[u8; 6]>) -> io::Result<OwnedFd> {
    let own = File::open("/proc/self/ns/net")?;
    sys::setns(File::open(netns)?.as_fd(), libc::CLONE_NEWNET)?;
    let made = open_tap().and_then(|tap| join(mac).map(|()| tap));
    sys::setns(own.as_fd(), libc::CLONE_NEWNET)?;
    made
}

/// Moves the interface of a machine that runs, which leads nowhere so far, into the namespace and joins it there. Stays there.
pub fn take(from: BorrowedFd<'_>, netns: &Path, mac: [u8; 6]) -> io::Result<()> {
    let to = File::open(netns)?;
    sys::setns(from, libc::CLONE_NEWNET)?;
    link::send_away(TAP, to.as_fd())?;
    sys::setns(to.as_fd(), libc::CLONE_NEWNET)?;
    join(Some(mac))
}

/// Leaves the interface where it is, for this user to open it by its name.
pub fn leave(tap: OwnedFd, user: u32) -> io::Result<()> {
    for (call, argument) in [(TUNSETOWNER, user.into()), (TUNSETPERSIST, 1)] {
        let argument: libc::c_ulong = argument;
        // SAFETY: an open descriptor and integers.
        sys::check(unsafe { libc::ioctl(tap.as_raw_fd(), call as _, argument) }.into())?;
    }
    Ok(())
}

/// An interface that leads nowhere, in the namespace this process is in.
pub fn lone_tap() -> io::Result<OwnedFd> {
    let device = open_tap()?;
    set_up(control()?.as_fd(), TAP)?;
    Ok(device)
}

fn open_tap() -> io::Result<OwnedFd> {
    // It belongs to the namespace that it is opened in.
    let device = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut tap = Request::of(TAP);
    tap.0.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    tap.ask(device.as_raw_fd(), TUNSETIFF)?;
    Ok(device.into())
}

/// A socket that interfaces are asked through.
fn control() -> io::Result<OwnedFd> {
    // SAFETY: integers; the descriptor is new and nobody else's.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        Ok(OwnedFd::from_raw_fd(sys::check(socket.into())? as RawFd))
    }
}

fn set_up(control: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let mut request = Request::of(name);
    request.0.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    request.ask(control.as_raw_fd(), libc::SIOCSIFFLAGS)
}

fn join(mac: Option<[u8; 6]>) -> io::Result<()> {
    let control = control()?;
    let socket = control.as_raw_fd();
    // Of an attempt before this one it may be there.
    let name = sys::c(BRIDGE)?;
    // SAFETY: a C string that lives through the call.
    match sys::check(unsafe { libc::ioctl(socket, SIOCBRADDBR as _, name.as_ptr()) }.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
        _ => {}
    }
    for name in [BRIDGE, INSIDE, TAP] {
        // Nothing of this side speaks for itself.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    }
    if let Some(mac) = mac {
        // The machine bears the address that is expected here; what the bridge takes for its own it does not pass on.
        let mut request = Request::of(INSIDE);
        let [first, rest @ ..] = mac;
        request.0.ifr_ifru.ifru_hwaddr = hardware(first ^ 0x08, rest);
        request.ask(socket, libc::SIOCSIFHWADDR)?;
    }
    let mut address = Request::of(INSIDE);
    address.0.ifr_ifru.ifru_addr = libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: [0; 14] };
    address.ask(socket, libc::SIOCSIFADDR)?;
    for port in [INSIDE, TAP] {
        let mut request = Request::of(BRIDGE);
        // SAFETY: if_nametoindex takes a C string that lives through the call.
        let index = unsafe { libc::if_nametoindex(sys::c(port)?.as_ptr()) };
        request.0.ifr_ifru.ifru_ifindex = libc::c_int::try_from(index).map_err(io::Error::other)?;
        match request.ask(socket, SIOCBRADDIF) {
            Err(error) if error.raw_os_error() != Some(libc::EBUSY) => return Err(error),
            _ => {}
        }
    }
    for name in [TAP, INSIDE, BRIDGE] {
        set_up(control.as_fd(), name)?;
    }
    Ok(())
}

fn hardware(first: u8, rest: [u8; 5]) -> libc::sockaddr {
    let mut data = [0; 14];
    for (place, byte) in data.iter_mut().zip(std::iter::once(first).chain(rest)) {
        *place = byte as c_char;
    }
    libc::sockaddr { sa_family: ETHERNET, sa_data: data }
}

/// A question about an interface.
struct Request(libc::ifreq);

impl Request {
    fn of(name: &str) -> Self {
        // SAFETY: all zeros are a request of no name.
        let mut request: libc::ifreq = unsafe { zeroed() };
        for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
            *place = byte as c_char;
        }
        Self(request)
    }

    fn ask(&mut self, fd: RawFd, number: libc::c_ulong) -> io::Result<()> {
        // SAFETY: the structure is a whole one and lives through the call.
        let asked = sys::check(unsafe { libc::ioctl(fd, number as _, &raw mut self.0) }.into());
        let name = self.0.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| *byte as u8 as char);
        let name: String = name.collect();
        asked.map(drop).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => error,
            _ => io::Error::new(error.kind(), format!("interface {name}, call {number:#x}: {error}")),
        })
    }
}
