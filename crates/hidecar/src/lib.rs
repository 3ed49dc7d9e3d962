//! The log of an instance on its way to a sink: a file of the host, an HTTP server or Kafka.
//!
//! ```text
//! agent: output, files ─► collect/CONTAINER/SOURCE/BYTES.LINES (segments, bounded) ─► Carrier ─► sink
//!                                                   positions.json ◄─ written once the sink has taken it
//! ```
//!
//! A record is told at least once, and those of one source in their order: what the sink has taken is remembered only afterwards, so that
//! whoever dies in between says it again. While a sink is down one batch for it is in memory, and the segments are what waits on the
//! disk; what they lose is counted and told.
//!
//! Must never depend on classes of sandboxes, on agents, on the pool or on Kubernetes: it knows directories and sinks. The
//! host's owner names the sinks and holds their secrets; a specification chooses among them.

mod carrier;
mod held;
mod http;
mod kafka;
mod left;
mod plan;
mod record;
mod sink;
mod stream;

pub use carrier::{Carrier, Settings};
pub use plan::{Plan, Stream};
pub use sink::{FileSettings, HttpSettings, KafkaSettings, SinkSettings};
