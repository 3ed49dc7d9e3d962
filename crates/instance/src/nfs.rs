//! Where the servers of volumes of NFS are, as this host's resolver says.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use joey_model::{ErrorKind, Fault};

use crate::life::Life;

/// How long the resolver may take.
const LIMIT: Duration = Duration::from_secs(10);

/// The address of a server.
pub(crate) async fn address(life: &mut Life, volume: &str, server: &str) -> Result<Ipv4Addr, Fault> {
    let found = tokio::time::timeout(LIMIT, tokio::net::lookup_host((server, 0))).await;
    let mut found = found.into_iter().flatten().flatten();
    let v4 = found.find_map(|address| match address.ip() {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    });
    if let Some(address) = v4 {
        return Ok(address);
    }
    let message = format!("MountVolume.SetUp failed for volume \"{volume}\" : nfs server \"{server}\" has no address");
    life.event(true, "FailedMount", message.clone(), None);
    Err(Fault::new(ErrorKind::Retryable, "ContainerCreating", message))
}
