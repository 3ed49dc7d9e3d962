//! The instance service: turns requests into instances on hosts, keeps what was asked for, tells what became of it.
//!
//! Desired state (the records) is in the store, each change durable before it is acknowledged. What runs is the hosts'
//! truth: it is followed, kept in memory and never written. Must never depend on Kubernetes, on sandboxes or on a
//! particular host: hosts are reached through [`Host`] alone.

pub mod client;
pub mod fake;
pub mod host;
mod openapi;
mod persist;
mod rest;
mod service;
mod state;

pub use client::PoolClient;
pub use host::{ByteStream, Frames, Host, HostEvents};
pub use service::{CHECKPOINTS, Pool};
