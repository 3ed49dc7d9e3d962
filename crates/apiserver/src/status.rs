//! Errors as Kubernetes clients read them: the Status object, its reasons, causes and wording.
//!
//! The wording follows apimachinery's `api/errors`, because kubectl and client libraries show and match it. What makes a
//! request fail is decided elsewhere.

use http::{Response, StatusCode, header};
use serde_json::{Value, json};

use crate::Body;
use crate::kinds::Resource;

/// One field that is wrong, with the cause words of apimachinery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldFault {
    pub field: String,
    /// `FieldValueRequired`, `FieldValueInvalid` …
    pub reason: &'static str,
    pub message: String,
}

impl FieldFault {
    pub fn required(field: impl Into<String>, detail: &str) -> Self {
        let message = if detail.is_empty() { "Required value".to_owned() } else { format!("Required value: {detail}") };
        Self { field: field.into(), reason: "FieldValueRequired", message }
    }

    pub fn invalid(field: impl Into<String>, value: &Value, detail: &str) -> Self {
        let shown = match value {
            Value::Object(_) | Value::Array(_) => "{...}".to_owned(),
            other => other.to_string(),
        };
        let shown =
            if shown.chars().count() > 256 { shown.chars().take(256).collect::<String>() + "…\"" } else { shown };
        Self { field: field.into(), reason: "FieldValueInvalid", message: format!("Invalid value: {shown}: {detail}") }
    }

    pub fn unsupported(field: impl Into<String>, value: &str, known: &[&str]) -> Self {
        let known: Vec<String> = known.iter().map(|word| format!("\"{word}\"")).collect();
        let message = format!("Unsupported value: \"{value}\": supported values: {}", known.join(", "));
        Self { field: field.into(), reason: "FieldValueNotSupported", message }
    }

    pub fn duplicate(field: impl Into<String>, value: &str) -> Self {
        Self { field: field.into(), reason: "FieldValueDuplicate", message: format!("Duplicate value: \"{value}\"") }
    }

    pub fn forbidden(field: impl Into<String>, detail: &str) -> Self {
        Self { field: field.into(), reason: "FieldValueForbidden", message: format!("Forbidden: {detail}") }
    }

    pub fn not_found(field: impl Into<String>, value: &str) -> Self {
        Self { field: field.into(), reason: "FieldValueNotFound", message: format!("Not found: \"{value}\"") }
    }

    pub fn too_long(field: impl Into<String>, limit: usize) -> Self {
        let message = format!("Too long: may not be more than {limit} bytes");
        Self { field: field.into(), reason: "FieldValueTooLong", message }
    }
}

/// All faults of one object, each once: what a rule of the kind says of a field counts more than what its schema says.
pub fn together(mut rules: Vec<FieldFault>, schema: Vec<FieldFault>) -> Vec<FieldFault> {
    let mut all: Vec<FieldFault> = Vec::with_capacity(rules.len() + schema.len());
    for fault in rules.drain(..).chain(schema) {
        let known = |other: &FieldFault| {
            // A rule may tell several things about one value.
            *other == fault || (other.field == fault.field && other.reason == fault.reason && known_twice(other))
        };
        if !all.iter().any(known) {
            all.push(fault);
        }
    }
    all
}

/// Whether a second fault of the same field and reason could only say the same again.
fn known_twice(fault: &FieldFault) -> bool {
    fault.reason != "FieldValueInvalid"
}

/// A refused request: HTTP code and the Status object that says why.
#[derive(Debug, Clone)]
pub struct ApiError {
    pub code: StatusCode,
    pub reason: &'static str,
    pub message: String,
    pub details: Value,
    pub retry_after: Option<u32>,
}

pub type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    pub fn new(code: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: Value::Null, retry_after: None }
    }

    fn about(mut self, resource: &Resource, name: &str) -> Self {
        self.details = details(resource.group, resource.plural, name);
        self
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    pub fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized")
    }

    pub fn internal(message: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", format!("Internal error occurred: {message}"))
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", message);
        error.retry_after = Some(1);
        error
    }

    pub fn timeout() -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", "request did not complete within the allowed time")
    }

    pub fn too_many_requests() -> Self {
        let mut error = Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "TooManyRequests",
            "the server has received too many requests and has asked us to try again later",
        );
        error.retry_after = Some(1);
        error.details = json!({"retryAfterSeconds": 1});
        error
    }

    pub fn no_such_path() -> Self {
        let mut error =
            Self::new(StatusCode::NOT_FOUND, "NotFound", "the server could not find the requested resource");
        error.details = json!({});
        error
    }

    pub fn method_not_allowed() -> Self {
        let message = "the server does not allow this method on the requested resource";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message)
    }

    pub fn unsupported_media_type(accepted: &str) -> Self {
        let message =
            format!("the body of the request was in an unknown format - accepted media types include: {accepted}");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedMediaType", message)
    }

    pub fn too_large(limit: usize) -> Self {
        let message = format!("Request entity too large: limit is {limit}");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", message)
    }

    pub fn not_found(resource: &Resource, name: &str) -> Self {
        let message = format!("{} \"{name}\" not found", resource.qualified());
        Self::new(StatusCode::NOT_FOUND, "NotFound", message).about(resource, name)
    }

    pub fn already_exists(resource: &Resource, name: &str) -> Self {
        let message = format!("{} \"{name}\" already exists", resource.qualified());
        Self::new(StatusCode::CONFLICT, "AlreadyExists", message).about(resource, name)
    }

    pub fn conflict(resource: &Resource, name: &str, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {} \"{name}\": {why}", resource.qualified());
        Self::new(StatusCode::CONFLICT, "Conflict", message).about(resource, name)
    }

    pub fn modified(resource: &Resource, name: &str) -> Self {
        Self::conflict(
            resource,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    pub fn forbidden(resource: &Resource, name: &str, why: &str) -> Self {
        let message = match name {
            "" => format!("{} is forbidden: {why}", resource.qualified()),
            _ => format!("{} \"{name}\" is forbidden: {why}", resource.qualified()),
        };
        Self::new(StatusCode::FORBIDDEN, "Forbidden", message).about(resource, name)
    }

    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GONE, "Expired", message)
    }

    /// All that is wrong with an object, in one answer.
    pub fn invalid(resource: &Resource, name: &str, faults: &[FieldFault]) -> Self {
        Self::invalid_kind((resource.group, resource.kind), name, faults)
    }

    /// All that is wrong with the options of a request.
    pub fn invalid_options(verb: &str, faults: &[FieldFault]) -> Self {
        let kind = match verb {
            "create" => "CreateOptions",
            "update" => "UpdateOptions",
            "patch" => "PatchOptions",
            "list" | "watch" | "deletecollection" => "ListOptions",
            _ => "DeleteOptions",
        };
        Self::invalid_kind(("meta.k8s.io", kind), "", faults)
    }

    pub fn invalid_kind((group, kind): (&str, &str), name: &str, faults: &[FieldFault]) -> Self {
        let shown: Vec<String> = faults.iter().map(|fault| format!("{}: {}", fault.field, fault.message)).collect();
        let list = match shown.as_slice() {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let qualified = match group {
            "" => kind.to_owned(),
            group => format!("{kind}.{group}"),
        };
        let message = format!("{qualified} \"{name}\" is invalid: {list}");
        let mut error = Self::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message);
        let causes: Vec<Value> = faults
            .iter()
            .map(|fault| json!({"reason": fault.reason, "message": fault.message, "field": fault.field}))
            .collect();
        error.details = details(group, kind, name);
        error.details["causes"] = Value::Array(causes);
        error
    }

    /// The Status object.
    pub fn status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code.as_u16(),
        });
        if !self.details.is_null() {
            status["details"] = self.details.clone();
        }
        status
    }

    pub fn response(&self) -> Response<Body> {
        let mut response = json_response(self.code, &self.status());
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

fn details(group: &str, kind: &str, name: &str) -> Value {
    let mut details = json!({"kind": kind});
    if !name.is_empty() {
        details["name"] = name.into();
    }
    if !group.is_empty() {
        details["group"] = group.into();
    }
    details
}

/// The Status of something that worked and has no object to show.
pub fn success(resource: &Resource, name: &str, uid: Option<&str>) -> Value {
    let mut about = details(resource.group, resource.plural, name);
    if let Some(uid) = uid {
        about["uid"] = uid.into();
    }
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": about})
}

/// A response with a JSON body.
pub fn json_response(code: StatusCode, value: &Value) -> Response<Body> {
    bytes_response(code, "application/json", value.to_string())
}

/// A response with a body of the given media type.
pub fn bytes_response(code: StatusCode, media_type: &str, body: impl Into<bytes::Bytes>) -> Response<Body> {
    let mut response = Response::new(crate::full(body));
    *response.status_mut() = code;
    let media_type = header::HeaderValue::from_str(media_type)
        .unwrap_or(header::HeaderValue::from_static("application/octet-stream"));
    response.headers_mut().insert(header::CONTENT_TYPE, media_type);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wording() {
        let pods = crate::kinds::find("", "v1", "pods").unwrap();
        let one = [FieldFault::required("spec.containers[0].image", "")];
        let error = ApiError::invalid(pods, "x", &one);
        assert_eq!(error.message, "Pod \"x\" is invalid: spec.containers[0].image: Required value");
        assert_eq!(error.status()["details"]["causes"][0]["field"], "spec.containers[0].image");
        let two = [FieldFault::required("a", ""), FieldFault::duplicate("b", "c")];
        let leases = crate::kinds::find("coordination.k8s.io", "v1", "leases").unwrap();
        assert_eq!(
            ApiError::invalid(leases, "x", &two).message,
            "Lease.coordination.k8s.io \"x\" is invalid: [a: Required value, b: Duplicate value: \"c\"]"
        );
        assert_eq!(ApiError::not_found(leases, "x").message, "leases.coordination.k8s.io \"x\" not found");
    }
}
