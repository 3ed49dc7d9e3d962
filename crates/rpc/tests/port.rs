//! HTTP/2 over a port whose other end is somebody's who took over a machine: bytes are turned over, left out and put in between. Whoever
//! calls gets an answer or an error, and is heard again as soon as the other end is honest.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response};
use hyper::body::Incoming;
use joey_rpc::port::{self, Listener};
use joey_rpc::{Body, Client, RpcError, into_stream, json_answer, serve, stream_answer};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::{Mutex, OwnedMutexGuard};

const ROUNDS: u64 = 60;
/// Bytes of a port that are under way.
const PIPE: usize = 8 << 10;
const LIMIT: usize = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(2);

/// A generator of numbers that need not be good: xorshift64.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % below.max(1) as u64).unwrap()
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    Ok(match request.uri().path() {
        "/echo" => stream_answer(into_stream(request.into_body())),
        "/lines" => stream_answer(futures::stream::iter((0..100).map(|_| Ok(Bytes::from_static(b"[1,2,3]\n"))))),
        path => json_answer(&path),
    })
}

/// What comes out of the machine, changed in one place of so many on average.
fn corrupted(numbers: &mut Numbers, bytes: &[u8], rarely: usize) -> Vec<u8> {
    let mut changed = Vec::with_capacity(bytes.len());
    for &byte in bytes {
        if numbers.below(rarely) != 0 {
            changed.push(byte);
            continue;
        }
        match numbers.below(4) {
            0 => changed.push(byte ^ (1 << numbers.below(8))),
            1 => {}
            2 => changed.extend([byte, u8::try_from(numbers.below(256)).unwrap()]),
            _ => changed.extend((0..numbers.below(300)).map(|number| (number % 256) as u8)),
        }
    }
    changed
}

/// A machine that serves at its end of a port; what it says passes through somebody's hands while `taken_over`.
fn machine(mut numbers: Numbers, rarely: usize, taken_over: Arc<AtomicBool>) -> DuplexStream {
    let (inside, behind) = tokio::io::duplex(PIPE);
    let (outside, port) = tokio::io::duplex(PIPE);
    let (reader, writer) = tokio::io::split(inside);
    let mut listener = Listener::new(reader, writer);
    tokio::spawn(async move {
        while let Some(connection) = listener.accept().await {
            tokio::spawn(serve(connection, tower::service_fn(answer)));
        }
    });
    let ((mut said, mut hears), (mut asked, mut told)) = (tokio::io::split(behind), tokio::io::split(outside));
    tokio::spawn(async move { tokio::io::copy(&mut asked, &mut hears).await });
    tokio::spawn(async move {
        let mut buffer = vec![0; 1024];
        while let Ok(count) = said.read(&mut buffer).await {
            let bytes = match taken_over.load(Ordering::SeqCst) {
                true => corrupted(&mut numbers, &buffer[..count], rarely),
                false => buffer[..count].to_vec(),
            };
            if count == 0 || told.write_all(&bytes).await.is_err() {
                return;
            }
        }
    });
    port
}

/// The host's end: one talker at a time, as with a monitor's socket.
fn client(port: DuplexStream) -> Client {
    let port = Arc::new(Mutex::new(port));
    let client = Client::from_connector("machine", move || {
        let port = port.clone();
        async move {
            let (near, far) = tokio::io::duplex(PIPE);
            let held = tokio::time::timeout(PATIENCE, port.lock_owned()).await.map_err(std::io::Error::other)?;
            tokio::spawn(bridge(held, far));
            port::call(near).await
        }
    });
    client.with_limit(LIMIT).with_patience(Some(PATIENCE))
}

async fn bridge(mut port: OwnedMutexGuard<DuplexStream>, far: DuplexStream) {
    let (mut from, mut to) = tokio::io::split(far);
    let (mut read, mut write) = tokio::io::split(&mut *port);
    tokio::select! {
        _ = tokio::io::copy(&mut from, &mut write) => {}
        _ = tokio::io::copy(&mut read, &mut to) => {}
    }
}

/// Calls of each kind; how many had an answer. None takes longer than it may, and none gives more than it may.
async fn called(client: &Client) -> usize {
    let mut answered = 0;
    let name: Result<String, RpcError> = client.call::<(), _>(Method::GET, "/name", None).await;
    answered += usize::from(name.is_ok());
    if let Ok(mut lines) = client.lines::<Vec<u32>>("/lines").await {
        let mut count = 0;
        while let Ok(Some(Ok(_))) = tokio::time::timeout(PATIENCE, lines.next()).await {
            count += 1;
        }
        assert!(count <= 1000, "{count} lines");
        answered += usize::from(count == 100);
    }
    let sent = futures::stream::iter(vec![Bytes::from(vec![7; 1000]); 20]);
    if let Ok(mut back) = client.duplex(Method::POST, "/echo", sent).await {
        let mut count = 0;
        while let Ok(Some(Ok(bytes))) = tokio::time::timeout(PATIENCE, back.next()).await {
            count += bytes.len();
        }
        assert!(count <= 1 << 20, "{count} bytes");
        answered += usize::from(count == 20_000);
    }
    answered
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_changes_what_is_said_does_no_harm() {
    let (mut answered, mut healed) = (0, 0);
    for seed in 1..=ROUNDS {
        println!("seed {seed}");
        let mut numbers = Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let rarely = [30, 300, 3000, 30_000][numbers.below(4)];
        let taken_over = Arc::new(AtomicBool::new(true));
        let client = client(machine(numbers, rarely, taken_over.clone()));
        for _ in 0..3 {
            answered += called(&client).await;
        }
        taken_over.store(false, Ordering::SeqCst);
        // The connection that was harmed is given up in time, and the next one is as good as ever.
        for _ in 0..10 {
            if called(&client).await == 3 {
                healed += 1;
                break;
            }
        }
    }
    assert!(answered > 0 && answered < 9 * ROUNDS as usize, "{answered}: nothing was harmed, or everything");
    assert_eq!(healed, ROUNDS, "machines that are heard again");
}
