//! A fake class: agents in memory that run no process. A container "runs" its last argument, a list of `;`-separated words
//! of which it understands `echo TEXT`, `sleep` (until it is stopped) and `exit N`. It limits and isolates nothing.

use std::collections::HashMap;
use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use jiff::Timestamp;
use joey_api::agent::{AgentConfig, AgentContainerState, AgentState, VERSION, VolumeUpdated};
use joey_api::frame::{STATUS, STDOUT, encode};
use joey_api::instance::{ContainerState, ExecRequest, Termination, Usage};
use joey_model::{ErrorKind, Fault, InstanceId};
use joey_rpc::{Body, Client, empty_answer, fault_answer, json_answer, lines_answer, parse_query, stream_answer};
use tokio::sync::watch;

use crate::{CreateRequest, Sandbox, SandboxClass, SandboxError};

/// The class; sandboxes live as long as it does, so dropping a handle and adopting again works.
pub fn fake() -> Arc<dyn SandboxClass> {
    Arc::new(Fake::default())
}

#[derive(Default)]
struct Fake {
    sandboxes: Mutex<HashMap<InstanceId, Arc<FakeSandbox>>>,
}

struct FakeSandbox {
    client: Client,
    agent: FakeAgent,
}

#[derive(Clone)]
struct FakeAgent {
    state: Arc<watch::Sender<AgentState>>,
    logs: Arc<HashMap<String, String>>,
    gone: Arc<watch::Sender<bool>>,
}

#[async_trait]
impl SandboxClass for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    async fn create(&self, request: CreateRequest) -> Result<Arc<dyn Sandbox>, SandboxError> {
        let agent = FakeAgent::start(&request.config);
        let served = agent.clone();
        let service = tower::service_fn(move |request| {
            let agent = served.clone();
            async move { Ok::<_, Infallible>(agent.answer(request)) }
        });
        let client = Client::in_process(format!("fake agent of {}", request.instance), service);
        let sandbox = Arc::new(FakeSandbox { client, agent });
        self.sandboxes().insert(request.instance, sandbox.clone());
        Ok(sandbox)
    }

    async fn adopt(&self, instance: &InstanceId, _dir: &Path) -> Result<Option<Arc<dyn Sandbox>>, SandboxError> {
        let found = self.sandboxes().get(instance).cloned();
        Ok(found.filter(|sandbox| !*sandbox.agent.gone.borrow()).map(|sandbox| sandbox as Arc<dyn Sandbox>))
    }

    async fn destroy(&self, instance: &InstanceId, _dir: &Path) -> Result<(), SandboxError> {
        if let Some(sandbox) = self.sandboxes().remove(instance) {
            sandbox.agent.gone.send_replace(true);
        }
        Ok(())
    }
}

impl Fake {
    fn sandboxes(&self) -> MutexGuard<'_, HashMap<InstanceId, Arc<FakeSandbox>>> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Sandbox for FakeSandbox {
    fn agent(&self) -> &Client {
        &self.client
    }

    async fn exited(&self) {
        let _ = self.agent.gone.subscribe().wait_for(|gone| *gone).await;
    }
}

impl FakeAgent {
    fn start(config: &AgentConfig) -> Self {
        let mut logs = HashMap::new();
        let mut containers = Vec::new();
        for container in &config.containers {
            let (log, exit) = run(container.args.last().map_or("", String::as_str));
            logs.insert(container.name.clone(), log);
            let now = Timestamp::now();
            let state = match exit {
                None => ContainerState::Running { started_at: now, pid: 1 },
                Some(code) => ContainerState::Terminated(ended(code, None)),
            };
            containers.push(AgentContainerState {
                name: container.name.clone(),
                state,
                last_termination: None,
                restart_count: 0,
                running_since: exit.is_none().then_some(now),
                started: exit.is_none(),
                ready: exit.is_none(),
                image_id: container.image_id.clone(),
                image: container.image.clone(),
                resources: container.resources,
            });
        }
        let state = AgentState {
            version: VERSION,
            sequence: 1,
            containers,
            events: Vec::new(),
            stopping: false,
            deadline: config.deadline,
            failed: None,
        };
        Self {
            state: Arc::new(watch::Sender::new(state)),
            logs: Arc::new(logs),
            gone: Arc::new(watch::Sender::new(false)),
        }
    }

    fn answer(&self, request: Request<Incoming>) -> http::Response<Body> {
        let path = request.uri().path().to_owned();
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        match (request.method(), parts.as_slice()) {
            (&Method::GET, ["v1", "state"]) => json_answer(&*self.state.borrow()),
            (&Method::GET, ["v1", "watch"]) => lines_answer(futures::stream::unfold(
                (self.state.subscribe(), true),
                |(mut states, first)| async move {
                    if !first && states.changed().await.is_err() {
                        return None;
                    }
                    let state = states.borrow_and_update().clone();
                    Some((state, (states, false)))
                },
            )),
            (&Method::GET, ["v1", "usage"]) => json_answer(&Usage::default()),
            (&Method::POST, ["v1", "stop"]) => {
                self.stop();
                empty_answer(StatusCode::ACCEPTED)
            }
            (&Method::POST, ["v1", "shutdown"]) => {
                self.stop();
                self.gone.send_replace(true);
                empty_answer(StatusCode::ACCEPTED)
            }
            (&Method::PUT, ["v1", "volumes", _]) => json_answer(&VolumeUpdated { changed: false }),
            (_, ["v1", "containers", name, verb]) => self.container(name, verb, request.uri().query()),
            _ => fault_answer(Fault::new(ErrorKind::NotFound, "NotFound", format!("no such call: {path}"))),
        }
    }

    fn container(&self, name: &str, verb: &str, query: Option<&str>) -> http::Response<Body> {
        let Some(log) = self.logs.get(name) else {
            let message = format!("container \"{name}\" does not exist");
            return fault_answer(Fault::new(ErrorKind::NotFound, "NotFound", message));
        };
        match verb {
            "logs" => stream_answer(futures::stream::iter([Ok(Bytes::from(log.clone()))])),
            "exec" => match parse_query::<ExecRequest>(query.unwrap_or_default()) {
                Ok(exec) => {
                    let (text, code) = run(exec.command.last().map_or("", String::as_str));
                    let mut frames = encode(STDOUT, text.as_bytes());
                    frames.extend(encode(STATUS, format!("{{\"exitCode\":{}}}", code.unwrap_or(0)).as_bytes()));
                    stream_answer(futures::stream::iter([Ok(Bytes::from(frames))]))
                }
                Err(fault) => fault_answer(fault),
            },
            _ => empty_answer(StatusCode::ACCEPTED),
        }
    }

    fn stop(&self) {
        self.state.send_modify(|state| {
            state.sequence += 1;
            state.stopping = true;
            for container in &mut state.containers {
                if matches!(container.state, ContainerState::Running { .. }) {
                    container.state = ContainerState::Terminated(ended(143, Some(15)));
                    container.running_since = None;
                }
            }
        });
    }
}

/// What a script prints, and its exit code unless it sleeps.
fn run(script: &str) -> (String, Option<i32>) {
    let mut log = String::new();
    for statement in script.split(';').map(str::trim) {
        match statement.split_once(' ').unwrap_or((statement, "")) {
            ("echo", text) => {
                log.push_str(text);
                log.push('\n');
            }
            ("sleep", _) => return (log, None),
            ("exit", code) => return (log, Some(code.parse().unwrap_or(2))),
            _ => {}
        }
    }
    (log, Some(0))
}

fn ended(exit_code: i32, signal: Option<i32>) -> Termination {
    Termination {
        exit_code,
        signal,
        reason: if exit_code == 0 { "Completed" } else { "Error" }.to_owned(),
        message: String::new(),
        started_at: Some(Timestamp::now()),
        finished_at: Timestamp::now(),
    }
}
