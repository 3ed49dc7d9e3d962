//! Create: check, fill in, admit, and write where nothing was.

use bytes::Bytes;
use joey_store::Op;
use serde_json::Value;

use super::{Answer, Call, with_revision};
use crate::convert;
use crate::kinds::{self, Resource};
use crate::object::{self, metadata, text};
use crate::status::{self, ApiError, ApiResult, FieldFault};
use crate::strategy;
use crate::typing::{Admitted, UnknownFields};

/// Attempts at a generated name before the caller is asked to come again.
const NAME_ATTEMPTS: usize = 8;

pub async fn create(call: &Call<'_>, body: &Bytes) -> ApiResult<Answer> {
    let resource = call.target.resource;
    let mut sent = call.sent(body)?;
    check_type(resource, &mut sent.value)?;
    let unknown = UnknownFields::of(call)?;
    let mut admitted = call.state.types.admit(resource, &sent, unknown)?;
    admitted.value = convert::incoming(resource, admitted.value);
    insert(call, admitted).await
}

/// Puts a new object in its stored form into the store.
pub async fn insert(call: &Call<'_>, admitted: Admitted) -> ApiResult<Answer> {
    let resource = call.target.resource;
    let dry_run = call.query.dry_run(call.target.verb)?;
    let writer = call.writer()?;
    let Admitted { mut value, warnings, mut faults, owned } = admitted;
    place(resource, &call.target.namespace, &mut value)?;
    let generated = begin(resource, &mut value)?;
    resource.strategy.fold(&mut value);
    if !owned {
        call.state.types.own(resource, None, &mut value, &writer);
    }
    resource.strategy.prepare_create(&mut value);
    for attempt in 0..NAME_ATTEMPTS {
        if generated {
            name_anew(&mut value);
        }
        if attempt == 0 {
            judge(call, &value, std::mem::take(&mut faults)).await?;
        }
        let name = text(&value, "/metadata/name").to_owned();
        let key = resource.key(&call.target.namespace, &name);
        if dry_run {
            return match call.state.read(&key).await? {
                Some(_) => Err(ApiError::already_exists(resource, &name)),
                None => Ok(Answer::created(convert::outgoing(resource, value)).with_warnings(warnings)),
            };
        }
        let lease = call.state.leases.for_kind(&*call.state.store, resource).await?;
        let stored = object::encode(resource, &value);
        if let Some(revision) = call.state.commit(&key, 0, Op::Put { key: key.clone(), value: stored, lease }).await? {
            let value = convert::outgoing(resource, with_revision(value, revision));
            return Ok(Answer::created(value).with_warnings(warnings));
        }
        if !generated {
            let there = call.state.read(&key).await?;
            let mut error = ApiError::already_exists(resource, &name);
            if there.is_some_and(|(value, _)| object::is_deleting(&value)) {
                error.message = format!("object is being deleted: {}", error.message);
            }
            return Err(error);
        }
    }
    Err(ApiError::already_exists(resource, text(&value, "/metadata/name")))
}

/// Whether the body is of the kind the path is about; a body that does not say is.
pub fn check_type(resource: &Resource, value: &mut Value) -> ApiResult<()> {
    for (key, own) in [("apiVersion", resource.api_version()), ("kind", resource.kind.to_owned())] {
        if value.get(key).is_none_or(|said| said.is_null() || said == "") {
            value[key] = own.into();
        }
    }
    let (version, kind) = (text(value, "/apiVersion"), text(value, "/kind"));
    if version != resource.api_version() {
        return Err(ApiError::bad_request(format!(
            "the API version in the data ({version}) does not match the expected API version ({})",
            resource.api_version()
        )));
    }
    if kind != resource.kind {
        return Err(ApiError::bad_request(format!(
            "the kind in the data ({kind}) does not match the expected kind ({})",
            resource.kind
        )));
    }
    Ok(())
}

/// Puts the object into the namespace of the path.
pub fn place(resource: &Resource, namespace: &str, value: &mut Value) -> ApiResult<()> {
    let metadata = metadata(value);
    match metadata.get("namespace").and_then(Value::as_str).unwrap_or_default() {
        "" => {}
        given if resource.namespaced && given != namespace => {
            return Err(ApiError::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        _ => {}
    }
    match resource.namespaced {
        true => metadata.insert("namespace".into(), namespace.into()),
        false => metadata.remove("namespace"),
    };
    Ok(())
}

/// Sets what only the server sets. Returns whether the name is to be generated.
fn begin(resource: &Resource, value: &mut Value) -> ApiResult<bool> {
    let version = text(value, "/metadata/resourceVersion");
    if !version.is_empty() && version != "0" {
        return Err(ApiError::bad_request("resourceVersion should not be set on objects to be created"));
    }
    if resource.has_status()
        && resource.strategy.clears_status()
        && let Some(map) = value.as_object_mut()
    {
        map.remove("status");
    }
    let metadata = metadata(value);
    for own in ["resourceVersion", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "generation"] {
        metadata.remove(own);
    }
    metadata.insert("uid".into(), object::uid().into());
    metadata.insert("creationTimestamp".into(), object::now().into());
    if resource.strategy.counts_generations() {
        metadata.insert("generation".into(), 1.into());
    }
    let has = |key: &str| metadata.get(key).and_then(Value::as_str).is_some_and(|text| !text.is_empty());
    Ok(!has("name") && has("generateName"))
}

fn name_anew(value: &mut Value) {
    let metadata = metadata(value);
    let base = metadata.get("generateName").and_then(Value::as_str).unwrap_or_default();
    let end = (0..=base.len().min(58)).rev().find(|end| base.is_char_boundary(*end)).unwrap_or(0);
    let name = format!("{}{}", &base[..end], object::name_suffix());
    metadata.insert("name".into(), name.into());
}

/// Everything that may be wrong with a new object.
async fn judge(call: &Call<'_>, value: &Value, of_schema: Vec<FieldFault>) -> ApiResult<()> {
    let resource = call.target.resource;
    let name = text(value, "/metadata/name");
    let mut faults = Vec::new();
    if name.is_empty() {
        faults.push(FieldFault::required("metadata.name", "name or generateName is required"));
    }
    strategy::metadata::check(resource, value, &mut faults);
    resource.strategy.validate(value, &mut faults);
    let faults = status::together(faults, of_schema);
    if !faults.is_empty() {
        return Err(ApiError::invalid(resource, name, &faults));
    }
    if let Err(why) = resource.strategy.admit(value) {
        return Err(ApiError::forbidden(resource, name, &why));
    }
    namespace_takes_objects(call, name).await
}

async fn namespace_takes_objects(call: &Call<'_>, name: &str) -> ApiResult<()> {
    let resource = call.target.resource;
    if !resource.namespaced {
        return Ok(());
    }
    let namespaces = kinds::find("", "v1", "namespaces").ok_or_else(ApiError::no_such_path)?;
    let namespace = &call.target.namespace;
    let Some((found, _)) = call.state.read(&namespaces.key("", namespace)).await? else {
        return Err(ApiError::not_found(namespaces, namespace));
    };
    if object::is_deleting(&found) && resource.plural != "events" {
        let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
        let mut error = ApiError::forbidden(resource, name, &why);
        error.details["causes"] = serde_json::json!([{"reason": "NamespaceTerminating",
            "message": format!("namespace {namespace} is being terminated"), "field": "metadata.namespace"}]);
        return Err(error);
    }
    Ok(())
}
