//! The streams of one remote command over SPDY: which is which is said by their header `streamtype`.

use std::collections::HashMap;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::{Call, session};
use crate::spdy::{Codec, Frame, Malformed, data, pong};

/// Carries a call from the first stream to the end of the connection.
pub(super) async fn carry<S: AsyncRead + AsyncWrite + Unpin>(mut socket: S, call: Call) {
    if let Err(error) = talk(&mut socket, call).await {
        tracing::debug!(%error, "remote command over spdy ended early");
    }
}

async fn talk<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut S, call: Call) -> std::io::Result<()> {
    let wrong = |error: Malformed| std::io::Error::new(std::io::ErrorKind::InvalidData, error);
    let wanted = &call.wanted;
    let expected = 1 + [wanted.stdin, wanted.stdout, wanted.stderr, wanted.tty].into_iter().filter(|w| *w).count();
    let mut codec = Codec::new().map_err(wrong)?;
    let mut channels: HashMap<u32, u8> = HashMap::new();
    let (input, frames) = mpsc::channel(64);
    let (output, mut answers) = mpsc::channel::<(u8, Vec<u8>)>(8);
    let mut waiting = Some((call, frames, output));
    let mut buffer = vec![0; 16 << 10];
    loop {
        tokio::select! {
            read = socket.read(&mut buffer) => {
                let read = read?;
                if read == 0 { return Ok(()); }
                codec.push(&buffer[..read]);
                while let Some(frame) = codec.next_frame().map_err(wrong)? {
                    match frame {
                        Frame::Open { stream, headers, .. } if channels.len() < 8 => {
                            let kind = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("streamtype"));
                            let channel = match kind.map(|(_, value)| value.as_str()) {
                                Some("stdin") => 0,
                                Some("stdout") => 1,
                                Some("stderr") => 2,
                                Some("error") => 3,
                                Some("resize") => 4,
                                _ => 9,
                            };
                            channels.insert(stream, channel);
                            let reply = codec.accept(stream).map_err(wrong)?;
                            socket.write_all(&reply).await?;
                            socket.flush().await?;
                        }
                        Frame::Data { stream, bytes, last } => {
                            let channel = channels.get(&stream).copied().unwrap_or(9);
                            session::forward(&input, channel, &bytes).await;
                            if last && channel == session::STDIN { session::close(&input).await; }
                        }
                        Frame::Ping { id } => { socket.write_all(&pong(id)).await?; socket.flush().await?; }
                        Frame::GoAway => return Ok(()),
                        Frame::Open { .. } | Frame::Reset { .. } | Frame::Other => {}
                    }
                }
                if channels.len() >= expected && let Some((call, frames, output)) = waiting.take() {
                    tokio::spawn(session::run(call, frames, output));
                }
            }
            answer = answers.recv(), if waiting.is_none() => {
                let Some((channel, bytes)) = answer else { break };
                if let Some((stream, _)) = channels.iter().find(|(_, known)| **known == channel) {
                    socket.write_all(&data(*stream, &bytes, false)).await?;
                    socket.flush().await?;
                }
            }
        }
    }
    for (stream, channel) in &channels {
        if matches!(channel, 1..=3) {
            socket.write_all(&data(*stream, &[], true)).await?;
        }
    }
    socket.flush().await?;
    // The client closes once it has read everything.
    let rest = async { while socket.read(&mut buffer).await.is_ok_and(|read| read > 0) {} };
    let _ = tokio::time::timeout(std::time::Duration::from_secs(5), rest).await;
    socket.shutdown().await
}
