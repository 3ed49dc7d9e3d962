//! The kubelet endpoints: logs, exec, attach, port forwarding and figures of this node's Pods, for the API server. HTTP/1.1
//! over TLS.

use std::sync::Arc;

use futures::StreamExt;
use http::{Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use jiff::{SignedDuration, Timestamp};
use joey_api::instance::{ContainerState, ExecRequest, Instance, LogOptions};
use joey_rpc::{Body, full};
use k8s_openapi::api::core::v1::Pod;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::pods::Registry;
use crate::provider::{ByteStream, Frames, Provider};
use crate::serving::{self, Caller};
use joey_podspec::all_containers;

mod figures;
mod forward;
mod session;
mod spdy_session;
mod spdy_transport;
mod websocket;

/// What every request needs.
#[derive(Clone)]
pub(crate) struct Kubelet {
    client: kube::Client,
    provider: Arc<dyn Provider>,
    registry: Arc<Registry>,
    config: Arc<Config>,
    figures: Arc<figures::Figures>,
}

type Answer = Response<Body>;
/// Why a Pod's container cannot be reached.
type Refusal = (StatusCode, String);

fn text(status: StatusCode, message: impl Into<String>) -> Answer {
    let mut answer = Response::new(full(message.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

/// Answers until `shutdown`.
pub(crate) async fn serve(
    listener: TcpListener,
    identity: serving::Identity,
    kubelet: Kubelet,
    shutdown: CancellationToken,
) {
    let (mut tls, following) = serving::tls(kubelet.client.clone(), &kubelet.config, identity);
    let following = async {
        match following.await {
            // What was taken last goes on being served.
            Ok(()) => tracing::warn!("the cluster's client authority is no longer followed"),
            Err(error) => tracing::error!(%error, "kubelet endpoints are not served"),
        }
        std::future::pending::<()>().await
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = following => {}
        () = async { if tls.ready().await.is_some() { accept(listener, tls, kubelet, &shutdown).await } } => {}
    }
    shutdown.cancelled().await;
}

/// Takes connections until `shutdown`.
async fn accept(listener: TcpListener, tls: serving::Tls, kubelet: Kubelet, shutdown: &CancellationToken) {
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let Some(current) = tls.current() else { continue };
                let (acceptor, kubelet, shutdown) = (TlsAcceptor::from(current), kubelet.clone(), shutdown.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        () = shutdown.cancelled() => {}
                        () = kubelet.connection(acceptor, stream) => {}
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    }
}

impl Kubelet {
    pub(crate) fn new(
        client: kube::Client,
        provider: Arc<dyn Provider>,
        registry: Arc<Registry>,
        config: Arc<Config>,
    ) -> Self {
        Self { client, provider, registry, config, figures: Arc::default() }
    }

    async fn connection(self, acceptor: TlsAcceptor, stream: TcpStream) {
        let handshake = tokio::time::timeout(std::time::Duration::from_secs(10), acceptor.accept(stream));
        let Ok(Ok(stream)) = handshake.await else { return };
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let caller = certificate.and_then(serving::certificate_caller);
        let service = hyper::service::service_fn(move |request| {
            let (kubelet, caller) = (self.clone(), caller.clone());
            async move { Ok::<_, std::convert::Infallible>(kubelet.answer(request, caller).await) }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "connection to the kubelet endpoints ended");
        }
    }

    async fn answer(&self, request: Request<Incoming>, caller: Option<Caller>) -> Answer {
        let bearer = request
            .headers()
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "))
            .map(str::to_owned);
        let caller = match (caller, bearer) {
            (Some(caller), _) => Some(caller),
            (None, Some(token)) => serving::token_caller(&self.client, &token).await,
            (None, None) => None,
        };
        let Some(caller) = caller else { return text(StatusCode::UNAUTHORIZED, "Unauthorized") };
        let path = request.uri().path().to_owned();
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let interactive = matches!(parts.first(), Some(&"exec" | &"attach" | &"run" | &"portForward"));
        let verb = if request.method() == Method::GET && !interactive { "get" } else { "create" };
        if !serving::allowed(&self.client, &self.config, &caller, verb).await {
            return text(StatusCode::FORBIDDEN, format!("Forbidden (user={}, verb={verb}, nodes/proxy)", caller.user));
        }
        match parts.as_slice() {
            ["healthz"] => text(StatusCode::OK, "ok"),
            ["pods"] => self.pods(),
            ["containerLogs", namespace, pod, container] => self.logs(namespace, pod, container, &request).await,
            ["exec" | "attach", namespace, pod, container] | ["exec" | "attach", namespace, pod, _, container] => {
                let attach = parts[0] == "attach";
                self.interact(attach, (namespace, pod, container), request).await
            }
            ["portForward", namespace, pod] | ["portForward", namespace, pod, _] => {
                self.port_forward(namespace, pod, request)
            }
            ["stats", "summary"] => {
                let (registry, provider) = (&self.registry, &*self.provider);
                joey_rpc::json_answer(&self.figures.summary(registry, provider, &self.config).await)
            }
            ["metrics", "resource"] => {
                text(StatusCode::OK, self.figures.metrics(&self.registry, &*self.provider).await)
            }
            _ => text(StatusCode::NOT_FOUND, "404 page not found"),
        }
    }

    fn pods(&self) -> Answer {
        let items: Vec<_> = self.registry.pods().iter().map(|pod| serde_json::json!(**pod)).collect();
        let list = serde_json::json!({ "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items });
        joey_rpc::json_answer(&list)
    }

    /// A Pod of this node that has the container, and its instance when there is one.
    fn find(&self, namespace: &str, pod: &str, container: &str) -> Result<(Arc<Pod>, Option<Arc<Instance>>), Refusal> {
        let missing = |message: String| (StatusCode::NOT_FOUND, message);
        let (found, instance) = self
            .registry
            .find(namespace, pod)
            .ok_or_else(|| missing(format!("pod \"{namespace}/{pod}\" is not on this node")))?;
        let main = found.spec.iter().flat_map(all_containers).any(|(_, known)| known.name == container);
        let debug = found.spec.iter().flat_map(|spec| spec.ephemeral_containers.iter().flatten());
        if !main && !debug.into_iter().any(|known| known.name == container) {
            return Err(missing(format!("container \"{container}\" is not in pod \"{namespace}/{pod}\"")));
        }
        Ok((found, instance))
    }

    async fn logs(&self, namespace: &str, pod: &str, container: &str, request: &Request<Incoming>) -> Answer {
        let options = log_options(request.uri().query().unwrap_or_default(), Timestamp::now());
        let (found, instance) = match self.find(namespace, pod, container) {
            Ok(found) => found,
            Err((status, message)) => return text(status, message),
        };
        if let Some(message) = no_log(&found, instance.as_deref(), container, options.previous) {
            return text(StatusCode::BAD_REQUEST, message);
        }
        let Some(instance) = instance else {
            return text(
                StatusCode::BAD_REQUEST,
                format!("container \"{container}\" in pod \"{pod}\" is not available"),
            );
        };
        match self.provider.logs(&instance.id, container, &options).await {
            Ok(bytes) => {
                let mut answer = Response::new(joey_rpc::stream(bytes));
                let plain = header::HeaderValue::from_static("text/plain; charset=utf-8");
                answer.headers_mut().insert(header::CONTENT_TYPE, plain);
                answer
            }
            Err(fault) => refused(&fault),
        }
    }

    async fn interact(&self, attach: bool, at: (&str, &str, &str), request: Request<Incoming>) -> Answer {
        let instance = match self.find(at.0, at.1, at.2) {
            Ok((_, Some(instance))) => instance,
            // In the kubelet's words.
            Ok((_, None)) => return text(StatusCode::NOT_FOUND, format!("container not found (\"{}\")", at.2)),
            Err((status, message)) => return text(status, message),
        };
        let wanted = exec_request(request.uri().query().unwrap_or_default());
        let call = Call {
            provider: self.provider.clone(),
            id: instance.id.clone(),
            container: at.2.to_owned(),
            wanted,
            attach,
        };
        let upgrade = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        match upgrade.to_ascii_lowercase().as_str() {
            "websocket" => {
                websocket::answer(request, &websocket::REMOTE_COMMAND, |_, socket| websocket::carry(socket, call))
            }
            "spdy/3.1" => spdy_transport::answer(request, spdy_transport::REMOTE_COMMAND, |socket| {
                spdy_session::carry(socket, call)
            }),
            _ => text(StatusCode::BAD_REQUEST, "exec and attach need an upgrade to websocket or SPDY/3.1"),
        }
    }

    fn port_forward(&self, namespace: &str, pod: &str, request: Request<Incoming>) -> Answer {
        let Some((_, instance)) = self.registry.find(namespace, pod) else {
            return text(StatusCode::NOT_FOUND, format!("pod \"{namespace}/{pod}\" is not on this node"));
        };
        let Some(instance) = instance else {
            return text(StatusCode::BAD_REQUEST, format!("pod \"{namespace}/{pod}\" is not running"));
        };
        let pod = format!("{pod}_{namespace}");
        let target = forward::Target { provider: self.provider.clone(), id: instance.id.clone(), pod };
        let ports = ports(request.uri().query().unwrap_or_default());
        let upgrade = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        match upgrade.to_ascii_lowercase().as_str() {
            "websocket" => {
                websocket::answer(request, &[forward::TUNNEL, forward::CHANNELS], |protocol, socket| async move {
                    match protocol {
                        forward::TUNNEL => forward::tunnel(socket, target).await,
                        _ => forward::channels(socket, target, ports).await,
                    }
                })
            }
            "spdy/3.1" => spdy_transport::answer(request, forward::PROTOCOL, |socket| forward::spdy(socket, target)),
            _ => text(StatusCode::BAD_REQUEST, "port forwarding needs an upgrade to websocket or SPDY/3.1"),
        }
    }
}

/// One exec or attach, to be begun when its streams are there.
pub(crate) struct Call {
    provider: Arc<dyn Provider>,
    id: String,
    container: String,
    wanted: ExecRequest,
    attach: bool,
}

impl Call {
    async fn begin(&self, input: Frames) -> Result<ByteStream, joey_model::Fault> {
        match self.attach {
            true => self.provider.attach(&self.id, &self.container, &self.wanted, input).await,
            false => self.provider.exec(&self.id, &self.container, &self.wanted, input).await,
        }
    }
}

/// Why a container has no log, in the kubelet's words; `None`: it may have one.
fn no_log(pod: &Pod, instance: Option<&Instance>, container: &str, previous: bool) -> Option<String> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let known = instance.and_then(|instance| instance.status.containers.iter().find(|known| known.name == container));
    let ran_before = known.is_some_and(|known| known.last_termination.is_some());
    if previous {
        return (!ran_before)
            .then(|| format!("previous terminated container \"{container}\" in pod \"{name}\" not found"));
    }
    let reason = match known.map(|known| &known.state) {
        _ if ran_before => return None,
        // What the hook says is in the log already.
        Some(ContainerState::Waiting { reason, .. }) if reason == joey_api::hooks::RUNS => return None,
        Some(ContainerState::Waiting { reason, .. }) => reason.as_str(),
        Some(_) => return None,
        None => {
            let statuses =
                pod.status.as_ref().and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
            let waiting = statuses.iter().find_map(|known| {
                let waiting = known.state.as_ref()?.waiting.as_ref()?;
                waiting.reason.as_deref().filter(|_| known.name == container)
            });
            // Nobody has begun with it yet where nothing is said of any.
            waiting.or_else(|| statuses.is_empty().then_some("ContainerCreating"))?
        }
    };
    let why = match reason {
        "ErrImagePull" => "image can't be pulled",
        "ImagePullBackOff" => "trying and failing to pull image",
        reason => reason,
    };
    Some(format!("container \"{container}\" in pod \"{name}\" is waiting to start: {why}"))
}

fn refused(fault: &joey_model::Fault) -> Answer {
    let status = StatusCode::from_u16(joey_api::error::http_status(fault.kind)).unwrap_or(StatusCode::BAD_GATEWAY);
    text(status, fault.message.clone())
}

/// Pairs of a query, decoded.
fn pairs(query: &str) -> Vec<(String, String)> {
    joey_rpc::parse_query::<std::collections::BTreeMap<String, Vec<String>>>(query)
        .unwrap_or_default()
        .into_iter()
        .flat_map(|(name, values)| values.into_iter().map(move |value| (name.clone(), value)))
        .collect()
}

/// The ports of a connection whose protocol cannot name them later.
fn ports(query: &str) -> Vec<u16> {
    let named = pairs(query).into_iter().filter(|(name, _)| matches!(name.as_str(), "port" | "ports"));
    let words = named.flat_map(|(_, value)| value.split(',').map(str::to_owned).collect::<Vec<_>>());
    words.filter_map(|word| word.trim().parse().ok()).filter(|port| *port != 0).collect()
}

fn is_on(value: &str) -> bool {
    matches!(value, "1" | "true" | "True")
}

/// The options of a log as the API server passes them on (PodLogOptions).
fn log_options(query: &str, now: Timestamp) -> LogOptions {
    let mut options = LogOptions::default();
    for (name, value) in pairs(query) {
        match name.as_str() {
            "follow" => options.follow = is_on(&value),
            "previous" => options.previous = is_on(&value),
            "timestamps" => options.timestamps = is_on(&value),
            "tailLines" => options.tail = value.parse().ok(),
            "limitBytes" => options.limit_bytes = value.parse().ok(),
            "sinceTime" => options.since = value.parse().ok(),
            "sinceSeconds" => {
                options.since = value.parse().ok().and_then(|s| now.checked_sub(SignedDuration::from_secs(s)).ok());
            }
            _ => {}
        }
    }
    options
}

/// The request of an exec: the kubelet's names (`input output error`) and the Pod API's.
fn exec_request(query: &str) -> ExecRequest {
    let mut request = ExecRequest::default();
    for (name, value) in pairs(query) {
        match name.as_str() {
            "command" => request.command.push(value),
            "input" | "stdin" => request.stdin = is_on(&value),
            "output" | "stdout" => request.stdout = is_on(&value),
            "error" | "stderr" => request.stderr = is_on(&value),
            "tty" => request.tty = is_on(&value),
            _ => {}
        }
    }
    request.stderr &= !request.tty;
    request
}

/// Frames of a channel as a stream.
fn frames(input: tokio::sync::mpsc::Receiver<bytes::Bytes>) -> Frames {
    futures::stream::unfold(input, |mut input| async move { input.recv().await.map(|bytes| (bytes, input)) }).boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries() {
        assert_eq!(ports("port=80&ports=443,8080&port=0&other=5"), [80, 443, 8080]);
        let request = exec_request("command=sh&command=-c&command=echo+a%20b&input=1&output=1&error=1&tty=1");
        assert_eq!(request.command, ["sh", "-c", "echo a b"]);
        assert!(request.stdin && request.stdout && request.tty && !request.stderr);
        let now: Timestamp = "2024-01-01T00:00:10Z".parse().unwrap();
        let options = log_options("follow=true&tailLines=5&sinceSeconds=10&timestamps=true", now);
        assert_eq!((options.follow, options.tail, options.timestamps), (true, Some(5), true));
        assert_eq!(options.since, Some("2024-01-01T00:00:00Z".parse().unwrap()));
    }
}
