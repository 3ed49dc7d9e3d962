//! `joey-agent`: the small process beside each sandbox. It starts the containers of `agent.json`, keeps their logs, restarts
//! them, and answers the agent protocol on `agent.sock`. It outlives the daemon that started it.
//!
//! As the first process of a virtual machine it is told the same things over the machine's port ([`guest`]).
//!
//! Called as `joey-agent jail` it waits until it is to start a machine's monitor, or to give one what an instance has (`joey_jail`).
//!
//! Called as `joey-agent inside` it is the first process of a sandbox of gVisor's ([`inside`]).
//!
//! Called as `joey-agent core …` by the kernel, or `guest-core …` by a machine's, it is the handler of crashes
//! (`joey_diagnosis::core_handler`), on its own.

mod check;
mod collect;
mod debugged;
mod diagnosis;
mod files;
mod forward;
mod guest;
mod hook;
mod in_place;
mod inside;
mod last_words;
mod launch;
mod life;
mod log_read;
mod log_write;
mod output;
mod probe;
mod processes;
mod rehearsal;
mod remote;
mod root;
mod sandboxed;
mod server;
mod setup;
mod storage;
mod stream;
mod supervisor;
mod telling;
mod volumes;
mod waits;

use std::process::ExitCode;

use joey_diagnosis::core_handler;
use joey_kernel::{cgroup, identity, signal, sys, view};

fn main() -> ExitCode {
    if guest::is_first_process() {
        guest::run();
    }
    let mut words = std::env::args_os().skip(1).peekable();
    if words.next_if(|word| word == "core").is_some() {
        return ended(core_handler::run(words));
    }
    if words.next_if(|word| word == "guest-core").is_some() {
        return ended(core_handler::run_in_guest(words));
    }
    if words.next_if(|word| word == "jail").is_some() {
        return match joey_jail::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(message) => {
                println!("{message}");
                ExitCode::FAILURE
            }
        };
    }
    if words.next_if(|word| word == "inside").is_some() {
        return match inside::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(message) => {
                eprintln!("{message}");
                ExitCode::FAILURE
            }
        };
    }
    let options = match setup::Options::parse(words) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    match setup::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            // The daemon reads the reason from standard output, where `ready` would be.
            println!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn ended(done: Result<(), String>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}
