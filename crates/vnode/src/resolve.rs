//! What a Pod names and conversion needs: ConfigMaps, Secrets, tokens, registry credentials. Fetched here, judged by [`joey_podspec`].

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::future::try_join_all;
use jiff::{SignedDuration, Timestamp};
use joey_api::image::RegistryCredential;
use joey_guard::{Failed, Guard};
use joey_model::{ErrorKind, Fault};
use joey_podspec::{Kind, Needs, Objects, Token, TokenWish, Tokens, Values};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, ServiceAccount};
use kube::api::{Api, PostParams};

use crate::provider::Capacity;

/// The longest life of a token in a Pod, however long it is good.
const LONGEST: SignedDuration = SignedDuration::from_hours(24);
/// How much earlier than it must a token is replaced at most: Pods that began together do not ask together.
const SPREAD: u64 = 10;

/// When a token made now is to be replaced: when four fifths of its life are over, and once a day, as the kubelet has it.
fn due(now: Timestamp, expires: Timestamp, text: &str) -> Timestamp {
    let life = expires.duration_since(now).max(SignedDuration::ZERO);
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let early = SignedDuration::from_secs(i64::try_from(hasher.finish() % SPREAD).unwrap_or(0));
    let after = ((life / 5) * 4).min(LONGEST) - early;
    now.checked_add(after.max(SignedDuration::from_secs(1))).unwrap_or(expires)
}

/// Fetches what the Pod names, but for tokens. Objects that are not there are left out; only a cluster that is away is an
/// error.
pub async fn fetch(client: &kube::Client, pod: &Pod, capacity: Option<&Capacity>) -> Result<Objects, kube::Error> {
    let namespace = pod.metadata.namespace.clone().unwrap_or_default();
    let needs = Needs::of(pod);
    let values = try_join_all(needs.objects.iter().map(|(kind, name)| {
        let namespace = &namespace;
        async move { Ok::<_, kube::Error>(((*kind, name.clone()), value(client, namespace, *kind, name).await?)) }
    }));
    let (values, credentials) = tokio::try_join!(values, credentials(client, &namespace, pod))?;
    Ok(Objects {
        values: values.into_iter().filter_map(|(key, value)| Some((key, value?))).collect(),
        tokens: Tokens::new(),
        credentials,
        services: Vec::new(),
        node_cpu_milli: capacity.map_or(0, |c| c.cpu_milli),
        node_memory_bytes: capacity.map_or(0, |c| c.memory_bytes),
    })
}

async fn value(client: &kube::Client, namespace: &str, kind: Kind, name: &str) -> Result<Option<Values>, kube::Error> {
    match kind {
        Kind::ConfigMap => {
            let found = Api::<ConfigMap>::namespaced(client.clone(), namespace).get_opt(name).await?;
            Ok(found.map(of_config_map))
        }
        Kind::Secret => {
            let found = Api::<Secret>::namespaced(client.clone(), namespace).get_opt(name).await?;
            Ok(found.map(of_secret))
        }
    }
}

pub(crate) fn of_config_map(map: ConfigMap) -> Values {
    let text = map.data.into_iter().flatten().map(|(key, value)| (key, value.into_bytes()));
    text.chain(map.binary_data.into_iter().flatten().map(|(key, value)| (key, value.0))).collect()
}

pub(crate) fn of_secret(secret: Secret) -> Values {
    secret.data.into_iter().flatten().map(|(key, value)| (key, value.0)).collect()
}

/// Tokens of the Pod's service account, made now, as often as the account's guard lets them be.
pub(crate) async fn tokens(
    client: &kube::Client,
    guard: &Guard,
    pod: &Pod,
    wanted: &BTreeSet<TokenWish>,
) -> Result<Tokens, Fault> {
    let namespace = pod.metadata.namespace.clone().unwrap_or_default();
    let application = format!("{namespace}/{}", account(pod));
    let made = try_join_all(wanted.iter().map(|wish| {
        let (namespace, application) = (&namespace, &application);
        async move {
            let one = || async { token(client, namespace, pod, wish).await.map_err(failed) };
            let token = guard.call(application, one).await.map_err(|refused| {
                let message = format!("token of service account \"{application}\" cannot be made: {refused}");
                Fault::new(ErrorKind::Retryable, "TokenNotMade", message)
            })?;
            Ok::<_, Fault>((wish.clone(), token))
        }
    }));
    Ok(made.await?.into_iter().collect())
}

/// Whether a call of the cluster may work later.
fn failed(error: kube::Error) -> Failed<kube::Error> {
    let after = match &error {
        kube::Error::Api(status) if status.code != 429 && status.code < 500 => return Failed::Final(error),
        kube::Error::Api(status) => status.details.as_ref().map(|details| details.retry_after_seconds),
        _ => None,
    };
    let after = after.filter(|seconds| *seconds > 0).map(|seconds| Duration::from_secs(seconds.into()));
    Failed::Again { error, after }
}

/// A token of the Pod's service account, bound to the Pod: it ends with it.
async fn token(
    client: &kube::Client,
    namespace: &str,
    pod: &Pod,
    (audience, seconds): &TokenWish,
) -> Result<Token, kube::Error> {
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
    let (now, status) = (Timestamp::now(), made.status.unwrap_or_default());
    let (text, expires) = (status.token.unwrap_or_default(), status.expiration_timestamp.map_or(now, |time| time.0));
    Ok(Token { due: due(now, expires, &text), expires, text })
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
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn tokens_are_replaced_before_they_end() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        for (life, after) in [(600, 480), (3607, 2885), (7 * 24 * 3600, 24 * 3600)] {
            for text in ["a", "b", "c", "d"] {
                let due = due(now, now + SignedDuration::from_secs(life), text).duration_since(now).as_secs();
                assert!((after - 10..=after).contains(&due), "{life}: {due}");
            }
        }
        assert!(due(now, now - SignedDuration::from_secs(9), "a") > now, "one that is over is not asked for endlessly");
    }

    #[tokio::test]
    async fn many_pods_at_once_make_few_calls_for_tokens_to_a_cluster_that_fails() {
        let (asked, well) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, state) = (asked.clone(), well.clone());
        let service = tower::service_fn(move |_: http::Request<kube::client::Body>| {
            count.fetch_add(1, Ordering::Relaxed);
            let well = state.load(Ordering::Relaxed);
            let (code, body) = match well {
                true => (
                    201,
                    serde_json::json!({"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "metadata": {},
                    "spec": {"audiences": []}, "status": {"token": "t", "expirationTimestamp": "2099-01-01T00:00:00Z"}}),
                ),
                false => (
                    503,
                    serde_json::json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                    "message": "not now", "reason": "ServiceUnavailable", "code": 503}),
                ),
            };
            let answer = http::Response::builder().status(code).body(joey_rpc::full(body.to_string())).unwrap();
            async move { Ok::<_, std::convert::Infallible>(answer) }
        });
        let client = kube::Client::new(service, "default");
        let rest = (Duration::from_millis(300), Duration::from_millis(300));
        let guard = Guard::new(joey_guard::Limits {
            rest,
            burst: 1000,
            patience: Duration::ZERO,
            ..crate::config::token_guard()
        });
        let pod: Pod =
            serde_json::from_value(serde_json::json!({"metadata": {"namespace": "n", "name": "p"}})).unwrap();
        let wanted = BTreeSet::from([(None, Some(600))]);
        let all = futures::future::join_all((0..500).map(|_| tokens(&client, &guard, &pod, &wanted))).await;
        let fault = all.into_iter().map(|one| one.err().unwrap()).next_back().unwrap();
        for part in ["token of service account \"n/default\" cannot be made", "not now", "call guard"] {
            assert!(fault.message.contains(part), "{part} in {fault}");
        }
        let calls = asked.load(Ordering::Relaxed);
        assert!(calls <= 32, "{calls}");
        well.store(true, Ordering::Relaxed);
        let recovered = async {
            while tokens(&client, &guard, &pod, &wanted).await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), recovered).await.unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), calls + 1);
    }

    #[test]
    fn what_volumes_show_is_a_part_of_what_is_named() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"metadata": {}, "spec": {
            "containers": [{"name": "c", "envFrom": [{"secretRef": {"name": "env"}}]}],
            "volumes": [{"name": "v", "projected": {"sources": [{"configMap": {"name": "map"}},
                {"serviceAccountToken": {"path": "t", "expirationSeconds": 600}}, {"downwardAPI": {}}]}}]}}))
        .unwrap();
        let names = |needs: &Needs| needs.objects.iter().map(|(_, name)| name.clone()).collect::<Vec<_>>();
        let (all, shown) = (Needs::of(&pod), Needs::shown(&pod));
        assert_eq!((names(&all), names(&shown)), (vec!["map".into(), "env".into()], vec!["map".to_owned()]));
        assert!(shown.fields && shown.tokens == BTreeSet::from([(None, Some(600))]));
    }

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
