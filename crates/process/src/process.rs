//! A process of this host that is known for certain: by pid and start time, held by a pidfd, so that a reused pid is never it.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this code.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

/// A process that was alive when it was opened.
pub struct Process {
    pid: u32,
    fd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Opens the process that now has this pid.
    pub fn open(pid: u32) -> io::Result<Self> {
        let pid_argument = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
        // SAFETY: pidfd_open takes two integers and gives a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid_argument, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else. The kernel sets close-on-exec on it.
        let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) };
        // SAFETY: an OwnedFd names the same open descriptor for as long as it lives.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)?;
        Ok(Self { pid, fd })
    }

    /// The process recorded in the file as `PID START`; `None` when there is no record or the process is gone.
    pub fn recorded(path: &Path) -> io::Result<Option<Self>> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut words = text.split_whitespace();
        let pid = words.next().and_then(|word| word.parse::<u32>().ok());
        let start = words.next().and_then(|word| word.parse::<u64>().ok());
        let (Some(pid), Some(start)) = (pid, start) else { return Ok(None) };
        let process = match Self::open(pid) {
            Ok(process) => process,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // The start time is read after opening: when it is right, the descriptor is the right process's.
        Ok(matches!(stat(pid), Some((now, state)) if now == start && state != 'Z').then_some(process))
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// SIGKILL; a process that has ended already is no error.
    pub fn kill(&self) {
        self.signal(libc::SIGKILL);
    }

    /// Whether its pid is still its own: it lives, or its end has not been taken.
    pub fn is_there(&self) -> bool {
        self.signal(0)
    }

    fn signal(&self, signal: libc::c_int) -> bool {
        let (fd, no_info) = (self.fd.get_ref().as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
        // SAFETY: the descriptor is open; no siginfo is passed.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, no_info, 0) == 0 }
    }

    /// Takes the end of a process that has ended, where it is a child of this one; elsewhere somebody else does.
    pub fn reap(&self) -> Option<Ended> {
        // SAFETY: the descriptor is open, and the zeroed structure lives through the call, which fills it.
        unsafe {
            let mut end: libc::siginfo_t = std::mem::zeroed();
            let fd = self.fd.get_ref().as_raw_fd() as libc::id_t;
            let taken = libc::waitid(libc::P_PIDFD, fd, &mut end, libc::WEXITED | libc::WNOHANG);
            if taken != 0 || end.si_pid() == 0 {
                return None;
            }
            match end.si_code {
                libc::CLD_EXITED => Some(Ended::Exited(end.si_status())),
                _ => Some(Ended::Killed(end.si_status())),
            }
        }
    }

    /// Resolves when the process has ended (it may still be a zombie).
    pub async fn ended(&self) {
        // An error would be the reactor's end, together with the runtime's.
        let _ = self.fd.readable().await;
    }
}

/// Start time in clock ticks since boot (field 22 of proc(5) stat) and state of a process.
fn stat(pid: u32) -> Option<(u64, char)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text[text.rfind(')')? + 1..].split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((fields.nth(18)?.parse().ok()?, state))
}
