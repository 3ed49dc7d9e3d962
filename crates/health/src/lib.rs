//! Asks over the network whether something is well, as a kubelet does: HTTP(S), TCP, the health protocol of gRPC. Whom to ask is
//! said by an instance's own address, or by another one. Names are not looked up: that takes a thread, and the agent has one.
//!
//! Beside that, two rules without a clock of their own: what answers in a row are worth, and how long what ended waits for its
//! next run.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Request, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::{TokioExecutor, TokioIo};
use joey_api::lifecycle::HttpGet;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

mod backoff;
mod certificate;
mod counted;

pub use backoff::Backoff;
pub use counted::{Answer, Counted};

/// Body of an answer that is kept for the message.
const KEPT: usize = 10 << 10;
/// Longest answer to a health check of gRPC: two bytes would do.
const ANSWER: usize = 64 << 10;
/// Redirections to the same host that are followed.
const REDIRECTIONS: usize = 10;
/// Who asks by HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asker {
    /// Wants to know whether it is well: its answer's status is below 400.
    Probe,
    /// Tells that something begins or ends: any answer is an answer.
    Hook,
}

impl Asker {
    /// The name under which kubelets make themselves known to servers.
    fn name(self) -> &'static str {
        match self {
            Self::Probe => "kube-probe/1.36",
            Self::Hook => "kube-lifecycle/1.36",
        }
    }
}

/// Why an action was not good, in words for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unwell(pub String);

impl From<io::Error> for Unwell {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

/// A GET that is answered within `limit`. The certificate is not checked.
pub async fn http(own: Option<IpAddr>, get: &HttpGet, asker: Asker, limit: Duration) -> Result<(), Unwell> {
    let url = url(own, get)?;
    within(limit, http_get(&url, get, asker), || format!("Get \"{url}\"")).await
}

/// A connection, which is closed at once.
pub async fn tcp(own: Option<IpAddr>, host: Option<&str>, port: u16, limit: Duration) -> Result<(), Unwell> {
    let place = place(own, host, port)?;
    within(limit, connect(place), || format!("dial tcp {place}")).await.map(drop)
}

/// One call of `grpc.health.v1.Health/Check`.
pub async fn grpc(own: Option<IpAddr>, port: u16, service: &str, limit: Duration) -> Result<(), Unwell> {
    let place = place(own, None, port)?;
    let what = || format!("health check of service \"{service}\" at {place}");
    within(limit, health_check(place, service), what).await
}

async fn within<T>(
    limit: Duration,
    asking: impl Future<Output = Result<T, Unwell>>,
    what: impl FnOnce() -> String,
) -> Result<T, Unwell> {
    let asked = tokio::time::timeout(limit, asking).await;
    asked.unwrap_or_else(|_| Err(Unwell(format!("{}: no answer within {} s", what(), limit.as_secs()))))
}

/// Where to ask: at the instance's own address where no host is given.
fn place(own: Option<IpAddr>, host: Option<&str>, port: u16) -> Result<SocketAddr, Unwell> {
    let address = match host.filter(|host| !host.is_empty()) {
        Some(host) => host.parse::<IpAddr>().map_err(|_| Unwell(format!("host \"{host}\" is no IP address")))?,
        None => own.unwrap_or(Ipv4Addr::LOCALHOST.into()),
    };
    Ok(SocketAddr::new(address, port))
}

async fn connect(place: SocketAddr) -> Result<TcpStream, Unwell> {
    TcpStream::connect(place).await.map_err(|error| {
        let why = match error.kind() {
            io::ErrorKind::ConnectionRefused => "connect: connection refused".to_owned(),
            _ => error.to_string(),
        };
        Unwell(format!("dial tcp {place}: {why}"))
    })
}

fn url(own: Option<IpAddr>, get: &HttpGet) -> Result<String, Unwell> {
    let scheme = if get.https { "https" } else { "http" };
    let slash = if get.path.starts_with('/') { "" } else { "/" };
    let place = place(own, get.host.as_deref(), get.port)?;
    Ok(format!("{scheme}://{place}{slash}{}", get.path))
}

/// A byte stream, in the clear or not.
trait Wire: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Wire for T {}

async fn http_get(url: &str, get: &HttpGet, asker: Asker) -> Result<(), Unwell> {
    let first: Uri = url.parse().map_err(|error| Unwell(format!("path \"{}\": {error}", get.path)))?;
    let mut uri = first.clone();
    for _ in 0..=REDIRECTIONS {
        let (status, location, body) = one_get(&uri, &get.headers, asker).await?;
        if asker == Asker::Probe && !(200..400).contains(&status) {
            let body = if body.is_empty() { String::new() } else { format!(": {body}") };
            return Err(Unwell(format!("HTTP probe failed with statuscode: {status}{body}")));
        }
        match location.and_then(|location| resolve(&uri, &location)) {
            // Elsewhere is somebody else's health: the answer of this server counts.
            Some(next) if (300..400).contains(&status) && next.host() == first.host() => uri = next,
            _ => return Ok(()),
        }
    }
    Err(Unwell(format!("Get \"{first}\": stopped after {REDIRECTIONS} redirects")))
}

/// Where a redirection leads: a whole URL, or a path of the same server.
fn resolve(from: &Uri, location: &str) -> Option<Uri> {
    if location.starts_with('/') && !location.starts_with("//") {
        return format!("{}://{}{location}", from.scheme_str()?, from.authority()?).parse().ok();
    }
    location.parse::<Uri>().ok().filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")))
}

async fn one_get(
    uri: &Uri,
    headers: &[(String, String)],
    asker: Asker,
) -> Result<(u16, Option<String>, String), Unwell> {
    let said = |error: &dyn std::fmt::Display| Unwell(format!("Get \"{uri}\": {error}"));
    let https = uri.scheme_str() == Some("https");
    let host = uri.host().unwrap_or_default();
    let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
    let place: SocketAddr = format!("{host}:{port}").parse().map_err(|error| said(&error))?;
    let plain = connect(place).await.map_err(|error| said(&error.0))?;
    let wire: Pin<Box<dyn Wire>> = match https {
        true => Box::pin(certificate::unchecked(host, plain).await.map_err(|error| said(&error))?),
        false => Box::pin(plain),
    };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(wire)).await.map_err(|error| said(&error))?;
    let _connection = Background(tokio::spawn(async move {
        let _ = connection.await;
    }));
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut request = Request::get(path);
    let given = |name: &str| headers.iter().any(|(known, _)| known.eq_ignore_ascii_case(name));
    for (name, value) in headers {
        request = request.header(name, value);
    }
    if !given("host") {
        request = request.header(header::HOST, uri.authority().map_or(host, |authority| authority.as_str()));
    }
    if !given("user-agent") {
        request = request.header(header::USER_AGENT, asker.name());
    }
    if !given("accept") {
        request = request.header(header::ACCEPT, "*/*");
    }
    let request = request.body(Full::<Bytes>::default()).map_err(|error| said(&error))?;
    let answer = sender.send_request(request).await.map_err(|error| said(&error))?;
    let status = answer.status().as_u16();
    let location = answer.headers().get(header::LOCATION).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let mut body = answer.into_body();
    let mut kept = BytesMut::new();
    while kept.len() < KEPT
        && let Some(Ok(frame)) = body.frame().await
    {
        if let Some(data) = frame.data_ref() {
            kept.extend_from_slice(&data[..data.len().min(KEPT - kept.len())]);
        }
    }
    Ok((status, location, String::from_utf8_lossy(&kept).into_owned()))
}

/// A task that ends with its owner.
struct Background(tokio::task::JoinHandle<()>);

impl Drop for Background {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// One call of the gRPC health protocol (`grpc.health.v1`). Its two messages have one field each, so they are written and read
/// here: `HealthCheckRequest.service` is field 1, text; `HealthCheckResponse.status` is field 1, an enumeration.
async fn health_check(place: SocketAddr, service: &str) -> Result<(), Unwell> {
    let said =
        |error: &dyn std::fmt::Display| Unwell(format!("health check of service \"{service}\" at {place}: {error}"));
    let plain = connect(place).await?;
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(plain))
        .await
        .map_err(|error| said(&error))?;
    let _connection = Background(tokio::spawn(async move {
        let _ = connection.await;
    }));
    let request = Request::post(format!("http://{place}/grpc.health.v1.Health/Check"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(header::USER_AGENT, Asker::Probe.name())
        .body(Full::new(health_request(service)))
        .map_err(|error| said(&error))?;
    let answer = sender.send_request(request).await.map_err(|error| said(&error))?;
    let in_head = grpc_status(answer.headers());
    let whole = Limited::new(answer.into_body(), ANSWER).collect().await.map_err(|error| said(&error))?;
    let status = in_head.or_else(|| whole.trailers().and_then(grpc_status)).unwrap_or(0);
    match (status, health_answer(&whole.to_bytes())) {
        (0, Some(1)) => Ok(()),
        (0, Some(other)) => {
            let name =
                ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"].get(other as usize).unwrap_or(&"UNKNOWN");
            Err(Unwell(format!("service unhealthy (responded with \"{name}\")")))
        }
        (0, None) => Err(said(&"the answer is not understood")),
        (12, _) => Err(Unwell(format!(
            "this server does not implement the grpc health protocol (grpc.health.v1.Health): {place}"
        ))),
        (5, _) => Err(said(&"the server does not know the service")),
        (code, _) => Err(said(&format_args!("rpc error: code = {code}"))),
    }
}

fn grpc_status(headers: &http::HeaderMap) -> Option<u32> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// The five bytes of a gRPC message's head, then field 1 as text when it is not empty.
fn health_request(service: &str) -> Bytes {
    let mut message = Vec::new();
    if !service.is_empty() {
        message.push(0x0a);
        let mut length = service.len();
        while length > 0x7f {
            message.push((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        message.push(length as u8);
        message.extend_from_slice(service.as_bytes());
    }
    let mut whole = vec![0];
    whole.extend_from_slice(&(message.len() as u32).to_be_bytes());
    whole.extend(message);
    whole.into()
}

/// The status of the first message; a message without the field has its default, 0.
fn health_answer(bytes: &[u8]) -> Option<u8> {
    let (head, rest) = bytes.split_at_checked(5)?;
    let length = u32::from_be_bytes(head[1..].try_into().ok()?) as usize;
    match (head[0], rest.get(..length)?) {
        (0, []) => Some(0),
        (0, [0x08, status, ..]) => Some(*status),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_messages() {
        assert_eq!(&health_request("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&health_request("ab")[..], [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        let long = health_request(&"x".repeat(200));
        assert_eq!((&long[5..8], long.len()), (&[0x0a, 0xc8, 0x01][..], 208));
        assert_eq!(health_answer(&[0, 0, 0, 0, 2, 8, 1]), Some(1));
        assert_eq!(health_answer(&[0, 0, 0, 0, 0]), Some(0));
        for broken in [&[][..], &[0, 0, 0, 0, 2, 8], &[1, 0, 0, 0, 2, 8, 1], &[0, 255, 255, 255, 255]] {
            assert_eq!(health_answer(broken), None);
        }
    }

    /// A server whose answer to a call of HTTP/2 has this body.
    async fn answering(body: Vec<u8>) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let place = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let body = Bytes::from(body);
            let service = hyper::service::service_fn(move |_: Request<hyper::body::Incoming>| {
                let answer = http::Response::new(Full::new(body.clone()));
                std::future::ready(Ok::<_, std::convert::Infallible>(answer))
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            // Who has heard enough goes away.
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        });
        place
    }

    #[tokio::test]
    async fn an_answer_that_goes_on_and_on_is_none() {
        let (limit, serving) = (Duration::from_secs(10), vec![0, 0, 0, 0, 2, 8, 1]);
        let place = answering(serving.clone()).await;
        assert_eq!(grpc(Some(place.ip()), place.port(), "", limit).await, Ok(()));
        let place = answering([serving, vec![0; ANSWER]].concat()).await;
        let Unwell(why) = grpc(Some(place.ip()), place.port(), "", limit).await.unwrap_err();
        assert!(why.contains("length limit"), "{why}");
    }

    #[test]
    fn hosts_are_addresses() {
        let own = "10.0.0.1".parse().ok();
        let at = |own, host| place(own, host, 80).map(|place| place.to_string()).map_err(|Unwell(why)| why);
        assert_eq!(at(own, None).as_deref(), Ok("10.0.0.1:80"));
        assert_eq!(at(own, Some("")).as_deref(), Ok("10.0.0.1:80"));
        assert_eq!(at(None, None).as_deref(), Ok("127.0.0.1:80"));
        assert_eq!(at(own, Some("fd00::1")).as_deref(), Ok("[fd00::1]:80"));
        assert_eq!(at(own, Some("localhost")).unwrap_err(), "host \"localhost\" is no IP address");
    }

    #[test]
    fn redirections() {
        let from: Uri = "http://10.0.0.1:8080/a?b".parse().unwrap();
        let to = |location: &str| resolve(&from, location).map(|uri| uri.to_string());
        assert_eq!(to("/ready").as_deref(), Some("http://10.0.0.1:8080/ready"));
        assert_eq!(to("https://10.0.0.1/x").as_deref(), Some("https://10.0.0.1/x"));
        assert_eq!(to("//elsewhere/x"), None);
        assert_eq!(to("javascript:1"), None);
    }
}
