//! `joey exec` and `joey attach`: a command in a container, or its main process, with this terminal as its own where asked for.

use std::io::IsTerminal;
use std::process::ExitCode;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use joey_api::frame::{self, Decoder, ExecStatus, TerminalSize};
use joey_api::instance::{ExecRequest, Instance};
use joey_pool::PoolClient;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::args::{Attach, Exec};
use crate::failure::Failure;
use crate::instances::one_container;
use crate::output;

/// Bytes of standard input sent at once.
const READ: usize = 16 << 10;

pub async fn exec(service: &PoolClient, exec: Exec) -> Result<ExitCode, Failure> {
    check_terminal(exec.stdin, exec.tty)?;
    let instance = service.get(&exec.name).await?;
    let container = one_container(&instance, exec.container)?;
    let request =
        ExecRequest { command: exec.command, stdin: exec.stdin, stdout: true, stderr: !exec.tty, tty: exec.tty };
    let frames = outgoing(exec.stdin, exec.tty)?;
    let answer = service.exec(&instance.id, &container, &request, frames).await?;
    converse(answer, exec.stdin && exec.tty).await
}

/// Joins the container's main process. Interrupted without a terminal of its own, it goes on by itself.
pub async fn attach(service: &PoolClient, attach: Attach) -> Result<ExitCode, Failure> {
    check_terminal(attach.stdin, attach.tty)?;
    let instance = service.get(&attach.name).await?;
    let container = one_container(&instance, attach.container)?;
    check_attached(&instance, &container, attach.stdin, attach.tty)?;
    let request =
        ExecRequest { command: Vec::new(), stdin: attach.stdin, stdout: true, stderr: !attach.tty, tty: attach.tty };
    let frames = outgoing(attach.stdin, attach.tty)?;
    let answer = service.attach(&instance.id, &container, &request, frames).await?;
    converse(answer, attach.stdin && attach.tty).await
}

/// Passes standard input on to the container's main process, from now on until that ends.
pub async fn feed(service: &PoolClient, instance: &str, container: &str) -> Result<(), Failure> {
    let request = ExecRequest { command: Vec::new(), stdin: true, stdout: false, stderr: false, tty: false };
    let mut answer = match service.attach(instance, container, &request, outgoing(true, false)?).await {
        Ok(answer) => answer,
        // It has ended meanwhile.
        Err(_) => return Ok(()),
    };
    tokio::spawn(async move { while let Some(Ok(_)) = answer.next().await {} });
    Ok(())
}

/// What the container was made without cannot be joined; without it nothing would come back, not even Ctrl-C.
fn check_attached(instance: &Instance, name: &str, stdin: bool, tty: bool) -> Result<(), Failure> {
    let Some(container) = instance.spec.containers.iter().find(|container| container.name == name) else {
        return Ok(());
    };
    let lacks = match (stdin && !container.stdin, tty && !container.tty) {
        (_, true) => "terminal",
        (true, false) => "standard input",
        (false, false) => return Ok(()),
    };
    let hint = format!("attach without it, or run a command in it: joey exec -it {} -- sh", instance.spec.name);
    Err(Failure::new(format!("container \"{name}\" was made without a {lacks}")).with_hint(hint))
}

pub fn check_terminal(stdin: bool, tty: bool) -> Result<(), Failure> {
    match tty && stdin && !std::io::stdin().is_terminal() {
        true => Err(Failure::usage("-t needs a terminal, and standard input is none").with_hint("leave out -t")),
        false => Ok(()),
    }
}

/// Prints what comes until the end, which gives the exit code.
async fn converse(answer: joey_pool::ByteStream, raw: bool) -> Result<ExitCode, Failure> {
    let _raw = if raw { Some(RawMode::enter()?) } else { None };
    let status = incoming(answer).await?;
    let code = status.exit_code.map(|code| u8::try_from(code).unwrap_or(1));
    match (code, status.message) {
        (Some(code), None) => Ok(ExitCode::from(code)),
        (code, message) => {
            let message = message.unwrap_or_else(|| "the command could not be started".to_owned());
            Err(Failure::new(message).with_code(code.unwrap_or(1)))
        }
    }
}

/// Frames to send: standard input and its end, the terminal's size and its changes.
fn outgoing(stdin: bool, tty: bool) -> Result<impl Stream<Item = Bytes> + Send + 'static, Failure> {
    let (sender, receiver) = mpsc::channel::<Bytes>(4);
    if tty {
        let mut changed = signal(SignalKind::window_change())?;
        let sender = sender.clone();
        tokio::spawn(async move {
            loop {
                if let Some(size) = terminal_size()
                    && sender.send(frame::encode(frame::RESIZE, &size).into()).await.is_err()
                {
                    return;
                }
                if changed.recv().await.is_none() {
                    return;
                }
            }
        });
    }
    tokio::spawn(async move {
        if stdin {
            let mut input = tokio::io::stdin();
            let mut buffer = vec![0; READ];
            while let Ok(count) = input.read(&mut buffer).await {
                if count == 0 || sender.send(frame::encode(frame::STDIN, &buffer[..count]).into()).await.is_err() {
                    break;
                }
            }
            let _ = sender.send(frame::encode(frame::CLOSE, &[]).into()).await;
        }
        // The request stays open until the answer is whole: its end would read as a caller who went away.
        sender.closed().await;
    });
    Ok(futures::stream::unfold(
        receiver,
        |mut receiver| async move { receiver.recv().await.map(|bytes| (bytes, receiver)) },
    ))
}

async fn incoming(mut answer: joey_pool::ByteStream) -> Result<ExecStatus, Failure> {
    use std::io::Write;
    let mut decoder = Decoder::default();
    while let Some(part) = answer.next().await {
        decoder.push(&part.map_err(|error| Failure::broke_off(&error))?);
        while let Some((channel, payload)) = decoder.next_frame().map_err(|error| Failure::new(error.to_string()))? {
            match channel {
                frame::STDOUT => output::write(&payload)?,
                frame::STDERR => std::io::stderr().write_all(&payload)?,
                frame::STATUS => {
                    return serde_json::from_slice(&payload).map_err(|error| Failure::new(error.to_string()));
                }
                _ => {}
            }
        }
    }
    Err(Failure::new("the connection broke before the command ended"))
}

fn terminal_size() -> Option<Vec<u8>> {
    let (width, height) = terminal_cells()?;
    serde_json::to_vec(&TerminalSize { width, height }).ok()
}

fn terminal_cells() -> Option<(u16, u16)> {
    nix::ioctl_read_bad!(window_size, nix::libc::TIOCGWINSZ, nix::libc::winsize);
    let mut size = nix::libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptor is only read from, and `size` is a winsize that lives through the call.
    unsafe { window_size(std::os::fd::AsRawFd::as_raw_fd(&std::io::stdin()), &mut size) }.ok()?;
    Some((size.ws_col, size.ws_row))
}

/// The terminal passes on every key; dropped, it is as before.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> Result<Self, Failure> {
        let before = tcgetattr(std::io::stdin()).map_err(std::io::Error::from)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw).map_err(std::io::Error::from)?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
    }
}
