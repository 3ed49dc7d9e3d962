//! Does an action once: runs a program in the container, or asks it over the network as a probe or a hook does. What the
//! answers mean to the container is the business of `probe` and `supervisor`.

use std::net::IpAddr;
use std::time::Duration;

use joey_api::lifecycle::Action;
pub use joey_health::{Asker, Unwell};
use tokio::time::Instant;

use crate::inside;
use crate::launch::{self, Program};
use crate::life::Life;
use crate::stream::Pipe;
use crate::supervisor::{Agent, Ender};

/// Output of a program that is kept for the message.
const KEPT: usize = 10 << 10;
/// How long the streams of an ended program may stay open.
const STREAMS: Duration = Duration::from_millis(500);

/// Does `action` within `limit`.
pub async fn perform(agent: &Agent, life: &Life, action: &Action, asker: Asker, limit: Duration) -> Result<(), Unwell> {
    let own = agent.config.address;
    match action {
        Action::Exec { command } => exec(agent, life, command, limit).await,
        Action::Sleep { seconds } => {
            tokio::time::sleep(Duration::from_secs((*seconds).into())).await;
            Ok(())
        }
        _ => match agent.inside().await.map_err(|failure| Unwell(failure.message().to_owned()))? {
            Some(inside) => inside::ask(&inside, own, action, asker, limit).await,
            None => over_network(own, action, asker, limit).await,
        },
    }
}

/// An action that connects to something.
pub async fn over_network(own: Option<IpAddr>, action: &Action, asker: Asker, limit: Duration) -> Result<(), Unwell> {
    match action {
        Action::HttpGet(get) => joey_health::http(own, get, asker, limit).await,
        Action::TcpSocket { host, port } => joey_health::tcp(own, host.as_deref(), *port, limit).await,
        Action::Grpc { port, service } => joey_health::grpc(own, *port, service, limit).await,
        Action::Exec { .. } | Action::Sleep { .. } => Err(Unwell("this is not asked over the network".to_owned())),
    }
}

/// Runs a program to its end; what does not end in time is killed with its process group.
async fn exec(agent: &Agent, life: &Life, command: &[String], limit: Duration) -> Result<(), Unwell> {
    let container = life.container();
    let container = &*container;
    let program = Program { container, args: command, stdin: false, tty: false };
    let init = life.running().ok_or_else(|| Unwell("container is not running".to_owned()))?;
    let by = Instant::now() + limit;
    let late = || Unwell(format!("command \"{}\" timed out after {} s", command.join(" "), limit.as_secs()));
    // The way to the program is the container's files, which may let it wait.
    let started = tokio::time::timeout_at(by, agent.further(&program, init)).await.map_err(|_| late())?;
    let started = started.map_err(|failure| Unwell(failure.message().to_owned()))?;
    // A task of its own: also when nobody waits any more, the process is ended in time and reaped.
    let (code, text) =
        tokio::spawn(to_its_end(agent.ender(), started, by)).await.map_err(|error| Unwell(error.to_string()))?;
    match code {
        Some(0) => Ok(()),
        Some(code) if text.is_empty() => Err(Unwell(format!("command exited with {code}"))),
        Some(_) => Err(Unwell(String::from_utf8_lossy(&text).into_owned())),
        None => Err(late()),
    }
}

/// Exit code and output; no code: it did not end in time and was killed.
async fn to_its_end(ender: Ender, started: launch::Started, by: Instant) -> (Option<i32>, Vec<u8>) {
    let launch::Started { pid, pidfd, streams, .. } = started;
    let (out, err) = (tokio::spawn(gather(streams.stdout)), tokio::spawn(gather(streams.stderr)));
    let (mut handles, in_time) = ([out, err], tokio::time::timeout_at(by, launch::ended(&pidfd, pid)).await);
    if in_time.is_err() {
        ender.kill_command(pid);
        launch::ended(&pidfd, pid).await;
    }
    let mut text = Vec::new();
    // A process that went into the background may keep the streams open: the command has ended nevertheless.
    let both = async {
        for handle in &mut handles {
            text.extend(handle.await.unwrap_or_default());
        }
    };
    if tokio::time::timeout(STREAMS, both).await.is_err() {
        handles.iter().for_each(tokio::task::JoinHandle::abort);
    }
    (in_time.ok().map(|(code, _)| code), text)
}

async fn gather(fd: Option<std::os::fd::OwnedFd>) -> Vec<u8> {
    let (mut kept, mut buffer) = (Vec::new(), vec![0; 4 << 10]);
    let Some(Ok(pipe)) = fd.map(Pipe::reader) else { return kept };
    while let Ok(count) = pipe.read(&mut buffer).await {
        if count == 0 {
            break;
        }
        let room = KEPT.saturating_sub(kept.len());
        kept.extend_from_slice(&buffer[..count.min(room)]);
    }
    kept
}
