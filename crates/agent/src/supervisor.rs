//! The containers of a Pod as a whole: their order, the stop of all, and the truth that is told about them. What happens to one
//! container is in `life`.
//!
//! ```text
//! init ─► init ─► sidecar (until it has started) ─► … ─► main containers ─► all ended for good ─► sidecars end, last first
//!   │ failed for good, or a stop: what follows never starts                                        ▲
//!   └───────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use joey_api::agent::{AgentConfig, AgentContainer, AgentContainerState, AgentState, Failed, VERSION};
use joey_api::instance::{ContainerState, InstanceEvent, Resources};
use joey_api::lifecycle::Role;
use joey_model::checkpoint;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use crate::cgroup::Cgroup;
use crate::launch::{self, Failure, Program, Started};
use crate::life::Life;
use crate::sandboxed::Sandbox;
use crate::telling::{self, Allowance};
use crate::{remote, storage, sys};

const EVENTS: usize = 32;
/// What a sidecar has to end in, however late the main containers ended: the kubelet's least grace.
const LEAST_GRACE: Duration = Duration::from_secs(2);

pub struct Agent {
    pub config: AgentConfig,
    pub dir: PathBuf,
    pub cgroup: Cgroup,
    /// The first process of the namespace of processes that all containers share.
    pub shared: Option<u32>,
    /// Who runs the containers, where it is not the agent itself.
    pub apart: Option<Arc<Sandbox>>,
    pub state: watch::Sender<AgentState>,
    pub shutdown: Notify,
    /// True once nothing more will happen.
    pub over: watch::Sender<bool>,
    /// In the order of the state's containers; those that were added later come last.
    lives: Mutex<Vec<Arc<Life>>>,
    /// When everything is ended because its time is over.
    pub deadline: watch::Sender<Option<Timestamp>>,
    /// When what still runs is killed; `None`: everything may run.
    stop: watch::Sender<Option<Instant>>,
    /// Containers that have ended for good and are to run again.
    again: mpsc::UnboundedSender<usize>,
    wanted_again: tokio::sync::Mutex<mpsc::UnboundedReceiver<usize>>,
    allowance: Mutex<Allowance>,
}

impl Agent {
    pub fn new(config: AgentConfig, dir: PathBuf, shared: Option<u32>) -> Self {
        let lives = config.containers.iter().enumerate();
        let lives = lives.map(|(at, container)| Arc::new(Life::new(at, container.clone()))).collect();
        let inits = config.containers.iter().any(|container| container.role != Role::Main);
        let reason = if inits { "PodInitializing" } else { "ContainerCreating" };
        let containers = config.containers.iter().map(|container| first_state(container, reason)).collect();
        let state = AgentState {
            version: VERSION,
            sequence: 0,
            containers,
            events: Vec::new(),
            stopping: false,
            deadline: config.deadline,
            failed: None,
        };
        let (again, wanted_again) = mpsc::unbounded_channel();
        Self {
            cgroup: Cgroup::of_containers(&config),
            shared,
            apart: None,
            deadline: watch::Sender::new(config.deadline),
            config,
            dir,
            state: watch::Sender::new(state),
            shutdown: Notify::new(),
            over: watch::Sender::new(false),
            lives: Mutex::new(lives),
            stop: watch::Sender::new(None),
            again,
            wanted_again: tokio::sync::Mutex::new(wanted_again),
            allowance: Mutex::default(),
        }
    }

    /// Changes the state, writes it down and tells the watchers.
    pub fn change(&self, change: impl FnOnce(&mut AgentState)) {
        self.state.send_modify(|state| {
            change(state);
            state.sequence += 1;
            let surplus = state.events.len().saturating_sub(EVENTS);
            state.events.drain(..surplus);
            if let Err(error) = self.persist(state) {
                eprintln!("cannot write state.json: {error}");
            }
        });
    }

    fn persist(&self, state: &AgentState) -> io::Result<()> {
        let temporary = self.dir.join("state.json.new");
        std::fs::write(&temporary, serde_json::to_vec(state)?)?;
        std::fs::rename(temporary, self.dir.join("state.json"))?;
        checkpoint::reached("agent.state-written");
        Ok(())
    }

    /// Tells what happened to a container, as far as [`telling`] lets it.
    pub fn event(&self, warning: bool, reason: &str, message: String, container: &AgentContainer) {
        if !lock(&self.allowance).take(&container.name, reason, Instant::now()) {
            return;
        }
        let event = InstanceEvent {
            at: Timestamp::now(),
            warning,
            reason: reason.to_owned(),
            message: telling::cut(message),
            container: Some(container.name.clone()),
        };
        self.change(|state| state.events.push(event));
    }

    /// The cgroup of a container's processes.
    pub fn cgroup_of(&self, name: &str) -> Cgroup {
        self.apart.as_ref().map_or_else(|| self.cgroup.child(name), |apart| apart.cgroup.clone())
    }

    /// The limits of that cgroup, when the container's are these.
    pub fn limits_with(&self, name: &str, resources: &Resources) -> Resources {
        if self.apart.is_none() {
            return *resources;
        }
        let all = self.lives().into_iter().map(|life| life.container());
        let others = all.filter(|container| container.name != name && container.role != Role::Init);
        let others: Vec<_> = others.map(|container| container.resources).collect();
        Sandbox::limits(others.iter().chain([resources]))
    }

    /// Starts a further process in the container whose first process is `init`.
    pub async fn further(&self, program: &Program<'_>, init: u32) -> Result<Started, Failure> {
        match &self.apart {
            Some(apart) => apart.further(program, init).await,
            None => launch::further(program, init, &self.cgroup_of(&program.container.name)).await,
        }
    }

    /// The way to what only can be reached inside; `None`: the agent reaches it itself.
    pub async fn inside(&self) -> Result<Option<joey_rpc::Client>, Failure> {
        match &self.apart {
            Some(apart) => apart.inside(&self.config.hostname).await.map(Some),
            None => Ok(None),
        }
    }

    pub fn ender(&self) -> Ender {
        Ender(self.apart.clone())
    }

    pub fn life(&self, at: usize) -> Arc<Life> {
        lock(&self.lives)[at].clone()
    }

    /// Every container's life, in order.
    pub fn lives(&self) -> Vec<Arc<Life>> {
        lock(&self.lives).clone()
    }

    /// The life of the container of that name.
    pub fn find(&self, name: &str) -> Option<Arc<Life>> {
        self.lives().into_iter().find(|life| life.container().name == name)
    }

    /// Takes in a further container; it does not live yet.
    pub fn admit(&self, container: AgentContainer, state: AgentContainerState) -> Arc<Life> {
        let mut lives = lock(&self.lives);
        let life = Arc::new(Life::new(lives.len(), container));
        lives.push(life.clone());
        self.change(|all| all.containers.push(state));
        life
    }

    /// Asks everything to end; of several calls the shortest grace counts.
    pub fn stop(&self, grace: Duration) {
        self.end_by(Instant::now() + grace);
        self.change(|state| state.stopping = true);
        checkpoint::reached("agent.stop-told");
    }

    /// Ends everything though nobody asked for it.
    pub fn fail(&self, failed: Failed, warning: bool, grace: Duration) {
        let (reason, message) = (failed.reason.clone(), failed.message.clone());
        self.change(|state| {
            state.events.push(InstanceEvent { at: Timestamp::now(), warning, reason, message, container: None });
            state.failed = Some(failed);
        });
        self.end_by(Instant::now() + grace);
    }

    fn end_by(&self, deadline: Instant) {
        self.stop.send_modify(|stop| *stop = Some(stop.map_or(deadline, |earlier| earlier.min(deadline))));
        for life in self.lives() {
            // A sidecar's turn comes when those it serves have ended; a later, shorter grace counts for it too.
            if life.container().role != Role::Sidecar || life.is_ending() {
                life.end_by(deadline);
            }
        }
    }

    pub fn stopping(&self) -> bool {
        self.stop.borrow().is_some()
    }

    async fn stopped(&self) {
        let mut stop = self.stop.subscribe();
        let _ = stop.wait_for(Option::is_some).await;
    }

    /// Ends a container and starts it again without back-off; one that has ended for good runs again.
    pub fn restart(&self, life: &Life) {
        if life.container().role == Role::Debug {
            return;
        }
        if life.has_settled() {
            let _ = self.again.send(life.at);
        } else {
            life.run_again();
        }
    }

    /// Runs the containers until a stop has ended them all.
    pub async fn run(self: Arc<Self>) {
        let mut again = self.wanted_again.lock().await;
        loop {
            let limits = [tokio::spawn(self.clone().limit()), tokio::spawn(storage::watch(self.clone()))];
            self.clone().pass(&mut again).await;
            // How it ended stays as it is: no deadline and no file changes that any more.
            limits.iter().for_each(JoinHandle::abort);
            tokio::select! {
                () = self.stopped() => break,
                at = again.recv() => if at.is_none() { break },
            }
            // Asked for container by container: one is enough to run all of them once more.
            while again.try_recv().is_ok() {}
            for at in 0..self.config.containers.len() {
                self.begin_anew(at);
            }
        }
    }

    /// Ends everything when the Pod's time is over.
    async fn limit(self: Arc<Self>) {
        let mut deadline = self.deadline.subscribe();
        loop {
            let at = *deadline.borrow_and_update();
            let left = at.map(|at| Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default());
            tokio::select! {
                Ok(()) = deadline.changed() => {}
                () = tokio::time::sleep(left.unwrap_or(Duration::MAX)), if left.is_some() => break,
            }
        }
        let message = "Pod was active on the node longer than the specified deadline".to_owned();
        let grace = Duration::from_secs(self.config.termination_grace_period_seconds.into());
        self.fail(Failed { reason: "DeadlineExceeded".to_owned(), message }, false, grace);
    }

    fn begin_anew(&self, at: usize) {
        self.life(at).renew();
        self.change(|state| {
            let now = &mut state.containers[at];
            if let ContainerState::Terminated(end) = &now.state {
                now.last_termination = Some(end.clone());
                now.restart_count += 1;
            }
            now.state = waiting("PodInitializing", String::new());
        });
    }

    /// From the first init container to the end of the last sidecar.
    async fn pass(self: Arc<Self>, again: &mut mpsc::UnboundedReceiver<usize>) {
        let mut sidecars = Vec::new();
        tokio::select! {
            () = remote::mount(&self) => {}
            () = self.stopped() => {}
        }
        if self.clone().initialise(&mut sidecars).await {
            self.clone().mains(again).await;
        }
        while let Some((life, task)) = sidecars.pop() {
            let own = Instant::now() + Duration::from_secs(self.config.termination_grace_period_seconds.into());
            let by = self.stop.borrow().map_or(own, |stop| stop.max(Instant::now() + LEAST_GRACE));
            life.end_by(by);
            let _ = task.await;
        }
        // Who only looked on has nothing to look at any more.
        let looking = self.lives().into_iter().filter(|life| life.container().role == Role::Debug);
        looking.for_each(|life| life.end_by(Instant::now() + LEAST_GRACE));
    }

    /// False: what follows must not start.
    async fn initialise(self: Arc<Self>, sidecars: &mut Vec<(Arc<Life>, JoinHandle<Option<i32>>)>) -> bool {
        for (at, container) in self.config.containers.iter().enumerate() {
            if self.stopping() {
                return false;
            }
            match container.role {
                Role::Main | Role::Debug => {}
                Role::Init => {
                    if self.clone().live(at).await != Some(0) {
                        return false;
                    }
                }
                Role::Sidecar => {
                    let life = self.life(at);
                    sidecars.push((life.clone(), tokio::spawn(self.clone().live(at))));
                    tokio::select! {
                        () = life.started() => {}
                        () = self.stopped() => return false,
                    }
                }
            }
        }
        !self.stopping()
    }

    /// Starts the main containers and waits until all have ended for good.
    async fn mains(self: Arc<Self>, again: &mut mpsc::UnboundedReceiver<usize>) {
        let mut running = JoinSet::new();
        for (at, container) in self.config.containers.iter().enumerate() {
            if container.role != Role::Main {
                continue;
            }
            running.spawn(self.clone().live(at));
            if container.lifecycle.post_start.is_some() {
                // The next one starts when this one's hook is done, as under the kubelet.
                let life = self.life(at);
                tokio::select! {
                    () = life.begun() => {}
                    () = self.stopped() => {}
                }
            }
        }
        loop {
            tokio::select! {
                ended = running.join_next() => if ended.is_none() { return },
                Some(at) = again.recv() => if self.may_run_again(at) {
                    self.begin_anew(at);
                    running.spawn(self.clone().live(at));
                },
            }
        }
    }

    fn may_run_again(&self, at: usize) -> bool {
        self.config.containers[at].role == Role::Main && self.life(at).has_settled() && !self.stopping()
    }
}

/// Signals what runs in containers.
#[derive(Clone)]
pub struct Ender(Option<Arc<Sandbox>>);

impl Ender {
    /// To a container's first process. The end of that is the end of all others.
    pub fn signal(&self, pid: u32, signal: i32) {
        match &self.0 {
            Some(apart) => apart.signal(pid, signal),
            None => drop(sys::kill(pid, signal)),
        }
    }

    /// Kills a further process, with its group.
    pub fn kill_command(&self, pid: u32) {
        match &self.0 {
            Some(apart) => apart.signal(pid, libc::SIGKILL),
            None => drop(sys::kill_group(pid, libc::SIGKILL)),
        }
    }
}

/// A container that has done nothing yet.
pub fn first_state(container: &AgentContainer, reason: &str) -> AgentContainerState {
    AgentContainerState {
        name: container.name.clone(),
        state: waiting(reason, String::new()),
        last_termination: None,
        restart_count: 0,
        running_since: None,
        started: false,
        ready: false,
        image_id: container.image_id.clone(),
        image: container.image.clone(),
        resources: container.resources,
    }
}

pub fn waiting(reason: &str, message: String) -> ContainerState {
    ContainerState::Waiting { reason: reason.to_owned(), message }
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
