//! The machine's disks: the one that the instance writes, and those that hold layers one behind the other.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use joey_api::guest::{DISK_SLOT, INSTANCE, LAYER_SLOTS, LAYERS, Layer, LayerDisk};
use libc::{MS_NOATIME, MS_NODEV, MS_RDONLY};

use crate::machine;
use joey_kernel::sys;

/// Layers of one disk: partitions have numbers below this.
const MOST: usize = 255;
/// Bytes of a sector, in which partitions are counted.
const SECTOR: u64 = 512;

const DRIVER: &str = "virtio_blk";
/// How long a mount may be in use by what has ended, and between two looks.
const LET_GO: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(2);

/// Slots that hold layers already.
static TAKEN: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// Gives a slot its driver: what is in it is looked at from here on. The device that it is.
pub(crate) async fn disk(slot: u32) -> io::Result<PathBuf> {
    machine::appeared(machine::DISK, slot as usize + 1).await?;
    let disks = machine::devices(machine::DISK)?;
    let device =
        disks.get(slot as usize).ok_or_else(|| io::Error::other(format!("there is no disk in slot {slot}")))?;
    machine::bind(device, DRIVER)?;
    Ok(Path::new("/dev").join(machine::named(device, "block")?))
}

/// Mounts the disk that the instance writes.
pub async fn mount_own() -> io::Result<()> {
    let device = disk(DISK_SLOT).await?;
    // It ends with the machine: nothing is kept for a next time.
    let options = "noinit_itable,errors=continue,nobarrier";
    sys::mount(&device, INSTANCE, "ext4", MS_NOATIME | MS_NODEV, options)
}

/// Lets go of the disk: another one may be put into its slot.
pub async fn unmount_own() -> io::Result<()> {
    unmount(Path::new(INSTANCE)).await?;
    let disks = machine::devices(machine::DISK)?;
    disks.get(DISK_SLOT as usize).map_or(Ok(()), |device| machine::unbind(device, DRIVER))
}

/// Unmounts what may be in use for another moment: mounts of processes that have ended go after them.
pub async fn unmount(place: &Path) -> io::Result<()> {
    let gone = async {
        loop {
            match sys::unmount(place) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => tokio::time::sleep(LOOK).await,
                unmounted => return unmounted,
            }
        }
    };
    let busy = |_| io::Error::other(format!("{} is in use", place.display()));
    tokio::time::timeout(LET_GO, gone).await.map_err(busy)?
}

/// Mounts the layers of a disk, each by its name. Those that are mounted already stay.
pub async fn mount_layers(disk: &LayerDisk) -> io::Result<()> {
    check(disk)?;
    if !TAKEN.lock().unwrap_or_else(PoisonError::into_inner).insert(disk.slot) {
        return Err(io::Error::other(format!("slot {} holds layers already", disk.slot)));
    }
    let device = self::disk(disk.slot).await?;
    let open = File::open(&device)?;
    for (number, layer) in (1..).zip(&disk.layers) {
        let place = Path::new(LAYERS).join(&layer.name);
        if is_there(&place) {
            continue;
        }
        let failed = |what: &'static str| {
            move |error: io::Error| io::Error::new(error.kind(), format!("{what} layer {}: {error}", layer.name))
        };
        add_partition(&open, number, layer).map_err(failed("tell apart"))?;
        fs::create_dir_all(&place)?;
        let part = format!("{}{number}", device.display());
        sys::mount(&part, place, "erofs", MS_RDONLY | MS_NOATIME, "").map_err(failed("mount"))?;
    }
    Ok(())
}

fn is_there(place: &Path) -> bool {
    fs::read_dir(place).is_ok_and(|mut entries| entries.next().is_some())
}

fn check(disk: &LayerDisk) -> io::Result<()> {
    let wrong = |what: String| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    if !LAYER_SLOTS.contains(&disk.slot) || disk.layers.len() > MOST {
        return wrong(format!("slot {} takes no {} layers", disk.slot, disk.layers.len()));
    }
    for Layer { name, offset, length } in &disk.layers {
        let named = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !named || !offset.is_multiple_of(SECTOR) || !length.is_multiple_of(SECTOR) || *length == 0 {
            return wrong(format!("layer \"{name}\" of {length} bytes at {offset} is none"));
        }
    }
    Ok(())
}

/// Tells the kernel of a part of a disk, which has no table of parts.
fn add_partition(disk: &File, number: libc::c_int, layer: &Layer) -> io::Result<()> {
    // linux/blkpg.h: BLKPG with BLKPG_ADD_PARTITION.
    const BLKPG: libc::c_ulong = 0x1269;
    const ADD: libc::c_int = 1;
    #[repr(C)]
    struct Part {
        start: libc::c_longlong,
        length: libc::c_longlong,
        number: libc::c_int,
        names: [u8; 128],
    }
    #[repr(C)]
    struct Order {
        operation: libc::c_int,
        flags: libc::c_int,
        length: libc::c_int,
        data: *const Part,
    }
    let part = Part { start: layer.offset as i64, length: layer.length as i64, number, names: [0; 128] };
    let order = Order { operation: ADD, flags: 0, length: size_of::<Part>() as libc::c_int, data: &raw const part };
    // SAFETY: both structures have the kernel's layout and live through the call.
    sys::check(unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG as _, &raw const order) }.into()).map(drop)
}
