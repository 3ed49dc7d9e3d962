//! The sink behind HTTP: POST of records, one a line (`application/x-ndjson`). An answer of 2xx takes them.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use reqwest::{Certificate, StatusCode, Url};

use crate::sink::{HttpSettings, Refused};

/// How long one request may take.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) struct Http {
    client: reqwest::Client,
    url: Url,
    token_file: Option<PathBuf>,
}

impl Http {
    pub(crate) fn open(settings: &HttpSettings) -> Result<Self, String> {
        let url = Url::parse(&settings.url).map_err(|error| format!("url: {error}"))?;
        let authorities = settings.ca_file.as_ref().map(|path| {
            let pem = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
            Certificate::from_pem_bundle(&pem).map_err(|error| format!("{}: {error}", path.display()))
        });
        let authorities = authorities.transpose()?;
        let build = |authorities: Option<Vec<Certificate>>| {
            let builder = reqwest::Client::builder()
                .user_agent(concat!("joey/", env!("CARGO_PKG_VERSION")))
                .redirect(reqwest::redirect::Policy::none())
                .referer(false)
                .no_proxy()
                .timeout(LIMIT);
            match authorities {
                Some(authorities) => builder.tls_certs_only(authorities),
                None => builder,
            }
            .build()
        };
        // A host without authorities of its own can still use servers that speak plain http.
        let client = match (authorities, url.scheme()) {
            (None, "http") => build(Some(Vec::new())),
            (authorities, _) => build(authorities),
        };
        let client = client.map_err(|error| error.to_string())?;
        Ok(Self { client, url, token_file: settings.token_file.clone() })
    }

    pub(crate) async fn post(&self, body: Bytes) -> Result<(), Refused> {
        let mut request = self.client.post(self.url.clone()).header("content-type", "application/x-ndjson").body(body);
        if let Some(path) = &self.token_file {
            let token = tokio::fs::read_to_string(path).await;
            let token = token.map_err(|error| Refused::Later(format!("{}: {error}", path.display())))?;
            request = request.bearer_auth(token.trim());
        }
        let answer = request.send().await.map_err(|error| {
            let cause = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
            Refused::Later(format!("{error}{cause}"))
        })?;
        match answer.status() {
            status if status.is_success() => Ok(()),
            // It is what these records are that is wrong, not the address, the rights or the moment.
            status @ (StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY) => {
                Err(Refused::Never(status.to_string()))
            }
            status => Err(Refused::NotNow(status.to_string())),
        }
    }
}
