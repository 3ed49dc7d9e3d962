//! `joey guest`: what virtual machines boot.

use std::path::Path;
use std::process::ExitCode;

use joey_guest::{Built, Guest, GuestError, Guests, Kernel, Request};
use joey_model::quantity::human_bytes;
use joey_pool::PoolClient;

use crate::args;
use crate::failure::Failure;
use crate::output::{self, Format};
use crate::settings::{self, Place};
use crate::upgrade;

pub async fn guest(service: &PoolClient, data_dir: &Path, command: args::Guest) -> Result<ExitCode, Failure> {
    let place = Place::of(data_dir)?;
    match command {
        args::Guest::Build(build) => blocking(move || self::build(&place, &build)).await,
        args::Guest::Upgrade(upgrade) => upgrade::upgrade(service, place, upgrade).await,
        args::Guest::Ls(output) => blocking(move || list(&place, output.format())).await,
        args::Guest::Rm { guests } => blocking(move || remove(&place, &guests)).await,
    }
}

/// Does what takes a while beside the runtime.
pub async fn blocking<T: Send + 'static>(
    what: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(what).await.unwrap_or_else(|error| Err(Failure::new(error.to_string())))
}

pub fn failed(what: &'static str) -> impl Fn(GuestError) -> Failure {
    move |error| match error.hint() {
        Some(hint) => Failure::caused(what, &error).with_hint(hint),
        None => Failure::caused(what, &error),
    }
}

pub fn guests(place: &Place) -> Result<Guests, Failure> {
    Guests::open(place.file("guests")).map_err(failed("guests cannot be looked after"))
}

fn build(place: &Place, asked: &args::GuestBuild) -> Result<ExitCode, Failure> {
    let built = make(place, asked)?;
    let format = asked.output.format();
    if matches!(format, Format::Table | Format::Wide) {
        tell(&built)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::print(format, &told(&built.guest, true), |_| Vec::new())
}

/// Tells people what was made.
pub fn tell(built: &Built) -> Result<(), Failure> {
    let guest = &built.guest;
    let word = if built.fresh { "made" } else { "there already" };
    let sizes =
        format!("kernel {}, first files {}", human_bytes(guest.kernel_bytes), human_bytes(guest.initramfs_bytes));
    output::write(format!("guest {} {word}: Linux {}, {sizes}\n", guest.id, guest.release).as_bytes())?;
    Ok(())
}

/// Makes the guest that is asked for, and makes it the current one.
pub fn make(place: &Place, asked: &args::GuestBuild) -> Result<Built, Failure> {
    let failed = failed("no guest was made");
    let guests = guests(place)?;
    let agent = settings::agent(asked.agent.as_deref()).map_err(|why| Failure::usage(format!("--agent: {why}")))?;
    let kernel = match (&asked.package, &asked.kernel) {
        (Some(package), _) => Kernel::Package(package.clone()),
        (None, Some(kernel)) => Kernel::Files { kernel: kernel.clone(), modules: asked.modules.clone() },
        (None, None) => {
            let into = place.file("guests").join("packages");
            std::fs::create_dir_all(&into)?;
            Kernel::Package(joey_guest::fetch_package(&into, None).map_err(&failed)?)
        }
    };
    guests.build(&Request { kernel, agent }).map_err(failed)
}

pub fn told(guest: &Guest, current: bool) -> serde_json::Value {
    serde_json::json!({
        "id": guest.id,
        "current": current,
        "release": guest.release,
        "kernel": guest.kernel,
        "kernelBytes": guest.kernel_bytes,
        "initramfs": guest.initramfs,
        "initramfsBytes": guest.initramfs_bytes,
        "modules": guest.modules,
    })
}

fn list(place: &Place, format: Format) -> Result<ExitCode, Failure> {
    let failed = failed("guests cannot be listed");
    let guests = guests(place)?;
    let current = guests.current().map_err(&failed)?.map(|guest| guest.id);
    let all = guests.list().map_err(&failed)?;
    let values: Vec<_> = all.iter().map(|guest| told(guest, current.as_ref() == Some(&guest.id))).collect();
    output::print(format, &values, |_| {
        let mut rows = vec![["GUEST", "CURRENT", "LINUX", "KERNEL", "FIRST FILES"].map(str::to_owned).to_vec()];
        rows.extend(all.iter().map(|guest| {
            let is_current = if current.as_ref() == Some(&guest.id) { "yes" } else { "" };
            let sizes = [guest.kernel_bytes, guest.initramfs_bytes].map(human_bytes);
            let [kernel, initramfs] = sizes;
            vec![guest.id.clone(), is_current.to_owned(), guest.release.clone(), kernel, initramfs]
        }));
        rows
    })
}

fn remove(place: &Place, ids: &[String]) -> Result<ExitCode, Failure> {
    let all = guests(place)?;
    let mut failures = Vec::new();
    for id in ids {
        match all.remove(id) {
            Ok(()) => output::write(format!("{id}\n").as_bytes())?,
            Err(error) => failures.push(failed("guest was not removed")(error)),
        }
    }
    Failure::all(failures).map_or(Ok(ExitCode::SUCCESS), Err)
}
