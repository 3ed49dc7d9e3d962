//! What callers may ask about themselves: who they are and what they may do. Nothing is stored.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::auth::{self, Act};
use crate::object::text;
use crate::status::{ApiError, ApiResult};
use crate::verbs::{Answer, Call};

/// Answers a review, if the resource is one.
pub fn review(call: &Call<'_>, body: &Bytes) -> Option<ApiResult<Answer>> {
    let answer: fn(&Call<'_>, &mut Value) = match call.target.resource.plural {
        "selfsubjectreviews" => who,
        "selfsubjectaccessreviews" => access,
        "selfsubjectrulesreviews" => rules,
        _ => return None,
    };
    Some(call.object(body).and_then(|mut value| {
        if text(&value, "/kind") != call.target.resource.kind {
            return Err(ApiError::bad_request("the kind of the body is not the kind of the path"));
        }
        answer(call, &mut value);
        Ok(Answer::created(value))
    }))
}

fn who(call: &Call<'_>, value: &mut Value) {
    let mut user = json!({"username": call.who.user, "groups": call.who.groups});
    if !call.who.uid.is_empty() {
        user["uid"] = call.who.uid.as_str().into();
    }
    value["metadata"]["creationTimestamp"] = crate::object::now().into();
    value["status"] = json!({"userInfo": user});
}

fn access(call: &Call<'_>, value: &mut Value) {
    let allowed = match value.pointer("/spec/resourceAttributes") {
        Some(attributes) => {
            let act = Act {
                verb: text(attributes, "/verb"),
                group: text(attributes, "/group"),
                resource: text(attributes, "/resource"),
                subresource: text(attributes, "/subresource"),
                namespace: text(attributes, "/namespace"),
                name: text(attributes, "/name"),
            };
            auth::allows(call.who, &act)
        }
        None => {
            let path = text(value, "/spec/nonResourceAttributes/path");
            let segments: Vec<String> = path.split('/').filter(|p| !p.is_empty()).map(str::to_owned).collect();
            auth::authorize_path(call.who, "get", &segments).is_ok()
        }
    };
    value["status"] = json!({"allowed": allowed});
}

fn rules(call: &Call<'_>, value: &mut Value) {
    let rules = auth::rules(call.who);
    let resources: Vec<Value> = rules
        .iter()
        .map(|rule| json!({"verbs": rule.verbs, "apiGroups": [rule.group], "resources": rule.resources}))
        .collect();
    let all = rules.iter().any(|rule| rule.group == "*");
    let urls = if all {
        json!(["*"])
    } else {
        json!([
            "/api",
            "/api/*",
            "/apis",
            "/apis/*",
            "/healthz",
            "/livez",
            "/openapi",
            "/openapi/*",
            "/readyz",
            "/version"
        ])
    };
    let verbs = if all { json!(["*"]) } else { json!(["get"]) };
    value["status"] = json!({"resourceRules": resources, "incomplete": false,
        "nonResourceRules": [{"verbs": verbs, "nonResourceURLs": urls}]});
}
