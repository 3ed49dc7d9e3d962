//! A connection into the Pod: to a port on loopback of its network namespace, which is the agent's own. Bytes both ways, each
//! with its own end.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http::Response;
use hyper::body::Incoming;
use joey_model::{ErrorKind, Fault};
use joey_rpc::{Body, into_stream, stream_answer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long a connection may take. Loopback answers at once or never: a full queue of the listener is the only wait.
const CONNECT: Duration = Duration::from_secs(10);
/// Bytes read at once.
const PART: usize = 16 << 10;

/// Connects, and then carries `body` in and the answer out.
pub async fn forward(port: u16, body: Incoming) -> Result<Response<Body>, Fault> {
    let refused = |error: io::Error| {
        let message = match error.kind() {
            io::ErrorKind::ConnectionRefused => {
                format!("nothing listens at port {port} of the Pod: connection refused")
            }
            _ => format!("port {port} of the Pod cannot be reached: {error}"),
        };
        Fault::new(ErrorKind::Conflict, "ConnectionRefused", message)
            .with_hint("the program must listen on this port at loopback or at every address")
    };
    let connected = tokio::time::timeout(CONNECT, connect(port)).await;
    let stream = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(refused)?;
    let _ = stream.set_nodelay(true);
    let (reader, mut writer) = stream.into_split();
    tokio::spawn(async move {
        let mut body = into_stream(body);
        while let Some(part) = body.next().await {
            let Ok(part) = part else {
                // The caller broke off: what it had to say has no end that the Pod could be told.
                writer.forget();
                return;
            };
            if writer.write_all(&part).await.is_err() {
                return;
            }
        }
        let _ = writer.shutdown().await;
    });
    Ok(stream_answer(futures::stream::try_unfold(reader, |mut reader| async move {
        let mut buffer = bytes::BytesMut::with_capacity(PART);
        Ok::<_, io::Error>(match reader.read_buf(&mut buffer).await? {
            0 => None,
            _ => Some((Bytes::from(buffer), reader)),
        })
    })))
}

/// IPv4 first, as under Kubernetes; a program may listen on IPv6 alone.
async fn connect(port: u16) -> io::Result<TcpStream> {
    match TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await {
        Ok(stream) => Ok(stream),
        Err(first) => TcpStream::connect(SocketAddr::from((Ipv6Addr::LOCALHOST, port))).await.map_err(|_| first),
    }
}
