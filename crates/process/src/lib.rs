//! Processes of this host that are known for certain, and the ending of all that is in a cgroup. What the processes are for is their
//! owners' matter.

pub mod cgroup;
mod process;

pub use process::{Ended, Process};
