//! An agent that was taken over, and each call that its host makes: there is an answer or an error within a bound, and no more is read
//! than may be.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{BoxStream, repeat};
use futures::{FutureExt, Stream, StreamExt};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use joey_api::agent::{AgentContainer, Deadline, ExecQuery};
use joey_api::diagnosis::CaptureRequest;
use joey_api::frame;
use joey_api::instance::{LogOptions, Resources};
use joey_rpc::{Body, Client, RpcError, stream};
use joey_sandbox::AgentClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

/// Bytes of JSON that are read, as class `rund` has it.
const LIMIT: usize = 1 << 20;
/// Bytes that may be under way beside those.
const SLACK: usize = 1 << 20;
/// How long a call may take until there is an answer or an error.
const LONGEST: Duration = Duration::from_secs(20);
/// How much of a stream is read before it is left.
const READ: usize = 4 << 20;

/// What the agent answers whatever it is asked.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Answer {
    Silence,
    Endless,
    EndlessLines,
    /// A byte a second.
    Slow,
    /// Some bytes, and the stream is reset.
    Reset,
    /// Fewer and more bytes than its head says.
    Short,
    Long,
    Noise,
    Nested,
    Nothing,
    Refusal,
    EndlessRefusal,
    LongHead,
    /// No status of an answer that is one.
    Odd,
}

const ANSWERS: [Answer; 14] = [
    Answer::Silence,
    Answer::Endless,
    Answer::EndlessLines,
    Answer::Slow,
    Answer::Reset,
    Answer::Short,
    Answer::Long,
    Answer::Noise,
    Answer::Nested,
    Answer::Nothing,
    Answer::Refusal,
    Answer::EndlessRefusal,
    Answer::LongHead,
    Answer::Odd,
];

/// A client of such an agent, and how many bytes were taken from that one.
fn agent(answer: Answer) -> (AgentClient, Arc<AtomicUsize>) {
    let given = Arc::new(AtomicUsize::new(0));
    let counted = given.clone();
    let service = tower::service_fn(move |request: Request<Incoming>| {
        let counted = counted.clone();
        async move {
            // It does not read what it is sent either.
            let _unread = request;
            Ok::<_, Infallible>(answered(answer, counted).await)
        }
    });
    (AgentClient::new(Client::in_process("agent", service).with_limit(LIMIT)), given)
}

async fn answered(answer: Answer, given: Arc<AtomicUsize>) -> Response<Body> {
    let count = move |bytes: &'static [u8]| {
        given.fetch_add(bytes.len(), Ordering::SeqCst);
        Ok(Bytes::from_static(bytes))
    };
    let endless = |bytes: &'static [u8]| stream(repeat(bytes).map(count.clone()));
    let of = |bytes: Vec<u8>| stream(futures::stream::iter([Ok(Bytes::from(bytes))]));
    let (status, body) = match answer {
        Answer::Silence => std::future::pending().await,
        Answer::Endless => (200, endless(&[b'1'; 4096])),
        Answer::EndlessLines => (200, endless(b"\n\n\n\n\n\n\n\n{}\n")),
        Answer::Slow => {
            let slowly = repeat(()).then(|()| tokio::time::sleep(Duration::from_secs(1)));
            (200, stream(slowly.map(|()| Ok(Bytes::from_static(b"[")))))
        }
        Answer::Reset => {
            let broken = [Ok(Bytes::from_static(b"{\"version\":")), Err(std::io::Error::other("broken"))];
            (200, stream(futures::stream::iter(broken)))
        }
        Answer::Short | Answer::Long | Answer::Nothing => (200, of(Vec::new())),
        Answer::Noise => {
            (200, of((0..100_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect()))
        }
        Answer::Nested => (200, of(vec![b'['; 500_000])),
        Answer::Refusal => {
            let text = "ü".repeat(100_000);
            (
                422,
                of(serde_json::json!({"error": {"kind": text, "reason": text, "message": text, "hint": text}})
                    .to_string()
                    .into()),
            )
        }
        Answer::EndlessRefusal => (500, endless(&[b'x'; 4096])),
        Answer::LongHead => (200, of(b"null".to_vec())),
        Answer::Odd => (302, of(b"elsewhere".to_vec())),
    };
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    let head = response.headers_mut();
    match answer {
        Answer::Short => drop(head.insert("content-length", "100".parse().unwrap())),
        Answer::Long => {
            head.insert("content-length", "3".parse().unwrap());
            *response.body_mut() = of(vec![b'1'; 1000]);
        }
        Answer::LongHead => {
            for number in 0..2000 {
                let name = http::HeaderName::from_bytes(format!("x-{number}").as_bytes()).unwrap();
                head.insert(name, "x".repeat(500).parse().unwrap());
            }
        }
        _ => {}
    }
    response
}

/// What came of a call: nothing that is kept, or so many bytes until it ended, broke or was left.
type Outcome = Result<usize, RpcError>;

async fn read<S: Stream<Item = std::io::Result<Bytes>> + Unpin>(bytes: Result<S, RpcError>) -> Outcome {
    let (mut bytes, mut count) = (bytes?, 0);
    // Slow streams are left: they are for people, who have patience or none.
    let all = async {
        while let Some(Ok(part)) = bytes.next().await {
            count += part.len();
            if count > READ {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(LONGEST / 20, all).await;
    Ok(count)
}

/// Every call that there is: what came of it, how long it took, and how many bytes were `given` to it.
async fn calls(agent: &AgentClient, given: &AtomicUsize) -> Vec<(&'static str, Outcome, Duration, usize)> {
    let input = || -> BoxStream<'static, Bytes> { repeat(Bytes::from_static(&[0; 4096])).take(10_000).boxed() };
    let watch = async {
        let (mut states, mut count) = (agent.watch().await?, 0);
        let all = async {
            while let Some(Ok(_)) = states.next().await {
                count += 1;
            }
        };
        let _ = tokio::time::timeout(LONGEST / 20, all).await;
        Ok(count)
    };
    let (exec, log, capture) = (ExecQuery::default(), LogOptions::default(), CaptureRequest::default());
    let (container, resources) = (AgentContainer::default(), Resources::default());
    let none = |done: Result<(), RpcError>| done.map(|()| 0);
    let all = [
        ("state", agent.state().map(|done| done.map(|_| 0)).boxed()),
        ("watch", watch.boxed()),
        ("stop", agent.stop(1).map(none).boxed()),
        ("shutdown", agent.shutdown().map(none).boxed()),
        ("restart", agent.restart("c").map(none).boxed()),
        ("exec", agent.exec("c", &exec, input()).then(read).boxed()),
        ("attach", agent.attach("c", &exec, input()).then(read).boxed()),
        ("logs", agent.logs("c", &log).then(read).boxed()),
        ("forward", agent.forward(80, input()).then(read).boxed()),
        ("read_files", agent.read_files("c", "/").then(read).boxed()),
        ("put", agent.put(&container).map(none).boxed()),
        ("limit", agent.limit("c", &resources).map(none).boxed()),
        ("end_at", agent.end_at(Deadline::default()).map(none).boxed()),
        ("renew_volume", agent.renew_volume("v", Vec::new()).map(|done| done.map(|_| 0)).boxed()),
        ("capture", agent.capture(&capture, input()).then(read).boxed()),
        ("cores", agent.cores(None).map(|done| done.map(|_| 0)).boxed()),
        ("core", agent.core("x").then(read).boxed()),
        ("usage", agent.usage().map(|done| done.map(|_| 0)).boxed()),
    ];
    let mut outcomes = Vec::new();
    for (name, call) in all {
        let began = Instant::now();
        let outcome = tokio::time::timeout(LONGEST, call).await.unwrap_or_else(|_| panic!("{name} takes for ever"));
        outcomes.push((name, outcome, began.elapsed(), given.swap(0, Ordering::SeqCst)));
    }
    outcomes
}

/// Calls whose answer is read as a whole and has to be something.
const DECODED: [&str; 4] = ["state", "renew_volume", "cores", "usage"];

#[tokio::test(start_paused = true)]
async fn each_answer_to_each_call_is_bounded() {
    for answer in ANSWERS {
        let (agent, given) = agent(answer);
        for (name, outcome, took, taken) in calls(&agent, &given).await {
            println!("{answer:?} {name}: {outcome:?} after {took:?}, {taken} bytes");
            assert!(taken <= LIMIT.max(READ) + SLACK, "{answer:?} {name}: {taken} bytes were taken");
            match (&outcome, answer) {
                (Ok(count), _) => {
                    assert!(!DECODED.contains(&name), "{answer:?} {name}: understood");
                    assert!(!matches!(answer, Answer::Silence | Answer::Refusal | Answer::Odd), "{answer:?} {name}");
                    assert!(*count <= READ + SLACK, "{answer:?} {name}: {count} bytes");
                }
                (Err(RpcError::Remote(fault)), _) => {
                    let words = [Some(&fault.reason), Some(&fault.message), fault.hint.as_ref()];
                    assert!(words.into_iter().flatten().all(|word| word.len() <= 16 << 10), "{answer:?} {name}");
                }
                (Err(error), Answer::Silence) => assert!(matches!(error, RpcError::Late { .. }), "{name}: {error:?}"),
                (Err(_), _) => {}
            }
        }
    }
}

/// Who takes the bytes of a connection has them changed: no HTTP/2, none that ends, or nothing at all.
#[tokio::test(start_paused = true)]
async fn what_is_no_connection_is_given_up() {
    for kind in ["closed", "noise", "silence", "settings"] {
        let client = Client::from_connector("agent", move || async move {
            let (near, mut far) = tokio::io::duplex(64 << 10);
            tokio::spawn(async move {
                // An empty frame of settings (RFC 9113, 6.5) again and again: each has to be acknowledged.
                let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
                let noise: Vec<u8> =
                    (0..10_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
                match kind {
                    "closed" => {}
                    "noise" => drop(far.write_all(&noise).await),
                    "settings" => {
                        for _ in 0..100_000 {
                            if far.write_all(&settings).await.is_err() {
                                return;
                            }
                        }
                    }
                    _ => std::future::pending().await,
                }
                let mut rest = Vec::new();
                let _ = far.take(1 << 20).read_to_end(&mut rest).await;
            });
            Ok(near)
        });
        let agent = AgentClient::new(client.with_limit(LIMIT));
        for (name, outcome, took, _) in calls(&agent, &AtomicUsize::new(0)).await {
            assert!(outcome.is_err() && took <= LONGEST, "{kind} {name}: {outcome:?} after {took:?}");
        }
    }
}

/// Frames of an interactive stream as they come out of a machine: whatever is in them, what is kept is no longer than one of them.
#[test]
fn frames_of_any_kind_are_no_harm() {
    for seed in 1..=60_u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut number = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut decoder = frame::Decoder::default();
        let (mut sent, mut had) = (0, 0);
        'stream: for _ in 0..200 {
            let mut bytes = match number(4) {
                0 => (0..number(5000)).map(|_| number(256) as u8).collect(),
                1 => vec![frame::STATUS, 0, 0, 0, number(20) as u8],
                _ => frame::encode(number(8) as u8, &vec![7; number(frame::MAX_PAYLOAD as u64 + 2) as usize]),
            };
            if number(10) == 0 {
                bytes.truncate(number(bytes.len() as u64 + 1) as usize);
            }
            sent += bytes.len();
            decoder.push(&bytes);
            loop {
                match decoder.next_frame() {
                    Ok(Some((_, payload))) => {
                        assert!(payload.len() <= frame::MAX_PAYLOAD, "seed {seed}");
                        had += payload.len() + 5;
                    }
                    Ok(None) => break,
                    Err(error) => {
                        assert!(error.0 > frame::MAX_PAYLOAD, "seed {seed}");
                        break 'stream;
                    }
                }
            }
        }
        assert!(had <= sent, "seed {seed}: more came out than was put in");
    }
}
