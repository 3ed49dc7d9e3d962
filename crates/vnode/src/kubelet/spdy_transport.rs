//! Exec and attach over SPDY/3.1, as kube-apiserver speaks to kubelets.

use http::{HeaderName, HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;

use super::{Answer, Call, text};

const VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");

pub(super) fn answer(request: Request<Incoming>, call: Call) -> Answer {
    let offered = request.headers().get_all(VERSION).iter().filter_map(|value| value.to_str().ok());
    if !offered.flat_map(|value| value.split(',')).any(|version| version.trim() == "v4.channel.k8s.io") {
        return text(StatusCode::FORBIDDEN, "v4.channel.k8s.io is not offered");
    }
    tokio::spawn(async move {
        if let Ok(upgraded) = hyper::upgrade::on(request).await {
            super::spdy_session::carry(hyper_util::rt::TokioIo::new(upgraded), call).await;
        }
    });
    let mut answer = Response::new(joey_rpc::empty());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("SPDY/3.1"));
    headers.insert(VERSION, HeaderValue::from_static("v4.channel.k8s.io"));
    answer
}
