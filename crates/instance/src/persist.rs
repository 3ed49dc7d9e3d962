//! The record of an instance on disk: `record.json` in its directory, written whole, synced, renamed. And what its agent left there.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use jiff::Timestamp;
use joey_api::agent::{AgentConfig, AgentContainer, AgentState};
use joey_api::instance::InstanceSpec;
use serde::{Deserialize, Serialize};

use crate::told;

const VERSION: u32 = 1;
const NAME: &str = "record.json";

/// What was asked for. Holds credentials and file contents: mode 0600.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    version: u32,
    pub(crate) spec: InstanceSpec,
    pub(crate) accepted_at: Timestamp,
    /// The end was asked for, with this grace in seconds.
    pub(crate) deleting: Option<u32>,
    /// Starts of containers in sandboxes that are gone, by container.
    #[serde(default)]
    pub(crate) restarts_before: BTreeMap<String, u32>,
    /// Its sandbox was lost, and its policy does not let it be made again.
    #[serde(default)]
    pub(crate) lost: bool,
    /// Its sandbox is being taken away, and another one made.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) renewing: bool,
}

impl Record {
    pub(crate) fn new(spec: InstanceSpec) -> Self {
        let restarts_before = spec.restarts_before.clone();
        Self {
            version: VERSION,
            spec,
            accepted_at: Timestamp::now(),
            deleting: None,
            restarts_before,
            lost: false,
            renewing: false,
        }
    }

    /// The record in `dir`; `None` where there is none that is whole: nothing was acknowledged then.
    pub(crate) fn read(dir: &Path) -> io::Result<Option<Self>> {
        let bytes = match fs::read(dir.join(NAME)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let record: Self = serde_json::from_slice(&bytes)?;
        match record.version {
            VERSION => Ok(Some(record)),
            other => Err(io::Error::other(format!("record has version {other}, this program reads {VERSION}"))),
        }
    }

    /// Durable when it returns. Makes `dir` where it is missing, and leaves none behind where it fails then.
    pub(crate) fn write(&self, dir: &Path) -> io::Result<()> {
        let made = match fs::DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(error),
        };
        let new = dir.join("record.new");
        let written = self.write_by(&new, dir).and_then(|()| match dir.parent().filter(|_| made) {
            Some(parent) => File::open(parent)?.sync_all(),
            None => Ok(()),
        });
        if written.is_err() {
            // On a full disk the room is needed.
            let _ = fs::remove_file(&new);
            let _ = if made { fs::remove_dir(dir) } else { Ok(()) };
        }
        written
    }

    fn write_by(&self, new: &Path, dir: &Path) -> io::Result<()> {
        write_private(new, &serde_json::to_vec(self)?)?.sync_all()?;
        fs::rename(new, dir.join(NAME))?;
        File::open(dir)?.sync_all()
    }
}

/// Writes a file that only root reads.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    Ok(file)
}

/// Notes what a container of a sandbox is made from now: for whoever looks at what the sandbox left.
pub(crate) fn put_container(dir: &Path, container: AgentContainer) -> io::Result<()> {
    let place = dir.join("agent.json");
    let mut config: AgentConfig = serde_json::from_slice(&fs::read(&place)?)?;
    if let Some(known) = config.containers.iter_mut().find(|known| known.name == container.name) {
        *known = container;
    }
    let new = dir.join("agent.new");
    write_private(&new, &serde_json::to_vec(&config)?)?;
    fs::rename(new, place)
}

/// Whether an agent had begun to tell of a sandbox that was not taken down since.
pub(crate) fn had_sandbox(dir: &Path) -> bool {
    dir.join("agent.json").exists() && last_state(dir).is_some()
}

/// What the agent last wrote; `None` where there is nothing that can be read.
pub(crate) fn last_state(dir: &Path) -> Option<AgentState> {
    read_json(&dir.join("state.json")).map(told::bounded)
}

pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}
