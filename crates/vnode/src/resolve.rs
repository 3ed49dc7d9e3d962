//! What a Pod names and conversion needs: ConfigMaps, Secrets, tokens, registry credentials. Fetched here, judged in `convert`.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::future::try_join_all;
use joey_api::image::RegistryCredential;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, ServiceAccount};
use kube::api::{Api, PostParams};

use crate::convert::all_containers;
use crate::provider::Capacity;

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
            Some(key) => write!(f, "couldn't find key {key} in {} \"{}\"", self.kind.word(), self.name),
        }
    }
}

impl std::error::Error for Missing {}

type Values = BTreeMap<String, Vec<u8>>;

/// Everything fetched for one Pod. Holds secrets: never logged, not `Debug`.
#[derive(Clone, Default)]
pub struct Objects {
    pub(crate) values: BTreeMap<(Kind, String), Values>,
    pub(crate) tokens: BTreeMap<(Option<String>, Option<i64>), String>,
    pub(crate) credentials: Vec<RegistryCredential>,
    /// Variables that tell of Services.
    pub(crate) services: Vec<(String, String)>,
    pub(crate) node_cpu_milli: u64,
    pub(crate) node_memory_bytes: u64,
}

impl Objects {
    /// Every key of an object; nothing when it is optional and not there.
    pub(crate) fn all(&self, kind: Kind, name: &str, optional: Option<bool>) -> Result<Values, Missing> {
        match self.values.get(&(kind, name.to_owned())) {
            Some(values) => Ok(values.clone()),
            None if optional == Some(true) => Ok(Values::new()),
            None => Err(Missing { kind, name: name.to_owned(), key: None }),
        }
    }

    /// One key of an object; `None` when it is optional and not there.
    pub(crate) fn one(
        &self,
        kind: Kind,
        name: &str,
        key: &str,
        optional: Option<bool>,
    ) -> Result<Option<Vec<u8>>, Missing> {
        let mut all = self.all(kind, name, optional)?;
        match all.remove(key) {
            None if optional != Some(true) => Err(Missing { kind, name: name.to_owned(), key: Some(key.to_owned()) }),
            value => Ok(value),
        }
    }

    pub(crate) fn token(&self, audience: Option<&str>, seconds: Option<i64>) -> Option<&str> {
        self.tokens.get(&(audience.map(str::to_owned), seconds)).map(String::as_str)
    }
}

/// Fetches what the Pod names. Objects that are not there are left out; only a cluster that is away is an error.
pub async fn fetch(client: &kube::Client, pod: &Pod, capacity: Option<&Capacity>) -> Result<Objects, kube::Error> {
    let namespace = pod.metadata.namespace.clone().unwrap_or_default();
    let needs = Needs::of(pod);
    let values = try_join_all(needs.objects.iter().map(|(kind, name)| {
        let namespace = &namespace;
        async move { Ok::<_, kube::Error>(((*kind, name.clone()), value(client, namespace, *kind, name).await?)) }
    }));
    let tokens = try_join_all(needs.tokens.iter().map(|wanted| {
        let namespace = &namespace;
        async move { Ok::<_, kube::Error>((wanted.clone(), token(client, namespace, pod, wanted).await?)) }
    }));
    let (values, tokens, credentials) = tokio::try_join!(values, tokens, credentials(client, &namespace, pod))?;
    Ok(Objects {
        values: values.into_iter().filter_map(|(key, value)| Some((key, value?))).collect(),
        tokens: tokens.into_iter().collect(),
        credentials,
        services: Vec::new(),
        node_cpu_milli: capacity.map_or(0, |c| c.cpu_milli),
        node_memory_bytes: capacity.map_or(0, |c| c.memory_bytes),
    })
}

#[derive(Default)]
struct Needs {
    objects: BTreeSet<(Kind, String)>,
    tokens: BTreeSet<(Option<String>, Option<i64>)>,
}

impl Needs {
    fn of(pod: &Pod) -> Self {
        let mut needs = Self::default();
        let Some(spec) = &pod.spec else { return needs };
        let mut object = |kind, name: &str| {
            needs.objects.insert((kind, name.to_owned()));
        };
        for (_, container) in all_containers(spec) {
            for source in container.env_from.iter().flatten() {
                source.config_map_ref.iter().for_each(|r| object(Kind::ConfigMap, &r.name));
                source.secret_ref.iter().for_each(|r| object(Kind::Secret, &r.name));
            }
            for source in container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
                source.config_map_key_ref.iter().for_each(|r| object(Kind::ConfigMap, &r.name));
                source.secret_key_ref.iter().for_each(|r| object(Kind::Secret, &r.name));
            }
        }
        for volume in spec.volumes.iter().flatten() {
            volume.config_map.iter().for_each(|r| object(Kind::ConfigMap, &r.name));
            volume.secret.iter().filter_map(|r| r.secret_name.as_ref()).for_each(|n| object(Kind::Secret, n));
            for source in volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten()) {
                source.config_map.iter().for_each(|r| object(Kind::ConfigMap, &r.name));
                source.secret.iter().for_each(|r| object(Kind::Secret, &r.name));
                if let Some(token) = &source.service_account_token {
                    needs.tokens.insert((token.audience.clone(), token.expiration_seconds));
                }
            }
        }
        needs
    }
}

async fn value(client: &kube::Client, namespace: &str, kind: Kind, name: &str) -> Result<Option<Values>, kube::Error> {
    match kind {
        Kind::ConfigMap => {
            let found = Api::<ConfigMap>::namespaced(client.clone(), namespace).get_opt(name).await?;
            Ok(found.map(|map| {
                let text = map.data.into_iter().flatten().map(|(key, value)| (key, value.into_bytes()));
                text.chain(map.binary_data.into_iter().flatten().map(|(key, value)| (key, value.0))).collect()
            }))
        }
        Kind::Secret => {
            let found = Api::<Secret>::namespaced(client.clone(), namespace).get_opt(name).await?;
            Ok(found.map(|secret| secret.data.into_iter().flatten().map(|(key, value)| (key, value.0)).collect()))
        }
    }
}

/// A token of the Pod's service account, bound to the Pod: it ends with it.
async fn token(
    client: &kube::Client,
    namespace: &str,
    pod: &Pod,
    (audience, seconds): &(Option<String>, Option<i64>),
) -> Result<String, kube::Error> {
    let account = account(pod);
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: Some(audience.iter().cloned().collect()),
            expiration_seconds: *seconds,
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: pod.metadata.name.clone(),
                uid: pod.metadata.uid.clone(),
            }),
        }),
        ..TokenRequest::default()
    };
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let made = accounts.create_token_request(&account, &PostParams::default(), &request).await?;
    Ok(made.status.and_then(|status| status.token).unwrap_or_default())
}

fn account(pod: &Pod) -> String {
    let named = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
    named.filter(|name| !name.is_empty()).unwrap_or_else(|| "default".to_owned())
}

/// Credentials of the Pod's own pull secrets, or of its service account's when it names none.
async fn credentials(
    client: &kube::Client,
    namespace: &str,
    pod: &Pod,
) -> Result<Vec<RegistryCredential>, kube::Error> {
    let mut references = pod.spec.as_ref().and_then(|spec| spec.image_pull_secrets.clone()).unwrap_or_default();
    if references.is_empty() {
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
        match accounts.get_opt(&account(pod)).await {
            Ok(found) => references = found.and_then(|account| account.image_pull_secrets).unwrap_or_default(),
            Err(error) => tracing::debug!(%error, "pull secrets of the service account are not readable"),
        }
    }
    let mut credentials = Vec::new();
    for reference in references {
        match value(client, namespace, Kind::Secret, &reference.name).await? {
            Some(values) => credentials.extend(read_credentials(&values)),
            None => tracing::warn!(namespace, secret = reference.name, "pull secret is not there"),
        }
    }
    Ok(credentials)
}

/// Reads `.dockerconfigjson` and the older `.dockercfg`.
fn read_credentials(values: &Values) -> Vec<RegistryCredential> {
    let json = |key: &str| values.get(key).and_then(|bytes| serde_json::from_slice::<serde_json::Value>(bytes).ok());
    let auths = json(".dockerconfigjson").map(|mut file| file["auths"].take()).or_else(|| json(".dockercfg"));
    let Some(serde_json::Value::Object(auths)) = auths else { return Vec::new() };
    auths.into_iter().filter_map(|(server, entry)| read_credential(&server, &entry)).collect()
}

fn read_credential(server: &str, entry: &serde_json::Value) -> Option<RegistryCredential> {
    let text = |key: &str| entry.get(key).and_then(|value| value.as_str()).filter(|text| !text.is_empty());
    let (username, password) = match (text("username"), text("password")) {
        (Some(username), Some(password)) => (username.to_owned(), password.to_owned()),
        _ => {
            let plain = String::from_utf8(STANDARD.decode(text("auth")?.trim()).ok()?).ok()?;
            let (username, password) = plain.split_once(':')?;
            (username.to_owned(), password.to_owned())
        }
    };
    let host = server.trim_start_matches("https://").trim_start_matches("http://");
    let host = host.split('/').next().unwrap_or(host);
    let registry = if matches!(host, "index.docker.io" | "registry-1.docker.io") { "docker.io" } else { host };
    Some(RegistryCredential { registry: registry.to_owned(), username, password })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_configurations() {
        let file = br#"{"auths":{"https://index.docker.io/v1/":{"auth":"dTpwOng="},
            "r.example:5000":{"username":"a","password":"b"},"bad":{"auth":"!"}}}"#;
        let read = read_credentials(&Values::from([(".dockerconfigjson".into(), file.to_vec())]));
        let flat: Vec<_> =
            read.iter().map(|c| (c.registry.as_str(), c.username.as_str(), c.password.as_str())).collect();
        assert_eq!(flat, [("docker.io", "u", "p:x"), ("r.example:5000", "a", "b")]);
    }
}
