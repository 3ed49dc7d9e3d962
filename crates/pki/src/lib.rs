//! The cluster's own certificates and keys: made once, kept in one directory, reused at restart, renewed before they expire.
//!
//! Every key is a file of mode 0600 in a directory of mode 0700; a file is written beside its place and renamed, so a crash
//! leaves the old one or the new one. Who may do what with
//! a certificate is the API server's matter.

use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use time::{Duration, OffsetDateTime};

pub mod tls;

/// Life of the authority: ten years, as kubeadm's.
const CA_LIFE: Duration = Duration::days(3650);
/// Life of every other certificate: one year, as kubeadm's.
const LEAF_LIFE: Duration = Duration::days(365);
/// A certificate with less than this left is made anew at start.
const RENEW_BEFORE: Duration = Duration::days(60);

#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("cannot {verb} {path}")]
    File {
        verb: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot make certificate \"{name}\"")]
    Make {
        name: String,
        #[source]
        source: rcgen::Error,
    },
    #[error("{path} does not hold what it should: {why}")]
    Content { path: PathBuf, why: String },
    #[error("certificate \"{name}\" cannot be used for TLS")]
    Tls {
        name: String,
        #[source]
        source: rustls::Error,
    },
}

/// A certificate with its key, both PEM.
#[derive(Clone)]
pub struct Credentials {
    pub certificate: String,
    pub key: String,
}

impl Credentials {
    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        CertificateDer::pem_slice_iter(self.certificate.as_bytes()).filter_map(Result::ok).collect()
    }

    pub(crate) fn private_key(&self, name: &str) -> Result<PrivateKeyDer<'static>, PkiError> {
        PrivateKeyDer::from_pem_slice(self.key.as_bytes())
            .map_err(|error| PkiError::Content { path: name.into(), why: error.to_string() })
    }
}

/// Everything in the directory.
#[derive(Clone)]
pub struct Pki {
    /// The authority's certificate, PEM.
    pub ca: String,
    /// What the API server's listener shows.
    pub server: Credentials,
    /// A client in the group `system:masters`.
    pub admin: Credentials,
    /// The virtual node's client, in the group `system:nodes`.
    pub node: Credentials,
    /// What the virtual node's kubelet endpoint shows.
    pub kubelet_server: Credentials,
    /// What the API server shows to kubelet endpoints.
    pub kubelet_client: Credentials,
    /// Bearer token of the administrator.
    pub admin_token: String,
    /// PKCS#8 of the ECDSA P-256 key that signs service-account tokens.
    pub signing_key: Vec<u8>,
}

/// The common name of the API server's certificate towards kubelet endpoints.
pub const KUBELET_CLIENT: &str = "joey-apiserver-kubelet-client";

/// What certificates must name.
pub struct Names {
    /// Host names the server is reached by, besides the standard ones.
    pub hosts: Vec<String>,
    /// Addresses the server and the kubelet endpoint are reached by, besides loopback.
    pub addresses: Vec<IpAddr>,
    pub node: String,
}

impl Pki {
    /// Reads the directory, making what is missing, about to expire or no longer fits the names.
    pub fn open(dir: &Path, names: &Names) -> Result<Self, PkiError> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| PkiError::File {
            verb: "create",
            path: dir.to_owned(),
            source,
        })?;
        let authority = Authority::open(dir)?;
        let server = authority.leaf(dir, "server", Subject::server("joey-apiserver", server_names(names)))?;
        let admin = authority.leaf(dir, "admin", Subject::client("joey-admin", &["system:masters"]))?;
        let node_name = format!("system:node:{}", names.node);
        let node = authority.leaf(dir, "node", Subject::client(&node_name, &["system:nodes"]))?;
        let kubelet_names = kubelet_names(names);
        let kubelet_server = authority.leaf(dir, "kubelet-server", Subject::server(&node_name, kubelet_names))?;
        let kubelet_client = authority.leaf(dir, "kubelet-client", Subject::client(KUBELET_CLIENT, &[]))?;
        let admin_token = admin_token(&dir.join("admin.token"))?;
        let signing_key = signing_key(&dir.join("sa.key"))?;
        Ok(Self { ca: authority.pem, server, admin, node, kubelet_server, kubelet_client, admin_token, signing_key })
    }
}

fn server_names(names: &Names) -> Vec<String> {
    let standard = [
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ];
    let mut all: Vec<String> = standard.iter().map(|name| (*name).to_owned()).collect();
    all.extend(names.hosts.iter().cloned());
    all.extend(addresses(names));
    all
}

fn kubelet_names(names: &Names) -> Vec<String> {
    let mut all = vec!["localhost".to_owned(), names.node.clone()];
    all.extend(names.hosts.iter().cloned());
    all.extend(addresses(names));
    all.sort();
    all.dedup();
    all
}

fn addresses(names: &Names) -> Vec<String> {
    let loopback = [IpAddr::from([127, 0, 0, 1]), IpAddr::from(std::net::Ipv6Addr::LOCALHOST)];
    let given = names.addresses.iter().copied().filter(|address| !address.is_unspecified());
    let mut all: Vec<String> = loopback.into_iter().chain(given).map(|address| address.to_string()).collect();
    all.sort();
    all.dedup();
    all
}

struct Subject {
    common_name: String,
    groups: Vec<String>,
    /// Names and addresses; empty for clients.
    names: Vec<String>,
}

impl Subject {
    fn server(common_name: &str, names: Vec<String>) -> Self {
        Self { common_name: common_name.to_owned(), groups: Vec::new(), names }
    }

    fn client(common_name: &str, groups: &[&str]) -> Self {
        let groups = groups.iter().map(|group| (*group).to_owned()).collect();
        Self { common_name: common_name.to_owned(), groups, names: Vec::new() }
    }
}

struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
    /// Its leaves have to be made again.
    fresh: bool,
}

impl Authority {
    fn open(dir: &Path) -> Result<Self, PkiError> {
        let (certificate, key) = (dir.join("ca.crt"), dir.join("ca.key"));
        let make = |source| PkiError::Make { name: "ca".into(), source };
        if let (Some(pem), Some(key)) = (read(&certificate)?, read(&key)?)
            && seconds_left(&pem) > RENEW_BEFORE.whole_seconds()
        {
            let key = KeyPair::from_pem(&key).map_err(make)?;
            let issuer = Issuer::from_ca_cert_pem(&pem, key).map_err(make)?;
            return Ok(Self { pem, issuer, fresh: false });
        }
        let pair = KeyPair::generate().map_err(make)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "joey-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        life(&mut params, CA_LIFE);
        let pem = params.self_signed(&pair).map_err(make)?.pem();
        write(&key, pair.serialize_pem().as_bytes())?;
        write(&certificate, pem.as_bytes())?;
        Ok(Self { pem, issuer: Issuer::new(params, pair), fresh: true })
    }

    fn leaf(&self, dir: &Path, name: &str, subject: Subject) -> Result<Credentials, PkiError> {
        let (certificate, key) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
        if !self.fresh
            && let (Some(pem), Some(key)) = (read(&certificate)?, read(&key)?)
            && seconds_left(&pem) > RENEW_BEFORE.whole_seconds()
            && fits(&pem, &subject)
        {
            return Ok(Credentials { certificate: pem, key });
        }
        let make = |source| PkiError::Make { name: name.to_owned(), source };
        let pair = KeyPair::generate().map_err(make)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, subject.common_name.as_str());
        for group in &subject.groups {
            params.distinguished_name.push(DnType::OrganizationName, group.as_str());
        }
        for name in &subject.names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into().map_err(make)?),
            });
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match subject.names.is_empty() {
            true => vec![ExtendedKeyUsagePurpose::ClientAuth],
            false => vec![ExtendedKeyUsagePurpose::ServerAuth],
        };
        params.use_authority_key_identifier_extension = true;
        life(&mut params, LEAF_LIFE);
        let pem = params.signed_by(&pair, &self.issuer).map_err(make)?.pem();
        write(&key, pair.serialize_pem().as_bytes())?;
        write(&certificate, pem.as_bytes())?;
        Ok(Credentials { certificate: pem, key: pair.serialize_pem() })
    }
}

fn life(params: &mut CertificateParams, life: Duration) {
    // A little in the past: clocks differ.
    params.not_before = OffsetDateTime::now_utc() - Duration::minutes(5);
    params.not_after = params.not_before + life;
}

/// Seconds until a certificate expires; zero when it cannot be read.
fn seconds_left(pem: &str) -> i64 {
    with_certificate(pem, |certificate| certificate.validity().not_after.timestamp())
        .map(|end| end - OffsetDateTime::now_utc().unix_timestamp())
        .unwrap_or_default()
}

fn with_certificate<T>(pem: &str, read: impl FnOnce(&x509_parser::certificate::X509Certificate<'_>) -> T) -> Option<T> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).ok()?;
    Some(read(&certificate))
}

/// Whether a certificate names the subject and everything it must.
fn fits(pem: &str, subject: &Subject) -> bool {
    with_certificate(pem, |certificate| {
        let (user, groups) = subject_of(certificate);
        let mut named = Vec::new();
        if let Ok(Some(extension)) = certificate.subject_alternative_name() {
            for name in &extension.value.general_names {
                match name {
                    x509_parser::extensions::GeneralName::DNSName(name) => named.push((*name).to_owned()),
                    x509_parser::extensions::GeneralName::IPAddress(bytes) => named.extend(address(bytes)),
                    _ => {}
                }
            }
        }
        user == subject.common_name
            && groups == subject.groups
            && subject.names.iter().all(|name| named.iter().any(|n| n == name))
    })
    .unwrap_or(false)
}

fn address(bytes: &[u8]) -> Option<String> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(four).to_string());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|sixteen| IpAddr::from(sixteen).to_string())
}

/// Common name and organisations of a certificate: user and groups.
pub fn subject_of(certificate: &x509_parser::certificate::X509Certificate<'_>) -> (String, Vec<String>) {
    let subject = certificate.subject();
    let user = subject.iter_common_name().filter_map(|name| name.as_str().ok()).next().unwrap_or_default();
    let groups = subject.iter_organization().filter_map(|name| name.as_str().ok()).map(str::to_owned).collect();
    (user.to_owned(), groups)
}

fn admin_token(path: &Path) -> Result<String, PkiError> {
    if let Some(token) = read(path)? {
        let token = token.trim().to_owned();
        if token.len() >= 32 {
            return Ok(token);
        }
        return Err(PkiError::Content { path: path.to_owned(), why: "the token has less than 32 characters".into() });
    }
    let bits: [u8; 32] = rand::random();
    let token: String = bits.iter().map(|byte| format!("{byte:02x}")).collect();
    write(path, token.as_bytes())?;
    Ok(token)
}

fn signing_key(path: &Path) -> Result<Vec<u8>, PkiError> {
    let content = |why: String| PkiError::Content { path: path.to_owned(), why };
    let pem = match read(path)? {
        Some(pem) => pem,
        None => {
            let pair = KeyPair::generate().map_err(|source| PkiError::Make { name: "sa".into(), source })?;
            let pem = pair.serialize_pem();
            write(path, pem.as_bytes())?;
            pem
        }
    };
    let key = KeyPair::from_pem(&pem).map_err(|error| content(error.to_string()))?;
    Ok(key.serialize_der())
}

fn read(path: &Path) -> Result<Option<String>, PkiError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(PkiError::File { verb: "read", path: path.to_owned(), source }),
    }
}

/// Writes a file of mode 0600 so that a crash leaves the old one or the new one.
fn write(path: &Path, content: &[u8]) -> Result<(), PkiError> {
    let beside = path.with_extension("new");
    let attempt = || -> std::io::Result<()> {
        let _ = std::fs::remove_file(&beside);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    };
    attempt().map_err(|source| PkiError::File { verb: "write", path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn made_once_and_again_for_new_names() {
        let dir = tempfile::tempdir().unwrap();
        let mut names = Names { hosts: vec!["box".into()], addresses: vec![], node: "joey".into() };
        let first = Pki::open(dir.path(), &names).unwrap();
        let second = Pki::open(dir.path(), &names).unwrap();
        assert_eq!(first.server.certificate, second.server.certificate);
        assert_eq!(first.admin_token, second.admin_token);
        assert_eq!(first.signing_key, second.signing_key);
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
        }
        names.addresses.push("10.1.2.3".parse().unwrap());
        let third = Pki::open(dir.path(), &names).unwrap();
        assert_ne!(first.server.certificate, third.server.certificate);
        assert_eq!(first.admin.certificate, third.admin.certificate);
        assert_eq!(first.ca, third.ca);
    }
}
