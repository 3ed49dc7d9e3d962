//! Brings a sandbox that runs to what its record says: images, limits, debug containers, deadline. What differs is found by
//! comparing the record with what the agent tells, so that an interrupted change goes on after a restart of the daemon.
//!
//! ```text
//! record changed ─┐                     ┌► limits, deadline: told to the agent
//! agent's word  ──┴► compare ─ differs ─┤
//!                        ▲              └► images: pulled and mounted beside, then shown to the agent and told to it
//!                        └── failed: again after 10 s
//! ```

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use joey_api::agent::{AgentContainer, AgentState, Deadline};
use joey_api::instance::{ContainerSpec, InstanceEvent, InstanceSpec, PullPolicy};
use joey_api::lifecycle::Role;
use joey_image::Image;
use joey_model::{ErrorKind, Fault, ImageRef};
use joey_sandbox::{AgentClient, Sandbox};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::engine::Shared;
use crate::life::Life;
use crate::merge::{self, Surroundings};
use crate::start;

/// Pause after a change that could not be made.
const PAUSE: Duration = Duration::from_secs(10);

/// The work on changes of one sandbox. Dropped, it gives up what is under way.
#[derive(Default)]
pub(crate) struct Changes {
    preparing: Option<JoinHandle<Prepared>>,
    not_before: Option<Instant>,
}

impl Drop for Changes {
    fn drop(&mut self) {
        if let Some(preparing) = &self.preparing {
            preparing.abort();
        }
    }
}

/// A container made from its image, and what is needed beside it.
struct Made {
    container: AgentContainer,
    layers: Vec<PathBuf>,
    image: Arc<Image>,
}

/// How the preparation of containers went.
pub(crate) struct Prepared {
    made: Vec<Made>,
    events: Vec<InstanceEvent>,
    failed: bool,
}

impl Changes {
    /// A record that changed is looked at without waiting.
    pub(crate) fn at_once(&mut self) {
        self.not_before = None;
    }

    /// Resolves when there is something to go on with: containers that are prepared, or nothing but the end of a pause.
    pub(crate) async fn next(&mut self) -> Option<Prepared> {
        let pause = self.not_before;
        let preparing = async {
            match self.preparing.as_mut() {
                Some(preparing) => preparing.await,
                None => std::future::pending().await,
            }
        };
        let paused = async {
            match pause {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            prepared = preparing => {
                self.preparing = None;
                if prepared.is_err() {
                    self.not_before = Some(Instant::now() + PAUSE);
                }
                prepared.ok()
            }
            () = paused => {
                self.not_before = None;
                None
            }
        }
    }

    /// Compares, does what can be done at once, and begins what takes time.
    pub(crate) async fn compare(&mut self, life: &mut Life, agent: &AgentClient, state: &AgentState) {
        let waits = self.not_before.is_some_and(|until| until > Instant::now());
        if waits || self.preparing.is_some() || state.stopping {
            return;
        }
        let spec = &life.record.spec;
        let at = spec.active_deadline_seconds.map(|seconds| start::deadline(life.record.accepted_at, seconds));
        let mut failures = Vec::new();
        if at != state.deadline
            && at.is_some()
            && let Err(error) = agent.end_at(Deadline { at }).await
        {
            failures.push((None, format!("Deadline cannot be set: {error}")));
        }
        let mut wanted = Vec::new();
        for container in &spec.containers {
            match state.containers.iter().find(|now| now.name == container.name) {
                // An agent of an earlier version does not tell what it runs and cannot change it.
                Some(now) if now.image.is_empty() => {}
                Some(now) if now.image != container.image => wanted.push(container.clone()),
                Some(now) => {
                    let limits = merge::resources(container);
                    if now.resources != limits
                        && let Err(error) = agent.limit(&container.name, &limits).await
                    {
                        failures.push((Some(container.name.clone()), format!("Resize failed: {error}")));
                    }
                }
                None if container.role == Role::Debug && !life.record.restarts_before.contains_key(&container.name) => {
                    wanted.push(container.clone());
                }
                None => {}
            }
        }
        if !wanted.is_empty() {
            let work = prepare(life.shared.clone(), life.record.spec.clone(), life.status.address, wanted);
            self.preparing = Some(tokio::spawn(work));
        }
        if !failures.is_empty() {
            self.not_before = Some(Instant::now() + PAUSE);
        }
        for (container, message) in failures {
            life.event(true, "ResizeFailed", message, container.as_deref());
            life.publish();
        }
    }

    /// Shows what was prepared to the agent and has it run.
    pub(crate) async fn carry_out(
        &mut self,
        life: &mut Life,
        sandbox: &dyn Sandbox,
        agent: &AgentClient,
        prepared: Prepared,
    ) {
        let Prepared { made, events, mut failed } = prepared;
        life.tell(events);
        for Made { container, layers, image } in made {
            life.shared.image_used(&life.id, image.id.clone());
            let put = async {
                sandbox.provide(layers).await.map_err(Fault::from)?;
                agent.put(&container).await.map_err(Fault::from)
            };
            if let Err(fault) = put.await {
                life.event(true, "Failed", format!("Error: {fault}"), Some(&container.name));
                failed = true;
            }
        }
        if failed {
            self.not_before = Some(Instant::now() + PAUSE);
        }
        life.publish();
    }
}

async fn prepare(
    shared: Arc<Shared>,
    spec: InstanceSpec,
    address: Option<IpAddr>,
    wanted: Vec<ContainerSpec>,
) -> Prepared {
    let mut prepared = Prepared { made: Vec::new(), events: Vec::new(), failed: false };
    let hostname = start::hostname(&spec);
    for container in wanted {
        let mut say = |warning: bool, reason: &str, message: String| {
            prepared.events.push(InstanceEvent {
                at: Timestamp::now(),
                warning,
                reason: reason.to_owned(),
                message,
                container: Some(container.name.clone()),
            });
        };
        let made = async {
            let image = image(&shared, &spec, &container, &mut say).await?;
            let layers = shared.images.mount(&image).await?;
            let named = layers.iter().map(|layer| layer.to_string_lossy().into_owned()).collect();
            let around = Surroundings { hostname: &hostname, address, layers: named };
            Ok::<_, Fault>(Made { container: merge::container(&container, &image, around)?, layers, image })
        };
        match made.await {
            Ok(made) => prepared.made.push(made),
            Err(fault) => {
                say(true, "Failed", format!("Failed to pull image \"{}\": {fault}", container.image));
                prepared.failed = true;
            }
        }
    }
    prepared
}

async fn image(
    shared: &Shared,
    spec: &InstanceSpec,
    container: &ContainerSpec,
    say: &mut (impl FnMut(bool, &str, String) + Send),
) -> Result<Arc<Image>, Fault> {
    let reference = ImageRef::parse(&container.image)
        .map_err(|error| Fault::new(ErrorKind::Invalid, "InvalidImageName", error.to_string()))?;
    let name = &container.image;
    let present = match container.pull_policy {
        PullPolicy::Always => None,
        PullPolicy::IfNotPresent | PullPolicy::Never => shared.images.find(&reference).await,
    };
    match present {
        Some(image) => {
            say(false, "Pulled", format!("Container image \"{name}\" already present on machine"));
            Ok(image)
        }
        None if container.pull_policy == PullPolicy::Never => {
            let message = format!("Container image \"{name}\" is not present with pull policy of Never");
            Err(Fault::new(ErrorKind::NotFound, "ErrImageNeverPull", message))
        }
        None => {
            let image = shared.images.pull(&reference, &spec.credentials, |_| {}).await?;
            say(false, "Pulled", format!("Successfully pulled image \"{name}\""));
            Ok(image)
        }
    }
}
