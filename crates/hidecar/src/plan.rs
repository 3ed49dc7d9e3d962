//! What of an instance is carried, and to which sink: made when its sandbox is, and kept in `plan.json` beside its segments, so that the
//! records that it leaves behind can be carried without it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use joey_api::agent::{Collected, OUTPUT};
use joey_api::logs::{LogSource, Logs, Origin, of_variables};
use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;
const NAME: &str = "plan.json";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    version: u32,
    pub instance: String,
    pub fields: BTreeMap<String, String>,
    pub streams: Vec<Stream>,
}

/// One source of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    pub container: String,
    pub name: String,
    pub sink: String,
    pub tags: BTreeMap<String, String>,
    /// The paths of files; not given: the container's output.
    pub files: Option<String>,
    /// Of the output this stream alone.
    pub only: Option<String>,
}

impl Plan {
    /// The plan of an instance with these containers and variables, and what of it cannot be done, by container. `sink` gives the name of
    /// the sink that is meant, or says why there is none.
    pub fn new(
        instance: &str,
        logs: &Logs,
        containers: &[(String, Vec<(String, String)>)],
        sink: impl Fn(Option<&str>) -> Result<String, String>,
    ) -> (Self, Vec<(String, String)>) {
        let (mut streams, mut faults) = (Vec::<Stream>::new(), Vec::new());
        for (container, env) in containers {
            let (of_env, wrong) = of_variables(container, env);
            faults.extend(wrong.into_iter().map(|fault| (container.clone(), fault)));
            let of_it = |source: &&LogSource| source.container.as_deref().is_none_or(|name| name == container);
            for source in logs.sources.iter().filter(of_it).chain(&of_env) {
                let known = streams.iter().any(|known| known.container == *container && known.name == source.name);
                let chosen = source.sink.as_deref().or(logs.sink.as_deref());
                let made = match (known, Origin::parse(&source.from)) {
                    (true, _) => Err("there are two of that name".to_owned()),
                    (false, Err(fault)) => Err(fault),
                    (false, Ok(origin)) => sink(chosen).map(|sink| stream(container, source, origin, sink)),
                };
                match made {
                    Ok(stream) => streams.push(stream),
                    Err(fault) => {
                        faults.push((
                            container.clone(),
                            format!("log source \"{}\" is not collected: {fault}", source.name),
                        ));
                    }
                }
            }
        }
        (Self { version: VERSION, instance: instance.to_owned(), fields: logs.fields.clone(), streams }, faults)
    }

    /// What the agent has to keep of a container.
    pub fn collected(&self, container: &str) -> Collected {
        let mut collected = Collected::default();
        for stream in self.streams.iter().filter(|stream| stream.container == container) {
            match &stream.files {
                Some(path) => drop(collected.files.insert(stream.name.clone(), path.clone())),
                None => collected.output = true,
            }
        }
        collected
    }

    /// Writes it into the directory of segments below an instance's, durably: without it nobody knows whose they are.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        std::fs::create_dir_all(dir)?;
        let (place, bytes) = (dir.join(NAME), serde_json::to_vec(self)?);
        let new = place.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        std::fs::rename(new, place)?;
        File::open(dir)?.sync_all()
    }

    /// The plan in a directory of segments; `None` where nothing is collected.
    pub(crate) fn read(dir: &Path) -> io::Result<Option<Self>> {
        let plan: Self = match std::fs::read(dir.join(NAME)) {
            Ok(bytes) => serde_json::from_slice(&bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match plan.version {
            VERSION => Ok(Some(plan)),
            other => Err(io::Error::other(format!("plan has version {other}, this program reads {VERSION}"))),
        }
    }
}

fn stream(container: &str, source: &LogSource, origin: Origin, sink: String) -> Stream {
    let (files, only) = match origin {
        Origin::Output(only) => (None, only.map(str::to_owned)),
        Origin::Files(path) => (Some(path), None),
    };
    Stream { container: container.to_owned(), name: source.name.clone(), sink, tags: source.tags.clone(), files, only }
}

impl Stream {
    /// Where its segments are.
    pub(crate) fn dir(&self, dir: &Path) -> PathBuf {
        dir.join(&self.container).join(if self.files.is_some() { &self.name } else { OUTPUT })
    }

    pub(crate) fn key(&self) -> String {
        format!("{}/{}", self.container, self.name)
    }
}

/// Replaces a file; who reads it meanwhile sees the old or the new one. After a loss of power it may be an older one, which repeats
/// records and loses none.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, bytes)?;
    std::fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_become_streams_with_sinks() {
        let source = |name: &str, from: &str, sink: Option<&str>| LogSource {
            name: name.to_owned(),
            from: from.to_owned(),
            sink: sink.map(str::to_owned),
            ..LogSource::default()
        };
        let logs = Logs {
            sink: Some("usual".to_owned()),
            sources: vec![source("all", "stdout", None), source("err", "stderr-only", Some("other"))],
            ..Logs::default()
        };
        let env = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let containers = [
            ("web".to_owned(), env(&[("aliyun_logs_files", "/l/*.log"), ("aliyun_logs_all", "/x")])),
            ("db".to_owned(), env(&[("aliyun_logs_bad", "nothing")])),
        ];
        let known = |name: Option<&str>| {
            name.filter(|name| *name != "other").map(str::to_owned).ok_or("no such sink".to_owned())
        };
        let (plan, faults) = Plan::new("i-1", &logs, &containers, known);
        let seen: Vec<_> = plan.streams.iter().map(|stream| (stream.key(), stream.sink.as_str())).collect();
        let expected = [("web/all", "usual"), ("web/files", "usual"), ("db/all", "usual")];
        assert_eq!(seen, expected.map(|(key, sink)| (key.to_owned(), sink)));
        assert_eq!(faults.len(), 4, "two of one name, two without a sink, one that is no source: {faults:?}");
        let collected = plan.collected("web");
        assert!(collected.output && collected.files["files"] == "/l/*.log" && plan.collected("none").is_nothing());
    }
}
