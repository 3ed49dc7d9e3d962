//! The hooks around a container's start that are ours: one before its main process, one before it counts as ready.
//!
//! ```text
//! Waiting(PreStartHook) ──good──► main process ──► started, probes good ──► preOnline hook ──good──► ready
//!        │ failed, too late                                                  ▲    │ failed, too late: 1 s, 2 s … 60 s
//!        ▼                                                                   └────┘
//! Terminated(PreStartHookError), then as after any other end
//! ```
//!
//! The hook before the start is the first process of the container that will be: the same root, volumes, user, variables and
//! limits. What it leaves running ends with it. What hooks write is in the container's log, marked, while they run.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use joey_api::agent::AgentContainer;
use joey_api::hooks::RUNS;
use joey_api::instance::Termination;
use joey_api::lifecycle::Hook;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::cgroup::Cgroup;
use crate::launch::{self, Failure, Program, Started};
use crate::life::Life;
use crate::output::Sink;
use crate::probe::Health;
use crate::signal;
use crate::supervisor::{Agent, lock, waiting};

const BEFORE_START: &str = "[preStart] ";
const BEFORE_READY: &str = "[preOnline] ";
/// Pauses between attempts of the hook before a container is ready.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How long the streams of a hook that has ended may stay open.
const STREAMS: Duration = Duration::from_millis(500);

/// Why the main process is not started.
pub enum Refused {
    /// Not even the hook could be: it is as if the container could not be made.
    NotMade(Failure),
    Ended {
        end: Termination,
        /// It was ended in order to start it again.
        asked: bool,
    },
}

impl Agent {
    /// Does the hook before the start, if there is one; `upper` holds the container's writable layer.
    pub async fn before_start(
        &self,
        container: &AgentContainer,
        life: &Arc<Life>,
        upper: &Path,
        cgroup: &Cgroup,
    ) -> Result<(), Refused> {
        let Some(hook) = &container.lifecycle.pre_start else { return Ok(()) };
        let message = format!("preStart hook runs, {} s at most; its output is in the log", hook.timeout_seconds);
        self.change(|state| state.containers[life.at].state = waiting(RUNS, message));
        self.event(false, RUNS, format!("Running preStart hook of container {}", container.name), container);
        let program = Program { container, args: &hook.command, stdin: false, tty: false };
        let done = match self.first_process(&program, upper, cgroup).await {
            Ok(started) => {
                self.begin_log(container, life, life.run.load(Ordering::Relaxed));
                self.until_done(container, life, hook, cgroup, started).await
            }
            Err(failure @ (Failure::Config(_) | Failure::Create(_))) => return Err(Refused::NotMade(failure)),
            Err(failure) => Done { code: 128, signal: None, why: failure.message().to_owned(), asked: false },
        };
        if done.code == 0 && done.why.is_empty() {
            // The kernel mounts a layer that must survive nothing but once: its notes of that go.
            let work = upper.join("work");
            let renewed = std::fs::remove_dir_all(&work).and_then(|()| std::fs::create_dir(&work));
            let failed = |error| Refused::NotMade(Failure::Create(format!("cannot prepare the container: {error}")));
            return renewed.map_err(failed);
        }
        let message = format!("preStart hook failed: {}", done.why);
        self.event(true, "FailedPreStartHook", format!("PreStartHook failed: {}", done.why), container);
        let end = Termination {
            exit_code: done.code,
            signal: done.signal,
            reason: "PreStartHookError".to_owned(),
            message,
            started_at: None,
            finished_at: Timestamp::now(),
        };
        Err(Refused::Ended { end, asked: done.asked })
    }

    /// Waits for the end of the hook before the start; too late, or in the way of a stop or a restart, it is ended.
    async fn until_done(
        &self,
        container: &AgentContainer,
        life: &Arc<Life>,
        hook: &Hook,
        cgroup: &Cgroup,
        started: Started,
    ) -> Done {
        let Started { pid, pidfd, streams, inside: _ } = started;
        let sink = Sink { life: life.clone(), log: lock(&life.log).writer(), mark: BEFORE_START };
        let mut carried = tokio::spawn(sink.carry(streams));
        let limit = Instant::now() + Duration::from_secs(hook.timeout_seconds.into());
        let mut end = life.ending();
        let (mut asked, mut why, mut told) = (false, None, false);
        let mut ended = std::pin::pin!(launch::ended(&pidfd, pid));
        let (code, signal) = loop {
            let by = *end.borrow_and_update();
            if by.is_some() && !told {
                (told, why) = (true, Some("the container was ended meanwhile".to_owned()));
                self.ender().signal(pid, signal::number(&container.stop_signal));
            }
            tokio::select! {
                end = &mut ended => break end,
                Ok(()) = end.changed() => continue,
                () = life.restart.notified() => {
                    (asked, why) = (true, Some("the container was restarted meanwhile".to_owned()));
                }
                () = tokio::time::sleep_until(by.map_or(limit, |by| by.min(limit))) => {
                    why.get_or_insert_with(|| format!("it did not end within {} s", hook.timeout_seconds));
                }
            }
            // All that it started goes with it.
            self.ender().signal(pid, libc::SIGKILL);
            break ended.await;
        };
        if (container.target.is_some() || self.shared.is_some()) && self.apart.is_none() {
            // No namespace ends with it, and what it left running holds its streams open.
            cgroup.end_all().await;
        }
        if tokio::time::timeout(STREAMS, &mut carried).await.is_err() {
            carried.abort();
        }
        let why = why.unwrap_or_else(|| if code == 0 { String::new() } else { exited(code) });
        Done { code, signal, why, asked }
    }

    /// Does the hook before the container counts as ready, when it is healthy, until it was good.
    pub async fn before_ready(&self, container: &AgentContainer, life: &Arc<Life>, health: &watch::Sender<Health>) {
        let Some(hook) = &container.lifecycle.pre_online else { return };
        let mut pause = PAUSE.0;
        for attempt in 1u32.. {
            let _ = health.subscribe().wait_for(|health| health.started && health.ready).await;
            if attempt == 1 {
                let message = format!("Running preOnline hook of container {}", container.name);
                self.event(false, "PreOnlineHook", message, container);
            }
            let Err(why) = self.once_before_ready(container, life, hook).await else { break };
            let message = format!("PreOnlineHook failed: {why}; it is tried again in {} s", pause.as_secs());
            self.event(true, "FailedPreOnlineHook", message, container);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
        health.send_modify(|health| health.online = true);
        let message = format!("preOnline hook of container {} succeeded", container.name);
        self.event(false, "PreOnlineHook", message, container);
    }

    async fn once_before_ready(&self, container: &AgentContainer, life: &Arc<Life>, hook: &Hook) -> Result<(), String> {
        let program = Program { container, args: &hook.command, stdin: false, tty: false };
        let init = life.running().ok_or_else(|| "the container is not running".to_owned())?;
        let limit = Duration::from_secs(hook.timeout_seconds.into());
        let by = Instant::now() + limit;
        let late = || format!("it did not end within {} s", limit.as_secs());
        let started = tokio::time::timeout_at(by, self.further(&program, init)).await;
        let started = started.map_err(|_| late())?.map_err(|failure| failure.message().to_owned())?;
        let sink = Sink { life: life.clone(), log: lock(&life.log).writer(), mark: BEFORE_READY };
        // A task of its own: also when nobody waits any more, the process is ended in time and reaped.
        let ender = self.ender();
        let done = tokio::spawn(async move {
            let Started { pid, pidfd, streams, inside: _ } = started;
            let mut carried = tokio::spawn(sink.carry(streams));
            let in_time = tokio::time::timeout_at(by, launch::ended(&pidfd, pid)).await;
            if in_time.is_err() {
                ender.kill_command(pid);
                launch::ended(&pidfd, pid).await;
            }
            if tokio::time::timeout(STREAMS, &mut carried).await.is_err() {
                carried.abort();
            }
            in_time.ok()
        });
        match done.await.map_err(|error| error.to_string())? {
            Some((0, _)) => Ok(()),
            Some((code, _)) => Err(exited(code)),
            None => Err(late()),
        }
    }
}

/// How the hook before the start ended.
struct Done {
    code: i32,
    signal: Option<i32>,
    /// Empty: it was good.
    why: String,
    asked: bool,
}

fn exited(code: i32) -> String {
    format!("it exited with {code}; what it wrote is in the log")
}
