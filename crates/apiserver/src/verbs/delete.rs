//! Delete: at once, or as a mark that others act upon.
//!
//! ```text
//!            grace 0, no finalizer, nothing held
//!   live ───────────────────────────────────────────────► gone
//!     │                                                    ▲
//!     └─► marked (deletionTimestamp) ── last finalizer taken off and grace 0, or deleted with grace 0
//! ```
//! Dependents are the garbage collector's matter; for the policies `Foreground` and `Orphan` a finalizer has the object wait for it.

use bytes::Bytes;
use http::Response;
use jiff::{SignedDuration, Timestamp};
use joey_store::Op;
use serde_json::{Value, json};

use super::update::{ATTEMPTS, is_finished};
use super::{Answer, Call, Current, list, protobuf_body, with_revision, yaml_body};
use crate::convert;
use crate::object::{self, is_deleting, metadata, text};
use crate::request::Target;
use crate::status::{self, ApiError, ApiResult, FieldFault, json_response};
use crate::{Body, table};

/// What a DeleteOptions says, from the body or the query.
#[derive(Debug, Default, Clone)]
pub struct Options {
    grace: Option<i64>,
    uid: Option<String>,
    version: Option<String>,
    dry_run: bool,
    /// None: what the object's finalizers say stays so; without any it goes in the background.
    policy: Option<Propagation>,
}

/// What becomes of the objects that name the deleted one as their owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Propagation {
    /// They go after it.
    Background,
    /// It goes after them.
    Foreground,
    /// They stay.
    Orphan,
}

impl Propagation {
    /// The finalizer by which the object waits for the collector of dependents.
    fn finalizer(self) -> Option<&'static str> {
        match self {
            Self::Background => None,
            Self::Foreground => Some("foregroundDeletion"),
            Self::Orphan => Some("orphan"),
        }
    }
}

impl Options {
    pub fn read(call: &Call<'_>, body: &Bytes) -> ApiResult<Self> {
        let value = match call.media_type().as_str() {
            _ if body.is_empty() => Value::Null,
            "application/vnd.kubernetes.protobuf" => protobuf_body(body)?,
            _ => yaml_body(body)?,
        };
        Self::from_value(call, &value)
    }

    /// From a DeleteOptions object; the query counts where it says nothing.
    pub fn from_value(call: &Call<'_>, value: &Value) -> ApiResult<Self> {
        let grace = match value.get("gracePeriodSeconds").and_then(Value::as_i64) {
            Some(grace) => Some(grace),
            None => call.query.number("gracePeriodSeconds")?,
        };
        // Less than nothing is as little as can be, as kube-apiserver has it.
        let grace = grace.map(|grace| if grace < 0 { 1 } else { grace });
        let policy = match text(value, "/propagationPolicy") {
            "" => call.query.get("propagationPolicy").unwrap_or_default(),
            policy => policy,
        };
        let orphan =
            value.get("orphanDependents").and_then(Value::as_bool).or_else(|| call.query.bool("orphanDependents"));
        let mut faults = Vec::new();
        if !matches!(policy, "" | "Background" | "Foreground" | "Orphan") {
            let known = ["Foreground", "Background", "Orphan", "nil"];
            faults.push(FieldFault::unsupported("propagationPolicy", policy, &known));
        }
        if orphan.is_some() && !policy.is_empty() {
            let why = "orphanDependents and deletionPropagation cannot be both set";
            faults.push(FieldFault::invalid("propagationPolicy", &policy.into(), why));
        }
        if !faults.is_empty() {
            return Err(ApiError::invalid_options("delete", &faults));
        }
        let policy = match (policy, orphan) {
            ("Foreground", _) => Some(Propagation::Foreground),
            ("Orphan", _) | (_, Some(true)) => Some(Propagation::Orphan),
            ("Background", _) | (_, Some(false)) => Some(Propagation::Background),
            _ => None,
        };
        let dry = value.get("dryRun").and_then(Value::as_array).is_some_and(|words| words.iter().any(|w| w == "All"));
        let some = |pointer: &str| Some(text(value, pointer).to_owned()).filter(|text| !text.is_empty());
        Ok(Self {
            grace,
            uid: some("/preconditions/uid"),
            version: some("/preconditions/resourceVersion"),
            policy,
            dry_run: dry || call.query.dry_run(call.target.verb)?,
        })
    }
}

pub async fn delete(call: &Call<'_>, body: &Bytes) -> ApiResult<Answer> {
    let options = Options::read(call, body)?;
    delete_with(call, &options).await
}

/// Deletes the object the call names.
pub async fn delete_with(call: &Call<'_>, options: &Options) -> ApiResult<Answer> {
    for _ in 0..ATTEMPTS {
        let current = call.current().await?;
        if let Some(answer) = attempt(call, options, current).await? {
            return Ok(answer);
        }
    }
    Err(ApiError::modified(call.target.resource, &call.target.name))
}

async fn attempt(call: &Call<'_>, options: &Options, current: Current) -> ApiResult<Option<Answer>> {
    let (resource, name) = (call.target.resource, &call.target.name);
    check(call, options, &current)?;
    let grace = resource.strategy.grace(&current.value, options.grace);
    let mut value = current.value.clone();
    resource.strategy.prepare_delete(&mut value);
    mark(&mut value, grace, resource.strategy.counts_generations());
    if let Some(policy) = options.policy {
        hold(&mut value, policy);
    }
    let finished = is_finished(resource, &value);
    if options.dry_run || (!finished && value == current.value) {
        return Ok(Some(answer(call, value, finished)));
    }
    let key = current.key.clone();
    let op = match finished {
        true => Op::Delete { key },
        false => {
            let lease = call.state.leases.for_kind(&*call.state.store, resource).await?;
            Op::Put { key, value: object::encode(resource, &value), lease }
        }
    };
    let Some(revision) = call.state.commit(&current.key, current.revision, op).await? else { return Ok(None) };
    tracing::debug!(kind = resource.kind, namespace = call.target.namespace, name, finished, "deleted");
    Ok(Some(answer(call, with_revision(value, revision), finished)))
}

fn answer(call: &Call<'_>, value: Value, finished: bool) -> Answer {
    let resource = call.target.resource;
    if finished && !resource.strategy.returns_deleted() {
        let uid = text(&value, "/metadata/uid").to_owned();
        return Answer::ok(status::success(resource, &call.target.name, Some(&uid)));
    }
    Answer::ok(convert::outgoing(resource, value))
}

fn check(call: &Call<'_>, options: &Options, current: &Current) -> ApiResult<()> {
    let (resource, name) = (call.target.resource, &call.target.name);
    let uid = text(&current.value, "/metadata/uid");
    if let Some(wanted) = options.uid.as_deref().filter(|wanted| *wanted != uid) {
        let why = format!(
            "the UID in the precondition ({wanted}) does not match the UID in record ({uid}). The object might have been \
             deleted and then recreated"
        );
        return Err(ApiError::conflict(resource, name, &why));
    }
    if let Some(wanted) = options.version.as_deref().filter(|wanted| *wanted != current.revision.to_string()) {
        let why = format!(
            "the ResourceVersion in the precondition ({wanted}) does not match the ResourceVersion in record ({}). The \
             object might have been modified",
            current.revision
        );
        return Err(ApiError::conflict(resource, name, &why));
    }
    resource.strategy.may_delete(&current.value).map_err(|why| ApiError::forbidden(resource, name, &why))
}

/// Marks the object as being deleted. A grace that runs already is only ever shortened.
fn mark(value: &mut Value, grace: i64, counts: bool) {
    let before = value.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64);
    if is_deleting(value) && before.is_some_and(|before| before <= grace) {
        return;
    }
    let generation = value.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or(0);
    let at = Timestamp::now() + SignedDuration::from_secs(grace);
    let metadata = metadata(value);
    metadata.insert("deletionTimestamp".into(), object::time(at).into());
    metadata.insert("deletionGracePeriodSeconds".into(), grace.into());
    if counts {
        metadata.insert("generation".into(), (generation + 1).into());
    }
}

/// Has the object wait for the collector of dependents, or not, as the policy says.
fn hold(value: &mut Value, policy: Propagation) {
    let own = policy.finalizer();
    let metadata = metadata(value);
    let mut finalizers = metadata.get("finalizers").and_then(Value::as_array).cloned().unwrap_or_default();
    // The last word counts: the other policies' finalizers go.
    finalizers.retain(|finalizer| {
        let word = finalizer.as_str();
        word == own || ![Propagation::Foreground, Propagation::Orphan].iter().any(|other| other.finalizer() == word)
    });
    if let Some(own) = own.filter(|own| !finalizers.iter().any(|finalizer| finalizer == own)) {
        finalizers.push(own.into());
    }
    match finalizers.is_empty() {
        true => drop(metadata.remove("finalizers")),
        false => drop(metadata.insert("finalizers".into(), finalizers.into())),
    }
}

/// Deletes everything a list with the same selectors shows.
pub async fn delete_collection(call: &Call<'_>, body: &Bytes) -> ApiResult<Response<Body>> {
    let options = Options::read(call, body)?;
    let resource = call.target.resource;
    table::form(call.headers, call.query)?;
    let selector = list::selector(call)?;
    let snapshot = list::snapshot(call, &selector, 0).await?;
    let mut items = Vec::new();
    for object in snapshot.objects {
        let target = Target {
            resource,
            namespace: object.namespace(resource).to_owned(),
            name: object.name().to_owned(),
            subresource: None,
            verb: "delete",
        };
        let one = Call { state: call.state, who: call.who, target: &target, query: call.query, headers: call.headers };
        match delete_with(&one, &options).await {
            Ok(_) => items.push(convert::outgoing(resource, object.value(object.revision))),
            // Somebody else was quicker.
            Err(error) if error.code == http::StatusCode::NOT_FOUND => {}
            Err(error) => return Err(error),
        }
    }
    let body = json!({"kind": format!("{}List", resource.kind), "apiVersion": resource.api_version(),
        "metadata": {"resourceVersion": snapshot.revision.to_string()}, "items": items});
    Ok(json_response(http::StatusCode::OK, &body))
}
