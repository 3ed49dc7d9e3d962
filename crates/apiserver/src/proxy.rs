//! Logs, exec, attach and port-forward: passed on to the kubelet endpoint of the Pod's node.
//!
//! ```text
//!   client ══ upgrade ══ API server ══ TLS, client certificate, upgrade ══ kubelet endpoint of the node
//! ```
//! An upgraded connection is spliced byte for byte: whatever the two ends speak (WebSocket, SPDY) is theirs.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::object::{list, text};
use crate::request::Query;
use crate::status::{ApiError, ApiResult};
use crate::verbs::Call;
use crate::{Body, kinds};
use joey_pki::{Pki, PkiError};

/// Time to reach a node.
const CONNECT: Duration = Duration::from_secs(5);

/// The way to kubelet endpoints.
pub struct Kubelets {
    tls: tokio_rustls::TlsConnector,
}

impl Kubelets {
    pub fn new(pki: &Pki) -> Result<Self, PkiError> {
        Ok(Self { tls: tokio_rustls::TlsConnector::from(Arc::new(joey_pki::tls::kubelet_client(pki)?)) })
    }
}

/// GET or POST of a subresource that the node answers.
pub async fn connect(call: &Call<'_>, request: Request<Body>) -> ApiResult<Response<Body>> {
    let pod = call.current().await?.value;
    let path = kubelet_path(call, &pod)?;
    let (address, port) = endpoint(call, &pod).await?;
    let stream = open(call.state, text(&pod, "/spec/nodeName"), &address, port).await?;
    exchange(call.target.subresource_name(), stream, request, &path, (&address, port)).await
}

/// Path and query of the kubelet endpoint.
fn kubelet_path(call: &Call<'_>, pod: &Value) -> ApiResult<String> {
    let (namespace, name) = (&call.target.namespace, &call.target.name);
    let mut query = form_urlencoded::Serializer::new(String::new());
    let subresource = call.target.subresource_name();
    if subresource == "portforward" {
        for port in call.query.all("ports") {
            query.append_pair("port", port);
        }
        return Ok(with_query(format!("/portForward/{namespace}/{name}"), query.finish()));
    }
    let container = container(call.query, pod, name)?;
    if subresource == "log" {
        const LOG: [&str; 7] =
            ["follow", "previous", "sinceSeconds", "sinceTime", "timestamps", "tailLines", "limitBytes"];
        for key in LOG {
            if let Some(value) = call.query.get(key) {
                query.append_pair(key, value);
            }
        }
        return Ok(with_query(format!("/containerLogs/{namespace}/{name}/{container}"), query.finish()));
    }
    let tty = call.query.flag("tty");
    for word in call.query.all("command") {
        query.append_pair("command", word);
    }
    let streams = [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")];
    let mut any = false;
    for (theirs, kubelets) in streams {
        // A terminal has one output; an own error stream beside it does not exist.
        if call.query.flag(theirs) && !(theirs == "stderr" && tty) {
            any |= theirs != "tty";
            query.append_pair(kubelets, "1");
        }
    }
    if !any {
        return Err(ApiError::bad_request("you must specify at least one of stdin, stdout, stderr"));
    }
    if subresource == "exec" && call.query.all("command").next().is_none() {
        return Err(ApiError::bad_request("you must specify at least one command for the container"));
    }
    Ok(with_query(format!("/{subresource}/{namespace}/{name}/{container}"), query.finish()))
}

fn with_query(path: String, query: String) -> String {
    if query.is_empty() { path } else { format!("{path}?{query}") }
}

/// The container asked for, or the one to take when none is named.
fn container(query: &Query, pod: &Value, name: &str) -> ApiResult<String> {
    let mut names: Vec<&str> = Vec::new();
    for field in ["/spec/containers", "/spec/initContainers", "/spec/ephemeralContainers"] {
        names.extend(list(pod, field).iter().map(|container| text(container, "/name")));
    }
    match query.get("container").unwrap_or_default() {
        "" => {
            let marked = pod
                .pointer("/metadata/annotations")
                .and_then(|notes| notes.get("kubectl.kubernetes.io/default-container").and_then(Value::as_str));
            let main = list(pod, "/spec/containers");
            match (marked.filter(|marked| names.contains(marked)), main) {
                (Some(marked), _) => Ok(marked.to_owned()),
                (None, [only]) => Ok(text(only, "/name").to_owned()),
                (None, several) => {
                    let all: Vec<&str> = several.iter().map(|container| text(container, "/name")).collect();
                    Err(ApiError::bad_request(format!(
                        "a container name must be specified for pod {name}, choose one of: [{}]",
                        all.join(" ")
                    )))
                }
            }
        }
        wanted if names.contains(&wanted) => Ok(wanted.to_owned()),
        wanted => Err(ApiError::bad_request(format!("container {wanted} is not valid for pod {name}"))),
    }
}

/// Address and port of the kubelet endpoint of the Pod's node.
async fn endpoint(call: &Call<'_>, pod: &Value) -> ApiResult<(String, u16)> {
    let name = text(pod, "/spec/nodeName");
    if name.is_empty() {
        let what = match call.target.subresource_name() {
            "log" => format!("pod {} does not have a host assigned yet", call.target.name),
            _ => format!("pod {} does not have a host assigned", call.target.name),
        };
        return Err(ApiError::bad_request(what));
    }
    let nodes = kinds::find("", "v1", "nodes").ok_or_else(ApiError::no_such_path)?;
    let Some((node, _)) = call.state.read(&nodes.key("", name)).await? else {
        return Err(ApiError::not_found(nodes, name));
    };
    published(&node)
}

/// Where a node says that its kubelet answers.
fn published(node: &Value) -> ApiResult<(String, u16)> {
    let address = list(node, "/status/addresses").iter().find(|address| address["type"] == "InternalIP");
    let port = node.pointer("/status/daemonEndpoints/kubeletEndpoint/Port").and_then(Value::as_u64);
    match (address.map(|address| text(address, "/address")), port.and_then(|port| u16::try_from(port).ok())) {
        (Some(address), Some(port)) if port > 0 => Ok((address.to_owned(), port)),
        _ => {
            let name = text(node, "/metadata/name");
            Err(ApiError::unavailable(format!("node \"{name}\" has not published where its kubelet answers")))
        }
    }
}

/// The largest answer that is read as a whole, bytes.
const ANSWER: usize = 32 << 20;

/// GET of a path of a node's kubelet endpoint, read as JSON.
pub async fn ask(state: &crate::State, node: &Value, path: &str) -> ApiResult<Value> {
    let (address, port) = published(node)?;
    let asking = async {
        let stream = open(state, text(node, "/metadata/name"), &address, port).await?;
        let internal = |error: hyper::Error| ApiError::internal(format!("the node did not answer: {error}"));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(internal)?;
        tokio::spawn(connection);
        let request = Request::builder().uri(path).header(header::HOST, format!("{address}:{port}"));
        let answer = sender.send_request(request.body(crate::empty()).map_err(ApiError::internal)?).await;
        let answer = answer.map_err(internal)?;
        if !answer.status().is_success() {
            return Err(ApiError::unavailable(format!("the node answered {}", answer.status())));
        }
        let body = http_body_util::Limited::new(answer.into_body(), ANSWER).collect().await;
        serde_json::from_slice(&body.map_err(ApiError::internal)?.to_bytes()).map_err(ApiError::internal)
    };
    tokio::time::timeout(Duration::from_secs(20), asking).await.map_err(|_| ApiError::timeout())?
}

async fn open(
    state: &crate::State,
    node: &str,
    address: &str,
    port: u16,
) -> ApiResult<tokio_rustls::client::TlsStream<TcpStream>> {
    let away = |error: &dyn std::fmt::Display| {
        tracing::warn!(address, port, %error, "a kubelet endpoint could not be reached");
        ApiError::unavailable(format!("node \"{node}\" could not be reached"))
    };
    let name = ServerName::try_from(address.to_owned()).map_err(|error| away(&error))?;
    let connecting = async {
        let stream = TcpStream::connect((address, port)).await?;
        stream.set_nodelay(true)?;
        state.kubelets.tls.connect(name, stream).await
    };
    match tokio::time::timeout(CONNECT, connecting).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(away(&error)),
        Err(_) => Err(away(&"no answer in time")),
    }
}

/// Sends the request on and brings the answer back; splices when both ends upgrade.
async fn exchange(
    subresource: &str,
    stream: tokio_rustls::client::TlsStream<TcpStream>,
    mut request: Request<Body>,
    path: &str,
    (address, port): (&str, u16),
) -> ApiResult<Response<Body>> {
    let internal = |error: hyper::Error| ApiError::internal(format!("the node did not answer: {error}"));
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(internal)?;
    tokio::spawn(connection.with_upgrades());
    let wants_upgrade = request.headers().contains_key(header::UPGRADE);
    if !wants_upgrade && subresource != "log" {
        let message = "Upgrade request required";
        return Err(ApiError::bad_request(message));
    }
    let theirs = wants_upgrade.then(|| hyper::upgrade::on(&mut request));
    let method = if subresource == "log" { Method::GET } else { request.method().clone() };
    let mut onward = Request::builder().method(method).uri(path).header(header::HOST, format!("{address}:{port}"));
    if let Some(headers) = onward.headers_mut() {
        copy_headers(request.headers(), headers);
    }
    let onward = onward.body(crate::empty()).map_err(ApiError::internal)?;
    let mut answer = sender.send_request(onward).await.map_err(internal)?;
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS
        && let Some(theirs) = theirs
    {
        let kubelets = hyper::upgrade::on(&mut answer);
        tokio::spawn(async move {
            let (Ok(theirs), Ok(kubelets)) = tokio::join!(theirs, kubelets) else { return };
            let (mut theirs, mut kubelets) = (TokioIo::new(theirs), TokioIo::new(kubelets));
            // Either end may go at any time; there is nobody left to tell.
            let _ = tokio::io::copy_bidirectional(&mut theirs, &mut kubelets).await;
        });
        let (parts, _) = answer.into_parts();
        return Ok(Response::from_parts(parts, crate::empty()));
    }
    pass_answer(answer).await
}

/// Headers of the upgrade and of the protocols spoken over it; credentials stay here.
fn copy_headers(from: &HeaderMap, to: &mut HeaderMap) {
    for (name, value) in from {
        let word = name.as_str();
        let wanted = word.starts_with("sec-websocket-")
            || matches!(word, "upgrade" | "connection" | "x-stream-protocol-version" | "origin");
        if wanted {
            to.append(name.clone(), value.clone());
        }
    }
}

/// An answer without upgrade: logs as they are, errors as a Status.
async fn pass_answer(answer: Response<hyper::body::Incoming>) -> ApiResult<Response<Body>> {
    const DROPPED: [HeaderName; 3] = [header::CONNECTION, header::TRANSFER_ENCODING, header::UPGRADE];
    let (mut parts, body) = answer.into_parts();
    if parts.status.is_success() {
        for name in &DROPPED {
            parts.headers.remove(name);
        }
        parts.headers.entry(header::CONTENT_TYPE).or_insert(header::HeaderValue::from_static("text/plain"));
        return Ok(Response::from_parts(parts, body.map_err(std::io::Error::other).boxed_unsync()));
    }
    let limited = http_body_util::Limited::new(body, 64 << 10).collect().await;
    let bytes = limited.map(|body| body.to_bytes()).unwrap_or_default();
    if let Ok(status) = serde_json::from_slice::<Value>(&bytes)
        && status["kind"] == "Status"
    {
        return Ok(crate::status::json_response(parts.status, &status));
    }
    let said = String::from_utf8_lossy(&bytes);
    let mut error = match parts.status {
        StatusCode::NOT_FOUND => ApiError::new(parts.status, "NotFound", said.trim()),
        StatusCode::BAD_REQUEST => ApiError::bad_request(said.trim()),
        status if status.is_client_error() => ApiError::new(status, "BadRequest", said.trim()),
        _ => ApiError::internal(said.trim()),
    };
    if error.message.is_empty() {
        error.message = format!("the node answered {}", parts.status);
    }
    Err(error)
}
