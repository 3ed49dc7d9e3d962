//! TLS of the kubelet endpoints, and who may call them: bearers of a client certificate or token whom the cluster allows
//! `nodes/proxy`. Nobody else, and nobody without a name.

use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watch_object};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::NodeError;
use crate::config::{ClientAuth, Config, ServingCertificate};

/// In kube-system; its key `client-ca-file` is the authority of client certificates.
const AUTHENTICATION: &str = "extension-apiserver-authentication";
/// Members may do everything, as kube-apiserver has it; nobody is asked.
const MASTERS: &str = "system:masters";

/// A caller by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    pub user: String,
    pub groups: Vec<String>,
}

fn tls_fault(what: &str, error: impl std::fmt::Display) -> NodeError {
    NodeError::Tls(format!("{what}: {error}"))
}

/// Certificate chain and key the endpoints show.
pub(crate) fn identity(config: &Config) -> Result<Identity, NodeError> {
    match &config.serving {
        ServingCertificate::Files { certificate, key } => {
            let chain = CertificateDer::pem_file_iter(certificate)
                .and_then(Iterator::collect)
                .map_err(|error| tls_fault("serving certificate could not be read", error))?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(|error| tls_fault("key could not be read", error))?;
            Ok((chain, key))
        }
        ServingCertificate::SelfSigned => {
            let made =
                rcgen::generate_simple_self_signed(vec![config.node.name.clone(), config.node.address.to_string()])
                    .map_err(|error| tls_fault("serving certificate could not be made", error))?;
            let key = PrivateKeyDer::try_from(made.signing_key.serialize_der())
                .map_err(|error| tls_fault("key could not be made", error))?;
            Ok((vec![made.cert.der().clone()], key))
        }
    }
}

/// What the endpoints show: certificate chain and key.
pub(crate) type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// The server's side of TLS, which changes while connections come. Those that are open stay as they are.
#[derive(Clone)]
pub(crate) struct Tls(watch::Receiver<Option<Arc<rustls::ServerConfig>>>);

impl Tls {
    /// Waits until something is known to serve with; `None`: there never will be.
    pub(crate) async fn ready(&mut self) -> Option<()> {
        self.0.wait_for(Option::is_some).await.ok().map(drop)
    }

    /// What a new connection is taken with.
    pub(crate) fn current(&self) -> Option<Arc<rustls::ServerConfig>> {
        self.0.borrow().clone()
    }
}

/// The server's side of TLS, and the work of following the client authority the cluster publishes. The work ends only when it
/// cannot go on.
pub(crate) fn tls(
    client: kube::Client,
    config: &Config,
    identity: Identity,
) -> (Tls, impl Future<Output = Result<(), NodeError>> + Send + use<>) {
    let (current, tls) = watch::channel(None);
    let authority = config.client_auth.clone();
    let work = async move {
        match authority {
            ClientAuth::Authority(path) => {
                let pem =
                    std::fs::read(path).map_err(|error| tls_fault("client authority could not be read", error))?;
                current.send_replace(Some(Arc::new(server(&pem, &identity)?)));
                std::future::pending().await
            }
            ClientAuth::Cluster => follow_authority(&client, &identity, &current).await,
        }
    };
    (Tls(tls), work)
}

/// The server's side of TLS with the authority given in PEM, which may be empty. Client certificates are asked for and verified,
/// their absence is judged per request.
fn server(authority: &[u8], (chain, key): &Identity) -> Result<rustls::ServerConfig, NodeError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(authority) {
        let certificate = certificate.map_err(|error| tls_fault("client authority is not PEM", error))?;
        roots.add(certificate).map_err(|error| tls_fault("client authority is not usable", error))?;
    }
    let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| tls_fault("TLS versions", error))?;
    let builder = if roots.is_empty() {
        builder.with_no_client_auth()
    } else {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
            .allow_unauthenticated()
            .build()
            .map_err(|error| tls_fault("client authority", error))?;
        builder.with_client_cert_verifier(verifier)
    };
    let mut tls = builder
        .with_single_cert(chain.clone(), key.clone_key())
        .map_err(|error| tls_fault("serving certificate", error))?;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(tls)
}

/// Follows the client authority the cluster publishes: it may appear late, and it rotates. Nothing is served before the cluster
/// has answered once; an authority that cannot be used leaves the last one in force.
async fn follow_authority(
    client: &kube::Client,
    identity: &Identity,
    current: &watch::Sender<Option<Arc<rustls::ServerConfig>>>,
) -> Result<(), NodeError> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "kube-system");
    let mut seen = Box::pin(watch_object(maps, AUTHENTICATION).default_backoff());
    let mut known: Option<String> = None;
    while let Some(found) = seen.next().await {
        let published = match found {
            Ok(map) => published_authority(map),
            Err(error) if is_refused(&error) && known.is_none() => {
                tracing::warn!(
                    "the cluster's client authority is not readable; until it is, only bearer tokens are taken"
                );
                String::new()
            }
            Err(error) => {
                tracing::debug!(%error, "the cluster's client authority could not be read, trying again");
                continue;
            }
        };
        if known.as_ref() == Some(&published) {
            continue;
        }
        match server(published.as_bytes(), identity) {
            Ok(tls) => {
                tracing::info!(present = !published.is_empty(), "the cluster's client authority is taken");
                current.send_replace(Some(Arc::new(tls)));
            }
            // Without any, whoever comes with a token is still served.
            Err(error) if known.is_none() => {
                tracing::warn!(%error, "the cluster's client authority is not usable; only bearer tokens are taken");
                current.send_replace(Some(Arc::new(server(&[], identity)?)));
            }
            Err(error) => {
                tracing::warn!(%error, "the cluster's new client authority is not usable, the last one stays")
            }
        }
        known = Some(published);
    }
    Ok(())
}

fn published_authority(map: Option<ConfigMap>) -> String {
    map.and_then(|map| map.data).and_then(|mut data| data.remove("client-ca-file")).unwrap_or_default()
}

/// Whether the cluster answered that this node may not read.
fn is_refused(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 403,
        watcher::Error::WatchError(status) => status.code == 403,
        _ => false,
    }
}

/// The name in a verified client certificate: common name and organizations.
pub(crate) fn certificate_caller(certificate: &CertificateDer<'_>) -> Option<Caller> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let text = |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| attribute.as_str().ok().map(str::to_owned);
    let user = parsed.subject().iter_common_name().next().and_then(text)?;
    let groups = parsed.subject().iter_organization().filter_map(text).collect();
    Some(Caller { user, groups })
}

/// Whom the cluster knows by this token.
pub(crate) async fn token_caller(client: &kube::Client, token: &str) -> Option<Caller> {
    let review = TokenReview {
        spec: TokenReviewSpec { token: token.to_owned(), ..TokenReviewSpec::default() },
        ..TokenReview::default()
    };
    let made = Api::<TokenReview>::all(client.clone()).create(&PostParams::default(), &review).await.ok()?;
    let status = made.status.filter(|status| status.authenticated == Some(true))?;
    let user = status.user?;
    Some(Caller { user: user.username?, groups: user.groups.unwrap_or_default() })
}

/// Whether the caller may do this on the node's proxy (`nodes/proxy`, as the kubelet asks).
pub(crate) async fn allowed(client: &kube::Client, config: &Config, caller: &Caller, verb: &str) -> bool {
    if config.trusted_callers.contains(&caller.user) || caller.groups.iter().any(|group| group == MASTERS) {
        return true;
    }
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(caller.user.clone()),
            groups: Some(caller.groups.clone()),
            resource_attributes: Some(ResourceAttributes {
                verb: Some(verb.to_owned()),
                resource: Some("nodes".into()),
                subresource: Some("proxy".into()),
                name: Some(config.node.name.clone()),
                version: Some("v1".into()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    match Api::<SubjectAccessReview>::all(client.clone()).create(&PostParams::default(), &review).await {
        Ok(made) => made.status.is_some_and(|status| status.allowed),
        Err(error) => {
            tracing::warn!(%error, user = caller.user, "access could not be asked about and is refused");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use bytes::Bytes;
    use http::{Request, Response};
    use k8s_openapi::api::core::v1::ConfigMap;
    use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
    use rustls::pki_types::{PrivatePkcs8KeyDer, ServerName};
    use serde_json::json;
    use tokio::sync::{Mutex, mpsc};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::*;

    /// An authority: its certificate as PEM, and a client certificate it signed.
    struct Authority {
        pem: String,
        client: (CertificateDer<'static>, Vec<u8>),
    }

    impl Authority {
        fn new(name: &str) -> Self {
            let key = KeyPair::generate().unwrap();
            let mut own = CertificateParams::default();
            own.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            own.distinguished_name.push(rcgen::DnType::CommonName, name);
            let pem = own.self_signed(&key).unwrap().pem();
            let issuer = Issuer::new(own, key);
            let key = KeyPair::generate().unwrap();
            let mut client = CertificateParams::default();
            client.distinguished_name.push(rcgen::DnType::CommonName, "caller");
            client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            let certificate = client.signed_by(&key, &issuer).unwrap().der().clone();
            Self { pem, client: (certificate, key.serialize_der()) }
        }
    }

    /// Who is let in with this authority's client certificate; an error when the handshake is refused.
    async fn enter(
        tls: &Tls,
        shown: &CertificateDer<'static>,
        authority: &Authority,
    ) -> Result<Option<Caller>, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut trusted = RootCertStore::empty();
        trusted.add(shown.clone()).unwrap();
        let key = PrivatePkcs8KeyDer::from(authority.client.1.clone()).into();
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(trusted)
            .with_client_auth_cert(vec![authority.client.0.clone()], key)
            .unwrap();
        let (near, far) = tokio::io::duplex(64 << 10);
        let connector = TlsConnector::from(Arc::new(client));
        let (accepted, connected) = tokio::join!(
            TlsAcceptor::from(tls.current().unwrap()).accept(near),
            connector.connect(ServerName::try_from("virtual").unwrap(), far)
        );
        drop(connected);
        let stream = accepted.map_err(|error| error.to_string())?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        Ok(certificate.and_then(certificate_caller))
    }

    fn map(revision: u32, authority: &str) -> ConfigMap {
        serde_json::from_value(json!({
            "metadata": { "name": AUTHENTICATION, "namespace": "kube-system", "resourceVersion": revision.to_string() },
            "data": { "client-ca-file": authority },
        }))
        .unwrap()
    }

    /// A cluster that lists nothing and then sends what the channel says.
    fn cluster(told: mpsc::Receiver<serde_json::Value>) -> kube::Client {
        let told = Arc::new(Mutex::new(Some(told)));
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let told = told.clone();
            async move {
                let query = request.uri().query().unwrap_or_default().to_owned();
                let body = match query.contains("watch=true") {
                    true => {
                        let told = told.lock().await.take();
                        joey_rpc::stream(futures::stream::unfold(told, |told| async move {
                            let mut told = told?;
                            let line = format!("{}\n", told.recv().await?);
                            Some((Ok(Bytes::from(line)), Some(told)))
                        }))
                    }
                    false => joey_rpc::full(
                        json!({ "kind": "ConfigMapList", "apiVersion": "v1", "metadata": { "resourceVersion": "1" },
                            "items": [] })
                        .to_string(),
                    ),
                };
                Ok::<_, Infallible>(Response::new(body))
            }
        });
        kube::Client::new(service, "default")
    }

    #[tokio::test]
    async fn an_authority_may_come_late_and_change() {
        let (tell, told) = mpsc::channel(4);
        let config = Config::new("virtual", "127.0.0.1".parse().unwrap());
        let identity = identity(&config).unwrap();
        let shown = identity.0[0].clone();
        let (mut tls, work) = tls(cluster(told), &config, identity);
        let work = tokio::spawn(work);
        let (first, second) = (Authority::new("first"), Authority::new("second"));
        let caller = Some(Caller { user: "caller".into(), groups: Vec::new() });
        tls.ready().await.unwrap();
        assert_eq!(enter(&tls, &shown, &first).await, Ok(None), "nothing is published, so certificates name nobody");
        let mut publish = async |kind: &str, revision, pem: &str| {
            tls.0.mark_unchanged();
            tell.send(json!({ "type": kind, "object": map(revision, pem) })).await.unwrap();
            tls.0.changed().await.unwrap();
            (enter(&tls, &shown, &first).await, enter(&tls, &shown, &second).await)
        };
        let (one, other) = publish("ADDED", 2, &first.pem).await;
        assert_eq!((one, other.is_err()), (Ok(caller.clone()), true));
        let (one, other) = publish("MODIFIED", 3, &format!("{}{}", first.pem, second.pem)).await;
        assert_eq!((one, other), (Ok(caller.clone()), Ok(caller.clone())));
        // What cannot be used changes nothing; the next that can be does.
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        tell.send(json!({ "type": "MODIFIED", "object": map(4, broken) })).await.unwrap();
        let (one, other) = publish("MODIFIED", 5, &second.pem).await;
        assert_eq!((one.is_err(), other), (true, Ok(caller)));
        work.abort();
    }
}
