//! Pipes and terminals as asynchronous byte streams.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// A pipe's end or a terminal's master side.
pub struct Pipe(AsyncFd<File>);

impl Pipe {
    pub fn reader(fd: OwnedFd) -> io::Result<Self> {
        Self::new(fd, Interest::READABLE)
    }

    pub fn writer(fd: OwnedFd) -> io::Result<Self> {
        Self::new(fd, Interest::WRITABLE)
    }

    fn new(fd: OwnedFd, interest: Interest) -> io::Result<Self> {
        sys::set_nonblocking(fd.as_fd())?;
        // SAFETY: a File names the same open descriptor for as long as it lives.
        let fd = unsafe { AsyncFd::register_with_interest(File::from(fd), interest) }.map_err(io::Error::from)?;
        Ok(Self(fd))
    }

    /// Bytes as they come; 0 is the end. A terminal whose other side is closed has ended too.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.async_io(Interest::READABLE, |mut file| file.read(buffer)).await {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(0),
            done => done,
        }
    }

    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = self.0.async_io(Interest::WRITABLE, |mut file| file.write(bytes)).await?;
            bytes = &bytes[count..];
        }
        Ok(())
    }
}
