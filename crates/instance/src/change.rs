//! Brings a sandbox that runs to what its record says: images, limits, debug containers, deadline. What differs is found by
//! comparing the record with what the agent tells, so that an interrupted change goes on after a restart of the daemon.
//!
//! ```text
//! record changed ─┐                     ┌► limits, deadline: told to the agent
//! agent's word  ──┴► compare ─ differs ─┤
//!                        ▲              └► images: pulled and mounted beside, then shown to the agent and told to it
//!                        └── failed: again after 10 s, 20 s … 300 s
//! ```

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use joey_api::agent::{AgentContainer, AgentState, Deadline};
use joey_api::instance::{ContainerSpec, InstanceEvent, InstanceSpec};
use joey_api::lifecycle::Role;
use joey_image::Image;
use joey_model::Fault;
use joey_sandbox::{AgentClient, Layer, Sandbox};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::engine::Shared;
use crate::life::Life;
use crate::merge::{self, Surroundings};
use crate::{logs, persist, pull, start, status};

/// Pauses after a change that could not be made, as the kubelet's for images.
const PAUSE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));
/// How long the cause stays told until it is said that the container waits.
const CAUSE: Duration = Duration::from_secs(1);

/// The work on changes of one sandbox. Dropped, it gives up what is under way.
#[derive(Default)]
pub(crate) struct Changes {
    preparing: Option<JoinHandle<Prepared>>,
    not_before: Option<Instant>,
    /// The pause that follows when the cause has been told, and the last one.
    rest: Option<Duration>,
    pause: Duration,
    /// Something changed while containers were prepared.
    again: bool,
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
    layers: Vec<Layer>,
    image: Arc<Image>,
}

/// A container to be made, and whether it is held until then.
struct Wanted {
    container: ContainerSpec,
    held: bool,
}

/// How the preparation of containers went.
pub(crate) struct Prepared {
    made: Vec<Made>,
    events: Vec<InstanceEvent>,
    /// Why others could not be.
    failed: Vec<(Wanted, Fault)>,
}

impl Changes {
    /// A record that changed is looked at without waiting.
    pub(crate) fn at_once(&mut self) {
        (self.not_before, self.rest, self.pause) = (None, None, Duration::ZERO);
        self.again = self.preparing.is_some();
    }

    /// Tries again what could not be had, later and later.
    pub(crate) fn put_off(&mut self) {
        self.pause = (self.pause * 2).clamp(PAUSE.0, PAUSE.1);
        (self.not_before, self.rest) = (Some(Instant::now() + CAUSE), Some(self.pause));
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
                    self.put_off();
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
        if waits || self.preparing.is_some() || state.stopping || state.failed.is_some() {
            return;
        }
        if let Some(rest) = self.rest.take() {
            self.not_before = Some(Instant::now() + rest);
            life.back_off();
            return life.publish();
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
        // One that has ended as a whole runs nothing more by itself.
        let over = status::is_final(life.status.phase);
        let concerned = |one: &&ContainerSpec| one.held.is_none() && (!over || one.role == Role::Debug);
        for container in spec.containers.iter().filter(concerned) {
            let want = |held| Wanted { container: container.clone(), held };
            match state.containers.iter().find(|now| now.name == container.name) {
                Some(now) if now.image != container.image => wanted.push(want(now.image.is_empty())),
                Some(now) => {
                    let limits = merge::resources(container);
                    // One that does not answer is not asked for each of them in turn.
                    if now.resources != limits
                        && failures.is_empty()
                        && let Err(error) = agent.limit(&container.name, &limits).await
                    {
                        failures.push((Some(container.name.clone()), format!("Resize failed: {error}")));
                    }
                }
                None if container.role == Role::Debug && !life.record.restarts_before.contains_key(&container.name) => {
                    wanted.push(want(true));
                }
                None => {}
            }
        }
        if !wanted.is_empty() {
            let work = prepare(life.shared.clone(), life.record.spec.clone(), life.status.address, wanted);
            self.preparing = Some(tokio::spawn(work));
        }
        if !failures.is_empty() {
            self.put_off();
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
        let Prepared { made, events, failed } = prepared;
        life.tell(events);
        let mut all = failed.is_empty();
        for (wanted, fault) in failed.into_iter().filter(|(wanted, _)| wanted.held) {
            // Of one that was changed meanwhile it says nothing.
            if life.record.spec.containers.contains(&wanted.container) {
                life.hold(&wanted.container.name, fault);
            }
        }
        for Made { mut container, layers, image } in made {
            life.shared.image_used(&life.id, image.id.clone());
            let put = async {
                // Its variables say what is collected of it, and were not all known before.
                logs::plan(life, life.status.address, std::slice::from_mut(&mut container)).await?;
                sandbox.provide(layers).await.map_err(Fault::from)?;
                agent.put(&container).await.map_err(Fault::from)?;
                life.shared.carry_logs(&life.id);
                let (dir, container) = (life.dir.clone(), container.clone());
                start::blocking("write its configuration", move || persist::put_container(&dir, container)).await
            };
            match put.await {
                Ok(()) => life.let_go(&container.name),
                Err(fault) => {
                    life.event(true, "Failed", format!("Error: {fault}"), Some(&container.name));
                    all = false;
                }
            }
        }
        if std::mem::take(&mut self.again) {
            self.not_before = Some(Instant::now());
        } else if all {
            self.at_once();
            // An agent that took it in says so by then. One that says no such thing does not have it made again and again.
            self.not_before = Some(Instant::now() + CAUSE);
        } else {
            self.put_off();
        }
        life.publish();
    }
}

async fn prepare(shared: Arc<Shared>, spec: InstanceSpec, address: Option<IpAddr>, wanted: Vec<Wanted>) -> Prepared {
    let mut prepared = Prepared { made: Vec::new(), events: Vec::new(), failed: Vec::new() };
    let hostname = start::hostname(&spec);
    for wanted in wanted {
        let container = &wanted.container;
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
            let named = (container.image.as_str(), container.pull_policy);
            let image = pull::image(&shared, &spec.credentials, named, &mut say).await?;
            let layers = start::layers(&shared, &spec.class, &image).await?;
            let around = Surroundings { hostname: &hostname, address, layers: start::named(&layers) };
            Ok::<_, Fault>(Made { container: merge::container(container, &image, around)?, layers, image })
        };
        match made.await {
            Ok(made) => prepared.made.push(made),
            Err(fault) => {
                // That it could not be pulled was said.
                let error = if fault.reason == "ErrImagePull" { &fault.reason } else { &fault.message };
                say(true, "Failed", format!("Error: {error}"));
                prepared.failed.push((wanted, fault));
            }
        }
    }
    prepared
}
