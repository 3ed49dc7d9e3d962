//! The Kubernetes API: authenticate → authorise → admit → store → watch, over a table of kinds and their schemas.
//!
//! ```text
//!   listener (TLS) ─┐
//!                   ├─► service ─► request ─► auth ─► verbs ─► strategy, schema ─► store
//!   in-process ─────┘                                   └────► cache ◄── watch of the store
//! ```
//! A kind is an entry of [`kinds::RESOURCES`]. Must never depend on the pool, on hosts, on the virtual node or on
//! controllers: those are clients.

pub mod auth;
mod bootstrap;
mod cache;
mod convert;
mod discovery;
pub mod kinds;
mod leases;
mod metrics;
mod object;
mod proxy;
mod request;
mod review;
mod selector;
mod serve;
mod service;
mod status;
mod strategy;
mod table;
mod token;
mod typing;
mod verbs;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use joey_store::Store;
use tokio::net::TcpListener;

pub use auth::Identity;
pub use joey_pki::{Credentials, Pki, PkiError};
pub use service::ApiService;

/// Body of every answer.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

pub(crate) fn empty() -> Body {
    full(Bytes::new())
}

/// Everything the API server is told.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where certificates, keys and the administrator's token are kept.
    pub pki_dir: PathBuf,
    /// Address and port that clients are told; an unspecified address is written as loopback.
    pub advertise: SocketAddr,
    /// Further addresses that certificates must name: those of the host, the kubelet endpoint's.
    pub addresses: Vec<IpAddr>,
    /// Further host names that certificates must name.
    pub hosts: Vec<String>,
    /// Name of the virtual node whose certificates are made.
    pub node_name: String,
    /// Requests worked upon at the same time; more are told to come again.
    pub max_in_flight: usize,
}

impl Config {
    pub fn new(pki_dir: impl Into<PathBuf>, advertise: SocketAddr) -> Self {
        Self {
            pki_dir: pki_dir.into(),
            advertise,
            addresses: Vec::new(),
            hosts: Vec::new(),
            node_name: "joey".to_owned(),
            max_in_flight: 400,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("certificates of the API server could not be prepared")]
    Pki(#[from] PkiError),
    #[error("state of the API server could not be read: {0}")]
    State(String),
}

impl OpenError {
    /// How the caller should react.
    pub fn kind(&self) -> joey_model::ErrorKind {
        joey_model::ErrorKind::Internal
    }
}

/// What all requests share.
pub(crate) struct State {
    store: Arc<dyn Store>,
    cache: Arc<cache::Cache>,
    types: typing::Types,
    leases: leases::Leases,
    tokens: token::Tokens,
    admin_token: String,
    authority: String,
    kubelets: proxy::Kubelets,
    tls: Arc<rustls::ServerConfig>,
    in_flight: Arc<tokio::sync::Semaphore>,
    advertise: SocketAddr,
}

/// The API server. Keeps no state but the store's.
#[derive(Clone)]
pub struct ApiServer {
    state: Arc<State>,
    pki: Arc<Pki>,
}

impl ApiServer {
    /// Prepares certificates, loads the watch cache and makes what every cluster has.
    pub async fn open(config: Config, store: Arc<dyn Store>) -> Result<Self, OpenError> {
        let advertise = match config.advertise.ip().is_unspecified() {
            true => SocketAddr::from(([127, 0, 0, 1], config.advertise.port())),
            false => config.advertise,
        };
        let mut names = joey_pki::Names { hosts: config.hosts, addresses: config.addresses, node: config.node_name };
        names.addresses.push(advertise.ip());
        if let Some(host) = nix::unistd::gethostname().ok().and_then(|host| host.into_string().ok())
            && joey_model::id::check_subdomain("host name", &host).is_ok()
        {
            names.hosts.push(host);
        }
        let pki = Pki::open(&config.pki_dir, &names)?;
        let tokens = token::Tokens::new(&pki.signing_key).ok_or_else(|| PkiError::Content {
            path: config.pki_dir.join("sa.key"),
            why: "no ECDSA P-256 key".to_owned(),
        })?;
        let broken = |error: status::ApiError| OpenError::State(error.message);
        let state = State {
            cache: cache::Cache::open(store.clone()).await.map_err(broken)?,
            store,
            types: typing::Types::builtin(),
            leases: leases::Leases::default(),
            tokens,
            admin_token: pki.admin_token.clone(),
            authority: pki.ca.clone(),
            kubelets: proxy::Kubelets::new(&pki)?,
            tls: Arc::new(joey_pki::tls::server(&pki)?),
            in_flight: Arc::new(tokio::sync::Semaphore::new(config.max_in_flight.max(1))),
            advertise,
        };
        bootstrap::bootstrap(&state).await.map_err(broken)?;
        Ok(Self { state: Arc::new(state), pki: Arc::new(pki) })
    }

    /// The API for a caller inside this process, as `kube::Client::new` takes it. No socket, no TLS.
    ///
    /// Exec, attach and port-forward need a connection of their own and are not available this way.
    pub fn service(&self, identity: Identity) -> ApiService {
        ApiService { state: self.state.clone(), identity }
    }

    /// Serves until `shutdown`, then lets running requests finish (10 s at most).
    pub async fn serve(&self, listener: TcpListener, shutdown: impl Future<Output = ()>) {
        serve::serve(self.state.clone(), listener, shutdown).await;
    }

    /// Certificates and keys, for the virtual node.
    pub fn pki(&self) -> &Pki {
        &self.pki
    }

    /// Where clients reach the server: `https://ADDRESS:PORT`.
    pub fn url(&self) -> String {
        format!("https://{}", self.state.advertise)
    }

    /// A kubeconfig for the administrator, with everything in it. Whoever writes it keeps it at mode 0600.
    pub fn kubeconfig(&self) -> String {
        kubeconfig(self.state.advertise, &self.pki.ca, "joey-admin", &self.pki.admin)
    }

    /// A kubeconfig for the virtual node.
    pub fn node_kubeconfig(&self) -> String {
        kubeconfig(self.state.advertise, &self.pki.ca, "joey-node", &self.pki.node)
    }
}

fn kubeconfig(server: SocketAddr, ca: &str, user: &str, credentials: &Credentials) -> String {
    use base64::Engine;
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    format!(
        "apiVersion: v1\nkind: Config\nclusters:\n- name: joey\n  cluster:\n    server: https://{server}\n    \
         certificate-authority-data: {}\nusers:\n- name: {user}\n  user:\n    client-certificate-data: {}\n    \
         client-key-data: {}\ncontexts:\n- name: joey\n  context:\n    cluster: joey\n    user: {user}\n    namespace: \
         default\ncurrent-context: joey\n",
        encode(ca),
        encode(&credentials.certificate),
        encode(&credentials.key),
    )
}
