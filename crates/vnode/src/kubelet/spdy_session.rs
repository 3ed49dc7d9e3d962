//! The streams of one remote command over SPDY: which is which is said by their header `streamtype`.
//!
//! First the client opens its streams, then reading and writing go on side by side: what a container does not read fills a bounded
//! queue and then the client's own connection, while what it writes goes on arriving.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::{Call, session};
use crate::spdy::{Codec, Frame, Malformed, data, pong};

/// Time to open every stream, as the kubelet gives (`streaming-connection` creation timeout).
const OPENING: Duration = Duration::from_secs(30);
/// Time the client has to read the last bytes.
const LINGER: Duration = Duration::from_secs(5);
/// More streams than any remote command has.
const STREAMS: usize = 8;
/// Input that may arrive before every stream is open, bytes.
const EARLY: usize = 256 << 10;
/// Chunks of input on their way to the container; each is one frame or less.
const QUEUE: usize = 16;

/// Carries a call from the first stream to the end of the connection.
pub(super) async fn carry<S: AsyncRead + AsyncWrite>(socket: S, call: Call) {
    if let Err(error) = talk(socket, call).await {
        tracing::debug!(%error, "remote command over spdy ended early");
    }
}

fn wrong(error: Malformed) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// The side that reads: frames of the client.
struct Incoming<R> {
    socket: R,
    codec: Codec,
    /// Stream id → channel; streams of unknown types are not here.
    channels: HashMap<u32, u8>,
}

impl<R: AsyncRead + Unpin> Incoming<R> {
    /// The next frame; `None`: the client has closed.
    async fn frame(&mut self) -> io::Result<Option<Frame>> {
        let mut buffer = [0; 16 << 10];
        loop {
            if let Some(frame) = self.codec.next_frame().map_err(wrong)? {
                return Ok(Some(frame));
            }
            let read = self.socket.read(&mut buffer).await?;
            if read == 0 {
                return Ok(None);
            }
            self.codec.push(&buffer[..read]);
        }
    }

    /// Takes streams until there are `expected`. Returns what arrived on them so far.
    async fn open(&mut self, writer: &mut (impl AsyncWrite + Unpin), expected: usize) -> io::Result<Vec<Frame>> {
        let (mut early, mut held) = (Vec::new(), 0);
        while self.channels.len() < expected {
            match self.frame().await? {
                None | Some(Frame::GoAway) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(Frame::Open { stream, headers, .. }) => {
                    let Some(channel) = channel(&headers).filter(|_| self.channels.len() < STREAMS) else {
                        return Err(io::Error::new(
                            io::ErrorKind::InvalidData,
                            "a stream of an unknown type was opened",
                        ));
                    };
                    self.channels.insert(stream, channel);
                    writer.write_all(&self.codec.accept(stream).map_err(wrong)?).await?;
                    writer.flush().await?;
                }
                Some(Frame::Ping { id }) => {
                    writer.write_all(&pong(id)).await?;
                    writer.flush().await?;
                }
                Some(frame @ Frame::Data { .. }) => {
                    // An empty frame holds memory too.
                    held += 64 + if let Frame::Data { bytes, .. } = &frame { bytes.len() } else { 0 };
                    if held > EARLY {
                        return Err(io::Error::new(io::ErrorKind::InvalidData, "input arrived before its streams"));
                    }
                    early.push(frame);
                }
                Some(Frame::Reset { .. } | Frame::Other) => {}
            }
        }
        Ok(early)
    }

    /// Hands everything on until the client goes away. Waits where the container does not read.
    async fn read(
        &mut self,
        early: Vec<Frame>,
        input: mpsc::Sender<Bytes>,
        pings: mpsc::Sender<u32>,
    ) -> io::Result<()> {
        let mut early = early.into_iter();
        loop {
            let frame = match early.next() {
                Some(frame) => frame,
                None => match self.frame().await? {
                    Some(frame) => frame,
                    None => return Ok(()),
                },
            };
            match frame {
                Frame::Data { stream, bytes, last } => {
                    let Some(&channel) = self.channels.get(&stream) else { continue };
                    session::forward(&input, channel, &bytes).await;
                    if last && channel == session::STDIN {
                        session::close(&input).await;
                    }
                }
                Frame::Reset { stream } if self.channels.get(&stream) == Some(&session::STDIN) => {
                    session::close(&input).await;
                }
                // Whoever pings faster than it reads loses answers.
                Frame::Ping { id } => drop(pings.try_send(id)),
                Frame::GoAway => return Ok(()),
                Frame::Open { .. } | Frame::Reset { .. } | Frame::Other => {}
            }
        }
    }
}

/// The channel a stream is for.
fn channel(headers: &[(String, String)]) -> Option<u8> {
    let (_, kind) = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("streamtype"))?;
    Some(match kind.as_str() {
        "stdin" => session::STDIN,
        "stdout" => session::STDOUT,
        "stderr" => session::STDERR,
        "error" => session::ERROR,
        "resize" => session::RESIZE,
        _ => return None,
    })
}

async fn talk<S: AsyncRead + AsyncWrite>(socket: S, call: Call) -> io::Result<()> {
    let (reader, mut writer) = tokio::io::split(socket);
    let wanted = &call.wanted;
    let expected = 1 + [wanted.stdin, wanted.stdout, wanted.stderr, wanted.tty].into_iter().filter(|w| *w).count();
    let mut incoming =
        Incoming { socket: reader, codec: Codec::new().map_err(wrong)?, channels: HashMap::with_capacity(expected) };
    let early = tokio::time::timeout(OPENING, incoming.open(&mut writer, expected)).await??;
    let streams: HashMap<u8, u32> = incoming.channels.iter().map(|(stream, channel)| (*channel, *stream)).collect();
    let (input, frames) = mpsc::channel(QUEUE);
    let (output, answers) = mpsc::channel(8);
    let (pings, pinged) = mpsc::channel(8);
    let running = async {
        let ((), written) =
            tokio::join!(session::run(call, frames, output), write(&mut writer, &streams, answers, pinged));
        written
    };
    // The client's going away ends everything; the command's end ends the reading.
    tokio::select! {
        written = running => written?,
        read = incoming.read(early, input, pings) => return read,
    }
    // The client closes once it has read everything.
    let rest = async { while let Ok(Some(_)) = incoming.frame().await {} };
    let _ = tokio::time::timeout(LINGER, rest).await;
    writer.shutdown().await
}

/// Sends what the command writes, then ends its streams.
async fn write(
    writer: &mut (impl AsyncWrite + Unpin),
    streams: &HashMap<u8, u32>,
    mut answers: mpsc::Receiver<(u8, Vec<u8>)>,
    mut pings: mpsc::Receiver<u32>,
) -> io::Result<()> {
    loop {
        tokio::select! {
            answer = answers.recv() => {
                let Some((channel, bytes)) = answer else { break };
                let Some(stream) = streams.get(&channel) else { continue };
                writer.write_all(&data(*stream, &bytes, false)).await?;
            }
            Some(id) = pings.recv() => writer.write_all(&pong(id)).await?,
        }
        writer.flush().await?;
    }
    for (_, stream) in streams.iter().filter(|(channel, _)| matches!(**channel, session::STDOUT..=session::ERROR)) {
        writer.write_all(&data(*stream, &[], true)).await?;
    }
    writer.flush().await
}
