//! What a container waits for between two attempts to run it. Each wait is over when it is asked to run again, and at its end.

use std::time::Duration;

use joey_api::agent::AgentContainer;
use joey_api::instance::{ContainerState, Termination};

use crate::life::{Life, not_started};
use crate::supervisor::{Agent, waiting};

/// Until a container that could not be made is tried again.
const PAUSE: Duration = Duration::from_secs(10);

impl Agent {
    /// False: it is to end meanwhile.
    pub async fn back_off(&self, container: &AgentContainer, life: &Life, delay: Duration) -> bool {
        self.event(true, "BackOff", format!("Back-off restarting failed container {}", container.name), container);
        again(life, Some(delay)).await
    }

    /// A container that could not be made is no run of it: it waits and is tried again, whatever the restart policy says, as
    /// under the kubelet. False: it is to end.
    pub async fn wait_to_retry(&self, life: &Life, reason: &str, message: String) -> bool {
        self.change(|state| state.containers[life.at].state = waiting(reason, message.clone()));
        let again = again(life, Some(PAUSE)).await;
        if !again {
            let end = not_started(reason, message);
            self.change(|state| state.containers[life.at].state = ContainerState::Terminated(end));
        }
        again
    }

    /// Nobody knows yet what it runs. False: it is to end.
    pub async fn wait_to_be_put(&self, life: &Life) -> bool {
        self.change(|state| state.containers[life.at].state = waiting("ContainerCreating", String::new()));
        let again = again(life, None).await;
        if !again {
            // The kubelet's words for a container that there never was.
            let message = "The container could not be located when the pod was terminated".to_owned();
            let end = Termination { exit_code: 137, ..not_started("ContainerStatusUnknown", message) };
            self.change(|state| state.containers[life.at].state = ContainerState::Terminated(end));
        }
        again
    }
}

async fn again(life: &Life, delay: Option<Duration>) -> bool {
    let mut ending = life.ending();
    tokio::select! {
        () = tokio::time::sleep(delay.unwrap_or_default()), if delay.is_some() => true,
        () = life.restart.notified() => true,
        _ = ending.wait_for(Option::is_some) => false,
    }
}
