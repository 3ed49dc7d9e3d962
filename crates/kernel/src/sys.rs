//! System calls that the standard library does not have, each as a safe function. No policy lives here.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A path or text as a C string.
pub fn c(text: impl AsRef<std::ffi::OsStr>) -> io::Result<CString> {
    CString::new(text.as_ref().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

pub fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// What a clone gives: in the parent the child's pid and a pidfd on it.
pub enum Cloned {
    Child,
    Parent { pid: u32, pidfd: OwnedFd },
}

/// clone3(2) as fork(2) with `flags`, the child in the v2 cgroup `into` from its first moment where one is given. The process
/// must have one thread.
pub fn clone(flags: u64, into: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: RawFd = -1;
    let signal = if flags & libc::CLONE_PARENT as u64 == 0 { libc::SIGCHLD as u64 } else { 0 };
    let flags = flags | libc::CLONE_PIDFD as u64 | if into.is_some() { CLONE_INTO_CGROUP } else { 0 };
    let cgroup = into.map_or(0, |fd| fd.as_raw_fd() as u64);
    let arguments: [u64; 11] = [flags, std::ptr::addr_of_mut!(pidfd) as u64, 0, 0, signal, 0, 0, 0, 0, 0, cgroup];
    // SAFETY: the structure has clone3's layout (version 2) and lives through the call; no stack is given, so the child
    // goes on with a copy of this one, as after fork. There is one thread, so no lock is held by anybody else.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), std::mem::size_of_val(&arguments)) })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: the kernel put a new descriptor there that belongs to nobody else.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Cloned::Parent { pid: pid as u32, pidfd })
}

/// Ends this process at once, without running anything at exit.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit never returns and touches no memory.
    unsafe { libc::_exit(code) }
}

pub fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::unshare(flags) }.into()).map(drop)
}

pub fn setns(fd: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: an open descriptor and an integer.
    check(unsafe { libc::setns(fd.as_raw_fd(), flags) }.into()).map(drop)
}

pub fn mount(
    source: impl AsRef<std::ffi::OsStr>,
    target: impl AsRef<std::ffi::OsStr>,
    kind: &str,
    flags: libc::c_ulong,
    data: &str,
) -> io::Result<()> {
    let (source, target, kind, data) = (c(source)?, c(target)?, c(kind)?, c(data)?);
    // SAFETY: four C strings that live through the call.
    let done = unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast::<libc::c_void>())
    };
    check(done.into()).map(drop)
}

pub fn unmount(place: impl AsRef<std::ffi::OsStr>) -> io::Result<()> {
    let place = c(place)?;
    // SAFETY: a C string that lives through the call, and no flags.
    check(unsafe { libc::umount2(place.as_ptr(), 0) }.into()).map(drop)
}

/// pivot_root(".", ".") and away with what was the root: the working directory becomes the root.
pub fn pivot_to_working_dir() -> io::Result<()> {
    // SAFETY: C strings that live for ever.
    unsafe {
        check(libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()))?;
        check(libc::umount2(c".".as_ptr(), libc::MNT_DETACH).into())?;
        check(libc::chdir(c"/".as_ptr()).into()).map(drop)
    }
}

/// A new mount, attached nowhere, that shows what is at `path` below `dir` (the place itself: an empty path).
pub fn clone_mount(dir: BorrowedFd<'_>, path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = c(path)?;
    // OPEN_TREE_CLONE is 1.
    let flags = 1 | libc::O_CLOEXEC | libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: an open descriptor and a C string that lives through the call.
    let fd = check(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) })?;
    // SAFETY: a new descriptor that belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Adds attributes to the mount whose root `mount` is: MOUNT_ATTR_RDONLY = 1, NOSUID = 2, NODEV = 4, NOEXEC = 8.
pub fn close_mount(mount: BorrowedFd<'_>, attributes: u64, recursive: bool) -> io::Result<()> {
    let wanted: [u64; 4] = [attributes, 0, 0, 0];
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    let size = std::mem::size_of_val(&wanted);
    // SAFETY: the four words are `struct mount_attr`; they and the path live through the call.
    check(unsafe {
        libc::syscall(libc::SYS_mount_setattr, mount.as_raw_fd(), c"".as_ptr(), flags, wanted.as_ptr(), size)
    })
    .map(drop)
}

/// Attaches a mount at an open place: no path is walked, so nobody can lead it elsewhere.
pub fn attach_mount(mount: BorrowedFd<'_>, place: BorrowedFd<'_>) -> io::Result<()> {
    // MOVE_MOUNT_F_EMPTY_PATH and MOVE_MOUNT_T_EMPTY_PATH.
    let (empty, flags) = (c"".as_ptr(), 0x44);
    // SAFETY: open descriptors and a C string that lives for ever.
    check(unsafe { libc::syscall(libc::SYS_move_mount, mount.as_raw_fd(), empty, place.as_raw_fd(), empty, flags) })
        .map(drop)
}

/// Makes a character device with this mode, whatever the umask.
pub fn device(dir: BorrowedFd<'_>, name: &str, major: u32, minor: u32) -> io::Result<()> {
    let name = c(name)?;
    // SAFETY: an open descriptor and a C string that lives through both calls.
    unsafe {
        let number = libc::makedev(major, minor);
        check(libc::mknodat(dir.as_raw_fd(), name.as_ptr(), libc::S_IFCHR | 0o666, number).into())?;
        check(libc::fchmodat(dir.as_raw_fd(), name.as_ptr(), 0o666, 0).into()).map(drop)
    }
}

/// The type of the file system that an open file is on, as in statfs(2).
pub fn filesystem(fd: BorrowedFd<'_>) -> io::Result<i64> {
    // SAFETY: the zeroed structure lives through the call, which fills it.
    unsafe {
        let mut found: libc::statfs = std::mem::zeroed();
        check(libc::fstatfs(fd.as_raw_fd(), &mut found).into())?;
        Ok(found.f_type as i64)
    }
}

pub fn fchdir(dir: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: an open descriptor.
    check(unsafe { libc::fchdir(dir.as_raw_fd()) }.into()).map(drop)
}

/// Where a link leads that was opened with O_PATH | O_NOFOLLOW.
pub fn read_link(link: BorrowedFd<'_>) -> io::Result<std::path::PathBuf> {
    let mut text = vec![0u8; 4096];
    // SAFETY: the buffer lives through the call and its length is told.
    let length = check(unsafe {
        libc::readlinkat(link.as_raw_fd(), c"".as_ptr(), text.as_mut_ptr().cast(), text.len()) as libc::c_long
    })?;
    text.truncate(length as usize);
    Ok(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(text).into())
}

/// Closes every descriptor from 3 on but these. What owned them must not be used or dropped any more.
pub fn close_all_but(kept: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<u32> = kept.iter().filter_map(|&fd| u32::try_from(fd).ok()).collect();
    kept.sort_unstable();
    kept.push(u32::MAX);
    let mut first = 3;
    for fd in kept {
        if fd > first {
            // SAFETY: integers only. The caller gives the descriptors up.
            check(unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) })?;
        }
        first = first.max(fd.saturating_add(1));
    }
    Ok(())
}

/// Sets a limit as far as this process may: the hard limit never grows.
pub fn lower_limit(resource: libc::__rlimit_resource_t, soft: u64, hard: u64) {
    // SAFETY: the structure lives through both calls.
    unsafe {
        let mut now: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(resource, &mut now) == 0 {
            now.rlim_max = now.rlim_max.min(hard);
            now.rlim_cur = now.rlim_max.min(soft);
            libc::setrlimit(resource, &now);
        }
    }
}

/// openat2(2) with `resolve` bits (RESOLVE_NO_MAGICLINKS = 0x02, RESOLVE_NO_SYMLINKS = 0x04, RESOLVE_IN_ROOT = 0x10).
pub fn openat2(dir: BorrowedFd<'_>, path: &Path, flags: libc::c_int, resolve: u64) -> io::Result<OwnedFd> {
    let path = c(path)?;
    let how: [u64; 3] = [(flags | libc::O_CLOEXEC) as u64, 0, resolve];
    // SAFETY: the three words are `struct open_how`; path and structure live through the call.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_openat2, dir.as_raw_fd(), path.as_ptr(), how.as_ptr(), std::mem::size_of_val(&how))
    })?;
    // SAFETY: a new descriptor that belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

pub fn mkdirat(dir: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
    let name = c(name)?;
    // SAFETY: an open descriptor and a C string.
    check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), 0o755) }.into()).map(drop)
}

/// Makes an empty file, mode 0644; never follows a link.
pub fn touchat(dir: BorrowedFd<'_>, name: &Path) -> io::Result<OwnedFd> {
    let name = c(name)?;
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_WRONLY;
    // SAFETY: an open descriptor and a C string.
    let fd = check(unsafe { libc::openat(dir.as_raw_fd(), name.as_ptr(), flags, 0o644) }.into())?;
    // SAFETY: a new descriptor that belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

pub fn dup2(from: RawFd, to: RawFd) -> io::Result<()> {
    // SAFETY: dup2 replaces only `to`, which the caller gives away.
    check(unsafe { libc::dup2(from, to) }.into()).map(drop)
}

/// Marks every descriptor from 3 on close-on-exec.
pub fn cloexec_all() -> io::Result<()> {
    // SAFETY: integers only; flag 4 is CLOSE_RANGE_CLOEXEC.
    check(unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 4) }).map(drop)
}

pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: fcntl with integers on an open descriptor.
    unsafe {
        let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL).into())?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags as libc::c_int | libc::O_NONBLOCK).into()).map(drop)
    }
}

pub fn prctl(option: libc::c_int, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: only options with integer arguments are used in this crate.
    check(unsafe { libc::prctl(option, argument, 0, 0, 0) }.into()).map(drop)
}

pub fn setsid() -> io::Result<()> {
    // SAFETY: takes nothing.
    check(unsafe { libc::setsid() }.into()).map(drop)
}

pub fn sethostname(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length of a living string.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }.into()).map(drop)
}

pub fn kill(pid: u32, signal: i32) -> io::Result<()> {
    // SAFETY: integers only; the pid is that of a child that was not reaped yet.
    check(unsafe { libc::kill(pid as libc::pid_t, signal) }.into()).map(drop)
}

/// Sends a signal to a whole process group.
pub fn kill_group(leader: u32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes integers.
    check(unsafe { libc::kill(-(leader as libc::pid_t), signal) }.into()).map(drop)
}

/// A process that is not a child: held, so that its number cannot come to mean another one.
pub struct Target {
    pid: u32,
    fd: OwnedFd,
}

impl Target {
    /// `None`: there is none.
    pub fn open(pid: u32) -> Option<Self> {
        // SAFETY: pidfd_open takes two integers and gives a new descriptor that belongs to nobody else, or -1.
        let fd = unsafe {
            let fd = check(libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0)).ok()?;
            OwnedFd::from_raw_fd(fd as RawFd)
        };
        Some(Self { pid, fd })
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn kill(&self) {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: an open descriptor and integers; no siginfo is passed. One that has ended is no error.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.fd.as_raw_fd(), libc::SIGKILL, none, 0) };
    }
}

/// Writes over the arguments of this process, which everybody may read who sees it.
pub fn set_title(title: &str) -> io::Result<()> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // Fields 48 and 49 of proc(5) stat, counted after the name, which may hold anything.
    let fields = stat.rfind(')').map_or("", |at| &stat[at + 1..]);
    let mut ends = fields.split_whitespace().skip(45).take(2).filter_map(|field| field.parse::<usize>().ok());
    let (Some(start), Some(end)) = (ends.next(), ends.next()) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    let length = end.saturating_sub(start);
    if start == 0 || length < 2 {
        return Ok(());
    }
    let title = &title.as_bytes()[..title.len().min(length - 1)];
    // SAFETY: the kernel says that this stack of ours holds the arguments from `start` to `end`; they were read already, and
    // who reads them again finds the title, ended by zeros.
    unsafe {
        let place = start as *mut u8;
        std::ptr::write_bytes(place, 0, length);
        std::ptr::copy_nonoverlapping(title.as_ptr(), place, title.len());
    }
    Ok(())
}

/// Children that end are gone at once: nobody has to wait for them.
pub fn ignore_children() {
    // SAFETY: SIG_IGN is a valid disposition.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Waits for a signal.
pub fn pause() {
    // SAFETY: takes nothing.
    unsafe { libc::pause() };
}

/// Takes the end of a child: exit code, or the signal that ended it. `None`: it still runs.
pub fn reap(pid: u32) -> io::Result<Option<(i32, Option<i32>)>> {
    let mut status = 0;
    // SAFETY: the status word lives through the call. __WALL also waits for children that send no SIGCHLD.
    let found = check(unsafe { libc::waitpid(pid as libc::pid_t, &mut status, libc::WNOHANG | libc::__WALL) }.into())?;
    Ok(match found {
        0 => None,
        _ if libc::WIFSIGNALED(status) => Some((128 + libc::WTERMSIG(status), Some(libc::WTERMSIG(status)))),
        _ => Some((libc::WEXITSTATUS(status), None)),
    })
}

/// Signals as a fresh program expects them: nothing blocked, SIGPIPE as it is by default.
pub fn default_signals() {
    // SAFETY: an empty set is made and used; SIG_DFL is a valid disposition.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
        for signal in 1..=31 {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
}

/// A connected pair of sockets that keep message borders, close-on-exec.
pub fn socketpair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut pair = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: room for two descriptors.
    let made = unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr()) };
    check(made.into())?;
    // SAFETY: two new descriptors that belong to nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1])) })
}

/// Sends a message, with a descriptor where one is given.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<RawFd>) -> io::Result<()> {
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = [0u64; 4];
    // SAFETY: all parts live through the call; the control buffer (32 bytes, aligned) has room for one descriptor (24).
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut part;
        message.msg_iovlen = 1;
        if let Some(fd) = fd {
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(4) as _;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(4) as _;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd);
        }
        check(libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) as libc::c_long).map(drop)
    }
}

/// Receives a message of at most `longest` bytes, with a descriptor where one came along. Nothing at the end.
pub fn receive(socket: BorrowedFd<'_>, longest: usize) -> io::Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
    let mut bytes = vec![0u8; longest];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut control = [0u64; 4];
    // SAFETY: all parts live through the call; a descriptor that arrives is new and belongs to nobody else.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = std::mem::size_of_val(&control) as _;
        let count = check(libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) as libc::c_long)?;
        let header = libc::CMSG_FIRSTHDR(&message);
        let fd = (!header.is_null() && (*header).cmsg_type == libc::SCM_RIGHTS)
            .then(|| OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned()));
        bytes.truncate(count as usize);
        Ok((count > 0).then_some((bytes, fd)))
    }
}

/// Replaces the program; returns only with an error.
pub fn execve(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end in null and, with the strings, live through the call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

fn open_plain(path: &str) -> io::Result<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt;
    // Read and write: not even a pipe by that name would make this wait.
    let flags = libc::O_NOFOLLOW | libc::O_NOCTTY;
    std::fs::OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).map(OwnedFd::from)
}

/// The container's /dev/null, when it is what it says.
pub fn null_device() -> io::Result<OwnedFd> {
    use std::os::unix::fs::MetadataExt;
    let null = std::fs::File::from(open_plain("/dev/null")?);
    match null.metadata()?.rdev() == libc::makedev(1, 3) {
        true => Ok(null.into()),
        false => Err(io::Error::new(io::ErrorKind::NotFound, "/dev/null is not the null device")),
    }
}

/// Sets this process's place in the kernel's choice of victims; lowering it needs a capability that a host may not have.
pub fn best_effort_oom(score: i32) {
    let _ = std::fs::write("/proc/self/oom_score_adj", score.to_string());
}

/// Opens a new pseudo-terminal of the devpts below /dev/pts: master and slave, close-on-exec.
pub fn open_terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let master = open_plain("/dev/pts/ptmx")?;
    // DEVPTS_SUPER_MAGIC: a volume there could hold anything.
    if filesystem(master.as_fd())? != 0x1cd1 {
        return Err(io::Error::new(io::ErrorKind::NotFound, "/dev/pts holds no terminals"));
    }
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads an integer; TIOCGPTPEER takes open flags and gives a new descriptor.
    unsafe {
        check(libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &unlock).into())?;
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        let slave = check(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags).into())?;
        Ok((master, OwnedFd::from_raw_fd(slave as RawFd)))
    }
}

/// Makes the terminal on descriptor 0 the controlling one of this session.
pub fn control_terminal() -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }.into()).map(drop)
}

pub fn resize_terminal(master: BorrowedFd<'_>, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads the structure.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) }.into()).map(drop)
}

/// Brings the loopback interface of this network namespace up.
pub fn loopback_up() -> io::Result<()> {
    // SAFETY: the request structure is zeroed, named `lo`, and lives through both calls; the socket is closed by its owner.
    unsafe {
        let fd = check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0).into())?;
        let socket = OwnedFd::from_raw_fd(fd as RawFd);
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request).into()).map(drop)
    }
}
