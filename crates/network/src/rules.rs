//! The packet rules: one nft table a daemon (and one for IPv6), replaced as a whole, that holds for every instance by its interface's prefix.
//!
//! Nothing here changes when an instance comes or goes. Rules drop what must not pass and leave the rest to the host's other
//! tables: a firewall that drops forwarded traffic by default (Docker's does) goes on dropping, and its owner has to let the
//! range pass; `open` says so in the log.

use ipnet::Ipv4Net;

use crate::error::NetworkError;
use crate::links::has_ipv6;
use crate::program::run;

/// Puts the table in place; one that is there is replaced in the same transaction.
pub(crate) async fn install(table: &str, prefix: &str, range: Ipv4Net) -> Result<(), NetworkError> {
    let mut text = text(table, prefix, range);
    if has_ipv6() {
        text.push_str(&no_ipv6(table, prefix));
    }
    run("nft", &["-f", "-"], &text).await
}

pub(crate) async fn remove(table: &str) -> Result<(), NetworkError> {
    let families: &[&str] = if has_ipv6() { &["ip", "ip6"] } else { &["ip"] };
    let text: String =
        families.iter().map(|family| format!("add table {family} {table}\ndelete table {family} {table}\n")).collect();
    run("nft", &["-f", "-"], &text).await
}

/// Warns when another table's forward chain drops what it does not know.
pub(crate) async fn warn_of_foreign_firewalls(range: Ipv4Net) {
    let output = tokio::process::Command::new("nft").args(["list", "chain", "ip", "filter", "FORWARD"]).output().await;
    if output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("policy drop")) {
        tracing::warn!(%range, "the host's filter table drops forwarded traffic: let the range pass there, or instances reach nothing outside");
    }
}

/// Instances have no IPv6 address: what they send of it is made up.
fn no_ipv6(table: &str, prefix: &str) -> String {
    format!(
        "add table ip6 {table}
delete table ip6 {table}
table ip6 {table} {{
  chain spoof {{
    type filter hook prerouting priority -300; policy accept;
    iifname \"{prefix}*\" drop
  }}
}}
"
    )
}

/// - `spoof`: the source must be the one address that is routed to the interface the packet came from (strict reverse path).
/// - link-local addresses, cloud metadata among them, are nobody's business; the gateway needs no packets.
/// - `forward`: nobody outside opens connections into the range, and two daemons' ranges are strangers to each other.
/// - `outside`: what leaves the range leaves with the host's address.
fn text(table: &str, prefix: &str, range: Ipv4Net) -> String {
    format!(
        "add table ip {table}
delete table ip {table}
table ip {table} {{
  chain spoof {{
    type filter hook prerouting priority -300; policy accept;
    iifname \"{prefix}*\" fib saddr . iif oif missing drop
    iifname \"{prefix}*\" ip daddr {{ 127.0.0.0/8, 169.254.0.0/16 }} drop
  }}
  chain forward {{
    type filter hook forward priority 0; policy accept;
    oifname \"{prefix}*\" iifname != \"{prefix}*\" ct state new drop
  }}
  chain outside {{
    type nat hook postrouting priority 100; policy accept;
    ip saddr {range} ip daddr != {range} oifname != \"{prefix}*\" oifname != \"lo\" masquerade
  }}
}}
"
    )
}
