//! Traffic as the tests need it: one page by HTTP, and how fast bytes come and go.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};

/// The body of `GET http://ADDRESS/PATH`, over a connection of its own.
pub fn page(address: &str, path: &str) -> Result<String, String> {
    let target: SocketAddr = address.parse().map_err(|error| format!("{address}: {error}"))?;
    let fetch = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = fetch().map_err(|error| format!("{address}: {error}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| format!("no HTTP answer: {answer:?}"))?;
    if head.contains(" 200 ") { Ok(body.to_owned()) } else { Err(head.to_owned()) }
}

/// Bits per second over a stretch of `length`, after a start of half a second in which a bucket may empty itself.
fn rate(length: Duration, mut step: impl FnMut() -> std::io::Result<usize>) -> f64 {
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(500) {
        step().expect("traffic flows");
    }
    let (begin, mut bytes) = (Instant::now(), 0);
    while begin.elapsed() < length {
        match step() {
            Ok(0) | Err(_) => break,
            Ok(count) => bytes += count,
        }
    }
    bytes as f64 * 8.0 / begin.elapsed().as_secs_f64()
}

/// How fast an address accepts bytes, bits per second.
pub fn send_rate(address: &str, length: Duration) -> f64 {
    let mut stream = TcpStream::connect(address).expect("the Pod listens");
    stream.set_write_timeout(Some(Duration::from_secs(10))).expect("a deadline can be set");
    // What waits in the sender's buffer has not been sent: keep it small against what is measured.
    setsockopt(&stream, sockopt::SndBuf, &(32 << 10)).expect("a buffer can be small");
    let block = vec![0; 16 << 10];
    rate(length, || stream.write(&block))
}

/// How fast an address gives bytes, bits per second.
pub fn receive_rate(address: &str, length: Duration) -> f64 {
    let mut stream = TcpStream::connect(address).expect("the Pod listens");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a deadline can be set");
    let mut block = vec![0; 16 << 10];
    rate(length, || stream.read(&mut block))
}

/// A listener on an address of the host that says who came: one line with the caller's address for each connection.
pub fn mirror(address: &str) -> SocketAddr {
    let listener = TcpListener::bind(address).expect("the host's address is free");
    let bound = listener.local_addr().expect("a bound listener has an address");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let caller = stream.peer_addr().map_or_else(|error| error.to_string(), |peer| peer.ip().to_string());
            let body = format!("{caller}\n");
            // A request left unread would turn the answer's end into a reset.
            let _ = stream.read(&mut [0; 4096]);
            let _ = write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        }
    });
    bound
}
