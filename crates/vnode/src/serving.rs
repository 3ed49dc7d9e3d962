//! TLS of the kubelet endpoints, and who may call them: bearers of a client certificate or token whom the cluster allows
//! `nodes/proxy`. Nobody else, and nobody without a name.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, PostParams};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::NodeError;
use crate::config::{ClientAuth, Config, ServingCertificate};

const RETRY: Duration = Duration::from_secs(1);
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
pub(crate) fn identity(config: &Config) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), NodeError> {
    match &config.serving {
        ServingCertificate::Files { certificate, key } => {
            let chain = CertificateDer::pem_file_iter(certificate)
                .and_then(Iterator::collect)
                .map_err(|error| tls_fault("serving certificate could not be read", error))?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(|error| tls_fault("key could not be read", error))?;
            Ok((chain, key))
        }
        ServingCertificate::SelfSigned => {
            let made = rcgen::generate_simple_self_signed(vec![config.node_name.clone(), config.address.to_string()])
                .map_err(|error| tls_fault("serving certificate could not be made", error))?;
            let key = PrivateKeyDer::try_from(made.signing_key.serialize_der())
                .map_err(|error| tls_fault("key could not be made", error))?;
            Ok((vec![made.cert.der().clone()], key))
        }
    }
}

/// The server's side of TLS; client certificates are asked for and verified, their absence is judged per request.
pub(crate) async fn tls(
    client: &kube::Client,
    config: &Config,
    (chain, key): (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>),
) -> Result<rustls::ServerConfig, NodeError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    let pem = match &config.client_auth {
        ClientAuth::Authority(path) => {
            std::fs::read(path).map_err(|error| tls_fault("client authority could not be read", error))?
        }
        ClientAuth::Cluster => published_authority(client).await,
    };
    for certificate in CertificateDer::pem_slice_iter(&pem) {
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
    let mut tls = builder.with_single_cert(chain, key).map_err(|error| tls_fault("serving certificate", error))?;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(tls)
}

/// The client authority the cluster publishes; waits for the cluster.
async fn published_authority(client: &kube::Client) -> Vec<u8> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "kube-system");
    loop {
        match maps.get_opt("extension-apiserver-authentication").await {
            Ok(Some(map)) => {
                let authority = map.data.and_then(|mut data| data.remove("client-ca-file")).unwrap_or_default();
                return authority.into_bytes();
            }
            Ok(None) => return Vec::new(),
            Err(kube::Error::Api(status)) if status.code == 403 => {
                tracing::warn!("the cluster's client authority is not readable; only bearer tokens are taken");
                return Vec::new();
            }
            Err(error) => tracing::warn!(%error, "the cluster's client authority could not be read, trying again"),
        }
        tokio::time::sleep(RETRY).await;
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
                name: Some(config.node_name.clone()),
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
