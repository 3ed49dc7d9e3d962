//! What the plugin uses of QEMU, of the C library and of the kernel.

use core::ffi::{CStr, c_char, c_int, c_long, c_uint, c_void};

pub const CLOCK_MONOTONIC: c_int = 1;
pub const CLOCK_PROCESS_CPUTIME_ID: c_int = 2;
pub const MADV_DONTNEED: c_int = 4;
pub const MADV_HUGEPAGE: c_int = 14;
pub const MADV_NOHUGEPAGE: c_int = 15;
pub const PR_SET_THP_DISABLE: c_int = 41;
pub const PAGE: usize = 4096;

const POLLIN: i16 = 1;
const O_CLOEXEC: c_int = 0o2_000_000;
const AT_EMPTY_PATH: c_int = 0x1000;
const AT_FDCWD: c_int = -100;
const STATX_NLINK: c_uint = 4;
const STATX_INO: c_uint = 0x100;
pub const NANOS: i64 = 1_000_000_000;

#[repr(C)]
struct Timespec {
    seconds: i64,
    nanos: c_long,
}

#[repr(C)]
struct Poll {
    fd: c_int,
    events: i16,
    seen: i16,
}

/// The begin of what statx(2) tells; the whole has 256 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Status {
    _before: [u32; 4],
    pub links: u32,
    _owner: [u32; 3],
    inode: u64,
    _times: [u64; 12],
    device: [u32; 2],
    _rest: [u64; 14],
}

/// Which file of all that there are: the number of its file system's device in two parts, and its own there.
#[derive(Clone, Copy, Default, PartialEq)]
pub struct Identity {
    pub device: [usize; 2],
    pub inode: usize,
}

impl Status {
    pub fn identity(&self) -> Identity {
        Identity { device: self.device.map(|part| part as usize), inode: self.inode as usize }
    }
}

pub type PluginId = u64;

// SAFETY: as QEMU's plugin interface and the C library declare them.
unsafe extern "C" {
    pub fn qemu_plugin_register_vcpu_idle_cb(id: PluginId, call: extern "C" fn(PluginId, c_uint));
    pub fn qemu_plugin_register_vcpu_resume_cb(id: PluginId, call: extern "C" fn(PluginId, c_uint));
    pub fn qemu_plugin_reset(id: PluginId, done: extern "C" fn(PluginId));
    pub fn madvise(start: *mut c_void, length: usize, advice: c_int) -> c_int;
    pub fn mincore(start: *mut c_void, length: usize, resident: *mut u8) -> c_int;
    pub fn malloc_trim(keep: usize) -> c_int;
    pub fn prctl(option: c_int, ...) -> c_int;
    pub fn abort() -> !;
    fn clock_gettime(clock: c_int, time: *mut Timespec) -> c_int;
    fn poll(fds: *mut Poll, count: u64, timeout: c_int) -> c_int;
    fn open(path: *const c_char, flags: c_int, ...) -> c_int;
    fn read(fd: c_int, to: *mut c_void, length: usize) -> isize;
    fn pread64(fd: c_int, to: *mut c_void, length: usize, offset: i64) -> isize;
    fn statx(fd: c_int, path: *const c_char, flags: c_int, mask: c_uint, status: *mut Status) -> c_int;
    fn close(fd: c_int) -> c_int;
}

/// Nanoseconds of a clock.
pub fn now(clock: c_int) -> i64 {
    let mut time = Timespec { seconds: 0, nanos: 0 };
    // SAFETY: the place lives through the call.
    unsafe { clock_gettime(clock, &raw mut time) };
    time.seconds * NANOS + time.nanos
}

/// Whether somebody holds the other end of this pipe.
pub fn is_held(pipe: c_int) -> bool {
    let mut held = Poll { fd: pipe, events: POLLIN, seen: 0 };
    // SAFETY: one place, which lives through the call, which does not wait.
    pipe >= 0 && unsafe { poll(&raw mut held, 1, 0) } == 0
}

/// Tells the kernel how these pages are used.
///
/// # Safety
///
/// For [`MADV_DONTNEED`], nobody writes them meanwhile, and what they have is what they get next or is read by nobody.
pub unsafe fn advise(place: usize, length: usize, advice: c_int) {
    // SAFETY: the caller's promise; the other advices change nothing that is read.
    unsafe { madvise(place as *mut c_void, length, advice) };
}

/// An open file, or nothing: reads of that fail.
pub struct File(c_int);

impl File {
    pub fn open(path: &CStr) -> Self {
        // SAFETY: a C string and flags.
        Self(unsafe { open(path.as_ptr(), O_CLOEXEC) })
    }

    /// The next bytes, as many as there are.
    pub fn read(&self, to: &mut [u8]) -> usize {
        // SAFETY: the place lives through the call.
        usize::try_from(unsafe { read(self.0, to.as_mut_ptr().cast(), to.len()) }).unwrap_or(0)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: an integer, which is nobody else's.
        unsafe { close(self.0) };
    }
}

/// Whether all of `to` was read from this place of an open file.
pub fn read_at<T: Copy>(fd: c_int, to: &mut [T], offset: usize) -> bool {
    let bytes = size_of_val(to);
    // SAFETY: the place lives through the call, and any bytes are integers, which is what is read.
    let count = unsafe { pread64(fd, to.as_mut_ptr().cast(), bytes, offset as i64) };
    count == bytes as isize
}

impl File {
    /// Whether all of `to` was read from this place.
    pub fn read_at<T: Copy>(&self, to: &mut [T], offset: usize) -> bool {
        read_at(self.0, to, offset)
    }
}

/// What is known of an open file, or of what is at a path.
pub fn status(fd: c_int, path: &CStr) -> Option<Status> {
    let mut status =
        Status { _before: [0; 4], links: 0, _owner: [0; 3], inode: 0, _times: [0; 12], device: [0; 2], _rest: [0; 14] };
    let (fd, flags) = if path.is_empty() { (fd, AT_EMPTY_PATH) } else { (AT_FDCWD, 0) };
    // SAFETY: the place has the 256 bytes that the kernel fills.
    let done = unsafe { statx(fd, path.as_ptr(), flags, STATX_NLINK | STATX_INO, &raw mut status) };
    (done == 0).then_some(status)
}
