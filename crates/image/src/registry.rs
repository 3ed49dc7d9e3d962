//! Speaks to one repository of one registry: manifests, configurations and blobs, with authentication and retries.
//!
//! Protocol: OCI distribution specification 1.1 and Docker's token authentication. A registry is a stranger: every
//! body is bounded, redirects never carry credentials to another host nor go from https to http, and no wait is endless.
//! Credentials are shown to the registry itself and to the token service it names, and to that only by https or on a host
//! that is trusted with plain http already: this machine, or the registry's own host.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use joey_api::image::RegistryCredential;
use joey_guard::{Failed, Refused};
use joey_model::{Digest, ImageRef};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_RANGE, HeaderValue, RANGE, RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::error::Problem;
use crate::oci::{Descriptor, MANIFEST_TYPES, MAX_DOCUMENT};
use crate::tokens::{Said, Tokens, USUAL_LIFE, Wish};

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
    /// Layers come in parallel: when a token expires one of them fetches the next.
    renewing: tokio::sync::Mutex<()>,
    /// Those of all pulls.
    tokens: Arc<Tokens>,
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
    /// Seconds.
    expires_in: Option<u64>,
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
        tokens: Arc<Tokens>,
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
            renewing: tokio::sync::Mutex::new(()),
            tokens,
        }
    }

    /// The manifest or index a tag or digest names, verified when `digest` is given.
    pub(crate) async fn manifest(&self, name: &str, digest: Option<&Digest>) -> Result<(Vec<u8>, Digest), Problem> {
        let path = format!("manifests/{name}");
        let bytes = self.retrying(|| self.document(&path, MANIFEST_TYPES, "manifest")).await?;
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
        let bytes = self.retrying(|| self.document(&path, "*/*", "configuration")).await?;
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
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Ok((response, 0));
        }
        match first_byte(&response) {
            Some(start) if start > offset => {
                let detail = format!("it answered with bytes from {start} where they were asked for from {offset}");
                Err(Failure::Final(self.unavailable(detail)))
            }
            start => Ok((response, start.unwrap_or(offset))),
        }
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

    async fn document(&self, path: &str, accept: &str, object: &'static str) -> Result<Vec<u8>, Failure> {
        let response = self.get(path, accept, None).await?;
        let bytes = bounded(response, MAX_DOCUMENT).await?;
        let detail = format!("it is larger than {MAX_DOCUMENT} bytes");
        bytes.ok_or(Failure::Final(Problem::Malformed { object, detail }))
    }

    async fn get(&self, path: &str, accept: &str, range: Option<&str>) -> Result<Response, Failure> {
        let url = format!("{}/v2/{}/{path}", self.base, self.repository);
        // The first 401 may be due to a token that another layer renews meanwhile, the second to one's own.
        let mut asked = 0;
        loop {
            let authorization = self.authorization.lock().expect("no holder panics").clone();
            let mut request = self.client.get(&url).header(ACCEPT, accept);
            if let Some(range) = range {
                request = request.header(RANGE, range);
            }
            if let Some(value) = &authorization {
                request = request.header(AUTHORIZATION, value);
            }
            let response = request.send().await.map_err(again)?;
            match response.status() {
                status if status.is_success() => return Ok(response),
                StatusCode::UNAUTHORIZED if asked < 2 => {
                    asked += 1;
                    self.renew(authorization.as_ref(), &response).await?;
                }
                status => return Err(self.refused(status, &response)),
            }
        }
    }

    /// Replaces the header that was answered with 401, unless that has been done since.
    async fn renew(&self, used: Option<&HeaderValue>, response: &Response) -> Result<(), Failure> {
        let _renewing = self.renewing.lock().await;
        let current = self.authorization.lock().expect("no holder panics").clone();
        if current.as_ref() != used {
            return Ok(());
        }
        let value = self.authorize(response, used).await?;
        // The same once more would be refused once more.
        if used == Some(&value) {
            return Err(self.denied());
        }
        *self.authorization.lock().expect("no holder panics") = Some(value);
        Ok(())
    }

    fn denied(&self) -> Failure {
        Failure::Final(Problem::Denied { registry: self.name.clone(), anonymous: self.credential.is_none() })
    }

    fn refused(&self, status: StatusCode, response: &Response) -> Failure {
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if !self.is_own(response.url()) => {
                let host = shown(response.url());
                Failure::Final(self.unavailable(format!("{host}, to which it redirects, answered {status}")))
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => self.denied(),
            StatusCode::NOT_FOUND => Failure::Final(Problem::NotFound { registry: self.name.clone() }),
            status if may_work_later(status) => retry_later(status, response),
            status => Failure::Final(self.unavailable(format!("it answered {status}"))),
        }
    }

    /// Answers the challenge of a 401: Basic with the credential, or a token, other than the one refused, of the realm it names.
    async fn authorize(&self, response: &Response, refused: Option<&HeaderValue>) -> Result<HeaderValue, Failure> {
        // Where a redirect leads is not whom the credentials are for.
        if !self.is_own(response.url()) {
            return Err(self.refused(response.status(), response));
        }
        let challenges: Vec<&str> =
            response.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok()).collect();
        let find = |scheme: &str| {
            challenges.iter().find_map(|text| {
                let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
                word.eq_ignore_ascii_case(scheme).then_some(rest)
            })
        };
        if let Some(parameters) = find("bearer") {
            return self.token(parameters, refused).await;
        }
        match (&self.credential, find("basic")) {
            (Some(credential), Some(_)) => header(&basic(credential)).ok_or_else(|| self.denied()),
            _ => Err(self.denied()),
        }
    }

    /// Whether an answer comes from the registry itself, perhaps by https where http was asked.
    fn is_own(&self, url: &Url) -> bool {
        let Ok(base) = Url::parse(&self.base) else { return false };
        url.origin() == base.origin() || (url.scheme() == "https" && url.host_str() == base.host_str())
    }

    /// Whether a token may be fetched there: a stranger's registry must neither have credentials sent in the clear nor make
    /// this host call services of its own network, whose answers it would be shown as a token.
    fn may_ask(&self, realm: &Url) -> bool {
        let Ok(base) = Url::parse(&self.base) else { return false };
        let by_http = || base.scheme() == "http" && (realm.host() == base.host() || loopback(realm) && loopback(&base));
        realm.username().is_empty() && (realm.scheme() == "https" || realm.scheme() == "http" && by_http())
    }

    /// A token of the service that a challenge names. The guard alone says how often that is tried.
    async fn token(&self, parameters: &str, refused: Option<&HeaderValue>) -> Result<HeaderValue, Failure> {
        let invalid = || Failure::Final(self.unavailable("its authentication challenge cannot be read"));
        let mut url = parameter(parameters, "realm").and_then(|realm| Url::parse(&realm).ok()).ok_or_else(invalid)?;
        let service = format!("token service {}", shown(&url));
        if !self.may_ask(&url) {
            let rule = "it must be reached by https, or be on the host of a registry that is spoken to in plain http";
            return Err(Failure::Final(self.unavailable(format!("its {service} is not asked: {rule}"))));
        }
        let scope = format!("repository:{}:pull", self.repository);
        url.query_pairs_mut().append_pair("scope", &scope);
        if let Some(service) = parameter(parameters, "service") {
            url.query_pairs_mut().append_pair("service", &service);
        }
        let user = self.credential.as_ref().map(|known| (known.username.as_str(), known.password.as_str()));
        let wish = Wish::new(&self.base, url.as_str(), &shown(&url), user);
        let token = self.tokens.get(&wish, refused, || self.exchange(&url)).await;
        token.map_err(|refused| {
            let problem = match refused {
                Refused::Failed(Said::Problem(problem)) => problem,
                Refused::Failed(Said::Detail(detail)) => self.unavailable(format!("its {service}: {detail}")),
                Refused::Held(held) => self.unavailable(format!("its {service}: {held}")),
            };
            Failure::Final(problem)
        })
    }

    /// One try at a token and how long it is good.
    async fn exchange(&self, url: &Url) -> Result<(HeaderValue, Duration), Failed<Said>> {
        let stands = |problem| Failed::Final(Said::Problem(problem));
        let said = |failure| match failure {
            Failure::Again { detail, after } => Failed::Again { error: Said::Detail(detail), after },
            Failure::Final(problem) => stands(problem),
        };
        let mut request = self.client.get(url.clone());
        if let Some(value) = self.credential.as_ref().and_then(|credential| header(&basic(credential))) {
            request = request.header(AUTHORIZATION, value);
        }
        let service = format!("token service {}", shown(url));
        let response = request.send().await.map_err(again).map_err(said)?;
        match response.status() {
            status if status.is_success() => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(said(self.denied())),
            status if may_work_later(status) => return Err(said(retry_later(status, &response))),
            status => return Err(stands(self.unavailable(format!("its {service} answered {status}")))),
        }
        let unreadable = || stands(self.unavailable(format!("the answer of its {service} holds no token")));
        let bytes = bounded(response, MAX_TOKEN).await.map_err(said)?.ok_or_else(unreadable)?;
        let token: Token = serde_json::from_slice(&bytes).map_err(|_| unreadable())?;
        let life = token.expires_in.map_or(USUAL_LIFE, Duration::from_secs);
        let token = token.token.or(token.access_token).filter(|token| !token.is_empty()).ok_or_else(unreadable)?;
        Ok((header(&format!("Bearer {token}")).ok_or_else(unreadable)?, life))
    }
}

fn may_work_later(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
}

/// Host and port of a stranger's address, for messages.
fn shown(url: &Url) -> String {
    let host: String = url.host_str().unwrap_or_default().chars().take(128).collect();
    url.port().map_or_else(|| host.clone(), |port| format!("{host}:{port}"))
}

fn loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The byte at which a partial answer begins (RFC 9110, section 14.4).
fn first_byte(response: &Response) -> Option<u64> {
    let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    range.trim().strip_prefix("bytes")?.trim_start().split('-').next()?.parse().ok()
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
    let after = response.headers().get(RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?));
    Failure::Again { detail: format!("it answered {status}"), after }
}

/// Seconds or a date (RFC 9110, section 10.2.3).
fn retry_after(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::parse(text.trim()).ok()?.timestamp();
    Some(Duration::try_from(date.duration_since(jiff::Timestamp::now())).unwrap_or_default())
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

    #[test]
    fn times_to_come_again() {
        assert_eq!(retry_after(" 7 "), Some(Duration::from_secs(7)));
        assert_eq!(retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        assert!(retry_after("Fri, 21 Oct 2095 07:28:00 GMT").is_some_and(|after| after > Duration::from_secs(9999)));
        assert_eq!(retry_after("soon"), None);
    }

    #[test]
    fn tokens_are_fetched_by_https_or_where_http_is_allowed() {
        let asks = |registry: &str, plain: bool, realm: &str| {
            let reference = ImageRef::parse(&format!("{registry}/app")).unwrap();
            let client = reqwest::Client::builder().tls_certs_only([]).build().unwrap();
            let tokens = Arc::new(Tokens::new(joey_guard::Limits::default()));
            Registry::new(client, &reference, plain, None, tokens).may_ask(&Url::parse(realm).unwrap())
        };
        let _ = rustls::crypto::ring::default_provider().install_default();
        for (registry, plain, realm, expected) in [
            ("r.example", false, "https://auth.example/token", true),
            ("r.example", false, "http://r.example/token", false),
            ("r.example", false, "http://169.254.169.254/latest", false),
            ("r.example", false, "https://u:p@auth.example/token", false),
            ("r.example", false, "file:///etc/passwd", false),
            ("r.example:5000", true, "http://r.example:5001/token", true),
            ("r.example:5000", true, "http://127.0.0.1:5001/token", false),
            ("r.example:5000", true, "http://auth.example/token", false),
            ("127.0.0.1:5000", true, "http://localhost:5001/token", true),
            ("[::1]:5000", true, "http://127.0.0.1/token", true),
            ("127.0.0.1:5000", true, "http://10.0.0.1/token", false),
        ] {
            assert_eq!(asks(registry, plain, realm), expected, "{registry} names {realm}");
        }
    }
}
