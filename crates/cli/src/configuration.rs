//! The configuration file: what is too much for flags. Unknown words are refused, so that a slip is not a silent default.
//! What can be said is in `docs/configuration.md`, which a test reads.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use joey_api::instance;
use joey_api::sizes::{Size, Sizes};
use joey_guard::Limits;
use joey_model::quantity::{parse_milli, parse_units};
use serde::Deserialize;

use crate::sinks::{self, Logs, Sink};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    specs: BTreeMap<String, Spec>,
    #[serde(default)]
    guards: Guards,
    #[serde(default)]
    logs: Logs,
    #[serde(default)]
    sinks: BTreeMap<String, Sink>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Guards {
    registry_tokens: Guard,
    account_tokens: Guard,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Guard {
    per_second: Option<f64>,
    burst: Option<u32>,
    at_once: Option<u32>,
    tries: Option<u32>,
    failures: Option<u32>,
    rest_seconds: Option<u32>,
    longest_rest_seconds: Option<u32>,
}

/// What a file says, and what holds where it says nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Configuration {
    pub sizes: Sizes,
    pub registry_tokens: Limits,
    pub account_tokens: Limits,
    pub logs: joey_hidecar::Settings,
}

impl Configuration {
    /// What holds without a file; logs of instances that are gone are kept in `left_logs` until a sink takes them.
    pub fn usual(left_logs: PathBuf) -> Self {
        Self {
            sizes: Sizes::new(),
            registry_tokens: Limits::default(),
            account_tokens: joey_vnode::config::token_guard(),
            logs: joey_hidecar::Settings {
                keep_bytes: 1 << 30,
                keep: Duration::from_secs(24 * 3600),
                ..joey_hidecar::Settings::new(left_logs)
            },
        }
    }

    /// With what a file says instead.
    pub fn read(self, file: &Path) -> Result<Self, String> {
        let text =
            std::fs::read_to_string(file).map_err(|error| format!("{} cannot be read: {error}", file.display()))?;
        self.with(&text).map_err(|fault| format!("{}: {fault}", file.display()))
    }

    fn with(mut self, text: &str) -> Result<Self, String> {
        let file: File = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        let sizes = file.specs.into_iter().map(|(name, spec)| Ok((name.clone(), size(&name, &spec)?)));
        sinks::take_in(&mut self.logs, file.logs, file.sinks)?;
        Ok(Self {
            sizes: sizes.collect::<Result<_, String>>()?,
            registry_tokens: guard("registryTokens", &file.guards.registry_tokens, self.registry_tokens)?,
            account_tokens: guard("accountTokens", &file.guards.account_tokens, self.account_tokens)?,
            logs: self.logs,
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Spec {
    cpu: Option<Amount>,
    memory: Option<Amount>,
    pids: Option<Amount>,
    bandwidth: Option<Amount>,
    packets: Option<Amount>,
    disk_bytes: Option<Amount>,
    disk_operations: Option<Amount>,
}

/// `2`, `0.5` and `500m` alike.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Amount {
    Whole(u64),
    Number(f64),
    Text(String),
}

impl Amount {
    pub fn text(&self) -> String {
        match self {
            Self::Whole(number) => number.to_string(),
            Self::Number(number) => number.to_string(),
            Self::Text(text) => text.clone(),
        }
    }
}

fn guard(name: &str, wanted: &Guard, usual: Limits) -> Result<Limits, String> {
    let seconds = |wanted: Option<u32>, usual: Duration| wanted.map_or(usual, |s| Duration::from_secs(s.into()));
    let first = seconds(wanted.rest_seconds, usual.rest.0);
    let limits = Limits {
        per_second: wanted.per_second.unwrap_or(usual.per_second),
        burst: wanted.burst.unwrap_or(usual.burst),
        at_once: wanted.at_once.map_or(usual.at_once, |count| count as usize),
        tries: wanted.tries.unwrap_or(usual.tries),
        failures: wanted.failures.unwrap_or(usual.failures),
        rest: (first, seconds(wanted.longest_rest_seconds, usual.rest.1.max(first))),
        ..usual
    };
    let counts = limits.burst > 0 && limits.at_once > 0 && limits.tries > 0 && limits.failures > 0;
    if !counts || !limits.per_second.is_finite() || limits.per_second <= 0.0 {
        return Err(format!("guard \"{name}\": perSecond, burst, atOnce, tries and failures must be more than 0"));
    }
    match limits.rest.0.is_zero() || limits.rest.1 < limits.rest.0 {
        true => Err(format!("guard \"{name}\": longestRestSeconds must be at least restSeconds, and that at least 1")),
        false => Ok(limits),
    }
}

fn size(name: &str, spec: &Spec) -> Result<Size, String> {
    type Reader = fn(&str) -> Result<u64, joey_model::quantity::InvalidQuantity>;
    let read = |word: &str, amount: &Option<Amount>, reader: Reader| {
        let read = amount.as_ref().map(|amount| reader(&amount.text())).transpose();
        read.map_err(|error| format!("spec \"{name}\": {word}: {error}"))
    };
    Ok(Size {
        limits: instance::Limits {
            cpu_milli: read("cpu", &spec.cpu, parse_milli)?,
            memory_bytes: read("memory", &spec.memory, parse_units)?,
            pids: read("pids", &spec.pids, parse_units)?,
            disk_bytes_per_second: read("diskBytes", &spec.disk_bytes, parse_units)?,
            disk_operations_per_second: read("diskOperations", &spec.disk_operations, parse_units)?,
        },
        bits_per_second: read("bandwidth", &spec.bandwidth, parse_units)?,
        packets_per_second: read("packets", &spec.packets, parse_units)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usual() -> Configuration {
        Configuration::usual(PathBuf::from("/left"))
    }

    fn parse(text: &str) -> Result<Configuration, String> {
        usual().with(text)
    }

    #[test]
    fn specs_by_name() {
        let read = parse("specs:\n  small: {cpu: 0.5, memory: 1Gi, pids: 64, packets: 20k}\n  large: {cpu: 8}\n")
            .unwrap()
            .sizes;
        let small = read["small"];
        assert_eq!((small.limits.cpu_milli, small.limits.memory_bytes), (Some(500), Some(1 << 30)));
        assert_eq!((small.limits.pids, small.packets_per_second), (Some(64), Some(20_000)));
        assert_eq!(read["large"].limits.cpu_milli, Some(8000));
        assert!(parse("specs: {a: {cpus: 1}}").is_err() && parse("spec: {}").is_err());
        assert!(parse("specs: {a: {cpu: much}}").unwrap_err().contains("spec \"a\": cpu"));
        assert_eq!(parse("specs: {}").unwrap(), usual());
    }

    #[test]
    fn the_example_is_what_holds_without_a_file() {
        let page = include_str!("../../../docs/configuration.md");
        let example = page.split("```yaml").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
        let read = parse(example).unwrap();
        assert_eq!((read.logs.sinks.len(), read.logs.default.as_deref()), (3, Some("central")));
        let logs = joey_hidecar::Settings { sinks: BTreeMap::new(), default: None, ..read.logs.clone() };
        assert_eq!(Configuration { sizes: Sizes::new(), logs, ..read.clone() }, usual());
        assert_eq!(read.sizes["small"].bits_per_second, Some(100_000_000));
    }

    #[test]
    fn guards_word_by_word() {
        let read = parse("guards:\n  registryTokens: {perSecond: 0.5, burst: 2, restSeconds: 600}\n").unwrap();
        let (usual, limits) = (usual(), read.registry_tokens);
        assert_eq!((limits.per_second, limits.burst, limits.tries), (0.5, 2, usual.registry_tokens.tries));
        assert_eq!(limits.rest, (Duration::from_secs(600), Duration::from_secs(600)));
        assert_eq!(read.account_tokens, usual.account_tokens);
        for bad in [
            "{tries: 0}",
            "{perSecond: 0}",
            "{perSecond: -1}",
            "{restSeconds: 0}",
            "{restSeconds: 9, longestRestSeconds: 8}",
        ] {
            let fault = parse(&format!("guards: {{accountTokens: {bad}}}")).unwrap_err();
            assert!(fault.contains("guard \"accountTokens\""), "{bad}: {fault}");
        }
        assert!(parse("guards: {others: {}}").is_err());
    }
}
