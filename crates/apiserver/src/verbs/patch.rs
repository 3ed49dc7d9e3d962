//! Patch: JSON patch, merge patch, strategic merge patch, server-side apply; each makes a new object that update stores.

use bytes::Bytes;
use serde_json::Value;

use super::create::check_type;
use super::update::{ATTEMPTS, replace};
use super::{Answer, Call, apply};
use crate::convert;
use crate::object::{metadata, text};
use crate::status::{ApiError, ApiResult, FieldFault};
use crate::typing::UnknownFields;

const ACCEPTED: &str = "application/json-patch+json, application/merge-patch+json, \
    application/strategic-merge-patch+json, application/apply-patch+yaml";
/// Operations a JSON patch may have (kube-apiserver's bound).
const MAX_OPERATIONS: usize = 10_000;

enum Patch {
    Json(json_patch::Patch),
    Merge(Value),
    Strategic(Value),
}

pub async fn patch(call: &Call<'_>, body: &Bytes) -> ApiResult<Answer> {
    let resource = call.target.resource;
    let patch = match call.media_type().as_str() {
        "application/json-patch+json" => Patch::Json(json_operations(body)?),
        "application/merge-patch+json" => Patch::Merge(object_of(body)?),
        "application/strategic-merge-patch+json" => Patch::Strategic(object_of(body)?),
        "application/apply-patch+yaml" => return apply::apply(call, body).await,
        _ => return Err(ApiError::unsupported_media_type(ACCEPTED)),
    };
    if call.query.get("force").is_some() {
        let fault = FieldFault::forbidden("force", "may not be specified for non-apply patch");
        return Err(ApiError::invalid_options("patch", &[fault]));
    }
    let unknown = UnknownFields::of(call)?;
    for _ in 0..ATTEMPTS {
        let current = call.current().await?;
        let shown = convert::outgoing(resource, current.value.clone());
        let mut patched = patched(call, &patch, shown)?;
        check_type(resource, &mut patched)?;
        let version_given = text(&patched, "/metadata/resourceVersion") != current.revision.to_string();
        let mut admitted = call.state.types.admit(resource, &patched.into(), unknown)?;
        admitted.value = convert::incoming(resource, admitted.value);
        keep_name(call, &mut admitted.value)?;
        if let Some(answer) = replace(call, &current, &admitted).await? {
            return Ok(answer.with_warnings(admitted.warnings));
        }
        if version_given {
            break;
        }
    }
    Err(ApiError::modified(resource, &call.target.name))
}

fn object_of(body: &Bytes) -> ApiResult<Value> {
    let patch: serde_json::Map<String, Value> = serde_json::from_slice(body)
        .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))?;
    Ok(Value::Object(patch))
}

fn json_operations(body: &Bytes) -> ApiResult<json_patch::Patch> {
    let patch: json_patch::Patch = serde_json::from_slice(body)
        .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))?;
    match patch.0.len() > MAX_OPERATIONS {
        true => Err(ApiError::too_large(MAX_OPERATIONS)),
        false => Ok(patch),
    }
}

fn patched(call: &Call<'_>, patch: &Patch, mut value: Value) -> ApiResult<Value> {
    match patch {
        Patch::Json(operations) => {
            json_patch::patch(&mut value, operations).map_err(|error| {
                let mut refused = ApiError::bad_request(format!("the patch cannot be applied: {error}"));
                refused.code = http::StatusCode::UNPROCESSABLE_ENTITY;
                refused.reason = "Invalid";
                refused
            })?;
            Ok(value)
        }
        Patch::Merge(patch) => {
            json_patch::merge(&mut value, patch);
            Ok(value)
        }
        Patch::Strategic(patch) => call.state.types.strategic_merge(call.target.resource, &value, patch),
    }
}

pub fn keep_name(call: &Call<'_>, value: &mut Value) -> ApiResult<()> {
    let name = text(value, "/metadata/name");
    if !name.is_empty() && name != call.target.name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            call.target.name
        )));
    }
    metadata(value).insert("name".into(), call.target.name.as_str().into());
    super::create::place(call.target.resource, &call.target.namespace, value)
}
