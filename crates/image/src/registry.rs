//! Speaks to one repository of one registry: manifests, configurations and blobs, with authentication and retries.
//!
//! Protocol: OCI distribution specification 1.1 and Docker's token authentication. A registry is a stranger: every
//! body is bounded, redirects never carry credentials to another host nor go from https to http, and no wait is endless.

use std::sync::Mutex;
use std::time::Duration;

use base64::Engine as _;
use joey_api::image::RegistryCredential;
use joey_model::{Digest, ImageRef};
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderValue, RANGE, RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::error::Problem;
use crate::oci::{Descriptor, MANIFEST_TYPES, MAX_DOCUMENT};

/// Tries of one request before the registry counts as unavailable.
pub(crate) const TRIES: u32 = 4;
const MAX_REDIRECTS: usize = 5;
const MAX_TOKEN: u64 = 64 << 10;

pub(crate) struct Registry {
    client: reqwest::Client,
    /// As in references, for messages.
    name: String,
    base: String,
    repository: String,
    credential: Option<RegistryCredential>,
    /// The `Authorization` header that worked.
    authorization: Mutex<Option<HeaderValue>>,
}

/// Why one try did not work.
#[derive(Debug)]
pub(crate) enum Failure {
    Again { detail: String, after: Option<Duration> },
    Final(Problem),
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// The client all registries share. `idle` is the longest wait for the next bytes.
pub(crate) fn client(idle: Duration) -> Result<reqwest::Client, String> {
    let build = |without_roots: bool| {
        let redirects = reqwest::redirect::Policy::custom(|attempt| {
            let from_https = attempt.previous().last().is_some_and(|url| url.scheme() == "https");
            if attempt.previous().len() > MAX_REDIRECTS {
                attempt.error("too many redirects")
            } else if from_https && attempt.url().scheme() != "https" {
                attempt.error("redirect from https to http")
            } else {
                attempt.follow()
            }
        });
        let builder = reqwest::Client::builder()
            .user_agent(concat!("joey/", env!("CARGO_PKG_VERSION")))
            .redirect(redirects)
            .referer(false)
            .no_proxy()
            .connect_timeout(idle.min(Duration::from_secs(10)))
            .read_timeout(idle);
        // A host without CA certificates can still use registries that speak plain http.
        let builder = if without_roots { builder.tls_certs_only([]) } else { builder };
        builder.build()
    };
    build(false).or_else(|_| build(true)).map_err(|error| error.to_string())
}

impl Registry {
    pub(crate) fn new(
        client: reqwest::Client,
        reference: &ImageRef,
        plain_http: bool,
        credential: Option<RegistryCredential>,
    ) -> Self {
        let name = reference.registry();
        let host = if name == joey_model::image_ref::DEFAULT_REGISTRY { "registry-1.docker.io" } else { name };
        let scheme = if plain_http { "http" } else { "https" };
        Self {
            client,
            name: name.to_owned(),
            base: format!("{scheme}://{host}"),
            repository: reference.repository().to_owned(),
            credential,
            authorization: Mutex::new(None),
        }
    }

    /// The manifest or index a tag or digest names, verified when `digest` is given.
    pub(crate) async fn manifest(&self, name: &str, digest: Option<&Digest>) -> Result<(Vec<u8>, Digest), Problem> {
        let path = format!("manifests/{name}");
        let bytes = self.retrying(|| self.document(&path, MANIFEST_TYPES, MAX_DOCUMENT)).await?;
        let actual = Digest::from_sha256(&Sha256::digest(&bytes).into());
        match digest {
            Some(expected) if *expected != actual => Err(Problem::Digest {
                object: "manifest".into(),
                expected: expected.clone(),
                actual: actual.to_string(),
            }),
            _ => Ok((bytes, actual)),
        }
    }

    /// A small blob, verified.
    pub(crate) async fn config(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Problem> {
        let path = format!("blobs/{}", descriptor.digest);
        let bytes = self.retrying(|| self.document(&path, "*/*", MAX_DOCUMENT)).await?;
        let actual = Digest::from_sha256(&Sha256::digest(&bytes).into());
        if actual != descriptor.digest {
            let object = "configuration".to_owned();
            return Err(Problem::Digest { object, expected: descriptor.digest.clone(), actual: actual.to_string() });
        }
        Ok(bytes)
    }

    /// One try at a blob from `offset`; also says at which byte the answer begins (a registry may ignore ranges).
    pub(crate) async fn blob(&self, digest: &Digest, offset: u64) -> Result<(Response, u64), Failure> {
        let range = (offset > 0).then(|| format!("bytes={offset}-"));
        let response = self.get(&format!("blobs/{digest}"), "*/*", range.as_deref()).await?;
        let start = if response.status() == StatusCode::PARTIAL_CONTENT { offset } else { 0 };
        Ok((response, start))
    }

    pub(crate) fn unavailable(&self, detail: impl Into<String>) -> Problem {
        Problem::Unavailable { registry: self.name.clone(), detail: detail.into() }
    }

    async fn retrying<T, F: Future<Output = Result<T, Failure>>>(&self, one: impl Fn() -> F) -> Result<T, Problem> {
        let mut tries = 0;
        loop {
            match one().await {
                Ok(value) => return Ok(value),
                Err(Failure::Final(problem)) => return Err(problem),
                Err(Failure::Again { detail, after }) => {
                    tries += 1;
                    if tries == TRIES {
                        return Err(self.unavailable(detail));
                    }
                    tokio::time::sleep(backoff(tries, after)).await;
                }
            }
        }
    }

    async fn document(&self, path: &str, accept: &str, limit: u64) -> Result<Vec<u8>, Failure> {
        let response = self.get(path, accept, None).await?;
        let bytes = bounded(response, limit).await?;
        bytes.ok_or_else(|| {
            Failure::Final(Problem::Malformed { object: "manifest", detail: format!("over {limit} bytes") })
        })
    }

    async fn get(&self, path: &str, accept: &str, range: Option<&str>) -> Result<Response, Failure> {
        let url = format!("{}/v2/{}/{path}", self.base, self.repository);
        let mut asked = false;
        loop {
            let authorization = self.authorization.lock().expect("no holder panics").clone();
            let mut request = self.client.get(&url).header(ACCEPT, accept);
            if let Some(range) = range {
                request = request.header(RANGE, range);
            }
            if let Some(value) = authorization {
                request = request.header(AUTHORIZATION, value);
            }
            let response = request.send().await.map_err(again)?;
            match response.status() {
                status if status.is_success() => return Ok(response),
                StatusCode::UNAUTHORIZED if !asked => {
                    asked = true;
                    let value = self.authorize(&response).await?;
                    *self.authorization.lock().expect("no holder panics") = Some(value);
                }
                status => return Err(self.refused(status, &response)),
            }
        }
    }

    fn denied(&self) -> Failure {
        Failure::Final(Problem::Denied { registry: self.name.clone(), anonymous: self.credential.is_none() })
    }

    fn refused(&self, status: StatusCode, response: &Response) -> Failure {
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => self.denied(),
            StatusCode::NOT_FOUND => Failure::Final(Problem::NotFound { registry: self.name.clone() }),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => retry_later(status, response),
            status if status.is_server_error() => retry_later(status, response),
            status => Failure::Final(self.unavailable(format!("it answered {status}"))),
        }
    }

    /// Answers the challenge of a 401: Basic with the credential, or a token fetched from the realm it names.
    async fn authorize(&self, response: &Response) -> Result<HeaderValue, Failure> {
        let challenges: Vec<&str> =
            response.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok()).collect();
        let find = |scheme: &str| {
            challenges.iter().find_map(|text| {
                let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
                word.eq_ignore_ascii_case(scheme).then_some(rest)
            })
        };
        if let Some(parameters) = find("bearer") {
            return self.token(parameters).await;
        }
        match (&self.credential, find("basic")) {
            (Some(credential), Some(_)) => header(&basic(credential)).ok_or_else(|| self.denied()),
            _ => Err(self.denied()),
        }
    }

    async fn token(&self, parameters: &str) -> Result<HeaderValue, Failure> {
        let invalid = || Failure::Final(self.unavailable("its authentication challenge cannot be read"));
        let mut url = parameter(parameters, "realm").and_then(|realm| Url::parse(&realm).ok()).ok_or_else(invalid)?;
        // Credentials given for an https registry must not leave in the clear.
        if self.base.starts_with("https://") && url.scheme() != "https" {
            return Err(invalid());
        }
        let scope = format!("repository:{}:pull", self.repository);
        url.query_pairs_mut().append_pair("scope", &scope);
        if let Some(service) = parameter(parameters, "service") {
            url.query_pairs_mut().append_pair("service", &service);
        }
        let mut request = self.client.get(url);
        if let Some(value) = self.credential.as_ref().and_then(|credential| header(&basic(credential))) {
            request = request.header(AUTHORIZATION, value);
        }
        let response = request.send().await.map_err(again)?;
        match response.status() {
            status if status.is_success() => {}
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                return Err(retry_later(status, &response));
            }
            _ => return Err(self.denied()),
        }
        let bytes = bounded(response, MAX_TOKEN).await?.ok_or_else(invalid)?;
        let token: Token = serde_json::from_slice(&bytes).map_err(|_| invalid())?;
        let token = token.token.or(token.access_token).ok_or_else(invalid)?;
        header(&format!("Bearer {token}")).ok_or_else(invalid)
    }
}

/// Exponential from 200 ms, or what the registry asks for, at most 20 s.
pub(crate) fn backoff(failures: u32, after: Option<Duration>) -> Duration {
    let own = Duration::from_millis(100 << failures.min(7));
    after.unwrap_or(own).min(Duration::from_secs(20))
}

fn again(error: reqwest::Error) -> Failure {
    // The innermost cause says what happened; the outer ones repeat the address.
    let mut cause: &dyn std::error::Error = &error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    let detail = if error.is_timeout() { "it did not answer in time".to_owned() } else { cause.to_string() };
    Failure::Again { detail, after: None }
}

pub(crate) fn broken(error: reqwest::Error) -> String {
    match again(error) {
        Failure::Again { detail, .. } => detail,
        Failure::Final(problem) => problem.to_string(),
    }
}

fn retry_later(status: StatusCode, response: &Response) -> Failure {
    let after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    Failure::Again { detail: format!("it answered {status}"), after: after.map(Duration::from_secs) }
}

/// The body; `None` when it is longer than `limit`.
async fn bounded(mut response: Response, limit: u64) -> Result<Option<Vec<u8>>, Failure> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(again)? {
        if (bytes.len() + chunk.len()) as u64 > limit {
            return Ok(None);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(Some(bytes))
}

fn basic(credential: &RegistryCredential) -> String {
    let pair = format!("{}:{}", credential.username, credential.password);
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
}

fn header(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The value of `name` in `a="b",c=d` (RFC 9110, section 11.2).
fn parameter(text: &str, name: &str) -> Option<String> {
    let mut rest = text;
    loop {
        let (key, after) = rest.split_once('=')?;
        let key = key.trim_start_matches([',', ' ']).trim();
        let value;
        if let Some(quoted) = after.strip_prefix('"') {
            let end = quoted.find('"')?;
            (value, rest) = (&quoted[..end], &quoted[end + 1..]);
        } else {
            let end = after.find(',').unwrap_or(after.len());
            (value, rest) = (&after[..end], &after[end..]);
        }
        if key.eq_ignore_ascii_case(name) {
            return Some(value.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenge_parameters() {
        let text = r#"realm="https://auth.example/token",service="registry, of x",scope="repository:a:pull""#;
        assert_eq!(parameter(text, "realm").unwrap(), "https://auth.example/token");
        assert_eq!(parameter(text, "Service").unwrap(), "registry, of x");
        assert_eq!(parameter(text, "error"), None);
        assert_eq!(parameter("realm=\"unclosed", "realm"), None);
    }
}
