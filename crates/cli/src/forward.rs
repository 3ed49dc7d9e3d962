//! `joey port-forward`: ports of this machine's loopback that lead to ports of an instance, until interrupted.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;

use bytes::Bytes;
use futures::StreamExt;
use joey_model::Fault;
use joey_pool::PoolClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::args::PortForward;
use crate::failure::Failure;
use crate::output::{self, printable};

/// Bytes read at once.
const PART: usize = 16 << 10;

pub async fn forward(service: &PoolClient, forward: PortForward) -> Result<ExitCode, Failure> {
    let id = service.get(&forward.name).await?.id;
    let mut listening = Vec::new();
    for pair in &forward.ports {
        let (local, remote) = ports(pair)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, local));
        let listener = TcpListener::bind(address).await.map_err(|error| {
            Failure::new(format!("port {local} of this machine cannot be listened at: {error}"))
                .with_hint("name another one as LOCAL:REMOTE; 0 takes a free one")
        })?;
        output::write(format!("Forwarding from {} -> {remote}\n", listener.local_addr()?).as_bytes())?;
        listening.push((listener, remote));
    }
    let mut serving = JoinSet::new();
    for (listener, remote) in listening {
        serving.spawn(serve(listener, remote, service.clone(), id.clone()));
    }
    let mut interrupted = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut asked = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        _ = interrupted.recv() => Ok(ExitCode::SUCCESS),
        _ = asked.recv() => Ok(ExitCode::SUCCESS),
        Some(ended) = serving.join_next() => match ended {
            Ok(failure) => Err(failure),
            Err(error) => Err(Failure::new(error.to_string())),
        },
    }
}

/// `LOCAL:REMOTE`, or one port for both.
fn ports(pair: &str) -> Result<(u16, u16), Failure> {
    let (local, remote) = pair.split_once(':').unwrap_or((pair, pair));
    let local = if local.is_empty() { "0" } else { local };
    match (local.parse(), remote.parse()) {
        (Ok(local), Ok(remote)) if remote != 0 => Ok((local, remote)),
        _ => Err(Failure::usage(format!("\"{pair}\" names no ports")).with_hint("write LOCAL:REMOTE, such as 8080:80")),
    }
}

/// Takes connections until nothing more can be taken.
async fn serve(listener: TcpListener, port: u16, service: PoolClient, id: String) -> Failure {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (service, id) = (service.clone(), id.clone());
                tokio::spawn(async move {
                    if let Err(fault) = carry(stream, port, &service, &id).await {
                        eprintln!("error: {}", printable(&fault.message));
                    }
                });
            }
            Err(error) => return Failure::from(error),
        }
    }
}

async fn carry(stream: TcpStream, port: u16, service: &PoolClient, id: &str) -> Result<(), Fault> {
    let _ = stream.set_nodelay(true);
    let (reader, mut writer) = stream.into_split();
    let sent = futures::stream::unfold(reader, |mut reader| async move {
        let mut buffer = bytes::BytesMut::with_capacity(PART);
        match reader.read_buf(&mut buffer).await {
            Ok(count) if count > 0 => Some((Bytes::from(buffer), reader)),
            _ => None,
        }
    });
    let mut answer = service.forward(id, port, sent).await?;
    while let Some(Ok(part)) = answer.next().await {
        if writer.write_all(&part).await.is_err() {
            break;
        }
    }
    let _ = writer.shutdown().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs() {
        for (text, wanted) in [("8080:80", (8080, 80)), ("80", (80, 80)), (":80", (0, 80)), ("0:80", (0, 80))] {
            assert_eq!(ports(text).unwrap_or_default(), wanted, "{text}");
        }
        for wrong in ["", "a:80", "80:0", "80:a", "70000:80"] {
            assert!(ports(wrong).is_err(), "{wrong}");
        }
    }
}
