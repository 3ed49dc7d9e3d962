//! TLS of both sides: the API server's listener and its connections to kubelet endpoints. The provider is ring throughout.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::{Pki, PkiError};

fn roots(pki: &Pki) -> Result<Arc<RootCertStore>, PkiError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pki.ca.as_bytes()).filter_map(Result::ok) {
        roots.add(certificate).map_err(|source| PkiError::Tls { name: "ca".into(), source })?;
    }
    Ok(Arc::new(roots))
}

/// The listener's side: client certificates of our authority are taken, but nobody must have one.
pub fn server(pki: &Pki) -> Result<ServerConfig, PkiError> {
    let fail = |source| PkiError::Tls { name: "server".into(), source };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(pki)?, provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(|error| PkiError::Content { path: "ca.crt".into(), why: error.to_string() })?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(fail)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(pki.server.chain(), pki.server.private_key("server.key")?)
        .map_err(fail)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// The client's side towards kubelet endpoints.
pub fn kubelet_client(pki: &Pki) -> Result<ClientConfig, PkiError> {
    let fail = |source| PkiError::Tls { name: "kubelet-client".into(), source };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(roots(pki)?, provider.clone())
        .build()
        .map_err(|error| PkiError::Content { path: "ca.crt".into(), why: error.to_string() })?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(fail)?
        .with_webpki_verifier(verifier)
        .with_client_auth_cert(pki.kubelet_client.chain(), pki.kubelet_client.private_key("kubelet-client.key")?)
        .map_err(fail)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}
