//! The machine's socket to its host (vsock(7)), where the machine has no port: each connection of the host's is a stream of bytes.
//!
//! Nobody else is listened to: what runs in the machine could connect too.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use joey_api::guest::VSOCK_PORT;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use joey_kernel::sys;

/// Connections that wait.
const BACKLOG: libc::c_int = 16;
const KIND: libc::c_int = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;

/// Where the host connects.
pub struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Listens at [`VSOCK_PORT`].
    pub fn open() -> io::Result<Self> {
        // SAFETY: integers; the descriptor is new and nobody else's.
        let socket = unsafe {
            let fd = sys::check(libc::socket(libc::AF_VSOCK, KIND, 0).into())?;
            OwnedFd::from_raw_fd(fd as RawFd)
        };
        let address = address(libc::VMADDR_CID_ANY, VSOCK_PORT);
        let length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address has the kernel's layout and lives through the call.
        unsafe {
            sys::check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length).into())?;
            sys::check(libc::listen(socket.as_raw_fd(), BACKLOG).into())?;
        }
        register(socket).map(Self)
    }

    /// The next connection of the host's.
    pub async fn accept(&self) -> io::Result<Stream> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|socket| accept(socket.get_ref())) {
                Ok(Ok((socket, libc::VMADDR_CID_HOST))) => return register(socket).map(Stream),
                // Somebody in the machine, who is hung up on; or who is gone again.
                Ok(Ok(_)) => {}
                Ok(Err(error)) if is_theirs(&error) => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => {}
            }
        }
    }
}

fn is_theirs(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::ECONNRESET | libc::EINTR))
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeros are an address of nothing.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

/// Takes a connection; the number of who made it.
fn accept(listener: &OwnedFd) -> io::Result<(OwnedFd, u32)> {
    let mut peer = address(0, 0);
    let mut length = size_of_val(&peer) as libc::socklen_t;
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the address and its length live through the call; the descriptor is new and nobody else's.
    let socket = unsafe {
        let fd = libc::accept4(listener.as_raw_fd(), (&raw mut peer).cast(), &raw mut length, flags);
        OwnedFd::from_raw_fd(sys::check(fd.into())? as RawFd)
    };
    Ok((socket, peer.svm_cid))
}

fn register(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor for as long as it lives.
    unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)
}

/// A connection.
pub struct Stream(AsyncFd<OwnedFd>);

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            let room = buffer.initialize_unfilled();
            let read = ready.try_io(|socket| {
                // SAFETY: an open descriptor, and room for as many bytes as are asked for.
                let count = unsafe { libc::recv(socket.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), 0) };
                sys::check(count as libc::c_long)
            });
            if let Ok(read) = read {
                return Poll::Ready(read.map(|count| buffer.advance(count as usize)));
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(cx))?;
            let written = ready.try_io(|socket| {
                let flags = libc::MSG_NOSIGNAL;
                // SAFETY: an open descriptor, and as many bytes as are passed.
                let count = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
                sys::check(count as libc::c_long)
            });
            if let Ok(written) = written {
                return Poll::Ready(written.map(|count| count as usize));
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // SAFETY: an open descriptor and an integer.
        let done = unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_WR) };
        match sys::check(done.into()) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => Poll::Ready(Ok(())),
            done => Poll::Ready(done.map(drop)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_stream_carries_more_than_a_socket_holds() {
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_nonblocking(true).unwrap();
        let mut near = Stream(register(near.into()).unwrap());
        let mut far = Stream(register(far.into()).unwrap());
        let bytes: Vec<u8> = (0..2_000_000u32).map(|number| (number / 7) as u8).collect();
        let sent = bytes.clone();
        let sending = tokio::spawn(async move {
            near.write_all(&sent).await?;
            near.shutdown().await
        });
        let mut heard = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(20), far.read_to_end(&mut heard)).await;
        read.expect("an end").unwrap();
        sending.await.unwrap().unwrap();
        assert!(heard == bytes);
    }
}
