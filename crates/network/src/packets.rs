//! Caps on an instance's packets, counted on the host's side and dropped beyond the cap, each way.
//!
//! A table beside that of the rules, because this one lives on when the rules are replaced at a start. Whoever has no cap costs a
//! packet two looks into a map, however many instances have one.
//!
//! ```text
//! prerouting  ── interface in  `from` ──► chain of the instance: over its rate is dropped
//! postrouting ── interface in  `to`   ──► chain of the instance: over its rate is dropped
//! ```

use std::net::Ipv4Addr;

use crate::bandwidth::Bandwidth;
use crate::error::NetworkError;
use crate::program::run;

/// The name of the table beside the rules' `table`.
fn beside(table: &str) -> String {
    format!("{table}_packets")
}

/// Puts the caps of one instance in place; caps already there are replaced.
pub(crate) async fn apply(
    table: &str,
    interface: &str,
    address: Ipv4Addr,
    caps: Bandwidth,
) -> Result<(), NetworkError> {
    run("nft", &["-f", "-"], &text(&beside(table), interface, address, caps)).await
}

/// Takes the caps of one instance away; none being there is no error.
pub(crate) async fn lift(table: &str, interface: &str, address: Ipv4Addr) -> Result<(), NetworkError> {
    run("nft", &["-f", "-"], &without(&beside(table), interface, address)).await
}

pub(crate) async fn remove(table: &str) -> Result<(), NetworkError> {
    let table = beside(table);
    run("nft", &["-f", "-"], &format!("add table ip {table}\ndelete table ip {table}\n")).await
}

/// Everything may be there already: the commands make what is missing, in one transaction.
fn frame(table: &str) -> String {
    format!(
        "add table ip {table}
add map ip {table} from {{ type ifname : verdict; }}
add map ip {table} to {{ type ifname : verdict; }}
add chain ip {table} incoming {{ type filter hook prerouting priority -310; policy accept; }}
add chain ip {table} outgoing {{ type filter hook postrouting priority 310; policy accept; }}
flush chain ip {table} incoming
flush chain ip {table} outgoing
add rule ip {table} incoming iifname vmap @from
add rule ip {table} outgoing oifname vmap @to
"
    )
}

fn text(table: &str, interface: &str, address: Ipv4Addr, caps: Bandwidth) -> String {
    let mut text = without(table, interface, address);
    for (map, rate) in [("from", caps.egress_packets), ("to", caps.ingress_packets)] {
        let Some(rate) = rate else { continue };
        let chain = chain(map, address);
        // 20 ms of the rate may come at once.
        let burst = (rate / 50).clamp(5, 1_000_000);
        text.push_str(&format!(
            "add chain ip {table} {chain}
add rule ip {table} {chain} limit rate over {rate}/second burst {burst} packets drop
add element ip {table} {map} {{ \"{interface}\" : jump {chain} }}
"
        ));
    }
    text
}

/// What is deleted is made first, so that it is there.
fn without(table: &str, interface: &str, address: Ipv4Addr) -> String {
    let mut text = frame(table);
    for map in ["from", "to"] {
        let chain = chain(map, address);
        text.push_str(&format!(
            "add chain ip {table} {chain}
add element ip {table} {map} {{ \"{interface}\" : jump {chain} }}
delete element ip {table} {map} {{ \"{interface}\" : jump {chain} }}
flush chain ip {table} {chain}
delete chain ip {table} {chain}
"
        ));
    }
    text
}

fn chain(map: &str, address: Ipv4Addr) -> String {
    format!("{map}_{:08x}", u32::from(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_capped_has_a_chain() {
        let caps = Bandwidth { egress_packets: Some(1000), ..Bandwidth::default() };
        let text = text("t_packets", "jy0001", Ipv4Addr::new(10, 0, 0, 2), caps);
        assert!(text.contains("from_0a000002 limit rate over 1000/second burst 20 packets drop"), "{text}");
        let end = text.rsplit("delete chain").next().unwrap();
        assert!(end.contains("\"jy0001\" : jump from_0a000002") && !end.contains("jump to_0a000002"), "{text}");
    }
}
