//! What only a sandbox with a kernel of its own can have.

use joey_api::annotations::{STORAGE_OPTIONS, encrypts_disk};
use joey_api::instance::{InstanceSpec, VolumeSource};
use joey_model::{ErrorKind, Fault};
use joey_sandbox::SandboxClass;

/// Refuses it where the class shares the kernel of this host.
pub(crate) fn check(spec: &InstanceSpec, class: &dyn SandboxClass) -> Result<(), Fault> {
    if class.mounts_itself().is_some() {
        return Ok(());
    }
    let far = spec.volumes.iter().find(|volume| matches!(volume.source, VolumeSource::Nfs { .. }));
    let why = match far {
        Some(volume) => format!("volume \"{}\": the kernel of this host mounts nothing of a tenant's", volume.name),
        None if encrypts_disk(&spec.annotations) == Ok(true) => {
            format!("annotation {STORAGE_OPTIONS}: it has no disk of its own that could be encrypted")
        }
        None => return Ok(()),
    };
    let message = format!("class \"{}\" shares the kernel of this host; {why}", spec.class);
    Err(Fault::new(ErrorKind::Invalid, "InvalidInstance", message)
        .with_hint("choose a class that has a kernel of its own: rund"))
}
