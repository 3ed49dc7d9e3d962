//! Modules of the kernel that only some machines need, and that a disk brings when they do.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use joey_api::guest::{Extent, LAYER_SLOTS, ModuleDisk};
use joey_kernel::sys;

use crate::disks;

/// A longer one is none.
const LONGEST: u64 = 32 << 20;

/// Loads the modules of a disk in their order. Those that are there stay.
pub async fn load(disk: &ModuleDisk) -> io::Result<()> {
    if !LAYER_SLOTS.contains(&disk.slot) || disk.modules.iter().any(|module| module.length > LONGEST) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "there are no modules there"));
    }
    let device = File::open(disks::disk(disk.slot).await?)?;
    for Extent { offset, length } in &disk.modules {
        let mut bytes = vec![0; usize::try_from(*length).map_err(io::Error::other)?];
        device.read_exact_at(&mut bytes, *offset)?;
        // SAFETY: the bytes, their number, and a C string that lives through the call.
        let loaded = unsafe { libc::syscall(libc::SYS_init_module, bytes.as_ptr(), bytes.len(), c"".as_ptr()) };
        match sys::check(loaded) {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
