//! What the whole-system tests share: the real binary as a fixture, registries, kubectl, and what a host looks like before and
//! after. No test lives here, and nothing here links against Joey: the tests see what a user sees.
//!
//! Every fixture ends what it started, by process id, also when a test fails.

pub mod arena;
pub mod guest;
pub mod host;
pub mod image;
pub mod intake;
pub mod joey;
pub mod kafka;
pub mod kubernetes;
pub mod nfs;
pub mod program;
pub mod registry;
pub mod served;
pub mod source;
pub mod tokens;
pub mod traffic;

use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use joey::{Joey, Settings};
pub use program::{Outcome, Program, run};
pub use registry::Registry;

/// The repository's root.
pub fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").to_owned()
}

/// The folder that holds the built programs: that of this test.
pub fn programs() -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a program");
    test.ancestors().nth(2).expect("a test lies in target/PROFILE/deps").to_owned()
}

/// Waits until `condition` gives a value, looking every 20 ms; fails with `what` and its last words when `deadline` has passed.
///
/// The only place in the tests that sleeps.
pub fn wait_until<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + deadline;
    loop {
        match condition() {
            Ok(value) => return value,
            Err(last) if Instant::now() >= end => panic!("{what}: not within {deadline:?}; last seen: {last}"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Lets some time pass: the moment of what comes next is what a test varies.
pub fn pause(length: Duration) {
    let end = Instant::now() + length;
    wait_until("time passes", length + seconds(1), || holds(Instant::now() >= end, ""));
}

/// A condition for [`wait_until`] from a truth and what was seen.
pub fn holds(truth: bool, seen: impl std::fmt::Debug) -> Result<(), String> {
    if truth { Ok(()) } else { Err(format!("{seen:?}")) }
}

/// Seconds, for deadlines.
pub const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// A name that no other test uses.
pub fn unique(prefix: &str) -> String {
    format!("{prefix}-{:06x}", rand::random::<u32>() & 0xff_ffff)
}
