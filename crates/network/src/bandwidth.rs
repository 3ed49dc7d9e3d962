//! Caps on an instance's traffic: token buckets on the host's side, where the instance cannot reach them.
//!
//! Traffic to the instance passes a tbf on the host's end of its pair. Traffic from it is redirected as it arrives there to an
//! ifb device with a tbf of its own, which exists only for instances with such a cap.

use crate::error::NetworkError;
use crate::links::Links;
use crate::program::run;

/// Caps in bits and in packets a second; `None` is no cap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bandwidth {
    /// Traffic into the instance.
    pub ingress: Option<u64>,
    /// Traffic out of the instance.
    pub egress: Option<u64>,
    /// Packets into the instance.
    pub ingress_packets: Option<u64>,
    /// Packets out of the instance.
    pub egress_packets: Option<u64>,
}

impl Bandwidth {
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }

    pub(crate) fn has_packets(&self) -> bool {
        self.ingress_packets.is_some() || self.egress_packets.is_some()
    }
}

/// Caps `interface`; a cap already there is replaced.
pub(crate) async fn apply(
    links: &Links,
    interface: &str,
    ifb: &str,
    group: u32,
    bandwidth: Bandwidth,
) -> Result<(), NetworkError> {
    if Links::exists(ifb) {
        // Left by an attachment that was cut short; its ingress queue goes too, so that the batch below meets none.
        links.delete(ifb).await?;
        if let Err(error) = run("tc", &["qdisc", "del", "dev", interface, "ingress"], "").await {
            tracing::debug!(%interface, %error, "no ingress queue to replace");
        }
    }
    if bandwidth.ingress.is_none() && bandwidth.egress.is_none() {
        return Ok(());
    }
    let mut batch = String::new();
    if let Some(rate) = bandwidth.ingress {
        batch.push_str(&format!("qdisc replace dev {interface} root {}\n", bucket(rate)));
    }
    if let Some(rate) = bandwidth.egress {
        links.add_ifb(ifb, group).await?;
        batch.push_str(&format!(
            "qdisc replace dev {ifb} root {}\n\
             qdisc replace dev {interface} handle ffff: ingress\n\
             filter add dev {interface} parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev {ifb}\n",
            bucket(rate)
        ));
    }
    run("tc", &["-batch", "-"], &batch).await
}

/// A bucket of 10 ms of the rate and a queue of 50 ms behind it, each with room for a few full packets. A longer queue costs more
/// than it brings: with 250 ms, a sender's first overshoot takes seconds to repair and a third of the rate is lost meanwhile.
fn bucket(bits_per_second: u64) -> String {
    let bytes = bits_per_second / 8;
    let burst = (bytes / 100).clamp(8_000, 64 << 20);
    let queue = (bytes / 20).clamp(32_000, 512 << 20);
    format!("tbf rate {bits_per_second}bit burst {burst} limit {}", burst + queue)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets() {
        assert_eq!(bucket(5_000_000), "tbf rate 5000000bit burst 8000 limit 40000");
        assert_eq!(bucket(1_000_000_000), "tbf rate 1000000000bit burst 1250000 limit 7500000");
    }
}
