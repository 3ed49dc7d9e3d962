//! Where the server meets the schemas: every use of `joey_schema` is here.

use std::sync::OnceLock;

use serde_json::Value;

use crate::kinds::{RESOURCES, Resource};
use crate::status::{ApiError, ApiResult, FieldFault};
use joey_schema::{
    Documents, FieldError, FieldReason, Schemas, ServedResource, ServedSubresource, TypeId, UnknownFields as Unknown,
};

/// What to do with fields that the schema does not know (`fieldValidation`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnknownFields(Unknown);

impl UnknownFields {
    pub fn parse(word: Option<&str>) -> ApiResult<Self> {
        match word {
            None | Some("" | "Warn") => Ok(Self(Unknown::Warn)),
            Some("Ignore") => Ok(Self(Unknown::Ignore)),
            Some("Strict") => Ok(Self(Unknown::Strict)),
            Some(other) => Err(ApiError::bad_request(format!(
                "fieldValidation: Unsupported value: \"{other}\": supported values: \"Ignore\", \"Strict\", \"Warn\""
            ))),
        }
    }
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

    /// Checks types, drops unknown fields, fills defaults. Returns the object and warnings.
    pub fn admit(
        &self,
        resource: &Resource,
        name: &str,
        value: &Value,
        unknown: UnknownFields,
    ) -> ApiResult<(Value, Vec<String>)> {
        let Some(id) = self.id(resource) else { return Ok((value.clone(), Vec::new())) };
        let (mut value, warnings) =
            self.0.decode(id, value, unknown.0).map_err(|errors| refused(resource, name, &errors))?;
        self.0.apply_defaults(id, &mut value);
        Ok((value, warnings))
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

/// Faults of the form are a bad request; faults of values make the object invalid, as kube-apiserver has it.
fn refused(resource: &Resource, name: &str, errors: &[FieldError]) -> ApiError {
    let unknown: Vec<String> =
        errors.iter().filter(|e| e.reason == FieldReason::Unknown).map(|e| e.detail.clone()).collect();
    if !unknown.is_empty() {
        return ApiError::bad_request(format!("strict decoding error: {}", unknown.join(", ")));
    }
    let types: Vec<String> = errors
        .iter()
        .filter(|e| e.reason == FieldReason::TypeInvalid)
        .map(|e| format!("{} {}", e.path, e.detail))
        .collect();
    if !types.is_empty() {
        return ApiError::bad_request(format!(
            "{} in version \"{}\" cannot be handled as a {}: {}",
            resource.kind,
            resource.api_version(),
            resource.kind,
            types.join(", ")
        ));
    }
    let faults: Vec<FieldFault> = errors
        .iter()
        .map(|error| FieldFault {
            field: error.path.clone(),
            reason: match error.reason {
                FieldReason::Required => "FieldValueRequired",
                FieldReason::NotSupported => "FieldValueNotSupported",
                FieldReason::Duplicate => "FieldValueDuplicate",
                _ => "FieldValueInvalid",
            },
            message: error.detail.clone(),
        })
        .collect();
    ApiError::invalid(resource, name, &faults)
}
