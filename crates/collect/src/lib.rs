//! What containers write, kept on the disk of their instance for the collector: output in rotated parts, lines of files, both as
//! numbered segments (`collect/CONTAINER/SOURCE/BYTES.LINES`) that whoever carries them reads by number.
//!
//! ```text
//! output ─► Log (CRI lines, rotated) ─┐
//! files  ─► Files ─► Log ─────────────┴─► Segments ─► read by joey_hidecar
//!                                            └ in a machine ─► agent protocol ─► Mirror ─► Segments of the host
//! ```
//!
//! Part of the agent, so it is small; the host uses it to read segments, to have those that lie in a machine ([`Mirror`]), and for what
//! an agent that was killed did not come to ([`last_look`]). Must never depend on runtimes or transports, nor know where segments go.

mod files;
mod last;
mod log;
mod mirror;
mod paths;
mod positions;
mod reading;
mod segments;
mod sys;

pub use files::Files;
pub use last::last_look;
pub use log::{Log, RECORD};
pub use mirror::{Mirror, Refused};
pub use reading::{PART, Part, Position, read};
pub use segments::{Segment, Segments, measure};

/// Where segments are, below the directory of an instance.
pub const DIRECTORY: &str = "collect";
