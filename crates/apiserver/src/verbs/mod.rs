//! One file a verb. Here: what the verbs share — the call, its body, the answer, and the single write to the store.

pub mod apply;
pub mod create;
pub mod delete;
pub mod get;
pub mod list;
pub mod patch;
pub mod subresource;
pub mod update;
pub mod watch;

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use joey_store::{Condition, Op, TxnOutcome};
use serde_json::Value;

use crate::State;
use crate::auth::Identity;
use crate::object;
use crate::request::{Query, Target};
use crate::status::{ApiError, ApiResult, FieldFault};
use crate::typing::protobuf::{self, Refused};
use crate::typing::{FieldSet, Sent, Writer, read_json};
use update::Part;

/// Bytes of a field manager's name.
const MAX_WRITER: usize = 128;

/// A request that is allowed, about to be carried out.
pub struct Call<'a> {
    pub state: &'a State,
    pub who: &'a Identity,
    pub target: &'a Target,
    pub query: &'a Query,
    pub headers: &'a HeaderMap,
}

/// One object (or Status) to be sent.
pub struct Answer {
    pub code: StatusCode,
    pub value: Value,
    pub warnings: Vec<String>,
}

impl Answer {
    pub fn ok(value: Value) -> Self {
        Self { code: StatusCode::OK, value, warnings: Vec::new() }
    }

    pub fn created(value: Value) -> Self {
        Self { code: StatusCode::CREATED, value, warnings: Vec::new() }
    }

    pub fn with_warnings(mut self, warnings: Vec<String>) -> Self {
        self.warnings = warnings;
        self
    }
}

/// An object as it is in the store now.
pub struct Current {
    pub key: String,
    pub value: Value,
    pub revision: u64,
}

impl Call<'_> {
    /// The object the request names, or 404.
    pub async fn current(&self) -> ApiResult<Current> {
        let key = self.target.key();
        match self.state.read(&key).await? {
            Some((value, revision)) => Ok(Current { key, value, revision }),
            None => Err(ApiError::not_found(self.target.resource, &self.target.name)),
        }
    }

    /// Who will own the fields that the request changes: the name it gives, or its program's.
    pub fn writer(&self) -> ApiResult<Writer> {
        let given = self.query.get("fieldManager").unwrap_or_default();
        let mut faults = Vec::new();
        if given.len() > MAX_WRITER {
            faults.push(FieldFault::too_long("fieldManager", MAX_WRITER));
        }
        if let Some((place, letter)) = given.char_indices().find(|(_, letter)| letter.is_control()) {
            let why = format!("invalid character U+{:04X} (at position {place})", u32::from(letter));
            faults.push(FieldFault::invalid("fieldManager", &given.into(), &why));
        }
        if !faults.is_empty() {
            return Err(ApiError::invalid_options(self.target.verb, &faults));
        }
        let agent = || {
            let agent = self.headers.get(header::USER_AGENT).and_then(|value| value.to_str().ok()).unwrap_or_default();
            // Callers inside this process have no agent, but a name.
            if agent.is_empty() { self.who.user.rsplit(':').next() } else { agent.split('/').next() }
        };
        let name = if given.is_empty() { agent().unwrap_or_default() } else { given };
        let resource = self.target.resource;
        let ignored: &[&[&str]] = match Part::of(self.target.subresource_name()) {
            Part::Main if resource.has_status() => &[&["status"]],
            Part::Main => &[],
            Part::Status => &[&["spec"], &["metadata", "deletionTimestamp"], &["metadata", "ownerReferences"]],
            Part::Finalize | Part::Debug | Part::Resources => &[&["status"]],
        };
        Ok(Writer {
            name: name.chars().filter(|letter| !letter.is_control()).take(MAX_WRITER).collect(),
            api_version: resource.storage().api_version(),
            subresource: self.target.subresource_name().to_owned(),
            now: object::now(),
            ignored: FieldSet::of_fields(ignored),
        })
    }

    /// The media type of the body, without parameters.
    pub fn media_type(&self) -> String {
        let value = self.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
    }

    /// The body as an object, JSON or YAML.
    pub fn object(&self, body: &Bytes) -> ApiResult<Value> {
        self.sent(body).map(|sent| sent.value)
    }

    /// The same, with what was written twice in it.
    pub fn sent(&self, body: &Bytes) -> ApiResult<Sent> {
        let sent = match self.media_type().as_str() {
            "" | "application/json" => {
                let (value, repeated) = read_json(body).map_err(not_json)?;
                Sent { value, repeated }
            }
            "application/yaml" | "text/yaml" => yaml_body(body)?.into(),
            "application/vnd.kubernetes.protobuf" => protobuf_body(body)?.into(),
            _ => return Err(ApiError::unsupported_media_type(ACCEPTED)),
        };
        match sent.value.is_object() {
            true => Ok(sent),
            false => Err(ApiError::bad_request("the body of the request is not an object")),
        }
    }
}

fn not_json(error: serde_json::Error) -> ApiError {
    ApiError::bad_request(format!("the body of the request is not JSON: {error}"))
}

const ACCEPTED: &str = "application/json, application/yaml";

/// Reads Kubernetes' protobuf, for the kinds that Go clients send that way.
pub fn protobuf_body(body: &Bytes) -> ApiResult<Value> {
    protobuf::decode(body).map_err(|refused| match refused {
        Refused::Malformed => ApiError::bad_request("the body of the request is not Kubernetes protobuf"),
        Refused::Kind(_) => ApiError::unsupported_media_type(ACCEPTED),
    })
}

/// Parses YAML.
pub fn yaml_body(body: &Bytes) -> ApiResult<Value> {
    let text = std::str::from_utf8(body).map_err(|_| ApiError::bad_request("the body of the request is not UTF-8"))?;
    serde_saphyr::from_str(text)
        .map_err(|error| ApiError::bad_request(format!("the body of the request is not YAML: {error}")))
}

impl State {
    /// An object by its key, with its resource version in place.
    pub async fn read(&self, key: &str) -> ApiResult<Option<(Value, u64)>> {
        let (entry, _) = self.store.get(key).await.map_err(ApiError::internal)?;
        entry.map(|entry| Ok((object::stored(&entry.value, entry.mod_revision)?, entry.mod_revision))).transpose()
    }

    /// Writes if the key is still at `expected` (0: absent). Returns the new revision, or nothing when it was not.
    pub async fn commit(&self, key: &str, expected: u64, op: Op) -> ApiResult<Option<u64>> {
        let condition = Condition::ModRevision { key: key.to_owned(), equals: expected };
        match self.store.transact(vec![condition], vec![op]).await.map_err(ApiError::internal)? {
            TxnOutcome::Committed { revision } => {
                self.cache.wrote(revision);
                Ok(Some(revision))
            }
            TxnOutcome::Refused { .. } => Ok(None),
        }
    }
}

/// Puts the resource version into an object that was just written.
pub fn with_revision(mut value: Value, revision: u64) -> Value {
    object::metadata(&mut value).insert("resourceVersion".into(), revision.to_string().into());
    value
}
