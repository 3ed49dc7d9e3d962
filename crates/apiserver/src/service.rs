//! One request from beginning to end: bounds, caller, route, permission, verb, answer.

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use http::{HeaderValue, Request, Response, header};
use http_body_util::{BodyExt, Limited};
use tokio_util::sync::CancellationToken;

use crate::auth::{self, Identity};
use crate::request::{self, Query, Route, Target};
use crate::status::{ApiError, ApiResult, json_response};
use crate::verbs::{self, Answer, Call};
use crate::{Body, State, discovery, metrics, proxy, review, table};

/// Largest body of a request, in bytes (kube-apiserver's bound).
pub const MAX_BODY: usize = 3 << 20;
/// Bytes of a body that are read away before a refusal.
const MAX_IGNORED: usize = 64 << 10;
/// Longest a request takes until its answer begins, streams apart.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The API as a service for one caller inside this process; cheap to clone.
#[derive(Clone)]
pub struct ApiService {
    pub(crate) state: Arc<State>,
    pub(crate) identity: Identity,
}

impl<B> tower::Service<Request<B>> for ApiService
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (state, identity) = (self.state.clone(), self.identity.clone());
        let request = request.map(|body| body.map_err(|error| std::io::Error::other(error.into())).boxed_unsync());
        Box::pin(async move { Ok(handle(state, Some(identity), request, CancellationToken::new()).await) })
    }
}

/// Answers a request of a known caller, or of whoever its headers name. A panic or a slow verb is an answer, too.
pub async fn handle(
    state: Arc<State>,
    identity: Option<Identity>,
    request: Request<Body>,
    draining: CancellationToken,
) -> Response<Body> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let Ok(_permit) = state.in_flight.clone().try_acquire_owned() else {
        return ApiError::too_many_requests().response();
    };
    let work = AssertUnwindSafe(dispatch(&state, identity, request, draining)).catch_unwind();
    let result = match tokio::time::timeout(TIMEOUT, work).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => {
            tracing::error!(%method, path, "a request handler panicked");
            Err(ApiError::internal("the request could not be handled"))
        }
        Err(_) => Err(ApiError::timeout()),
    };
    match result {
        Ok(response) => response,
        Err(error) => {
            if error.code.is_server_error() {
                tracing::warn!(%method, path, code = error.code.as_u16(), message = error.message, "request failed");
            }
            error.response()
        }
    }
}

async fn dispatch(
    state: &State,
    identity: Option<Identity>,
    request: Request<Body>,
    draining: CancellationToken,
) -> ApiResult<Response<Body>> {
    let (parts, body) = request.into_parts();
    let (who, query, route) = match route(state, identity, &parts).await {
        Ok(routed) => routed,
        Err(error) => {
            // An answer to a request whose body nobody reads is lost on the way to some clients.
            let _ = Limited::new(body, MAX_IGNORED).collect().await;
            return Err(error);
        }
    };
    let request = Request::from_parts(parts, body);
    match route {
        Route::Other(segments) => match *request.method() {
            http::Method::GET | http::Method::HEAD => discovery::answer(state, request.headers(), &segments),
            _ => Err(ApiError::method_not_allowed()),
        },
        Route::Resource(target) => resource(state, &who, &target, &query, request, draining).await,
    }
}

/// Who asks for what, if it exists and they may.
async fn route(
    state: &State,
    identity: Option<Identity>,
    request: &http::request::Parts,
) -> ApiResult<(Identity, Query, Route)> {
    let who = match identity {
        Some(who) => who,
        None => auth::of_request(state, &request.headers).await?,
    };
    let who = auth::acting(who, &request.headers)?;
    let query = Query::parse(request.uri.query());
    let verb = request.method.as_str().to_lowercase();
    match request::parse(&request.method, &request.uri, &query) {
        Ok(route) => {
            match &route {
                Route::Other(segments) => auth::authorize_path(&who, &verb, segments)?,
                Route::Resource(target) => auth::authorize(&who, target)?,
            }
            Ok((who, query, route))
        }
        Err(error) => {
            // What exists and what does not is nothing for strangers.
            let path: Vec<String> = request.uri.path().split('/').skip(1).map(str::to_owned).collect();
            auth::authorize_path(&who, &verb, &path)?;
            Err(error)
        }
    }
}

async fn resource(
    state: &State,
    who: &Identity,
    target: &Target,
    query: &Query,
    request: Request<Body>,
    draining: CancellationToken,
) -> ApiResult<Response<Body>> {
    let headers = request.headers().clone();
    let call = Call { state, who, target, query, headers: &headers };
    let answer = match (target.verb, target.subresource_name()) {
        ("get" | "list", _) if target.resource.group == metrics::GROUP => return metrics::answer(&call).await,
        ("list", _) => return verbs::list::list(&call).await,
        ("watch", _) => return verbs::watch::watch(state, &call, draining).await,
        ("get" | "create", "log" | "exec" | "attach" | "portforward") => return proxy::connect(&call, request).await,
        ("get", _) => verbs::get::get(&call).await?,
        ("deletecollection", _) => {
            let body = body(request).await?;
            return verbs::delete::delete_collection(&call, &body).await;
        }
        (verb, sub) => {
            let body = body(request).await?;
            write(&call, verb, sub, &body).await?
        }
    };
    encode(&call, answer)
}

async fn write(call: &Call<'_>, verb: &str, sub: &str, body: &Bytes) -> ApiResult<Answer> {
    match (verb, sub) {
        ("create", "") if call.target.resource.plural == "bindings" => {
            verbs::subresource::create_binding(call, body).await
        }
        ("create", "") => match review::review(call, body) {
            Some(answer) => answer,
            None => verbs::create::create(call, body).await,
        },
        ("create", _) => verbs::subresource::create(call, body).await,
        ("update", _) => verbs::update::update(call, body).await,
        ("patch", _) => verbs::patch::patch(call, body).await,
        ("delete", "") => verbs::delete::delete(call, body).await,
        _ => Err(ApiError::method_not_allowed()),
    }
}

async fn body(request: Request<Body>) -> ApiResult<Bytes> {
    match Limited::new(request.into_body(), MAX_BODY).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(ApiError::too_large(MAX_BODY)),
        Err(_) => Err(ApiError::bad_request("the body of the request could not be read")),
    }
}

fn encode(call: &Call<'_>, answer: Answer) -> ApiResult<Response<Body>> {
    let form = table::form(call.headers, call.query)?;
    let value = table::shown(call.target.resource, answer.value, form);
    let mut response = json_response(answer.code, &value);
    for warning in answer.warnings.iter().take(50) {
        let quoted = warning.replace(['\r', '\n'], " ").replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
    Ok(response)
}
