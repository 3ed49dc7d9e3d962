//! The client against a served connection: concurrent calls, both directions at once, a peer that goes away.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response};
use hyper::body::Incoming;
use joey_model::{ErrorKind, Fault};
use joey_rpc::{Body, Client, RpcError, fault_answer, into_stream, json_answer, stream_answer};

async fn answer(request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    Ok(match request.uri().path() {
        "/number" => json_answer(&request.uri().query().unwrap_or_default()),
        "/echo" => stream_answer(into_stream(request.into_body())),
        "/endless" => stream_answer(futures::stream::repeat_with(|| Ok(Bytes::from_static(&[b'x'; 4096])))),
        _ => {
            fault_answer(Fault::new(ErrorKind::NotFound, "NotFound", "thing \"a\" does not exist").with_hint("make it"))
        }
    })
}

fn client() -> Client {
    Client::in_process("test", tower::service_fn(answer))
}

#[tokio::test]
async fn concurrent_calls_refusals_and_limits() {
    let client = client();
    let calls = (0..200).map(|number| {
        let client = client.clone();
        async move { client.call::<(), String>(Method::GET, &format!("/number?{number}"), None).await.unwrap() }
    });
    let answers = futures::future::join_all(calls).await;
    assert!(answers.iter().enumerate().all(|(number, text)| *text == number.to_string()));
    match client.call::<(), ()>(Method::GET, "/nothing", None).await {
        Err(RpcError::Remote(fault)) => {
            assert_eq!((fault.kind, fault.hint.as_deref()), (ErrorKind::NotFound, Some("make it")))
        }
        other => panic!("{other:?}"),
    }
    let long = client.with_limit(10_000).call::<(), ()>(Method::GET, "/endless", None).await;
    assert!(matches!(long, Err(RpcError::TooLong { limit: 10_000, .. })), "{long:?}");
}

#[tokio::test]
async fn both_ways_with_an_unread_stream_beside() {
    let client = client();
    let _unread = client.bytes(Method::GET, "/endless").await.unwrap();
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let outgoing = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut incoming = client.duplex(Method::POST, "/echo", outgoing).await.unwrap();
    for _ in 0..100 {
        sender.send(Bytes::from_static(b"ping")).await.unwrap();
        assert_eq!(incoming.next().await.unwrap().unwrap(), "ping");
    }
    drop(sender);
    assert!(incoming.next().await.is_none());
}

#[tokio::test]
async fn a_peer_that_goes_away_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d".repeat(100)).join("s.sock");
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    let client = Client::unix(path.clone());
    assert!(client.call::<(), String>(Method::GET, "/number?1", None).await.unwrap_err().is_connect());
    for _ in 0..2 {
        let listener = joey_rpc::listen_unix(&path).unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = tokio::spawn(joey_rpc::serve_unix(listener, tower::service_fn(answer), async {
            let _ = stopped.await;
        }));
        let text: String = client.call::<(), _>(Method::GET, "/number?2", None).await.unwrap();
        assert_eq!(text, "2");
        let mut endless = client.bytes(Method::GET, "/endless").await.unwrap();
        assert!(endless.next().await.unwrap().is_ok());
        stop.send(()).unwrap();
        server.await.unwrap();
        let broken = async { while let Some(Ok(_)) = endless.next().await {} };
        tokio::time::timeout(Duration::from_secs(5), broken).await.expect("the stream ends with its server");
    }
}
