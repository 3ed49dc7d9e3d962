//! When a Pod answers the first time: asked over HTTP again and again from when its process runs.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Between two questions, and how long one may take.
const PACE: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(2);
/// Anything that is HTTP is an answer.
const BEGINNING: &[u8; 5] = b"HTTP/";

/// The Pods that have not answered yet.
#[derive(Default)]
pub struct Answers {
    asked: JoinSet<(String, Timestamp)>,
}

impl Answers {
    pub fn ask(&mut self, pod: String, address: IpAddr, port: u16) {
        self.asked.spawn(async move {
            loop {
                if matches!(tokio::time::timeout(PATIENCE, ask(address, port)).await, Ok(Ok(()))) {
                    return (pod, Timestamp::now());
                }
                tokio::time::sleep(PACE).await;
            }
        });
    }

    /// The next Pod that has answered, and when; waits for ever where none is asked.
    pub async fn next(&mut self) -> (String, Timestamp) {
        match self.asked.join_next().await {
            Some(Ok(answered)) => answered,
            _ => std::future::pending().await,
        }
    }
}

async fn ask(address: IpAddr, port: u16) -> io::Result<()> {
    let mut stream = TcpStream::connect((address, port)).await?;
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut beginning = [0; BEGINNING.len()];
    stream.read_exact(&mut beginning).await?;
    match beginning == *BEGINNING {
        true => Ok(()),
        false => Err(io::ErrorKind::InvalidData.into()),
    }
}
