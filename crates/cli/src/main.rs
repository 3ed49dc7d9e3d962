//! The binary `joey`: reads the command line, runs one command, turns its end into an exit code.
//!
//! Only this crate reads flags and the environment. Exit codes: 0 done, 1 failed, 2 wrong usage; `exec` and `run --rm` pass
//! on the code of what they ran.

mod args;
mod bench;
mod classes;
mod configuration;
mod copy;
mod debug;
mod diagnose;
mod down;
mod exec;
mod failure;
mod forward;
mod guest;
mod host;
mod images;
mod instances;
mod measure;
mod output;
mod restart;
mod roles;
mod run;
mod settings;
mod sinks;
mod top;
mod up;
mod upgrade;
mod version;
mod vnode;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::args::{Arguments, Command};
use crate::failure::Failure;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => error.exit(),
    };
    if let Some(outcome) = roles(&arguments) {
        return outcome.unwrap_or_else(Failure::tell);
    }
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

/// Runs the command where it is a role of the platform, on a runtime of its own.
fn roles(arguments: &Arguments) -> Option<Result<ExitCode, Failure>> {
    let dir = &arguments.data_dir;
    match &arguments.command {
        Command::Up(up) => Some(up.validate(dir).and_then(|settings| {
            roles::log(&up.host.log)?;
            up.host.crash_at.iter().for_each(joey_model::checkpoint::arm);
            roles::run(up::up(settings))
        })),
        Command::Down(down) => Some(settings::for_down(dir).and_then(|settings| {
            roles::log("warn")?;
            roles::run(down::down(&settings, down.purge))
        })),
        Command::Vnode(vnode) => Some(vnode.validate(dir).and_then(|settings| {
            roles::log(&vnode.host.log)?;
            roles::run(vnode::vnode(settings))
        })),
        _ => None,
    }
}

async fn dispatch(arguments: Arguments) -> Result<ExitCode, Failure> {
    let service = arguments.service();
    match arguments.command {
        Command::Up(_) | Command::Down(_) | Command::Vnode(_) => unreachable!("roles have a runtime of their own"),
        Command::Run(run) => run::run(&service, run.validate()?).await,
        Command::Ps(output) => instances::ps(&service, output.format()).await,
        Command::Describe(one) => instances::describe(&service, &one.instance.name, one.output.output).await,
        Command::Events(one) => instances::events(&service, &one.instance.name, one.output.format()).await,
        Command::Cp(cp) => copy::cp(&service, cp).await,
        Command::PortForward(ports) => forward::forward(&service, ports).await,
        Command::Debug(debug) => debug::debug(&service, debug).await,
        Command::Diagnose(args::Diagnose::Core(core)) => diagnose::core(&service, core).await,
        Command::Diagnose(args::Diagnose::Tcpdump(tcpdump)) => diagnose::tcpdump(&service, *tcpdump).await,
        Command::Top(top) => top::top(&service, top).await,
        Command::Restart(asked) => restart::restart(&service, &asked).await,
        Command::Rm(rm) => instances::rm(&service, &rm).await,
        Command::Logs(logs) => instances::logs(&service, logs).await,
        Command::Exec(exec) => exec::exec(&service, exec).await,
        Command::Bench(args::Bench::Start(bench)) => bench::start(&service, bench.validate(&arguments.data_dir)?).await,
        Command::Bench(args::Bench::Probes(bench)) => {
            bench::probes::probes(&service, bench.validate(&arguments.data_dir)?).await
        }
        Command::Attach(attach) => exec::attach(&service, attach).await,
        Command::Image(image) => images::image(&service, image).await,
        Command::Guest(guest) => guest::guest(&service, &arguments.data_dir, guest).await,
        Command::Host(args::Host::Ls(output)) => instances::hosts(&service, output.format()).await,
        Command::Version(version) => version::version(&service, version.format()).await,
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "joey", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    }
}
