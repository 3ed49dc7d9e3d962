//! The binary `joey`: reads the command line, runs one command, turns its end into an exit code.
//!
//! Only this crate reads flags and the environment. Exit codes: 0 done, 1 failed, 2 wrong usage; `exec` and `run --rm` pass
//! on the code of what they ran.

mod args;
mod exec;
mod failure;
mod images;
mod instances;
mod output;
mod run;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::args::{Arguments, Command};
use crate::failure::Failure;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => error.exit(),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::from(error).tell(),
    };
    let outcome = runtime.block_on(dispatch(arguments));
    // A blocking read of standard input may still be open: it must not hold up the end.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(failure) => failure.tell(),
    }
}

async fn dispatch(arguments: Arguments) -> Result<ExitCode, Failure> {
    let service = arguments.service();
    match arguments.command {
        Command::Run(run) => run::run(&service, run.validate()?).await,
        Command::Ps(output) => instances::ps(&service, output.format()).await,
        Command::Describe(named) => instances::describe(&service, &named.name).await,
        Command::Events(named) => instances::events(&service, &named.name).await,
        Command::Restart(named) => instances::restart(&service, &named.name).await,
        Command::Rm(rm) => instances::rm(&service, &rm).await,
        Command::Logs(logs) => instances::logs(&service, logs).await,
        Command::Exec(exec) => exec::exec(&service, exec).await,
        Command::Image(image) => images::image(&service, image).await,
        Command::Host(args::Host::Ls(output)) => instances::hosts(&service, output.format()).await,
        Command::Version(version) => output::version(version.format()),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "joey", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    }
}
