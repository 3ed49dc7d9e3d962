//! The life of one container: start, hooks, probes, end, restart with back-off. One task owns its transitions.
//!
//! ```text
//! Waiting(CreateContainerConfigError | CreateContainerError) every 10 s
//!        ▲ │
//!        │ ▼
//! Waiting(ContainerCreating) ─► Running ─► Terminated ─► (policy says no: settled)
//!                                  ▲           │
//!                                  └─ Waiting(CrashLoopBackOff) ◄┘ 0 s, 10 s, 20 s … 300 s; 0 s again after 10 min of running
//! ```

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use jiff::Timestamp;
use joey_api::agent::{AgentContainer, OUTPUT};
use joey_api::frame::STATUS;
use joey_api::instance::{ContainerState, InstanceEvent, Termination};
use joey_api::lifecycle::Role;
use joey_collect::{Files, Log, Segments};
use joey_health::Backoff;
use joey_model::{RestartPolicy, checkpoint};
use tokio::sync::{Notify, broadcast, watch};
use tokio::time::Instant;

use crate::cgroup::Cgroup;
use crate::check::{self, Asker, Unwell};
use crate::collect;
use crate::hook::Refused;
use crate::launch::{self, Failure, Program, Started};
use crate::log_write;
use crate::output::{RunLog, Sink};
use crate::probe::{self, Health, Verdict};
use crate::stream::Pipe;
use crate::supervisor::{Agent, lock, waiting};
use crate::{last_words, signal};

/// How long a dead container's streams may take to end.
const DRAIN: Duration = Duration::from_secs(2);
/// What is left to a container whose preStop hook took all of its grace, as the kubelet has it.
const AFTER_HOOK: Duration = Duration::from_secs(2);
/// A hook after the start has no limit of its own; the container's end is its limit.
const HOOK_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// What calls need to know of a container while its task runs it.
pub struct Life {
    pub at: usize,
    /// What its next run is made from.
    container: Mutex<Arc<AgentContainer>>,
    /// 0: no process.
    pub pid: AtomicU32,
    pub run: AtomicU32,
    /// That its run is to be ended for a further one: for those of its task who wait for that.
    pub restart: Notify,
    /// Its task is at work.
    living: AtomicBool,
    /// Frames by channel; `STATUS` with the exit code as four bytes is a run's last.
    pub output: broadcast::Sender<(u8, Bytes)>,
    pub log: Mutex<RunLog>,
    pub input: Mutex<Option<Arc<Pipe>>>,
    pub terminal: Mutex<Option<std::os::fd::OwnedFd>>,
    /// Of its files, between two runs.
    pub files: Mutex<Option<Files>>,
    /// When it is killed, once it was asked to end for good.
    end: watch::Sender<Option<Instant>>,
    /// It has got past its first attempt, hook included; and it has once started as its probes see it.
    begun: watch::Sender<bool>,
    started: watch::Sender<bool>,
    settled: AtomicBool,
}

impl Life {
    pub fn new(at: usize, container: AgentContainer) -> Self {
        Self {
            at,
            container: Mutex::new(Arc::new(container)),
            pid: AtomicU32::new(0),
            run: AtomicU32::new(0),
            restart: Notify::new(),
            living: AtomicBool::new(false),
            output: broadcast::channel(64).0,
            log: Mutex::new(RunLog::of(0)),
            input: Mutex::new(None),
            terminal: Mutex::new(None),
            files: Mutex::new(None),
            end: watch::Sender::new(None),
            begun: watch::Sender::new(false),
            started: watch::Sender::new(false),
            settled: AtomicBool::new(false),
        }
    }

    pub fn container(&self) -> Arc<AgentContainer> {
        lock(&self.container).clone()
    }

    /// From its next run on it is this.
    pub fn become_anew(&self, container: AgentContainer) {
        *lock(&self.container) = Arc::new(container);
    }

    /// Ends its run and begins a further one without back-off. What has no task yet will begin as it shall be anyway.
    pub fn run_again(&self) {
        if self.living.load(Ordering::Relaxed) {
            self.restart.notify_one();
        }
    }

    /// Who asked for another run before this moment gets the one that begins now.
    fn forget_restart(&self) {
        let _ = self.restart.notified().now_or_never();
    }

    /// The process id of its first process, while it runs.
    pub fn running(&self) -> Option<u32> {
        Some(self.pid.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }

    pub fn end_by(&self, deadline: Instant) {
        self.end.send_modify(|end| *end = Some(end.map_or(deadline, |earlier| earlier.min(deadline))));
    }

    /// When it is killed, once it was asked to end for good.
    pub fn ending(&self) -> watch::Receiver<Option<Instant>> {
        self.end.subscribe()
    }

    pub fn is_ending(&self) -> bool {
        self.end.borrow().is_some()
    }

    pub fn has_settled(&self) -> bool {
        self.settled.load(Ordering::Relaxed)
    }

    pub async fn begun(&self) {
        let _ = self.begun.subscribe().wait_for(|begun| *begun).await;
    }

    pub async fn started(&self) {
        let _ = self.started.subscribe().wait_for(|started| *started).await;
    }

    /// Ready for a further life after it had settled.
    pub fn renew(&self) {
        self.end.send_replace(None);
        self.begun.send_replace(false);
        self.started.send_replace(false);
        self.settled.store(false, Ordering::Relaxed);
        self.forget_restart();
        self.run.fetch_add(1, Ordering::Relaxed);
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

/// Why a running container is being ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    Stop,
    Restart,
    Ill,
}

/// How a run ended.
struct End {
    code: i32,
    signal: Option<i32>,
    why: Option<Why>,
}

impl Agent {
    fn policy(&self, container: &AgentContainer) -> RestartPolicy {
        let policy = container.restart_policy.unwrap_or(self.config.restart_policy).into();
        match (container.role, policy) {
            // What prepares the Pod is done once it has been done.
            (Role::Init, RestartPolicy::Always) => RestartPolicy::OnFailure,
            (Role::Debug, _) => RestartPolicy::Never,
            (_, policy) => policy,
        }
    }

    /// Lives until the container has ended for good; its last exit code, if it ever ran.
    pub async fn live(self: Arc<Self>, at: usize) -> Option<i32> {
        let life = self.life(at);
        life.living.store(true, Ordering::Relaxed);
        let code = self.runs(&life).await;
        life.living.store(false, Ordering::Relaxed);
        life.settled.store(true, Ordering::Relaxed);
        life.begun.send_replace(true);
        code
    }

    async fn runs(&self, life: &Arc<Life>) -> Option<i32> {
        let at = life.at;
        let mut backoff = Backoff::default();
        let mut code = None;
        self.change(|state| state.containers[at].state = waiting("ContainerCreating", String::new()));
        loop {
            if life.is_ending() {
                return code;
            }
            life.forget_restart();
            let container = life.container();
            let container = &*container;
            if container.is_held() {
                life.begun.send_replace(true);
                match self.wait_to_be_put(life).await {
                    true => continue,
                    false => return code,
                }
            }
            let policy = self.policy(container);
            let begun = Instant::now();
            let (ended, asked) = match self.run_once(container, life).await {
                Outcome::Ended { end, asked } => (end, asked),
                Outcome::NotMade { reason, message } => {
                    // Its neighbours do not wait for what may take for ever.
                    life.begun.send_replace(true);
                    match self.wait_to_retry(life, reason, message).await {
                        true => continue,
                        false => return code,
                    }
                }
            };
            code = Some(ended.exit_code);
            life.begun.send_replace(true);
            let ruled = container.restart_rules.iter().any(|rule| rule.holds(ended.exit_code));
            let again = !life.is_ending() && (asked || ruled || policy.restarts(ended.exit_code));
            let delay = backoff.after(begun.elapsed(), asked);
            let waits = again && !delay.is_zero();
            self.change(|state| {
                let now = &mut state.containers[at];
                (now.running_since, now.started) = (None, false);
                // An init container that did its work is ready, as the kubelet tells it.
                now.ready = !again && container.role == Role::Init && ended.exit_code == 0;
                now.state = match again {
                    false => ContainerState::Terminated(ended.clone()),
                    true if !waits => waiting("ContainerCreating", String::new()),
                    true => waiting(
                        "CrashLoopBackOff",
                        format!("back-off {}s restarting failed container={}", delay.as_secs(), container.name),
                    ),
                };
                if again {
                    now.last_termination = Some(ended.clone());
                }
            });
            if !again {
                return code;
            }
            if waits && !self.back_off(container, life, delay).await {
                self.change(|state| state.containers[at].state = ContainerState::Terminated(ended));
                return code;
            }
            life.run.fetch_add(1, Ordering::Relaxed);
            self.change(|state| state.containers[at].restart_count += 1);
        }
    }

    /// One run.
    async fn run_once(&self, container: &AgentContainer, life: &Arc<Life>) -> Outcome {
        let run = life.run.load(Ordering::Relaxed);
        let upper = self.dir.join("upper").join(&container.name).join(run.to_string());
        let cgroup = self.cgroup_of(&container.name);
        let kills = cgroup.oom_kills();
        let launched = match self.prepare(container, &upper, &cgroup) {
            Err(failure) => Err(Refused::NotMade(failure)),
            Ok(()) => match self.before_start(container, life, &upper, &cgroup).await {
                Err(refused) => Err(refused),
                Ok(()) => self.launch(container, &upper, &cgroup).await.map_err(Refused::NotMade),
            },
        };
        match launched {
            Err(Refused::Ended { mut end, asked }) => {
                let words = last_words::read(&self.dir, container, &upper, run, end.exit_code);
                if !words.is_empty() {
                    end.message = words;
                }
                let _ = std::fs::remove_dir_all(&upper);
                lock(&life.log).end();
                Outcome::Ended { end, asked }
            }
            Err(Refused::NotMade(failure)) => {
                self.event(true, "Failed", format!("Error: {}", failure.message()), container);
                let _ = std::fs::remove_dir_all(&upper);
                lock(&life.log).pause();
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
                let end = self.attend(container, life, started, run, started_at).await;
                let message = last_words::read(&self.dir, container, &upper, run, end.code);
                let _ = std::fs::remove_dir_all(&upper);
                let reason = match end.code {
                    0 => "Completed",
                    // Also a shell that answers with the fate of its child.
                    137 if cgroup.oom_kills() > kills => "OOMKilled",
                    _ => "Error",
                };
                let asked = end.why == Some(Why::Restart);
                let (exit_code, signal, reason) = (end.code, end.signal, reason.to_owned());
                let (started_at, finished_at) = (Some(started_at), Timestamp::now());
                Outcome::Ended {
                    end: Termination { exit_code, signal, reason, message, started_at, finished_at },
                    asked,
                }
            }
        }
    }

    /// A writable layer of its own, and a cgroup.
    fn prepare(&self, container: &AgentContainer, upper: &Path, cgroup: &Cgroup) -> Result<(), Failure> {
        let prepared = || -> io::Result<()> {
            // A restarted container starts from its image, as under the kubelet.
            let _ = std::fs::remove_dir_all(upper);
            ["data", "work", "root"].iter().try_for_each(|name| std::fs::create_dir_all(upper.join(name)))?;
            last_words::prepare(upper)?;
            cgroup.make()?;
            cgroup.limit(&self.limits_with(&container.name, &container.resources))
        };
        prepared().map_err(|error| Failure::Create(format!("cannot prepare the container: {error}")))?;
        checkpoint::reached("agent.container-prepared");
        Ok(())
    }

    async fn launch(&self, container: &AgentContainer, upper: &Path, cgroup: &Cgroup) -> Result<Started, Failure> {
        let program = Program { container, args: &container.args, stdin: container.stdin, tty: container.tty };
        self.first_process(&program, upper, cgroup).await
    }

    /// Starts a process in a new container whose writable layer is `upper`.
    pub async fn first_process(
        &self,
        program: &Program<'_>,
        upper: &Path,
        cgroup: &Cgroup,
    ) -> Result<Started, Failure> {
        if let Some(apart) = &self.apart {
            return apart.container(&self.config, program, &self.dir, upper).await;
        }
        let init = match (self.shared, &program.container.target) {
            (None, None) => return launch::container(&self.config, program, &self.dir, upper, cgroup).await,
            (Some(first), _) => first,
            (None, Some(target)) => self
                .find(target)
                .and_then(|life| life.running())
                .ok_or_else(|| Failure::Create(format!("target container \"{target}\" is not running")))?,
        };
        launch::beside(&self.config, program, &self.dir, upper, cgroup, init).await
    }

    /// Shows the log of this run. It and that of the run before are kept, as under the kubelet.
    pub fn begin_log(&self, container: &AgentContainer, life: &Life, run: u32) {
        let limits = (self.config.log_max_bytes, self.config.log_max_files);
        let segments = container.collected.output.then(|| Segments::of(&self.dir, &container.name, OUTPUT));
        let writer = Log::open(log_write::path(&self.dir, &container.name, run, 0), limits.0, limits.1, segments);
        let mut writer = writer.inspect_err(|error| eprintln!("cannot open the log of {}: {error}", container.name));
        if let Ok(log) = &mut writer
            && let Some(error) = log.fault()
        {
            self.event(true, "LogsNotCollected", format!("its output is not collected: {error}"), container);
        }
        lock(&life.log).begin(run, writer.ok());
        if let Some(old) = run.checked_sub(2) {
            log_write::remove(&self.dir, &container.name, old);
        }
    }

    /// Tells that it runs: at once as ready where nobody has to be asked first.
    fn tell_running(&self, container: &AgentContainer, life: &Life, pid: u32, at: Timestamp) -> Health {
        let lifecycle = &container.lifecycle;
        let started = lifecycle.startup.is_none() && lifecycle.post_start.is_none();
        let online = lifecycle.pre_online.is_none();
        let health = Health { started, ready: started && probe::is_ready_unasked(container), online };
        self.change(|state| {
            let now = &mut state.containers[life.at];
            now.state = ContainerState::Running { started_at: at, pid };
            now.running_since = Some(at);
            (now.started, now.ready) = (health.started, health.counts_as_ready());
            state.events.push(InstanceEvent {
                at,
                warning: false,
                reason: "Started".to_owned(),
                message: format!("Started container {}", container.name),
                container: Some(container.name.clone()),
            });
        });
        health
    }

    /// Carries the streams, tends it by hooks and probes, ends it when asked to, and waits for its end.
    async fn attend(
        &self,
        container: &AgentContainer,
        life: &Arc<Life>,
        started: Started,
        run: u32,
        started_at: Timestamp,
    ) -> End {
        let Started { pid, pidfd, mut streams, inside } = started;
        life.pid.store(pid, Ordering::Relaxed);
        *lock(&life.terminal) = streams.terminal.take();
        *lock(&life.input) = streams.stdin.take().and_then(|fd| Pipe::writer(fd).ok()).map(Arc::new);
        self.begin_log(container, life, run);
        let sink = Sink { life: life.clone(), log: lock(&life.log).writer(), mark: "" };
        let mut carried = tokio::spawn(sink.carry(streams));
        let following = collect::follow(&self.dir, life, inside);
        checkpoint::reached("agent.container-started");
        let health = watch::Sender::new(self.tell_running(container, life, pid, started_at));
        checkpoint::reached("agent.container-told");
        let (code, signal, why) = self.until_its_end(container, life, &health, &pidfd, pid).await;
        checkpoint::reached("agent.container-ended");
        if tokio::time::timeout(DRAIN, &mut carried).await.is_err() {
            carried.abort();
        }
        if let Some(following) = following {
            following.end().await;
        }
        *lock(&life.input) = None;
        *lock(&life.terminal) = None;
        // Those who read this run's log come to its end, also those who come later.
        lock(&life.log).end();
        let _ = life.output.send((STATUS, Bytes::copy_from_slice(&code.to_be_bytes())));
        End { code, signal, why }
    }

    async fn until_its_end(
        &self,
        container: &AgentContainer,
        life: &Arc<Life>,
        health: &watch::Sender<Health>,
        pidfd: &tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>,
        pid: u32,
    ) -> (i32, Option<i32>, Option<Why>) {
        let own_grace = Duration::from_secs(self.config.termination_grace_period_seconds.into());
        let (mut end, mut seen) = (life.end.subscribe(), health.subscribe());
        let (mut why, mut deadline, mut told) = (None, None::<Instant>, false);
        let mut ended = std::pin::pin!(launch::ended(pidfd, pid));
        let mut tended = std::pin::pin!(self.tend(container, life, health));
        let mut asked_to_end = std::pin::pin!(self.ask_to_end(container, life, pid));
        if health.borrow().started {
            life.started.send_replace(true);
        }
        let (code, signal) = loop {
            if let Some(by) = *end.borrow_and_update() {
                if why.is_none() {
                    self.event(false, "Killing", format!("Stopping container {}", container.name), container);
                    why = Some(Why::Stop);
                }
                deadline = Some(deadline.map_or(by, |own| own.min(by)));
            }
            tokio::select! {
                end = &mut ended => break end,
                Ok(()) = end.changed() => {}
                () = life.restart.notified(), if why.is_none() => {
                    why = Some(Why::Restart);
                    deadline = Some(Instant::now() + own_grace);
                }
                grace = &mut tended, if why.is_none() => {
                    why = Some(Why::Ill);
                    deadline = Some(Instant::now() + grace.unwrap_or(own_grace));
                }
                Ok(()) = seen.changed() => self.tell_health(life, *seen.borrow()),
                () = &mut asked_to_end, if deadline.is_some() && !told => {
                    told = true;
                    if container.lifecycle.pre_stop.is_some() {
                        deadline = deadline.map(|by| by.max(Instant::now() + AFTER_HOOK));
                    }
                }
                () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    if told {
                        // The first process of a pid namespace takes all others with it.
                        self.ender().signal(pid, libc::SIGKILL);
                        break ended.await;
                    }
                    self.event(true, "FailedPreStopHook", "PreStopHook did not end within the grace period".to_owned(), container);
                    self.ender().signal(pid, signal::number(&container.stop_signal));
                    (told, deadline) = (true, Some(Instant::now() + AFTER_HOOK));
                }
            }
        };
        // It is reaped: from now on the number may be another process's, also while the rest is ended.
        life.pid.store(0, Ordering::Relaxed);
        if (container.target.is_some() || self.shared.is_some()) && self.apart.is_none() {
            // No namespace ends with it, so that what it started would stay with the others.
            self.cgroup.child(&container.name).end_all().await;
        }
        (code, signal, why)
    }

    fn tell_health(&self, life: &Life, health: Health) {
        if health.started {
            life.started.send_replace(true);
        }
        self.change(|state| {
            let now = &mut state.containers[life.at];
            (now.started, now.ready) = (health.started, health.counts_as_ready());
        });
    }

    /// Does the hook after the start, then asks the probes, and does the hook before it is ready when they say that it is
    /// healthy. Ends when the container has to, with the grace for that.
    async fn tend(
        &self,
        container: &AgentContainer,
        life: &Arc<Life>,
        health: &watch::Sender<Health>,
    ) -> Option<Duration> {
        if let Some(action) = &container.lifecycle.post_start
            && let Err(Unwell(why)) = check::perform(self, life, action, Asker::Hook, HOOK_LIMIT).await
        {
            self.event(true, "FailedPostStartHook", format!("PostStartHook failed: {why}"), container);
            let message = format!("FailedPostStartHook: container {} is ended", container.name);
            self.event(false, "Killing", message, container);
            return None;
        }
        life.begun.send_replace(true);
        let online = async {
            self.before_ready(container, life, health).await;
            std::future::pending().await
        };
        let Verdict { probe, grace } = tokio::select! {
            verdict = probe::watch(self, life, health) => verdict,
            never = online => never,
        };
        let message = format!("Container {} failed {probe} probe, will be restarted", container.name);
        self.event(false, "Killing", message, container);
        grace
    }

    /// Does the hook before the end, then sends the stop signal.
    async fn ask_to_end(&self, container: &AgentContainer, life: &Life, pid: u32) {
        if let Some(action) = &container.lifecycle.pre_stop
            && let Err(Unwell(why)) = check::perform(self, life, action, Asker::Hook, HOOK_LIMIT).await
        {
            self.event(true, "FailedPreStopHook", format!("PreStopHook failed: {why}"), container);
        }
        self.ender().signal(pid, signal::number(&container.stop_signal));
    }
}

/// The end of a container whose program never ran; 128 as the kubelet has it.
pub fn not_started(reason: &str, message: String) -> Termination {
    let (reason, finished_at) = (reason.to_owned(), Timestamp::now());
    Termination { exit_code: 128, signal: None, reason, message, started_at: None, finished_at }
}
