//! Whether somebody holds a container's process with a debugger: it is traced, or a debugger is connected to a port that the
//! Pod declares as one. Such a process answers no probe, and that is no illness.

use std::fs;

use crate::life::Life;
use crate::supervisor::Agent;

/// What holds the container, in words; `None`: nothing.
pub fn held(agent: &Agent, life: &Life) -> Option<String> {
    if agent.apart.is_some() {
        // What runs apart may be traced by who runs it, and its connections are not on this kernel.
        return None;
    }
    let container = life.container();
    let container = &*container;
    let traced = agent.cgroup_of(&container.name).processes().into_iter().find(|pid| is_traced(*pid));
    if let Some(pid) = traced {
        return Some(format!("process {pid} is traced"));
    }
    let init = life.running()?;
    let connected = ["tcp", "tcp6"].into_iter().find_map(|table| {
        let text = fs::read_to_string(format!("/proc/{init}/net/{table}")).ok()?;
        agent.config.debug_ports.iter().copied().find(|port| has_connection(&text, *port))
    });
    connected.map(|port| format!("a debugger is connected to port {port}"))
}

/// proc(5): `TracerPid` of `status` is 0 when nobody traces.
fn is_traced(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
    tracer.is_some_and(|tracer| tracer.trim() != "0")
}

/// proc(5) net/tcp: `sl local_address rem_address st …`, addresses as hexadecimal `IP:PORT`; state 01 is established.
fn has_connection(table: &str, port: u16) -> bool {
    table.lines().skip(1).any(|line| {
        let mut words = line.split_whitespace();
        let local = words.nth(1).and_then(|address| address.rsplit_once(':'));
        let (_remote, state) = (words.next(), words.next());
        let own = local.and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
        own == Some(port) && state == Some("01")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_found_by_port_and_state() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue\n\
                     0: 0100007F:138D 00000000:0000 0A 00000000:00000000\n\
                     1: 0100007F:138D 0100007F:9C40 01 00000000:00000000\n\
                     2: 0100007F:0050 0100007F:9C41 06 00000000:00000000\n";
        assert!(has_connection(table, 5005));
        assert!(!has_connection(table, 80), "a connection that is closing debugs nothing");
        assert!(!has_connection(table, 40000), "the other side's port is not the container's");
    }

    #[test]
    fn this_process_is_not_traced() {
        assert!(!is_traced(std::process::id()));
    }
}
