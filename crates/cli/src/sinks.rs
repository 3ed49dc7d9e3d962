//! Log sinks in the configuration file. Their secrets are files that only the host's owner reads; instances choose among the names.
//! What can be said is in `docs/configuration.md`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use joey_hidecar::{FileSettings, HttpSettings, KafkaSettings, Settings, SinkSettings};
use joey_model::id::check_label;
use joey_model::quantity::parse_units;
use serde::Deserialize;

use crate::configuration::Amount;

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Logs {
    default: Option<String>,
    keep_bytes: Option<Amount>,
    keep_hours: Option<u32>,
}

/// One of the three.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sink {
    file: Option<FileSink>,
    http: Option<HttpSink>,
    kafka: Option<KafkaSink>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileSink {
    directory: PathBuf,
    max_bytes: Option<Amount>,
    max_files: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct HttpSink {
    url: String,
    token_file: Option<PathBuf>,
    ca_file: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct KafkaSink {
    brokers: Vec<String>,
    topic: String,
    user: Option<String>,
    password_file: Option<PathBuf>,
    ca_file: Option<PathBuf>,
}

/// Puts what the file says into the settings of the carrier.
pub fn take_in(settings: &mut Settings, logs: Logs, sinks: BTreeMap<String, Sink>) -> Result<(), String> {
    for (name, sink) in sinks {
        check_label("sink", &name).map_err(|error| error.to_string())?;
        let sink = self::sink(sink).map_err(|fault| format!("sink \"{name}\": {fault}"))?;
        settings.sinks.insert(name, sink);
    }
    if let Some(name) = logs.default.as_ref().filter(|name| !settings.sinks.contains_key(*name)) {
        return Err(format!("logs: default: there is no sink \"{name}\""));
    }
    settings.default = logs.default;
    settings.keep_bytes = bytes("logs: keepBytes", &logs.keep_bytes)?.unwrap_or(settings.keep_bytes);
    settings.keep = logs.keep_hours.map_or(settings.keep, |hours| Duration::from_secs(3600 * u64::from(hours)));
    Ok(())
}

fn bytes(word: &str, amount: &Option<Amount>) -> Result<Option<u64>, String> {
    let read = amount.as_ref().map(|amount| parse_units(&amount.text())).transpose();
    read.map_err(|error| format!("{word}: {error}"))
}

fn sink(sink: Sink) -> Result<SinkSettings, String> {
    match sink {
        Sink { file: Some(file), http: None, kafka: None } => {
            if !file.directory.is_absolute() {
                return Err(format!("directory {} is not absolute", file.directory.display()));
            }
            let max_bytes = bytes("maxBytes", &file.max_bytes)?.unwrap_or(100 << 20);
            let max_files = file.max_files.unwrap_or(5);
            if max_bytes < 1 << 20 || max_files == 0 {
                return Err("maxBytes must be at least 1Mi and maxFiles at least 1".to_owned());
            }
            Ok(SinkSettings::File(FileSettings { directory: file.directory, max_bytes, max_files }))
        }
        Sink { file: None, http: Some(HttpSink { url, token_file, ca_file }), kafka: None } => {
            match url.starts_with("http://") || url.starts_with("https://") {
                true => Ok(SinkSettings::Http(HttpSettings { url, token_file, ca_file })),
                false => Err(format!("url {url} begins neither with http:// nor with https://")),
            }
        }
        Sink { file: None, http: None, kafka: Some(KafkaSink { brokers, topic, user, password_file, ca_file }) } => {
            if brokers.is_empty() || topic.is_empty() {
                return Err("brokers and a topic are needed".to_owned());
            }
            if user.is_some() != password_file.is_some() {
                return Err("user and passwordFile are given together".to_owned());
            }
            Ok(SinkSettings::Kafka(KafkaSettings { brokers, topic, user: user.zip(password_file), ca_file }))
        }
        _ => Err("it is one of file, http and kafka".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Settings, String> {
        #[derive(Deserialize)]
        struct File {
            #[serde(default)]
            logs: Logs,
            #[serde(default)]
            sinks: BTreeMap<String, Sink>,
        }
        let file: File = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        let mut settings = Settings::new(PathBuf::from("/left"));
        take_in(&mut settings, file.logs, file.sinks).map(|()| settings)
    }

    #[test]
    fn sinks_by_name() {
        let text = "logs: {default: a, keepBytes: 10Mi}\nsinks:\n  a: {http: {url: 'http://x/'}}\n  b: {file: {directory: /l}}\n  \
                    c: {kafka: {brokers: ['k:9092'], topic: t, user: u, passwordFile: /p}}\n";
        let settings = read(text).unwrap();
        assert_eq!((settings.sinks.len(), settings.default.as_deref()), (3, Some("a")));
        assert_eq!((settings.keep_bytes, settings.keep), (10 << 20, Duration::MAX));
        for (bad, word) in [
            ("logs: {default: a}", "no sink \"a\""),
            ("sinks: {a: {}}", "one of"),
            ("sinks: {a: {http: {url: 'http://x/'}, file: {directory: /l}}}", "one of"),
            ("sinks: {a: {http: {url: 'ftp://x/'}}}", "http://"),
            ("sinks: {a: {file: {directory: l}}}", "absolute"),
            ("sinks: {a: {file: {directory: /l, maxBytes: 10}}}", "1Mi"),
            ("sinks: {a: {kafka: {brokers: [k], topic: t, user: u}}}", "together"),
            ("sinks: {A_: {file: {directory: /l}}}", "A_"),
            ("sinks: {a: {http: {url: 'http://x/', token: secret}}}", "token"),
        ] {
            let fault = read(bad).unwrap_err();
            assert!(fault.contains(word), "{bad}: {fault}");
        }
    }
}
