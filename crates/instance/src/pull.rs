//! Gets images: those that a sandbox starts with, and those of containers that come or change while it runs.
//!
//! A container whose image is not to be had is held, and its neighbours go on without it, as under a kubelet.

use std::sync::Arc;
use std::time::Instant;

use joey_api::image::RegistryCredential;
use joey_api::instance::{ContainerSpec, InstanceSpec, PullPolicy, VolumeSource};
use joey_api::lifecycle::Role;
use joey_image::Image;
use joey_model::{ErrorKind, Fault, ImageRef};

use crate::engine::Shared;
use crate::life::Life;

/// What a sandbox is made from.
#[derive(Default)]
pub(crate) struct Images {
    /// Of its containers, in their order; none of those that are held.
    pub(crate) containers: Vec<Option<Arc<Image>>>,
    /// Of those volumes that show one, in their order.
    pub(crate) volumes: Vec<Arc<Image>>,
}

/// The containers that a sandbox starts with: those that only look on come when it runs.
pub(crate) fn started(spec: &InstanceSpec) -> impl Iterator<Item = &ContainerSpec> {
    spec.containers.iter().filter(|container| container.role != Role::Debug)
}

/// Whether anything would run: the first of those that come before the main ones, or else any of them.
pub(crate) fn begins(containers: impl Iterator<Item = (Role, bool)>) -> bool {
    let mut mains = false;
    for (role, held) in containers {
        match role {
            Role::Main => mains |= !held,
            _ => return !held,
        }
    }
    mains
}

/// Names of every image of an instance.
pub(crate) fn images_of(spec: &InstanceSpec) -> impl Iterator<Item = &str> {
    let of_volumes = spec.volumes.iter().filter_map(|volume| match &volume.source {
        VolumeSource::Image { reference, .. } => Some(reference.as_str()),
        VolumeSource::Files(_) | VolumeSource::EmptyDir { .. } | VolumeSource::Nfs { .. } => None,
    });
    spec.containers.iter().map(|container| container.image.as_str()).chain(of_volumes)
}

/// Every image that the instance starts with, pulled where its policy says so; the first fault where nothing could start. Dropping
/// the future gives the pull up.
pub(crate) async fn images(life: &mut Life) -> Result<Images, Fault> {
    let mut images = Images::default();
    let mut first = None;
    for container in started(&life.record.spec).cloned().collect::<Vec<_>>() {
        let found = match &container.held {
            Some(held) => Err(held.fault()),
            None => of_life(life, &container.image, container.pull_policy, Some(&container.name)).await,
        };
        images.containers.push(match found {
            Ok(image) => {
                life.let_go(&container.name);
                if let Some(status) = life.status.containers.iter_mut().find(|status| status.name == container.name) {
                    status.image_id = named(&image);
                }
                Some(image)
            }
            Err(fault) => {
                life.hold(&container.name, fault.clone());
                first.get_or_insert(fault);
                None
            }
        });
    }
    if let Some(fault) = first {
        let roles = started(&life.record.spec).map(|container| container.role);
        if !begins(roles.zip(images.containers.iter().map(Option::is_none))) {
            return Err(fault);
        }
    }
    for volume in life.record.spec.volumes.clone() {
        if let VolumeSource::Image { reference, pull_policy } = &volume.source {
            images.volumes.push(of_life(life, reference, *pull_policy, None).await?);
        }
    }
    let all = images.containers.iter().flatten().chain(&images.volumes);
    life.use_images(all.map(|image| image.id.clone()).collect());
    life.mark("images");
    Ok(images)
}

/// What an image is told as, once it is known which it is.
pub(crate) fn named(image: &Image) -> String {
    format!("{}/{}@{}", image.reference.registry(), image.reference.repository(), image.manifest)
}

/// An image of the container of that name, or of a volume; everybody is told at once.
async fn of_life(
    life: &mut Life,
    given: &str,
    policy: PullPolicy,
    container: Option<&str>,
) -> Result<Arc<Image>, Fault> {
    let (shared, credentials) = (life.shared.clone(), life.record.spec.credentials.clone());
    let mut say = |warning: bool, reason: &str, message: String| {
        life.event(warning, reason, message, container);
        if reason == "Pulling" {
            life.publish();
        }
    };
    image(&shared, &credentials, (given, policy), &mut say).await
}

/// An image by its name, present or pulled, as its policy says.
pub(crate) async fn image(
    shared: &Shared,
    credentials: &[RegistryCredential],
    (given, policy): (&str, PullPolicy),
    say: &mut (impl FnMut(bool, &str, String) + Send),
) -> Result<Arc<Image>, Fault> {
    let reference = ImageRef::parse(given)
        .map_err(|error| Fault::new(ErrorKind::Invalid, "InvalidImageName", error.to_string()))?;
    if policy != PullPolicy::Always
        && let Some(image) = shared.images.find(&reference).await
    {
        say(false, "Pulled", format!("Container image \"{given}\" already present on machine"));
        return Ok(image);
    }
    if policy == PullPolicy::Never {
        let message = format!("Container image \"{given}\" is not present with pull policy of Never");
        return Err(Fault::new(ErrorKind::NotFound, "ErrImageNeverPull", message)
            .with_hint("import or pull the image first, or choose the policy IfNotPresent"));
    }
    say(false, "Pulling", format!("Pulling image \"{given}\""));
    let began = Instant::now();
    match shared.images.pull(&reference, credentials, |_| {}).await {
        Ok(image) => {
            let (seconds, size) = (began.elapsed().as_secs_f64(), image.size);
            let message = format!("Successfully pulled image \"{given}\" in {seconds:.3}s. Image size: {size} bytes.");
            say(false, "Pulled", message);
            Ok(image)
        }
        Err(error) => {
            let problem = error.problem.to_string();
            let mut fault = Fault::from(error);
            if fault.reason != "InvalidImageName" {
                // The kubelet's word for every other reason; the message says which it is.
                fault.reason = "ErrImagePull".to_owned();
            }
            // An event and a container's state are one text each: the way out goes with the cause.
            let hint = fault.hint.take().map_or_else(String::new, |hint| format!("; {hint}"));
            say(true, "Failed", format!("Failed to pull image \"{given}\": {problem}{hint}"));
            fault.message.push_str(&hint);
            Err(fault)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_run_at_first() {
        let begins = |containers: &[(Role, bool)]| super::begins(containers.iter().copied());
        assert!(begins(&[(Role::Main, true), (Role::Main, false)]));
        assert!(begins(&[(Role::Init, false), (Role::Main, true)]));
        assert!(begins(&[(Role::Sidecar, false), (Role::Init, true), (Role::Main, true)]));
        assert!(!begins(&[(Role::Init, true), (Role::Main, false)]));
        assert!(!begins(&[(Role::Main, true)]));
    }
}
