//! What the agent asks of the kernel: system calls that the standard library does not have, cgroups, identities. Single-threaded
//! programs use it: a clone goes on with all that the one thread has.

pub mod cgroup;
pub mod identity;
pub mod signal;
pub mod sys;
pub mod view;
