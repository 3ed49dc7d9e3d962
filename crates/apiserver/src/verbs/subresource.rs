//! What is created below an object: bindings, evictions, tokens.

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use joey_store::Op;
use serde_json::{Value, json};

use super::update::ATTEMPTS;
use super::{Answer, Call, delete};
use crate::kinds;
use crate::object::{self, list, text};
use crate::request::Target;
use crate::status::{ApiError, ApiResult, FieldFault};
use crate::token::{Account, ISSUER, LIFE};

/// POST below an object.
pub async fn create(call: &Call<'_>, body: &Bytes) -> ApiResult<Answer> {
    let value = call.object(body)?;
    match call.target.subresource_name() {
        "binding" => bind(call, &value).await,
        "eviction" => evict(call, &value).await,
        "token" => token(call, &value).await,
        _ => Err(ApiError::method_not_allowed()),
    }
}

/// POST to the collection of bindings: the Pod's name is in the body.
pub async fn create_binding(call: &Call<'_>, body: &Bytes) -> ApiResult<Answer> {
    let value = call.object(body)?;
    let pods = kinds::find("", "v1", "pods").ok_or_else(ApiError::no_such_path)?;
    let target = Target {
        resource: pods,
        namespace: call.target.namespace.clone(),
        name: text(&value, "/metadata/name").to_owned(),
        subresource: pods.subresource("binding"),
        verb: "create",
    };
    let call = Call { state: call.state, who: call.who, target: &target, query: call.query, headers: call.headers };
    bind(&call, &value).await
}

async fn bind(call: &Call<'_>, binding: &Value) -> ApiResult<Answer> {
    let (resource, name) = (call.target.resource, &call.target.name);
    let node = text(binding, "/target/name");
    let kind = text(binding, "/target/kind");
    let mut faults = Vec::new();
    if node.is_empty() {
        faults.push(FieldFault::required("target.name", ""));
    }
    if !matches!(kind, "" | "Node") {
        faults.push(FieldFault::unsupported("target.kind", kind, &["Node", "<empty>"]));
    }
    if !faults.is_empty() {
        return Err(ApiError::invalid(resource, name, &faults));
    }
    for _ in 0..ATTEMPTS {
        let current = call.current().await?;
        let uid = text(binding, "/metadata/uid");
        let refused = if !uid.is_empty() && uid != text(&current.value, "/metadata/uid") {
            Some(format!("Precondition failed: UID in precondition: {uid} is not that of pod {name}"))
        } else if object::is_deleting(&current.value) {
            Some(format!("pod {name} is being deleted, cannot be assigned to a host"))
        } else {
            match text(&current.value, "/spec/nodeName") {
                "" if !list(&current.value, "/spec/schedulingGates").is_empty() => {
                    Some(format!("pod {name} has non-empty .spec.schedulingGates"))
                }
                "" => None,
                taken => Some(format!("pod {name} is already assigned to node \"{taken}\"")),
            }
        };
        if let Some(why) = refused {
            let mut error = ApiError::conflict(resource, name, &why);
            error.message = format!("Operation cannot be fulfilled on pods/binding \"{name}\": {why}");
            return Err(error);
        }
        let mut value = current.value.clone();
        value["spec"]["nodeName"] = node.into();
        for (key, note) in binding.pointer("/metadata/annotations").and_then(Value::as_object).into_iter().flatten() {
            value["metadata"]["annotations"][key] = note.clone();
        }
        scheduled(&mut value);
        let op = Op::Put { key: current.key.clone(), value: object::encode(resource, &value), lease: None };
        if call.query.dry_run(call.target.verb)?
            || call.state.commit(&current.key, current.revision, op).await?.is_some()
        {
            let done = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
            return Ok(Answer::created(done));
        }
    }
    Err(ApiError::modified(resource, name))
}

/// Sets the condition that says a node was found.
fn scheduled(pod: &mut Value) {
    let condition = json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null,
        "lastTransitionTime": object::now()});
    let status = object::object_at(pod, "status");
    let conditions = status.entry("conditions").or_insert_with(|| json!([]));
    if let Some(conditions) = conditions.as_array_mut() {
        conditions.retain(|condition| condition["type"] != "PodScheduled");
        conditions.push(condition);
    }
}

async fn evict(call: &Call<'_>, eviction: &Value) -> ApiResult<Answer> {
    let options = eviction.get("deleteOptions").cloned().unwrap_or(Value::Null);
    let options = delete::Options::from_value(call, &options)?;
    delete::delete_with(call, &options).await?;
    let done = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
    Ok(Answer::created(done))
}

async fn token(call: &Call<'_>, request: &Value) -> ApiResult<Answer> {
    let account = call.current().await?;
    let spec = request.get("spec").cloned().unwrap_or_else(|| json!({}));
    let life = spec.get("expirationSeconds").and_then(Value::as_i64).unwrap_or(3600);
    if !LIFE.contains(&life) {
        let what = match life < *LIFE.start() {
            true => "may not specify a duration less than 10 minutes",
            false => "may not specify a duration larger than 2^32 seconds",
        };
        let fault = FieldFault::invalid("spec.expirationSeconds", &life.into(), what);
        return Err(ApiError::invalid_kind(("authentication.k8s.io", "TokenRequest"), "", &[fault]));
    }
    let mut audiences: Vec<String> =
        list(&spec, "/audiences").iter().filter_map(Value::as_str).map(str::to_owned).collect();
    if audiences.is_empty() {
        audiences.push(ISSUER.to_owned());
    }
    let pod = bound_pod(call, &spec).await?;
    let now = Timestamp::now();
    let claims = Account {
        namespace: &call.target.namespace,
        name: &call.target.name,
        uid: text(&account.value, "/metadata/uid"),
        audiences: audiences.clone(),
        pod,
    };
    let token =
        call.state.tokens.sign(&claims, now, life).ok_or_else(|| ApiError::internal("a token could not be signed"))?;
    let mut made = json!({"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1",
        "metadata": {"name": call.target.name, "namespace": call.target.namespace, "creationTimestamp": object::now()},
        "spec": spec,
        "status": {"token": token, "expirationTimestamp": object::time(now + SignedDuration::from_secs(life))}});
    made["spec"]["expirationSeconds"] = life.into();
    made["spec"]["audiences"] = audiences.into();
    Ok(Answer::created(made))
}

/// Name and uid of the Pod a token is bound to; it must exist and use the account.
async fn bound_pod(call: &Call<'_>, spec: &Value) -> ApiResult<Option<(String, String)>> {
    let (kind, name) = (text(spec, "/boundObjectRef/kind"), text(spec, "/boundObjectRef/name"));
    match kind {
        "" => return Ok(None),
        "Pod" => {}
        other => {
            let fault = FieldFault::unsupported("spec.boundObjectRef.kind", other, &["Pod"]);
            return Err(ApiError::invalid(call.target.resource, &call.target.name, &[fault]));
        }
    }
    let pods = kinds::find("", "v1", "pods").ok_or_else(ApiError::no_such_path)?;
    let Some((pod, _)) = call.state.read(&pods.key(&call.target.namespace, name)).await? else {
        return Err(ApiError::not_found(pods, name));
    };
    let (uid, wanted) = (text(&pod, "/metadata/uid"), text(spec, "/boundObjectRef/uid"));
    if !wanted.is_empty() && wanted != uid {
        let why = format!("the UID in the bound object reference ({wanted}) does not match the UID in record ({uid})");
        return Err(ApiError::conflict(pods, name, &why));
    }
    let account = match text(&pod, "/spec/serviceAccountName") {
        "" => "default",
        account => account,
    };
    if account != call.target.name {
        let why =
            format!("cannot bind token for serviceaccount \"{}\" to pod running as \"{account}\"", call.target.name);
        return Err(ApiError::bad_request(why));
    }
    Ok(Some((name.to_owned(), uid.to_owned())))
}
