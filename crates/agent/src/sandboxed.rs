//! Containers that gVisor runs, instead of the agent by itself: one sandbox for all of them, made when the first one starts and again
//! when it has died, and a monitor (`joey_gvisor::monitor`) for each container, which is its process as far as the rest is concerned.
//!
//! Everything is in one cgroup, `sandbox`. A container's root is made by its monitor in a mount namespace of the monitor's own: also
//! further processes and files are found there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use joey_api::agent::{AgentConfig, AgentContainer};
use joey_api::instance::Resources;
use joey_gvisor::spec::{self, Bind, Processes, Who};
use joey_gvisor::{HOLDER, OVERHEAD, Runsc, Runtime, THREADS, monitor};
use joey_rpc::Client;
use tokio::net::unix::pipe;
use tokio::sync::watch;

use crate::cgroup::Cgroup;
use crate::launch::{self, Ends, Failure, Never, Program, Started};
use crate::supervisor::lock;
use crate::{root, sys, view};

/// Where the agent sees its own program, for [`spec::INSIDE`].
const PROGRAM: &str = "/inside/joey-agent";
/// How long a container may take to start, and a signal to be sent, before the sandbox counts as hung.
const LIMIT: Duration = Duration::from_secs(30);
const SIGNAL_LIMIT: Duration = Duration::from_secs(5);

/// What the agent has to see beside its own: paths of the host, and places.
pub fn files(runtime: &Runtime) -> Vec<(&Path, &Path)> {
    let mut files =
        vec![(runtime.program.as_path(), runtime.program.as_path()), (&*runtime.inside, Path::new(PROGRAM))];
    let devices = ["/dev/null", "/dev/kvm"].map(Path::new);
    files.extend(devices.into_iter().filter(|path| path.exists()).map(|path| (path, path)));
    files
}

/// The sandbox of this agent's containers.
pub struct Sandbox {
    runtime: Runtime,
    dir: PathBuf,
    pub cgroup: Cgroup,
    holder: tokio::sync::Mutex<Option<Holder>>,
    /// What runs, by the number of its process on this host.
    placed: Mutex<BTreeMap<u32, Placed>>,
    next: AtomicU32,
}

/// A sandbox that was made.
#[derive(Clone)]
struct Holder {
    runsc: Runsc,
    client: Client,
    over: watch::Receiver<bool>,
}

/// Something that runs in the sandbox.
#[derive(Clone)]
struct Placed {
    runsc: Runsc,
    id: String,
    upper: PathBuf,
    /// Of a further process: the file that says its number in the sandbox.
    number: Option<PathBuf>,
}

fn failed(what: &str) -> impl Fn(io::Error) -> Failure {
    let what = what.to_owned();
    move |error| Failure::Create(format!("cannot {what}: {error}"))
}

impl Sandbox {
    pub fn new(runtime: Runtime, config: &AgentConfig, dir: &Path) -> Self {
        Self {
            runtime,
            dir: dir.join("runsc"),
            cgroup: Cgroup::of_containers(config).child("sandbox"),
            holder: tokio::sync::Mutex::new(None),
            placed: Mutex::default(),
            next: AtomicU32::new(0),
        }
    }

    /// The way to the agent's program in the sandbox.
    pub async fn inside(&self, hostname: &str) -> Result<Client, Failure> {
        self.hold(hostname).await.map(|holder| holder.client)
    }

    /// The sandbox, made where there is none that lives.
    async fn hold(&self, hostname: &str) -> Result<Holder, Failure> {
        let mut holder = self.holder.lock().await;
        if let Some(there) = holder.as_ref().filter(|there| !*there.over.borrow()) {
            return Ok(there.clone());
        }
        let making = self.make(hostname);
        let made = match tokio::time::timeout(LIMIT, making).await {
            Ok(made) => made?,
            Err(_) => {
                self.cgroup.end_all().await;
                return Err(Failure::Create(format!("the sandbox was not made within {} s", LIMIT.as_secs())));
            }
        };
        *holder = Some(made.clone());
        Ok(made)
    }

    async fn make(&self, hostname: &str) -> Result<Holder, Failure> {
        self.cgroup.make().map_err(failed("make the sandbox's cgroup"))?;
        let dir = self.dir.join(self.next.fetch_add(1, Ordering::Relaxed).to_string());
        let (bundle, base) = (dir.join("bundle"), dir.join("bundle").join("root"));
        let runsc = self.runsc(dir.join("state"));
        let prepared = [&base, &runsc.root].into_iter().try_for_each(|place| private(place)).and_then(|()| {
            fs::set_permissions(&base, fs::Permissions::from_mode(0o755))?;
            fs::write(bundle.join("config.json"), spec::holder(hostname, &base).to_string())
        });
        prepared.map_err(failed("prepare the sandbox"))?;
        let nobody = AgentContainer::default();
        let program = Program { container: &nobody, args: &[], stdin: true, tty: false };
        let enter = || {
            let place = base.join(spec::INSIDE.trim_start_matches('/'));
            let shown = sys::mount("none", "/", "", libc::MS_REC | libc::MS_PRIVATE, "").and_then(|()| {
                let shown = sys::clone_mount(File::open("/")?.as_fd(), Path::new(PROGRAM), false)?;
                sys::attach_mount(shown.as_fd(), File::create(place)?.as_fd())?;
                // By a file there runsc knows the host's own network, which it refuses. New kernels have it in every one, and this
                // is never the host's.
                sys::mount("none", "/proc/sys/net/core", "tmpfs", libc::MS_RDONLY, "size=0")
            });
            shown.map_err(failed("show the agent's program to the sandbox"))
        };
        let started = self.start(&program, libc::CLONE_NEWNS as u64, &base, &[], enter, |program, ends, told| {
            launch::stdio(program, ends, told, 0).map_err(failed("set up the streams"))?;
            monitor::start(&runsc, HOLDER, &bundle)
                .map_err(|_| Failure::Create("no sandbox can be made".to_owned()))?;
            monitor::hold(told.as_raw_fd())
        });
        let Started { pid, pidfd, streams, inside: _ } = started.await.inspect_err(|_| self.report(&bundle))?;
        let ends =
            streams.stdin.zip(streams.stdout).ok_or_else(|| Failure::Create("the sandbox is mute".to_owned()))?;
        let joined = pipe::Sender::from_owned_fd(ends.0)
            .and_then(|to| Ok(tokio::io::join(pipe::Receiver::from_owned_fd(ends.1)?, to)))
            .map_err(failed("speak to the sandbox"))?;
        let (gone, over) = watch::channel(false);
        tokio::spawn(async move {
            launch::ended(&pidfd, pid).await;
            gone.send_replace(true);
        });
        let once = Mutex::new(Some(joined));
        let gone = || io::Error::from(io::ErrorKind::NotConnected);
        let client =
            Client::from_connector("the sandbox", move || std::future::ready(lock(&once).take().ok_or_else(gone)));
        Ok(Holder { runsc, client, over })
    }

    fn runsc(&self, root: PathBuf) -> Runsc {
        Runsc { program: self.runtime.program.clone(), platform: self.runtime.platform.clone(), root }
    }

    /// For the owner of the host: tenants are told less.
    fn report(&self, bundle: &Path) {
        let said = fs::read(bundle.join("log")).unwrap_or_default();
        eprintln!("runsc: {}", monitor::last_error(&said).unwrap_or_else(|| "it said nothing".to_owned()));
    }

    async fn start(
        &self,
        program: &Program<'_>,
        flags: u64,
        root: &Path,
        kept: &[i32],
        enter: impl FnOnce() -> Result<(), Failure>,
        become_it: impl FnOnce(&Program<'_>, Ends, &OwnedFd) -> Result<Never, Failure>,
    ) -> Result<Started, Failure> {
        let entrance = launch::entrance(&self.cgroup)?;
        let how = launch::Clone { flags, into: entrance.as_ref().map(File::as_fd), root };
        let entered = || {
            if how.into.is_none() {
                self.cgroup.join().map_err(failed("join the cgroup"))?;
            }
            sys::best_effort_oom(launch::oom_score(program.container));
            enter()
        };
        launch::start(program, &how, &mut || Ok(()), kept, entered, become_it).await
    }

    /// Starts a container with a fresh writable layer at `upper`, and its program or the one of a hook.
    pub async fn container(
        &self,
        config: &AgentConfig,
        program: &Program<'_>,
        dir: &Path,
        upper: &Path,
    ) -> Result<Started, Failure> {
        let runsc = self.hold(&config.hostname).await?.runsc;
        let container = program.container;
        let id = format!("{}-{}", container.name, self.next.fetch_add(1, Ordering::Relaxed));
        let (bundle, base) = (upper.join("bundle"), upper.join("root"));
        let _ = fs::remove_dir_all(&bundle);
        private(&bundle).map_err(failed("prepare the container"))?;
        let whose = container.target.as_ref().unwrap_or(&container.name).clone();
        let processes = if config.share_processes { Processes::Shared } else { Processes::Of(whose) };
        let user = AtomicU32::new(0);
        let enter = || {
            let root = root::build(config, container, dir, upper, false)?;
            // For terminals, this container's and those of its further processes.
            let terminals = fs::create_dir_all("/dev/pts").and_then(|()| {
                let data = "newinstance,ptmxmode=0666,mode=0620,gid=5";
                sys::mount("devpts", "/dev/pts", "devpts", libc::MS_NOSUID | libc::MS_NOEXEC, data)
            });
            terminals.map_err(failed("make a place for terminals"))?;
            let binds = binds(container, root.as_fd(), &bundle).map_err(failed("show places of the container"))?;
            let (uid, process) = within(root.as_fd(), || describe(program))??;
            let read_only = container.read_only_root;
            let config = spec::container(&process, &config.hostname, (&base, read_only), &binds, &processes);
            fs::write(bundle.join("config.json"), config.to_string()).map_err(failed("describe the container"))?;
            user.store(uid, Ordering::Relaxed);
            Ok(())
        };
        let starting = self.start(program, libc::CLONE_NEWNS as u64, &base, &[], enter, |program, ends, told| {
            begin(program, ends, told, user.load(Ordering::Relaxed))?;
            monitor::start(&runsc, &id, &bundle).map_err(|(_, told)| refused(program, told))?;
            monitor::attend(&runsc, &id, &bundle, told.as_raw_fd())
        });
        let started = match tokio::time::timeout(LIMIT, starting).await {
            Ok(started) => started.inspect_err(|_| self.report(&bundle))?,
            Err(_) => {
                self.cgroup.end_all().await;
                return Err(Failure::Create(format!("the container did not start within {} s", LIMIT.as_secs())));
            }
        };
        let placed = Placed { runsc, id, upper: upper.to_owned(), number: None };
        self.place(started.pid, placed);
        Ok(started)
    }

    /// Starts a further process in the container whose monitor is `init`.
    pub async fn further(&self, program: &Program<'_>, init: u32) -> Result<Started, Failure> {
        let gone = || Failure::Start("container is not running".to_owned());
        let Placed { runsc, id, upper, .. } = self.placed(init).ok_or_else(gone)?;
        let mounts = File::open(format!("/proc/{init}/ns/mnt")).map_err(|_| gone())?;
        let base = upper.join("root");
        let name = format!("exec-{}", self.next.fetch_add(1, Ordering::Relaxed));
        let place = upper.join("bundle").join(&name).with_extension("json");
        let number = place.with_extension("pid");
        let user = AtomicU32::new(0);
        let enter = || {
            sys::setns(mounts.as_fd(), libc::CLONE_NEWNS).map_err(failed("enter the container"))?;
            let root: OwnedFd = File::open(&base).map_err(failed("find the root"))?.into();
            let (uid, process) = within(root.as_fd(), || describe(program))??;
            user.store(uid, Ordering::Relaxed);
            fs::write(&place, process.to_string()).map_err(failed("describe the process"))
        };
        let kept = [mounts.as_raw_fd()];
        let started = self.start(program, 0, &base, &kept, enter, |program, ends, told| {
            begin(program, ends, told, user.load(Ordering::Relaxed))?;
            Err(failed("start runsc")(become_command(runsc.exec(&id, &place, &number))))
        });
        let started = started.await?;
        self.place(started.pid, Placed { runsc: runsc.clone(), id: id.clone(), upper, number: Some(number.clone()) });
        Ok(started)
    }

    fn place(&self, pid: u32, new: Placed) {
        let mut placed = lock(&self.placed);
        // Those that are gone: of a further process nothing tells its end here.
        placed.retain(|pid, _| Path::new("/proc").join(pid.to_string()).exists());
        placed.insert(pid, new);
    }

    fn placed(&self, pid: u32) -> Option<Placed> {
        lock(&self.placed).get(&pid).cloned()
    }

    /// The root of the container whose monitor is `init`, in the monitor's mount namespace.
    pub fn root(&self, init: u32) -> Option<PathBuf> {
        self.placed(init).map(|placed| placed.upper.join("root"))
    }

    /// Signals a container, or kills a further process. What does not hear it in time ends with its sandbox.
    pub fn signal(&self, pid: u32, signal: i32) {
        let Some(Placed { runsc, id, number, .. }) = self.placed(pid) else { return };
        let command = match &number {
            None => runsc.kill(&id, signal),
            Some(number) => match fs::read_to_string(number) {
                Ok(number) => runsc.kill_process(&id, number.trim()),
                // It has not come so far.
                Err(_) => {
                    let _ = sys::kill(pid, libc::SIGKILL);
                    return;
                }
            },
        };
        let cgroup = self.cgroup.clone();
        tokio::spawn(async move {
            let mut command = tokio::process::Command::from(command);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
            let told = command.status();
            let heard = matches!(tokio::time::timeout(SIGNAL_LIMIT, told).await, Ok(Ok(_)));
            if !heard && signal == libc::SIGKILL {
                cgroup.end_all().await;
            }
        });
    }

    /// What all containers together may use, and the sandbox beside them; `None` where one may use as much as there is.
    pub fn limits<'a>(all: impl Iterator<Item = &'a Resources> + Clone) -> Resources {
        let sum = |of: fn(&Resources) -> Option<u64>| all.clone().map(of).sum::<Option<u64>>();
        Resources {
            cpu_milli: sum(|one| one.cpu_milli),
            memory_bytes: sum(|one| one.memory_bytes).map(|bytes| bytes + OVERHEAD),
            pids: sum(|one| one.pids).map(|pids| 2 * pids + THREADS),
            ephemeral_storage_bytes: None,
        }
    }
}

fn private(place: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(place)
}

/// Does `look` with `root` for this process's root, and comes back. This process has one thread.
fn within<T>(root: BorrowedFd<'_>, look: impl FnOnce() -> T) -> Result<T, Failure> {
    let go = |there: BorrowedFd<'_>| -> io::Result<()> {
        sys::fchdir(there)?;
        std::os::unix::fs::chroot(".")
    };
    let outside = File::open("/").map_err(failed("find the way back"))?;
    go(root).map_err(failed("enter the root"))?;
    let seen = look();
    go(outside.as_fd()).map_err(failed("leave the root"))?;
    Ok(seen)
}

/// Who the process will be, and what `runsc` is told of it; from within the root, which also says whether there is such a program.
fn describe(program: &Program<'_>) -> Result<(u32, serde_json::Value), Failure> {
    let container = program.container;
    let identity = launch::resolve(container)?;
    launch::settle(container)?;
    let env = launch::environment(container, &identity, program.tty);
    let name = &program.args[0];
    let mut failure = io::Error::from_raw_os_error(libc::ENOENT);
    let found = launch::candidates(name, &env).into_iter().any(|candidate| match fs::metadata(&candidate) {
        Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => true,
        Ok(_) => {
            failure = io::Error::from_raw_os_error(libc::EACCES);
            false
        }
        Err(_) => false,
    });
    if !found {
        return Err(launch::not_executed(name, &failure));
    }
    let who = Who { args: program.args, env: &env, identity: &identity, terminal: program.tty };
    Ok((identity.uid, spec::process(container, &who)))
}

/// Takes the process's streams upon itself.
fn begin(program: &Program<'_>, ends: Ends, told: &OwnedFd, uid: u32) -> Result<(), Failure> {
    sys::setsid().and_then(|()| launch::stdio(program, ends, told, uid)).map_err(failed("set up the streams"))
}

fn become_command(mut command: Command) -> io::Error {
    sys::default_signals();
    if let Err(error) = sys::cloexec_all() {
        return error;
    }
    command.exec()
}

/// Why a program that is there did not start.
fn refused(program: &Program<'_>, told: Option<String>) -> Failure {
    match told {
        Some(reason) => {
            let message = format!("exec: \"{}\": {reason}", program.args[0]);
            Failure::Program { exit_code: 126, message }
        }
        None => Failure::Create("the container cannot be started in its sandbox".to_owned()),
    }
}

/// Places that gVisor would make itself, and covers: shown to it one by one.
fn binds(container: &AgentContainer, root: BorrowedFd<'_>, bundle: &Path) -> io::Result<Vec<Bind>> {
    let mut binds = vec![Bind { source: PathBuf::from(view::SHM), path: "/dev/shm".to_owned() }];
    let paths = container.mounts.iter().map(|mount| &mount.path).chain([&container.last_words.path]);
    for (number, path) in paths.filter(|path| path.starts_with("/dev/")).enumerate() {
        let place = bundle.join(format!("bind-{number}"));
        root::show_aside(root, Path::new(path), true, &place)?;
        let path = path.trim_end_matches('/').to_owned();
        binds.retain(|known| known.path != path);
        binds.push(Bind { source: place, path });
    }
    let place = bundle.join("tmp");
    match root::show_aside(root, Path::new("tmp"), false, &place) {
        Ok(()) if place.is_dir() => binds.push(Bind { source: place, path: "/tmp".to_owned() }),
        // None, or a link: where that leads is the container's own matter.
        _ => {}
    }
    Ok(binds)
}
