//! Records in the store: one an instance, and the indexes that keep names and client tokens unique.

use bytes::Bytes;
use jiff::Timestamp;
use joey_api::instance::InstanceSpec;
use joey_model::{ErrorKind, Fault, InstanceId};
use serde::{Deserialize, Serialize};

/// Version of the records written; others are refused.
const VERSION: u32 = 1;

pub(crate) const INSTANCES: &str = "/pool/instances/";
const NAMES: &str = "/pool/names/";
const TOKENS: &str = "/pool/tokens/";

/// What was asked for, whole: with credentials and file contents.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    version: u32,
    pub(crate) id: String,
    pub(crate) spec: InstanceSpec,
    pub(crate) created_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) deleted_at: Option<Timestamp>,
    /// The shortest grace a deletion was asked with, seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) grace: Option<u32>,
}

impl Record {
    pub(crate) fn new(id: &InstanceId, spec: InstanceSpec, created_at: Timestamp) -> Self {
        Self { version: VERSION, id: id.to_string(), spec, created_at, deleted_at: None, grace: None }
    }

    pub(crate) fn encode(&self) -> Result<Bytes, Fault> {
        serde_json::to_vec(self).map(Bytes::from).map_err(|error| unreadable(&self.id, &error.to_string()))
    }

    pub(crate) fn decode(key: &str, bytes: &[u8]) -> Result<(InstanceId, Self), Fault> {
        let record: Self = serde_json::from_slice(bytes).map_err(|error| unreadable(key, &error.to_string()))?;
        if record.version != VERSION {
            return Err(unreadable(key, &format!("version {} is not {VERSION}", record.version)));
        }
        let id = InstanceId::parse(&record.id).map_err(|error| unreadable(key, &error.to_string()))?;
        Ok((id, record))
    }
}

pub(crate) fn instance_key(id: &InstanceId) -> String {
    format!("{INSTANCES}{id}")
}

pub(crate) fn name_key(name: &str) -> String {
    format!("{NAMES}{name}")
}

pub(crate) fn token_key(token: &str) -> String {
    format!("{TOKENS}{token}")
}

fn unreadable(key: &str, why: &str) -> Fault {
    Fault::new(ErrorKind::Internal, "RecordUnreadable", format!("record \"{key}\" cannot be read: {why}"))
}
