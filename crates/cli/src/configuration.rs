//! The configuration file: what is too much for flags. Unknown words are refused, so that a slip is not a silent default.
//!
//! ```yaml
//! specs:                    # sizes that instances may name: joey run --spec small
//!   small:
//!     cpu: 500m             # everything is optional, and a limit on the instance as a whole
//!     memory: 1Gi
//!     pids: 512
//!     bandwidth: 100M       # bits a second, each way
//!     packets: 20k          # a second, each way
//!     diskBytes: 50M        # a second, reads and writes each
//!     diskOperations: 500
//! ```
//!
//! Sinks of logs are in [`crate::sinks`].

use std::collections::BTreeMap;
use std::path::Path;

use joey_api::instance::Limits;
use joey_api::sizes::{Size, Sizes};
use joey_model::quantity::{parse_milli, parse_units};
use serde::Deserialize;

use crate::sinks::{self, Logs, Sink};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    specs: BTreeMap<String, Spec>,
    #[serde(default)]
    logs: Logs,
    #[serde(default)]
    sinks: BTreeMap<String, Sink>,
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

/// The sizes of a configuration file; what it says of logs goes into `logs`.
pub fn read(file: &Path, logs: &mut joey_hidecar::Settings) -> Result<Sizes, String> {
    let text = std::fs::read_to_string(file).map_err(|error| format!("{} cannot be read: {error}", file.display()))?;
    let read = serde_saphyr::from_str(&text).map_err(|error| error.to_string()).and_then(|file: File| {
        sinks::take_in(logs, file.logs, file.sinks)?;
        sizes(file.specs)
    });
    read.map_err(|fault| format!("{}: {fault}", file.display()))
}

fn sizes(specs: BTreeMap<String, Spec>) -> Result<Sizes, String> {
    specs.into_iter().map(|(name, spec)| Ok((name.clone(), size(&name, &spec)?))).collect()
}

fn size(name: &str, spec: &Spec) -> Result<Size, String> {
    type Reader = fn(&str) -> Result<u64, joey_model::quantity::InvalidQuantity>;
    let read = |word: &str, amount: &Option<Amount>, reader: Reader| {
        let read = amount.as_ref().map(|amount| reader(&amount.text())).transpose();
        read.map_err(|error| format!("spec \"{name}\": {word}: {error}"))
    };
    Ok(Size {
        limits: Limits {
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

    fn sizes(text: &str) -> Result<Sizes, String> {
        let file: File = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        super::sizes(file.specs)
    }

    #[test]
    fn specs_by_name() {
        let read =
            sizes("specs:\n  small: {cpu: 0.5, memory: 1Gi, pids: 64, packets: 20k}\n  large: {cpu: 8}\n").unwrap();
        let small = read["small"];
        assert_eq!((small.limits.cpu_milli, small.limits.memory_bytes), (Some(500), Some(1 << 30)));
        assert_eq!((small.limits.pids, small.packets_per_second), (Some(64), Some(20_000)));
        assert_eq!(read["large"].limits.cpu_milli, Some(8000));
        assert!(sizes("specs: {a: {cpus: 1}}").is_err() && sizes("spec: {}").is_err());
        assert!(sizes("specs: {a: {cpu: much}}").unwrap_err().contains("spec \"a\": cpu"));
        assert_eq!(sizes("specs: {}").unwrap(), Sizes::new());
    }
}
