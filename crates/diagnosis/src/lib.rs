//! What the kernel gives to whoever looks into an instance: packets of its network namespace ([`capture`]) and cores of its
//! processes that crash ([`core_handler`], [`core_pattern`]).
//!
//! Used by the agent, which is inside, and by the host's composition. Must never know how either is reached.

pub mod capture;
pub mod core_handler;
pub mod core_pattern;
mod crash;
mod elf;
mod filter;
mod pcapng;
