//! A machine of QEMU's that runs: its monitor's process, and the talk with it.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use joey_api::guest::DISK_SLOT;
use joey_api::vmm::Giving;
use joey_process::{Ended, Process};
use joey_rpc::client::Io;
use serde_json::{Value, json};
use tokio::io::DuplexStream;
use tokio::sync::{Mutex, watch};
use tokio_util::task::AbortOnDropHandle;

use super::{LIMIT, arguments, port_of, qmp_of};
use crate::jail::errors_of;
use crate::qmp::Qmp;
use crate::template::{self, memory_file};
use crate::{Given, HypervisorError, Jailer, Vm, jail, layout};

/// Between two looks at what takes milliseconds.
const LOOK: Duration = Duration::from_millis(1);
/// What is done when a disk comes into a slot.
const INSERT: &str = "insert a disk";
/// Bytes that a monitor may write into a file though its disk is shorter.
const LEAST_FILE: u64 = 1 << 20;
/// How long a monitor may take for an answer.
const ANSWER: Duration = Duration::from_secs(10);

/// What a machine is called, and where its directory is.
#[derive(Clone)]
struct Place {
    name: String,
    dir: PathBuf,
}

/// A call that the agent has not answered yet; it ends with this.
type Calling = AbortOnDropHandle<io::Result<DuplexStream>>;

pub(super) struct QemuVm {
    place: std::sync::Mutex<Place>,
    starter: Jailer,
    pid: u32,
    process: std::sync::Arc<Process>,
    gone: watch::Receiver<Option<Option<Ended>>>,
    /// The talk with the monitor, begun when it is first needed and again when it broke off.
    qmp: Mutex<Option<Qmp>>,
    /// The memory of one that booted.
    memory: Option<OwnedFd>,
    /// As long as it is open, the monitor keeps what it translated: the machine is ready for somebody.
    held: std::sync::Mutex<Option<OwnedFd>>,
    /// What [`Vm::connect`] resolves with first.
    calling: std::sync::Mutex<Option<Calling>>,
    /// The number of the state of its template, until it has copied that.
    state: std::sync::Mutex<Option<i32>>,
}

impl QemuVm {
    /// Watches the process until it has ended, and reaps it where it is this process's child.
    pub(super) fn new(starter: Jailer, name: String, dir: PathBuf, process: Process, memory: Option<OwnedFd>) -> Self {
        let (gone, seen) = watch::channel(None);
        let process = std::sync::Arc::new(process);
        let watched = process.clone();
        tokio::spawn(async move {
            watched.ended().await;
            gone.send_replace(Some(watched.reap()));
        });
        let place = std::sync::Mutex::new(Place { name, dir });
        let pid = process.pid();
        let (held, calling, state) = Default::default();
        Self { place, starter, pid, process, gone: seen, qmp: Mutex::new(None), memory, held, calling, state }
    }

    /// Nobody's, for as long as this is open.
    pub(super) fn hold(&self, held: OwnedFd) {
        self.held().replace(held);
    }

    fn held(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn calling(&self) -> MutexGuard<'_, Option<Calling>> {
        self.calling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, Option<i32>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn name(&self) -> String {
        self.place().name.clone()
    }

    fn dir(&self) -> PathBuf {
        self.place().dir.clone()
    }

    fn host(&self, operation: &'static str) -> impl Fn(io::Error) -> HypervisorError + use<> {
        let machine = self.name();
        move |source| HypervisorError::Host { machine: machine.clone(), operation, source }
    }

    fn failed(&self, operation: &'static str) -> impl Fn(io::Error) -> HypervisorError + '_ {
        move |error| {
            // Its own words say more than that it is gone.
            let message = match self.gone.borrow().is_some() {
                true => jail::last_words(&errors_of(&self.dir())),
                false => error.to_string(),
            };
            HypervisorError::Monitor { machine: self.name(), operation, message }
        }
    }

    async fn ask(&self, operation: &'static str, command: &str, arguments: Value) -> Result<Value, HypervisorError> {
        self.ask_all(operation, vec![(command, arguments)], None).await
    }

    /// Asks the monitor, and does not wait in between; an answer that does not come is the monitor's failure.
    async fn ask_all(
        &self,
        operation: &'static str,
        orders: Vec<(&str, Value)>,
        descriptor: Option<&OwnedFd>,
    ) -> Result<Value, HypervisorError> {
        let mut slot = self.qmp.lock().await;
        // Taken out: what is broken off in the middle is not gone on with.
        let taken = slot.take();
        let asked = async {
            let mut qmp = match taken {
                Some(qmp) => qmp,
                None => Qmp::connect(&qmp_of(&self.dir())).await?,
            };
            let answer = qmp.ask(orders, descriptor.map(AsFd::as_fd)).await;
            Ok::<_, io::Error>((qmp, answer))
        };
        let mut gone = self.gone.clone();
        let asked = tokio::select! {
            asked = tokio::time::timeout(ANSWER, asked) => asked,
            _ = gone.wait_for(Option::is_some) => Ok(Err(io::ErrorKind::BrokenPipe.into())),
        };
        match asked {
            Ok(Ok((qmp, answer))) => {
                // What failed may have left answers behind that nobody reads.
                *slot = answer.is_ok().then_some(qmp);
                answer.map_err(self.failed(operation))
            }
            Ok(Err(error)) => Err(self.failed(operation)(error)),
            Err(_) => Err(HypervisorError::Silent { machine: self.name() }),
        }
    }

    /// What it copies when it begins: the number of the state of its template.
    pub(super) fn is_to_copy(&self, state: Option<i32>) {
        *self.state() = state;
    }

    /// Has a machine that was just started run. The agent is called before that, and hears it as soon as it is there.
    pub(super) async fn begin(&self) -> Result<(), HypervisorError> {
        let calling = AbortOnDropHandle::new(tokio::spawn(called(port_of(&self.dir()))));
        self.calling().replace(calling);
        let state = self.state().take();
        let Some(state) = state else {
            return self.ask("start", "query-status", json!({})).await.map(drop);
        };
        let operation = "copy the template";
        let orders = vec![share_memory(), ("migrate-incoming", json!({ "uri": format!("fd:{state}") }))];
        self.ask_all(operation, orders, None).await?;
        let running = async {
            loop {
                // As the one that it is a copy of did when it was saved, it runs by itself.
                match self.status(operation).await?.as_str() {
                    "running" => return Ok(()),
                    "inmigrate" => tokio::time::sleep(LOOK).await,
                    status => {
                        let message = format!("the machine is {status}");
                        return Err(HypervisorError::Monitor { machine: self.name(), operation, message });
                    }
                }
            }
        };
        let silent = |_| HypervisorError::Silent { machine: self.name() };
        tokio::time::timeout(LIMIT, running).await.map_err(silent)?
    }

    /// Gives the monitor a file that it cannot find by itself; what it is called there.
    async fn pass(&self, file: &Path, writable: bool) -> Result<String, HypervisorError> {
        let operation = INSERT;
        let file = File::options().read(true).write(writable).open(file).map_err(self.host(operation))?;
        let answer = self.ask_all(operation, vec![("add-fd", json!({}))], Some(&file.into())).await?;
        let number = answer.get("fdset-id").and_then(Value::as_i64).unwrap_or(-1);
        Ok(format!("/dev/fdset/{number}"))
    }

    /// Puts a node into a slot, and lets go of what the slot had when the machine started.
    async fn put(&self, slot: u32, below: &str, node: Value) -> Result<(), HypervisorError> {
        self.ask(INSERT, "blockdev-add", node).await?;
        let options = json!({ "options": [arguments::slot_node(slot, below)] });
        self.ask(INSERT, "blockdev-reopen", options).await?;
        self.ask(INSERT, "blockdev-del", json!({ "node-name": arguments::first(slot) })).await.map(drop)
    }

    async fn state_into(&self, state: &OwnedFd) -> Result<(), HypervisorError> {
        let operation = "save the template";
        let orders = vec![("getfd", json!({ "fdname": "state" })), share_memory()];
        self.ask_all(operation, orders, Some(state)).await?;
        // It runs until it is saved, so that its copies run when they are there.
        self.ask(operation, "migrate", json!({ "uri": "fd:state" })).await?;
        loop {
            let told = self.ask(operation, "query-migrate", json!({})).await?;
            match told.get("status").and_then(Value::as_str) {
                Some("completed") => break,
                Some("failed" | "cancelled") => {
                    let message = told.get("error-desc").and_then(Value::as_str).unwrap_or("it does not say why");
                    let (machine, message) = (self.name(), message.to_owned());
                    return Err(HypervisorError::Monitor { machine, operation, message });
                }
                _ => tokio::time::sleep(LOOK).await,
            }
        }
        // It says so before it has come to the end of that, and does not go on until it has.
        while self.status(operation).await? != "postmigrate" {
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// How the monitor is with its machine: `running`, `inmigrate`.
    async fn status(&self, operation: &'static str) -> Result<String, HypervisorError> {
        let told = self.ask(operation, "query-status", json!({})).await?;
        Ok(told.get("status").and_then(Value::as_str).unwrap_or("in no state").to_owned())
    }
}

/// The memory is not part of the state: it is there.
fn share_memory() -> (&'static str, Value) {
    let capabilities = json!([{ "capability": "x-ignore-shared", "state": true }]);
    ("migrate-set-capabilities", json!({ "capabilities": capabilities }))
}

/// A connection with the agent, when it has answered.
async fn called(port: PathBuf) -> io::Result<DuplexStream> {
    joey_rpc::port::call(joey_rpc::connect_unix(&port).await?).await
}

#[async_trait]
impl Vm for QemuVm {
    async fn connect(&self) -> io::Result<Box<dyn Io>> {
        let calling = self.calling().take();
        let connection = match calling {
            Some(calling) => calling.await.map_err(io::Error::other)??,
            None => called(port_of(&self.dir())).await?,
        };
        Ok(Box::new(connection))
    }

    async fn insert(&self, slot: u32, files: Vec<PathBuf>) -> Result<(), HypervisorError> {
        let host = self.host(INSERT);
        let parts = layout::parts(&files).map_err(&host)?;
        let mut names = Vec::new();
        for file in &files {
            names.push(self.pass(file, false).await?);
        }
        let place = self.dir().join(format!("slot{slot}.vmdk"));
        std::fs::write(&place, layout::descriptor(&parts, |number| names[number].clone())).map_err(host)?;
        let descriptor = json!({ "driver": "file", "filename": self.pass(&place, false).await?, "read-only": true });
        let below = format!("layers{slot}");
        let node = json!({ "driver": "vmdk", "node-name": below, "read-only": true, "file": descriptor });
        self.put(slot, &below, node).await
    }

    async fn give(&self, given: Given) -> Result<(), HypervisorError> {
        *self.place() = Place { name: given.name, dir: given.dir };
        let own = async {
            let disk = self.pass(&given.disk, true).await?;
            let node = json!({ "driver": "file", "node-name": "disk", "filename": disk, "discard": "ignore" });
            self.put(DISK_SLOT, "disk", node).await?;
            for (slot, files) in given.layers {
                self.insert(slot, files).await?;
            }
            Ok(())
        };
        let outside = async {
            let longest_file = std::fs::metadata(&given.disk).map_err(self.host(INSERT))?.len();
            let longest_file = longest_file.max(LEAST_FILE);
            let (cgroup, limits) = (given.cgroup, given.limits);
            let network = given.network.map(|network| (network.netns, network.mac));
            let order = Giving { pid: self.pid, cgroup, limits, longest_file, network };
            self.starter.give(order, &self.process).await.map_err(self.host("give the network"))
        };
        tokio::try_join!(own, outside)?;
        self.held().take();
        Ok(())
    }

    async fn answers(&self) -> Result<(), HypervisorError> {
        self.ask("answer", "query-status", json!({})).await.map(drop)
    }

    async fn ended(&self) -> Option<Ended> {
        // An error means that the watcher is gone, which it is only after it saw the end.
        self.gone.clone().wait_for(Option::is_some).await.ok().and_then(|how| how.flatten())
    }

    fn kill(&self) {
        self.process.kill();
    }

    fn pid(&self) -> u32 {
        self.pid
    }

    async fn freeze(&self) -> Result<(OwnedFd, Vec<u8>), HypervisorError> {
        let host = self.host("save the template");
        let memory = self.memory.as_ref().ok_or_else(|| host(io::Error::other("it is a copy itself")))?;
        let memory = File::from(memory.try_clone().map_err(&host)?);
        let state = memory_file(c"joey-state", 0).map_err(&host)?;
        self.state_into(&state).await?;
        let (mut file, mut bytes) = (File::from(state), Vec::new());
        file.rewind().and_then(|()| file.read_to_end(&mut bytes)).map_err(&host)?;
        let copied = tokio::task::spawn_blocking(move || template::copy(&memory));
        let memory = copied.await.map_err(io::Error::other).flatten().map_err(host)?;
        Ok((memory, bytes))
    }

    async fn go_on(&self) -> Result<(), HypervisorError> {
        let waits = self.state().is_some();
        match waits {
            true => self.begin().await,
            false => self.ask("go on", "cont", json!({})).await.map(drop),
        }
    }
}
