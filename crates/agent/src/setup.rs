//! From the agent's start to its end: its session, cgroup and namespaces, its record, its socket, and the serving of it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use joey_api::agent::{AgentConfig, VERSION};
use joey_api::guest::{CGROUP, INSTANCE};
use joey_api::instance::Limits;
use joey_api::validate::SYSCTLS;
use joey_gvisor::Runtime;
use joey_model::checkpoint;
use tokio::task::JoinHandle;

use crate::cgroup::{Cgroup, UNSAID};
use crate::sandboxed::Sandbox;
use crate::supervisor::Agent;
use crate::view::View;
use crate::{diagnosis, processes, remote, sandboxed, server, sys, view, volumes};

/// How long killed containers may take to end at a shutdown.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

pub struct Options {
    dir: PathBuf,
    netns: Option<PathBuf>,
    /// What runs the containers, where it is not the agent itself.
    runtime: Option<Runtime>,
    /// A durable step at which the agent ends, for tests of recovery.
    crash_at: Option<String>,
}

impl Options {
    /// `--dir DIR [--netns PATH] [--runsc PROGRAM --platform NAME --inside AGENT]`.
    pub fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Self, String> {
        let usage = "usage: joey-agent --dir DIR [--netns PATH] [--runsc PROGRAM --platform NAME --inside AGENT]";
        let (mut dir, mut netns, mut crash_at) = (None, None, None);
        let (mut runsc, mut platform, mut inside) = (None, None, None);
        while let Some(word) = words.next() {
            let value = words.next().map(PathBuf::from).ok_or(usage)?;
            match word.to_str() {
                Some("--dir") => dir = Some(value),
                Some("--netns") => netns = Some(value),
                Some("--runsc") => runsc = Some(value),
                Some("--platform") => platform = value.into_os_string().into_string().ok(),
                Some("--inside") => inside = Some(value),
                Some("--crash-at") => crash_at = value.into_os_string().into_string().ok(),
                _ => return Err(usage.to_owned()),
            }
        }
        let runtime = match (runsc, platform, inside) {
            (Some(program), Some(platform), Some(inside)) => Some(Runtime { program, platform, inside }),
            (None, None, None) => None,
            _ => return Err(usage.to_owned()),
        };
        Ok(Self { dir: dir.ok_or(usage)?, netns, runtime, crash_at })
    }
}

/// Runs the agent until it is told to shut down.
pub fn run(options: &Options) -> Result<(), String> {
    options.crash_at.iter().for_each(checkpoint::arm);
    keep_small();
    let dir = std::path::absolute(&options.dir).map_err(|error| format!("cannot find the directory: {error}"))?;
    let mut config = configuration(&dir)?;
    // Of the host's network namespace: those of the Pod's are listed to its containers, with their paths.
    let socket = joey_rpc::bind_unix(&dir.join("agent.sock")).map_err(|error| format!("cannot listen: {error}"))?;
    isolate(options, &dir, &config).map_err(|error| format!("cannot isolate the agent: {error}"))?;
    checkpoint::reached("agent.isolated");
    tune(&config)?;
    prepare(&dir, &mut config).map_err(|error| format!("cannot prepare the directory: {error}"))?;
    checkpoint::reached("agent.recorded");
    let apart = options.runtime.clone().map(|runtime| Arc::new(Sandbox::new(runtime, &config, &dir)));
    let shared = (config.share_processes && apart.is_none()).then(processes::share).transpose();
    let shared = shared.map_err(|error| format!("cannot share the processes: {error}"))?;
    let mut agent = Agent::new(config, dir, shared);
    agent.apart = apart;
    runtime()?.block_on(serve(Arc::new(agent), socket))
}

/// Keeps an idle agent's memory small, before it has any.
pub fn keep_small() {
    // SAFETY: mallopt takes integers; before any other thread exists. One arena (-8 is M_ARENA_MAX) and early trimming
    // (-1 is M_TRIM_THRESHOLD).
    unsafe {
        libc::mallopt(-8, 1);
        libc::mallopt(-1, 64 << 10);
    }
}

/// The runtime of the agent's one thread.
pub fn runtime() -> Result<tokio::runtime::Runtime, String> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().map_err(|error| format!("cannot start the runtime: {error}"))
}

/// Makes this process, the first one of a machine, the agent of an instance, and starts its containers. Within the runtime.
pub fn in_guest(mut config: AgentConfig) -> Result<(Arc<Agent>, JoinHandle<()>), String> {
    let dir = PathBuf::from(INSTANCE);
    check(&config)?;
    limit(&dir, &config).map_err(|error| format!("cannot limit the containers: {error}"))?;
    sys::sethostname(&config.hostname).map_err(|error| format!("cannot set the host name: {error}"))?;
    tune(&config)?;
    prepare(&dir, &mut config).map_err(|error| format!("cannot prepare the directory: {error}"))?;
    let shared = config.share_processes.then(processes::share).transpose();
    let shared = shared.map_err(|error| format!("cannot share the processes: {error}"))?;
    let agent = Arc::new(Agent::new(config, dir, shared));
    let containers = tokio::spawn(agent.clone().run());
    Ok((agent, containers))
}

/// As [`isolate`], where there is nobody else and nothing is known yet of who comes: the machine's own namespaces are the Pod's.
pub fn settle() -> io::Result<()> {
    let own = Cgroup::new(CGROUP).child("agent");
    own.make()?;
    own.join()?;
    sys::prctl(libc::PR_SET_DUMPABLE, 0)?;
    std::fs::DirBuilder::new().mode(0o700).create(INSTANCE)?;
    view::narrow(Path::new(INSTANCE), BTreeSet::new(), &[], View::Guest)
}

fn configuration(dir: &Path) -> Result<AgentConfig, String> {
    let bytes = std::fs::read(dir.join("agent.json")).map_err(|error| format!("cannot read agent.json: {error}"))?;
    let config: AgentConfig =
        serde_json::from_slice(&bytes).map_err(|error| format!("agent.json is not understood: {error}"))?;
    if config.version != VERSION {
        return Err(format!("agent.json has version {}, this agent knows {VERSION}", config.version));
    }
    check(&config).map(|()| config)
}

/// Names become paths.
fn check(config: &AgentConfig) -> Result<(), String> {
    let known = |name: &str| joey_model::id::check_label("container name", name).is_ok() && name != "agent";
    if let Some(volume) =
        config.volumes.iter().find(|volume| joey_model::id::check_label("volume name", &volume.name).is_err())
    {
        return Err(format!("volume \"{}\" has no valid name", volume.name));
    }
    match config.containers.iter().find(|container| !known(&container.name)) {
        Some(container) => Err(format!("container \"{}\" has no valid name", container.name)),
        None => Ok(()),
    }
}

/// Into a cgroup of the agent's own. On v2 it goes on as a clone that begins there, a child of the daemon as well: to be moved
/// takes the kernel longer than all else the agent does. The process that was started ends.
fn enter_cgroup(config: &AgentConfig) -> io::Result<()> {
    let all = Cgroup::new(&config.cgroup);
    let own = all.child("agent");
    own.make()?;
    let each = config.containers.iter().map(|container| container.resources.cpu_milli.unwrap_or(UNSAID));
    let weighed = all.weigh(config.limits.cpu_milli.unwrap_or_else(|| each.sum()));
    // A host without the controller runs what asks for no limit.
    if config.containers.iter().any(|container| container.resources.cpu_milli.is_some()) {
        weighed?;
    }
    match own.entrance()? {
        None => own.join(),
        Some(place) => match sys::clone(libc::CLONE_PARENT as u64, Some(place.as_fd()))? {
            sys::Cloned::Child => Ok(()),
            sys::Cloned::Parent { .. } => sys::exit_now(0),
        },
    }
}

/// Away from the daemon's session and cgroup, into the Pod's namespaces.
fn isolate(options: &Options, dir: &Path, config: &AgentConfig) -> io::Result<()> {
    // Before there are two: the daemon finds both in one group of processes.
    let _ = sys::setsid();
    enter_cgroup(config)?;
    sys::prctl(libc::PR_SET_NAME, c"joey-agent".as_ptr() as libc::c_ulong)?;
    sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1)?;
    // Its children are seen in containers before they are theirs: nobody there may look into them. Programs start afresh.
    sys::prctl(libc::PR_SET_DUMPABLE, 0)?;
    // And its arguments name places of the host.
    sys::set_title(&format!("joey-agent {}", config.instance))?;
    sys::best_effort_oom(-998);
    limit(dir, config)?;
    match &options.netns {
        Some(path) => sys::setns(File::open(path)?.as_fd(), libc::CLONE_NEWNET)?,
        None => {
            sys::unshare(libc::CLONE_NEWNET)?;
            sys::loopback_up()?;
        }
    }
    sys::unshare(libc::CLONE_NEWUTS | libc::CLONE_NEWIPC | libc::CLONE_NEWNS)?;
    let files = options.runtime.as_ref().map(sandboxed::files).unwrap_or_default();
    view::narrow(dir, view::layers(config), &files, View::Beside)?;
    sys::sethostname(&config.hostname)
}

/// Limits on all containers together.
fn limit(dir: &Path, config: &AgentConfig) -> io::Result<()> {
    match config.limits == Limits::default() {
        true => Ok(()),
        false => Cgroup::of_containers(config).limit_all(&config.limits, dir),
    }
}

/// Kernel settings of the namespaces that this process now has to itself.
fn tune(config: &AgentConfig) -> Result<(), String> {
    for (name, value) in &config.sysctls {
        if !SYSCTLS.contains(&name.as_str()) {
            return Err(format!("sysctl {name} is none of an instance's own"));
        }
        let place = Path::new("/proc/sys").join(name.replace('.', "/"));
        std::fs::write(place, value).map_err(|error| format!("sysctl {name} cannot be set to \"{value}\": {error}"))?;
    }
    Ok(())
}

fn prepare(dir: &Path, config: &mut AgentConfig) -> io::Result<()> {
    let make = |path: &Path| std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    make(Path::new(view::ETC))?;
    // They are there already where the instance has a disk of its own.
    make(&dir.join("upper"))?;
    make(&dir.join("volumes"))?;
    for (name, text) in [
        ("hosts", &config.hosts),
        ("resolv.conf", &config.resolv_conf),
        ("hostname", &format!("{}\n", config.hostname)),
    ] {
        let path = Path::new(view::ETC).join(name);
        let mut file = std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o644).open(path)?;
        file.write_all(text.as_bytes())?;
    }
    // The Pod's containers share their memory files, as in one Kubernetes sandbox.
    make(Path::new(view::SHM))?;
    let closed = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    sys::mount("tmpfs", view::SHM, "tmpfs", closed, "mode=1777,size=65536k")?;
    volumes::prepare(dir, config)?;
    diagnosis::prepare(dir, config)?;
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // Field 22 of proc(5) stat, counted after the name, which may hold anything.
    let start = stat.rfind(')').and_then(|at| stat[at + 1..].split_whitespace().nth(19)).unwrap_or_default();
    let temporary = dir.join("agent.pid.new");
    std::fs::write(&temporary, format!("{} {start}\n", std::process::id()))?;
    std::fs::rename(temporary, dir.join("agent.pid"))
}

async fn serve(agent: Arc<Agent>, socket: std::os::unix::net::UnixListener) -> Result<(), String> {
    let listener = tokio::net::UnixListener::from_std(socket).map_err(|error| format!("cannot listen: {error}"))?;
    let containers = tokio::spawn(agent.clone().run());
    tokio::task::yield_now().await;
    say_ready().map_err(|error| format!("cannot say that the agent is ready: {error}"))?;
    checkpoint::reached("agent.ready");
    let served = agent.clone();
    let service = tower::service_fn(move |request| server::answer(served.clone(), request));
    joey_rpc::serve_unix(listener, service, until_shutdown(&agent, containers)).await;
    Ok(())
}

/// Resolves when the agent was told to end, and its containers have.
pub async fn until_shutdown(agent: &Agent, containers: JoinHandle<()>) {
    agent.shutdown.notified().await;
    agent.stop(Duration::ZERO);
    let _ = tokio::time::timeout(SHUTDOWN_LIMIT, containers).await;
    remote::unmount(agent).await;
    agent.over.send_replace(true);
}

/// Tells the daemon, and lets go of the pipe.
fn say_ready() -> io::Result<()> {
    let mut out = io::stdout();
    // A daemon that died meanwhile is no reason to end.
    let _ = out.write_all(b"ready\n").and_then(|()| out.flush());
    // Standard input is the null device.
    sys::dup2(0, 1)
}
