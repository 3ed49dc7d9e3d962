//! Crash points for recovery tests: a process told to stop at a named durable step aborts there, as if killed.
//!
//! Every durable step of creation and deletion calls [`reached`] with its name; `joey up --crash-at NAME` (hidden) arms one. Names
//! of the agents' steps begin with `agent.`: they are armed in every agent that is started.

use std::sync::OnceLock;

static ARMED: OnceLock<String> = OnceLock::new();

/// Arms the crash point `name` for the life of this process; later calls change nothing.
pub fn arm(name: impl Into<String>) {
    let _ = ARMED.set(name.into());
}

/// The armed step, if it is one of the agents'.
pub fn armed_in_agents() -> Option<&'static str> {
    ARMED.get().map(String::as_str).filter(|name| name.starts_with("agent."))
}

/// Says that the durable step `name` was just completed; aborts the process when that step is armed.
pub fn reached(name: &str) {
    if ARMED.get().is_some_and(|armed| armed == name) {
        eprintln!("crash point {name} is reached");
        std::process::abort();
    }
}
