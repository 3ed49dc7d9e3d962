//! What a Pod names and conversion needs, as it was fetched: ConfigMaps, Secrets, tokens, registry credentials.

use std::collections::BTreeMap;

use jiff::Timestamp;
use joey_api::image::RegistryCredential;
use k8s_openapi::api::core::v1 as core;

/// Kinds of objects that hold values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    ConfigMap,
    Secret,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::ConfigMap => "configmap",
            Self::Secret => "secret",
        }
    }
}

/// An object or key that is not there yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    pub kind: Kind,
    pub name: String,
    pub key: Option<String>,
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.key {
            None => write!(f, "{} \"{}\" not found", self.kind.word(), self.name),
            Some(key) => write!(f, "{} \"{}\" references non-existent key: {key}", self.kind.word(), self.name),
        }
    }
}

impl Missing {
    /// The same as the kubelet says it of a variable.
    pub fn of_variable(&self, pod: &core::Pod) -> String {
        let kind = match self.kind {
            Kind::ConfigMap => "ConfigMap",
            Kind::Secret => "Secret",
        };
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        match &self.key {
            None => self.to_string(),
            Some(key) => format!("couldn't find key {key} in {kind} {namespace}/{}", self.name),
        }
    }
}

impl std::error::Error for Missing {}

/// What an object holds, by key.
pub type Values = BTreeMap<String, Vec<u8>>;
/// Tokens by audience and by the life that was asked for in seconds.
pub type Tokens = BTreeMap<TokenWish, Token>;
pub type TokenWish = (Option<String>, Option<i64>);

/// A token of the Pod's service account.
#[derive(Clone)]
pub struct Token {
    pub text: String,
    /// When another shall take its place.
    pub due: Timestamp,
    /// When it is good no more.
    pub expires: Timestamp,
}

/// Everything fetched for one Pod. Holds secrets: never logged, not `Debug`.
#[derive(Clone, Default)]
pub struct Objects {
    pub values: BTreeMap<(Kind, String), Values>,
    pub tokens: Tokens,
    pub credentials: Vec<RegistryCredential>,
    /// Variables that tell of Services.
    pub services: Vec<(String, String)>,
    pub node_cpu_milli: u64,
    pub node_memory_bytes: u64,
}

impl Objects {
    /// Every key of an object; nothing when it is optional and not there.
    pub fn all(&self, kind: Kind, name: &str, optional: Option<bool>) -> Result<Values, Missing> {
        match self.values.get(&(kind, name.to_owned())) {
            Some(values) => Ok(values.clone()),
            None if optional == Some(true) => Ok(Values::new()),
            None => Err(Missing { kind, name: name.to_owned(), key: None }),
        }
    }

    /// One key of an object; `None` when it is optional and not there.
    pub fn one(&self, kind: Kind, name: &str, key: &str, optional: Option<bool>) -> Result<Option<Vec<u8>>, Missing> {
        let mut all = self.all(kind, name, optional)?;
        match all.remove(key) {
            None if optional != Some(true) => Err(Missing { kind, name: name.to_owned(), key: Some(key.to_owned()) }),
            value => Ok(value),
        }
    }

    pub fn token(&self, audience: Option<&str>, seconds: Option<i64>) -> Option<&str> {
        self.tokens.get(&(audience.map(str::to_owned), seconds)).map(|token| token.text.as_str())
    }
}
