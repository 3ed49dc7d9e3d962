//! A registry of this test's own that can lie, break off and hang, and layers made by hand.

#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::Digest as _;

#[derive(Clone)]
pub enum Answer {
    Body(Vec<u8>),
    /// Sends so many bytes of the whole, then nothing, with the connection open.
    HangAfter(Vec<u8>, usize),
    Redirect(String),
}

#[derive(Default)]
struct Shared {
    answers: HashMap<String, Answer>,
    /// Path, first byte asked for, whether there was an Authorization header.
    asked: Vec<(String, usize, bool)>,
    required: Option<String>,
}

pub struct Registry {
    pub address: String,
    shared: Arc<Mutex<Shared>>,
}

pub fn sha256(bytes: &[u8]) -> String {
    let digest: [u8; 32] = sha2::Sha256::digest(bytes).into();
    joey_model::Digest::from_sha256(&digest).to_string()
}

impl Registry {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Mutex::new(Shared::default()));
        let state = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = state.clone();
                std::thread::spawn(move || drop(serve(stream, &state)));
            }
        });
        Self { address, shared }
    }

    pub fn set(&self, path: &str, answer: Answer) {
        self.shared.lock().unwrap().answers.insert(path.to_owned(), answer);
    }

    pub fn require(&self, authorization: &str) {
        self.shared.lock().unwrap().required = Some(authorization.to_owned());
    }

    pub fn count(&self, path: &str) -> usize {
        self.shared.lock().unwrap().asked.iter().filter(|asked| asked.0 == path).count()
    }

    pub fn ranges(&self, path: &str) -> Vec<usize> {
        self.shared.lock().unwrap().asked.iter().filter(|asked| asked.0 == path).map(|asked| asked.1).collect()
    }

    pub fn authorizations(&self) -> usize {
        self.shared.lock().unwrap().asked.iter().filter(|asked| asked.2).count()
    }

    /// Serves an image of these layers as `team/app:TAG`.
    pub fn image(&self, tag: &str, layers: &[Built]) {
        let diff_ids: Vec<String> = layers.iter().map(|layer| format!("\"{}\"", layer.diff_id)).collect();
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","config":{{"Cmd":["/bin/{tag}"]}},"rootfs":{{"diff_ids":[{}]}}}}"#,
            diff_ids.join(",")
        )
        .replace("amd64", if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" });
        let descriptor = |kind: &str, bytes: &[u8]| {
            format!(r#"{{"mediaType":"{kind}","digest":"{}","size":{}}}"#, sha256(bytes), bytes.len())
        };
        let of_layers: Vec<String> =
            layers.iter().map(|layer| descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &layer.blob)).collect();
        let manifest = format!(
            r#"{{"schemaVersion":2,"config":{},"layers":[{}]}}"#,
            descriptor("application/vnd.oci.image.config.v1+json", config.as_bytes()),
            of_layers.join(",")
        );
        for bytes in layers.iter().map(|layer| layer.blob.clone()).chain([config.into_bytes()]) {
            self.set(&format!("/v2/team/app/blobs/{}", sha256(&bytes)), Answer::Body(bytes));
        }
        self.set(&format!("/v2/team/app/manifests/{tag}"), Answer::Body(manifest.into_bytes()));
    }
}

fn serve(stream: TcpStream, shared: &Mutex<Shared>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).unwrap_or("/").to_owned();
        let (mut from, mut authorization) = (0, None);
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            let Some((name, value)) = header.trim_end().split_once(": ") else { break };
            match name.to_ascii_lowercase().as_str() {
                "range" => from = value.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap_or(0),
                "authorization" => authorization = Some(value.to_owned()),
                _ => {}
            }
        }
        let (answer, allowed) = {
            let mut shared = shared.lock().unwrap();
            shared.asked.push((path.clone(), from, authorization.is_some()));
            let allowed = shared.required.is_none() || shared.required == authorization;
            (shared.answers.get(&path).cloned(), allowed)
        };
        let head = |status: &str, length: usize, more: &str| {
            format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{more}\r\n").into_bytes()
        };
        let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
        match answer {
            _ if !allowed => {
                stream.write_all(&head("401 Unauthorized", 0, "WWW-Authenticate: Basic realm=\"x\"\r\n"))?
            }
            None => stream.write_all(&head("404 Not Found", 0, ""))?,
            Some(Answer::Redirect(to)) => {
                stream.write_all(&head("307 Temporary Redirect", 0, &format!("Location: {to}\r\n")))?;
            }
            Some(Answer::Body(bytes)) => {
                let bytes = &bytes[from.min(bytes.len())..];
                stream.write_all(&head(status, bytes.len(), ""))?;
                stream.write_all(bytes)?;
            }
            Some(Answer::HangAfter(bytes, stop)) => {
                stream.write_all(&head(status, bytes.len() - from, ""))?;
                stream.write_all(&bytes[from..stop.max(from)])?;
                // Until the client gives up.
                let _ = reader.read_line(&mut String::new());
                return Ok(());
            }
        }
    }
}

/// A compressed layer and the digest of its archive.
#[derive(Clone)]
pub struct Built {
    pub blob: Vec<u8>,
    pub diff_id: String,
}

pub struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn header(kind: u8, size: usize, mode: u32, owner: (u64, u64)) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_size(size as u64);
        header.set_mode(mode);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        header.set_mtime(1_600_000_000);
        header
    }

    pub fn file(&mut self, path: &str, bytes: &[u8], mode: u32, owner: (u64, u64)) {
        let mut header = Self::header(b'0', bytes.len(), mode, owner);
        self.0.append_data(&mut header, path, bytes).unwrap();
    }

    /// A path the tar crate would refuse to write.
    pub fn raw_path(&mut self, path: &[u8], bytes: &[u8]) {
        let mut header = Self::header(b'0', bytes.len(), 0o644, (0, 0));
        header.as_mut_bytes()[..path.len()].copy_from_slice(path);
        header.set_cksum();
        self.0.append(&header, bytes).unwrap();
    }

    pub fn link(&mut self, path: &str, target: &str) {
        self.0.append_link(&mut Self::header(b'1', 0, 0o644, (0, 0)), path, target).unwrap();
    }

    pub fn directory(&mut self, path: &str, mode: u32, owner: (u64, u64)) {
        self.0.append_data(&mut Self::header(b'5', 0, mode, owner), path, &[][..]).unwrap();
    }

    pub fn symlink(&mut self, path: &str, target: &str) {
        self.0.append_link(&mut Self::header(b'2', 0, 0o777, (0, 0)), path, target).unwrap();
    }

    pub fn device(&mut self, path: &str, kind: u8, number: (u32, u32)) {
        let mut header = Self::header(kind, 0, 0o666, (0, 0));
        header.set_device_major(number.0).unwrap();
        header.set_device_minor(number.1).unwrap();
        self.0.append_data(&mut header, path, &[][..]).unwrap();
    }

    pub fn pax(&mut self, records: &[(&str, &[u8])]) {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
    }

    fn archive(self) -> (Vec<u8>, String) {
        let bytes = self.0.into_inner().unwrap();
        let diff_id = sha256(&bytes);
        (bytes, diff_id)
    }

    pub fn plain(self) -> Built {
        let (blob, diff_id) = self.archive();
        Built { blob, diff_id }
    }

    pub fn gzip(self) -> Built {
        let (bytes, diff_id) = self.archive();
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&bytes).unwrap();
        Built { blob: encoder.finish().unwrap(), diff_id }
    }

    pub fn zstd(self) -> Built {
        let (bytes, diff_id) = self.archive();
        Built { blob: zstd::encode_all(&bytes[..], 1).unwrap(), diff_id }
    }
}
