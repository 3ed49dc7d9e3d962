//! Crash points for recovery tests: a process told to stop at a named durable step aborts there, as if killed.
//!
//! Every durable step of creation and deletion calls [`reached`] with its name; `joey up --crash-at NAME` (hidden) arms one.

use std::sync::OnceLock;

static ARMED: OnceLock<String> = OnceLock::new();

/// Arms the crash point `name` for the life of this process; later calls change nothing.
pub fn arm(name: impl Into<String>) {
    let _ = ARMED.set(name.into());
}

/// Says that the durable step `name` was just completed; aborts the process when that step is armed.
pub fn reached(name: &str) {
    if ARMED.get().is_some_and(|armed| armed == name) {
        std::process::abort();
    }
}
