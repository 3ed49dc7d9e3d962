//! A token service as registries name it in their challenges (Docker's token authentication): it knows one user, signs ES256 web
//! tokens with a key of its own, and remembers who asked.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};

use crate::registry::{PASSWORD, USER};

/// Who the tokens are from, and whom they are for.
pub const ISSUER: &str = "joey-tests";
pub const SERVICE: &str = "registry.test";
/// Repositories that need no user begin with this.
pub const PUBLIC: &str = "public/";

/// A token service on loopback. Lives as long as the test's process.
#[derive(Debug, Clone)]
pub struct Tokens {
    address: SocketAddr,
    /// The certificate that tokens are verified with, PEM.
    pub certificate: String,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// How many of the next tokens have expired when they are handed out.
    stale: usize,
    /// How many of the next requests are turned away, with which status, and when they are told to come again.
    turned_away: (usize, &'static str, Option<u32>),
    asked: Vec<Asked>,
}

/// A request for a token.
#[derive(Debug, Clone)]
pub struct Asked {
    pub scope: String,
    /// Whether credentials came along.
    pub with_credentials: bool,
    pub at: Instant,
}

struct Signer {
    key: EcdsaKeyPair,
    certificate: Vec<u8>,
}

impl Tokens {
    pub fn start() -> Self {
        let key = rcgen::KeyPair::generate().expect("a key can be made");
        let parameters = rcgen::CertificateParams::new(vec![SERVICE.to_owned()]).expect("the name is one");
        let certificate = parameters.self_signed(&key).expect("the key signs");
        let signer = Signer {
            key: EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key.serialize_der(), &SystemRandom::new())
                .expect("it is a P-256 key"),
            certificate: certificate.der().to_vec(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
        let address = listener.local_addr().expect("a bound listener has an address");
        let tokens = Self { address, certificate: certificate.pem(), shared: Arc::default() };
        let shared = tokens.shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // One after the other: a request is a few hundred bytes.
                let _ = answer(stream, &signer, &shared);
            }
        });
        tokens
    }

    /// What a challenge names.
    pub fn realm(&self) -> String {
        format!("http://{}/token", self.address)
    }

    /// The next tokens have expired when they are handed out.
    pub fn hand_out_stale(&self, count: usize) {
        self.shared.lock().expect("no holder panics").stale = count;
    }

    /// The next requests are turned away with `status`, such as `503 Service Unavailable`, and told to come again after so many
    /// seconds.
    pub fn turn_away(&self, count: usize, status: &'static str, after: Option<u32>) {
        self.shared.lock().expect("no holder panics").turned_away = (count, status, after);
    }

    /// Every request so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.lock().expect("no holder panics").asked.clone()
    }
}

fn answer(mut stream: TcpStream, signer: &Signer, shared: &Mutex<Shared>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut credentials = None;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = header.trim().split_once(": ")
            && name.eq_ignore_ascii_case("authorization")
        {
            credentials = Some(value.to_owned());
        }
    }
    let query = target.split_once('?').map_or("", |(_, query)| query);
    let pairs = form_urlencoded::parse(query.as_bytes());
    let scopes: Vec<String> = pairs.filter(|(key, _)| key == "scope").map(|(_, scope)| scope.into_owned()).collect();
    let right = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
    let known = credentials.as_ref().is_some_and(|given| *given == right);
    let (stale, turned_away) = {
        let mut shared = shared.lock().expect("no holder panics");
        let (scope, with_credentials) = (scopes.join(" "), credentials.is_some());
        shared.asked.push(Asked { scope, with_credentials, at: Instant::now() });
        let stale = shared.stale > 0;
        shared.stale = shared.stale.saturating_sub(1);
        let (left, status, after) = shared.turned_away;
        shared.turned_away.0 = left.saturating_sub(1);
        (stale, (left > 0).then_some((status, after)))
    };
    let mut more = String::new();
    let (status, body) = if let Some((status, after)) = turned_away {
        more = after.map(|seconds| format!("Retry-After: {seconds}\r\n")).unwrap_or_default();
        (status, json!({"errors": []}))
    } else if credentials.is_some() && !known {
        ("401 Unauthorized", json!({"errors": [{"code": "UNAUTHORIZED", "message": "unknown user or password"}]}))
    } else {
        let granted: Vec<Value> = scopes.iter().filter_map(|scope| granted(scope, known)).collect();
        ("200 OK", json!({"token": token(signer, &granted, stale), "expires_in": 300}))
    };
    let body = body.to_string();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{more}Connection: close\r\n\r\n{body}",
        body.len()
    )
}

/// What of `repository:NAME:ACTIONS` is granted: all to the user, pulling what is public to all.
fn granted(scope: &str, known: bool) -> Option<Value> {
    let mut parts = scope.splitn(3, ':');
    let (kind, name, actions) = (parts.next()?, parts.next()?, parts.next()?);
    let actions: Vec<&str> = if known {
        actions.split(',').collect()
    } else if name.starts_with(PUBLIC) {
        vec!["pull"]
    } else {
        return None;
    };
    Some(json!({"type": kind, "name": name, "actions": actions}))
}

fn token(signer: &Signer, access: &[Value], stale: bool) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is right").as_secs();
    // docker-registry allows a minute of difference between clocks.
    let (from, to) = if stale { (now - 3600, now - 600) } else { (now - 10, now + 300) };
    let header = json!({"typ": "JWT", "alg": "ES256", "x5c": [STANDARD.encode(&signer.certificate)]});
    let claims = json!({
        "iss": ISSUER, "aud": SERVICE, "sub": USER, "nbf": from, "iat": from, "exp": to, "access": access,
        "jti": crate::unique("token"),
    });
    let text = [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string())).join(".");
    let signature = signer.key.sign(&SystemRandom::new(), text.as_bytes()).expect("the key signs");
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
}
