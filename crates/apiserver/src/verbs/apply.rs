//! Server-side apply: the object is made or changed so that it has what a configuration says, and its owners are kept.

use bytes::Bytes;
use serde_json::Value;

use super::update::{ATTEMPTS, Part, replace};
use super::{Answer, Call, Current, create, patch, yaml_body};
use crate::convert;
use crate::object::{metadata, text};
use crate::status::{ApiError, ApiResult, FieldFault};
use crate::typing::{Admitted, UnknownFields};

pub async fn apply(call: &Call<'_>, body: &Bytes) -> ApiResult<Answer> {
    let resource = call.target.resource;
    let config = config(call, body)?;
    for _ in 0..ATTEMPTS {
        let found = call.state.read(&call.target.key()).await?;
        let current = found.map(|(value, revision)| Current { key: call.target.key(), value, revision });
        let admitted = applied(call, current.as_ref(), &config)?;
        let warnings = admitted.warnings.clone();
        let outcome = match &current {
            Some(current) => replace(call, current, &admitted).await?,
            None => match create::insert(call, admitted).await {
                // Somebody else made it meanwhile.
                Err(error) if error.reason == "AlreadyExists" => None,
                made => Some(made?),
            },
        };
        if let Some(answer) = outcome {
            return Ok(answer.with_warnings(warnings));
        }
    }
    Err(ApiError::modified(resource, &call.target.name))
}

/// The configuration that was sent, in its stored form.
fn config(call: &Call<'_>, body: &Bytes) -> ApiResult<Value> {
    let resource = call.target.resource;
    if call.query.get("fieldManager").unwrap_or_default().is_empty() {
        let fault = FieldFault::required("fieldManager", "is required for apply patch");
        return Err(ApiError::invalid_options("patch", &[fault]));
    }
    let mut config = yaml_body(body).map_err(|error| {
        let why = error.message.trim_start_matches("the body of the request is not YAML: ");
        ApiError::bad_request(format!("error decoding YAML: {why}"))
    })?;
    if !config.is_object() {
        return Err(ApiError::bad_request("error decoding YAML: the configuration is not an object"));
    }
    let (version, kind) = (text(&config, "/apiVersion"), text(&config, "/kind"));
    if version != resource.api_version() || kind != resource.kind {
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        return Err(ApiError::bad_request(format!("invalid object type: {group}/{version}, Kind={kind}")));
    }
    if config.pointer("/metadata/managedFields").is_some_and(|owners| !owners.is_null()) {
        return Err(ApiError::bad_request("metadata.managedFields must be nil"));
    }
    let misfits = call.state.types.misfits(resource, &config);
    if !misfits.is_empty() {
        let misfits = match misfits.as_slice() {
            [one] => one.clone(),
            many => format!("errors:\n  {}", many.join("\n  ")),
        };
        let (namespace, name) = (text(&config, "/metadata/namespace"), text(&config, "/metadata/name"));
        return Err(ApiError::bad_request(format!(
            "failed to create typed patch object ({namespace}/{name}; {}/{}, Kind={kind}): {misfits}",
            resource.group, resource.version
        )));
    }
    patch::keep_name(call, &mut config)?;
    // What is merged and compared has to have the form of what is stored, or each application would be a change.
    call.state.types.canonical(resource, &mut config)?;
    let mut config = convert::incoming(resource, config);
    if Part::of(call.target.subresource_name()) == Part::Main {
        resource.strategy.fold(&mut config);
    }
    Ok(config)
}

/// What the object becomes, ready to be stored.
fn applied(call: &Call<'_>, current: Option<&Current>, config: &Value) -> ApiResult<Admitted> {
    let resource = call.target.resource;
    if current.is_none() {
        if call.target.subresource.is_some() {
            return Err(ApiError::not_found(resource, &call.target.name));
        }
        let uid = text(config, "/metadata/uid");
        if !uid.is_empty() {
            let why =
                format!("uid mismatch: the provided object specified uid {uid}, and no existing object was found");
            return Err(ApiError::conflict(resource, &call.target.name, &why));
        }
    }
    let writer = call.writer()?;
    let force = call.query.flag("force");
    let live = current.map(|current| &current.value);
    let object = call.state.types.apply(resource, live, config, (&writer, force))?;
    // Unknown fields were told before; what is stored has none.
    let mut admitted = call.state.types.admit(resource.storage(), &object.into(), UnknownFields::IGNORED)?;
    admitted.owned = true;
    if current.is_none() {
        metadata(&mut admitted.value).remove("resourceVersion");
    }
    Ok(admitted)
}
