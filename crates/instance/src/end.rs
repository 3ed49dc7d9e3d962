//! The end of an instance, and the end of a sandbox in whose place another one is made.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use joey_api::agent::AgentState;
use joey_api::instance::{ContainerState, WirePhase};
use joey_model::{ErrorKind, Fault, checkpoint};
use joey_sandbox::{AgentClient, Sandbox};

use crate::life::{Command, Life, Turn};
use crate::persist::last_state;
use crate::{start, status};

/// How long past its grace a stop may take until everything is killed from outside.
const STOP_SLACK: Duration = Duration::from_secs(5);

fn have_ended(state: &AgentState) -> bool {
    state.stopping && !state.containers.iter().any(|one| matches!(one.state, ContainerState::Running { .. }))
}

impl Life {
    /// Ends the instance and everything it owns; tries until that is done.
    pub(crate) async fn end(mut self, grace: u32) {
        self.status.phase = WirePhase::Terminating;
        self.publish();
        if let Some(agent) = self.shared.agent(&self.id) {
            self.stop(&agent, grace).await;
            self.shared.agent_is(&self.id, None);
        }
        let mut pause = Duration::from_secs(1);
        loop {
            match self.remove().await {
                Ok(()) => break,
                Err(fault) => tracing::error!(instance = %self.id, %fault, "instance cannot be removed, trying again"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(30));
        }
        self.shared.gone(&self.id);
    }

    /// Asks the containers to end and waits until they have, at most the grace; a later, shorter grace counts.
    async fn stop(&mut self, agent: &AgentClient, grace: u32) {
        let limit = |grace: u32| tokio::time::Instant::now() + Duration::from_secs(grace.into()) + STOP_SLACK;
        let (mut deadline, mut shortest) = (limit(grace), grace);
        let watching = async {
            agent.stop(grace).await?;
            agent.watch().await
        };
        let Ok(Ok(mut states)) = tokio::time::timeout_at(deadline, watching).await else { return };
        loop {
            tokio::select! {
                state = self.listener.next(&mut states) => match state {
                    Some(Ok(state)) => {
                        let state = self.agent_says(state);
                        if have_ended(&state) {
                            return;
                        }
                    }
                    Some(Err(_)) | None => return,
                },
                Some(command) = self.commands.recv() => if let Command::Delete { grace } = command
                    && grace < shortest
                {
                    (shortest, deadline) = (grace, limit(grace));
                    if !matches!(tokio::time::timeout_at(deadline, agent.stop(grace)).await, Ok(Ok(()))) {
                        return;
                    }
                },
                () = tokio::time::sleep_until(deadline) => return,
            }
        }
    }

    async fn remove(&mut self) -> Result<(), Fault> {
        start::unmake(self).await?;
        let (carrier, id, segments) =
            (self.shared.carrier.clone(), self.id.clone(), self.dir.join(joey_collect::DIRECTORY));
        start::blocking("keep its logs", move || carrier.take_over(id.as_str(), &segments)).await?;
        checkpoint::reached("instance-logs-kept");
        let _recording = self.shared.recording(&self.id).await;
        let dir = self.dir.clone();
        start::blocking("remove its directory", move || match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            result => result,
        })
        .await?;
        checkpoint::reached("instance-forgotten");
        Ok(())
    }

    /// Ends the containers with their grace and takes the sandbox away, in whose place another one is made: that counts as a restart. A
    /// daemon that is killed on the way is followed by one that goes on with it.
    pub(crate) async fn renew(&mut self, sandbox: Option<Arc<dyn Sandbox>>) -> Turn {
        self.record.renewing = true;
        self.keep_record().await;
        checkpoint::reached("instance-renewing");
        self.event(false, "Renewing", "Containers are ended, and the sandbox is made anew".to_owned(), None);
        self.publish();
        if let Some(sandbox) = sandbox
            && let Err(turn) = self.stop_quietly(&*sandbox).await
        {
            return turn;
        }
        self.shared.agent_is(&self.id, None);
        if let Some(state) = last_state(&self.dir) {
            status::apply(&mut self.status, self.id.as_str(), &self.record.spec, &self.record.restarts_before, &state);
        }
        let fault = Fault::new(ErrorKind::Retryable, "Renewing", "the sandbox is made anew");
        if let Err(fault) = start::unmake(self).await {
            tracing::error!(instance = %self.id, %fault, "what a sandbox left cannot be removed");
        }
        for container in &self.status.containers {
            self.record.restarts_before.insert(container.name.clone(), container.restart_count.saturating_add(1));
        }
        self.record.renewing = false;
        self.keep_record().await;
        self.say_waiting(&fault, "ContainerCreating");
        Turn::Again
    }

    /// As [`Life::stop`], of which nobody is told: it is no end of the instance. Unless that is asked for meanwhile.
    async fn stop_quietly(&mut self, sandbox: &dyn Sandbox) -> Result<(), Turn> {
        let agent = AgentClient::new(sandbox.agent().clone());
        let grace = self.record.spec.termination_grace_period_seconds;
        let ended = async {
            agent.stop(grace).await?;
            let mut states = agent.watch().await?;
            while let Some(state) = states.next().await {
                if have_ended(&state?) {
                    break;
                }
            }
            Ok::<_, joey_rpc::RpcError>(())
        };
        let ended = tokio::time::timeout(Duration::from_secs(grace.into()) + STOP_SLACK, ended);
        tokio::pin!(ended);
        loop {
            tokio::select! {
                // Whatever became of it: what is left is killed.
                _ = &mut ended => return Ok(()),
                () = sandbox.exited() => return Ok(()),
                command = self.commands.recv() => match command {
                    Some(Command::Delete { grace }) => return Err(Turn::Delete(grace)),
                    Some(Command::Change) => drop(self.take_in().await),
                    Some(Command::Told(event)) => self.tell_at_once(event),
                    Some(Command::Restart | Command::Renew) => {}
                    None => std::future::pending().await,
                },
            }
        }
    }
}
