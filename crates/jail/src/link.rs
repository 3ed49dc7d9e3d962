//! The one thing that is asked of the kernel over rtnetlink(7): that an interface moves into another network namespace.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use joey_kernel::sys;

/// linux/rtnetlink.h and linux/if_link.h
const RTM_SETLINK: u16 = 19;
const IFLA_NET_NS_FD: u16 = 28;

/// The message: struct nlmsghdr, struct ifinfomsg, and one struct rtattr with its value.
#[repr(C)]
struct SetLink {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
    family: u8,
    padding: u8,
    device: u16,
    index: i32,
    device_flags: u32,
    change: u32,
    attribute_length: u16,
    attribute: u16,
    namespace: i32,
}

/// The answer: struct nlmsghdr and struct nlmsgerr, of which the rest is the question again.
#[repr(C)]
#[derive(Default)]
struct Answer {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
    error: i32,
    question: [u32; 16],
}

/// Moves an interface of this namespace into that one.
pub fn send_away(name: &str, namespace: BorrowedFd<'_>) -> io::Result<()> {
    let name = sys::c(name)?;
    // SAFETY: a C string that lives through the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    let message = SetLink {
        length: size_of::<SetLink>() as u32,
        kind: RTM_SETLINK,
        flags: (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16,
        sequence: 1,
        port: 0,
        family: libc::AF_UNSPEC as u8,
        padding: 0,
        device: 0,
        index: i32::try_from(index).map_err(io::Error::other)?,
        device_flags: 0,
        change: 0,
        attribute_length: 8,
        attribute: IFLA_NET_NS_FD,
        namespace: namespace.as_raw_fd(),
    };
    // SAFETY: integers; the descriptor is new and nobody else's.
    let socket = unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let socket = libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE);
        OwnedFd::from_raw_fd(sys::check(socket.into())? as RawFd)
    };
    let mut answer = Answer::default();
    // SAFETY: both structures are plain integers without gaps, live through the calls, and are as long as is said. The kernel is the
    // other end, and answers before the first call returns.
    let (asked, answered) = unsafe {
        let asked = libc::send(socket.as_raw_fd(), (&raw const message).cast(), size_of::<SetLink>(), 0);
        let answered = libc::recv(
            socket.as_raw_fd(),
            (&raw mut answer).cast(),
            size_of::<Answer>(),
            libc::MSG_DONTWAIT | libc::MSG_TRUNC,
        );
        (asked, answered)
    };
    sys::check(asked as libc::c_long)?;
    sys::check(answered as libc::c_long)?;
    match (i32::from(answer.kind), answer.error) {
        (libc::NLMSG_ERROR, 0) => Ok(()),
        (libc::NLMSG_ERROR, error) => Err(io::Error::from_raw_os_error(-error)),
        _ => Err(io::Error::other("the kernel does not answer")),
    }
}
