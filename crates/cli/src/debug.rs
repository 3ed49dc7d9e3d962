//! `joey debug`: a further container in a running instance, to look at it. It stays until it ends or the instance does.

use std::process::ExitCode;

use futures::StreamExt;
use joey_api::change::InstanceChange;
use joey_api::instance::{ContainerSpec, ContainerState, Instance, WatchEvent};
use joey_api::lifecycle::Role;
use joey_pool::PoolClient;

use crate::args::{Attach, Debug};
use crate::failure::Failure;
use crate::run;

pub async fn debug(service: &PoolClient, debug: Debug) -> Result<ExitCode, Failure> {
    let instance = service.get(&debug.name).await?;
    let name = match debug.container {
        Some(name) => name,
        None => free_name(&instance),
    };
    let made = ContainerSpec {
        role: Role::Debug,
        target: debug.target,
        stdin: debug.stdin,
        tty: debug.tty,
        command: debug.args,
        ..ContainerSpec::new(&name, &debug.image)
    };
    let change = InstanceChange { debug: vec![made], ..InstanceChange::default() };
    service.change(&instance.id, &change).await?;
    let ended = started(service, &instance.id, &name).await?;
    if !debug.stdin && !debug.tty {
        println!("{name}");
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(code) = ended {
        return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
    }
    eprintln!("container {name} runs; if there is no prompt, press enter");
    let attach = Attach { name: instance.id, container: Some(name), stdin: debug.stdin, tty: debug.tty };
    crate::exec::attach(service, attach).await
}

/// `debugger-N`, the first that is free.
fn free_name(instance: &Instance) -> String {
    let taken = |name: &String| instance.spec.containers.iter().any(|container| container.name == *name);
    (1..).map(|number| format!("debugger-{number}")).find(|name| !taken(name)).unwrap_or_default()
}

/// Waits until the container runs; the exit code of one that has ended already.
async fn started(service: &PoolClient, id: &str, name: &str) -> Result<Option<i32>, Failure> {
    loop {
        let mut changes = service.watch().await?;
        while let Some(change) = changes.next().await {
            let instance = match change? {
                WatchEvent::Set { instance } if instance.id == id => instance,
                WatchEvent::Gone { id: gone, .. } if gone == id => {
                    return Err(Failure::new("the instance ended meanwhile"));
                }
                _ => continue,
            };
            match instance.status.containers.iter().find(|container| container.name == name).map(|own| &own.state) {
                Some(ContainerState::Running { .. }) => return Ok(None),
                Some(ContainerState::Terminated(end)) if end.started_at.is_some() => return Ok(Some(end.exit_code)),
                Some(ContainerState::Terminated(end)) => return Err(Failure::new(end.message.clone())),
                Some(state) => {
                    if let Some(why) = run::waits_in_vain(state) {
                        return Err(Failure::new(format!("container \"{name}\" does not start: {why}"))
                            .with_hint("it is tried again; `joey events` tells how it goes"));
                    }
                }
                None => {}
            }
        }
    }
}
