//! An HTTP server that takes log records in, a JSON object a line, as long as it is told to.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::Value;

/// The server, on a port of its own. It ends with the test's process.
#[derive(Debug)]
pub struct Intake {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    answer: AtomicU16,
    requests: AtomicU16,
    records: Mutex<Vec<Value>>,
    headers: Mutex<String>,
}

impl Intake {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound listener has an address");
        let shared = Arc::new(Shared { answer: 200.into(), ..Shared::default() });
        let served = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let served = served.clone();
                std::thread::spawn(move || serve(&served, stream));
            }
        });
        Self { address, shared }
    }

    pub fn url(&self) -> String {
        format!("http://{}/records", self.address)
    }

    /// What it answers from now on; only what it answers with 200 is taken.
    pub fn answer(&self, status: u16) {
        self.shared.answer.store(status, Ordering::Relaxed);
    }

    /// All records taken so far, in their order.
    pub fn records(&self) -> Vec<Value> {
        self.shared.records.lock().expect("nobody panics with it").clone()
    }

    /// Those of one source.
    pub fn of(&self, source: &str) -> Vec<Value> {
        self.records().into_iter().filter(|record| record["source"] == source).collect()
    }

    /// How many requests there were, also those that were not taken.
    pub fn requests(&self) -> u16 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// The head of the last request.
    pub fn headers(&self) -> String {
        self.shared.headers.lock().expect("nobody panics with it").clone()
    }
}

/// One request, and the end of the connection.
fn serve(shared: &Shared, stream: TcpStream) {
    let mut reader = BufReader::new(stream);
    let (mut head, mut line) = (String::new(), String::new());
    while reader.read_line(&mut line).is_ok_and(|count| count > 2) {
        head.push_str(&line);
        line.clear();
    }
    let length = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    if reader.read_exact(&mut body).is_err() || body.is_empty() {
        return;
    }
    shared.requests.fetch_add(1, Ordering::Relaxed);
    *shared.headers.lock().expect("nobody panics with it") = head;
    let text = String::from_utf8(body).expect("records are text");
    let status = match shared.answer.load(Ordering::Relaxed) {
        // Some servers take all but what they cannot bear.
        200 if text.contains("poison") => 400,
        200 if text.contains("unbearable") => 500,
        status => status,
    };
    if status == 200 {
        let records = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a record is JSON"));
        shared.records.lock().expect("nobody panics with it").extend(records);
    }
    let _ = write!(reader.get_mut(), "HTTP/1.1 {status} Told\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
}
