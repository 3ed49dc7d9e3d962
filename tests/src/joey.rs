//! A running `joey up` as a fixture: a data directory, an address range and a port of its own, its kubeconfig, and `joey` and
//! `kubectl` pointed at it. Dropped, it is taken down with all its Pods.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::host::Belongings;
use crate::program::{Outcome, Program, run, run_with_input};
use crate::registry::free_address;
use crate::{programs, repository, seconds, wait_until};

/// How a `joey up` is started.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Addresses for Pods; chosen at random when not given.
    pub range: Option<String>,
    /// Aborts at this durable step (the hidden flag `--crash-at`).
    pub crash_at: Option<String>,
    /// Further arguments.
    pub arguments: Vec<String>,
    /// `joey down` at the end.
    pub take_down: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { range: None, crash_at: None, arguments: Vec::new(), take_down: true }
    }
}

/// A Joey of the test's own.
#[derive(Debug)]
pub struct Joey {
    dir: TempDir,
    range: String,
    listen: SocketAddr,
    settings: Settings,
    program: Option<Program>,
}

impl Joey {
    /// Starts one with a fresh data directory and waits until it is ready.
    #[track_caller]
    pub fn start() -> Self {
        Self::start_with(Settings::default())
    }

    #[track_caller]
    pub fn start_with(settings: Settings) -> Self {
        let mut joey = Self::prepare(settings);
        joey.up();
        joey
    }

    /// Starts one that has virtual machines; `None` where there are none to be had, which `scripts/machines.sh` says loudly.
    #[track_caller]
    pub fn start_with_machines(settings: Settings) -> Option<Self> {
        static GUESTS: OnceLock<String> = OnceLock::new();
        let made = || run(&mut Command::new(repository().join("scripts/machines.sh"))).ok().trim().to_owned();
        let guests = GUESTS.get_or_init(made);
        if guests.is_empty() {
            return None;
        }
        let mut joey = Self::prepare(settings);
        std::fs::create_dir_all(joey.data()).expect("its own folder");
        run(Command::new("cp").arg("-a").arg(guests).arg(joey.data().join("guests"))).ok();
        joey.up();
        Some(joey)
    }

    /// Everything but the running program.
    pub fn prepare(settings: Settings) -> Self {
        let dir = TempDir::with_prefix("joey-test-").expect("a temporary folder");
        let range = settings.range.clone().unwrap_or_else(random_range);
        Self { dir, range, listen: free_address(), settings, program: None }
    }

    /// Starts it (again), on the same data, and waits until it is ready.
    #[track_caller]
    pub fn up(&mut self) {
        self.launch();
        let log = self.log();
        wait_until("joey up is ready", seconds(30), || {
            let program = self.program.as_mut().expect("it was launched");
            if let Some(code) = program.ended() {
                panic!("joey up ended with {code}:\n{}", program.output());
            }
            let answers = TcpStream::connect(self.listen).is_ok() && self.dir.path().join("data/kubeconfig").exists();
            let ready = answers && self.kubectl(&["get", "--raw", "/readyz"]).code == 0;
            crate::holds(ready, std::fs::read_to_string(&log).unwrap_or_default())
        });
    }

    /// Starts it without waiting for anything.
    pub fn launch(&mut self) {
        let listen = self.listen.to_string();
        self.launch_role(&["up", "--listen", &listen]);
    }

    /// Starts it as a virtual node of a cluster, with its own host, without waiting for anything.
    pub fn launch_vnode(&mut self, kubeconfig: &Path, node: &str) {
        let kubeconfig = kubeconfig.display().to_string();
        self.launch_role(&["vnode", "--kubeconfig", &kubeconfig, "--node-name", node]);
    }

    fn launch_role(&mut self, role: &[&str]) {
        let mut command = self.joey_command(role);
        command.args(["--pod-range", &self.range]);
        if let Some(step) = &self.settings.crash_at {
            command.args(["--crash-at", step]);
        }
        command.args(&self.settings.arguments).env("RUST_LOG", "info");
        self.program = Some(Program::start(&mut command, &self.log()));
    }

    /// Arms or disarms a crash point for the next start.
    pub fn crash_at(&mut self, step: Option<&str>) {
        self.settings.crash_at = step.map(str::to_owned);
    }

    /// Further arguments for the next start.
    pub fn arguments(&mut self, arguments: &[&str]) {
        self.settings.arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A folder for the test's files.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    pub fn range(&self) -> &str {
        &self.range
    }

    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// What it has on the host outside of its data directory; nothing after [`Joey::down`].
    pub fn traces(&self) -> BTreeSet<String> {
        self.belongings().found()
    }

    /// What is its own on the host.
    pub fn belongings(&self) -> Belongings {
        Belongings::new(&self.data(), &self.range)
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("up.log")
    }

    /// What `joey up` has written, over all its starts.
    pub fn output(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    #[track_caller]
    pub fn program(&mut self) -> &mut Program {
        self.program.as_mut().expect("joey was started")
    }

    /// `kill -9`, and waits until it is gone.
    #[track_caller]
    pub fn kill(&mut self) {
        let mut program = self.program.take().expect("joey was started");
        program.signal(Signal::SIGKILL);
        program.wait(seconds(10));
    }

    /// SIGTERM, and waits for the exit code.
    #[track_caller]
    pub fn stop(&mut self) -> i32 {
        let mut program = self.program.take().expect("joey was started");
        program.signal(Signal::SIGTERM);
        program.wait(seconds(20))
    }

    /// Runs `joey` on its data directory.
    #[track_caller]
    pub fn joey(&self, arguments: &[&str]) -> Outcome {
        run(&mut self.joey_command(arguments))
    }

    /// Asks for another sandbox in the place of a Pod's; whether that was heard is seen by what follows.
    pub fn renew(&self, pod: &str) {
        let call = format!("http://localhost/v1/instances/{pod}.default/renew");
        let socket = self.data().join("joey.sock");
        let mut command = Command::new("curl");
        run(command.args(["-s", "--max-time", "5", "-X", "POST", "--unix-socket"]).arg(socket).arg(call));
    }

    /// The same with standard input.
    #[track_caller]
    pub fn joey_with_input(&self, arguments: &[&str], input: &[u8]) -> Outcome {
        run_with_input(&mut self.joey_command(arguments), input)
    }

    /// `joey --data-dir D ARGUMENTS`.
    pub fn joey_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(programs().join("joey"));
        // A test never touches the machine's own Joey, nor asks its cluster.
        command.arg("--data-dir").arg(self.data()).args(arguments);
        command.env_remove("KUBECONFIG").env_remove("JOEY_DATA_DIR").env("NO_COLOR", "1");
        command
    }

    /// Runs kubectl against it.
    #[track_caller]
    pub fn kubectl(&self, arguments: &[&str]) -> Outcome {
        run(&mut self.kubectl_command(arguments))
    }

    #[track_caller]
    pub fn kubectl_with_input(&self, arguments: &[&str], input: &str) -> Outcome {
        run_with_input(&mut self.kubectl_command(arguments), input.as_bytes())
    }

    pub fn kubectl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(kubectl());
        // A home of its own: kubectl caches discovery there, by address.
        command.arg("--kubeconfig").arg(self.data().join("kubeconfig")).args(arguments);
        command.env("HOME", self.dir.path()).env_remove("KUBECONFIG");
        command
    }

    /// The kubectls that there are: the machine's, and the newest where it is there.
    pub fn kubectls(&self) -> Vec<Command> {
        let mut all = vec![self.kubectl_command(&[])];
        let newest = repository().join(".tools/kubectl");
        if newest.exists() {
            let mut command = Command::new(newest);
            command.arg("--kubeconfig").arg(self.data().join("kubeconfig"));
            command.env("HOME", self.dir.path()).env_remove("KUBECONFIG");
            all.push(command);
        } else {
            eprintln!("SKIPPED: kubectl of scripts/kubectl.sh is not in .tools");
        }
        all
    }

    /// `kubectl apply` of an object.
    #[track_caller]
    pub fn apply(&self, object: &Value) -> String {
        self.kubectl_with_input(&["apply", "-f", "-"], &object.to_string()).ok()
    }

    /// An object as JSON; `null` when it is not there.
    #[track_caller]
    pub fn get(&self, kind: &str, name: &str) -> Value {
        let text = self.kubectl(&["get", kind, name, "--ignore-not-found", "-o", "json"]).ok();
        if text.trim().is_empty() { Value::Null } else { serde_json::from_str(&text).expect("kubectl writes JSON") }
    }

    /// Waits until a Pod's condition is true and returns the Pod.
    #[track_caller]
    pub fn wait_for(&self, pod: &str, condition: &str, deadline: Duration) -> Value {
        wait_until(&format!("Pod {pod} is {condition}"), deadline, || {
            let object = self.get("pod", pod);
            let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let holds = conditions.iter().any(|c| c["type"] == condition && c["status"] == "True");
            if holds { Ok(object) } else { Err(object["status"].to_string()) }
        })
    }

    /// Applies a Pod of one container and waits until it is ready.
    #[track_caller]
    pub fn run_pod(&self, name: &str, image: &str, command: &[&str]) -> Value {
        self.apply(&pod(name, image, command));
        self.wait_for(name, "Ready", seconds(60))
    }

    /// Deletes a Pod and waits until it is gone.
    #[track_caller]
    pub fn delete_pod(&self, name: &str) {
        self.kubectl(&["delete", "pod", name, "--grace-period=1", "--timeout=30s"]).ok();
    }

    /// The instance behind a Pod of the default namespace, as the pool's API shows it.
    #[track_caller]
    pub fn instance_of(&self, pod: &str) -> Value {
        self.joey(&["describe", &format!("{pod}.default"), "-o", "json"]).json()
    }

    /// The process id, on the host, of an instance's first container.
    #[track_caller]
    pub fn pid_of(&self, instance: &str) -> u32 {
        let instance = self.joey(&["describe", instance, "-o", "json"]).json();
        let pid = instance["status"]["containers"][0]["state"]["running"]["pid"].as_u64();
        u32::try_from(pid.unwrap_or_else(|| panic!("no process in {instance}"))).expect("process ids fit")
    }

    /// `joey down`: every instance ended, nothing left.
    #[track_caller]
    pub fn down(&mut self) -> Outcome {
        let outcome = self.joey(&["down"]);
        if let Some(mut program) = self.program.take() {
            program.wait(seconds(30));
        }
        outcome
    }
}

impl Drop for Joey {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- joey up wrote:\n{}", self.output());
        }
        if self.settings.take_down && self.data().exists() {
            let ended = self.joey_command(&["down"]).output();
            if let Err(error) = ended {
                eprintln!("joey down cannot be started: {error}");
            }
        }
    }
}

/// A Pod of one container, restarted never, with a short grace period.
pub fn pod(name: &str, image: &str, command: &[&str]) -> Value {
    let mut container = serde_json::json!({"name": "main", "image": image});
    if !command.is_empty() {
        container["command"] = command.into();
    }
    serde_json::json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"containers": [container], "restartPolicy": "Never", "terminationGracePeriodSeconds": 1},
    })
}

/// The kubectl that scripts/kubectl.sh finds.
pub fn kubectl() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| run(&mut Command::new(repository().join("scripts/kubectl.sh"))).ok().trim().into())
}

/// 256 addresses that hardly anybody uses: out of 198.18.0.0/15, kept for measurements (RFC 2544), so that tests on one machine
/// do not meet each other, nor a Joey that runs here.
fn random_range() -> String {
    let [a, b]: [u8; 2] = rand::random();
    format!("{}/24", Ipv4Addr::new(198, 18 + (a & 1), b, 0))
}
