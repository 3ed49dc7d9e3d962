//! Where the server meets the schemas: every use of `joey_schema` is here.

use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::kinds::{RESOURCES, Resource};
use crate::status::{ApiError, ApiResult, FieldFault};
use crate::verbs::Call;
use joey_schema::{
    ApplyError, Conflict, Documents, FieldError, FieldReason, Schemas, ServedResource, ServedSubresource, TypeId,
    UnknownFields as Unknown,
};
pub use joey_schema::{FieldSet, Writer, protobuf, read_json, same_but_for_times};

/// What to do with fields that the schema does not know (`fieldValidation`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnknownFields(Unknown);

impl UnknownFields {
    pub const IGNORED: Self = Self(Unknown::Ignore);

    /// Reads the parameter of a request.
    pub fn of(call: &Call<'_>) -> ApiResult<Self> {
        let verb = call.target.verb;
        match call.query.get("fieldValidation") {
            None | Some("" | "Warn") => Ok(Self(Unknown::Warn)),
            Some("Ignore") => Ok(Self(Unknown::Ignore)),
            Some("Strict") => Ok(Self(Unknown::Strict)),
            Some(other) => {
                let fault = FieldFault::unsupported("fieldValidation", other, &["", "Ignore", "Strict", "Warn"]);
                Err(ApiError::invalid_options(verb, &[fault]))
            }
        }
    }
}

/// An object as it was sent.
pub struct Sent {
    pub value: Value,
    /// Fields that were written more than once.
    pub repeated: Vec<String>,
}

impl From<Value> for Sent {
    fn from(value: Value) -> Self {
        Self { value, repeated: Vec::new() }
    }
}

/// An object that is one of its kind, on its way into the store.
#[derive(Default)]
pub struct Admitted {
    pub value: Value,
    pub warnings: Vec<String>,
    /// What the schema finds wrong with values.
    pub faults: Vec<FieldFault>,
    /// Whether the owners of its fields are written down already.
    pub owned: bool,
}

/// The schemas of all kinds.
pub struct Types(&'static Schemas);

impl Types {
    pub fn builtin() -> Self {
        Self(Schemas::builtin())
    }

    fn id(&self, resource: &Resource) -> Option<TypeId> {
        self.0.kind(resource.group, resource.version, resource.kind)
    }

    /// Checks types, drops unknown fields, makes amounts canonical, fills defaults. What is no object of its kind at all is
    /// refused; faults of values are told with the object, so that they and those of other rules come in one answer.
    pub fn admit(&self, resource: &Resource, sent: &Sent, unknown: UnknownFields) -> ApiResult<Admitted> {
        let as_sent = || Admitted { value: sent.value.clone(), ..Admitted::default() };
        let Some(id) = self.id(resource) else { return Ok(as_sent()) };
        let decoded = self.0.decode(id, &sent.value, unknown.0);
        let repeated = sent.repeated.iter().map(|path| format!("duplicate field \"{path}\""));
        let repeated: Vec<String> = repeated.filter(|_| unknown.0 != Unknown::Ignore).collect();
        let strict = unknown.0 == Unknown::Strict;
        check_form(resource, &decoded.errors, if strict { &repeated } else { &[] })?;
        let mut value = decoded.value;
        self.0.apply_defaults(id, &mut value);
        // What is empty is not there, as Go's clients have it; an empty list of owners means something.
        if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
            let empty = |part: &Value| *part == json!({}) || *part == json!([]);
            metadata.retain(|key, part| key == "managedFields" || !empty(part));
        }
        let warnings = repeated.into_iter().chain(decoded.warnings).collect();
        Ok(Admitted { value, warnings, faults: faults(&decoded.errors), owned: false })
    }

    /// Writes down who owns the fields of an object about to be stored.
    pub fn own(&self, resource: &'static Resource, live: Option<&Value>, value: &mut Value, writer: &Writer) {
        if let Some(id) = self.id(resource.storage()) {
            self.0.own_update(id, live, value, writer);
        }
    }

    /// Where an applied configuration has fields that its kind has not.
    pub fn misfits(&self, resource: &Resource, config: &Value) -> Vec<String> {
        self.id(resource).map(|id| self.0.misfits_of(id, config)).unwrap_or_default()
    }

    /// Refuses a configuration whose values are of other types, and makes its amounts canonical, as they are stored.
    pub fn canonical(&self, resource: &Resource, config: &mut Value) -> ApiResult<()> {
        let Some(id) = self.id(resource) else { return Ok(()) };
        check_form(resource, &self.0.decode(id, config, Unknown::Ignore).errors, &[])?;
        self.0.canonical_amounts(id, config);
        Ok(())
    }

    /// What server-side apply makes of an object in its stored form.
    pub fn apply(
        &self,
        resource: &'static Resource,
        live: Option<&Value>,
        config: &Value,
        (writer, force): (&Writer, bool),
    ) -> ApiResult<Value> {
        let types = "application/json-patch+json, application/merge-patch+json";
        let id = self.id(resource.storage()).ok_or_else(|| ApiError::unsupported_media_type(types))?;
        self.0.apply(id, live, config, writer, force).map_err(|error| match error {
            ApplyError::Misfit(faults) => ApiError::bad_request(faults.join("\n")),
            ApplyError::Conflicts(conflicts) => in_the_way(&conflicts),
        })
    }

    /// A strategic merge patch.
    pub fn strategic_merge(&self, resource: &Resource, value: &Value, patch: &Value) -> ApiResult<Value> {
        let Some(id) = self.id(resource) else {
            return Err(ApiError::unsupported_media_type("application/json-patch+json, application/merge-patch+json"));
        };
        let merged = self.0.strategic_merge(id, value, patch);
        merged.map_err(|error| ApiError::bad_request(format!("the patch cannot be applied: {error}")))
    }

    /// OpenAPI documents of everything that is served; made when they are first asked for.
    pub fn openapi(&self) -> &Documents {
        static DOCUMENTS: OnceLock<Documents> = OnceLock::new();
        DOCUMENTS.get_or_init(|| Documents::build(RESOURCES.iter().map(served)))
    }
}

fn served(resource: &Resource) -> (ServedResource<'_>, Vec<ServedSubresource<'_>>) {
    let entry = ServedResource {
        group: resource.group,
        version: resource.version,
        kind: resource.kind,
        plural: resource.plural,
        namespaced: resource.namespaced,
        verbs: resource.verbs,
    };
    let below = resource.subresources.iter();
    (entry, below.map(|sub| ServedSubresource { name: sub.name, verbs: sub.verbs, body: sub.body }).collect())
}

/// Faults of the form are a bad request, as kube-apiserver has it: it cannot read such an object at all.
fn check_form(resource: &Resource, errors: &[FieldError], repeated: &[String]) -> ApiResult<()> {
    let of = |reason: FieldReason| errors.iter().filter(move |error| error.reason == reason);
    let types: Vec<String> = of(FieldReason::TypeInvalid).map(|e| format!("{} {}", e.path, e.detail)).collect();
    let unknown = of(FieldReason::Unknown).map(|error| error.detail.clone());
    let strict: Vec<String> = repeated.iter().cloned().chain(unknown).collect();
    let why = match (types.is_empty(), strict.is_empty()) {
        (true, true) => return Ok(()),
        (false, _) => types.join(", "),
        (true, false) => format!("strict decoding error: {}", strict.join(", ")),
    };
    let (kind, version) = (resource.kind, resource.version);
    Err(ApiError::bad_request(format!("{kind} in version \"{version}\" cannot be handled as a {kind}: {why}")))
}

fn faults(errors: &[FieldError]) -> Vec<FieldFault> {
    let fault = |error: &FieldError| FieldFault {
        field: error.path.clone(),
        reason: match error.reason {
            FieldReason::Required => "FieldValueRequired",
            FieldReason::NotSupported => "FieldValueNotSupported",
            _ => "FieldValueInvalid",
        },
        message: error.detail.clone(),
    };
    errors.iter().map(fault).collect()
}

/// Fields that others own, in the words and the causes of kube-apiserver.
fn in_the_way(conflicts: &[Conflict]) -> ApiError {
    let message = match conflicts {
        [one] => format!("Apply failed with 1 conflict: conflict with {}: {}", one.owner, one.field),
        many => {
            let mut owners: Vec<&str> = many.iter().map(|conflict| conflict.owner.as_str()).collect();
            owners.sort_unstable();
            owners.dedup();
            let mut lines = Vec::new();
            for owner in owners {
                lines.push(format!("conflicts with {owner}:"));
                let of_owner = many.iter().filter(|conflict| conflict.owner == owner);
                lines.extend(of_owner.map(|conflict| format!("- {}", conflict.field)));
            }
            format!("Apply failed with {} conflicts: {}", many.len(), lines.join("\n"))
        }
    };
    let mut error = ApiError::new(http::StatusCode::CONFLICT, "Conflict", message);
    let cause = |conflict: &Conflict| {
        let message = format!("conflict with {}", conflict.owner);
        json!({"reason": "FieldManagerConflict", "message": message, "field": conflict.field})
    };
    error.details = json!({"causes": conflicts.iter().map(cause).collect::<Vec<_>>()});
    error
}
