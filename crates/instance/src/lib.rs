//! One instance on one host: a specification becomes a running sandbox, survives the daemon, and goes without a trace.
//!
//! [`Engine`] keeps the instances of a host. Each has a durable record, written before anything is made, and one task that
//! owns its transitions ([`life`]). Everything an instance owns is named from its id, so every undo is idempotent and can be
//! done by a daemon that has no memory of the doing.
//!
//! Must never name a class of sandboxes, and must never know tenants, Kubernetes or REST.

mod cgroups;
mod change;
mod end;
mod engine;
mod files;
mod held;
mod life;
mod logs;
mod merge;
mod nfs;
mod own_kernel;
mod persist;
mod pull;
mod start;
mod status;
mod told;

pub use engine::{ByteStream, Config, Engine, Recovered, StatusEvents};
