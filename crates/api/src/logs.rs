//! Which logs of an instance are collected and what they are called: sources, and their reading from the variables that ECI uses.
//! Where records go is known to the host alone; here a sink is a name.

use std::collections::BTreeMap;

use joey_model::id::check_label;
use serde::{Deserialize, Serialize};

/// Sources that a container can have.
const MAX_SOURCES: usize = 16;
/// Bytes of a path, and of a record's tags.
const MAX_PATH: usize = 1024;
const MAX_TAGS: usize = 2048;
/// What records say anyway.
const OWN: [&str; 11] =
    ["time", "instance", "container", "source", "stream", "path", "offset", "tags", "message", "partial", "lost"];
/// How the names of the variables begin (SLS' own).
pub const PREFIX: &str = "aliyun_logs_";

/// What is collected, beside what variables of the containers say.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Logs {
    /// The sink of sources that name none; the host's own default when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sink: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<LogSource>,
    /// What every record says of where it is from: `namespace`, `pod`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub fields: BTreeMap<String, String>,
}

/// A source: the output of a container, or files in it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LogSource {
    /// A DNS label, unique in its container.
    pub name: String,
    /// Every container where none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// What [`Origin::parse`] reads.
    pub from: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sink: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
}

/// Where the lines of a source come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Both streams of the container, or that one.
    Output(Option<&'static str>),
    /// The files of the container whose paths fit.
    Files(String),
}

impl Origin {
    /// `stdout` (both streams, as ECI has it), `stdout-only`, `stderr-only`, or an absolute path in whose names `*` and `?` may stand.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "stdout" => return Ok(Self::Output(None)),
            "stdout-only" => return Ok(Self::Output(Some("stdout"))),
            "stderr-only" => return Ok(Self::Output(Some("stderr"))),
            _ => {}
        }
        let mut names = text.split('/');
        if names.next() != Some("") {
            return Err(format!(
                "\"{text}\" is neither stdout, stdout-only, stderr-only nor a path that begins with /"
            ));
        }
        let bad =
            |name: &str| matches!(name, "" | "." | "..") || name.contains("**") || name.contains(char::is_control);
        if text.len() > MAX_PATH || names.any(bad) {
            return Err(format!("path \"{text}\" must be plain and short: no empty names, no \"..\", no \"**\""));
        }
        Ok(Self::Files(text.to_owned()))
    }
}

/// What is wrong with the sources of an instance whose containers have these names.
pub fn check(logs: &Logs, containers: &[&str]) -> Vec<String> {
    let mut faults: Vec<String> = logs.sources.iter().filter_map(|source| check_source(source).err()).collect();
    for name in logs.sources.iter().filter_map(|source| source.container.as_deref()) {
        if !containers.contains(&name) {
            faults.push(format!("log source of container \"{name}\", which is not there"));
        }
    }
    for container in containers {
        let of_it =
            || logs.sources.iter().filter(|source| source.container.as_deref().is_none_or(|own| own == *container));
        let mut names: Vec<&str> = of_it().map(|source| source.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            faults.push(format!("container \"{container}\" has two log sources \"{}\"", pair[0]));
        }
        if names.len() > MAX_SOURCES {
            faults.push(format!("container \"{container}\" has more than {MAX_SOURCES} log sources"));
        }
    }
    if let Some(field) = logs.fields.keys().find(|field| OWN.contains(&field.as_str())) {
        faults.push(format!("field \"{field}\" of log records has a meaning of its own"));
    }
    if let Some(Err(error)) = logs.sink.as_deref().map(|name| check_label("log sink", name)) {
        faults.push(error.to_string());
    }
    faults
}

fn check_source(source: &LogSource) -> Result<(), String> {
    let of = |fault: String| format!("log source \"{}\": {fault}", source.name);
    check_label("log source", &source.name).map_err(|error| error.to_string())?;
    Origin::parse(&source.from).map_err(of)?;
    if let Some(sink) = &source.sink {
        check_label("log sink", sink).map_err(|error| of(error.to_string()))?;
    }
    match source.tags.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>() > MAX_TAGS {
        true => Err(of(format!("its tags have more than {MAX_TAGS} bytes"))),
        false => Ok(()),
    }
}

/// The sources that a container's variables name, and what is wrong with others. `aliyun_logs_NAME` is the source NAME,
/// `aliyun_logs_NAME_tags` its tags as `KEY=VALUE,…`. What else begins so (`_ttl`, `_shard`, `machinegroup` …) tells SLS how to keep
/// what it was sent, and means nothing here.
pub fn of_variables(container: &str, env: &[(String, String)]) -> (Vec<LogSource>, Vec<String>) {
    let named = |name: &str| env.iter().find(|(known, _)| known.strip_prefix(PREFIX) == Some(name));
    let (mut sources, mut faults) = (Vec::new(), Vec::new());
    for (name, from) in env.iter().filter_map(|(name, value)| Some((name.strip_prefix(PREFIX)?, value))) {
        if name.contains('_') || name == "machinegroup" {
            continue;
        }
        let tags = named(&format!("{name}_tags")).map(|(_, text)| text.as_str()).unwrap_or_default();
        let pairs = tags.split(',').filter(|pair| !pair.trim().is_empty());
        let tags = pairs.map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key.trim().to_owned(), value.trim().to_owned())
        });
        let (name, from, tags) = (name.to_owned(), from.trim().to_owned(), tags.collect());
        let source = LogSource { name, container: Some(container.to_owned()), from, sink: None, tags };
        match check_source(&source) {
            Ok(()) if sources.len() < MAX_SOURCES => sources.push(source),
            Ok(()) => {
                faults.push(format!("log source \"{}\" is one too many: there can be {MAX_SOURCES}", source.name))
            }
            Err(fault) => faults.push(fault),
        }
    }
    (sources, faults)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn variables_as_eci_has_them() {
        let (sources, faults) = of_variables(
            "web",
            &env(&[
                ("PATH", "/bin"),
                ("aliyun_logs_out", "stdout"),
                ("aliyun_logs_out_tags", "team=shop, tier = front,bare"),
                ("aliyun_logs_access-log", "/var/log/*.log"),
                ("aliyun_logs_access-log_ttl", "30"),
                ("aliyun_logs_access-log_shard", "2"),
                ("aliyun_logs_machinegroup", "group"),
            ]),
        );
        assert_eq!(faults, Vec::<String>::new());
        let seen: Vec<_> = sources.iter().map(|source| (source.name.as_str(), source.from.as_str())).collect();
        assert_eq!(seen, [("out", "stdout"), ("access-log", "/var/log/*.log")]);
        let tags = [("bare", ""), ("team", "shop"), ("tier", "front")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(sources[0].tags, BTreeMap::from(tags));
        assert_eq!(sources[1].container.as_deref(), Some("web"));
    }

    #[test]
    fn what_is_no_source_is_told() {
        for (name, from) in [
            ("a", "var/log"),
            ("a", "/var/../etc/x"),
            ("a", "/var/**/x.log"),
            ("a", "/"),
            ("a", "//x"),
            ("a", "syslog"),
            ("A.b", "stdout"),
            ("a", "/x\ty"),
        ] {
            let (sources, faults) = of_variables("web", &env(&[(&format!("aliyun_logs_{name}"), from)]));
            assert_eq!((sources.len(), faults.len()), (0, 1), "{name}={from}: {sources:?} {faults:?}");
        }
        let many: Vec<_> = (0..20).map(|n| (format!("aliyun_logs_s{n}"), "stdout".to_owned())).collect();
        let (sources, faults) = of_variables("web", &many);
        assert_eq!((sources.len(), faults.len()), (16, 4));
    }

    #[test]
    fn sources_are_checked() {
        let source = |name: &str, container: Option<&str>| LogSource {
            name: name.to_owned(),
            container: container.map(str::to_owned),
            from: "stdout".to_owned(),
            ..LogSource::default()
        };
        let logs = |sources| Logs { sources, ..Logs::default() };
        assert!(check(&logs(vec![source("a", None), source("b", Some("web"))]), &["web", "db"]).is_empty());
        assert!(
            check(&logs(vec![source("a", None), source("a", Some("web"))]), &["web"])[0].contains("two log sources")
        );
        assert!(check(&logs(vec![source("a", Some("gone"))]), &["web"])[0].contains("not there"));
        assert!(!check(&Logs { sink: Some("No".to_owned()), ..Logs::default() }, &[]).is_empty());
        assert_eq!(Origin::parse("stderr-only"), Ok(Origin::Output(Some("stderr"))));
    }
}
