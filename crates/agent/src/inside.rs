//! The agent's program as the first process of gVisor's sandboxes: it connects to what listens inside, for the agent outside, which
//! cannot. It speaks through its standard input and output, and ends with them: a sandbox whose agent is gone ends.
//!
//! | call | body | answer |
//! | --- | --- | --- |
//! | `POST /v1/forward?port=N` | bytes | as the agent's own |
//! | `POST /v1/ask` | [`Ask`] | why it is not well, or nothing |

use std::convert::Infallible;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use http::{Method, Request, Response};
use hyper::body::Incoming;
use joey_api::lifecycle::Action;
use joey_health::{Asker, Unwell};
use joey_model::{ErrorKind, Fault};
use joey_rpc::{Body, Client, RpcError, fault_answer, into_stream, json_answer, parse_query, read_json, stream_answer};
use serde::{Deserialize, Serialize};
use tokio::net::unix::pipe;

use crate::server::{BODY, PortQuery};
use crate::{check, forward, setup};

/// An action over the network.
#[derive(Serialize, Deserialize)]
struct Ask {
    action: Action,
    own: Option<IpAddr>,
    /// By a hook rather than a probe.
    hook: bool,
    limit: Duration,
}

/// Serves until the other side is gone.
pub fn run() -> Result<(), String> {
    setup::keep_small();
    setup::runtime()?.block_on(async {
        let streams = || -> std::io::Result<_> {
            let input = std::io::stdin().as_fd().try_clone_to_owned()?;
            let output = std::io::stdout().as_fd().try_clone_to_owned()?;
            Ok(tokio::io::join(pipe::Receiver::from_owned_fd(input)?, pipe::Sender::from_owned_fd(output)?))
        };
        // Without: it was only tried whether a sandbox can be made.
        let Ok(streams) = streams() else { return Ok(()) };
        let served = joey_rpc::serve(streams, tower::service_fn(answer)).await;
        served.map_err(|error| error.to_string())
    })
}

async fn answer(request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    let answered = match (request.method(), request.uri().path()) {
        (&Method::POST, "/v1/forward") => match parse_query::<PortQuery>(&query) {
            Ok(asked) => forward::forward(asked.port, request.into_body()).await,
            Err(fault) => Err(fault),
        },
        (&Method::POST, "/v1/ask") => match read_json::<Ask, _>(request.into_body(), BODY).await {
            Ok(Ask { action, own, hook, limit }) => {
                let asker = if hook { Asker::Hook } else { Asker::Probe };
                let unwell = check::over_network(own, &action, asker, limit).await.err();
                Ok(json_answer(&unwell.map(|Unwell(why)| why)))
            }
            Err(fault) => Err(fault),
        },
        (_, path) => Err(Fault::new(ErrorKind::NotFound, "NotFound", format!("no such call: {path}"))),
    };
    Ok(answered.unwrap_or_else(fault_answer))
}

/// Asks from inside.
pub async fn ask(
    client: &Client,
    own: Option<IpAddr>,
    action: &Action,
    asker: Asker,
    limit: Duration,
) -> Result<(), Unwell> {
    let ask = Ask { action: action.clone(), own, hook: asker == Asker::Hook, limit };
    let why: Option<String> =
        client.call(Method::POST, "/v1/ask", Some(&ask)).await.map_err(|error| Unwell(fault(error).message))?;
    why.map_or(Ok(()), |why| Err(Unwell(why)))
}

/// A connection to a port inside.
pub async fn connect(client: &Client, port: u16, body: Incoming) -> Result<Response<Body>, Fault> {
    use futures::StreamExt;
    let outgoing = into_stream(body).take_while(|part| std::future::ready(part.is_ok()));
    let outgoing = outgoing.filter_map(|part| std::future::ready(part.ok()));
    let incoming = client.duplex(Method::POST, &format!("/v1/forward?port={port}"), outgoing).await.map_err(fault)?;
    Ok(stream_answer(incoming))
}

fn fault(error: RpcError) -> Fault {
    match error {
        RpcError::Remote(fault) => fault,
        _ => Fault::new(ErrorKind::Conflict, "SandboxGone", "the sandbox does not answer"),
    }
}
