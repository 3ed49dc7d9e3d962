//! `joey version`: of this program, and what executes virtual machines on the host, which the daemon that runs there knows.

use std::process::ExitCode;
use std::time::Duration;

use joey_api::instance::Host;
use joey_pool::PoolClient;
use joey_rpc::RpcError;
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{self, Format};

/// How long a daemon may take to say it: the version is told in any case.
const PATIENCE: Duration = Duration::from_secs(2);
const RUND: &str = "rund";

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    version: &'static str,
    machines: Machines,
}

/// What executes virtual machines.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Machines {
    /// False: nobody who knows could be asked.
    known: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<String>,
    /// By software instead of the processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    emulated: Option<bool>,
    /// Why there are none, or why it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

impl Machines {
    /// As the hosts of the pool tell it; there is one host so far.
    fn of(hosts: Result<Vec<Host>, String>) -> Self {
        let host = hosts.and_then(|hosts| hosts.into_iter().next().ok_or_else(|| "the pool has no host".to_owned()));
        match host {
            Err(why) => Self { known: false, by: None, emulated: None, why: Some(why) },
            Ok(Host { machines: Some(by), .. }) => {
                Self { known: true, emulated: Some(by.contains("(emulated)")), by: Some(by), why: None }
            }
            Ok(mut host) => Self { known: true, by: None, emulated: None, why: host.classes_missing.remove(RUND) },
        }
    }

    fn told(&self) -> String {
        let why = || self.why.clone().map(|why| format!(": {why}")).unwrap_or_default();
        match (&self.by, self.emulated) {
            (Some(by), Some(true)) => {
                format!("EMULATED, ten times slower and more, because KVM does not work on this host: {by}")
            }
            (Some(by), _) => by.clone(),
            (None, _) if self.known => format!("none{}", why()),
            (None, _) => format!("not known{}", why()),
        }
    }
}

pub async fn version(service: &PoolClient, format: Format) -> Result<ExitCode, Failure> {
    let hosts = match tokio::time::timeout(PATIENCE, service.hosts()).await {
        Ok(Ok(hosts)) => Ok(hosts),
        Ok(Err(RpcError::Connect { peer, .. })) => Err(format!("no joey answers at {peer}")),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the joey that runs here does not answer".to_owned()),
    };
    let version = Version { version: env!("CARGO_PKG_VERSION"), machines: Machines::of(hosts) };
    match format {
        Format::Table | Format::Wide => {
            let text = format!("joey {}\nvirtual machines: {}\n", version.version, version.machines.told());
            output::write(output::printable(&text).as_bytes())?;
            Ok(ExitCode::SUCCESS)
        }
        other => output::print(other, &version, |_| Vec::new()),
    }
}
