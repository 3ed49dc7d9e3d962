//! Port forwarding: connections into a Pod over one upgraded connection.
//!
//! ```text
//! kubectl ══ SPDY/3.1 ═══════════════════════════════╗
//! kubectl ══ WebSocket, SPDY inside (1.31 and newer) ╬══ two streams a connection: data, error ──► Provider::forward
//! others  ══ WebSocket, v4.channel.k8s.io ═══════════╝══ two channels a port
//! ```
//! The protocol is that of Kubernetes' `portforward.k8s.io`: streams belong together by their header `requestid`; what goes
//! wrong is a text on the error stream, which ends when the connection has ended.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use joey_model::Fault;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio_tungstenite::tungstenite::Message;

use super::frames;
use super::websocket::{Socket, normal_closure};
use crate::provider::Provider;
use crate::spdy::{Codec, Frame, Malformed, data, pong};

/// WebSocket with SPDY inside, as kubectl speaks it since 1.31.
pub(super) const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
/// A channel of data and one of errors for each port, known beforehand.
pub(super) const CHANNELS: &str = "v4.channel.k8s.io";
/// The protocol over SPDY.
pub(super) const PROTOCOL: &str = "portforward.k8s.io";

/// Streams open at once; more are the end of the connection.
const STREAMS: usize = 2048;
/// Parts of a connection's input that wait for the Pod to read them.
const QUEUE: usize = 64;
/// The largest data frame that is written.
const PART: usize = 32 << 10;

/// What is forwarded to.
#[derive(Clone)]
pub(super) struct Target {
    pub provider: Arc<dyn Provider>,
    /// The instance.
    pub id: String,
    /// The Pod, for messages.
    pub pod: String,
}

impl Target {
    fn words(&self, port: u16, fault: &Fault) -> String {
        format!("error forwarding port {port} to pod {}: {}", self.pod, fault.message)
    }
}

/// Carries connections over SPDY until the client goes away.
pub(super) async fn spdy<S: AsyncRead + AsyncWrite + Send + 'static>(socket: S, target: Target) {
    let (reader, mut writer) = tokio::io::split(socket);
    let (out, mut written) = mpsc::channel::<Vec<u8>>(16);
    let writing = async {
        while let Some(bytes) = written.recv().await {
            writer.write_all(&bytes).await?;
            writer.flush().await?;
        }
        Ok::<_, io::Error>(())
    };
    let reading = async {
        let codec = Codec::new().map_err(wrong)?;
        let (ended, ends) = mpsc::unbounded_channel();
        let session = Session {
            target,
            codec,
            out,
            ended,
            streams: HashMap::new(),
            open: HashMap::new(),
            running: JoinSet::new(),
        };
        session.read(reader, ends).await
    };
    let outcome = tokio::select! {
        outcome = reading => outcome,
        outcome = writing => outcome,
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "port forwarding over spdy ended early");
    }
}

fn wrong(error: Malformed) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Half of a pair, or both: the streams of one connection.
#[derive(Default)]
struct Pair {
    error: Option<u32>,
    data: Option<(u32, mpsc::Receiver<Bytes>)>,
}

/// What a stream is.
enum Part {
    Error,
    Data {
        /// `None`: the client has ended its side.
        input: Option<mpsc::Sender<Bytes>>,
        /// Once it is connected: the work, and the error stream beside.
        work: Option<(AbortHandle, u32)>,
    },
}

struct Session {
    target: Target,
    codec: Codec,
    out: mpsc::Sender<Vec<u8>>,
    /// Data and error streams of connections that ended.
    ended: mpsc::UnboundedSender<(u32, u32)>,
    streams: HashMap<u32, Part>,
    /// By request id, until both streams are there.
    open: HashMap<String, Pair>,
    running: JoinSet<()>,
}

impl Session {
    async fn read(
        mut self,
        mut reader: impl AsyncRead + Unpin,
        mut ends: mpsc::UnboundedReceiver<(u32, u32)>,
    ) -> io::Result<()> {
        let mut buffer = vec![0; 16 << 10];
        loop {
            while let Some(frame) = self.codec.next_frame().map_err(wrong)? {
                if matches!(frame, Frame::GoAway) {
                    return Ok(());
                }
                self.take(frame).await?;
            }
            tokio::select! {
                read = reader.read(&mut buffer) => match read? {
                    0 => return Ok(()),
                    count => self.codec.push(&buffer[..count]),
                },
                Some((data, error)) = ends.recv() => {
                    self.streams.remove(&data);
                    self.streams.remove(&error);
                }
                Some(_) = self.running.join_next() => {}
            }
        }
    }

    async fn write(&self, bytes: Vec<u8>) -> io::Result<()> {
        self.out.send(bytes).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    async fn take(&mut self, frame: Frame) -> io::Result<()> {
        match frame {
            Frame::Open { stream, headers, last } => self.open(stream, &headers, last).await,
            Frame::Data { stream, bytes, last } => {
                if let Some(Part::Data { input, .. }) = self.streams.get_mut(&stream) {
                    if let Some(to) = input.as_ref().filter(|_| !bytes.is_empty()) {
                        // A connection that nobody reads at its other end takes nothing more: its end is told by its work.
                        let _ = to.send(bytes.into()).await;
                    }
                    if last {
                        *input = None;
                    }
                }
                Ok(())
            }
            Frame::Reset { stream } => match self.streams.remove(&stream) {
                Some(Part::Data { work: Some((work, error)), .. }) => {
                    work.abort();
                    self.streams.remove(&error);
                    // Whoever resets the data still waits for the end of the errors.
                    self.write(data(error, &[], true)).await
                }
                _ => Ok(()),
            },
            Frame::Ping { id } => self.write(pong(id)).await,
            Frame::GoAway | Frame::Other => Ok(()),
        }
    }

    async fn open(&mut self, stream: u32, headers: &[(String, String)], last: bool) -> io::Result<()> {
        let header = |name: &str| {
            let found = headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.as_str()).unwrap_or_default()
        };
        let refused = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidData, why.to_owned()));
        if self.streams.len() >= STREAMS {
            return refused("too many streams are open");
        }
        let Some(port) = header("port").parse::<u16>().ok().filter(|port| *port != 0) else {
            return refused("a stream names no port");
        };
        // Clients before Kubernetes 1.1 send no id and open the two streams one after the other.
        let request = match header("requestid") {
            "" if header("streamtype") == "error" => stream.to_string(),
            "" => stream.saturating_sub(2).to_string(),
            id => id.to_owned(),
        };
        let pair = self.open.entry(request.clone()).or_default();
        match header("streamtype") {
            "error" if pair.error.is_none() => {
                pair.error = Some(stream);
                self.streams.insert(stream, Part::Error);
            }
            "data" if pair.data.is_none() => {
                let (input, queue) = mpsc::channel(QUEUE);
                pair.data = Some((stream, queue));
                let input = Some(input).filter(|_| !last);
                self.streams.insert(stream, Part::Data { input, work: None });
            }
            _ => return refused("a stream of an unknown type was opened"),
        }
        let reply = self.codec.accept(stream).map_err(wrong)?;
        self.write(reply).await?;
        if let Some(Pair { error: Some(error), data: Some(_) }) = self.open.get(&request)
            && let error = *error
            && let Some(Pair { data: Some((data, queue)), .. }) = self.open.remove(&request)
        {
            self.connect(port, (data, error), queue);
        }
        Ok(())
    }

    fn connect(&mut self, port: u16, (data_stream, error): (u32, u32), queue: mpsc::Receiver<Bytes>) {
        let (target, out, ended) = (self.target.clone(), self.out.clone(), self.ended.clone());
        let work = self.running.spawn(async move {
            let outcome = forward(&target, port, queue, |bytes| {
                let out = out.clone();
                async move { out.send(data(data_stream, &bytes, false)).await.is_ok() }
            });
            if let Err(words) = outcome.await {
                let _ = out.send(data(error, words.as_bytes(), false)).await;
            }
            let _ = out.send(data(data_stream, &[], true)).await;
            let _ = out.send(data(error, &[], true)).await;
            let _ = ended.send((data_stream, error));
        });
        if let Some(Part::Data { work: place, .. }) = self.streams.get_mut(&data_stream) {
            *place = Some((work, error));
        }
    }
}

/// One connection: what is in `queue` goes in, what comes out is handed to `take` until that says no.
async fn forward<F: Future<Output = bool>>(
    target: &Target,
    port: u16,
    queue: mpsc::Receiver<Bytes>,
    take: impl Fn(Bytes) -> F,
) -> Result<(), String> {
    let words = |fault: Fault| target.words(port, &fault);
    let mut bytes = target.provider.forward(&target.id, port, frames(queue)).await.map_err(words)?;
    while let Some(part) = bytes.next().await {
        let mut part = part.map_err(|error| {
            tracing::debug!(%error, "a forwarded connection broke off");
            format!("error forwarding port {port} to pod {}: the connection broke off", target.pod)
        })?;
        while !part.is_empty() {
            let piece = part.split_to(part.len().min(PART));
            if !take(piece).await {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// SPDY inside of WebSocket messages.
pub(super) async fn tunnel(socket: Socket, target: Target) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let (mut from_session, mut to_session) = tokio::io::split(near);
    let (mut sink, mut source) = socket.split();
    let incoming = async {
        while let Some(Ok(message)) = source.next().await {
            let done = match message {
                Message::Binary(bytes) => to_session.write_all(&bytes).await,
                Message::Close(_) => break,
                _ => Ok(()),
            };
            if done.is_err() {
                break;
            }
        }
        let _ = to_session.shutdown().await;
    };
    let outgoing = async {
        let mut buffer = vec![0; PART];
        while let Ok(count) = from_session.read(&mut buffer).await {
            if count == 0 || sink.send(Message::Binary(Bytes::copy_from_slice(&buffer[..count]))).await.is_err() {
                break;
            }
        }
        let _ = sink.send(normal_closure()).await;
    };
    // The session ends when either side has.
    tokio::join!(incoming, outgoing, spdy(far, target));
}

/// Two channels of one WebSocket for each port: the even one for data, the odd one for errors. Each begins with its port.
pub(super) async fn channels(socket: Socket, target: Target, ports: Vec<u16>) {
    let (mut sink, mut source) = socket.split();
    let (out, mut written) = mpsc::channel::<Vec<u8>>(16);
    let (mut inputs, mut running) = (Vec::new(), JoinSet::new());
    // A byte of channel numbers 128 ports.
    for (index, port) in (0_u8..128).zip(ports) {
        let (data, error) = (index * 2, index * 2 + 1);
        let (input, queue) = mpsc::channel::<Bytes>(QUEUE);
        inputs.push(Some(input));
        let (target, out) = (target.clone(), out.clone());
        running.spawn(async move {
            let message = |channel: u8, bytes: &[u8]| [&[channel][..], bytes].concat();
            for channel in [data, error] {
                let _ = out.send(message(channel, &port.to_le_bytes())).await;
            }
            let outcome = forward(&target, port, queue, |bytes| {
                let (out, message) = (out.clone(), message(data, &bytes));
                async move { out.send(message).await.is_ok() }
            });
            if let Err(words) = outcome.await {
                let _ = out.send(message(error, words.as_bytes())).await;
            }
        });
    }
    drop(out);
    let incoming = async {
        while let Some(Ok(message)) = source.next().await {
            let Message::Binary(bytes) = message else { continue };
            let Some((channel, rest)) = bytes.split_first() else { continue };
            if channel % 2 == 0
                && let Some(Some(input)) = inputs.get(usize::from(channel / 2))
                && !rest.is_empty()
            {
                let _ = input.send(Bytes::copy_from_slice(rest)).await;
            }
        }
    };
    let outgoing = async {
        while let Some(message) = written.recv().await {
            if sink.send(Message::Binary(message.into())).await.is_err() {
                return;
            }
        }
        let _ = sink.send(normal_closure()).await;
    };
    // Every connection's end ends the outgoing side; the client's going away ends all.
    tokio::select! {
        () = incoming => {}
        () = outgoing => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_protocols() {
        // They are what clients offer, letter by letter (k8s.io/apimachinery/pkg/util/portforward).
        assert_eq!(
            (TUNNEL, CHANNELS, PROTOCOL),
            ("SPDY/3.1+portforward.k8s.io", "v4.channel.k8s.io", "portforward.k8s.io")
        );
    }
}
