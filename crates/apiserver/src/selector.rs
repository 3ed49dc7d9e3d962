//! Label and field selectors: their grammar and whether an object matches. Which objects are looked at is the cache's matter.

use crate::kinds::Resource;
use crate::object::Object;
use crate::status::{ApiError, ApiResult};

/// What a list or watch asks for.
#[derive(Debug, Clone, Default)]
pub struct Selector {
    labels: Vec<Requirement>,
    fields: Vec<FieldTerm>,
}

#[derive(Debug, Clone, PartialEq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Debug, Clone, PartialEq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
    Greater(i64),
    Less(i64),
}

#[derive(Debug, Clone, PartialEq)]
enum Field {
    Name,
    Namespace,
    /// Place in the kind's table of selectable fields.
    Nth(usize),
}

#[derive(Debug, Clone, PartialEq)]
struct FieldTerm {
    field: Field,
    value: String,
    equal: bool,
}

impl Selector {
    /// Reads both selectors of a request.
    pub fn parse(resource: &Resource, labels: Option<&str>, fields: Option<&str>) -> ApiResult<Self> {
        Ok(Self {
            labels: Labels::new(labels.unwrap_or_default()).parse()?,
            fields: parse_fields(resource, fields.unwrap_or_default())?,
        })
    }

    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    pub fn matches(&self, resource: &Resource, object: &Object) -> bool {
        self.fields.iter().all(|term| {
            let value = match term.field {
                Field::Name => object.name(),
                Field::Namespace => object.namespace(resource),
                Field::Nth(index) => &object.fields[index],
            };
            (value == term.value) == term.equal
        }) && self.labels.iter().all(|requirement| requirement.matches(object))
    }

    /// The exact value a field must have, if the selector says so: a way into an index.
    pub fn exact(&self, resource: &Resource, field: &str) -> Option<&str> {
        self.fields
            .iter()
            .find(|term| {
                term.equal
                    && match term.field {
                        Field::Name => field == "metadata.name",
                        Field::Namespace => field == "metadata.namespace",
                        Field::Nth(index) => resource.fields[index] == field,
                    }
            })
            .map(|term| term.value.as_str())
    }
}

impl Requirement {
    fn matches(&self, object: &Object) -> bool {
        let value = object.labels.get(self.key.as_str()).map(|value| &**value);
        let number = || value.and_then(|value| value.parse::<i64>().ok());
        match &self.test {
            Test::In(values) => value.is_some_and(|value| values.iter().any(|v| v == value)),
            Test::NotIn(values) => !value.is_some_and(|value| values.iter().any(|v| v == value)),
            Test::Exists => value.is_some(),
            Test::Absent => value.is_none(),
            Test::Greater(than) => number().is_some_and(|number| number > *than),
            Test::Less(than) => number().is_some_and(|number| number < *than),
        }
    }
}

/// Reader of `a=b,c!=d,e in (f,g),h,!i,j>1`.
struct Labels<'a> {
    text: &'a str,
    rest: &'a str,
}

impl<'a> Labels<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, rest: text }
    }

    fn fail<T>(&self, why: &str) -> ApiResult<T> {
        let text = self.text;
        Err(ApiError::bad_request(format!("unable to parse requirement: {why} in label selector \"{text}\"")))
    }

    fn parse(mut self) -> ApiResult<Vec<Requirement>> {
        let mut all = Vec::new();
        self.skip_space();
        if self.rest.is_empty() {
            return Ok(all);
        }
        loop {
            all.push(self.requirement()?);
            if self.take("") {
                return Ok(all);
            }
            if !self.take(",") {
                return self.fail("expected a comma");
            }
        }
    }

    fn requirement(&mut self) -> ApiResult<Requirement> {
        let absent = self.take("!");
        let key = self.word();
        if !key_is_valid(&key) {
            return self.fail(&format!("invalid label key \"{key}\""));
        }
        if absent {
            return Ok(Requirement { key, test: Test::Absent });
        }
        let test = if self.take("==") || self.take("=") {
            Test::In(vec![self.value()?])
        } else if self.take("!=") {
            Test::NotIn(vec![self.value()?])
        } else if self.take(">") {
            Test::Greater(self.number()?)
        } else if self.take("<") {
            Test::Less(self.number()?)
        } else if self.at_end_of_term() {
            Test::Exists
        } else {
            match self.word().as_str() {
                "in" => Test::In(self.values()?),
                "notin" => Test::NotIn(self.values()?),
                other => return self.fail(&format!("unknown operator \"{other}\"")),
            }
        };
        Ok(Requirement { key, test })
    }

    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    /// Takes a token if it is next; the empty token stands for the end.
    fn take(&mut self, token: &str) -> bool {
        self.skip_space();
        if token.is_empty() {
            return self.rest.is_empty();
        }
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn at_end_of_term(&mut self) -> bool {
        self.skip_space();
        self.rest.is_empty() || self.rest.starts_with(',')
    }

    fn word(&mut self) -> String {
        self.skip_space();
        let end = self.rest.find(|c: char| " \t,()=!<>".contains(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word.to_owned()
    }

    fn value(&mut self) -> ApiResult<String> {
        let value = self.word();
        match value_is_valid(&value) {
            true => Ok(value),
            false => self.fail(&format!("invalid label value \"{value}\"")),
        }
    }

    fn number(&mut self) -> ApiResult<i64> {
        let word = self.word();
        word.parse().or_else(|_| self.fail(&format!("\"{word}\" is not an integer")))
    }

    fn values(&mut self) -> ApiResult<Vec<String>> {
        if !self.take("(") {
            return self.fail("expected \"(\"");
        }
        let mut values = Vec::new();
        loop {
            values.push(self.value()?);
            if self.take(")") {
                return Ok(values);
            }
            if !self.take(",") {
                return self.fail("expected a comma or \")\"");
            }
        }
    }
}

/// A label key: an optional DNS subdomain and a slash, then at most 63 of `A-Z a-z 0-9 - _ .`.
pub fn key_is_valid(key: &str) -> bool {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    prefix.is_none_or(|prefix| joey_model::id::check_subdomain("label prefix", prefix).is_ok())
        && !name.is_empty()
        && value_is_valid(name)
}

/// A label value: empty, or at most 63 of `A-Z a-z 0-9 - _ .` with a letter or digit at both ends.
pub fn value_is_valid(value: &str) -> bool {
    let bytes = value.as_bytes();
    let ends = |c: Option<&u8>| c.is_none_or(u8::is_ascii_alphanumeric);
    bytes.len() <= 63
        && ends(bytes.first())
        && ends(bytes.last())
        && bytes.iter().all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(c))
}

fn parse_fields(resource: &Resource, text: &str) -> ApiResult<Vec<FieldTerm>> {
    let mut terms = Vec::new();
    for part in text.split(',').filter(|part| !part.trim().is_empty()) {
        let (name, value, equal) = if let Some((name, value)) = part.split_once("!=") {
            (name, value, false)
        } else if let Some((name, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
            (name, value, true)
        } else {
            return Err(ApiError::bad_request(format!("invalid selector: \"{text}\"; can't understand \"{part}\"")));
        };
        let (name, value) = (name.trim(), value.trim().to_owned());
        // The two groups of events name the same field differently.
        let name = match name.strip_prefix("regarding.") {
            Some(rest) if resource.plural == "events" => format!("involvedObject.{rest}"),
            _ => name.to_owned(),
        };
        let field = match name.as_str() {
            "metadata.name" => Field::Name,
            "metadata.namespace" => Field::Namespace,
            name => match resource.fields.iter().position(|field| *field == name) {
                Some(index) => Field::Nth(index),
                None if resource.fields.is_empty() => {
                    let known = "only \"metadata.name\", \"metadata.namespace\"";
                    return Err(ApiError::bad_request(format!("\"{name}\" is not a known field selector: {known}")));
                }
                None => {
                    return Err(ApiError::bad_request(format!("field label not supported: {name}")));
                }
            },
        };
        terms.push(FieldTerm { field, value, equal });
    }
    Ok(terms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn matches(labels: &str, fields: &str) -> bool {
        let resource = crate::kinds::find("", "v1", "pods").unwrap();
        let value = json!({"metadata": {"name": "a", "labels": {"app": "web", "tier": "3", "x/y": ""}},
            "spec": {"nodeName": "n"}});
        let bytes = crate::object::encode(resource, &value);
        let object = Object::read(resource, resource.key("d", "a"), bytes, 1).unwrap();
        Selector::parse(resource, Some(labels), Some(fields)).unwrap().matches(resource, &object)
    }

    #[test]
    fn grammar() {
        for yes in [
            "",
            "app=web",
            "app==web",
            "app",
            "!no",
            "app!=db",
            "no!=x",
            "app in (db, web)",
            "app notin (a,b),tier>2",
            "tier<4",
            "x/y=",
            "x/y",
            " app = web , tier ",
            "in=web,app",
        ] {
            assert_eq!(matches(yes, ""), !yes.starts_with("in="), "{yes}");
        }
        for no in ["app=db", "!app", "no", "app!=web", "app in (db)", "tier>3", "no in (a)"] {
            assert!(!matches(no, ""), "{no}");
        }
        let resource = crate::kinds::find("", "v1", "pods").unwrap();
        for bad in ["=", "a=b c", "a in", "a in (b", "a=b,", "a%", "a>b", "a,,b"] {
            assert!(Selector::parse(resource, Some(bad), None).is_err(), "{bad}");
        }
    }

    #[test]
    fn fields() {
        assert!(matches("", "spec.nodeName=n,metadata.name==a,metadata.namespace!=x,status.phase="));
        assert!(!matches("", "spec.nodeName!=n"));
        let resource = crate::kinds::find("", "v1", "pods").unwrap();
        let error = Selector::parse(resource, None, Some("spec.wrong=1")).unwrap_err();
        assert_eq!(error.message, "field label not supported: spec.wrong");
    }
}
