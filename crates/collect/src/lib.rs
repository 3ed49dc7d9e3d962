//! What containers write, kept on the disk of their instance for the collector: output in rotated parts, lines of files, both as
//! numbered segments (`collect/CONTAINER/SOURCE/BYTES.LINES`) that whoever carries them reads by number.
//!
//! ```text
//! output ─► Log (CRI lines, rotated) ─┐
//! files  ─► Files ─► Log ─────────────┴─► Segments ─► read by joey_hidecar
//! ```
//!
//! Part of the agent, so it is small; the host uses it to read segments, and for what an agent that was killed did not come to
//! ([`last_look`]). Must never depend on runtimes or transports, nor know where segments go.

mod files;
mod last;
mod log;
mod paths;
mod positions;
mod segments;
mod sys;

pub use files::Files;
pub use last::last_look;
pub use log::{Log, RECORD};
pub use segments::{Segment, Segments, measure};

/// Where segments are, below the directory of an instance.
pub const DIRECTORY: &str = "collect";
