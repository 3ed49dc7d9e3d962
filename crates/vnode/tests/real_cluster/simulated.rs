//! A simulated provider: instances are entries of a map that become ready at once; exec and attach run programs of the machine
//! the test runs on, with nothing around them. Enough to see what the virtual node makes of it.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use jiff::Timestamp;
use joey_api::change::InstanceChange;
use joey_api::frame::{self, ExecStatus};
use joey_api::instance::{
    ContainerState, ContainerStatus, ExecRequest, Instance, InstanceSpec, InstanceStatus, LogOptions, Termination,
    Usage, WatchEvent, WirePhase,
};
use joey_model::{ErrorKind, Fault};
use joey_vnode::provider::Frames;
use joey_vnode::{ByteStream, Capacity, InstanceEvents, Provider};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::sync::{broadcast, mpsc};

/// What every container has logged.
const LOG: [&str; 3] = ["first", "second", "third"];
/// A container with this argument goes on after SIGTERM.
pub const STUBBORN: &str = "--stubborn";

#[derive(Default)]
struct State {
    instances: BTreeMap<String, Instance>,
    revision: u64,
    /// Every specification that was taken, in order.
    specs: Vec<InstanceSpec>,
    /// Name and grace of each end that was asked for.
    ends: Vec<(String, Option<u32>)>,
}

/// Cheap to clone; clones are the same.
#[derive(Clone)]
pub struct Simulated {
    state: Arc<Mutex<State>>,
    changes: broadcast::Sender<WatchEvent>,
}

impl Simulated {
    pub fn new() -> Self {
        Self { state: Arc::default(), changes: broadcast::channel(1024).0 }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panics while it holds the state")
    }

    /// The newest specification of that name.
    /// The specification of the instance of that name as it is now, or as the last one was made.
    pub fn spec(&self, name: &str) -> Option<InstanceSpec> {
        let state = self.lock();
        let present = state.instances.values().map(|instance| &instance.spec).find(|spec| spec.name == name);
        present.or_else(|| state.specs.iter().rev().find(|spec| spec.name == name)).cloned()
    }

    /// How often an instance of that name was made.
    pub fn made(&self, name: &str) -> usize {
        self.lock().specs.iter().filter(|spec| spec.name == name).count()
    }

    pub fn graces(&self, name: &str) -> Vec<Option<u32>> {
        self.lock().ends.iter().filter(|(ended, _)| ended == name).map(|(_, grace)| *grace).collect()
    }

    pub fn is_there(&self, name: &str) -> bool {
        self.lock().instances.values().any(|instance| instance.spec.name == name)
    }

    /// Ends every container of an instance by itself.
    pub fn exit(&self, name: &str, code: i32) {
        let id = self.lock().instances.values().find(|instance| instance.spec.name == name).map(|i| i.id.clone());
        let phase = if code == 0 { WirePhase::Succeeded } else { WirePhase::Failed };
        self.alter(&id.expect("the instance is there"), |instance| {
            instance.status.phase = phase;
            end_containers(instance, code);
        });
    }

    fn alter(&self, id: &str, change: impl FnOnce(&mut Instance)) {
        let mut state = self.lock();
        state.revision += 1;
        let revision = state.revision;
        if let Some(instance) = state.instances.get_mut(id) {
            change(instance);
            instance.revision = revision;
            let _ = self.changes.send(WatchEvent::Set { instance: Box::new(instance.clone()) });
        }
    }

    fn gone(&self, id: &str) {
        let mut state = self.lock();
        state.revision += 1;
        let revision = state.revision;
        if let Some(instance) = state.instances.remove(id) {
            let _ = self.changes.send(WatchEvent::Gone { id: id.to_owned(), name: instance.spec.name, revision });
        }
    }
}

fn missing(id: &str) -> Fault {
    Fault::new(ErrorKind::NotFound, "NotFound", format!("instance {id} is not there"))
}

/// What is not held runs.
fn running(instance: &mut Instance) {
    let holds = instance.spec.containers.iter().any(|container| container.held.is_some());
    instance.status.phase = if holds { WirePhase::Starting } else { WirePhase::Running };
    instance.status.containers = instance
        .spec
        .containers
        .iter()
        .map(|container| {
            let runs = container.held.is_none();
            let state = match &container.held {
                None => ContainerState::Running { started_at: Timestamp::now(), pid: 1 },
                Some(held) => ContainerState::Waiting { reason: held.reason.clone(), message: held.message.clone() },
            };
            let of_one_that_runs = |id: String| if runs { id } else { String::new() };
            ContainerStatus {
                name: container.name.clone(),
                role: container.role,
                started: runs,
                ready: runs,
                state,
                last_termination: None,
                restart_count: 0,
                image: container.image.clone(),
                image_id: of_one_that_runs(format!("{}@sha256:{}", container.image, "0".repeat(64))),
                container_id: of_one_that_runs(format!("joey://{}/{}/0", instance.id, container.name)),
                resources: None,
            }
        })
        .collect();
}

fn end_containers(instance: &mut Instance, code: i32) {
    for container in &mut instance.status.containers {
        container.state = ContainerState::Terminated(Termination {
            exit_code: code,
            signal: None,
            reason: if code == 0 { "Completed" } else { "Error" }.into(),
            message: String::new(),
            started_at: None,
            finished_at: Timestamp::now(),
        });
    }
}

#[async_trait]
impl Provider for Simulated {
    async fn create(&self, spec: InstanceSpec) -> Result<Instance, Fault> {
        let mut state = self.lock();
        if let Some(known) = state.instances.values().find(|known| known.spec.client_token == spec.client_token) {
            return Ok(known.clone());
        }
        if state.instances.values().any(|known| known.spec.name == spec.name) {
            return Err(Fault::new(ErrorKind::Conflict, "NameTaken", format!("name {} is taken", spec.name)));
        }
        state.revision += 1;
        state.specs.push(spec.clone());
        let id = format!("i-{}", state.specs.len());
        let instance = Instance {
            id: id.clone(),
            spec,
            status: InstanceStatus { address: "10.88.0.9".parse().ok(), ..InstanceStatus::default() },
            created_at: Timestamp::now(),
            deleted_at: None,
            revision: state.revision,
        };
        state.instances.insert(id.clone(), instance.clone());
        let _ = self.changes.send(WatchEvent::Set { instance: Box::new(instance.clone()) });
        drop(state);
        let simulated = self.clone();
        tokio::spawn(async move { simulated.alter(&id, running) });
        Ok(instance)
    }

    async fn change(&self, id: &str, change: &InstanceChange) -> Result<Instance, Fault> {
        let mut applied = Ok(());
        self.alter(id, |instance| {
            applied = change.apply(&mut instance.spec);
            if !change.given.is_empty() {
                running(instance);
            }
        });
        applied?;
        self.get(id).await
    }

    async fn delete(&self, id: &str, grace: Option<u32>) -> Result<(), Fault> {
        let instance = self.get(id).await?;
        self.lock().ends.push((instance.spec.name.clone(), grace));
        let stubborn = instance.spec.containers.iter().any(|c| c.args.iter().any(|argument| argument == STUBBORN));
        self.alter(id, |instance| instance.status.phase = WirePhase::Terminating);
        let (simulated, id) = (self.clone(), id.to_owned());
        tokio::spawn(async move {
            if stubborn {
                tokio::time::sleep(Duration::from_secs(grace.unwrap_or(30).into())).await;
            }
            simulated.alter(&id, |instance| end_containers(instance, if stubborn { 137 } else { 143 }));
            simulated.gone(&id);
        });
        Ok(())
    }

    async fn get(&self, id: &str) -> Result<Instance, Fault> {
        self.lock().instances.get(id).cloned().ok_or_else(|| missing(id))
    }

    async fn list(&self) -> Result<Vec<Instance>, Fault> {
        Ok(self.lock().instances.values().cloned().collect())
    }

    async fn watch(&self, _after: Option<u64>) -> Result<InstanceEvents, Fault> {
        let state = self.lock();
        let changes = self.changes.subscribe();
        let sets = state.instances.values().map(|instance| WatchEvent::Set { instance: Box::new(instance.clone()) });
        let first: Vec<_> = sets.chain([WatchEvent::Synced { revision: state.revision }]).map(Ok).collect();
        let later = futures::stream::unfold(changes, |mut changes| async move {
            changes.recv().await.ok().map(|event| (Ok(event), changes))
        });
        Ok(futures::stream::iter(first).chain(later).boxed())
    }

    async fn logs(&self, _id: &str, _container: &str, options: &LogOptions) -> Result<ByteStream, Fault> {
        let skipped = options.tail.map_or(0, |tail| LOG.len().saturating_sub(tail as usize));
        let lines: Vec<_> = LOG[skipped..].iter().map(|line| Ok(Bytes::from(format!("{line}\n")))).collect();
        Ok(futures::stream::iter(lines).boxed())
    }

    async fn exec(
        &self,
        _id: &str,
        _container: &str,
        request: &ExecRequest,
        input: Frames,
    ) -> Result<ByteStream, Fault> {
        Ok(program(&request.command, request.stdin, input))
    }

    async fn attach(
        &self,
        _id: &str,
        _container: &str,
        request: &ExecRequest,
        input: Frames,
    ) -> Result<ByteStream, Fault> {
        Ok(program(&["cat".to_owned()], request.stdin, input))
    }

    /// Sends back what it is sent.
    async fn forward(&self, id: &str, _port: u16, input: Frames) -> Result<ByteStream, Fault> {
        match self.lock().instances.contains_key(id) {
            true => Ok(input.map(Ok).boxed()),
            false => Err(missing(id)),
        }
    }

    async fn usage(&self, _id: &str) -> Result<Usage, Fault> {
        Ok(Usage::default())
    }

    async fn capacity(&self) -> Result<Capacity, Fault> {
        Ok(Capacity {
            cpu_milli: 4000,
            memory_bytes: 8 << 30,
            pods: 100,
            storage_bytes: 0,
            kernel: "6.1.0-simulated".into(),
            architecture: "amd64".into(),
        })
    }
}

/// Runs a program, standard streams as frames.
fn program(command: &[String], stdin: bool, mut input: Frames) -> ByteStream {
    let (output, frames) = mpsc::channel::<Bytes>(4);
    let started = Command::new(&command[0])
        .args(&command[1..])
        .stdin(if stdin { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    tokio::spawn(async move {
        let status = match started {
            Err(error) => ExecStatus { exit_code: None, message: Some(error.to_string()) },
            Ok(mut child) => {
                let pipe = child.stdin.take();
                let feeder = tokio::spawn(async move {
                    let Some(mut pipe) = pipe else { return };
                    let mut decoder = frame::Decoder::default();
                    while let Some(bytes) = input.next().await {
                        decoder.push(&bytes);
                        while let Ok(Some((channel, payload))) = decoder.next_frame() {
                            match channel {
                                frame::STDIN if pipe.write_all(&payload).await.is_err() => return,
                                frame::CLOSE => return,
                                _ => {}
                            }
                        }
                    }
                });
                let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
                tokio::join!(
                    copy(stdout.expect("stdout is piped"), frame::STDOUT, &output),
                    copy(stderr.expect("stderr is piped"), frame::STDERR, &output),
                );
                let code = child.wait().await.expect("a child ends").code();
                feeder.abort();
                ExecStatus { exit_code: code.or(Some(137)), message: None }
            }
        };
        let status = serde_json::to_vec(&status).expect("a status is JSON");
        let _ = output.send(Bytes::from(frame::encode(frame::STATUS, &status))).await;
    });
    futures::stream::unfold(frames, |mut frames| async move { frames.recv().await.map(|bytes| (Ok(bytes), frames)) })
        .boxed()
}

async fn copy(mut from: impl AsyncRead + Unpin, channel: u8, to: &mpsc::Sender<Bytes>) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(read) = from.read(&mut buffer).await
        && read > 0
    {
        if to.send(Bytes::from(frame::encode(channel, &buffer[..read]))).await.is_err() {
            return;
        }
    }
}
