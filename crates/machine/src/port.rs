//! The machine's port to its host as a stream of bytes that never ends: while nobody is at the other end it is quiet.
//!
//! A port without a host is "hung up" for poll(2), which the runtime takes for an end that lasts. So the port is watched by an epoll of
//! its own, and the runtime watches that one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use joey_api::guest::PORT;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use joey_kernel::sys;

const PORTS: &str = "/sys/class/virtio-ports";

/// One end of the port: the kernel lets it be opened once. Who reads and who writes are one task.
#[derive(Clone)]
pub struct Port(Arc<Inner>);

struct Inner {
    file: File,
    /// Readable when something happened to the port.
    happened: AsyncFd<OwnedFd>,
}

impl Port {
    /// Opens the port by its name; `None`: the machine has none.
    pub fn open() -> io::Result<Option<Self>> {
        let ports = match fs::read_dir(PORTS) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            ports => ports?,
        };
        for entry in ports {
            let entry = entry?;
            if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT) {
                let place = Path::new("/dev").join(entry.file_name());
                let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(place)?;
                let watch = watch(&file)?;
                // SAFETY: an OwnedFd names the same open descriptor for as long as it lives.
                let happened = unsafe { AsyncFd::register_with_interest(watch, Interest::READABLE) };
                return Ok(Some(Self(Arc::new(Inner { file, happened: happened.map_err(io::Error::from)? }))));
            }
        }
        Ok(None)
    }

    /// What is read, and what is written.
    pub fn split(self) -> (Self, Self) {
        (self.clone(), self)
    }

    /// Does it now, or when something happened to the port. `None`: not yet.
    fn poll<T>(
        &self,
        cx: &mut Context<'_>,
        mut act: impl FnMut(&File) -> Option<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        loop {
            if let Some(done) = act(&self.0.file) {
                return Poll::Ready(done);
            }
            let mut ready = ready!(self.0.happened.poll_read_ready(cx))?;
            if !self.take() {
                ready.clear_ready();
            }
        }
    }

    /// Takes notice of what happened since it was asked last.
    fn take(&self) -> bool {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: an open descriptor and room for the one event that is asked for.
        unsafe { libc::epoll_wait(self.0.happened.get_ref().as_raw_fd(), &raw mut event, 1, 0) > 0 }
    }
}

/// An epoll that tells each change of the port once.
fn watch(port: &File) -> io::Result<OwnedFd> {
    // SAFETY: integers; the descriptor is new and nobody else's. The event lives through the call.
    unsafe {
        let watch = OwnedFd::from_raw_fd(sys::check(libc::epoll_create1(libc::EPOLL_CLOEXEC).into())? as i32);
        let events = (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLHUP | libc::EPOLLET) as u32;
        let mut event = libc::epoll_event { events, u64: 0 };
        let done = libc::epoll_ctl(watch.as_raw_fd(), libc::EPOLL_CTL_ADD, port.as_raw_fd(), &raw mut event);
        sys::check(done.into()).map(|_| watch)
    }
}

/// What a call gives that does not wait.
fn now<T>(done: io::Result<T>) -> Option<io::Result<T>> {
    match done {
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => None,
        done => Some(done),
    }
}

impl AsyncRead for Port {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let count = ready!(self.poll(cx, |mut port| match port.read(buffer.initialize_unfilled()) {
            // Nobody is at the other end.
            Ok(0) => None,
            read => now(read),
        }))?;
        buffer.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(cx, |mut port| now(port.write(bytes)))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
