//! A registry written for the tests: it serves what it is given, breaks off where it is told to and remembers what was asked.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use crate::image::{Image, digest};

/// A registry on loopback for hand-made images. Dropped with the test's process.
#[derive(Debug, Clone)]
pub struct Served {
    address: SocketAddr,
    shelf: Arc<Mutex<Shelf>>,
}

#[derive(Debug, Default)]
struct Shelf {
    /// `REPOSITORY:TAG` or `REPOSITORY@DIGEST` to a manifest's bytes.
    manifests: HashMap<String, Vec<u8>>,
    blobs: HashMap<String, Vec<u8>>,
    /// Blobs whose next answer ends after so many bytes.
    broken_off: HashMap<String, usize>,
    /// Blobs that are sent no faster than so many bytes each 10 ms.
    slow: HashMap<String, usize>,
    ignores_ranges: bool,
    guard: Option<Guard>,
    requests: Vec<Request>,
}

/// A challenge, and how often each token has been shown.
#[derive(Debug)]
struct Guard {
    challenge: String,
    uses: usize,
    used: HashMap<String, usize>,
}

/// A request that was made.
#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    /// The first byte asked for, where a range was.
    pub from: Option<usize>,
    authorization: Option<String>,
}

impl Served {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
        let address = listener.local_addr().expect("a bound listener has an address");
        let served = Self { address, shelf: Arc::default() };
        let shelf = served.shelf.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shelf = shelf.clone();
                std::thread::spawn(move || answer_all(stream, &shelf));
            }
        });
        served
    }

    /// The complete reference of `name` (`REPOSITORY:TAG`) here.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Puts an image here as `name` (`REPOSITORY:TAG`) and returns its complete reference.
    pub fn add(&self, name: &str, image: &Image) -> String {
        self.add_blobs(image);
        self.add_manifest(name, image.manifest.clone())
    }

    /// Puts a manifest or index here as it is.
    pub fn add_manifest(&self, name: &str, manifest: Vec<u8>) -> String {
        let repository = name.split(':').next().unwrap_or(name);
        let mut shelf = self.shelf.lock().expect("no holder panics");
        shelf.manifests.insert(format!("{repository}@{}", digest(&manifest)), manifest.clone());
        shelf.manifests.insert(name.to_owned(), manifest);
        self.image(name)
    }

    fn add_blobs(&self, image: &Image) {
        let mut shelf = self.shelf.lock().expect("no holder panics");
        shelf.blobs.insert(digest(&image.config), image.config.clone());
        for layer in &image.layers {
            shelf.blobs.insert(layer.digest(), layer.bytes.clone());
        }
    }

    /// Serves other bytes under a digest than belong there.
    pub fn falsify(&self, digest: &str, bytes: Vec<u8>) {
        self.shelf.lock().expect("no holder panics").blobs.insert(digest.to_owned(), bytes);
    }

    /// Breaks the next answer with this blob off after so many bytes of it.
    pub fn break_off(&self, digest: &str, after: usize) {
        self.shelf.lock().expect("no holder panics").broken_off.insert(digest.to_owned(), after);
    }

    /// Sends this blob slowly, so that something can happen meanwhile; `None` ends that.
    pub fn slow_down(&self, digest: &str, bytes_each_10_ms: Option<usize>) {
        let mut shelf = self.shelf.lock().expect("no holder panics");
        match bytes_each_10_ms {
            Some(bytes) => drop(shelf.slow.insert(digest.to_owned(), bytes)),
            None => drop(shelf.slow.remove(digest)),
        }
    }

    /// Answers with all of a blob whatever part of it is asked for.
    pub fn ignore_ranges(&self) {
        self.shelf.lock().expect("no holder panics").ignores_ranges = true;
    }

    /// Wants a bearer token from `realm` with every request; each token is good for so many.
    pub fn guard(&self, realm: &str, uses: usize) {
        let challenge = format!("Bearer realm=\"{realm}\",service=\"served\"");
        let guard = Guard { challenge, uses, used: HashMap::new() };
        self.shelf.lock().expect("no holder panics").guard = Some(guard);
    }

    /// The requests made for a path that contains `part`.
    pub fn requests(&self, part: &str) -> Vec<Request> {
        let shelf = self.shelf.lock().expect("no holder panics");
        shelf.requests.iter().filter(|request| request.path.contains(part)).cloned().collect()
    }
}

fn answer_all(stream: TcpStream, shelf: &Mutex<Shelf>) {
    let Ok(mut writer) = stream.try_clone() else { return };
    let mut reader = BufReader::new(stream);
    while let Some((method, request)) = read_request(&mut reader) {
        if answer(&mut writer, &method, &request, shelf).is_err() {
            return;
        }
    }
}

fn read_request(reader: &mut BufReader<TcpStream>) -> Option<(String, Request)> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|&length| length > 0)?;
    let mut words = line.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (mut from, mut authorization) = (None, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok().filter(|&length| length > 0)?;
        if header.to_ascii_lowercase().starts_with("authorization: ") {
            authorization = Some(header["authorization: ".len()..].trim().to_owned());
        }
        let header = header.trim().to_ascii_lowercase();
        if header.is_empty() {
            return Some((method, Request { path, from, authorization }));
        }
        if let Some(range) = header.strip_prefix("range: bytes=") {
            from = range.split('-').next().and_then(|first| first.parse().ok());
        }
    }
}

fn answer(writer: &mut TcpStream, method: &str, request: &Request, shelf: &Mutex<Shelf>) -> std::io::Result<()> {
    let (found, broken_off, slow) = {
        let mut shelf = shelf.lock().expect("no holder panics");
        shelf.requests.push(request.clone());
        if let Some(challenge) = shelf.guard.as_mut().and_then(|guard| guard.refuses(request)) {
            let head = "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nWWW-Authenticate";
            return write!(writer, "{head}: {challenge}\r\n\r\n");
        }
        let name = request.path.rsplit('/').next().unwrap_or_default();
        let slow = shelf.slow.get(name).copied();
        let (found, broken_off) = find(&mut shelf, method, &request.path);
        (found, broken_off, slow)
    };
    let ignores_ranges = shelf.lock().expect("no holder panics").ignores_ranges;
    let Some((kind, bytes)) = found else {
        let code = if request.path.contains("/blobs/") { "BLOB_UNKNOWN" } else { "MANIFEST_UNKNOWN" };
        let body = format!("{{\"errors\":[{{\"code\":\"{code}\",\"message\":\"not here\"}}]}}");
        return write!(
            writer,
            "HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
    };
    let first = request.from.filter(|&first| first < bytes.len() && !ignores_ranges);
    let rest = &bytes[first.unwrap_or(0)..];
    let (status, range) = match first {
        Some(first) => {
            ("206 Partial Content", format!("Content-Range: bytes {first}-{}/{}\r\n", bytes.len() - 1, bytes.len()))
        }
        None => ("200 OK", String::new()),
    };
    write!(
        writer,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nDocker-Content-Digest: {}\r\n{range}Accept-Ranges: bytes\r\n\
         Docker-Distribution-Api-Version: registry/2.0\r\nContent-Length: {}\r\n\r\n",
        digest(&bytes),
        rest.len()
    )?;
    if method == "HEAD" {
        return Ok(());
    }
    match broken_off {
        Some(after) if after < rest.len() => {
            writer.write_all(&rest[..after])?;
            writer.shutdown(std::net::Shutdown::Both)?;
            Err(std::io::Error::other("broken off on purpose"))
        }
        _ => match slow {
            Some(step) => rest.chunks(step).try_for_each(|piece| {
                // Not a wait for something: this is how slow it is.
                std::thread::sleep(std::time::Duration::from_millis(10));
                writer.write_all(piece)
            }),
            None => writer.write_all(rest),
        },
    }
}

impl Guard {
    /// The challenge for a request that shows no token, or one that has been used up.
    fn refuses(&mut self, request: &Request) -> Option<String> {
        let token = request.authorization.as_deref().and_then(|value| value.strip_prefix("Bearer "));
        let Some(token) = token else { return Some(self.challenge.clone()) };
        let used = self.used.entry(token.to_owned()).or_default();
        *used += 1;
        (*used > self.uses).then(|| self.challenge.clone())
    }
}

/// Content type and bytes of what a path names, and after how many bytes its answer is to end.
fn find(shelf: &mut Shelf, method: &str, path: &str) -> (Option<(String, Vec<u8>)>, Option<usize>) {
    let path = path.split('?').next().unwrap_or(path);
    let Some(rest) = path.strip_prefix("/v2/") else { return (None, None) };
    if rest.is_empty() {
        return (Some(("application/json".to_owned(), b"{}".to_vec())), None);
    }
    if let Some((repository, name)) = rest.split_once("/manifests/") {
        let separator = if name.starts_with("sha256:") { '@' } else { ':' };
        let Some(bytes) = shelf.manifests.get(&format!("{repository}{separator}{name}")) else { return (None, None) };
        let kind = serde_json::from_slice::<serde_json::Value>(bytes).ok();
        let kind = kind.and_then(|json| Some(json.get("mediaType")?.as_str()?.to_owned()));
        return (Some((kind.unwrap_or_else(|| "application/json".to_owned()), bytes.clone())), None);
    }
    let Some((_, name)) = rest.split_once("/blobs/") else { return (None, None) };
    let broken_off = if method == "GET" { shelf.broken_off.remove(name) } else { None };
    (shelf.blobs.get(name).map(|bytes| ("application/octet-stream".to_owned(), bytes.clone())), broken_off)
}
