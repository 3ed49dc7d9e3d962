//! WebSocket: its upgrade, and exec and attach over it by `v5.channel.k8s.io` and `v4.channel.k8s.io`, one channel byte before
//! each message.

use futures::{SinkExt, StreamExt};
use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};

use super::{Answer, Call, session, text};

/// In v5, a message on this channel closes the channel its one byte names.
const CLOSE: u8 = 255;
/// Exec and attach, the newest first.
pub(super) const REMOTE_COMMAND: [&str; 2] = ["v5.channel.k8s.io", "v4.channel.k8s.io"];
/// From the upgrade to the first output. kubectl (1.32 was seen to) begins to read before it has made its streams, and drops what has come
/// until then, the exit code too (`Unknown stream id 1, discarding message`): it counts on slower servers.
const SETTLED: std::time::Duration = std::time::Duration::from_millis(50);
/// How long a client may take to answer a closure.
const CLOSE_LIMIT: std::time::Duration = std::time::Duration::from_secs(2);

/// An upgraded connection.
pub(super) type Socket = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

/// Takes the upgrade with the first of `known` that the client offers, and has `carry` go on with it.
pub(super) fn answer<F>(
    request: Request<Incoming>,
    known: &[&'static str],
    carry: impl FnOnce(&'static str, Socket) -> F + Send + 'static,
) -> Answer
where
    F: Future<Output = ()> + Send + 'static,
{
    let offered = |wanted: &str| {
        let values = request.headers().get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
        values.filter_map(|value| value.to_str().ok()).flat_map(|v| v.split(',')).any(|p| p.trim() == wanted)
    };
    let Some(protocol) = known.iter().copied().find(|p| offered(p)) else {
        return text(StatusCode::BAD_REQUEST, format!("none of {} is offered", known.join(" and ")));
    };
    let Some(key) = request.headers().get(header::SEC_WEBSOCKET_KEY) else {
        return text(StatusCode::BAD_REQUEST, "Sec-WebSocket-Key is missing");
    };
    let accept = derive_accept_key(key.as_bytes());
    let Ok(accept) = HeaderValue::from_str(&accept) else { return text(StatusCode::BAD_REQUEST, "bad key") };
    tokio::spawn(async move {
        if let Ok(upgraded) = hyper::upgrade::on(request).await {
            let config = WebSocketConfig::default().max_message_size(Some(1 << 20));
            let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await;
            carry(protocol, socket).await;
        }
    });
    let mut answer = Response::new(joey_rpc::empty());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    answer
}

/// Without a code, clients take the end for a failure (RFC 6455, 7.4.1: 1000 is a normal closure).
pub(super) fn normal_closure() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))
}

/// Exec or attach: [`REMOTE_COMMAND`].
pub(super) async fn carry(socket: Socket, call: Call) {
    let settled = tokio::time::Instant::now() + SETTLED;
    let (mut sink, mut source) = socket.split();
    let (input, frames) = mpsc::channel(8);
    let (output, mut answers) = mpsc::channel::<(u8, Vec<u8>)>(8);
    let reading = async {
        while let Some(Ok(message)) = source.next().await {
            let Message::Binary(bytes) = message else { continue };
            match bytes.split_first() {
                Some((&CLOSE, [session::STDIN])) => session::close(&input).await,
                // What nobody reads any more is dropped; the output may still be on its way.
                Some((&channel, rest)) => {
                    session::forward(&input, channel, rest).await;
                }
                None => {}
            }
        }
    };
    let writing = async {
        while let Some((channel, mut bytes)) = answers.recv().await {
            tokio::time::sleep_until(settled).await;
            bytes.insert(0, channel);
            if sink.send(Message::Binary(bytes.into())).await.is_err() {
                return;
            }
        }
        let _ = sink.send(normal_closure()).await;
    };
    let running = async { tokio::join!(session::run(call, frames, output), writing) };
    tokio::pin!(reading);
    // The client's going away ends everything; after the command's end the client answers the closure.
    tokio::select! {
        _ = running => drop(tokio::time::timeout(CLOSE_LIMIT, reading).await),
        () = &mut reading => {}
    }
}
