//! Update: replace an object, or its status, if nobody else did in between. Patches end here too.

use bytes::Bytes;
use joey_store::Op;
use serde_json::Value;

use super::create::{check_type, place};
use super::{Answer, Call, Current, with_revision};
use crate::convert;
use crate::kinds::Resource;
use crate::object::{self, is_deleting, list, metadata, text};
use crate::status::{self, ApiError, ApiResult};
use crate::strategy::{self, in_place};
use crate::typing::{Admitted, UnknownFields, same_but_for_times};

/// Attempts when others write the same object at the same time and the caller named no version.
pub const ATTEMPTS: usize = 16;

/// What a write may touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All but the status.
    Main,
    Status,
    /// A namespace's `spec.finalizers`.
    Finalize,
    /// A Pod's debug containers.
    Debug,
    /// The resources of a Pod's containers.
    Resources,
}

impl Part {
    pub fn of(subresource: &str) -> Self {
        match subresource {
            "status" => Self::Status,
            "finalize" => Self::Finalize,
            "ephemeralcontainers" => Self::Debug,
            "resize" => Self::Resources,
            _ => Self::Main,
        }
    }
}

pub async fn update(call: &Call<'_>, body: &Bytes) -> ApiResult<Answer> {
    let resource = call.target.resource;
    let mut sent = call.sent(body)?;
    check_type(resource, &mut sent.value)?;
    let unknown = UnknownFields::of(call)?;
    let mut admitted = call.state.types.admit(resource, &sent, unknown)?;
    admitted.value = convert::incoming(resource, admitted.value);
    place(resource, &call.target.namespace, &mut admitted.value)?;
    let name = text(&admitted.value, "/metadata/name");
    if name != call.target.name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            call.target.name
        )));
    }
    let version_given = !matches!(text(&admitted.value, "/metadata/resourceVersion"), "" | "0");
    for _ in 0..ATTEMPTS {
        let current = call.current().await?;
        if let Some(answer) = replace(call, &current, &admitted).await? {
            return Ok(answer.with_warnings(admitted.warnings));
        }
        if version_given {
            break;
        }
    }
    Err(ApiError::modified(resource, &call.target.name))
}

/// Replaces `current` by `wanted` as far as the request's part goes. Nothing when another write came first.
pub async fn replace(call: &Call<'_>, current: &Current, wanted: &Admitted) -> ApiResult<Option<Answer>> {
    let resource = call.target.resource;
    let name = &call.target.name;
    let part = Part::of(call.target.subresource_name());
    check_preconditions(resource, name, &wanted.value, current)?;
    let mut value = merge(resource, part, wanted, &current.value);
    let mut faults = Vec::new();
    strategy::metadata::check_update(resource, &value, &current.value, &mut faults);
    match part {
        Part::Main => {
            resource.strategy.fold(&mut value);
            resource.strategy.prepare_update(&mut value, &current.value);
            resource.strategy.validate(&value, &mut faults);
            resource.strategy.validate_update(&value, &current.value, &mut faults);
        }
        Part::Debug => in_place::check_debug(&value, &current.value, &mut faults),
        Part::Resources => in_place::check_resources(&value, &current.value, &mut faults),
        // Annotations are written with the status, too.
        Part::Status => resource.strategy.validate_update(&value, &current.value, &mut faults),
        Part::Finalize => {}
    }
    let faults = status::together(faults, wanted.faults.clone());
    if !faults.is_empty() {
        return Err(ApiError::invalid(resource, name, &faults));
    }
    if matches!(part, Part::Main | Part::Debug | Part::Resources)
        && let Err(why) = resource.strategy.admit(&value)
    {
        return Err(ApiError::forbidden(resource, name, &why));
    }
    if !wanted.owned {
        call.state.types.own(resource, Some(&current.value), &mut value, &call.writer()?);
    }
    if resource.strategy.counts_generations() && value.get("spec") != current.value.get("spec") {
        let generation = current.value.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or(0) + 1;
        metadata(&mut value).insert("generation".into(), generation.into());
    }
    // An application that changes nothing is no write: a new time alone is nothing to tell.
    if same_but_for_times(&value, &current.value) {
        return Ok(Some(Answer::ok(convert::outgoing(resource, current.value.clone()))));
    }
    if call.query.dry_run(call.target.verb)? {
        return Ok(Some(Answer::ok(convert::outgoing(resource, value))));
    }
    write(call, current, value).await
}

async fn write(call: &Call<'_>, current: &Current, value: Value) -> ApiResult<Option<Answer>> {
    let resource = call.target.resource;
    let key = current.key.clone();
    let op = match is_finished(resource, &value) {
        true => Op::Delete { key },
        false => {
            let lease = call.state.leases.for_kind(&*call.state.store, resource).await?;
            Op::Put { key, value: object::encode(resource, &value), lease }
        }
    };
    let revision = call.state.commit(&current.key, current.revision, op).await?;
    Ok(revision.map(|revision| Answer::ok(convert::outgoing(resource, with_revision(value, revision)))))
}

/// Whether nothing holds a deleted object any more: no finalizer, and no grace that runs.
pub fn is_finished(resource: &Resource, value: &Value) -> bool {
    let grace = value.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
    is_deleting(value)
        && grace == 0
        && list(value, "/metadata/finalizers").is_empty()
        && !resource.strategy.holds(value)
}

fn check_preconditions(resource: &Resource, name: &str, wanted: &Value, current: &Current) -> ApiResult<()> {
    let version = text(wanted, "/metadata/resourceVersion");
    if !matches!(version, "" | "0") && version != current.revision.to_string() {
        return Err(ApiError::modified(resource, name));
    }
    let (wanted, found) = (text(wanted, "/metadata/uid"), text(&current.value, "/metadata/uid"));
    if !wanted.is_empty() && wanted != found {
        let why = format!("Precondition failed: UID in precondition: {wanted}, UID in object meta: {found}");
        return Err(ApiError::conflict(resource, name, &why));
    }
    Ok(())
}

/// Takes from `wanted` what the part may change and the rest from `old`.
fn merge(resource: &Resource, part: Part, admitted: &Admitted, old: &Value) -> Value {
    let mut wanted = admitted.value.clone();
    let keep = |value: &mut Value, key: &str| {
        let Some(map) = value.as_object_mut() else { return };
        match old.get(key) {
            Some(part) => drop(map.insert(key.to_owned(), part.clone())),
            None => drop(map.remove(key)),
        }
    };
    let mut value = match part {
        Part::Main => {
            if resource.has_status() {
                keep(&mut wanted, "status");
            }
            wanted
        }
        Part::Status => {
            let mut value = old.clone();
            let map = object::object_at(&mut value, "metadata");
            let owners = admitted.owned.then_some("managedFields");
            for own in ["labels", "annotations"].into_iter().chain(owners) {
                match wanted["metadata"].get(own) {
                    Some(part) => drop(map.insert(own.to_owned(), part.clone())),
                    None => drop(map.remove(own)),
                }
            }
            match wanted.get("status") {
                Some(status) => value["status"] = status.clone(),
                None => drop(value.as_object_mut().map(|map| map.remove("status"))),
            }
            value
        }
        Part::Debug => in_place::take_debug(old, &wanted),
        Part::Resources => in_place::take_resources(old, &wanted),
        Part::Finalize => {
            let mut value = old.clone();
            let finalizers = wanted.pointer("/spec/finalizers").cloned().unwrap_or_else(|| Value::Array(Vec::new()));
            object::object_at(&mut value, "spec").insert("finalizers".into(), finalizers);
            value
        }
    };
    for own in ["apiVersion", "kind"] {
        keep(&mut value, own);
    }
    protect_metadata(&mut value, old);
    value
}

fn protect_metadata(value: &mut Value, old: &Value) {
    let metadata = metadata(value);
    metadata.remove("selfLink");
    let server_set = [
        "resourceVersion",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "generateName",
    ];
    for own in server_set {
        match old["metadata"].get(own) {
            Some(part) => drop(metadata.insert(own.to_owned(), part.clone())),
            None => drop(metadata.remove(own)),
        }
    }
}
