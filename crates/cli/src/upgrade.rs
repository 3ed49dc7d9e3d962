//! `joey guest upgrade`: another kernel or agent for the instances that run, one after another. The first that does not come back ends it.

use std::process::ExitCode;
use std::time::Duration;

use joey_api::instance::{Instance, WirePhase, WireRestartPolicy};
use joey_pool::PoolClient;
use serde_json::json;

use crate::args::GuestUpgrade;
use crate::failure::Failure;
use crate::guest::{self, blocking, failed, make, told};
use crate::output::{self, Format};
use crate::restart::{LIMIT, until_restarted};
use crate::settings::Place;

pub async fn upgrade(service: &PoolClient, place: Place, asked: GuestUpgrade) -> Result<ExitCode, Failure> {
    let format = asked.build.output.format();
    let for_people = matches!(format, Format::Table | Format::Wide);
    let dry = asked.dry_run;
    let guest = blocking(move || {
        if !dry {
            let built = make(&place, &asked.build)?;
            if for_people {
                guest::tell(&built)?;
            }
            return Ok(built.guest);
        }
        let failed = failed("guests cannot be listed");
        let none = || Failure::new("there is no guest").with_hint("make one with joey guest build");
        guest::guests(&place)?.current().map_err(failed)?.ok_or_else(none)
    });
    let guest = guest.await?;
    let all = service.list().await.map_err(|error| {
        Failure::caused("the instances cannot be listed", &error)
            .with_hint("instances that are started later boot the current guest anyway")
    })?;
    let (mut renewed, mut left) = (Vec::new(), Vec::new());
    for instance in all.iter().filter(|instance| instance.status.guest.as_ref().is_some_and(|id| *id != guest.id)) {
        let name = &instance.spec.name;
        if let Some(why) = stays(instance) {
            left.push(json!({ "name": name, "why": why }));
            say(for_people, format!("{name}: left as it is: {why}"))?;
            continue;
        }
        let before = instance.status.guest.as_deref().unwrap_or_default();
        if dry {
            say(for_people, format!("{name}: would begin anew: guest {before}"))?;
        } else {
            renew(service, instance).await?;
            say(for_people, format!("{name}: runs anew: guest {before} before, {} now", guest.id))?;
        }
        renewed.push(name.clone());
    }
    if for_people {
        let (count, noun) = (renewed.len(), if renewed.len() == 1 { "instance" } else { "instances" });
        let word = if dry { "would begin anew" } else { "run anew" };
        say(true, format!("{count} {noun} {word}"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let answer = json!({ "guest": told(&guest, true), "dryRun": dry, "renewed": renewed, "left": left });
    output::print(format, &answer, |_| Vec::new())
}

fn say(for_people: bool, line: String) -> Result<(), Failure> {
    if for_people {
        output::write(format!("{line}\n").as_bytes())?;
    }
    Ok(())
}

/// Why an instance is not to begin anew.
fn stays(instance: &Instance) -> Option<&'static str> {
    match (instance.spec.restart_policy, instance.status.phase) {
        (WireRestartPolicy::OnFailure | WireRestartPolicy::Never, _) => {
            Some("it runs once (its restart policy is not Always)")
        }
        (_, WirePhase::Succeeded | WirePhase::Failed | WirePhase::Terminating) => Some("it has ended or is ending"),
        _ => None,
    }
}

async fn renew(service: &PoolClient, before: &Instance) -> Result<(), Failure> {
    let name = &before.spec.name;
    service.renew(&before.id).await?;
    let limit = LIMIT + Duration::from_secs(before.spec.termination_grace_period_seconds.into());
    tokio::time::timeout(limit, until_restarted(service, before)).await.map_err(|_| {
        Failure::new(format!(
            "instance \"{name}\" did not run again within {} s; the others were left",
            limit.as_secs()
        ))
        .with_hint(format!("see joey describe {name} and joey events {name}; what is left goes on with this command"))
    })?
}
