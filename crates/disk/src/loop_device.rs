//! Loop devices: files as block devices.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

// linux/loop.h
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// What a device is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    /// Past the page cache, which keeps what the file system on it reads and writes already.
    Write,
}

/// `struct loop_config` with its `struct loop_info64`, of which only the flags are set.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    before_flags: [u8; 52],
    flags: u32,
    after_flags: [u8; 176],
    reserved: [u64; 8],
}

/// A loop device on `image` that frees itself when its mount goes; open until then.
pub fn attach(image: &Path, access: Access) -> io::Result<(PathBuf, File)> {
    let writes = access == Access::Write;
    let image = OpenOptions::new().read(true).write(writes).open(image)?;
    let own = if writes { LO_FLAGS_DIRECT_IO } else { LO_FLAGS_READ_ONLY };
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    for _ in 0..16 {
        // SAFETY: LOOP_CTL_GET_FREE takes no argument and returns a device number.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = OpenOptions::new().read(true).write(writes).open(&path)?;
        let config = LoopConfig {
            fd: image.as_raw_fd() as u32,
            block_size: 0,
            before_flags: [0; 52],
            flags: own | LO_FLAGS_AUTOCLEAR,
            after_flags: [0; 176],
            reserved: [0; 8],
        };
        // SAFETY: LOOP_CONFIGURE reads one loop_config, which `config` is laid out as and outlives the call.
        if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } == 0 {
            return Ok((path, device));
        }
        let error = io::Error::last_os_error();
        // EBUSY: somebody else took the number first.
        if error.raw_os_error() != Some(libc::EBUSY) {
            return Err(error);
        }
    }
    Err(io::Error::other("no loop device became free"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loop_structure_has_the_kernels_size() {
        // loop_info64 is 232 bytes, loop_config 8 before and 64 after it; the flags are at offset 52 of loop_info64.
        assert_eq!(size_of::<LoopConfig>(), 304);
        assert_eq!(std::mem::offset_of!(LoopConfig, flags), 8 + 52);
    }
}
