//! The agent as the first process of a virtual machine.
//!
//! ```text
//! kernel ─► machine: file systems, modules ─► door ─► PUT /v1/rehearsal ─► (template: saved and copied here) ─► PUT /v1/sandbox
//!                                                                                                        an agent like any other ◄─┘
//! ```
//!
//! Until it is told what it is for it knows nothing of any instance: so all machines of one shape are copies of one. Its end is the
//! machine's. The door is the machine's port, or its socket where it has no port.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use joey_api::agent::VERSION;
use joey_api::guest::{Begun, CGROUP, LayerDisk, NO_INSTANCE, Sandbox};
use joey_machine::{disks, machine, memory, modules, network, port, vsock};
use joey_model::{ErrorKind, Fault};
use joey_rpc::client::Io;
use joey_rpc::port::Listener;
use joey_rpc::{Body, empty_answer, fault_answer, json_answer, read_json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::supervisor::{Agent, lock};
use crate::{diagnosis, rehearsal, server, setup};

/// A longer body is no sandbox: files of volumes are among it.
const BODY: usize = joey_rpc::BODY_LIMIT;

/// How long those who are told something may take to hear the end of it, before the machine ends.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Whether this process was started by a machine's kernel as its first one.
pub fn is_first_process() -> bool {
    std::process::id() == 1 && std::env::args_os().next().is_some_and(|name| name == "/init")
}

/// Serves until the instance is over, and then ends the machine.
pub fn run() -> ! {
    if let Err(message) = serve() {
        // On the machine's console, for the owner of the host.
        eprintln!("joey-agent: {message}");
    }
    machine::power_off()
}

/// What this guest has become.
#[derive(Default)]
struct Guest {
    agent: Mutex<Option<Arc<Agent>>>,
    /// Held by the call that makes it something, or rehearses that.
    turn: tokio::sync::Mutex<()>,
    /// True once the agent has ended.
    over: watch::Sender<bool>,
}

fn serve() -> Result<(), String> {
    setup::keep_small();
    machine::prepare()?;
    network::prepare().map_err(|error| format!("cannot prepare the interface: {error}"))?;
    setup::settle().map_err(|error| format!("cannot settle in the machine: {error}"))?;
    let runtime = setup::runtime()?;
    runtime.block_on(async {
        let mut door = Door::open().map_err(|error| format!("cannot listen to the host: {error}"))?;
        let guest = Arc::new(Guest::default());
        let mut over = guest.over.subscribe();
        let mut connections = JoinSet::new();
        loop {
            let connection = tokio::select! {
                connection = door.accept() => connection?,
                Some(_) = connections.join_next() => continue,
                _ = over.wait_for(|over| *over) => break,
            };
            let (guest, mut over) = (guest.clone(), guest.over.subscribe());
            let service = tower::service_fn(move |request| answer(guest.clone(), request));
            connections.spawn(async move {
                let over = async { drop(over.wait_for(|over| *over).await) };
                // It ends with its caller, in order or not.
                let _ = joey_rpc::serve_until(connection, service, over).await;
            });
        }
        // Who follows a log gets the rest of it, and who asked for the end hears that it was heard.
        let told = async {
            while connections.join_next().await.is_some() {}
            door.end().await;
        };
        let _ = tokio::time::timeout(LAST_WORDS, told).await;
        Ok(())
    })
}

/// Where the host comes in.
enum Door {
    Port(Listener),
    Socket(vsock::Listener),
}

impl Door {
    fn open() -> io::Result<Self> {
        match port::Port::open()?.map(port::Port::split) {
            Some((reader, writer)) => Ok(Self::Port(Listener::new(reader, writer))),
            None => vsock::Listener::open().map(Self::Socket),
        }
    }

    /// Takes nobody in any more; resolves when what was said has been heard, as far as that can be known.
    async fn end(self) {
        match self {
            Self::Port(port) => port.end().await,
            // What is written to it is the host's at once.
            Self::Socket(_) => {}
        }
    }

    async fn accept(&mut self) -> Result<Box<dyn Io>, String> {
        match self {
            Self::Port(port) => Ok(Box::new(port.accept().await.ok_or("the port is gone")?)),
            Self::Socket(socket) => match socket.accept().await {
                Ok(stream) => Ok(Box::new(stream)),
                Err(error) => Err(format!("the socket fails: {error}")),
            },
        }
    }
}

async fn answer(guest: Arc<Guest>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let agent = lock(&guest.agent).clone();
    let answered = match (request.method(), request.uri().path(), agent) {
        (&Method::PUT, "/v1/sandbox", None) => begin(&guest, request.into_body()).await,
        (&Method::PUT, "/v1/rehearsal", None) => rehearse(&guest).await,
        (&Method::PUT, "/v1/layers", Some(_)) => layers(request.into_body()).await,
        (_, _, Some(agent)) => return server::answer(agent, request).await,
        (_, path, None) => {
            let message = format!("the machine has no instance yet: {path} is not answered");
            Err(Fault::new(ErrorKind::Conflict, NO_INSTANCE, message))
        }
    };
    Ok(answered.unwrap_or_else(fault_answer))
}

fn refused(what: &str) -> impl FnOnce(std::io::Error) -> Fault {
    let what = what.to_owned();
    move |error| Fault::new(ErrorKind::Internal, "GuestFailed", format!("cannot {what}: {error}"))
}

/// Of two calls at once the second one comes too late.
fn still_new(guest: &Guest) -> Result<(), Fault> {
    match lock(&guest.agent).is_none() {
        true => Ok(()),
        false => Err(Fault::new(ErrorKind::Conflict, "InstanceThere", "the machine has an instance")),
    }
}

async fn rehearse(guest: &Arc<Guest>) -> Result<Response<Body>, Fault> {
    let _turn = guest.turn.lock().await;
    still_new(guest)?;
    let failed = |message| Fault::new(ErrorKind::Internal, "GuestFailed", message);
    rehearsal::rehearse().await.map_err(failed)?;
    Ok(empty_answer(StatusCode::NO_CONTENT))
}

async fn begin(guest: &Arc<Guest>, body: Incoming) -> Result<Response<Body>, Fault> {
    let sandbox: Sandbox = read_json(body, BODY).await?;
    if sandbox.version != VERSION {
        let message = format!("the sandbox has version {}, this agent knows {VERSION}", sandbox.version);
        return Err(Fault::new(ErrorKind::Invalid, "UnknownVersion", message));
    }
    let _turn = guest.turn.lock().await;
    still_new(guest)?;
    let mut phases = Phases::default();
    machine::set_clock(sandbox.now).map_err(refused("set the clock"))?;
    machine::add_entropy(&sandbox.entropy).map_err(refused("take in entropy"))?;
    phases.done("clock");
    disks::mount_own().await.map_err(refused("mount the disk"))?;
    phases.done("disk");
    for disk in &sandbox.layers {
        disks::mount_layers(disk).await.map_err(refused("mount the layers"))?;
        phases.done("layers");
    }
    if let Some(disk) = &sandbox.modules {
        modules::load(disk).await.map_err(refused("load the modules"))?;
        phases.done("modules");
    }
    if let Some(interface) = &sandbox.network {
        machine::appeared(machine::INTERFACE, 1).await.map_err(refused("find the interface"))?;
        network::bring_up(interface).map_err(refused("bring the interface up"))?;
        phases.done("interface");
    }
    let failed = |message| Fault::new(ErrorKind::Internal, "GuestFailed", message);
    let (agent, containers) = setup::in_guest(sandbox.config).map_err(failed)?;
    if let Some(most) = sandbox.core_bytes {
        diagnosis::take_crashes(&agent, most).map_err(refused("take in crashes"))?;
    }
    *lock(&guest.agent) = Some(agent.clone());
    phases.done("settle");
    let guest = guest.clone();
    tokio::spawn(async move {
        let cgroup = Path::new("/sys/fs/cgroup").join(CGROUP.trim_start_matches('/'));
        tokio::select! {
            () = setup::until_shutdown(&agent, containers) => {}
            never = memory::let_go_when_idle(&cgroup) => match never {},
        }
        guest.over.send_replace(true);
    });
    Ok(json_answer(&Begun { phases: phases.done }))
}

/// What took how long.
struct Phases {
    since: Instant,
    done: Vec<(String, u64)>,
}

impl Default for Phases {
    fn default() -> Self {
        Self { since: Instant::now(), done: Vec::new() }
    }
}

impl Phases {
    fn done(&mut self, name: &str) {
        let now = Instant::now();
        let micros = now.duration_since(self.since).as_micros();
        self.done.push((name.to_owned(), u64::try_from(micros).unwrap_or(u64::MAX)));
        self.since = now;
    }
}

async fn layers(body: Incoming) -> Result<Response<Body>, Fault> {
    let disk: LayerDisk = read_json(body, BODY).await?;
    disks::mount_layers(&disk).await.map_err(refused("mount the layers"))?;
    Ok(empty_answer(StatusCode::NO_CONTENT))
}
