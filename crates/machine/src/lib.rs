//! What the first process of a virtual machine does with the machine: file systems, modules, drivers, disks, its interface, its door to
//! the host, and the end. Single-threaded, and part of the agent; it knows nothing of containers.

pub mod disks;
pub mod machine;
pub mod memory;
pub mod modules;
pub mod network;
pub mod nfs;
pub mod port;
pub mod vsock;
