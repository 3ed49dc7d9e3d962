//! The life of the containers: start, end, restart with back-off, stop. One task a container owns its transitions.
//!
//! ```text
//! Waiting(CreateContainerConfigError | CreateContainerError) every 10 s
//!        ▲ │
//!        │ ▼
//! Waiting(ContainerCreating) ─► Running ─► Terminated ─► (policy says no: stays)
//!                                  ▲           │
//!                                  └─ Waiting(CrashLoopBackOff) ◄┘ 10 s, 20 s … 300 s; 10 s again after 10 min of running
//! ```

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use joey_api::agent::{AgentConfig, AgentContainer, AgentContainerState, AgentState, VERSION};
use joey_api::frame::STATUS;
use joey_api::instance::{ContainerState, InstanceEvent, Termination};
use joey_model::RestartPolicy;
use tokio::sync::{Notify, broadcast, watch};
use tokio::time::Instant;

use crate::cgroup::Cgroup;
use crate::launch::{self, Failure, Program, Started, Streams};
use crate::log_write::{self, LineSplitter, LogWriter};
use crate::stream::Pipe;
use crate::sys;

/// Back-off after a container's end, as the kubelet has it.
const FIRST_DELAY: Duration = Duration::from_secs(10);
const LAST_DELAY: Duration = Duration::from_secs(300);
const GOOD_RUN: Duration = Duration::from_secs(600);
/// How long a dead container's streams may take to end.
const DRAIN: Duration = Duration::from_secs(2);
const EVENTS: usize = 32;

pub struct Agent {
    pub config: AgentConfig,
    pub dir: PathBuf,
    pub cgroup: Cgroup,
    pub state: watch::Sender<AgentState>,
    /// When what still runs is killed; `None`: no stop was asked for.
    stop: watch::Sender<Option<Instant>>,
    pub shutdown: Notify,
    /// True once nothing more will happen.
    pub over: watch::Sender<bool>,
    pub lives: HashMap<String, Arc<Life>>,
}

/// What calls need to know of a container while its task runs it.
pub struct Life {
    pub at: usize,
    /// 0: no process.
    pub pid: AtomicU32,
    pub run: AtomicU32,
    restart: Notify,
    /// Frames by channel; `STATUS` with the exit code as four bytes is a run's last.
    pub output: broadcast::Sender<(u8, Bytes)>,
    pub log: Mutex<RunLog>,
    pub input: Mutex<Option<Arc<Pipe>>>,
    pub terminal: Mutex<Option<std::os::fd::OwnedFd>>,
}

/// The log that is shown: that of the run which began last, also while the next one is only being made.
pub struct RunLog {
    pub run: u32,
    /// 0: the run has not begun. Changes with every write, and is [`LOG_ENDED`] from the run's end on.
    pub grown: watch::Sender<u64>,
}

/// Nothing more is written into a log.
pub const LOG_ENDED: u64 = u64::MAX;

impl RunLog {
    fn of(run: u32) -> Self {
        Self { run, grown: watch::Sender::new(0) }
    }

    /// From now on the log of `run` is shown; those who wait for its beginning see it.
    fn begin(&mut self, run: u32) {
        if self.run != run {
            *self = Self::of(run);
        }
        self.grown.send_replace(1);
    }

    fn written(&self) {
        self.grown.send_modify(|count| *count += 1);
    }

    fn end(&self) {
        self.grown.send_replace(LOG_ENDED);
    }

    pub fn has_ended(&self) -> bool {
        *self.grown.borrow() == LOG_ENDED
    }
}

/// How an attempt to run a container went.
enum Outcome {
    /// It ran, or its program could not be started; `asked`: it was ended in order to start it again.
    Ended {
        end: Termination,
        asked: bool,
    },
    NotMade {
        reason: &'static str,
        message: String,
    },
}

impl Agent {
    pub fn new(config: AgentConfig, dir: PathBuf) -> Self {
        let mut lives = HashMap::new();
        for (at, container) in config.containers.iter().enumerate() {
            lives.insert(
                container.name.clone(),
                Arc::new(Life {
                    at,
                    pid: AtomicU32::new(0),
                    run: AtomicU32::new(0),
                    restart: Notify::new(),
                    output: broadcast::channel(64).0,
                    log: Mutex::new(RunLog::of(0)),
                    input: Mutex::new(None),
                    terminal: Mutex::new(None),
                }),
            );
        }
        let containers = config.containers.iter().map(|container| AgentContainerState {
            name: container.name.clone(),
            state: waiting("ContainerCreating", String::new()),
            last_termination: None,
            restart_count: 0,
            running_since: None,
        });
        let sequence = std::fs::read(dir.join("state.json"))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<AgentState>(&bytes).ok())
            .map_or(0, |state| state.sequence);
        let containers = containers.collect();
        let state = AgentState { version: VERSION, sequence, containers, events: Vec::new(), stopping: false };
        Self {
            cgroup: Cgroup::new(&config.cgroup),
            config,
            dir,
            state: watch::Sender::new(state),
            stop: watch::Sender::new(None),
            shutdown: Notify::new(),
            over: watch::Sender::new(false),
            lives,
        }
    }

    /// Changes the state, writes it down and tells the watchers.
    pub fn change(&self, change: impl FnOnce(&mut AgentState)) {
        self.state.send_modify(|state| {
            change(state);
            state.sequence += 1;
            let surplus = state.events.len().saturating_sub(EVENTS);
            state.events.drain(..surplus);
            if let Err(error) = self.persist(state) {
                eprintln!("cannot write state.json: {error}");
            }
        });
    }

    fn persist(&self, state: &AgentState) -> io::Result<()> {
        let temporary = self.dir.join("state.json.new");
        std::fs::write(&temporary, serde_json::to_vec(state)?)?;
        std::fs::rename(temporary, self.dir.join("state.json"))
    }

    /// Asks everything to end; of several calls the shortest grace counts.
    pub fn stop(&self, grace: Duration) {
        let deadline = Instant::now() + grace;
        self.stop.send_modify(|stop| *stop = Some(stop.map_or(deadline, |earlier| earlier.min(deadline))));
        self.change(|state| state.stopping = true);
    }

    pub fn restart(&self, life: &Life) {
        life.restart.notify_one();
    }

    /// Runs the containers until all have ended for good.
    pub async fn run(self: Arc<Self>) {
        let tasks: Vec<_> = (0..self.config.containers.len()).map(|at| tokio::spawn(self.clone().live(at))).collect();
        for task in tasks {
            let _ = task.await;
        }
    }

    async fn live(self: Arc<Self>, at: usize) {
        let container = &self.config.containers[at];
        let Some(life) = self.lives.get(&container.name).cloned() else { return };
        let policy = RestartPolicy::from(self.config.restart_policy);
        let mut delay = FIRST_DELAY;
        loop {
            let begun = Instant::now();
            let (ended, by_request) = match self.run_once(container, &life).await {
                Outcome::Ended { end, asked } => (end, asked),
                Outcome::NotMade { reason, message } => match self.wait_to_retry(&life, reason, message).await {
                    true => continue,
                    false => return,
                },
            };
            let exit_code = ended.exit_code;
            let stopping = self.stop.borrow().is_some();
            let again = !stopping && (by_request || policy.restarts(exit_code));
            if begun.elapsed() >= GOOD_RUN {
                delay = FIRST_DELAY;
            }
            let wait = again && !by_request;
            self.change(|state| {
                let now = &mut state.containers[at];
                now.running_since = None;
                if again {
                    now.last_termination = Some(ended.clone());
                    now.state = if wait {
                        let message =
                            format!("back-off {}s restarting failed container={}", delay.as_secs(), container.name);
                        waiting("CrashLoopBackOff", message)
                    } else {
                        waiting("ContainerCreating", String::new())
                    };
                } else {
                    now.state = ContainerState::Terminated(ended.clone());
                }
            });
            if wait {
                self.event(
                    true,
                    "BackOff",
                    format!("Back-off restarting failed container {}", container.name),
                    container,
                );
                let mut stop = self.stop.subscribe();
                tokio::select! {
                    () = tokio::time::sleep(delay) => {}
                    () = life.restart.notified() => {}
                    _ = stop.wait_for(Option::is_some) => {
                        self.change(|state| state.containers[at].state = ContainerState::Terminated(ended));
                        return;
                    }
                }
                delay = (delay * 2).min(LAST_DELAY);
            } else if !again {
                // A restart may still be asked for.
                let mut stop = self.stop.subscribe();
                tokio::select! {
                    () = life.restart.notified(), if !stopping => {}
                    _ = stop.wait_for(Option::is_some) => return,
                }
            }
            life.run.fetch_add(1, Ordering::Relaxed);
            self.change(|state| state.containers[at].restart_count += 1);
        }
    }

    fn event(&self, warning: bool, reason: &str, message: String, container: &AgentContainer) {
        let event = InstanceEvent {
            at: Timestamp::now(),
            warning,
            reason: reason.to_owned(),
            message,
            container: Some(container.name.clone()),
        };
        self.change(|state| state.events.push(event));
    }

    /// A container that could not be made is no run of it: it waits and is tried again, whatever the restart policy says, as
    /// under the kubelet. False: everything is to stop.
    async fn wait_to_retry(&self, life: &Life, reason: &'static str, message: String) -> bool {
        let mut stop = self.stop.subscribe();
        self.change(|state| state.containers[life.at].state = waiting(reason, message.clone()));
        tokio::select! {
            () = tokio::time::sleep(FIRST_DELAY) => true,
            () = life.restart.notified() => true,
            _ = stop.wait_for(Option::is_some) => {
                let end = not_started(reason, message);
                self.change(|state| state.containers[life.at].state = ContainerState::Terminated(end));
                false
            }
        }
    }

    /// One run.
    async fn run_once(&self, container: &AgentContainer, life: &Arc<Life>) -> Outcome {
        let run = life.run.load(Ordering::Relaxed);
        let upper = self.dir.join("upper").join(&container.name).join(run.to_string());
        let cgroup = self.cgroup.child(&container.name);
        let kills = cgroup.oom_kills();
        match self.launch(container, &upper, &cgroup).await {
            Err(failure) => {
                self.event(true, "Failed", format!("Error: {}", failure.message()), container);
                let _ = std::fs::remove_dir_all(&upper);
                match failure {
                    Failure::Config(message) => Outcome::NotMade { reason: "CreateContainerConfigError", message },
                    Failure::Create(message) => Outcome::NotMade { reason: "CreateContainerError", message },
                    Failure::Start(message) | Failure::Program { message, .. } => {
                        self.begin_log(container, life, run);
                        lock(&life.log).end();
                        Outcome::Ended { end: not_started("StartError", message), asked: false }
                    }
                }
            }
            Ok(started) => {
                let started_at = Timestamp::now();
                self.change(|state| {
                    let now = &mut state.containers[life.at];
                    now.state = ContainerState::Running { started_at, pid: started.pid };
                    now.running_since = Some(started_at);
                    state.events.push(InstanceEvent {
                        at: started_at,
                        warning: false,
                        reason: "Started".to_owned(),
                        message: format!("Started container {}", container.name),
                        container: Some(container.name.clone()),
                    });
                });
                let (code, signal, asked) = self.attend(container, life, started, run).await;
                let _ = std::fs::remove_dir_all(&upper);
                let reason = match code {
                    0 => "Completed",
                    // Also a shell that answers with the fate of its child.
                    137 if cgroup.oom_kills() > kills => "OOMKilled",
                    _ => "Error",
                };
                let (reason, message, started_at) = (reason.to_owned(), String::new(), Some(started_at));
                let end =
                    Termination { exit_code: code, signal, reason, message, started_at, finished_at: Timestamp::now() };
                Outcome::Ended { end, asked }
            }
        }
    }

    async fn launch(
        &self,
        container: &AgentContainer,
        upper: &std::path::Path,
        cgroup: &Cgroup,
    ) -> Result<Started, Failure> {
        let prepare = || -> io::Result<()> {
            // A restarted container starts from its image, as under the kubelet.
            let _ = std::fs::remove_dir_all(upper);
            ["data", "work", "root"].iter().try_for_each(|name| std::fs::create_dir_all(upper.join(name)))?;
            cgroup.make()?;
            cgroup.limit(&container.resources)
        };
        prepare().map_err(|error| Failure::Create(format!("cannot prepare the container: {error}")))?;
        let program = Program { container, args: &container.args, stdin: container.stdin, tty: container.tty };
        launch::container(&self.config, &program, &self.dir, upper, cgroup).await
    }

    /// Shows the log of this run. It and that of the run before are kept, as under the kubelet.
    fn begin_log(&self, container: &AgentContainer, life: &Life, run: u32) {
        lock(&life.log).begin(run);
        if let Some(old) = run.checked_sub(2) {
            log_write::remove(&self.dir, &container.name, old);
        }
    }

    /// Carries the streams and waits for the end.
    async fn attend(
        &self,
        container: &AgentContainer,
        life: &Arc<Life>,
        started: Started,
        run: u32,
    ) -> (i32, Option<i32>, bool) {
        let Started { pid, pidfd, mut streams } = started;
        life.pid.store(pid, Ordering::Relaxed);
        *lock(&life.terminal) = streams.terminal.take();
        *lock(&life.input) = streams.stdin.take().and_then(|fd| Pipe::writer(fd).ok()).map(Arc::new);
        self.begin_log(container, life, run);
        let mut carried = tokio::spawn(carry(
            self.dir.clone(),
            container.name.clone(),
            run,
            (self.config.log_max_bytes, self.config.log_max_files),
            life.clone(),
            streams,
        ));
        let signal = signal_number(&container.stop_signal);
        let (mut stop, mut asked, mut deadline) = (self.stop.subscribe(), false, None::<Instant>);
        let mut told = false;
        let mut ended = std::pin::pin!(launch::ended(&pidfd, pid));
        let (code, by) = loop {
            if let Some(asked_by) = *stop.borrow_and_update() {
                deadline = Some(deadline.map_or(asked_by, |own| own.min(asked_by)));
            }
            if deadline.is_some() && !told {
                told = true;
                let _ = sys::kill(pid, signal);
            }
            tokio::select! {
                end = &mut ended => break end,
                Ok(()) = stop.changed() => {}
                () = life.restart.notified(), if !asked => {
                    asked = true;
                    let grace = Duration::from_secs(self.config.termination_grace_period_seconds.into());
                    deadline = Some(Instant::now() + grace);
                }
                () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    // The first process of a pid namespace takes all others with it.
                    let _ = sys::kill(pid, libc::SIGKILL);
                    break ended.await;
                }
            }
        };
        life.pid.store(0, Ordering::Relaxed);
        if tokio::time::timeout(DRAIN, &mut carried).await.is_err() {
            carried.abort();
        }
        *lock(&life.input) = None;
        *lock(&life.terminal) = None;
        // Those who read this run's log come to its end, also those who come later.
        lock(&life.log).end();
        let _ = life.output.send((STATUS, Bytes::copy_from_slice(&code.to_be_bytes())));
        (code, by, asked)
    }
}

/// From the streams into the log and to those who attached, at the pace of the log.
async fn carry(dir: PathBuf, container: String, run: u32, limits: (u64, u32), life: Arc<Life>, streams: Streams) {
    let log = match LogWriter::open(&dir, &container, run, limits.0, limits.1) {
        Ok(log) => Mutex::new(log),
        Err(error) => return eprintln!("cannot open the log of {container}: {error}"),
    };
    let one = async |fd: Option<std::os::fd::OwnedFd>, channel: u8, name: &str| -> io::Result<()> {
        let Some(fd) = fd else { return Ok(()) };
        let pipe = Pipe::reader(fd)?;
        let (mut splitter, mut buffer) = (LineSplitter::default(), vec![0; 8 << 10]);
        loop {
            let count = pipe.read(&mut buffer).await?;
            if count == 0 {
                let done = splitter.finish(&mut lock(&log), name);
                lock(&life.log).written();
                return done;
            }
            // A full disk must not end the container: what cannot be written is lost, and said.
            if let Err(error) = splitter.push(&mut lock(&log), name, &buffer[..count]) {
                eprintln!("cannot write the log of {container}: {error}");
            }
            lock(&life.log).written();
            if life.output.receiver_count() > 0 {
                let _ = life.output.send((channel, Bytes::copy_from_slice(&buffer[..count])));
            }
        }
    };
    let both = tokio::join!(one(streams.stdout, 1, "stdout"), one(streams.stderr, 2, "stderr"));
    for error in [both.0.err(), both.1.err()].into_iter().flatten() {
        eprintln!("cannot read the output of {container}: {error}");
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The end of a container whose program never ran; 128 as the kubelet has it.
fn not_started(reason: &str, message: String) -> Termination {
    let (reason, finished_at) = (reason.to_owned(), Timestamp::now());
    Termination { exit_code: 128, signal: None, reason, message, started_at: None, finished_at }
}

fn waiting(reason: &str, message: String) -> ContainerState {
    ContainerState::Waiting { reason: reason.to_owned(), message }
}

/// `SIGTERM`, `TERM` or `15`; what is none of them is SIGTERM.
fn signal_number(text: &str) -> i32 {
    let name = text.trim().to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let number = match name {
        "HUP" => libc::SIGHUP,
        "INT" => libc::SIGINT,
        "QUIT" => libc::SIGQUIT,
        "KILL" => libc::SIGKILL,
        "USR1" => libc::SIGUSR1,
        "USR2" => libc::SIGUSR2,
        "WINCH" => libc::SIGWINCH,
        "ABRT" => libc::SIGABRT,
        "CONT" => libc::SIGCONT,
        "STOP" => libc::SIGSTOP,
        _ => match name.strip_prefix("RTMIN+").map(|more| more.parse::<i32>()) {
            Some(Ok(more)) => 34 + more,
            _ => name.parse().unwrap_or(libc::SIGTERM),
        },
    };
    if (1..=64).contains(&number) { number } else { libc::SIGTERM }
}
