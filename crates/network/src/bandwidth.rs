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
        batch.push_str(&queues(interface, rate));
    }
    if let Some(rate) = bandwidth.egress {
        links.add_ifb(ifb, group).await?;
        batch.push_str(&queues(ifb, rate));
        batch.push_str(&format!(
            "qdisc replace dev {interface} handle ffff: ingress\n\
             filter add dev {interface} parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev {ifb}\n"
        ));
    }
    run("tc", &["-batch", "-"], &batch).await
}

/// What a cap is made of, as input of `tc -batch`; what was there before is dropped first.
///
/// ```text
/// tbf (the cap) ◄── htb, for its priorities alone ◄─┬─ 2:1 mere acknowledgements of TCP
///                                                   └─ 2:2 everything else
/// ```
/// Acknowledgements go first: behind a full queue of data they would hold up the other direction's transfer, which then stays
/// below its own cap. They cannot starve the data for long, because each answers data that came through the other cap.
fn queues(device: &str, bits_per_second: u64) -> String {
    let Bucket { burst, queue } = Bucket::of(bits_per_second);
    let limit = burst + queue;
    format!(
        "qdisc replace dev {device} root handle 9: pfifo limit 100\n\
         qdisc replace dev {device} root handle 1: tbf rate {bits_per_second}bit burst {burst} limit {limit}\n\
         qdisc add dev {device} parent 1:1 handle 2: htb default 2\n\
         class add dev {device} parent 2: classid 2:1 htb rate 100gbit prio 0 quantum 65536\n\
         class add dev {device} parent 2: classid 2:2 htb rate 100gbit prio 1 quantum 65536\n\
         qdisc add dev {device} parent 2:1 handle 3: bfifo limit {queue}\n\
         qdisc add dev {device} parent 2:2 handle 4: bfifo limit {queue}\n\
         filter add dev {device} parent 2: protocol ip u32 {MERE_ACKNOWLEDGEMENT} flowid 2:1\n"
    )
}

/// TCP, no IP options, less than 128 bytes in all, and of the six classic flags ACK alone: what ends a transfer is marked PSH.
const MERE_ACKNOWLEDGEMENT: &str =
    "match ip protocol 6 0xff match u8 0x05 0x0f at 0 match u16 0x0000 0xff80 at 2 match u8 0x10 0x3f at 33";

#[derive(Debug, PartialEq, Eq)]
struct Bucket {
    burst: u64,
    queue: u64,
}

impl Bucket {
    /// 10 ms of the rate and a queue of 50 ms behind it, in bytes, each with room for a few full packets. A longer queue costs
    /// more than it brings: with 250 ms, a sender's first overshoot takes seconds to repair and a third of the rate is lost
    /// meanwhile.
    fn of(bits_per_second: u64) -> Self {
        let bytes = bits_per_second / 8;
        Self { burst: (bytes / 100).clamp(8_000, 64 << 20), queue: (bytes / 20).clamp(32_000, 512 << 20) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets() {
        assert_eq!(Bucket::of(5_000_000), Bucket { burst: 8000, queue: 32_000 });
        assert_eq!(Bucket::of(1_000_000_000), Bucket { burst: 1_250_000, queue: 6_250_000 });
    }
}
