//! Image references and digests, read the way Docker and the kubelet read them (distribution/reference grammar).

use std::fmt;

/// A content digest: `sha256:` and 64 lower-case hexadecimal digits. Other algorithms are refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(String);

impl Digest {
    pub fn parse(text: &str) -> Result<Self, InvalidReference> {
        let hex = text.strip_prefix("sha256:").unwrap_or_default().as_bytes();
        if hex.len() == 64 && hex.iter().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
            return Ok(Self(text.to_owned()));
        }
        Err(InvalidReference { text: text.to_owned(), why: "a digest is sha256: and 64 hexadecimal digits" })
    }

    /// The digest whose 32 bytes are given.
    pub fn from_sha256(bytes: &[u8; 32]) -> Self {
        let mut text = String::with_capacity(71);
        text.push_str("sha256:");
        for byte in bytes {
            text.push_str(&format!("{byte:02x}"));
        }
        Self(text)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 64 hexadecimal digits, safe as a file name.
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }

    /// The first 12 digits, for people.
    pub fn short(&self) -> &str {
        &self.hex()[..12]
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a reference could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("image reference \"{text}\" is not valid: {why}")]
pub struct InvalidReference {
    pub text: String,
    pub why: &'static str,
}

/// A complete image reference: registry, repository, and a tag, a digest or both.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageRef {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// The registry of a reference that names none.
pub const DEFAULT_REGISTRY: &str = "docker.io";

impl ImageRef {
    /// Reads `[REGISTRY/]REPOSITORY[:TAG][@DIGEST]`; without a registry `docker.io`, without tag and digest `latest`.
    pub fn parse(text: &str) -> Result<Self, InvalidReference> {
        let fail = |why| InvalidReference { text: text.to_owned(), why };
        if text.is_empty() || text.len() > 512 {
            return Err(fail("it must have 1 to 512 characters"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest)?)),
            None => (text, None),
        };
        let slash = rest.rfind('/').map_or(0, |at| at + 1);
        let (name, tag) = match rest[slash..].rfind(':') {
            Some(colon) => (&rest[..slash + colon], Some(&rest[slash + colon + 1..])),
            None => (rest, None),
        };
        if let Some(tag) = tag {
            let first = tag.bytes().next().is_some_and(|c| c.is_ascii_alphanumeric() || c == b'_');
            let all = tag.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b'-'));
            if !first || !all || tag.len() > 128 {
                return Err(fail("a tag has at most 128 letters, digits, '_', '.' and '-'"));
            }
        }
        let (registry, repository) = split_registry(name);
        if !registry_is_valid(&registry) {
            return Err(fail("its registry is not a host with an optional port"));
        }
        if !repository.split('/').all(component_is_valid) {
            return Err(fail("a repository has lower-case letters, digits and single '.', '_', '-' between '/'"));
        }
        let tag = match (&tag, &digest) {
            (None, None) => Some("latest".to_owned()),
            _ => tag.map(str::to_owned),
        };
        Ok(Self { registry, repository, tag, digest })
    }

    pub fn registry(&self) -> &str {
        &self.registry
    }

    pub fn repository(&self) -> &str {
        &self.repository
    }

    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Whether the kubelet's default for this reference is to pull always: tag `latest` and no digest.
    pub fn is_latest(&self) -> bool {
        self.digest.is_none() && self.tag.as_deref() == Some("latest")
    }

    /// Whether the registry is on this machine's loopback, and so spoken to in plain http, as Docker does.
    pub fn registry_is_loopback(&self) -> bool {
        let host = host_of(&self.registry);
        host == "localhost" || host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|a| a.is_loopback())
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

fn split_registry(name: &str) -> (String, String) {
    if let Some((first, rest)) = name.split_once('/')
        && (first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|c| c.is_ascii_uppercase()))
    {
        return match first {
            "index.docker.io" | DEFAULT_REGISTRY => (DEFAULT_REGISTRY.to_owned(), library(rest)),
            _ => (first.to_owned(), rest.to_owned()),
        };
    }
    (DEFAULT_REGISTRY.to_owned(), library(name))
}

fn library(repository: &str) -> String {
    if repository.contains('/') { repository.to_owned() } else { format!("library/{repository}") }
}

fn host_of(registry: &str) -> &str {
    match registry.rfind(':') {
        Some(colon) if !registry[colon..].contains(']') => &registry[..colon],
        _ => registry,
    }
}

fn registry_is_valid(registry: &str) -> bool {
    let host = host_of(registry);
    let port = registry[host.len()..].strip_prefix(':');
    let port_ok = registry.len() == host.len() || port.is_some_and(|p| p.parse::<u16>().is_ok());
    let v6 = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host_ok = match v6 {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.split('.').all(|label| {
            !label.is_empty()
                && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        }),
    };
    port_ok && host_ok
}

fn component_is_valid(component: &str) -> bool {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = component.as_bytes();
    let ends = bytes.first().copied().is_some_and(plain) && bytes.last().copied().is_some_and(plain);
    let all = bytes.iter().all(|&c| plain(c) || matches!(c, b'.' | b'_' | b'-'));
    let doubled = component.contains("..")
        || component.contains("___")
        || ["._", "_.", ".-", "-."].iter().any(|d| component.contains(d));
    ends && all && !doubled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complete_references() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, complete) in [
            ("nginx".to_owned(), "docker.io/library/nginx:latest".to_owned()),
            ("me/app:1.2".into(), "docker.io/me/app:1.2".into()),
            ("localhost/app".into(), "localhost/app:latest".into()),
            ("127.0.0.1:5000/a/b:x".into(), "127.0.0.1:5000/a/b:x".into()),
            (format!("r.example/app@{digest}"), format!("r.example/app@{digest}")),
            (format!("r.example/app:1@{digest}"), format!("r.example/app:1@{digest}")),
            ("[::1]:5000/app".into(), "[::1]:5000/app:latest".into()),
        ] {
            assert_eq!(ImageRef::parse(&text).unwrap().to_string(), complete);
        }
        for bad in
            ["", "Nginx", "a//b", "a:b:c", "a@sha256:12", "a b", "../etc", "a/../b", "r.example:99999/a", "a:-x", "-a"]
        {
            assert!(ImageRef::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn loopback_registries() {
        for yes in ["localhost/a", "localhost:5000/a", "127.0.0.1:5000/a", "127.9.9.9/a", "[::1]:5000/a"] {
            assert!(ImageRef::parse(yes).unwrap().registry_is_loopback(), "{yes}");
        }
        for no in ["a", "r.example/a", "10.0.0.1:5000/a", "localhost.example/a"] {
            assert!(!ImageRef::parse(no).unwrap().registry_is_loopback(), "{no}");
        }
    }
}
