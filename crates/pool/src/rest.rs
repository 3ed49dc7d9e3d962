//! The REST API: each handler parses, calls and converts. Who may call is decided by who may open the socket (mode 0600).

use std::sync::Arc;

use axum::Router;
use axum::body::Body as Incoming;
use axum::extract::{Path, RawQuery, State};
use axum::routing::{get, post};
use futures::{Stream, StreamExt};
use http::{Response, StatusCode};
use joey_api::change::InstanceChange;
use joey_api::diagnosis::{CaptureRequest, CoreSettings};
use joey_api::image::PullRequest;
use joey_api::instance::{ExecRequest, Instance, LogOptions, WatchEvent};
use joey_model::{ErrorKind, Fault, ImageRef};
use joey_rpc::{
    BODY_LIMIT, Body, created, empty_answer, fault_answer, json_answer, lines_answer, parse_query, stream_answer,
};
use serde::Deserialize;
use tokio::sync::broadcast;

use crate::host::{ByteStream, Frames};
use crate::service::Pool;

type Service = State<Arc<Pool>>;
type Answer = Response<Body>;

impl Pool {
    /// The service's REST API, for `joey_rpc::serve`.
    pub fn router(self: &Arc<Self>) -> Router {
        Router::new()
            .route("/v1/instances", get(list).post(create))
            .route("/v1/instances/{name}", get(read).patch(change).delete(delete))
            .route("/v1/instances/{name}/restart", post(restart))
            .route("/v1/instances/{name}/renew", post(renew))
            .route("/v1/instances/{name}/usage", get(usage))
            .route("/v1/instances/{name}/forward", post(forward))
            .route("/v1/instances/{name}/capture", post(capture))
            .route("/v1/instances/{name}/cores", get(cores).put(set_cores))
            .route("/v1/instances/{name}/cores/{core}", get(core))
            .route("/v1/instances/{name}/containers/{container}/files", get(read_files).put(write_files))
            .route("/v1/instances/{name}/containers/{container}/logs", get(logs))
            .route("/v1/instances/{name}/containers/{container}/exec", post(exec))
            .route("/v1/instances/{name}/containers/{container}/attach", post(attach))
            .route("/v1/images", get(images))
            .route("/v1/images/pull", post(pull))
            .route("/v1/images/import", post(import))
            .route("/v1/images/{*name}", axum::routing::delete(remove_image))
            .route("/v1/hosts", get(hosts))
            .route("/v1/version", get(version))
            .route("/v1/openapi.json", get(openapi))
            .fallback(unknown)
            .with_state(self.clone())
    }
}

/// Turns a handler's fault into its answer.
fn answer(outcome: Result<Answer, Fault>) -> Answer {
    outcome.unwrap_or_else(fault_answer)
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ListQuery {
    watch: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct DeleteQuery {
    grace: Option<u32>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct PortQuery {
    port: u16,
}

#[derive(Deserialize)]
struct PathQuery {
    path: String,
}

#[derive(Deserialize)]
struct ImportQuery {
    reference: String,
}

async fn create(State(pool): Service, body: Incoming) -> Answer {
    answer(
        async {
            let spec = joey_rpc::read_json(body, BODY_LIMIT).await?;
            let (instance, new) = pool.create(spec).await?;
            Ok(if new { created(&instance) } else { json_answer(&instance) })
        }
        .await,
    )
}

async fn list(State(pool): Service, RawQuery(query): RawQuery) -> Answer {
    match parse_query::<ListQuery>(&query.unwrap_or_default()) {
        Ok(ListQuery { watch: true }) => lines_answer(watch(&pool)),
        Ok(_) => json_answer(&pool.list()),
        Err(fault) => fault_answer(fault),
    }
}

/// What there is, `Synced`, changes. The stream ends where the reader fell behind; it then begins anew.
fn watch(pool: &Pool) -> impl Stream<Item = WatchEvent> + Send + 'static {
    let (present, revision, changes) = pool.watch();
    let present = present.into_iter().map(|instance: Instance| WatchEvent::Set { instance: Box::new(instance) });
    let first = futures::stream::iter(present.chain([WatchEvent::Synced { revision }]));
    first.chain(futures::stream::unfold(changes, |mut changes| async move {
        match changes.recv().await {
            Ok(event) => Some((WatchEvent::clone(&event), changes)),
            Err(broadcast::error::RecvError::Lagged(_) | broadcast::error::RecvError::Closed) => None,
        }
    }))
}

async fn read(State(pool): Service, Path(name): Path<String>) -> Answer {
    answer(pool.get(&name).map(|instance| json_answer(&instance)))
}

async fn change(State(pool): Service, Path(name): Path<String>, body: Incoming) -> Answer {
    answer(
        async {
            let change = InstanceChange::read(&name, joey_rpc::read_json(body, BODY_LIMIT).await?)?;
            Ok(json_answer(&pool.change(&name, &change).await?))
        }
        .await,
    )
}

async fn delete(State(pool): Service, Path(name): Path<String>, RawQuery(query): RawQuery) -> Answer {
    answer(
        async {
            let DeleteQuery { grace } = parse_query(&query.unwrap_or_default())?;
            pool.delete(&name, grace).await?;
            Ok(empty_answer(StatusCode::ACCEPTED))
        }
        .await,
    )
}

async fn renew(State(pool): Service, Path(name): Path<String>) -> Answer {
    answer(
        async {
            pool.host.renew(&pool.id(&name)?).await?;
            Ok(empty_answer(StatusCode::ACCEPTED))
        }
        .await,
    )
}

async fn restart(State(pool): Service, Path(name): Path<String>) -> Answer {
    answer(
        async {
            pool.host.restart(&pool.id(&name)?).await?;
            Ok(empty_answer(StatusCode::ACCEPTED))
        }
        .await,
    )
}

async fn usage(State(pool): Service, Path(name): Path<String>) -> Answer {
    answer(async { Ok(json_answer(&pool.host.usage(&pool.id(&name)?).await?)) }.await)
}

async fn forward(State(pool): Service, Path(name): Path<String>, RawQuery(query): RawQuery, body: Incoming) -> Answer {
    answer(
        async {
            let PortQuery { port } = parse_query(&query.unwrap_or_default())?;
            if port == 0 {
                return Err(Fault::new(ErrorKind::Invalid, "InvalidPort", "a connection needs a port from 1 to 65535"));
            }
            Ok(stream_answer(pool.host.forward(&pool.id(&name)?, port, frames(body)).await?))
        }
        .await,
    )
}

async fn capture(State(pool): Service, Path(name): Path<String>, RawQuery(query): RawQuery, body: Incoming) -> Answer {
    answer(
        async {
            let request: CaptureRequest = parse_query(&query.unwrap_or_default())?;
            Ok(stream_answer(pool.host.capture(&pool.id(&name)?, request, frames(body)).await?))
        }
        .await,
    )
}

async fn cores(State(pool): Service, Path(name): Path<String>) -> Answer {
    answer(async { Ok(json_answer(&pool.host.cores(&pool.id(&name)?, None).await?)) }.await)
}

async fn set_cores(State(pool): Service, Path(name): Path<String>, body: Incoming) -> Answer {
    answer(
        async {
            let settings: CoreSettings = joey_rpc::read_json(body, BODY_LIMIT).await?;
            Ok(json_answer(&pool.host.cores(&pool.id(&name)?, Some(settings)).await?))
        }
        .await,
    )
}

async fn core(State(pool): Service, Path((name, core)): Path<(String, String)>) -> Answer {
    answer(
        async {
            if !is_core_name(&core) {
                let message = format!("instance \"{name}\" has no core \"{core}\"");
                return Err(Fault::new(ErrorKind::NotFound, "NoSuchCore", message));
            }
            Ok(stream_answer(pool.host.core(&pool.id(&name)?, &core).await?))
        }
        .await,
    )
}

/// Names of cores have no other characters: nothing to escape, and no other can exist.
pub(crate) fn is_core_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-+".contains(c))
}

async fn read_files(
    State(pool): Service,
    Path((name, container)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Answer {
    answer(
        async {
            let PathQuery { path } = parse_query(&query.unwrap_or_default())?;
            Ok(stream_answer(pool.host.read_files(&pool.id(&name)?, &container, &path).await?))
        }
        .await,
    )
}

async fn write_files(
    State(pool): Service,
    Path((name, container)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    body: Incoming,
) -> Answer {
    answer(
        async {
            let PathQuery { path } = parse_query(&query.unwrap_or_default())?;
            let archive: ByteStream = body.into_data_stream().map(|part| part.map_err(std::io::Error::other)).boxed();
            pool.host.write_files(&pool.id(&name)?, &container, &path, archive).await?;
            Ok(empty_answer(StatusCode::NO_CONTENT))
        }
        .await,
    )
}

async fn logs(
    State(pool): Service,
    Path((name, container)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Answer {
    answer(
        async {
            let options: LogOptions = parse_query(&query.unwrap_or_default())?;
            Ok(stream_answer(pool.host.logs(&pool.id(&name)?, &container, options).await?))
        }
        .await,
    )
}

async fn exec(service: Service, path: Path<(String, String)>, query: RawQuery, body: Incoming) -> Answer {
    interact(Interaction::Exec, service, path, query, body).await
}

async fn attach(service: Service, path: Path<(String, String)>, query: RawQuery, body: Incoming) -> Answer {
    interact(Interaction::Attach, service, path, query, body).await
}

enum Interaction {
    Exec,
    Attach,
}

async fn interact(
    kind: Interaction,
    State(pool): Service,
    Path((name, container)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    body: Incoming,
) -> Answer {
    answer(
        async {
            let request: ExecRequest = parse_query(&query.unwrap_or_default())?;
            let (id, input) = (pool.id(&name)?, frames(body));
            let output = match kind {
                Interaction::Exec if request.command.is_empty() => {
                    return Err(Fault::new(ErrorKind::Invalid, "InvalidExec", "exec needs a command"));
                }
                Interaction::Exec => pool.host.exec(&id, &container, request, input).await?,
                Interaction::Attach => pool.host.attach(&id, &container, request, input).await?,
            };
            Ok(stream_answer(output))
        }
        .await,
    )
}

/// The caller's frames; a broken connection ends them.
fn frames(body: Incoming) -> Frames {
    body.into_data_stream().scan((), |(), part| std::future::ready(part.ok())).boxed()
}

async fn images(State(pool): Service) -> Answer {
    answer(pool.host.images().await.map(|images| json_answer(&images)))
}

async fn pull(State(pool): Service, body: Incoming) -> Answer {
    answer(
        async {
            let request: PullRequest = joey_rpc::read_json(body, BODY_LIMIT).await?;
            reference(&request.image)?;
            Ok(lines_answer(pool.host.pull(request).await?))
        }
        .await,
    )
}

async fn import(State(pool): Service, RawQuery(query): RawQuery, body: Incoming) -> Answer {
    answer(
        async {
            let query: ImportQuery = parse_query(&query.unwrap_or_default())?;
            let archive: ByteStream = body.into_data_stream().map(|part| part.map_err(std::io::Error::other)).boxed();
            Ok(created(&pool.host.import_image(&reference(&query.reference)?, archive).await?))
        }
        .await,
    )
}

async fn remove_image(State(pool): Service, Path(name): Path<String>) -> Answer {
    answer(pool.host.remove_image(&name).await.map(|()| empty_answer(StatusCode::NO_CONTENT)))
}

async fn hosts(State(pool): Service) -> Answer {
    json_answer(&[pool.host.describe().await])
}

async fn version() -> Answer {
    json_answer(&serde_json::json!({ "version": env!("CARGO_PKG_VERSION") }))
}

async fn openapi() -> Answer {
    json_answer(&crate::openapi::document())
}

async fn unknown() -> Answer {
    fault_answer(Fault::new(ErrorKind::NotFound, "NotFound", "there is no such path in this API"))
}

fn reference(text: &str) -> Result<ImageRef, Fault> {
    ImageRef::parse(text).map_err(|error| Fault::new(ErrorKind::Invalid, "InvalidImageName", error.to_string()))
}
