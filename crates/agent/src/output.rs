//! What a container's processes write, on its way into the container's log and to those who attached.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use crate::launch::Streams;
use crate::life::Life;
use crate::log_write::{LineSplitter, LogWriter};
use crate::stream::Pipe;
use crate::supervisor::lock;

/// Where the streams of a process lead.
pub struct Sink {
    pub life: Arc<Life>,
    /// `None`: it could not be opened.
    pub log: Option<Arc<Mutex<LogWriter>>>,
    /// What each line begins with: who attached to the container is not shown such lines.
    pub mark: &'static str,
}

impl Sink {
    /// Carries both streams to their ends, at the pace of the log.
    pub async fn carry(self, streams: Streams) {
        let Some(log) = &self.log else { return };
        let both = tokio::join!(self.one(log, streams.stdout, 1, "stdout"), self.one(log, streams.stderr, 2, "stderr"));
        for error in [both.0.err(), both.1.err()].into_iter().flatten() {
            eprintln!("cannot read the output of {}: {error}", self.life.container().name);
        }
    }

    async fn one(&self, log: &Mutex<LogWriter>, fd: Option<OwnedFd>, channel: u8, name: &str) -> io::Result<()> {
        let Some(fd) = fd else { return Ok(()) };
        let pipe = Pipe::reader(fd)?;
        let (mut splitter, mut buffer) = (LineSplitter::marked(self.mark), vec![0; 8 << 10]);
        loop {
            let count = pipe.read(&mut buffer).await?;
            if count == 0 {
                let done = splitter.finish(&mut lock(log), name);
                lock(&self.life.log).written();
                return done;
            }
            // A full disk must not end the container: what cannot be written is lost, and said.
            if let Err(error) = splitter.push(&mut lock(log), name, &buffer[..count]) {
                eprintln!("cannot write the log of {}: {error}", self.life.container().name);
            }
            lock(&self.life.log).written();
            if self.mark.is_empty() && self.life.output.receiver_count() > 0 {
                let _ = self.life.output.send((channel, Bytes::copy_from_slice(&buffer[..count])));
            }
        }
    }
}
