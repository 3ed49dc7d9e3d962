//! What a container's processes write, on its way into the container's log and to those who attached.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use joey_collect::Log;
use tokio::sync::watch;

use crate::launch::Streams;
use crate::life::Life;
use crate::log_write::LineSplitter;
use crate::stream::Pipe;
use crate::supervisor::lock;

/// The log that is shown: that of the run which began last, also while the next one is only being made.
pub struct RunLog {
    pub run: u32,
    /// While the run goes on; not there when it could not be opened.
    writer: Option<Arc<Mutex<Log>>>,
    /// 0: the run has not begun. Changes with every write, and is [`LOG_ENDED`] from the run's end on.
    pub grown: watch::Sender<u64>,
}

/// Nothing more is written into a log.
pub const LOG_ENDED: u64 = u64::MAX;

impl RunLog {
    pub fn of(run: u32) -> Self {
        Self { run, writer: None, grown: watch::Sender::new(0) }
    }

    /// From now on the log of `run` is shown; those who wait for its beginning see it.
    pub fn begin(&mut self, run: u32, writer: Option<Log>) {
        if self.run != run {
            *self = Self::of(run);
        }
        self.writer = writer.map(Mutex::new).map(Arc::new);
        self.grown.send_replace(1);
    }

    /// Where what the run writes goes.
    pub fn writer(&self) -> Option<Arc<Mutex<Log>>> {
        self.writer.clone()
    }

    pub fn written(&self) {
        // What has ended stays so.
        self.grown.send_modify(|count| *count = count.saturating_add(1));
    }

    /// A run that had begun with a hook goes no further now.
    pub fn pause(&mut self) {
        if self.writer.is_some() {
            self.end();
        }
    }

    pub fn end(&mut self) {
        self.writer = None;
        self.grown.send_replace(LOG_ENDED);
    }

    pub fn has_ended(&self) -> bool {
        *self.grown.borrow() == LOG_ENDED
    }
}

/// Where the streams of a process lead.
pub struct Sink {
    pub life: Arc<Life>,
    /// `None`: it could not be opened.
    pub log: Option<Arc<Mutex<Log>>>,
    /// What each line begins with: who attached to the container is not shown such lines.
    pub mark: &'static str,
}

impl Sink {
    /// Carries both streams to their ends, at the pace of the log. Where there is none they are read all the same: who writes into a pipe
    /// that nobody reads is ended by it.
    pub async fn carry(self, streams: Streams) {
        let both = tokio::join!(self.one(streams.stdout, 1, "stdout"), self.one(streams.stderr, 2, "stderr"));
        for error in [both.0.err(), both.1.err()].into_iter().flatten() {
            eprintln!("cannot read the output of {}: {error}", self.life.container().name);
        }
    }

    async fn one(&self, fd: Option<OwnedFd>, channel: u8, name: &str) -> io::Result<()> {
        let Some(fd) = fd else { return Ok(()) };
        let (pipe, log) = (Pipe::reader(fd)?, self.log.as_deref());
        let (mut splitter, mut buffer) = (LineSplitter::marked(self.mark), vec![0; 8 << 10]);
        loop {
            let count = pipe.read(&mut buffer).await?;
            if count == 0 {
                let done = log.map_or(Ok(()), |log| splitter.finish(&mut lock(log), name));
                lock(&self.life.log).written();
                return done;
            }
            // A full disk must not end the container: what cannot be written is lost, and said.
            let written = log.map_or(Ok(()), |log| splitter.push(&mut lock(log), name, &buffer[..count]));
            if let Err(error) = written {
                eprintln!("cannot write the log of {}: {error}", self.life.container().name);
            }
            lock(&self.life.log).written();
            if self.mark.is_empty() && self.life.output.receiver_count() > 0 {
                let _ = self.life.output.send((channel, Bytes::copy_from_slice(&buffer[..count])));
            }
        }
    }
}
