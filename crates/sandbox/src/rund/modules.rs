//! Modules of the guest's kernel that a Pod needs and most do without: they lie on the disk of its layers, behind those.

use std::io;
use std::path::PathBuf;

use joey_api::agent::AgentConfig;
use joey_api::guest::{Extent, ModuleDisk};
use joey_hypervisor::{Room, parts};

use super::Slots;

/// Puts the modules for volumes of NFS onto a disk, where the Pod has such volumes.
pub(super) fn put(
    config: &AgentConfig,
    nfs: &[PathBuf],
    room: &Room,
    slots: &mut Slots,
) -> io::Result<Option<ModuleDisk>> {
    if config.volumes.iter().all(|volume| volume.nfs.is_none()) {
        return Ok(None);
    }
    if nfs.is_empty() {
        return Err(io::Error::other("the guest has no modules for nfs; joey guest build makes one that has"));
    }
    // The first disk is there in every machine, also in one without layers.
    let files = slots.entry(room.slots.start).or_default();
    let before = files.len();
    if before + nfs.len() > room.files {
        return Err(io::Error::other("there is no room for modules beside so many layers"));
    }
    files.extend(nfs.iter().cloned());
    let places = parts(files)?.split_off(before);
    let modules = places.into_iter().map(|part| Extent { offset: part.offset, length: part.length }).collect();
    Ok(Some(ModuleDisk { slot: room.slots.start, modules }))
}
