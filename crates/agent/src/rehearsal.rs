//! A run of a container of nothing, before there is an instance: what a machine does for the first time takes it much longer than
//! again, pages that are copied and instructions that are translated above all. Afterwards the machine knows of no instance as before.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use joey_api::agent::{AgentConfig, AgentContainer, VERSION};
use joey_api::guest::{CGROUP, Interface};
use joey_api::instance::{ContainerState, Limits, WireRestartPolicy};
use joey_machine::{disks, machine, network};

use crate::cgroup::Cgroup;
use crate::{setup, view};

/// How long all of it may take, by emulation on a busy host.
const LIMIT: Duration = Duration::from_secs(20);
const CONTAINER: &str = "rehearsal";
/// What the container's root is made of, on the disk.
const ROOT: &str = "/instance/rehearsal";
/// Addresses that are nobody's (RFC 5737).
const INTERFACE: Interface = Interface {
    mac: [2, 0, 0, 0, 0, 1],
    address: Ipv4Addr::new(192, 0, 2, 1),
    gateway: Ipv4Addr::new(192, 0, 2, 2),
    gateway_mac: [2, 0, 0, 0, 0, 2],
    mtu: 1500,
};
/// Bytes of a log that nobody reads.
const LOG: u64 = 1 << 20;

/// Rehearses with the disk that is in the machine, which is free again afterwards.
pub async fn rehearse() -> Result<(), String> {
    machine::set_clock(Timestamp::now()).map_err(|error| format!("cannot set the clock: {error}"))?;
    disks::mount_own().await.map_err(|error| format!("cannot mount the disk: {error}"))?;
    let run = tokio::time::timeout(LIMIT, run()).await;
    let run = run.unwrap_or_else(|_| Err("the rehearsal does not end".to_owned()));
    forget().await.map_err(|error| format!("cannot end the rehearsal: {error}"))?;
    run
}

async fn run() -> Result<(), String> {
    let up = network::bring_up(&INTERFACE).and_then(|()| network::let_go());
    up.map_err(|error| format!("cannot bring the interface up: {error}"))?;
    let made = fs::create_dir(ROOT).and_then(|()| {
        let place = Path::new(ROOT).join("program");
        OpenOptions::new().create_new(true).write(true).mode(0o755).open(place)?.write_all(&program())
    });
    made.map_err(|error| format!("cannot make the rehearsal's files: {error}"))?;
    let (agent, containers) = setup::in_guest(config())?;
    let mut states = agent.state.subscribe();
    let ended = |container: &ContainerState| matches!(container, ContainerState::Terminated(_));
    let state = states.wait_for(|state| state.containers.iter().all(|container| ended(&container.state))).await;
    let how = state.map(|state| state.containers[0].state.clone()).map_err(|error| error.to_string())?;
    agent.shutdown.notify_one();
    setup::until_shutdown(&agent, containers).await;
    match how {
        ContainerState::Terminated(end) if end.exit_code == 0 => Ok(()),
        other => Err(format!("the rehearsal's container failed: {other:?}")),
    }
}

/// Takes back what [`setup::in_guest`] and the container left.
async fn forget() -> io::Result<()> {
    disks::unmount(Path::new(view::SHM)).await?;
    disks::unmount_own().await?;
    Cgroup::new(CGROUP).child(CONTAINER).remove()
}

fn config() -> AgentConfig {
    let container = AgentContainer {
        name: CONTAINER.to_owned(),
        layers: vec![ROOT.to_owned()],
        args: vec!["/program".to_owned()],
        user: "1:1".to_owned(),
        no_new_privileges: true,
        stop_signal: "SIGTERM".to_owned(),
        ..AgentContainer::default()
    };
    AgentConfig {
        version: VERSION,
        instance: CONTAINER.to_owned(),
        hostname: CONTAINER.to_owned(),
        address: None,
        containers: vec![container],
        volumes: Vec::new(),
        fs_group: None,
        restart_policy: WireRestartPolicy::Never,
        termination_grace_period_seconds: 0,
        share_processes: false,
        sysctls: Default::default(),
        limits: Limits::default(),
        deadline: None,
        debug_ports: Vec::new(),
        core_pattern: None,
        resolv_conf: String::new(),
        hosts: String::new(),
        cgroup: CGROUP.to_owned(),
        log_max_bytes: LOG,
        log_max_files: 1,
    }
}

/// A program for x86-64 that says a word and ends: a header, one segment that is the whole file, and instructions (System V ABI, ELF-64).
fn program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let word = b"rehearsed\n";
    let code: [&[u8]; 5] = [
        // write(1, word, its length)
        &[0xb8, 1, 0, 0, 0, 0xbf, 1, 0, 0, 0, 0xba, word.len() as u8, 0, 0, 0],
        // lea rsi, [rip + 11]: behind what follows
        &[0x48, 0x8d, 0x35, 11, 0, 0, 0],
        &[0x0f, 0x05],
        // exit(0)
        &[0x31, 0xff, 0xb8, 60, 0, 0, 0],
        &[0x0f, 0x05],
    ];
    let code = code.concat();
    let length = HEADERS + (code.len() + word.len()) as u64;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let halves = |file: &mut Vec<u8>, values: &[u16]| values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    let words = |file: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    let longs = |file: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    // An executable for x86-64, its entry, and where the segments are described.
    halves(&mut file, &[2, 62]);
    words(&mut file, &[1]);
    longs(&mut file, &[BASE + HEADERS, 64, 0]);
    words(&mut file, &[0]);
    halves(&mut file, &[64, 56, 1, 0, 0, 0]);
    // Loaded, readable and executable.
    words(&mut file, &[1, 5]);
    longs(&mut file, &[0, BASE, BASE, length, length, 4096]);
    file.extend(code);
    file.extend(word);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_runs() {
        let place = std::env::temp_dir().join(format!("joey-rehearsal-{}", std::process::id()));
        fs::write(&place, program()).unwrap();
        fs::set_permissions(&place, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let said = std::process::Command::new(&place).output().unwrap();
        fs::remove_file(place).unwrap();
        assert_eq!((said.status.code(), said.stdout.as_slice()), (Some(0), b"rehearsed\n".as_slice()));
    }
}
