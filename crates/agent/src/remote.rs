//! Volumes that servers have: mounted before the first container starts, as long as that takes, and let go of at the end.

use std::time::Duration;

use jiff::Timestamp;
use joey_api::agent::AgentNfs;
use joey_api::instance::InstanceEvent;
use joey_machine::nfs;

use crate::supervisor::Agent;
use crate::volumes;

/// Between two attempts, the first and the longest one, as the kubelet's.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(122));

/// Mounts what is not there yet; what fails is told and tried again.
pub async fn mount(agent: &Agent) {
    for volume in &agent.config.volumes {
        let (Some(asked), place) = (&volume.nfs, volumes::on_disk(&agent.dir, volume)) else { continue };
        let mut pause = PAUSE.0;
        while !nfs::is_mounted(&place) {
            let Err(error) = nfs::mount(asked, &place).await else { break };
            let AgentNfs { server, path, .. } = asked;
            let why = match error.raw_os_error() {
                Some(libc::ETIMEDOUT) | None => "the server does not answer".to_owned(),
                Some(libc::ENOENT) => "the server has nothing of that name".to_owned(),
                Some(libc::EACCES | libc::EPERM) => "the server does not allow it".to_owned(),
                Some(_) => error.to_string(),
            };
            let message = format!(
                "MountVolume.SetUp failed for volume \"{}\" : mount of {server}:{path} failed: {why}",
                volume.name
            );
            let (at, reason) = (Timestamp::now(), "FailedMount".to_owned());
            agent.change(|state| {
                state.events.push(InstanceEvent { at, warning: true, reason, message, container: None });
            });
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }
}

/// Lets go of them; nobody uses them any more.
pub async fn unmount(agent: &Agent) {
    for volume in agent.config.volumes.iter().filter(|volume| volume.nfs.is_some()) {
        let place = volumes::on_disk(&agent.dir, volume);
        if nfs::is_mounted(&place) {
            nfs::unmount(&place).await;
        }
    }
}
