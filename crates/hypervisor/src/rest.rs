//! Requests to a monitor that is asked in JSON over HTTP/1.1 on a unix socket, one a connection. A monitor that was taken over says what
//! it likes: answers are bounded.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

use crate::guarded;

/// Bytes of the longest answer that is read: what a monitor says of a machine with all its disks has some ten thousand.
const LONGEST: usize = 1 << 20;
/// Bytes of the words of a refusal.
const WORDS: usize = 1024;

/// What a monitor is asked.
#[derive(Debug)]
pub(crate) struct Ask<'a> {
    pub method: Method,
    /// `/api/v1/vm.boot`
    pub path: &'a str,
    pub body: Option<Value>,
    /// Goes along with the first byte of the request.
    pub descriptor: Option<OwnedFd>,
}

impl<'a> Ask<'a> {
    pub(crate) fn get(path: &'a str) -> Self {
        Self { method: Method::GET, path, body: None, descriptor: None }
    }

    pub(crate) fn put(path: &'a str, body: impl Into<Option<Value>>) -> Self {
        Self { method: Method::PUT, path, body: body.into(), descriptor: None }
    }

    pub(crate) fn patch(path: &'a str, body: Value) -> Self {
        Self { method: Method::PATCH, path, body: Some(body), descriptor: None }
    }

    pub(crate) fn with(self, descriptor: OwnedFd) -> Self {
        Self { descriptor: Some(descriptor), ..self }
    }
}

/// Asks the monitor that listens there as this user; an empty answer is `null`, and what it refuses is an error in its words.
pub(crate) async fn ask(socket: &Path, owner: u32, ask: Ask<'_>) -> io::Result<Value> {
    let stream = Carrying { stream: guarded::connect(socket, owner).await?, descriptor: ask.descriptor };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    let body = ask.body.map(|body| serde_json::to_vec(&body)).transpose()?;
    let mut request = Request::builder()
        .method(&ask.method)
        .uri(ask.path)
        .header(header::HOST, "localhost")
        .header(header::ACCEPT, "application/json");
    if body.is_some() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    let request = request.body(Full::new(Bytes::from(body.unwrap_or_default()))).map_err(io::Error::other)?;
    let answered = async {
        let answer = sender.send_request(request).await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        let status = answer.status();
        let bytes = Limited::new(answer.into_body(), LONGEST).collect().await.map_err(io::Error::other)?.to_bytes();
        Ok::<_, io::Error>((status, bytes))
    };
    // The connection is driven until the answer is there; its own end shows in the answer's.
    let driven = async {
        let _ = connection.await;
        std::future::pending::<()>().await;
    };
    let (status, bytes) = tokio::select! {
        answered = answered => answered?,
        () = driven => return Err(io::ErrorKind::BrokenPipe.into()),
    };
    understood(ask.path, status, &bytes)
}

fn understood(path: &str, status: StatusCode, bytes: &[u8]) -> io::Result<Value> {
    match status {
        status if !status.is_success() => Err(io::Error::other(format!("{path}: {}", refusal(status, bytes)))),
        _ if bytes.is_empty() => Ok(Value::Null),
        _ => Ok(serde_json::from_slice(bytes)?),
    }
}

/// Why: Firecracker says it in an object, Cloud Hypervisor in a list from the effect to its cause, or as a text in older versions.
fn refusal(status: StatusCode, bytes: &[u8]) -> String {
    let words = match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => object.get("fault_message").and_then(Value::as_str).unwrap_or_default().to_owned(),
        Ok(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(": "),
        _ => String::from_utf8_lossy(bytes).trim().to_owned(),
    };
    match words.char_indices().nth(WORDS) {
        _ if words.is_empty() => format!("it answers {status}"),
        Some((end, _)) => words[..end].to_owned(),
        None => words,
    }
}

/// A stream whose first bytes bear a descriptor.
struct Carrying {
    stream: UnixStream,
    descriptor: Option<OwnedFd>,
}

impl AsyncRead for Carrying {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Carrying {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let Some(descriptor) = &this.descriptor else { return Pin::new(&mut this.stream).poll_write(cx, bytes) };
        loop {
            ready!(this.stream.poll_write_ready(cx))?;
            let sent = this.stream.try_io(Interest::WRITABLE, || {
                let descriptors = [descriptor.as_raw_fd()];
                let (control, parts) = ([ControlMessage::ScmRights(&descriptors)], [io::IoSlice::new(bytes)]);
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                Ok(sendmsg::<()>(this.stream.as_raw_fd(), &parts, &control, flags, None)?)
            });
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => {
                    this.descriptor = None;
                    return Poll::Ready(sent);
                }
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_in_the_monitors_words() {
        let told = |bytes: &[u8]| refusal(StatusCode::BAD_REQUEST, bytes);
        assert_eq!(told(br#"{"fault_message": "no such drive"}"#), "no such drive");
        assert_eq!(told(br#"["Error from API", "VM is not created"]"#), "Error from API: VM is not created");
        assert_eq!(told(b"Not Found\n"), "Not Found");
        assert_eq!(told(b"{}"), "it answers 400 Bad Request");
        assert_eq!(told(b""), "it answers 400 Bad Request");
        assert_eq!(told("ü".repeat(5000).as_bytes()).chars().count(), WORDS);
    }
}
