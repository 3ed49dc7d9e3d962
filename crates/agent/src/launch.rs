//! Starting processes in containers: the container's own first process, and further ones for exec.
//!
//! The agent has one thread and a small memory, so it clones itself and the child does the rest; nothing is re-executed. A
//! socket that closes on exec carries back a terminal's master side and what went wrong.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use joey_api::agent::{AgentConfig, AgentContainer};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::cgroup::Cgroup;
use crate::collect::Inside;
use crate::identity::Identity;
use crate::{identity, root, sys};

/// Exit codes of a program that is not there and of one that cannot be executed (POSIX, 2.8.2: Exit Status for Commands).
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;
/// Between two looks whether a child that was given up has ended.
const LOOK: Duration = Duration::from_millis(10);

/// Why a process did not start, in words for its user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The specification cannot be met: trying again helps only when the image changes.
    Config(String),
    /// What the container needs could not be made.
    Create(String),
    /// The process could not be brought to where it starts.
    Start(String),
    /// The program is not there (127, as shells say it) or cannot be executed (126).
    Program { exit_code: i32, message: String },
}

impl Failure {
    pub fn message(&self) -> &str {
        let (Self::Config(message) | Self::Create(message) | Self::Start(message) | Self::Program { message, .. }) =
            self;
        message
    }

    /// What a shell would answer with; `None` where it was not the program's fault.
    pub fn exit_code(&self) -> Option<i32> {
        match self {
            Self::Program { exit_code, .. } => Some(*exit_code),
            Self::Config(_) | Self::Create(_) | Self::Start(_) => None,
        }
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Config(_) => b'f',
            Self::Create(_) => b'c',
            Self::Start(_) => b's',
            Self::Program { exit_code: NOT_FOUND, .. } => b'n',
            Self::Program { .. } => b'x',
        }
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes.get(1..).unwrap_or_default()).into_owned();
        match bytes.first() {
            Some(b'f') => Self::Config(text),
            Some(b'c') => Self::Create(text),
            Some(b'n') => Self::Program { exit_code: NOT_FOUND, message: text },
            Some(b'x') => Self::Program { exit_code: NOT_EXECUTABLE, message: text },
            _ => Self::Start(text),
        }
    }
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self::Start(message)
    }
}

/// A process of a container, and the agent's ends of its streams.
pub struct Started {
    pub pid: u32,
    pub pidfd: AsyncFd<OwnedFd>,
    pub streams: Streams,
    /// Where files of it are collected.
    pub inside: Option<Inside>,
}

/// With a terminal all three are its master side.
#[derive(Default)]
pub struct Streams {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    pub terminal: Option<OwnedFd>,
}

pub struct Ends {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// What a process is told to be.
pub struct Program<'a> {
    pub container: &'a AgentContainer,
    pub args: &'a [String],
    pub stdin: bool,
    pub tty: bool,
}

/// Starts a container's first process with a fresh writable layer at `upper`.
pub async fn container(
    config: &AgentConfig,
    program: &Program<'_>,
    dir: &Path,
    upper: &Path,
    cgroup: &Cgroup,
) -> Result<Started, Failure> {
    let entrance = entrance(cgroup)?;
    let flags = (libc::CLONE_NEWPID | libc::CLONE_NEWNS) as u64;
    let how = Clone { flags, into: entrance.as_ref().map(File::as_fd), root: Path::new("/") };
    let entered = || enter(config, program, dir, upper, how.into.is_none().then_some(cgroup));
    start(program, &how, &mut || Ok(()), &[], entered, run).await
}

/// What the first process of a container does before its program; into the cgroup where it did not begin there.
fn enter(
    config: &AgentConfig,
    program: &Program<'_>,
    dir: &Path,
    upper: &Path,
    cgroup: Option<&Cgroup>,
) -> Result<(), Failure> {
    if let Some(cgroup) = cgroup {
        cgroup.join().map_err(|error| format!("cannot join the cgroup: {error}"))?;
    }
    sys::unshare(libc::CLONE_NEWCGROUP).map_err(|error| format!("cannot unshare the cgroup: {error}"))?;
    sys::best_effort_oom(oom_score(program.container));
    root::enter(config, program.container, dir, upper)
}

/// Starts the first process of a container that sees the processes of another one, whose first process is `init`: it is one
/// of them, and ends with them.
pub async fn beside(
    config: &AgentConfig,
    program: &Program<'_>,
    dir: &Path,
    upper: &Path,
    cgroup: &Cgroup,
    init: u32,
) -> Result<Started, Failure> {
    let gone = |_| "the target container is not running".to_owned();
    let pids = File::open(format!("/proc/{init}/ns/pid")).map_err(gone)?;
    let own = File::open("/proc/self/ns/pid").map_err(|error| error.to_string())?;
    let entrance = entrance(cgroup)?;
    let into = entrance.as_ref().map(File::as_fd);
    let how = Clone { flags: libc::CLONE_NEWNS as u64, into, root: Path::new("/") };
    // As for a further process: the agent is there for the moment of one clone.
    sys::setns(pids.as_fd(), libc::CLONE_NEWPID).map_err(gone)?;
    let mut back = || sys::setns(own.as_fd(), libc::CLONE_NEWPID).map_err(|error| error.to_string());
    let entered = || enter(config, program, dir, upper, how.into.is_none().then_some(cgroup));
    start(program, &how, &mut back, &[], entered, run).await
}

/// Starts a further process in the container whose first process is `init`.
pub async fn further(program: &Program<'_>, init: u32, cgroup: &Cgroup) -> Result<Started, Failure> {
    let open =
        |kind: &str| File::open(format!("/proc/{init}/ns/{kind}")).map_err(|_| "container is not running".to_owned());
    let (pids, mounts, cgroups) = (open("pid")?, open("mnt")?, open("cgroup")?);
    let entrance = entrance(cgroup)?;
    let how = Clone { flags: 0, into: entrance.as_ref().map(File::as_fd), root: Path::new("/") };
    let own = File::open("/proc/self/ns/pid").map_err(|error| error.to_string())?;
    // Only children are affected by the pid namespace: the agent steps into it for the moment of one clone.
    sys::setns(pids.as_fd(), libc::CLONE_NEWPID).map_err(|_| "container is not running".to_owned())?;
    let mut back = || sys::setns(own.as_fd(), libc::CLONE_NEWPID).map_err(|error| error.to_string());
    let kept = [mounts.as_raw_fd(), cgroups.as_raw_fd()];
    let entered = || {
        let enter = || -> io::Result<()> {
            if how.into.is_none() {
                cgroup.join()?;
            }
            sys::setns(cgroups.as_fd(), libc::CLONE_NEWCGROUP)?;
            sys::best_effort_oom(oom_score(program.container));
            sys::setns(mounts.as_fd(), libc::CLONE_NEWNS)
        };
        enter().map_err(|error| Failure::Start(format!("cannot enter the container: {error}")))
    };
    start(program, &how, &mut back, &kept, entered, run).await
}

/// Kills a container without a memory limit before any other process, and one with a limit after them: as the kubelet ranks
/// them, without its middle class.
pub fn oom_score(container: &AgentContainer) -> i32 {
    if container.resources.memory_bytes.is_some() { -997 } else { 1000 }
}

/// How a child begins.
pub struct Clone<'a> {
    pub flags: u64,
    /// The v2 cgroup it is in from the start.
    pub into: Option<BorrowedFd<'a>>,
    /// Where the container's root is for it once it has entered.
    pub root: &'a Path,
}

pub fn entrance(cgroup: &Cgroup) -> Result<Option<File>, Failure> {
    cgroup.entrance().map_err(|error| Failure::Create(format!("cannot open the cgroup: {error}")))
}

/// A child on its way to its program. One that nobody waits for any more is killed and reaped.
struct Underway {
    pid: u32,
    arrived: bool,
}

impl Drop for Underway {
    fn drop(&mut self) {
        if self.arrived {
            return;
        }
        let pid = self.pid;
        let _ = sys::kill(pid, libc::SIGKILL);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                while matches!(sys::reap(pid), Ok(None)) {
                    tokio::time::sleep(LOOK).await;
                }
            });
        }
    }
}

/// Clones; in the child closes every descriptor but `kept`, enters the container and becomes the program.
pub async fn start(
    program: &Program<'_>,
    how: &Clone<'_>,
    cloned_once: &mut (dyn FnMut() -> Result<(), String> + Send),
    kept: &[RawFd],
    enter: impl FnOnce() -> Result<(), Failure>,
    become_it: impl FnOnce(&Program<'_>, Ends, &OwnedFd) -> Result<Never, Failure>,
) -> Result<Started, Failure> {
    let prepared = sys::socketpair().and_then(|sockets| Ok((sockets, pipes(program)?)));
    let cloned = prepared.and_then(|prepared| sys::clone(how.flags, how.into).map(|cloned| (prepared, cloned)));
    let (((near, far), (mut streams, ends)), pid, pidfd) = match cloned {
        Ok((prepared, sys::Cloned::Parent { pid, pidfd })) => (prepared, pid, pidfd),
        Ok((((_near, far), (streams, ends)), sys::Cloned::Child)) => {
            // This child never returns, so nothing drops what is closed behind its owner's back.
            std::mem::forget(streams);
            let mut kept = kept.to_vec();
            kept.extend([&ends.stdin, &ends.stdout, &ends.stderr].into_iter().flatten().map(AsRawFd::as_raw_fd));
            kept.push(far.as_raw_fd());
            // The agent's own descriptors lead to the host: nothing that the container decides on happens before they are gone.
            let closed = sys::close_all_but(&kept).map_err(|error| format!("cannot close the descriptors: {error}"));
            let entered = closed.map_err(Failure::Start).and_then(|()| enter()).and_then(|()| {
                // Only of a container's first process, which has a mount namespace of its own.
                let shown = how.flags & libc::CLONE_NEWNS as u64 != 0 && !program.container.collected.files.is_empty();
                if shown { show(&far, how.root) } else { Ok(()) }
            });
            let failure = match entered {
                Ok(()) => match become_it(program, ends, &far) {
                    Ok(never) => match never {},
                    Err(failure) => failure,
                },
                Err(failure) => failure,
            };
            let mut message = vec![failure.kind()];
            message.extend(failure.message().bytes().take(4000));
            let _ = sys::send(far.as_fd(), &message, None);
            sys::exit_now(127)
        }
        Err(error) => {
            cloned_once()?;
            return Err(Failure::Create(format!("cannot start a process: {error}")));
        }
    };
    let mut child = Underway { pid, arrived: false };
    cloned_once()?;
    drop((far, ends));
    let watch = |fd: OwnedFd| -> io::Result<AsyncFd<OwnedFd>> {
        sys::set_nonblocking(fd.as_fd())?;
        // SAFETY: an OwnedFd names the same open descriptor for as long as it lives.
        unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
    };
    let pidfd = watch(pidfd).map_err(|error| error.to_string())?;
    let near = watch(near).map_err(|error| error.to_string())?;
    let (mut failure, mut root, mut mounts) = (None, None, None);
    while let Ok(Some((message, fd))) =
        near.async_io(Interest::READABLE, |socket| sys::receive(socket.as_fd(), 4096)).await
    {
        match fd {
            Some(fd) if message == ROOT => root = Some(fd),
            Some(fd) if message == MOUNTS => mounts = Some(fd),
            Some(fd) => terminal(&mut streams, fd).map_err(|error| error.to_string())?,
            None => failure = Some(Failure::from_bytes(&message)),
        }
    }
    match failure {
        Some(failure) => {
            let _ = ended(&pidfd, pid).await;
            child.arrived = true;
            Err(failure)
        }
        None => {
            child.arrived = true;
            let inside = root.zip(mounts).map(|(root, mounts)| Inside { root, _mounts: mounts });
            Ok(Started { pid, pidfd, streams, inside })
        }
    }
}

/// What goes with the descriptors that [`show`] sends.
const ROOT: &[u8] = b"root";
const MOUNTS: &[u8] = b"mounts";

/// The child shows the agent its files before it becomes a program that may end at any moment.
fn show(status: &OwnedFd, root: &Path) -> Result<(), Failure> {
    let shown = [(ROOT, root), (MOUNTS, Path::new("/proc/self/ns/mnt"))].into_iter().try_for_each(|(word, path)| {
        let fd = File::open(path)?;
        sys::send(status.as_fd(), word, Some(fd.as_raw_fd()))
    });
    shown.map_err(|error| Failure::Start(format!("cannot show the files: {error}")))
}

/// Waits for the end of a child: exit code, and the signal that ended it.
pub async fn ended(pidfd: &AsyncFd<OwnedFd>, pid: u32) -> (i32, Option<i32>) {
    loop {
        let Ok(mut ready) = pidfd.readable().await else { return (255, None) };
        match sys::reap(pid) {
            Ok(Some(end)) => return end,
            Ok(None) => ready.clear_ready(),
            Err(_) => return (255, None),
        }
    }
}

fn terminal(streams: &mut Streams, master: OwnedFd) -> io::Result<()> {
    streams.stdin = Some(master.try_clone()?);
    streams.stdout = Some(master.try_clone()?);
    streams.terminal = Some(master);
    Ok(())
}

fn pipes(program: &Program<'_>) -> io::Result<(Streams, Ends)> {
    let (mut streams, mut ends) = (Streams::default(), Ends { stdin: None, stdout: None, stderr: None });
    if program.tty {
        return Ok((streams, ends));
    }
    if program.stdin {
        let (reader, writer) = io::pipe()?;
        (ends.stdin, streams.stdin) = (Some(reader.into()), Some(writer.into()));
    }
    let (reader, writer) = io::pipe()?;
    (streams.stdout, ends.stdout) = (Some(reader.into()), Some(writer.into()));
    let (reader, writer) = io::pipe()?;
    (streams.stderr, ends.stderr) = (Some(reader.into()), Some(writer.into()));
    Ok((streams, ends))
}

pub enum Never {}

/// The child, inside the container: gives everything up and becomes the program.
fn run(program: &Program<'_>, ends: Ends, status: &OwnedFd) -> Result<Never, Failure> {
    let said = |what: &'static str| move |error: io::Error| format!("cannot {what}: {error}");
    let container = program.container;
    // SAFETY: umask takes an integer and cannot fail.
    unsafe { libc::umask(0o022) };
    sys::setsid().map_err(said("make a session"))?;
    let identity = resolve(container)?;
    stdio(program, ends, status, identity.uid).map_err(said("set up the streams"))?;
    settle(container)?;
    let env = environment(container, &identity, program.tty);
    let candidates = candidates(&program.args[0], &env);
    let strings = |list: &[String]| list.iter().map(sys::c).collect::<io::Result<Vec<CString>>>();
    let args = strings(program.args).map_err(|_| "an argument holds a zero byte".to_owned())?;
    let env = strings(&env).map_err(|_| "a variable holds a zero byte".to_owned())?;
    if container.no_new_privileges {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map_err(said("give up new privileges"))?;
    }
    joey_seccomp::install().map_err(said("install the seccomp filter"))?;
    identity::become_identity(&identity, identity::capability_bits(&container.capabilities))
        .map_err(said("become the container's user"))?;
    sys::default_signals();
    // What programs expect to start with, as under containerd: few descriptors until they ask for more, no core files.
    sys::lower_limit(libc::RLIMIT_NOFILE, 1024, 524_288);
    sys::lower_limit(libc::RLIMIT_CORE, 0, u64::MAX);
    sys::cloexec_all().map_err(said("close the descriptors"))?;
    let mut failure = io::Error::from_raw_os_error(libc::ENOENT);
    for candidate in candidates {
        let Ok(path) = sys::c(&candidate) else { continue };
        let error = sys::execve(&path, &args, &env);
        if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) {
            failure = error;
        }
    }
    Err(not_executed(&program.args[0], &failure))
}

/// Who a container's process is, from within its root.
pub fn resolve(container: &AgentContainer) -> Result<Identity, Failure> {
    let (groups, strict) = (&container.supplemental_groups, container.strict_groups);
    let identity = identity::resolve(&container.user, groups, strict).map_err(Failure::Create)?;
    match container.run_as_non_root && identity.uid == 0 {
        true => Err(Failure::Config("container has runAsNonRoot and image will run as root".to_owned())),
        false => Ok(identity),
    }
}

/// Goes to the working directory, which is made where it is missing, from within the root.
pub fn settle(container: &AgentContainer) -> Result<(), Failure> {
    let working_dir = if container.working_dir.is_empty() { "/" } else { &container.working_dir };
    std::fs::create_dir_all(working_dir)
        .and_then(|()| std::env::set_current_dir(working_dir))
        .map_err(|error| format!("cannot change to working directory {working_dir}: {error}"))?;
    match std::env::current_dir().is_ok_and(|dir| dir.is_absolute()) {
        true => Ok(()),
        false => Err(Failure::Start(format!("working directory {working_dir} is outside of the root"))),
    }
}

pub fn not_executed(name: &str, failure: &io::Error) -> Failure {
    let message = match failure.raw_os_error() {
        Some(libc::ENOENT) if name.contains('/') => format!("exec: \"{name}\": no such file or directory: not found"),
        Some(libc::ENOENT) => format!("exec: \"{name}\": executable file not found in $PATH: not found"),
        Some(libc::ENOEXEC) => format!("exec: \"{name}\": exec format error"),
        Some(libc::EACCES) => format!("exec: \"{name}\": permission denied"),
        _ => format!("exec: \"{name}\": {failure}"),
    };
    let exit_code = if failure.raw_os_error() == Some(libc::ENOENT) { NOT_FOUND } else { NOT_EXECUTABLE };
    Failure::Program { exit_code, message }
}

pub fn stdio(program: &Program<'_>, ends: Ends, status: &OwnedFd, uid: u32) -> io::Result<()> {
    if program.tty {
        let (master, slave) = sys::open_terminal()?;
        std::os::unix::fs::fchown(&slave, Some(uid), None)?;
        sys::send(status.as_fd(), b"tty", Some(master.as_raw_fd()))?;
        for fd in 0..3 {
            sys::dup2(slave.as_raw_fd(), fd)?;
        }
        return sys::control_terminal();
    }
    let null = sys::null_device()?;
    for (fd, end) in [(0, &ends.stdin), (1, &ends.stdout), (2, &ends.stderr)] {
        if let Some(end) = end {
            // /dev/stdout and its kin are opened anew by the container's user.
            std::os::unix::fs::fchown(end, Some(uid), None)?;
        }
        sys::dup2(end.as_ref().map_or(null.as_raw_fd(), |end| end.as_raw_fd()), fd)?;
    }
    Ok(())
}

pub fn environment(container: &AgentContainer, identity: &Identity, tty: bool) -> Vec<String> {
    let mut env = container.env.clone();
    let mut default = |name: &str, value: &str| {
        if !env.iter().any(|line| line.split('=').next() == Some(name)) {
            env.push(format!("{name}={value}"));
        }
    };
    default("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    default("HOME", &identity.home);
    if tty {
        default("TERM", "xterm");
    }
    env
}

pub fn candidates(name: &str, env: &[String]) -> Vec<PathBuf> {
    if name.contains('/') {
        return vec![PathBuf::from(name)];
    }
    let path = env.iter().find_map(|line| line.strip_prefix("PATH=")).unwrap_or_default();
    path.split(':').filter(|dir| dir.starts_with('/')).map(|dir| Path::new(dir).join(name)).collect()
}
