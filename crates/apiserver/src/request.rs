//! What a request asks for: path and query into verb, resource, namespace and name. Judges nothing about permission.

use std::collections::HashMap;

use http::{Method, Uri};

use crate::kinds::{self, Resource, Subresource};
use crate::status::{ApiError, ApiResult, FieldFault};

/// The query of a request; keys may repeat.
#[derive(Debug, Default, Clone)]
pub struct Query(Vec<(String, String)>);

impl Query {
    pub fn parse(query: Option<&str>) -> Self {
        Self(form_urlencoded::parse(query.unwrap_or_default().as_bytes()).into_owned().collect())
    }

    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// A boolean as Kubernetes reads it: present and neither `false` nor `0`.
    pub fn flag(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| !matches!(value.to_ascii_lowercase().as_str(), "false" | "0"))
    }

    /// A boolean that may be left out.
    pub fn bool(&self, key: &str) -> Option<bool> {
        self.get(key).map(|_| self.flag(key))
    }

    /// A number; anything else is a bad request.
    pub fn number<T: std::str::FromStr>(&self, key: &str) -> ApiResult<Option<T>> {
        match self.get(key) {
            None | Some("") => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| {
                ApiError::bad_request(format!("invalid value \"{text}\" for query parameter \"{key}\": not a number"))
            }),
        }
    }

    /// Whether nothing is to be stored; only `All` is known.
    pub fn dry_run(&self, verb: &str) -> ApiResult<bool> {
        let mut any = false;
        for value in self.all("dryRun") {
            if value != "All" {
                let mut fault = FieldFault::unsupported("dryRun", value, &["All"]);
                fault.message = fault.message.replacen(&format!("\"{value}\""), &format!("[\"{value}\"]"), 1);
                return Err(ApiError::invalid_options(verb, &[fault]));
            }
            any = true;
        }
        Ok(any)
    }
}

/// A request about an object, a collection or a subresource.
pub struct Target {
    pub resource: &'static Resource,
    /// Empty: across all namespaces, or a kind without namespaces.
    pub namespace: String,
    /// Empty for collections.
    pub name: String,
    pub subresource: Option<&'static Subresource>,
    pub verb: &'static str,
}

impl Target {
    pub fn key(&self) -> String {
        self.resource.key(&self.namespace, &self.name)
    }

    pub fn subresource_name(&self) -> &'static str {
        self.subresource.map(|sub| sub.name).unwrap_or_default()
    }
}

/// A path, read.
pub enum Route {
    Resource(Target),
    /// Discovery, health, version, openapi: segments of the path.
    Other(Vec<String>),
}

/// Reads method, path and query.
pub fn parse(method: &Method, uri: &Uri, query: &Query) -> ApiResult<Route> {
    let mut segments = Vec::new();
    for part in uri.path().split('/').filter(|part| !part.is_empty()) {
        let decoded = percent_encoding::percent_decode_str(part).decode_utf8();
        segments.push(decoded.map_err(|_| ApiError::bad_request("the path is not UTF-8"))?.into_owned());
    }
    let words: Vec<&str> = segments.iter().map(String::as_str).collect();
    let (group, version, rest) = match words.as_slice() {
        ["api", version, rest @ ..] if !rest.is_empty() => ("", *version, rest),
        ["apis", group, version, rest @ ..] if !rest.is_empty() => (*group, *version, rest),
        _ => return Ok(Route::Other(segments)),
    };
    target(method, query, (group, version), rest).map(Route::Resource)
}

fn target(method: &Method, query: &Query, (group, version): (&str, &str), rest: &[&str]) -> ApiResult<Target> {
    // The old form of a watch: the word before the path instead of the query parameter.
    let (rest, watch) = match rest {
        ["watch", rest @ ..] => (rest, true),
        rest => (rest, query.flag("watch")),
    };
    let (namespace, rest) = match rest {
        ["namespaces", namespace, plural, rest @ ..]
            if kinds::find("", "v1", "namespaces")
                .is_some_and(|r| group != r.group || r.subresource(plural).is_none()) =>
        {
            (*namespace, [&[*plural][..], rest].concat())
        }
        rest => ("", rest.to_vec()),
    };
    let [plural, tail @ ..] = rest.as_slice() else { return Err(ApiError::no_such_path()) };
    let resource = kinds::find(group, version, plural).ok_or_else(ApiError::no_such_path)?;
    let (name, subresource) = match tail {
        [] => ("", None),
        [name] => (*name, None),
        [name, sub] => (*name, Some(resource.subresource(sub).ok_or_else(ApiError::no_such_path)?)),
        _ => return Err(ApiError::no_such_path()),
    };
    if resource.namespaced == namespace.is_empty() && !(resource.namespaced && name.is_empty()) {
        return Err(ApiError::no_such_path());
    }
    let verb = verb(method, name.is_empty(), subresource, watch)?;
    let allowed = match subresource {
        Some(sub) => sub.verbs.contains(&verb),
        None => resource.has_verb(verb),
    };
    if !allowed || (verb == "create" && resource.namespaced && namespace.is_empty()) {
        return Err(ApiError::method_not_allowed());
    }
    Ok(Target { resource, namespace: namespace.to_owned(), name: name.to_owned(), subresource, verb })
}

fn verb(method: &Method, collection: bool, sub: Option<&Subresource>, watch: bool) -> ApiResult<&'static str> {
    Ok(match (method, collection) {
        (&Method::GET | &Method::HEAD, _) if watch && sub.is_none() => "watch",
        (&Method::GET | &Method::HEAD, true) => "list",
        (&Method::GET | &Method::HEAD, false) => "get",
        (&Method::POST, true) => "create",
        (&Method::POST, false) if sub.is_some() => "create",
        (&Method::PUT, false) => "update",
        (&Method::PATCH, false) => "patch",
        (&Method::DELETE, true) => "deletecollection",
        (&Method::DELETE, false) if sub.is_none() => "delete",
        _ => return Err(ApiError::method_not_allowed()),
    })
}

/// One acceptable answer: media type in lower case and its parameters.
#[derive(Debug, Clone)]
pub struct Accepted {
    pub media_type: String,
    parameters: HashMap<String, String>,
}

impl Accepted {
    pub fn parameter(&self, name: &str) -> &str {
        self.parameters.get(name).map(String::as_str).unwrap_or_default()
    }

    /// Whether it asks for this kind instead of the object's own (`as=…;g=…;v=…`).
    pub fn wants(&self, kind: &str, group: &str, version: &str) -> bool {
        self.parameter("as") == kind && self.parameter("g") == group && self.parameter("v") == version
    }

    /// Whether JSON answers it.
    pub fn is_json(&self) -> bool {
        matches!(self.media_type.as_str(), "application/json" | "*/*" | "application/*")
    }
}

/// The Accept header in the order given; `*/*` when there is none.
pub fn accepted(headers: &http::HeaderMap) -> Vec<Accepted> {
    let text: Vec<&str> =
        headers.get_all(http::header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    let mut accepted: Vec<Accepted> = text
        .iter()
        .flat_map(|line| line.split(','))
        .filter(|part| !part.trim().is_empty())
        .map(|part| {
            let mut words = part.split(';').map(str::trim);
            let media_type = words.next().unwrap_or_default().to_ascii_lowercase();
            let pair = |word: &str| word.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
            Accepted { media_type, parameters: words.filter_map(pair).collect() }
        })
        .collect();
    if accepted.is_empty() {
        accepted.push(Accepted { media_type: "*/*".into(), parameters: HashMap::new() });
    }
    accepted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(method: Method, path: &str) -> ApiResult<Target> {
        let uri: Uri = path.parse().unwrap();
        let query = Query::parse(uri.query());
        match parse(&method, &uri, &query)? {
            Route::Resource(target) => Ok(target),
            Route::Other(_) => panic!("{path} names no resource"),
        }
    }

    #[test]
    fn paths() {
        for (method, path, namespace, name, sub, verb) in [
            (Method::GET, "/api/v1/pods", "", "", "", "list"),
            (Method::GET, "/api/v1/pods?watch=true", "", "", "", "watch"),
            (Method::GET, "/api/v1/namespaces/a/pods/b", "a", "b", "", "get"),
            (Method::PATCH, "/api/v1/namespaces/a/pods/b/status", "a", "b", "status", "patch"),
            (Method::PUT, "/api/v1/namespaces/a/finalize", "", "a", "finalize", "update"),
            (Method::DELETE, "/api/v1/namespaces/a", "", "a", "", "delete"),
            (Method::DELETE, "/api/v1/namespaces/a/pods", "a", "", "", "deletecollection"),
            (Method::POST, "/apis/coordination.k8s.io/v1/namespaces/a/leases", "a", "", "", "create"),
        ] {
            let target = read(method, path).unwrap();
            assert_eq!(
                (target.namespace.as_str(), target.name.as_str(), target.subresource_name(), target.verb),
                (namespace, name, sub, verb),
                "{path}"
            );
        }
        for path in ["/api/v1/pods/a", "/api/v1/namespaces/a/nodes/b", "/api/v1/wrong", "/api/v2/pods"] {
            assert_eq!(read(Method::GET, path).err().unwrap().code, 404, "{path}");
        }
        assert_eq!(read(Method::POST, "/api/v1/pods").err().unwrap().code, 405);
    }

    #[test]
    fn accept() {
        let mut headers = http::HeaderMap::new();
        let text = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
        headers.insert(http::header::ACCEPT, text.parse().unwrap());
        let list = accepted(&headers);
        assert!(list[0].wants("Table", "meta.k8s.io", "v1") && list[1].is_json());
    }
}
