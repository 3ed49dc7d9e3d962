//! Drives one instance from its record to its end. One task owns the transitions.
//!
//! ```text
//! record ──► pull ──► make ──► watch the agent ──────────────┐
//!             │ ▲      │ ▲          │ agent lost             │ delete
//!             ▼ │      ▼ │          ▼                        ▼
//!          wait (10 s … 300 s)   policy restarts: unmake, make   stop (grace) ──► unmake ──► record removed ──► gone
//!                                else: Failed, AgentLost
//! ```
//!
//! A deletion is heard in every waiting state; steps of making are short and run to their end first.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use joey_api::agent::{AgentConfig, AgentState};
use joey_api::instance::{InstanceEvent, InstanceSpec, InstanceStatus, VolumeSource, WirePhase};
use joey_model::{Digest, ErrorKind, Fault, ImageRef, InstanceId};
use joey_sandbox::{AgentClient, Sandbox};
use tokio::sync::mpsc;

use crate::change::Changes;
use crate::engine::Shared;
use crate::persist::{Record, had_sandbox, last_state, read_json};
use crate::told::Listener;
use crate::{held, pull, start, status};

/// Pauses between attempts, as the kubelet's for images.
const PAUSE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));
/// After so long a sandbox counts as steady: that its agent is lost then is no failure of its making.
const STEADY: Duration = Duration::from_secs(60);
/// Between two attempts to hear an agent, also one that always breaks off.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// How long until an agent that could not be brought to its record is tried again.
const BRING_AGAIN: Duration = Duration::from_secs(1);
/// Events of the host that are kept.
const EVENTS: usize = 32;

/// What an instance is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// The end, after so many seconds at most; durable already.
    Delete {
        grace: u32,
    },
    /// Its record says something else now.
    Change,
    Restart,
    /// Its sandbox is made anew, of what sandboxes are made of now.
    Renew,
    /// Something happened to its logs.
    Told(InstanceEvent),
}

/// One instance.
pub(crate) struct Life {
    pub(crate) id: InstanceId,
    pub(crate) dir: PathBuf,
    pub(crate) record: Record,
    pub(crate) shared: Arc<Shared>,
    pub(crate) status: InstanceStatus,
    pub(crate) commands: mpsc::UnboundedReceiver<Command>,
    events: Vec<InstanceEvent>,
    agent_events: Vec<InstanceEvent>,
    pub(crate) listener: Listener,
    began: Instant,
    /// Agents that were lost one after another, each soon after its sandbox was made.
    losses: u32,
    /// The agent may not know yet what the record says.
    behind: bool,
    /// Why containers wait for what they are made from, by name.
    pub(crate) held: BTreeMap<String, Fault>,
}

/// Why watching or waiting ended.
pub(crate) enum Turn {
    Delete(u32),
    AgentLost,
    Renew,
    /// Try again.
    Again,
}

impl Life {
    pub(crate) fn new(
        id: InstanceId,
        record: Record,
        shared: Arc<Shared>,
        commands: mpsc::UnboundedReceiver<Command>,
    ) -> Self {
        let status = status::waiting(&record, &shared.config.host_name, "ContainerCreating", "");
        let dir = shared.dir(&id);
        let held = held::asked(&record.spec);
        Self {
            id,
            dir,
            record,
            shared,
            status,
            commands,
            events: Vec::new(),
            agent_events: Vec::new(),
            listener: Listener::new(),
            began: Instant::now(),
            losses: 0,
            behind: false,
            held,
        }
    }

    /// Lives from the record on; `adopted` is the sandbox that an earlier daemon made.
    pub(crate) async fn run(mut self, adopted: Option<Arc<dyn Sandbox>>) {
        if let Some(sandbox) = &adopted {
            self.remember().await;
            self.status.guest = sandbox.guest();
            // The daemon before this one may have ended between its record and its agent.
            self.behind = true;
        } else if self.record.renewing {
            self.remember().await;
        } else if self.record.deleting.is_none() && (self.record.lost || had_sandbox(&self.dir)) {
            // Its agent ended while no daemon looked: as if it were lost now.
            self.remember().await;
            if let Some(grace) = self.agent_lost().await {
                return self.end(grace).await;
            }
        }
        let mut sandbox = adopted;
        let grace = loop {
            if let Some(grace) = self.record.deleting {
                break grace;
            }
            let turn = match sandbox.take() {
                half_ended if self.record.renewing => self.renew(half_ended).await,
                Some(sandbox) => match self.watch(&*sandbox).await {
                    Turn::Renew => self.renew(Some(sandbox)).await,
                    turn => turn,
                },
                None => match self.make().await {
                    Ok(made) => {
                        sandbox = Some(made);
                        Turn::Again
                    }
                    Err(turn) => turn,
                },
            };
            match turn {
                Turn::Delete(grace) => break grace,
                Turn::AgentLost => {
                    if let Some(grace) = self.agent_lost().await {
                        break grace;
                    }
                }
                Turn::Again | Turn::Renew => {}
            }
        };
        self.end(grace).await;
    }

    /// What an adopted sandbox was made from: its address, and the images as its configuration names them.
    async fn remember(&mut self) {
        self.shared.carry_logs(&self.id);
        self.status.address = self.shared.network.find(&self.id).map(|attachment| attachment.address);
        if let Some(config) = read_json::<AgentConfig>(&self.dir.join("agent.json")) {
            for made in config.containers {
                if let Some(status) = self.status.containers.iter_mut().find(|status| status.name == made.name) {
                    status.image_id = made.image_id;
                }
            }
        }
        let mut used = Vec::new();
        for image in pull::images_of(&self.record.spec) {
            if let Ok(reference) = ImageRef::parse(image) {
                used.extend(self.shared.images.find(&reference).await.map(|image| image.id.clone()));
            }
        }
        self.use_images(used);
    }

    /// Pulls and makes, with growing pauses after failures.
    async fn make(&mut self) -> Result<Arc<dyn Sandbox>, Turn> {
        let mut pause = PAUSE.0;
        loop {
            // What took how long is told of the attempt that succeeds.
            self.began = Instant::now();
            self.status.timings.clear();
            self.publish();
            let failed = match self.pull().await? {
                Ok(images) => {
                    self.status.phase = WirePhase::Starting;
                    match start::make(self, images).await {
                        Ok(sandbox) => return Ok(sandbox),
                        Err(fault) => fault,
                    }
                }
                Err(fault) => fault,
            };
            self.say_waiting(&failed, &failed.reason);
            self.wait(pause, &failed, held::backing_off(&failed.reason)).await?;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// Gets the images; a deletion meanwhile gives the pull up, and what is asked for anew is pulled anew.
    async fn pull(&mut self) -> Result<Result<pull::Images, Fault>, Turn> {
        // The commands are taken out, so that both can be waited for at once.
        let (_, closed) = mpsc::unbounded_channel();
        let mut commands = std::mem::replace(&mut self.commands, closed);
        let turn = loop {
            let mut changed = false;
            let pulled = {
                let pulling = pull::images(self);
                tokio::pin!(pulling);
                loop {
                    tokio::select! {
                        done = &mut pulling => break Ok(done),
                        command = commands.recv() => match command {
                            Some(Command::Delete { grace }) => break Err(Turn::Delete(grace)),
                            Some(Command::Change) => changed = true,
                            Some(Command::Restart | Command::Renew | Command::Told(_)) => {}
                            // The engine is gone, and with it this process.
                            None => break Ok((&mut pulling).await),
                        },
                    }
                }
            };
            if !changed || pulled.is_err() {
                break pulled;
            }
            self.take_in().await;
        };
        self.commands = commands;
        turn
    }

    /// Takes over what the record says now; what was there before is given back.
    pub(crate) async fn take_in(&mut self) -> InstanceSpec {
        let dir = self.dir.clone();
        let read = start::blocking("read its record", move || Record::read(&dir)).await;
        self.behind = true;
        match read {
            Ok(Some(record)) => {
                status::take_in(&mut self.status, &record.spec);
                let before = std::mem::replace(&mut self.record.spec, record.spec);
                self.hold_as_asked(&before);
                before
            }
            // Said where it failed; the next change or the next daemon reads it again.
            Ok(None) | Err(_) => self.record.spec.clone(),
        }
    }

    /// Brings the agent to what the record says. What it has already is not touched; one that does not answer is asked once only.
    async fn bring(&mut self, agent: &AgentClient) {
        self.behind = false;
        for volume in &self.record.spec.volumes {
            let VolumeSource::Files(files) = &volume.source else { continue };
            let Err(error) = agent.renew_volume(&volume.name, files.clone()).await else { continue };
            tracing::warn!(instance = %self.id, volume = volume.name, %error, "contents could not be renewed");
            // An agent that says no says so again.
            self.behind |= !matches!(error.kind(), ErrorKind::Invalid | ErrorKind::NotFound);
            if error.kind() == ErrorKind::Retryable {
                return;
            }
        }
    }

    /// Waits before the next attempt; a restart cuts the wait short.
    async fn wait(&mut self, pause: Duration, fault: &Fault, reason: &str) -> Result<(), Turn> {
        // The first words stay for a moment so that watchers see the cause, then the waiting is named.
        let (cause, total) = (Duration::from_secs(1), tokio::time::Instant::now() + pause);
        for (until, named) in [(tokio::time::Instant::now() + cause, false), (total, true)] {
            if named && reason != fault.reason {
                self.tell_back_off();
                self.say_waiting(fault, reason);
            }
            loop {
                tokio::select! {
                    () = tokio::time::sleep_until(until) => break,
                    command = self.commands.recv() => match command {
                        Some(Command::Delete { grace }) => return Err(Turn::Delete(grace)),
                        Some(Command::Change) => {
                            let before = self.take_in().await;
                            if before.containers != self.record.spec.containers {
                                return Ok(());
                            }
                        }
                        Some(Command::Restart | Command::Renew) => return Ok(()),
                        Some(Command::Told(event)) => self.tell_at_once(event),
                        None => std::future::pending().await,
                    },
                }
            }
        }
        Ok(())
    }

    /// Follows the agent until it is lost or the end is asked for.
    async fn watch(&mut self, sandbox: &dyn Sandbox) -> Turn {
        let agent = AgentClient::new(sandbox.agent().clone());
        self.shared.agent_is(&self.id, Some(agent.clone()));
        let turn = self.follow(sandbox, &agent).await;
        if matches!(turn, Turn::AgentLost) {
            self.shared.agent_is(&self.id, None);
        }
        turn
    }

    async fn follow(&mut self, sandbox: &dyn Sandbox, agent: &AgentClient) -> Turn {
        loop {
            let mut states = match agent.watch().await {
                Ok(states) => states,
                Err(error) => {
                    tracing::debug!(instance = %self.id, %error, "agent cannot be watched");
                    // Either it is gone, which `exited` says, or it is busy.
                    tokio::select! {
                        () = sandbox.exited() => return Turn::AgentLost,
                        () = tokio::time::sleep(ASK_AGAIN) => continue,
                    }
                }
            };
            if self.behind {
                self.bring(agent).await;
            }
            let mut changes = Changes::default();
            if self.holds_in_vain() {
                changes.put_off();
            }
            let mut told = None;
            loop {
                tokio::select! {
                    state = self.listener.next(&mut states) => match state {
                        Some(Ok(state)) => {
                            let state = self.agent_says(state);
                            changes.compare(self, agent, &state).await;
                            told = Some(state);
                        }
                        Some(Err(_)) | None => tokio::select! {
                            () = sandbox.exited() => return Turn::AgentLost,
                            () = tokio::time::sleep(ASK_AGAIN) => break,
                        },
                    },
                    prepared = changes.next() => {
                        if let Some(prepared) = prepared {
                            changes.carry_out(self, sandbox, agent, prepared).await;
                        } else if let Some(state) = &told {
                            changes.compare(self, agent, state).await;
                        }
                    }
                    command = self.commands.recv() => match command {
                        Some(Command::Delete { grace }) => return Turn::Delete(grace),
                        Some(Command::Change) => {
                            let before = self.take_in().await;
                            self.bring(agent).await;
                            // What volumes hold is no reason to try again what failed.
                            let spec = &self.record.spec;
                            let of_volumes = before.containers == spec.containers
                                && before.active_deadline_seconds == spec.active_deadline_seconds;
                            if !of_volumes {
                                changes.at_once();
                            }
                            if let Some(state) = &told {
                                changes.compare(self, agent, state).await;
                            }
                        }
                        Some(Command::Restart) => {
                            self.restart(agent).await;
                            changes.at_once();
                            if let Some(state) = &told {
                                changes.compare(self, agent, state).await;
                            }
                        }
                        Some(Command::Renew) => return Turn::Renew,
                        Some(Command::Told(event)) => self.tell_at_once(event),
                        None => std::future::pending().await,
                    },
                    () = tokio::time::sleep(BRING_AGAIN), if self.behind => self.bring(agent).await,
                    () = sandbox.exited() => return Turn::AgentLost,
                }
            }
        }
    }

    async fn restart(&mut self, agent: &AgentClient) {
        for container in &self.record.spec.containers {
            if let Err(error) = agent.restart(&container.name).await {
                tracing::warn!(instance = %self.id, container = container.name, %error, "restart was refused");
                if error.kind() == ErrorKind::Retryable {
                    return;
                }
            }
        }
    }

    pub(crate) fn agent_says(&mut self, state: AgentState) -> AgentState {
        let state = self.listener.hear(state);
        status::apply(&mut self.status, self.id.as_str(), &self.record.spec, &self.record.restarts_before, &state);
        self.let_go_of_those_told(&state);
        self.show_held();
        if self.status.phase == WirePhase::Running && !self.status.timings.contains_key("running") {
            self.mark("running");
        }
        self.agent_events.clone_from(&state.events);
        if !status::is_being_started(&self.status) || !self.agent_events.is_empty() {
            self.publish();
        }
        state
    }

    /// The agent is gone, and with it its containers. Says the grace when the end was asked for.
    async fn agent_lost(&mut self) -> Option<u32> {
        let last = last_state(&self.dir);
        if let Some(state) = &last {
            status::apply(&mut self.status, self.id.as_str(), &self.record.spec, &self.record.restarts_before, state);
        }
        if status::is_final(self.status.phase) {
            // It had nothing left to do; what it did stays told.
            self.publish();
            return self.until_deleted().await;
        }
        let class = self.shared.class(&self.record.spec.class).ok();
        let fault = status::fault_of(&self.id, class.and_then(|class| class.loss(&self.id, &self.dir)));
        self.event(true, &fault.reason, fault.message.clone(), None);
        let policy: joey_model::RestartPolicy = self.record.spec.restart_policy.into();
        let again = policy.restarts(137);
        if !again && !self.record.lost {
            // Before what it was made from goes: nobody makes it again.
            self.record.lost = true;
            self.keep_record().await;
        }
        if let Err(fault) = start::unmake(self).await {
            tracing::error!(instance = %self.id, %fault, "what a lost agent left cannot be removed");
        }
        status::lost(&mut self.status, &fault);
        if !again {
            self.publish();
            let grace = self.until_deleted().await;
            if grace.is_some() {
                return grace;
            }
            self.record.lost = false;
        }
        for container in &self.status.containers {
            self.record.restarts_before.insert(container.name.clone(), container.restart_count.saturating_add(1));
        }
        self.keep_record().await;
        if !again {
            return None;
        }
        self.losses = if self.began.elapsed() < STEADY { self.losses + 1 } else { 0 };
        if self.losses <= 1 {
            self.say_waiting(&fault, "ContainerCreating");
            return None;
        }
        // 1 s, 2 s, 4 s …: what is lost whenever it is made does not keep the host busy.
        let pause = Duration::from_secs(1 << (self.losses - 2).min(9)).min(PAUSE.1);
        self.say_waiting(&fault, &fault.reason);
        match self.wait(pause, &fault, &fault.reason).await {
            Err(Turn::Delete(grace)) => Some(grace),
            _ => None,
        }
    }

    pub(crate) async fn keep_record(&mut self) {
        if let Err(fault) = self.write_record().await {
            tracing::error!(instance = %self.id, %fault, "how often and why it was lost cannot be kept");
        }
    }

    async fn until_deleted(&mut self) -> Option<u32> {
        loop {
            match self.commands.recv().await {
                Some(Command::Delete { grace }) => return Some(grace),
                Some(Command::Change) => drop(self.take_in().await),
                Some(Command::Restart | Command::Renew) => return None,
                Some(Command::Told(event)) => self.tell_at_once(event),
                None => std::future::pending().await,
            }
        }
    }

    async fn write_record(&self) -> Result<(), Fault> {
        let _recording = self.shared.recording(&self.id).await;
        let (dir, mut record) = (self.dir.clone(), self.record.clone());
        start::blocking("write its record", move || {
            // What was asked for meanwhile stays asked for.
            if let Some(kept) = Record::read(&dir)? {
                record.deleting = kept.deleting.or(record.deleting);
                record.spec = kept.spec;
            }
            record.write(&dir)
        })
        .await
    }

    /// Notes how long after acceptance a phase of the start ended.
    pub(crate) fn mark(&mut self, phase: &str) {
        let micros = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.status.timings.insert(phase.to_owned(), micros);
    }

    pub(crate) fn event(&mut self, warning: bool, reason: &str, message: String, container: Option<&str>) {
        self.events.push(InstanceEvent {
            at: Timestamp::now(),
            warning,
            reason: reason.to_owned(),
            message,
            container: container.map(str::to_owned),
        });
        let surplus = self.events.len().saturating_sub(EVENTS);
        self.events.drain(..surplus);
    }

    /// Takes over what happened while something was prepared.
    pub(crate) fn tell(&mut self, events: Vec<InstanceEvent>) {
        self.events.extend(events);
        let surplus = self.events.len().saturating_sub(EVENTS);
        self.events.drain(..surplus);
    }

    pub(crate) fn tell_at_once(&mut self, event: InstanceEvent) {
        self.tell(vec![event]);
        self.publish();
    }

    pub(crate) fn use_images(&self, ids: Vec<Digest>) {
        self.shared.images_are(&self.id, ids);
    }

    /// Shows the status to everybody who watches.
    pub(crate) fn publish(&mut self) {
        self.status.events = status::events(&self.events, &self.agent_events);
        self.shared.publish(&self.id, &self.status);
    }
}
