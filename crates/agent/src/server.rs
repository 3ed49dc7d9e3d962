//! The agent protocol's server side (`joey_api::agent`): each call parsed, answered from the supervisor.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use joey_api::frame::{
    CLOSE, Decoder, ExecStatus, MAX_PAYLOAD, RESIZE, STATUS, STDERR, STDIN, STDOUT, TerminalSize, encode,
};
use joey_api::instance::{ContainerState, ContainerUsage, ExecRequest, LogOptions, Usage};
use joey_model::{ErrorKind, Fault};
use joey_rpc::{
    Body, empty_answer, fault_answer, into_stream, json_answer, lines_answer, parse_query, read_json, stream_answer,
};
use serde::Deserialize;
use tokio::sync::{mpsc, watch};

use crate::launch::{self, Program};
use crate::life::Life;
use crate::output::LOG_ENDED;
use crate::stream::Pipe;
use crate::supervisor::{Agent, lock};
use crate::{collect, diagnosis, files, forward, in_place, inside, log_read, sys, volumes};

/// How long the streams of a command that has ended may say nothing until they count as ended.
const QUIET: Duration = Duration::from_millis(250);
/// What a terminal takes for the end of its input (Ctrl-D).
const END_OF_FILE: u8 = 4;

pub type Answers = mpsc::Sender<io::Result<Bytes>>;

/// Answers one call.
pub async fn answer(agent: Arc<Agent>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let volume = request.uri().path().strip_prefix("/v1/volumes/").map(str::to_owned);
    let answered = match volume.filter(|_| request.method() == Method::PUT) {
        Some(name) => volumes::put(&agent, &name, request.into_body()).await,
        None => route(agent, request).await,
    };
    Ok(answered.unwrap_or_else(fault_answer))
}

/// A longer body is no container.
pub const BODY: usize = 4 << 20;

#[derive(Default, Deserialize)]
#[serde(default)]
pub struct PortQuery {
    pub port: u16,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct PathQuery {
    path: String,
}

async fn route(agent: Arc<Agent>, request: Request<Incoming>) -> Result<Response<Body>, Fault> {
    let (path, query) = (request.uri().path().to_owned(), request.uri().query().unwrap_or_default().to_owned());
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    match (request.method(), parts.as_slice()) {
        (&Method::GET, ["v1", "state"]) => Ok(json_answer(&*agent.state.borrow())),
        (&Method::GET, ["v1", "watch"]) => Ok(watched(&agent)),
        (&Method::GET, ["v1", "usage"]) => Ok(json_answer(&usage(&agent))),
        (&Method::POST, ["v1", "stop"]) => {
            let grace = query.split('&').find_map(|pair| pair.strip_prefix("grace=")?.parse().ok());
            let grace: u32 = grace.unwrap_or(agent.config.termination_grace_period_seconds);
            agent.stop(Duration::from_secs(grace.into()));
            Ok(empty_answer(StatusCode::ACCEPTED))
        }
        (&Method::POST, ["v1", "shutdown"]) => {
            agent.shutdown.notify_one();
            Ok(empty_answer(StatusCode::ACCEPTED))
        }
        (&Method::POST, ["v1", "forward"]) => {
            let PortQuery { port } = parse_query(&query)?;
            match agent.inside().await.map_err(cannot_be_reached)? {
                Some(inside) => inside::connect(&inside, port, request.into_body()).await,
                None => forward::forward(port, request.into_body()).await,
            }
        }
        (&Method::GET, ["v1", "collected", stream @ ..]) => collect::answer(&agent, stream, &query),
        (_, ["v1", "capture" | "cores", ..]) => diagnosis::answer(&agent, request).await,
        (&Method::PUT, ["v1", "deadline"]) => {
            in_place::deadline(&agent, read_json(request.into_body(), BODY).await?);
            Ok(empty_answer(StatusCode::NO_CONTENT))
        }
        (&Method::PUT, ["v1", "containers", name]) => {
            let container = read_json(request.into_body(), BODY).await?;
            in_place::put(&agent, name, container)?;
            Ok(empty_answer(StatusCode::ACCEPTED))
        }
        (_, ["v1", "containers", name, verb]) => {
            let life = agent.find(name).ok_or_else(|| {
                Fault::new(ErrorKind::NotFound, "NotFound", format!("container \"{name}\" does not exist"))
            })?;
            match (request.method(), *verb) {
                (&Method::GET | &Method::PUT, "files") => files(agent, life, request, &query).await,
                (&Method::PUT, "resources") => {
                    in_place::limit(&agent, &life, &read_json(request.into_body(), BODY).await?)?;
                    Ok(empty_answer(StatusCode::NO_CONTENT))
                }
                _ => container(agent, &life, verb, request, &query),
            }
        }
        _ => Err(Fault::new(ErrorKind::NotFound, "NotFound", format!("no such call: {path}"))),
    }
}

/// In a task of its own: whoever goes away in the middle leaves nothing half done or unreaped.
async fn files(
    agent: Arc<Agent>,
    life: Arc<Life>,
    request: Request<Incoming>,
    query: &str,
) -> Result<Response<Body>, Fault> {
    let PathQuery { path } = parse_query(query)?;
    let copying = tokio::spawn(async move {
        match *request.method() {
            Method::GET => files::read(&agent, &life, &path).await,
            _ => files::write(&agent, &life, &path, request.into_body()).await,
        }
    });
    let broken = |error| Fault::new(ErrorKind::Internal, "FilesNotCopied", format!("copying broke off: {error}"));
    copying.await.map_err(broken)?
}

fn container(
    agent: Arc<Agent>,
    life: &Arc<Life>,
    verb: &str,
    request: Request<Incoming>,
    query: &str,
) -> Result<Response<Body>, Fault> {
    match (request.method(), verb) {
        (&Method::POST, "restart") => {
            agent.restart(life);
            Ok(empty_answer(StatusCode::ACCEPTED))
        }
        (&Method::GET, "logs") => logs(&agent, life, parse_query(query)?),
        (&Method::POST, "exec") => {
            let exec: ExecRequest = parse_query(query)?;
            if exec.command.is_empty() {
                return Err(Fault::new(ErrorKind::Invalid, "InvalidCommand", "exec needs a command"));
            }
            running(life)?;
            let (to, answer) = answers();
            tokio::spawn(run_exec(agent, life.clone(), exec, request.into_body(), to));
            Ok(answer)
        }
        (&Method::POST, "attach") => {
            let attach: ExecRequest = parse_query(query)?;
            running(life)?;
            let (to, answer) = answers();
            tokio::spawn(run_attach(life.clone(), attach, request.into_body(), to));
            Ok(answer)
        }
        _ => Err(Fault::new(ErrorKind::NotFound, "NotFound", format!("no such call on a container: {verb}"))),
    }
}

fn cannot_be_reached(failure: launch::Failure) -> Fault {
    Fault::new(ErrorKind::Conflict, "SandboxGone", failure.message().to_owned())
}

fn running(life: &Life) -> Result<u32, Fault> {
    match life.pid.load(Ordering::Relaxed) {
        0 => Err(Fault::new(ErrorKind::Conflict, "ContainerNotRunning", "container is not running")),
        pid => Ok(pid),
    }
}

pub fn answers() -> (Answers, Response<Body>) {
    let (to, from) = mpsc::channel(8);
    let stream = futures::stream::unfold(from, |mut from| async move { from.recv().await.map(|item| (item, from)) });
    (to, stream_answer(stream))
}

fn watched(agent: &Agent) -> Response<Body> {
    let watchers = (agent.state.subscribe(), agent.over.subscribe());
    lines_answer(futures::stream::unfold((watchers, true), |((mut states, mut over), first)| async move {
        if !first {
            tokio::select! {
                biased;
                changed = states.changed() => changed.ok()?,
                _ = over.wait_for(|over| *over) => return None,
            }
        }
        let state = states.borrow_and_update().clone();
        Some((state, ((states, over), false)))
    }))
}

fn usage(agent: &Agent) -> Usage {
    let mut usage = Usage {
        cpu_nanoseconds: agent.cgroup.cpu_nanoseconds(),
        memory_working_set_bytes: agent.cgroup.working_set(),
        ..Usage::default()
    };
    for life in agent.lives().iter().filter(|life| life.running().is_some()) {
        let name = life.container().name.clone();
        let cgroup = agent.cgroup_of(&name);
        let (cpu_nanoseconds, memory_working_set_bytes) = (cgroup.cpu_nanoseconds(), cgroup.working_set());
        usage.containers.push(ContainerUsage { name, cpu_nanoseconds, memory_working_set_bytes });
    }
    // /proc/net follows this process's network namespace, which is the Pod's.
    let text = std::fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
    for (name, counts) in text.lines().filter_map(|line| line.split_once(':')) {
        let counts: Vec<u64> = counts.split_whitespace().filter_map(|count| count.parse().ok()).collect();
        if name.trim() != "lo" && counts.len() > 8 {
            usage.received_bytes += counts[0];
            usage.sent_bytes += counts[8];
        }
    }
    usage
}

fn logs(agent: &Agent, life: &Life, options: LogOptions) -> Result<Response<Body>, Fault> {
    let container = life.container().name.clone();
    let waits = matches!(agent.state.borrow().containers[life.at].state, ContainerState::Waiting { .. });
    let log = lock(&life.log);
    let (run, grown) = match options.previous {
        false => (log.run, log.grown.subscribe()),
        true => {
            // Between two runs the one that ended last is the previous one.
            let previous = if waits && log.has_ended() { Some(log.run) } else { log.run.checked_sub(1) };
            let run = previous.ok_or_else(|| {
                let message = format!("container \"{container}\" has no previous run");
                Fault::new(ErrorKind::NotFound, "NotFound", message)
            })?;
            (run, watch::Sender::new(LOG_ENDED).subscribe())
        }
    };
    drop(log);
    let (to, answer) = answers();
    tokio::spawn(log_read::read(log_read::Source { dir: agent.dir.clone(), container, run, grown }, options, to));
    Ok(answer)
}

async fn run_exec(agent: Arc<Agent>, life: Arc<Life>, exec: ExecRequest, body: Incoming, to: Answers) {
    let container = life.container();
    let container = &*container;
    let program = Program { container, args: &exec.command, stdin: exec.stdin, tty: exec.tty };
    let started = match running(&life) {
        Ok(init) => agent.further(&program, init).await,
        Err(fault) => Err(launch::Failure::Start(fault.message)),
    };
    let started = match started {
        Ok(started) => started,
        Err(failure) => {
            let message = Some(failure.message().to_owned());
            return status(&to, ExecStatus { exit_code: failure.exit_code(), message }).await;
        }
    };
    let launch::Started { pid, pidfd, streams, .. } = started;
    let input = streams.stdin.and_then(|fd| Pipe::writer(fd).ok()).map(Arc::new);
    let feeder = tokio::spawn(feed(body, input, streams.terminal));
    let over = watch::Sender::new(false);
    let out = tokio::spawn(pump(streams.stdout, STDOUT, to.clone(), over.subscribe()));
    let err = tokio::spawn(pump(streams.stderr, STDERR, to.clone(), over.subscribe()));
    let (exit_code, _) = launch::ended(&pidfd, pid).await;
    over.send_replace(true);
    let _ = tokio::join!(out, err);
    feeder.abort();
    status(&to, ExecStatus { exit_code: Some(exit_code), message: None }).await;
}

async fn status(to: &Answers, status: ExecStatus) {
    if let Ok(json) = serde_json::to_vec(&status) {
        let _ = to.send(Ok(encode(STATUS, &json).into())).await;
    }
}

/// From the process to the caller, at the caller's pace, to the last byte. Once the command is `over`, a stream that stays open
/// and quiet has nothing more for the caller: a process that went into the background holds it.
async fn pump(fd: Option<std::os::fd::OwnedFd>, channel: u8, to: Answers, mut over: watch::Receiver<bool>) {
    let Some(Ok(pipe)) = fd.map(Pipe::reader) else { return };
    let mut buffer = vec![0; 16 << 10];
    loop {
        let quiet = *over.borrow();
        tokio::select! {
            biased;
            read = pipe.read(&mut buffer) => match read {
                Ok(count) if count > 0 => {
                    if to.send(Ok(encode(channel, &buffer[..count]).into())).await.is_err() {
                        return;
                    }
                }
                _ => return,
            },
            () = to.closed() => return,
            Ok(()) = over.changed(), if !quiet => {}
            () = tokio::time::sleep(QUIET), if quiet => return,
        }
    }
}

/// From the caller's frames into the process. The input is closed by CLOSE or with the caller's end of the stream.
async fn feed(body: Incoming, mut input: Option<Arc<Pipe>>, terminal: Option<std::os::fd::OwnedFd>) {
    let mut frames = Frames::new(into_stream(body));
    while let Some((channel, payload)) = frames.next().await {
        match channel {
            STDIN => {
                if let Some(pipe) = &input
                    && pipe.write_all(&payload).await.is_err()
                {
                    input = None;
                }
            }
            CLOSE if terminal.is_none() => input = None,
            CLOSE => {
                // A terminal has no half-close: its end-of-file character says the same.
                if let Some(pipe) = &input {
                    let _ = pipe.write_all(&[END_OF_FILE]).await;
                }
            }
            RESIZE => resize(terminal.as_ref(), &payload),
            _ => {}
        }
    }
}

/// The caller's frames, one by one.
struct Frames<S> {
    body: S,
    decoder: Decoder,
}

impl<S: Stream<Item = io::Result<Bytes>> + Unpin> Frames<S> {
    fn new(body: S) -> Self {
        Self { body, decoder: Decoder::default() }
    }

    /// `None` at the end, and when the caller sends what is no frame.
    async fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            match self.decoder.next_frame() {
                Ok(Some(frame)) => return Some(frame),
                Ok(None) => self.decoder.push(&self.body.next().await?.ok()?),
                Err(_) => return None,
            }
        }
    }
}

fn resize(terminal: Option<&std::os::fd::OwnedFd>, payload: &[u8]) {
    if let (Some(terminal), Ok(size)) = (terminal, serde_json::from_slice::<TerminalSize>(payload)) {
        let _ = sys::resize_terminal(std::os::fd::AsFd::as_fd(terminal), size.width, size.height);
    }
}

async fn run_attach(life: Arc<Life>, attach: ExecRequest, body: Incoming, to: Answers) {
    let mut output = life.output.subscribe();
    let fed = life.clone();
    let feeder = tokio::spawn(async move {
        let mut frames = Frames::new(into_stream(body));
        while let Some((channel, payload)) = frames.next().await {
            match channel {
                STDIN if attach.stdin => {
                    let input = lock(&fed.input).clone();
                    if let Some(pipe) = input {
                        let _ = pipe.write_all(&payload).await;
                    }
                }
                // The end of the caller's input is the container's; a caller that only goes away leaves it open.
                CLOSE if attach.stdin && lock(&fed.terminal).is_none() => *lock(&fed.input) = None,
                CLOSE if attach.stdin => {
                    let input = lock(&fed.input).clone();
                    if let Some(pipe) = input {
                        let _ = pipe.write_all(&[END_OF_FILE]).await;
                    }
                }
                RESIZE => resize(lock(&fed.terminal).as_ref(), &payload),
                _ => {}
            }
        }
    });
    let mut exit_code = None;
    loop {
        tokio::select! {
            received = output.recv() => match received {
                Ok((STATUS, code)) => {
                    exit_code = code.as_ref().try_into().ok().map(i32::from_be_bytes);
                    break;
                }
                Err(tokio::sync::broadcast::error::RecvError::Closed) => break,
                Ok((STDERR, _)) if !attach.stderr => {}
                Ok((channel, bytes)) => {
                    for piece in bytes.chunks(MAX_PAYLOAD) {
                        if to.send(Ok(encode(channel, piece).into())).await.is_err() {
                            feeder.abort();
                            return forget_input(&life, &attach);
                        }
                    }
                }
                // The container does not wait for those who watch it; the log has what they missed.
                Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
            },
            () = to.closed() => break,
        }
    }
    feeder.abort();
    forget_input(&life, &attach);
    status(&to, ExecStatus { exit_code, message: None }).await;
}

/// The input of a container that asked for one caller ends with that caller.
fn forget_input(life: &Life, attach: &ExecRequest) {
    if attach.stdin && life.container().stdin_once {
        *lock(&life.input) = None;
    }
}
