//! A monitor that is asked by name on a socket that it makes itself: its process, and the talk with it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use joey_process::{Ended, Process};
use joey_rpc::client::Io;
use serde_json::Value;
use tokio::sync::watch;

use crate::grounds::{api_of, vsock_of};
use crate::jail::{errors_of, last_words, record_of, user_of};
use crate::rest::{self, Ask};
use crate::{HypervisorError, vsock};

/// Between two looks at what takes milliseconds.
const LOOK: Duration = Duration::from_millis(1);
/// How long a monitor may take until it can be asked.
const LIMIT: Duration = Duration::from_secs(20);
/// How long it may take for an answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long it may take to write a machine's memory into a file.
const SAVE: Duration = Duration::from_secs(60);

pub(crate) struct Monitor {
    pub name: String,
    pub dir: PathBuf,
    /// Whom its files and sockets belong to.
    pub user: u32,
    process: Arc<Process>,
    gone: watch::Receiver<Option<Option<Ended>>>,
}

impl Monitor {
    /// Watches the process until it has ended, and reaps it where it is this process's child.
    pub(crate) fn new(name: &str, dir: &Path, process: Process) -> Self {
        let (gone, seen) = watch::channel(None);
        let process = Arc::new(process);
        let watched = process.clone();
        tokio::spawn(async move {
            watched.ended().await;
            gone.send_replace(Some(watched.reap()));
        });
        Self { name: name.to_owned(), dir: dir.to_owned(), user: user_of(name), process, gone: seen }
    }

    /// The one of an earlier process of the host's; `None`: it has ended.
    pub(crate) fn recorded(name: &str, dir: &Path) -> Result<Option<Self>, HypervisorError> {
        let found = Process::recorded(&record_of(dir)).map_err(|source| HypervisorError::Host {
            machine: name.to_owned(),
            operation: "read the record",
            source,
        })?;
        Ok(found.map(|process| Self::new(name, dir, process)))
    }

    pub(crate) fn host(&self, operation: &'static str) -> impl Fn(io::Error) -> HypervisorError + '_ {
        move |source| HypervisorError::Host { machine: self.name.clone(), operation, source }
    }

    pub(crate) fn failed(&self, operation: &'static str) -> impl Fn(io::Error) -> HypervisorError + '_ {
        move |error| {
            // Its own words say more than that it is gone.
            let message = match self.gone.borrow().is_some() {
                true => last_words(&errors_of(&self.dir)),
                false => error.to_string(),
            };
            HypervisorError::Monitor { machine: self.name.clone(), operation, message }
        }
    }

    /// Resolves when it can be asked.
    pub(crate) async fn ready(&self, operation: &'static str) -> Result<(), HypervisorError> {
        let listening = async {
            loop {
                match crate::guarded::connect(&api_of(&self.dir), self.user).await {
                    Err(error) if is_early(error.kind()) => tokio::time::sleep(LOOK).await,
                    done => return done.map(drop),
                }
            }
        };
        self.bounded(operation, LIMIT, listening).await
    }

    /// Asks it; an answer that does not come is the monitor's failure.
    pub(crate) async fn ask(&self, operation: &'static str, ask: Ask<'_>) -> Result<Value, HypervisorError> {
        self.bounded(operation, ANSWER, rest::ask(&api_of(&self.dir), self.user, ask)).await
    }

    /// The same, for what takes as long as writing the machine's memory.
    pub(crate) async fn ask_at_length(&self, operation: &'static str, ask: Ask<'_>) -> Result<Value, HypervisorError> {
        self.bounded(operation, SAVE, rest::ask(&api_of(&self.dir), self.user, ask)).await
    }

    async fn bounded<T>(
        &self,
        operation: &'static str,
        limit: Duration,
        done: impl Future<Output = io::Result<T>>,
    ) -> Result<T, HypervisorError> {
        let mut gone = self.gone.clone();
        let done = tokio::select! {
            done = tokio::time::timeout(limit, done) => done,
            _ = gone.wait_for(Option::is_some) => Ok(Err(io::ErrorKind::BrokenPipe.into())),
        };
        match done {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => {
                if is_end(error.kind()) {
                    // Its socket closes a moment before its process is gone, whose words say why.
                    let _ = tokio::time::timeout(Duration::from_millis(100), self.ended()).await;
                }
                Err(self.failed(operation)(error))
            }
            Err(_) => Err(HypervisorError::Silent { machine: self.name.clone() }),
        }
    }

    /// A connection with the agent in the machine.
    pub(crate) async fn connect(&self) -> io::Result<Box<dyn Io>> {
        let mut gone = self.gone.clone();
        let path = vsock_of(&self.dir);
        tokio::select! {
            connected = vsock::connect(&path, self.user) => Ok(Box::new(connected?)),
            _ = gone.wait_for(Option::is_some) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    pub(crate) async fn ended(&self) -> Option<Ended> {
        // An error means that the watcher is gone, which it is only after it saw the end.
        self.gone.clone().wait_for(Option::is_some).await.ok().and_then(|gone| (*gone).flatten())
    }

    pub(crate) fn kill(&self) {
        self.process.kill();
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }
}

/// It has not made its socket yet, or does not listen yet.
fn is_early(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn is_end(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset)
}

/// What a program says of itself in the first line of `--version`, which begins with this word; only where there is KVM to be used.
pub(crate) async fn version(program: &Path, word: &str, kvm: &Path) -> io::Result<String> {
    use std::os::unix::fs::FileTypeExt;
    if !std::fs::metadata(kvm).is_ok_and(|found| found.file_type().is_char_device()) {
        let why = format!("{word} executes machines through KVM alone, and there is no {}", kvm.display());
        return Err(io::Error::new(io::ErrorKind::Unsupported, why));
    }
    let mut command = tokio::process::Command::new(program);
    command.arg("--version").env_clear().stdin(std::process::Stdio::null()).kill_on_drop(true);
    let told = tokio::time::timeout(LIMIT, command.output()).await??;
    let version = String::from_utf8_lossy(&told.stdout).lines().next().unwrap_or_default().trim().to_owned();
    match told.status.success() && version.starts_with(&format!("{word} v")) {
        true => Ok(version),
        false => Err(io::Error::other(format!("{} is no {word}: it says \"{version}\"", program.display()))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn what_is_another_program_or_has_no_kvm_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        let script = "#!/bin/sh\n[ \"$*\" = --version ] && echo 'Firecracker v1.16.0' && echo && echo more\n";
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        // Any device will do here for the kernel's.
        let device = Path::new("/dev/null");
        assert_eq!(version(&program, "Firecracker", device).await.unwrap(), "Firecracker v1.16.0");
        let error = version(&program, "cloud-hypervisor", device).await.unwrap_err().to_string();
        assert!(error.contains("is no cloud-hypervisor: it says \"Firecracker v1.16.0\""), "{error}");
        for absent in [dir.path().join("kvm"), program.clone()] {
            let error = version(&program, "Firecracker", &absent).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{error}");
        }
    }
}
