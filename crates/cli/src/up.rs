//! `joey up`: every role in one process. Stops on SIGTERM and leaves instances running.

use std::sync::Arc;
use std::time::{Duration, Instant};

use joey_apiserver::{ApiServer, Identity};
use joey_pool::Pool;
use joey_vnode::PoolProvider;
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::runtime::wait::await_condition;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;
use crate::roles::{HostRole, Lock, asked_to_stop, serve_rest, store};
use crate::settings::UpSettings;

/// How long the virtual node may take to become ready.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// How long roles may take to finish what they do once told to stop.
const STOP_LIMIT: Duration = Duration::from_secs(15);

/// Composes the roles, says once that they are ready, and waits to be told to stop.
pub async fn up(settings: UpSettings) -> Result<(), Failure> {
    let began = Instant::now();
    let place = &settings.host.place;
    let stop = asked_to_stop()?;
    let _lock = Lock::take(place)?;
    let listener = listen(&settings).await?;
    let store = store(place)?;
    let (host, api) = tokio::join!(HostRole::open(&settings.host), open_api(&settings, &listener, store.clone()));
    let (host, api) = (host?, api?);
    let pool = host.pool(&settings.host, store).await?;

    let shutdown = CancellationToken::new();
    let mut roles = JoinSet::new();
    serve_rest(place, &pool, shutdown.clone())?;
    roles.spawn({
        let (api, shutdown) = (api.clone(), shutdown.clone());
        async move {
            api.serve(listener, shutdown.cancelled_owned()).await;
            Ok(())
        }
    });
    let client = |identity| kube::Client::new(api.service(identity), "default");
    roles.spawn({
        let (client, shutdown) = (client(Identity::controllers()), shutdown.clone());
        async move {
            joey_controllers::run(client, shutdown).await;
            Ok(())
        }
    });
    roles.spawn(virtual_node(client(Identity::node(&settings.node_name)), &pool, &settings, shutdown.clone()));

    let kubeconfig = place.file("kubeconfig");
    crate::roles::write_private(&kubeconfig, api.kubeconfig().as_bytes())?;
    tokio::select! {
        ready = node_is_ready(client(Identity::controllers()), &settings.node_name) => ready?,
        ended = roles.join_next() => return Err(early_end(ended)),
        stopped = stop.clone().wait() => return stopped,
    }
    let server = api.url();
    println!("joey is ready: {server}, kubeconfig {} ({:.1} s)", kubeconfig.display(), began.elapsed().as_secs_f64());
    tokio::select! {
        stopped = stop.wait() => stopped?,
        ended = roles.join_next() => return Err(early_end(ended)),
    }
    shutdown.cancel();
    // What is cut off here was not acknowledged, and is taken up again by the next start.
    let _ = tokio::time::timeout(STOP_LIMIT, async { while roles.join_next().await.is_some() {} }).await;
    Ok(())
}

async fn listen(settings: &UpSettings) -> Result<TcpListener, Failure> {
    TcpListener::bind(settings.listen).await.map_err(|error| {
        Failure::new(format!("the API cannot listen on {}: {error}", settings.listen))
            .with_hint("choose another with --listen, such as 127.0.0.1:6444")
    })
}

async fn open_api(
    settings: &UpSettings,
    listener: &TcpListener,
    store: Arc<dyn joey_store::Store>,
) -> Result<ApiServer, Failure> {
    let mut config = joey_apiserver::Config::new(settings.host.place.file("pki"), listener.local_addr()?);
    config.node_name.clone_from(&settings.node_name);
    ApiServer::open(config, store).await.map_err(|error| Failure::caused("the API server cannot start", &error))
}

/// The virtual node of this process, on loopback: only the API server beside it calls.
fn virtual_node(
    client: kube::Client,
    pool: &Arc<Pool>,
    settings: &UpSettings,
    shutdown: CancellationToken,
) -> impl Future<Output = Result<(), Failure>> + Send + 'static {
    let pki = |name: &str| settings.host.place.file("pki").join(name);
    let mut config = joey_vnode::Config::new(&settings.node_name, std::net::Ipv4Addr::LOCALHOST.into());
    config.taint = false;
    config.token_guard = settings.host.configuration.account_tokens;
    config.serving = joey_vnode::ServingCertificate::Files {
        certificate: pki("kubelet-server.crt"),
        key: pki("kubelet-server.key"),
    };
    config.client_auth = joey_vnode::ClientAuth::Authority(pki("ca.crt"));
    config.trusted_callers = vec![joey_pki::KUBELET_CLIENT.to_owned()];
    let provider = Arc::new(PoolProvider::new(joey_rpc::Client::in_process("the pool", pool.router())));
    async move {
        joey_vnode::run(client, provider, config, shutdown)
            .await
            .map_err(|error| Failure::caused("the virtual node cannot start", &error))
    }
}

async fn node_is_ready(client: kube::Client, name: &str) -> Result<(), Failure> {
    let ready = |node: Option<&Node>| {
        let conditions = node.and_then(|node| node.status.as_ref()?.conditions.as_ref());
        conditions.is_some_and(|all| all.iter().any(|one| one.type_ == "Ready" && one.status == "True"))
    };
    match tokio::time::timeout(READY_LIMIT, await_condition(Api::<Node>::all(client), name, ready)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(Failure::caused("the virtual node cannot be watched", &error)),
        Err(_) => Err(Failure::new(format!("node \"{name}\" did not become ready within 30 s"))
            .with_hint("see what it logs with --log debug")),
    }
}

fn early_end(ended: Option<Result<Result<(), Failure>, tokio::task::JoinError>>) -> Failure {
    match ended {
        Some(Ok(Err(failure))) => failure,
        Some(Err(error)) => Failure::caused("a role of joey ended", &error),
        Some(Ok(Ok(()))) | None => Failure::new("a role of joey ended before it was asked to"),
    }
}
