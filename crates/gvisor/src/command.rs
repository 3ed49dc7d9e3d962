//! The command lines of `runsc`, as far as releases since December 2022 understand them alike.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What containers are run with on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runtime {
    /// The program `runsc`.
    pub program: PathBuf,
    /// How it gets hold of system calls: `systrap ptrace`
    pub platform: String,
    /// The program `joey-agent`, linked statically: the first process in every sandbox.
    pub inside: PathBuf,
}

/// `runsc` with a place for what it knows of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runsc {
    pub program: PathBuf,
    pub platform: String,
    /// Where it keeps what it knows; nobody else may read it.
    pub root: PathBuf,
}

impl Runsc {
    /// `runsc` with what holds for every call: what it is to say goes to `log`.
    fn command(&self, log: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.arg0("runsc").env_clear();
        command.arg("--root").arg(&self.root);
        command.arg("--log").arg(log).args(["--log-format", "json"]);
        command.args(["--platform", &self.platform, "--network", "sandbox", "--ignore-cgroups"]);
        // What containers write is on the host's side too, where it is counted and copied; and both sides see what the other changes.
        command.args(["--overlay2", "none", "--file-access", "shared"]);
        // The capability decides, as in every class.
        command.arg("--net-raw");
        command
    }

    /// Makes a container from the specification in `bundle`.
    pub fn create(&self, id: &str, bundle: &Path) -> Command {
        let mut command = self.command(&log_of(bundle));
        command.arg("create").arg("--bundle").arg(bundle).arg(id);
        command
    }

    /// Starts the process of a container that was made.
    pub fn start(&self, id: &str, bundle: &Path) -> Command {
        let mut command = self.command(&log_of(bundle));
        command.args(["start", id]);
        command
    }

    /// Waits for a container's end, and says how it ended as [`crate::monitor::exit_status`] reads it.
    pub fn wait(&self, id: &str, bundle: &Path) -> Command {
        let mut command = self.command(&log_of(bundle));
        command.args(["wait", id]);
        command
    }

    /// Takes away what is left of a container.
    pub fn delete(&self, id: &str) -> Command {
        // What was said before of why is not to be lost among what it finds gone.
        let mut command = self.command(Path::new("/dev/null"));
        command.args(["delete", "--force", id]);
        command
    }

    /// Runs a further process: `process` describes it, and its number goes to `number` once it runs.
    pub fn exec(&self, id: &str, process: &Path, number: &Path) -> Command {
        let mut command = self.command(&process.with_extension("log"));
        command.arg("exec").arg("--process").arg(process).arg("--internal-pid-file").arg(number).arg(id);
        command
    }

    /// Signals the first process of a container; all of it where it is to be killed.
    pub fn kill(&self, id: &str, signal: i32) -> Command {
        let mut command = self.command(Path::new("/dev/null"));
        command.arg("kill");
        if signal == libc::SIGKILL {
            command.arg("--all");
        }
        command.arg(id).arg(signal.to_string());
        command
    }

    /// Kills one process by the number that [`Runsc::exec`] wrote down.
    pub fn kill_process(&self, id: &str, number: &str) -> Command {
        let mut command = self.command(Path::new("/dev/null"));
        command.args([OsStr::new("kill"), OsStr::new("--pid"), OsStr::new(number), OsStr::new(id), OsStr::new("9")]);
        command
    }

    /// Makes and starts a sandbox that ends with this call: to see whether the platform works.
    pub fn run(&self, id: &str, bundle: &Path) -> Command {
        let mut command = self.command(&log_of(bundle));
        // The later word counts: there is no network here that it might take over.
        command.args(["--network", "none"]).arg("run").arg("--bundle").arg(bundle).arg(id);
        command
    }
}

/// Where what `runsc` says of a container goes.
pub fn log_of(bundle: &Path) -> PathBuf {
    bundle.join("log")
}
