//! The namespace of processes that the containers of one Pod share, and the process that holds it: its first one, which takes
//! in what containers leave behind. It sees nothing, can do nothing, and nobody inside can end it.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;

use libc::{MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_RDONLY, MS_REC};

use crate::identity::{self, Identity};
use crate::sys;

/// The kernel's number for nobody in particular.
const NOBODY: u32 = 65_534;

/// Makes the namespace; its first process, as the agent sees it.
pub fn share() -> io::Result<u32> {
    let (mut reader, writer) = io::pipe()?;
    match sys::clone((libc::CLONE_NEWPID | libc::CLONE_NEWNS) as u64, None)? {
        sys::Cloned::Child => {
            let failed = hold(writer);
            eprintln!("cannot hold the namespace of processes: {failed}");
            sys::exit_now(1)
        }
        sys::Cloned::Parent { pid, .. } => {
            drop(writer);
            // It says a byte when it has let go of everything, and nothing when it cannot.
            reader.read_exact(&mut [0]).map_err(|_| io::Error::other("the namespace of processes is not held"))?;
            Ok(pid)
        }
    }
}

/// Stays for ever; comes back with what went wrong before.
fn hold(mut ready: io::PipeWriter) -> io::Error {
    let mut leave = || -> io::Result<()> {
        sys::close_all_but(&[ready.as_raw_fd()])?;
        sys::setsid()?;
        // What it had for input leads nowhere, and so does the rest from now on.
        sys::dup2(0, 1)?;
        sys::prctl(libc::PR_SET_NAME, c"pause".as_ptr() as libc::c_ulong)?;
        sys::set_title("pause")?;
        // Whoever sees a process sees its mounts: this one has an empty root.
        sys::mount("none", "/", "", MS_REC | MS_PRIVATE, "")?;
        let closed = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC;
        sys::mount("tmpfs", "/proc", "tmpfs", closed, "mode=555")?;
        std::env::set_current_dir("/proc")?;
        sys::pivot_to_working_dir()?;
        sys::default_signals();
        sys::ignore_children();
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
        let nobody = Identity { uid: NOBODY, gid: NOBODY, groups: Vec::new(), home: String::new() };
        identity::become_identity(&nobody, 0)?;
        joey_seccomp::install()?;
        sys::dup2(0, 2)?;
        ready.write_all(b".")
    };
    if let Err(error) = leave() {
        return error;
    }
    drop(ready);
    loop {
        sys::pause();
    }
}
