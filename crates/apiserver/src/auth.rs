//! Who calls (client certificate, bearer token, nobody) and what they may do.
//!
//! The rules are a closed default: whoever is not named here may discover and ask about themselves, nothing more. Rules
//! that users write (RBAC) are not here yet.

use http::{HeaderMap, header};
use rustls::pki_types::CertificateDer;

use crate::request::Target;
use crate::status::{ApiError, ApiResult};
use crate::{State, kinds, object};

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub user: String,
    pub uid: String,
    pub groups: Vec<String>,
}

const AUTHENTICATED: &str = "system:authenticated";
const MASTERS: &str = "system:masters";
const NODES: &str = "system:nodes";

impl Identity {
    /// A caller with the given groups, known to the server.
    pub fn new(user: impl Into<String>, groups: &[&str]) -> Self {
        let mut groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
        groups.push(AUTHENTICATED.to_owned());
        Self { user: user.into(), uid: String::new(), groups }
    }

    /// The reconcilers inside this process.
    pub fn controllers() -> Self {
        Self::new("system:joey:controllers", &[MASTERS])
    }

    /// The administrator.
    pub fn admin() -> Self {
        Self::new("joey-admin", &[MASTERS])
    }

    /// The virtual node of a name.
    pub fn node(name: &str) -> Self {
        Self::new(format!("system:node:{name}"), &[NODES])
    }

    pub fn anonymous() -> Self {
        Self { user: "system:anonymous".into(), uid: String::new(), groups: vec!["system:unauthenticated".into()] }
    }

    pub fn is_anonymous(&self) -> bool {
        self.user == "system:anonymous"
    }

    fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }
}

/// The caller of a connection that showed a verified certificate.
pub fn of_certificate(certificate: &CertificateDer<'_>) -> Option<Identity> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let (user, groups) = joey_pki::subject_of(&certificate);
    if user.is_empty() {
        return None;
    }
    let groups: Vec<&str> = groups.iter().map(String::as_str).collect();
    Some(Identity::new(user, &groups))
}

/// The caller of a request without a client certificate. A wrong token is refused, not taken for nobody, and so is one whose
/// account or Pod is gone.
pub(crate) async fn of_request(state: &State, headers: &HeaderMap) -> ApiResult<Identity> {
    let Some(value) = headers.get(header::AUTHORIZATION) else { return Ok(Identity::anonymous()) };
    let value = value.to_str().map_err(|_| ApiError::unauthorized())?;
    let (scheme, token) = value.split_once(' ').unwrap_or((value, ""));
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(ApiError::unauthorized());
    }
    let token = token.trim();
    if same(token.as_bytes(), state.admin_token.as_bytes()) {
        return Ok(Identity::admin());
    }
    let bearer = state.tokens.verify(token, jiff::Timestamp::now()).ok_or_else(ApiError::unauthorized)?;
    let account = ("serviceaccounts", bearer.account.as_str(), bearer.who.uid.as_str());
    let pod = bearer.pod.as_ref().map(|(name, uid)| ("pods", name.as_str(), uid.as_str()));
    for (plural, name, uid) in std::iter::once(account).chain(pod) {
        let kind = kinds::find("", "v1", plural).ok_or_else(ApiError::unauthorized)?;
        let found = state.read(&kind.key(&bearer.namespace, name)).await?;
        if found.is_none_or(|(object, _)| object::text(&object, "/metadata/uid") != uid) {
            return Err(ApiError::unauthorized());
        }
    }
    Ok(bearer.who)
}

/// Whom the caller acts as: only who may do everything may act as somebody else.
pub fn acting(who: Identity, headers: &HeaderMap) -> ApiResult<Identity> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let user = text("impersonate-user");
    if user.is_empty() {
        let others = headers.keys().any(|name| name.as_str().starts_with("impersonate-"));
        let why = "requested impersonation without impersonating a user";
        return if others { Err(ApiError::bad_request(why)) } else { Ok(who) };
    }
    if !who.is_in(MASTERS) {
        let message =
            format!("users \"{user}\" is forbidden: User \"{}\" cannot impersonate resource \"users\"", who.user);
        return Err(ApiError::new(http::StatusCode::FORBIDDEN, "Forbidden", message));
    }
    let named = headers.get_all("impersonate-group").iter().filter_map(|value| value.to_str().ok());
    let mut groups: Vec<&str> = named.collect();
    let of_namespace;
    if let Some((namespace, _)) = user.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':')) {
        of_namespace = format!("system:serviceaccounts:{namespace}");
        groups.extend(["system:serviceaccounts", &of_namespace]);
    }
    let mut acting = match user {
        "system:anonymous" => Identity::anonymous(),
        user => Identity::new(user, &groups),
    };
    acting.uid = text("impersonate-uid").to_owned();
    Ok(acting)
}

/// Compares in a time that does not depend on where the difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

/// One act, as rules see it.
#[derive(Debug, Clone, Copy)]
pub struct Act<'a> {
    pub verb: &'a str,
    pub group: &'a str,
    pub resource: &'a str,
    pub subresource: &'a str,
    pub namespace: &'a str,
    pub name: &'a str,
}

/// Whether the caller may do it.
pub fn allows(who: &Identity, act: &Act<'_>) -> bool {
    if who.is_in(MASTERS) {
        return true;
    }
    if who.is_anonymous() {
        return false;
    }
    if act.verb == "create"
        && matches!(
            (act.group, act.resource),
            ("authentication.k8s.io", "selfsubjectreviews")
                | ("authorization.k8s.io", "selfsubjectaccessreviews" | "selfsubjectrulesreviews")
        )
    {
        return true;
    }
    who.is_in(NODES) && node_rules().iter().any(|rule| rule.covers(act))
}

/// One line of what a caller may do.
pub struct Rule {
    pub group: &'static str,
    /// `pods` or `pods/status`.
    pub resources: &'static [&'static str],
    pub verbs: &'static [&'static str],
}

impl Rule {
    fn covers(&self, act: &Act<'_>) -> bool {
        self.group == act.group
            && self.verbs.contains(&act.verb)
            && self.resources.iter().any(|resource| match resource.split_once('/') {
                Some((resource, sub)) => resource == act.resource && sub == act.subresource,
                None => *resource == act.resource && act.subresource.is_empty(),
            })
    }
}

fn node_rules() -> &'static [Rule] {
    const READ: &[&str] = &["get", "list", "watch"];
    &[
        Rule {
            group: "",
            resources: &["nodes", "nodes/status"],
            verbs: &["create", "get", "list", "watch", "update", "patch", "delete"],
        },
        Rule { group: "", resources: &["pods"], verbs: &["get", "list", "watch", "delete", "update", "patch"] },
        Rule { group: "", resources: &["pods/status"], verbs: &["get", "update", "patch"] },
        Rule { group: "", resources: &["pods/eviction"], verbs: &["create"] },
        Rule {
            group: "",
            resources: &["configmaps", "secrets", "services", "namespaces", "serviceaccounts"],
            verbs: READ,
        },
        Rule { group: "", resources: &["serviceaccounts/token"], verbs: &["create"] },
        Rule { group: "", resources: &["events"], verbs: &["create", "get", "list", "update", "patch"] },
        Rule { group: "events.k8s.io", resources: &["events"], verbs: &["create", "get", "list", "update", "patch"] },
        Rule {
            group: "coordination.k8s.io",
            resources: &["leases"],
            verbs: &["create", "get", "list", "watch", "update", "patch", "delete"],
        },
    ]
}

/// The lines that hold for a caller, for SelfSubjectRulesReview.
pub fn rules(who: &Identity) -> Vec<&'static Rule> {
    const EVERYTHING: Rule = Rule { group: "*", resources: &["*"], verbs: &["*"] };
    const REVIEWS: [Rule; 2] = [
        Rule { group: "authentication.k8s.io", resources: &["selfsubjectreviews"], verbs: &["create"] },
        Rule {
            group: "authorization.k8s.io",
            resources: &["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
            verbs: &["create"],
        },
    ];
    if who.is_in(MASTERS) {
        return vec![&EVERYTHING];
    }
    let mut rules: Vec<&Rule> = REVIEWS.iter().collect();
    if who.is_in(NODES) {
        rules.extend(node_rules());
    }
    rules
}

/// Refuses a request about a resource that the caller may not make, in kube-apiserver's words.
pub fn authorize(who: &Identity, target: &Target) -> ApiResult<()> {
    let act = Act {
        verb: target.verb,
        group: target.resource.group,
        resource: target.resource.plural,
        subresource: target.subresource_name(),
        namespace: &target.namespace,
        name: &target.name,
    };
    if allows(who, &act) {
        return Ok(());
    }
    let place = match target.namespace.as_str() {
        "" => "at the cluster scope".to_owned(),
        namespace => format!("in the namespace \"{namespace}\""),
    };
    let resource = match act.subresource {
        "" => act.resource.to_owned(),
        sub => format!("{}/{sub}", act.resource),
    };
    let why = format!(
        "User \"{}\" cannot {} resource \"{resource}\" in API group \"{}\" {place}",
        who.user, act.verb, act.group
    );
    Err(ApiError::forbidden(target.resource, &target.name, &why))
}

/// Refuses a path that is about no resource: anybody reads health and version, whoever is known discovers.
pub fn authorize_path(who: &Identity, verb: &str, segments: &[String]) -> ApiResult<()> {
    let first = segments.first().map(String::as_str).unwrap_or_default();
    let open = matches!(first, "healthz" | "livez" | "readyz" | "version");
    if open || !who.is_anonymous() {
        return Ok(());
    }
    let message = format!("forbidden: User \"{}\" cannot {verb} path \"/{}\"", who.user, segments.join("/"));
    let mut error = ApiError::new(http::StatusCode::FORBIDDEN, "Forbidden", message);
    error.details = serde_json::json!({});
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closed_by_default() {
        let act = |verb, resource, subresource| Act {
            verb,
            group: "",
            resource,
            subresource,
            namespace: "default",
            name: "x",
        };
        let account = Identity::new("system:serviceaccount:default:default", &["system:serviceaccounts"]);
        assert!(!allows(&account, &act("get", "pods", "")));
        assert!(allows(&Identity::admin(), &act("get", "pods", "")));
        let node = Identity::node("joey");
        assert!(allows(&node, &act("patch", "pods", "status")));
        assert!(!allows(&node, &act("create", "pods", "exec")));
        assert!(!allows(&node, &act("delete", "secrets", "")));
        assert!(!allows(&Identity::anonymous(), &act("get", "pods", "")));
        assert!(authorize_path(&Identity::anonymous(), "get", &["version".into()]).is_ok());
        assert!(authorize_path(&Identity::anonymous(), "get", &["api".into()]).is_err());
        assert!(authorize_path(&account, "get", &["api".into()]).is_ok());
    }
}
