//! The QEMU Machine Protocol (QMP 2.12 and later): JSON objects, a line each, on a unix socket. A monitor has one client at a time.
//!
//! A monitor that was taken over says what it likes: lines are bounded, and what is no answer is skipped.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Bytes of the longest line that is read.
const LONGEST: usize = 1 << 20;
/// Lines that are no answer, between a question and its answer.
const MOST: usize = 10_000;

/// A client.
pub(crate) struct Qmp {
    stream: UnixStream,
    /// What is said before anything else.
    unsaid: Vec<u8>,
    /// What came after the line that was read last.
    rest: Vec<u8>,
    asked: u64,
}

impl Qmp {
    /// Connects. That the monitor greets, and that it is to take commands, is not waited for: what is asked first goes with it.
    pub(crate) async fn connect(path: &Path) -> io::Result<Self> {
        let stream = joey_rpc::connect_unix(path).await?;
        let mut qmp = Self { stream, unsaid: Vec::new(), rest: Vec::new(), asked: 0 };
        qmp.unsaid = qmp.line_of("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Has the monitor execute these, one after the other and not waited for in between; the last one's answer. What it refuses is an
    /// error in its words. A descriptor goes with the first line, and is there until the next one comes.
    pub(crate) async fn ask(
        &mut self,
        orders: Vec<(&str, Value)>,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<Value> {
        let mut text = std::mem::take(&mut self.unsaid);
        let first = self.asked + 1;
        let mut names = Vec::new();
        for (command, arguments) in orders {
            text.extend(self.line_of(command, arguments)?);
            names.push(command);
        }
        self.write(&text, descriptor).await?;
        let mut answer = Value::Null;
        for (id, command) in (first..).zip(names) {
            answer = self.answer(id, command).await?;
        }
        Ok(answer)
    }

    /// A command as it is sent, with the next number.
    fn line_of(&mut self, command: &str, arguments: Value) -> io::Result<Vec<u8>> {
        self.asked += 1;
        let mut order = json!({ "execute": command, "id": self.asked });
        // QEMU reads byte by byte, with several system calls for each.
        if arguments != json!({}) {
            order["arguments"] = arguments;
        }
        let mut text = serde_json::to_vec(&order)?;
        text.push(b'\n');
        Ok(text)
    }

    async fn answer(&mut self, id: u64, command: &str) -> io::Result<Value> {
        for _ in 0..MOST {
            let mut line = self.line().await?;
            if line.get("id").and_then(Value::as_u64) != Some(id) {
                continue;
            }
            return match line.get_mut("return") {
                Some(answer) => Ok(answer.take()),
                None => {
                    let words = line.pointer("/error/desc").and_then(Value::as_str).unwrap_or("it does not say why");
                    Err(io::Error::other(format!("{command}: {words}")))
                }
            };
        }
        Err(io::Error::other(format!("{command}: the monitor does not come to an answer")))
    }

    async fn write(&mut self, mut bytes: &[u8], mut descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.writable().await?;
            let sent = self.stream.try_io(Interest::WRITABLE, || {
                let raw = descriptor.map(|fd| [fd.as_raw_fd()]);
                let control: Vec<ControlMessage<'_>> = raw.iter().map(|fds| ControlMessage::ScmRights(fds)).collect();
                let parts = [io::IoSlice::new(bytes)];
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                Ok(sendmsg::<()>(self.stream.as_raw_fd(), &parts, &control, flags, None)?)
            });
            match sent {
                Ok(count) => {
                    bytes = &bytes[count..];
                    descriptor = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn line(&mut self) -> io::Result<Value> {
        let mut seen = 0;
        loop {
            if let Some(at) = self.rest[seen..].iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=seen + at).collect();
                return Ok(serde_json::from_slice(&line)?);
            }
            seen = self.rest.len();
            if seen > LONGEST {
                return Err(io::Error::other("the monitor's line does not end"));
            }
            self.stream.readable().await?;
            match self.stream.try_read_buf(&mut self.rest) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}
