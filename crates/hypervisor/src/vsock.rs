//! The host's way to a socket in a machine whose monitor stands between: it listens at a unix socket, is told the port in a line of
//! text (`CONNECT 1024`), and says `OK` with a number of its own when somebody in the machine took the connection; from there on it is
//! the stream. Where nobody takes it the monitor closes. Firecracker's document `docs/vsock.md`, which Cloud Hypervisor follows.

use std::io;
use std::path::Path;
use std::time::Duration;

use joey_api::guest::VSOCK_PORT;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::guarded;

/// Between two attempts where nobody listens yet.
const AGAIN: Duration = Duration::from_millis(10);
/// How long the machine may take to answer one: what was asked before its driver was there is answered late or never.
const PATIENCE: Duration = Duration::from_millis(250);
/// Bytes of the longest answer: `OK 4294967295`.
const LONGEST: usize = 16;

/// Connects with the agent; resolves when it is there. The caller sets the bound.
pub(crate) async fn connect(path: &Path, owner: u32) -> io::Result<UnixStream> {
    loop {
        match tokio::time::timeout(PATIENCE, attempt(path, owner)).await {
            Ok(Err(error)) if passes(error.kind()) => tokio::time::sleep(AGAIN).await,
            Ok(done) => return done,
            Err(_) => {}
        }
    }
}

fn passes(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    matches!(kind, NotFound | ConnectionRefused | ConnectionReset | BrokenPipe | UnexpectedEof)
}

async fn attempt(path: &Path, owner: u32) -> io::Result<UnixStream> {
    let mut stream = guarded::connect(path, owner).await?;
    stream.write_all(format!("CONNECT {VSOCK_PORT}\n").as_bytes()).await?;
    let mut line = Vec::new();
    // No more than the line: what follows is the stream's.
    while line.len() < LONGEST {
        match stream.read_u8().await? {
            b'\n' => break,
            byte => line.push(byte),
        }
    }
    let number = std::str::from_utf8(&line).ok().and_then(|line| line.strip_prefix("OK ")?.parse::<u32>().ok());
    match number {
        Some(_) => Ok(stream),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "the monitor does not say that it connected")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// What comes of connecting where each connection in turn is given one of these answers to the line.
    async fn connected(answers: &[&str]) -> io::Result<String> {
        let dir = tempfile::tempdir().unwrap();
        let (path, owner) = (dir.path().join("vsock.sock"), std::fs::metadata(dir.path()).unwrap().uid());
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let answers: Vec<String> = answers.iter().map(|answer| (*answer).to_owned()).collect();
        let monitor = tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut line = [0; 13];
                stream.read_exact(&mut line).await.unwrap();
                assert_eq!(&line, b"CONNECT 1024\n");
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        let bound = Duration::from_secs(20);
        let mut stream = tokio::time::timeout(bound, connect(&path, owner)).await.expect("an end")?;
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await?;
        monitor.await.unwrap();
        Ok(rest)
    }

    #[tokio::test]
    async fn the_stream_begins_after_the_line() {
        assert_eq!(connected(&["OK 1073741824\nhello\n"]).await.unwrap(), "hello\n");
        // Nobody listens at first.
        assert_eq!(connected(&["", "", "OK 7\n"]).await.unwrap(), "");
    }

    #[tokio::test]
    async fn what_is_no_answer_is_an_error() {
        for noise in ["NO 7\n", "OK x\n", "OK\n", "\n", "OK 99999999999999999999999"] {
            assert_eq!(connected(&[noise]).await.unwrap_err().kind(), io::ErrorKind::InvalidData, "{noise:?}");
        }
    }
}
