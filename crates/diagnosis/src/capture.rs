//! A capture: what passes the interfaces of this process's network namespace, filtered by the kernel, as pcapng.
//!
//! Memory is bounded: the kernel's queue, one buffer and the parts on their way to the reader. What does not fit because the reader
//! is slower than the traffic is dropped by the kernel, counted, and told at the end of the file.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use joey_api::diagnosis::CaptureRequest;
use joey_model::{ErrorKind, Fault};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::Instant;

pub use crate::pcapng::counted;
use crate::pcapng::{self, Counted};
use crate::{filter, pcapng::END};

/// Captures at the same time.
const CAPTURES: usize = 4;
/// Bytes kept of a packet at most; no packet of the kernel is longer.
const LONGEST: u32 = 256 << 10;
/// The kernel's queue, in bytes.
const QUEUE: libc::c_int = 4 << 20;
/// Bytes handed on at once.
const PART: usize = 64 << 10;
/// Bytes handed on in a second: a flood must not take the agent's whole time.
const RATE: usize = 64 << 20;
const SECOND: Duration = Duration::from_secs(1);

static OPEN: AtomicUsize = AtomicUsize::new(0);

/// A place among the captures.
struct Turn;

impl Turn {
    fn take() -> Option<Self> {
        let more = |open: usize| (open < CAPTURES).then_some(open + 1);
        OPEN.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Interface {
    index: i32,
    name: String,
    /// What is sent there is received there: it is seen twice, and taken once.
    loopback: bool,
}

/// A capture that has begun.
pub struct Capture {
    socket: AsyncFd<OwnedFd>,
    interfaces: Vec<Interface>,
    snap_length: u32,
    packets: u64,
    bytes_left: u64,
    seconds: Option<u32>,
    buffer: Vec<u8>,
    _turn: Turn,
}

/// How reading went.
enum Drained {
    /// There is nothing more now.
    Empty,
    /// There may be more.
    Full,
    /// A limit is reached.
    Over,
}

impl Capture {
    /// Begins; what passes from now on is in it.
    pub fn open(request: &CaptureRequest) -> Result<Self, Fault> {
        let invalid = |message: String| Fault::new(ErrorKind::Invalid, "InvalidCapture", message);
        let snap_length = request.snap_length.unwrap_or(LONGEST);
        if !(14..=LONGEST).contains(&snap_length) {
            return Err(invalid(format!("a snap length is from 14 to {LONGEST} bytes")));
        }
        let turn = Turn::take().ok_or_else(|| {
            Fault::new(ErrorKind::Exhausted, "TooManyCaptures", format!("{CAPTURES} captures are running already"))
                .with_hint("end one of them first")
        })?;
        let broken = |error: io::Error| {
            Fault::new(ErrorKind::Internal, "CaptureFailed", format!("packets cannot be captured: {error}"))
        };
        let all = interfaces().map_err(broken)?;
        let wanted = request.interface.as_deref().filter(|name| *name != "any");
        let names: Vec<&str> = all.iter().map(|interface| interface.name.as_str()).collect();
        if let Some(name) = wanted.filter(|name| !names.contains(name)) {
            let fault = Fault::new(ErrorKind::NotFound, "NoSuchInterface", format!("there is no interface \"{name}\""));
            return Err(fault.with_hint(format!("the instance has: {}", names.join(", "))));
        }
        let interfaces: Vec<_> =
            all.into_iter().filter(|interface| wanted.is_none_or(|name| name == interface.name)).collect();
        let index = wanted.and(interfaces.first()).map_or(0, |interface| interface.index);
        let socket = listen(&filter::program(request, snap_length), index).map_err(broken)?;
        // SAFETY: an OwnedFd names the same open descriptor for as long as it lives.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        let socket = socket.map_err(|error| broken(error.into()))?;
        Ok(Self {
            socket,
            interfaces,
            snap_length,
            packets: request.packets.unwrap_or(u64::MAX),
            bytes_left: request.bytes.unwrap_or(u64::MAX).saturating_sub(END as u64),
            seconds: request.seconds,
            buffer: vec![0; snap_length as usize],
            _turn: turn,
        })
    }

    /// Hands packets on until `stop` resolves, a limit is reached or the reader has gone.
    pub async fn run(mut self, stop: impl Future<Output = ()>, to: mpsc::Sender<io::Result<Bytes>>) {
        let seconds = self.seconds;
        let over = async {
            match seconds {
                Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds.into())).await,
                None => std::future::pending().await,
            }
        };
        let (mut stop, mut over) = (std::pin::pin!(stop), std::pin::pin!(over));
        let mut out = Vec::new();
        let names: Vec<&str> = self.interfaces.iter().map(|interface| interface.name.as_str()).collect();
        pcapng::begin(&mut out, &names, self.snap_length);
        self.bytes_left = self.bytes_left.saturating_sub(out.len() as u64);
        let (mut window, mut handed, mut captured) = (Instant::now(), 0, 0);
        loop {
            if !out.is_empty() {
                handed += out.len();
                if to.send(Ok(std::mem::take(&mut out).into())).await.is_err() {
                    return;
                }
            }
            if window.elapsed() >= SECOND {
                (window, handed) = (Instant::now(), 0);
            }
            tokio::select! {
                () = &mut stop => break,
                () = &mut over => break,
                () = to.closed() => return,
                () = tokio::time::sleep_until(window + SECOND), if handed >= RATE => {}
                ready = self.socket.readable(), if handed < RATE => {
                    let Ok(mut ready) = ready else { break };
                    let socket = self.socket.get_ref().as_raw_fd();
                    let reading = Reading {
                        interfaces: &self.interfaces,
                        buffer: &mut self.buffer,
                        captured: &mut captured,
                        most: self.packets,
                        bytes_left: &mut self.bytes_left,
                    };
                    match reading.drain(socket, &mut out) {
                        Drained::Empty => ready.clear_ready(),
                        Drained::Full => {}
                        Drained::Over => break,
                    }
                }
            }
        }
        let counted = Counted { captured, ..statistics(self.socket.get_ref().as_raw_fd()) };
        pcapng::end(&mut out, SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(), counted);
        let _ = to.send(Ok(out.into())).await;
    }
}

/// The parts of a capture that reading changes.
struct Reading<'a> {
    interfaces: &'a [Interface],
    buffer: &'a mut [u8],
    captured: &'a mut u64,
    most: u64,
    bytes_left: &'a mut u64,
}

impl Reading<'_> {
    fn drain(self, socket: RawFd, out: &mut Vec<u8>) -> Drained {
        while out.len() < PART {
            if *self.captured >= self.most {
                return Drained::Over;
            }
            let frame = match receive(socket, self.buffer) {
                Ok(frame) => frame,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // An interface went down: what comes later is taken again.
                Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => continue,
                Err(_) => return Drained::Empty,
            };
            let Some(at) = self.interfaces.iter().position(|interface| interface.index == frame.interface) else {
                continue;
            };
            if self.interfaces[at].loopback && frame.outgoing {
                continue;
            }
            let before = out.len();
            pcapng::packet(out, at as u32, frame.at, &self.buffer[..frame.length], frame.whole);
            match self.bytes_left.checked_sub((out.len() - before) as u64) {
                Some(left) => *self.bytes_left = left,
                None => {
                    out.truncate(before);
                    return Drained::Over;
                }
            }
            *self.captured += 1;
        }
        Drained::Full
    }
}

/// The interfaces of this network namespace whose frames are Ethernet's.
fn interfaces() -> io::Result<Vec<Interface>> {
    // SAFETY: the list that if_nameindex gives ends with an index of 0, its names are C strings, and it is freed once, after its
    // last use. The request is zeroed, has room for every name (IF_NAMESIZE), and lives through the call.
    unsafe {
        let socket = checked(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0))?;
        let socket = OwnedFd::from_raw_fd(socket);
        let list = libc::if_nameindex();
        if list.is_null() {
            return Err(io::Error::last_os_error());
        }
        let (mut found, mut entry) = (Vec::new(), list);
        while (*entry).if_index != 0 {
            let name = CStr::from_ptr((*entry).if_name);
            let mut request: libc::ifreq = std::mem::zeroed();
            for (to, from) in request.ifr_name.iter_mut().zip(name.to_bytes()) {
                *to = *from as libc::c_char;
            }
            if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &mut request) == 0 {
                let kind = request.ifr_ifru.ifru_hwaddr.sa_family;
                if matches!(kind, libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK) {
                    let loopback = kind == libc::ARPHRD_LOOPBACK;
                    let index = (*entry).if_index as i32;
                    found.push(Interface { index, name: name.to_string_lossy().into_owned(), loopback });
                }
            }
            entry = entry.add(1);
        }
        libc::if_freenameindex(list);
        Ok(found)
    }
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A socket that gets what passes the filter on the interface of that index, or on all of them (0).
fn listen(program: &[libc::sock_filter], interface: i32) -> io::Result<OwnedFd> {
    // SAFETY: integers, and structures that live through their calls; the kernel copies the program. Without a protocol the
    // socket gets nothing before it is bound, so nothing gets past the filter.
    unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let socket = OwnedFd::from_raw_fd(checked(libc::socket(libc::AF_PACKET, kind, 0))?);
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
        set(&socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)?;
        set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &QUEUE)?;
        set(&socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &1i32)?;
        set(&socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, &1i32)?;
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = interface;
        let length = std::mem::size_of_val(&address) as libc::socklen_t;
        checked(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length))?;
        Ok(socket)
    }
}

fn set<T>(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    let length = std::mem::size_of::<T>() as libc::socklen_t;
    // SAFETY: the value lives through the call, with its length told; the caller gives the type that the option has.
    checked(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const *value).cast(), length) }).map(drop)
}

struct Frame {
    interface: i32,
    outgoing: bool,
    at: Duration,
    /// Bytes in the buffer, and on the wire.
    length: usize,
    whole: u32,
}

/// linux/if_packet.h, `struct tpacket_auxdata`; only the length on the wire is of interest.
#[repr(C)]
struct Beside {
    status: u32,
    whole: u32,
    rest: [u32; 3],
}

fn receive(socket: RawFd, buffer: &mut [u8]) -> io::Result<Frame> {
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut control = [0u64; 16];
    // SAFETY: buffer, address and control live through the call with their lengths told; the control messages are walked as the
    // kernel laid them out, each value read where it need not be aligned.
    unsafe {
        let mut from: libc::sockaddr_ll = std::mem::zeroed();
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = std::mem::size_of_val(&from) as libc::socklen_t;
        message.msg_iov = &mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = std::mem::size_of_val(&control) as _;
        let count = libc::recvmsg(socket, &mut message, 0);
        let length = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        let (interface, outgoing) = (from.sll_ifindex, from.sll_pkttype == libc::PACKET_OUTGOING);
        let mut frame = Frame { interface, outgoing, at: Duration::ZERO, length, whole: length as u32 };
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while !header.is_null() {
            let data = libc::CMSG_DATA(header);
            match ((*header).cmsg_level, (*header).cmsg_type) {
                (libc::SOL_PACKET, libc::PACKET_AUXDATA) => frame.whole = data.cast::<Beside>().read_unaligned().whole,
                (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => {
                    let time = data.cast::<libc::timespec>().read_unaligned();
                    frame.at = Duration::new(time.tv_sec as u64, time.tv_nsec as u32);
                }
                _ => {}
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
        Ok(frame)
    }
}

/// What the kernel counted since the beginning.
fn statistics(socket: RawFd) -> Counted {
    // linux/if_packet.h, `struct tpacket_stats`.
    let mut counts = [0u32; 2];
    let mut length = std::mem::size_of_val(&counts) as libc::socklen_t;
    // SAFETY: the two words live through the call, with their length told.
    let done = unsafe {
        let place = counts.as_mut_ptr().cast();
        libc::getsockopt(socket, libc::SOL_PACKET, libc::PACKET_STATISTICS, place, &mut length)
    };
    let [received, lost] = if done == 0 { counts.map(u64::from) } else { [0, 0] };
    Counted { received, lost, captured: 0 }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    async fn captured(query: &str, send: impl Fn()) -> Result<Vec<u8>, Fault> {
        let capture = Capture::open(&joey_rpc::parse_query(query).unwrap())?;
        let (to, mut from) = mpsc::channel::<io::Result<Bytes>>(8);
        send();
        let reading = tokio::spawn(async move {
            let mut file = Vec::new();
            while let Some(part) = from.recv().await {
                file.extend_from_slice(&part.unwrap());
            }
            file
        });
        tokio::time::timeout(Duration::from_secs(20), capture.run(std::future::pending(), to)).await.unwrap();
        Ok(reading.await.unwrap())
    }

    #[tokio::test]
    async fn real_packets_on_loopback() {
        let (one, other) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let port = other.local_addr().unwrap().port();
        let send = || {
            for number in 0..10u8 {
                one.send_to(&[number; 1000], ("127.0.0.1", port)).unwrap();
            }
        };
        let query = format!("interface=lo&protocol=udp&destPort={port}&packets=7&snapLength=60");
        let file = match captured(&query, send).await {
            Err(fault) if fault.message.contains("not permitted") => return eprintln!("SKIPPED: needs root"),
            other => other.unwrap(),
        };
        assert_eq!(counted(&file), Some((7, 0)));
        // A packet's block: what it is, its length, interface, time, then both lengths.
        let blocks = file.windows(4).filter(|word| *word == 1042u32.to_le_bytes()).count();
        assert_eq!(blocks, 7, "1,000 bytes with their headers were on the wire");
        assert!(file.len() < 7 * 120 + 200, "{}", file.len());

        let short = captured(&format!("interface=lo&destPort={port}&bytes=3000"), send).await.unwrap();
        assert!((2000..=3000).contains(&short.len()), "{}", short.len());
        let none = captured(&format!("interface=lo&protocol=tcp&port={port}&seconds=1"), send).await.unwrap();
        assert_eq!(counted(&none), Some((0, 0)));
    }

    #[tokio::test]
    async fn what_cannot_be_captured_is_said() {
        let refused = |query: &str| Capture::open(&joey_rpc::parse_query(query).unwrap()).err().unwrap();
        let fault = refused("interface=eth99");
        assert_eq!(fault.message, "there is no interface \"eth99\"");
        assert!(fault.hint.is_some_and(|hint| hint.contains("lo")));
        assert!(refused("snapLength=0").message.contains("snap length"));
    }
}
