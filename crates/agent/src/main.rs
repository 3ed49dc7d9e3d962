//! `joey-agent`: the small process beside each sandbox. It starts the containers of `agent.json`, keeps their logs, restarts
//! them, and answers the agent protocol on `agent.sock`. It outlives the daemon that started it.
//!
//! As the first process of a virtual machine it is told the same things over the machine's port ([`guest`]).
//!
//! Called as `joey-agent vmm` it starts a machine's monitor (`joey_jail`).
//!
//! Called as `joey-agent core …` by the kernel it is the handler of crashes (`joey_diagnosis::core_handler`), on its own.

mod check;
mod collect;
mod debugged;
mod diagnosis;
mod files;
mod forward;
mod guest;
mod hook;
mod in_place;
mod last_words;
mod launch;
mod life;
mod log_read;
mod log_write;
mod output;
mod probe;
mod processes;
mod root;
mod server;
mod setup;
mod signal;
mod storage;
mod stream;
mod supervisor;
mod telling;
mod view;
mod volumes;
mod waits;

use std::process::ExitCode;

use joey_kernel::{cgroup, identity, sys};

fn main() -> ExitCode {
    if guest::is_first_process() {
        guest::run();
    }
    let mut words = std::env::args_os().skip(1).peekable();
    if words.next_if(|word| word == "core").is_some() {
        return match joey_diagnosis::core_handler::run(words) {
            Ok(()) => ExitCode::SUCCESS,
            Err(message) => {
                eprintln!("{message}");
                ExitCode::FAILURE
            }
        };
    }
    if words.next_if(|word| word == "vmm").is_some() {
        let message = joey_jail::run();
        eprintln!("{message}");
        println!("{message}");
        return ExitCode::FAILURE;
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
