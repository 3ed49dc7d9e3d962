//! Wire types: the instance service's REST API and the agent protocol, as JSON, and their validation.
//!
//! Must never depend on Kubernetes' types, on transports or on async code. Field names are camelCase on the wire; times
//! are RFC 3339 with microseconds in UTC; memory is in bytes, CPU in thousandths of a core, bandwidth in bits per second.

pub mod agent;
pub mod annotations;
pub mod change;
pub mod diagnosis;
pub mod error;
pub mod frame;
pub mod guest;
pub mod hooks;
pub mod image;
pub mod instance;
pub mod lifecycle;
pub mod logs;
pub mod sizes;
pub mod validate;
pub mod vmm;
