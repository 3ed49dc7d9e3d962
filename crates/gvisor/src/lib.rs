//! Containers by gVisor's `runsc`: its command lines, what it is told of a container, the process that watches over one, the choice of
//! a platform, and what it cannot do. Part of the agent; the class of that name asks it whether the host can.
//!
//! Must never depend on sandboxes or on the agent's protocol's transport.

mod command;
pub mod monitor;
mod platform;
mod refusal;
pub mod spec;

pub use command::{Runsc, Runtime};
pub use platform::choose;
pub use refusal::{Refusal, refusal};

/// The first container of a sandbox: it holds the sandbox, and no other is made without it.
pub const HOLDER: &str = "joey";

/// Bytes that the sandbox itself takes beside what its containers may use: the kernel in user space, and the servers of files.
pub const OVERHEAD: u64 = 64 << 20;

/// Threads and processes of the host that a sandbox takes beside those that stand for its containers' own.
pub const THREADS: u64 = 256;
