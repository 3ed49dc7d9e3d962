//! What the first process of a machine does before there is anything else: file systems, modules, drivers, clock, entropy; and the
//! end.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use joey_api::guest::POWER_OFF;
use libc::{MS_NODEV, MS_NOEXEC, MS_NOSUID};

use joey_kernel::sys;

/// Modules in the order in which they are loaded, put there by who made the file system (`joey_guest`).
const MODULES: &str = "/modules";
/// The module that finds the machine's devices; the port's driver is in the kernel.
const TRANSPORT: &str = "virtio_mmio";
const DEVICES: &str = "/sys/bus/virtio/devices";
const DRIVERS: &str = "/sys/bus/virtio/drivers";

/// Kinds of devices (Virtual I/O Device, 1.2, chapter 5), as the kernel writes them.
pub const INTERFACE: &str = "0x0001";
pub const DISK: &str = "0x0002";
const ENTROPY: &str = "0x0004";
const BALLOON: &str = "0x0005";
const SOCKET: &str = "0x0013";
/// The modules of the socket, which most machines do without, by a part of their names.
const SOCKET_MODULES: &str = "vsock";

/// How long a device may take to be seen that was put in while the machine ran, and between two looks.
const APPEARS: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(5);

fn told<T>(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> Result<T, String> {
    move |error| Err(format!("cannot {what}: {error}"))
}

/// Mounts what the kernel shows of itself and loads the modules. Disks and interfaces have no driver yet: what they are is known when
/// an instance comes.
pub fn prepare() -> Result<(), String> {
    let closed = MS_NOSUID | MS_NOEXEC | MS_NODEV;
    for (kind, place, flags, data) in [
        ("devtmpfs", "/dev", MS_NOSUID | MS_NOEXEC, "mode=0755"),
        ("proc", "/proc", closed, ""),
        ("sysfs", "/sys", closed, ""),
        ("cgroup2", "/sys/fs/cgroup", closed, "nsdelegate"),
    ] {
        fs::create_dir_all(place).or_else(told(format_args!("make {place}")))?;
        match sys::mount(kind, place, kind, flags, data) {
            // Some kernels mount it by themselves.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            mounted => mounted.or_else(told(format_args!("mount {place}")))?,
        }
    }
    sys::loopback_up().or_else(told("start the loopback interface"))?;
    let mut modules: Vec<PathBuf> = match fs::read_dir(MODULES) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => Vec::new(),
    };
    modules.sort();
    let (first, others): (Vec<_>, Vec<_>) =
        modules.iter().partition(|module| module.to_string_lossy().contains(TRANSPORT));
    first.into_iter().try_for_each(|module| load(module))?;
    fs::write("/sys/bus/virtio/drivers_autoprobe", "0").or_else(told("keep drivers off"))?;
    for module in others {
        let for_socket = module.to_string_lossy().contains(SOCKET_MODULES);
        if !for_socket || !devices(SOCKET).or_else(told("list the devices"))?.is_empty() {
            load(module)?;
        }
    }
    let drivers = [(BALLOON, "virtio_balloon"), (ENTROPY, "virtio_rng"), (SOCKET, "vmw_vsock_virtio_transport")];
    for (kind, driver) in drivers {
        // A machine may do without them.
        for device in devices(kind).or_else(told("list the devices"))? {
            let _ = bind(&device, driver);
        }
    }
    // They are in the kernel now, and their files in memory.
    let _ = fs::remove_dir_all(MODULES);
    Ok(())
}

fn load(module: &Path) -> Result<(), String> {
    let name = || format!("load {}", module.display());
    let file = File::open(module).or_else(told(name()))?;
    // SAFETY: an open descriptor, a C string that lives through the call, and an integer.
    let loaded = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match sys::check(loaded) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => told(name())(error),
        _ => Ok(()),
    }
}

/// Names of the devices of a kind, in the machine's order.
pub fn devices(kind: &str) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(DEVICES)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let number = name.strip_prefix("virtio").and_then(|number| number.parse::<u32>().ok());
        if let Some(number) = number
            && fs::read_to_string(entry.path().join("device"))?.trim() == kind
        {
            found.push((number, name));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, name)| name).collect())
}

/// Resolves when there are so many devices of a kind.
pub async fn appeared(kind: &str, count: usize) -> io::Result<()> {
    let seen = async {
        while devices(kind)?.len() < count {
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    };
    let missing = |_| io::Error::other(format!("the machine has fewer than {count} devices of kind {kind}"));
    tokio::time::timeout(APPEARS, seen).await.map_err(missing)?
}

/// Gives a device its driver; one that has it keeps it.
pub fn bind(device: &str, driver: &str) -> io::Result<()> {
    if Path::new(DEVICES).join(device).join("driver").exists() {
        return Ok(());
    }
    fs::write(Path::new(DRIVERS).join(driver).join("bind"), device)
}

/// Takes a device its driver.
pub fn unbind(device: &str, driver: &str) -> io::Result<()> {
    fs::write(Path::new(DRIVERS).join(driver).join("unbind"), device)
}

/// What a device is called in a class of the kernel's: `vda` of the class `block`.
pub fn named(device: &str, class: &str) -> io::Result<String> {
    let place = Path::new(DEVICES).join(device).join(class);
    let entry = fs::read_dir(place)?.next().ok_or(io::ErrorKind::NotFound)??;
    Ok(entry.file_name().to_string_lossy().into_owned())
}

pub fn set_clock(now: Timestamp) -> io::Result<()> {
    let time = libc::timespec { tv_sec: now.as_second(), tv_nsec: now.subsec_nanosecond().into() };
    // SAFETY: reads the structure, which lives through the call.
    sys::check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &time) }.into()).map(drop)
}

/// Gives the kernel random bytes that it did not have, and has it draw from them from now on.
pub fn add_entropy(base64: &str) -> io::Result<()> {
    // linux/random.h: RNDADDENTROPY and RNDRESEEDCRNG.
    const ADD: libc::c_ulong = 0x4008_5203;
    const RESEED: libc::c_ulong = 0x5207;
    const MOST: usize = 512;
    #[repr(C)]
    struct Pool {
        bits: libc::c_int,
        bytes: libc::c_int,
        buffer: [u8; MOST],
    }
    let bytes = STANDARD.decode(base64).map_err(io::Error::other)?;
    let count = bytes.len().min(MOST);
    let mut pool = Pool { bits: count as libc::c_int * 8, bytes: count as libc::c_int, buffer: [0; MOST] };
    pool.buffer[..count].copy_from_slice(&bytes[..count]);
    let random = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: the structure has the layout of rand_pool_info with its bytes behind it, and lives through the call.
    sys::check(unsafe { libc::ioctl(random.as_raw_fd(), ADD as _, &raw const pool) }.into())?;
    // SAFETY: an open descriptor and an integer.
    sys::check(unsafe { libc::ioctl(random.as_raw_fd(), RESEED as _, 0) }.into()).map(drop)
}

/// Ends the machine. Nothing of it is to be kept.
pub fn power_off() -> ! {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let way = match line.split_whitespace().any(|word| word == POWER_OFF) {
        true => libc::RB_POWER_OFF,
        // What every machine can do, and who runs this one has it end instead.
        false => libc::RB_AUTOBOOT,
    };
    loop {
        // SAFETY: an integer.
        unsafe { libc::reboot(way) };
    }
}
