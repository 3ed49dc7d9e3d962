//! The process that watches over one container: it makes and starts it, waits for its end, takes away what is left, and ends as the
//! container did. What it makes of the host's files ends with its mount namespace.
//!
//! ```text
//! create ─► start ─► (started) ─► wait ─► delete ─► the same end
//! ```

use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::process::{Command, Stdio};

use joey_kernel::sys;
use serde::Deserialize;

use crate::Runsc;
use crate::command::log_of;

/// The longest text of `runsc` that is read, in bytes.
const LOG_LIMIT: usize = 16 << 10;
/// Signals that a process can end by, and this one takes upon itself.
const DEADLY: [i32; 16] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGKILL,
    libc::SIGUSR1,
    libc::SIGSEGV,
    libc::SIGUSR2,
    libc::SIGPIPE,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGSYS,
];

/// Makes and starts the container `id` of the specification in `bundle`, with the streams of this process. Errors are for the platform's
/// log, and the second text, where there is one, for the container's user.
pub fn start(runsc: &Runsc, id: &str, bundle: &Path) -> Result<(), (String, Option<String>)> {
    // What the calls leave behind is this process's to reap.
    sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1).map_err(|error| (format!("cannot watch: {error}"), None))?;
    for mut command in [runsc.create(id, bundle), runsc.start(id, bundle)] {
        let ended = command.status().map_err(|error| (format!("cannot start runsc: {error}"), None))?;
        if !ended.success() {
            let said = std::fs::read(log_of(bundle)).unwrap_or_default();
            let said = last_error(&said).unwrap_or_else(|| ended.to_string());
            let told = said.split_once("creating process: ").map(|(_, reason)| reason.to_owned());
            delete(runsc, id);
            return Err((said, told));
        }
    }
    Ok(())
}

/// Waits for the end of the container, and ends this process in the same way. The streams are let go of first: they end with the
/// container. So is `told`, by which the agent hears that it runs.
pub fn attend(runsc: &Runsc, id: &str, bundle: &Path, told: RawFd) -> ! {
    let let_go = let_go(told);
    let waited = let_go.and_then(|()| quiet(runsc.wait(id, bundle)).stdout(Stdio::piped()).output());
    let status = waited.ok().and_then(|said| exit_status(&said.stdout));
    delete(runsc, id);
    // Nobody can say how it ended who ended together with it.
    end_as(status.unwrap_or(128 + libc::SIGKILL))
}

fn let_go(told: RawFd) -> std::io::Result<()> {
    let null = sys::null_device()?;
    [0, 1, 2, told].into_iter().try_for_each(|fd| sys::dup2(null.as_raw_fd(), fd))
}

/// Stays until the sandbox's own processes have ended, which are this one's children since [`start`].
pub fn hold(told: RawFd) -> ! {
    let _ = let_go(told);
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) } > 0 {}
    sys::exit_now(0)
}

/// Takes away what is left of a container. The call waits until its processes are gone, which are children of this one.
fn delete(runsc: &Runsc, id: &str) {
    let Ok(call) = quiet(runsc.delete(id)).spawn() else { return };
    let call = libc::pid_t::try_from(call.id()).unwrap_or(-1);
    loop {
        // SAFETY: no status is asked for.
        let ended = unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) };
        if ended == call || ended < 0 {
            return;
        }
    }
}

fn quiet(mut command: Command) -> Command {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// 128 and more stands for a signal, as in a shell: gVisor tells no more than that.
fn end_as(status: i32) -> ! {
    let signal = status - 128;
    if DEADLY.contains(&signal) {
        let _ = sys::prctl(libc::PR_SET_DUMPABLE, 0);
        sys::default_signals();
        let _ = sys::kill(std::process::id(), signal);
    }
    sys::exit_now(status)
}

#[derive(Deserialize)]
struct Waited {
    #[serde(rename = "exitStatus")]
    exit_status: i32,
}

/// What `runsc wait` says: `{"id":"…","exitStatus":0}`.
pub fn exit_status(said: &[u8]) -> Option<i32> {
    serde_json::from_slice::<Waited>(said).ok().map(|waited| waited.exit_status)
}

#[derive(Deserialize)]
struct Line {
    msg: String,
    level: String,
}

/// The last error in a log of `runsc`: objects, one after the other, with or without lines of their own.
pub fn last_error(log: &[u8]) -> Option<String> {
    let end = &log[log.len().saturating_sub(LOG_LIMIT)..];
    let begin = end.iter().position(|byte| *byte == b'{')?;
    let lines = serde_json::Deserializer::from_slice(&end[begin..]).into_iter::<Line>();
    lines.map_while(Result::ok).filter(|line| line.level == "error").last().map(|line| line.msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_read() {
        assert_eq!(exit_status(b"{\"id\":\"c\",\"exitStatus\":143}\n"), Some(143));
        for said in [&b""[..], b"waiting failed: EOF", b"{}", b"{\"exitStatus\":\"no\"}"] {
            assert_eq!(exit_status(said), None);
        }
    }

    #[test]
    fn the_last_error_counts() {
        let log = br#"{"msg":"a","level":"error","time":""}{"msg":"b","level":"error","time":""}
            {"msg":"c","level":"info"}"#;
        assert_eq!(last_error(log), Some("b".to_owned()));
        assert_eq!(last_error(b"no object at all"), None);
        assert_eq!(last_error(b"{\"msg\":\"cut"), None);
    }
}
