//! The upgrade to SPDY/3.1, as kube-apiserver speaks to kubelets.

use http::{HeaderName, HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;

use super::{Answer, text};

const VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");

/// The protocol of exec and attach.
pub(super) const REMOTE_COMMAND: &str = "v4.channel.k8s.io";

/// Takes the upgrade where the client offers `protocol`, and has `carry` go on with it.
pub(super) fn answer<F>(
    request: Request<Incoming>,
    protocol: &'static str,
    carry: impl FnOnce(TokioIo<Upgraded>) -> F + Send + 'static,
) -> Answer
where
    F: Future<Output = ()> + Send + 'static,
{
    let offered = request.headers().get_all(VERSION).iter().filter_map(|value| value.to_str().ok());
    if !offered.flat_map(|value| value.split(',')).any(|version| version.trim() == protocol) {
        return text(StatusCode::FORBIDDEN, format!("{protocol} is not offered"));
    }
    tokio::spawn(async move {
        if let Ok(upgraded) = hyper::upgrade::on(request).await {
            carry(TokioIo::new(upgraded)).await;
        }
    });
    let mut answer = Response::new(joey_rpc::empty());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("SPDY/3.1"));
    headers.insert(VERSION, HeaderValue::from_static(protocol));
    answer
}
