//! Interfaces, addresses, routes and bandwidth of instances: a network namespace with one routed veth pair each.
//!
//! There is no bridge. The host's end of every pair carries a /32 route to its instance, so there is no limit of ports, and
//! neighbour entries on both sides are static, so an instance has nobody to lie to. What a namespace is and how it is made is
//! in [`namespace`], what keeps it in [`holder`], the packet rules are in [`rules`], caps in [`bandwidth`] and [`packets`];
//! [`networks`] drives them.
//!
//! A transfer under a cap gets between 90 and 110 % of it, also while another fills the other direction (`tests/real_kernel/speed.rs`
//! holds that from 5 Mbit/s to 1 Gbit/s); packet headers count. `cost` in the same file measures what attaching, preparing and releasing take.
//!
//! Must never depend on instances' specifications, sandboxes or images: it knows ids and addresses only.

mod addresses;
mod bandwidth;
mod check;
mod error;
mod holder;
mod links;
mod namespace;
mod networks;
mod packets;
mod place;
mod program;
mod recovery;
mod rules;

pub use bandwidth::Bandwidth;
pub use error::NetworkError;
pub use networks::{Attachment, CHECKPOINTS, Config, Networks};
