//! What a machine that ran for nobody gets from outside of it when it becomes an instance's: limits, and its interface's place.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use joey_api::vmm::Giving;
use joey_kernel::cgroup::Cgroup;
use joey_kernel::sys;

use crate::{bridge, told};

/// Does it; comes back with what went wrong.
pub fn run(order: &Giving, sent: Vec<OwnedFd>) -> Result<(), String> {
    let [namespace] = sent.try_into().map_err(|_| "the monitor's network namespace is missing".to_owned())?;
    limit_files(order, &namespace).or_else(told("limit the monitor's files"))?;
    Cgroup::new(&order.cgroup).limit(&order.limits).or_else(told("set the limits"))?;
    match &order.network {
        Some((netns, mac)) => {
            bridge::take(namespace.as_fd(), netns, *mac).or_else(told("move the machine's interface"))
        }
        None => Ok(()),
    }
}

fn limit_files(order: &Giving, namespace: &OwnedFd) -> io::Result<()> {
    // A process is told by what only it has.
    let now = fs::metadata(format!("/proc/{}/ns/net", order.pid))?;
    let known = File::from(namespace.try_clone()?).metadata()?;
    if (now.dev(), now.ino()) != (known.dev(), known.ino()) {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    let limit = libc::rlimit { rlim_cur: order.longest_file, rlim_max: order.longest_file };
    let pid = libc::pid_t::try_from(order.pid).map_err(io::Error::other)?;
    // SAFETY: the structure lives through the call, and nothing is asked back.
    match sys::check(unsafe { libc::prlimit(pid, libc::RLIMIT_FSIZE, &limit, std::ptr::null_mut()) }.into()) {
        // Root without CAP_SYS_RESOURCE, as in some containers: it stays at what the longest disk needs.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        limited => limited.map(drop),
    }
}
