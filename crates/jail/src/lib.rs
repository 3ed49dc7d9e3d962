//! The start of a virtual machine's monitor in a jail of its own. The monitor is taken for hostile: who breaks out of the machine is
//! its user, in namespaces that hold nothing else, with no right and no way to get one.
//!
//! ```text
//! joey-agent jail ── order ── tap in the Pod's network namespace ── cgroup ── clone into new namespaces ──► files, user, limits ──► monitor
//!                                                                                  │
//!                                                                     record of who it is, end
//! ```

mod bridge;
mod give;
mod link;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use joey_api::vmm::{Bind, Interface, Jail, Order, SENT, TAP};
use joey_kernel::cgroup::Cgroup;
use joey_kernel::identity::{self, Identity};
use joey_kernel::sys;
use libc::{MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_REC};
use serde::de::DeserializeOwned;

/// Where the jail's root is put together: any directory that every host has.
const BASE: &str = "/tmp";
/// What programs need to start, and the monitors' own files: read-only, and the same on every host that has them.
const PROGRAMS: [&str; 5] = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache"];
/// Bytes of a message: layers are among what it names.
const LONGEST: usize = 128 << 10;
/// Attributes of mounts (linux/mount.h).
const RDONLY: u64 = 1;
const NOSUID: u64 = 2;
const NODEV: u64 = 4;
const NOEXEC: u64 = 8;

/// Waits for an order and does it: becomes the monitor, or comes back with what went wrong. Without an order there is nothing to do.
pub fn run() -> Result<(), String> {
    let Some((order, sent)) = receive::<Order>().or_else(told("read what to do"))? else { return Ok(()) };
    match order {
        Order::Start(jail) => start(&jail, sent).map(|never| match never {}),
        Order::Give(giving) => give::run(&giving, sent),
    }
}

enum Never {}

fn told<T>(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> Result<T, String> {
    move |error| Err(format!("cannot {what}: {error}"))
}

fn start(jail: &Jail, sent: Vec<OwnedFd>) -> Result<Never, String> {
    sys::setsid().or_else(told("make a session"))?;
    let tap = jail.netns.as_ref().map(|netns| bridge::tap(netns, jail.mac)).transpose();
    let tap = tap.and_then(|tap| hand_over(jail, tap)).or_else(told("make the machine's interface"))?;
    let cgroup = Cgroup::new(&jail.cgroup);
    cgroup.make().and_then(|()| cgroup.limit(&jail.limits)).or_else(told("make the cgroup"))?;
    let entrance = cgroup.entrance().or_else(told("open the cgroup"))?;
    if entrance.is_none() {
        cgroup.join().or_else(told("join the cgroup"))?;
    }
    let spaces = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let flags = (libc::CLONE_PARENT | spaces) as u64;
    match sys::clone(flags, entrance.as_ref().map(File::as_fd)).or_else(told("make the namespaces"))? {
        sys::Cloned::Child => become_monitor(jail, tap, sent),
        sys::Cloned::Parent { pid, .. } => {
            let recorded = record(&jail.record, pid);
            if recorded.is_err() {
                let _ = sys::kill(pid, libc::SIGKILL);
            }
            recorded.or_else(told("record the monitor"))?;
            sys::exit_now(0)
        }
    }
}

/// Puts the interface where the monitor finds it; what is left is for its descriptors.
fn hand_over(jail: &Jail, tap: Option<OwnedFd>) -> io::Result<Option<OwnedFd>> {
    match (jail.interface, tap) {
        (Interface::Returned, Some(tap)) => {
            sys::send(io::stdin().as_fd(), b"tap", Some(tap.as_raw_fd())).map(|()| None)
        }
        (Interface::Named, Some(tap)) => bridge::leave(tap, jail.user).map(|()| None),
        (_, tap) => Ok(tap),
    }
}

/// Stays with the interface, or makes one, for a monitor that opens it by its name.
fn stay(jail: &Jail) -> io::Result<()> {
    match &jail.netns {
        Some(netns) => sys::setns(File::open(netns)?.as_fd(), libc::CLONE_NEWNET),
        None => bridge::lone_tap().and_then(|tap| bridge::leave(tap, jail.user)),
    }
}

/// The descriptors, each with a message of its own, and then what to do; `None`: nobody wants anything any more.
fn receive<T: DeserializeOwned>() -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let socket = io::stdin();
    let mut sent = Vec::new();
    loop {
        match sys::receive(socket.as_fd(), LONGEST)? {
            Some((_, Some(fd))) => sent.push(fd),
            Some((bytes, None)) => return Ok(Some((serde_json::from_slice(&bytes)?, sent))),
            None => return Ok(None),
        }
    }
}

/// Tells which process it is, for daemons to come. The start is what makes a number that is used again another process.
fn record(place: &Path, pid: u32) -> io::Result<()> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let start = stat.rfind(')').and_then(|at| stat[at + 1..].split_whitespace().nth(19)).unwrap_or_default();
    let temporary = place.with_extension("new");
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    writeln!(file, "{pid} {start}")?;
    fs::rename(temporary, place)
}

fn become_monitor(jail: &Jail, tap: Option<OwnedFd>, sent: Vec<OwnedFd>) -> Result<Never, String> {
    sys::sethostname("vmm").or_else(told("set the host name"))?;
    let tap = match (jail.interface, tap) {
        (Interface::Named, tap) => stay(jail).map(|()| tap),
        (Interface::Descriptor, None) => bridge::lone_tap().map(Some),
        (_, tap) => Ok(tap),
    };
    let tap = tap.or_else(told("give the monitor its interface"))?;
    enter(jail).or_else(told("enter the jail"))?;
    let argument = |text: &str| sys::c(text).or_else(told("pass an argument"));
    let program = sys::c(&jail.program).or_else(told("name the monitor"))?;
    let env = jail.env.iter().map(|pair| argument(pair)).collect::<Result<Vec<_>, _>>()?;
    let mut args = vec![argument(&jail.title)?];
    for arg in &jail.args {
        args.push(argument(arg)?);
    }
    place_descriptors(tap, sent).or_else(told("pass the descriptors"))?;
    sys::lower_limit(libc::RLIMIT_CORE, 0, 0);
    sys::lower_limit(libc::RLIMIT_FSIZE, jail.longest_file, jail.longest_file);
    sys::best_effort_oom(500);
    let user = Identity { uid: jail.user, gid: jail.user, groups: Vec::new(), home: String::new() };
    sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).or_else(told("give up new privileges"))?;
    identity::become_identity(&user, 0).or_else(told("become the monitor's user"))?;
    if jail.shared_memory {
        leave_files_whole().or_else(told("keep the memory's file whole"))?;
    }
    sys::default_signals();
    let error = sys::execve(&program, &args, &env);
    told(format_args!("start {}", jail.program.display()))(error)
}

/// Has fallocate(2) punch no holes from now on but say that it did. QEMU does so to memory that the machine gives back, before it lets
/// go of its own copy (`ram_block_discard_range`), which is all that is to happen where the file is what others begin with.
fn leave_files_whole() -> io::Result<()> {
    const PUNCH: u32 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
    // Offsets in seccomp_data: the number of the call, and the lower half of its second argument.
    const NUMBER: u32 = 0;
    const MODE: u32 = 24;
    let load = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let end = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        step(load, 0, 0, NUMBER),
        step(equal, 0, 3, libc::SYS_fallocate as u32),
        step(load, 0, 0, MODE),
        step(equal, 0, 1, PUNCH),
        // An error that is none.
        step(end, 0, 0, libc::SECCOMP_RET_ERRNO),
        step(end, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program lives through the call, which copies it.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    sys::check(set.into()).map(drop)
}

/// A root in memory with nothing but what the monitor needs.
fn enter(jail: &Jail) -> io::Result<()> {
    sys::mount("none", "/", "", MS_REC | MS_PRIVATE, "")?;
    let top = File::open("/")?;
    // Opened before the place of the new root covers any of them.
    let clone = |from: &Path, attributes: u64| -> io::Result<OwnedFd> {
        let mount = sys::clone_mount(top.as_fd(), from, false)?;
        sys::close_mount(mount.as_fd(), attributes, false)?;
        Ok(mount)
    };
    let mut mounts = Vec::new();
    for path in PROGRAMS.map(Path::new) {
        // Where it is a link, as `/lib` is today, it leads into what is shown.
        if !path.is_symlink() && path.exists() {
            mounts.push((clone(path, RDONLY | NOSUID | NODEV)?, path, path.is_dir()));
        }
    }
    for Bind { from, to, writable } in &jail.files {
        let attributes = NOSUID | NODEV | NOEXEC | if *writable { 0 } else { RDONLY };
        mounts.push((clone(from, attributes)?, to, from.is_dir()));
    }
    sys::mount("tmpfs", BASE, "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=1m")?;
    let base = Path::new(BASE);
    let inside = |path: &Path| base.join(path.strip_prefix("/").unwrap_or(path));
    for (mount, to, directory) in &mounts {
        let place = inside(to);
        match directory {
            true => make_dir(&place)?,
            false => {
                make_dir(place.parent().unwrap_or(base))?;
                File::create(&place)?;
            }
        }
        sys::attach_mount(mount.as_fd(), File::options().read(true).custom_flags(libc::O_PATH).open(place)?.as_fd())?;
    }
    for path in PROGRAMS.map(Path::new).iter().filter(|path| path.is_symlink()) {
        std::os::unix::fs::symlink(fs::read_link(path)?, inside(path))?;
    }
    devices(base, jail)?;
    make_dir(&inside(Path::new("/proc")))?;
    sys::mount("proc", inside(Path::new("/proc")), "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "")?;
    std::env::set_current_dir(base)?;
    drop((mounts, top));
    sys::pivot_to_working_dir()?;
    sys::close_mount(File::open("/")?.as_fd(), RDONLY | NOSUID, false)
}

fn make_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(path)
}

fn devices(base: &Path, jail: &Jail) -> io::Result<()> {
    let dev = base.join("dev");
    make_dir(&dev)?;
    let dir = File::open(&dev)?;
    let nodes = [("null", 1, 3), ("zero", 1, 5), ("urandom", 1, 9)];
    // linux/miscdevice.h: KVM_MINOR.
    for (name, major, minor) in nodes.into_iter().chain(jail.kvm.then_some(("kvm", 10, 232))) {
        sys::device(dir.as_fd(), name, major, minor)?;
    }
    if jail.interface == Interface::Named {
        let net = dev.join("net");
        make_dir(&net)?;
        // linux/miscdevice.h: TUN_MINOR.
        sys::device(File::open(net)?.as_fd(), "tun", 10, 200)?;
    }
    Ok(())
}

/// Puts each descriptor to its number, and lets go of all others.
fn place_descriptors(tap: Option<OwnedFd>, sent: Vec<OwnedFd>) -> io::Result<()> {
    // Away from where they go first.
    let far = |fd: OwnedFd| -> io::Result<OwnedFd> {
        // SAFETY: an open descriptor and integers; the new one is nobody else's.
        unsafe {
            let fd = sys::check(libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 200).into())?;
            Ok(OwnedFd::from_raw_fd(fd as RawFd))
        }
    };
    let tap = tap.map(far).transpose()?;
    let sent = sent.into_iter().map(far).collect::<io::Result<Vec<_>>>()?;
    let null = sys::null_device()?;
    let keep = |fd: BorrowedFd<'_>, number: RawFd| sys::dup2(fd.as_raw_fd(), number).map(|()| number);
    let mut kept = vec![1, 2];
    kept.push(keep(null.as_fd(), 0)?);
    if let Some(tap) = &tap {
        kept.push(keep(tap.as_fd(), TAP)?);
    }
    for (number, fd) in (SENT..).zip(&sent) {
        kept.push(keep(fd.as_fd(), number)?);
    }
    // The one by which who started it waits for what goes wrong closes with the start of the monitor.
    // SAFETY: standard output is open and stays so until then.
    unsafe { libc::fcntl(1, libc::F_SETFD, libc::FD_CLOEXEC) };
    std::mem::forget((tap, sent, null));
    sys::close_all_but(&kept)
}
