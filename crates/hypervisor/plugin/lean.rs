//! A plugin of QEMU's that gives the memory of translated code back to the host when its machine idles.
//!
//! An emulated machine translates far more while it starts than it executes afterwards, and QEMU keeps all of it. A plugin that is reset
//! has QEMU forget what it translated (`qemu_plugin_reset`, while no processor executes anything), but the pages stay; they are let go of
//! here, and what is executed again is translated again.
//!
//! ```text
//! a processor idles ─► long enough, little time used, much translated? ─► reset ─► pages, free heap ─► twice as long before the next time
//! ```
//!
//! What QEMU makes for itself before a processor executes anything is given no large pages: of two MiB that it asks for, a few KiB may be
//! all that it writes.
//!
//! For machines with one processor alone: QEMU lets go of a plugin's calls while another processor may be in one. Built by `build.rs` and
//! loaded by QEMU, so it has neither the standard library nor anything of this workspace. Arguments: `held=N`, a pipe, as long as whose
//! other end is held nothing is given back; `probe=on` has QEMU end with [`PROBED`]. Written to QEMU's description of version 1 of its
//! interface for plugins (docs/devel/tcg-plugins.rst).

// As QEMU is under the GPL: SPDX-License-Identifier: Apache-2.0 OR MIT

#![no_std]

use core::ffi::{CStr, c_char, c_int, c_long, c_uint, c_void};
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU64, AtomicUsize, Ordering::Relaxed};

/// What the installation answers when it is probed.
const PROBED: c_int = 77;
/// Seconds in which a machine is looked at, the first time and at most.
const WINDOW: (i64, i64) = (10, 640);
/// Below such a part of a processor's time a machine idles.
const IDLE_PART: i64 = 20;
/// Bytes of translated code that are worth giving back.
const WORTH: usize = 3 << 20;
/// The first bytes of the first region, which are kept: they lead into translated code and out of it, and are made once.
const KEPT: usize = 64 << 10;
/// Mappings that may be executed and written are regions of translated code from this size on.
const REGION: usize = 1 << 20;
const REGIONS: usize = 64;
const PAGE: usize = 4096;
const NANOS: i64 = 1_000_000_000;

const CLOCK_MONOTONIC: c_int = 1;
const CLOCK_PROCESS_CPUTIME_ID: c_int = 2;
const MADV_DONTNEED: c_int = 4;
const MADV_HUGEPAGE: c_int = 14;
const MADV_NOHUGEPAGE: c_int = 15;
const POLLIN: i16 = 1;
const PR_SET_THP_DISABLE: c_int = 41;
const O_CLOEXEC: c_int = 0o2_000_000;

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

type PluginId = u64;

// SAFETY: as QEMU's plugin interface and the C library declare them.
unsafe extern "C" {
    fn qemu_plugin_register_vcpu_idle_cb(id: PluginId, call: extern "C" fn(PluginId, c_uint));
    fn qemu_plugin_register_vcpu_resume_cb(id: PluginId, call: extern "C" fn(PluginId, c_uint));
    fn qemu_plugin_reset(id: PluginId, done: extern "C" fn(PluginId));
    fn clock_gettime(clock: c_int, time: *mut Timespec) -> c_int;
    fn madvise(start: *mut c_void, length: usize, advice: c_int) -> c_int;
    fn mincore(start: *mut c_void, length: usize, resident: *mut u8) -> c_int;
    fn malloc_trim(keep: usize) -> c_int;
    fn prctl(option: c_int, ...) -> c_int;
    fn poll(fds: *mut Poll, count: u64, timeout: c_int) -> c_int;
    fn open(path: *const c_char, flags: c_int, ...) -> c_int;
    fn read(fd: c_int, to: *mut c_void, length: usize) -> isize;
    fn close(fd: c_int) -> c_int;
    fn abort() -> !;
}

/// Version of the interface that this is written to; QEMU reads it.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static qemu_plugin_version: c_int = 1;

static HELD: AtomicI32 = AtomicI32::new(-1);
static WINDOW_NOW: AtomicI64 = AtomicI64::new(WINDOW.0 * NANOS);
/// When the window began, and what time of processors had been used then.
static BEGAN: AtomicI64 = AtomicI64::new(0);
static USED: AtomicI64 = AtomicI64::new(0);
/// Whether a processor has executed anything.
static BEGUN: AtomicBool = AtomicBool::new(false);
/// Whether it was held when it was last looked at.
static WAS_HELD: AtomicBool = AtomicBool::new(false);
/// The regions of translated code, found once: begin and length, as many as there are.
static FOUND: AtomicUsize = AtomicUsize::new(usize::MAX);
static PLACES: [AtomicUsize; REGIONS] = [const { AtomicUsize::new(0) }; REGIONS];
static LENGTHS: [AtomicU64; REGIONS] = [const { AtomicU64::new(0) }; REGIONS];

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: it takes nothing and does not come back.
    unsafe { abort() }
}

/// QEMU calls it once, before there is a machine.
///
/// # Safety
///
/// `argv` are `argc` C strings.
// SAFETY: the name is QEMU's for this, and nobody else's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    id: PluginId,
    _info: *const c_void,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    for at in 0..usize::try_from(argc).unwrap_or(0) {
        // SAFETY: the caller's promise.
        let argument = unsafe { CStr::from_ptr(*argv.add(at)) }.to_bytes();
        match argument.strip_prefix(b"held=") {
            Some(number) => HELD.store(decimal(number), Relaxed),
            None if argument == b"probe=on" => return PROBED,
            None => {}
        }
    }
    large_pages(false);
    // SAFETY: the functions live as long as the plugin, which is never taken out.
    unsafe {
        qemu_plugin_register_vcpu_idle_cb(id, idles);
        qemu_plugin_register_vcpu_resume_cb(id, resumes);
    }
    0
}

/// Whether this process is given large pages from now on, where it asks for them.
fn large_pages(given: bool) {
    // SAFETY: integers, all five that the call looks at.
    unsafe { prctl(PR_SET_THP_DISABLE, c_long::from(!given), 0 as c_long, 0 as c_long, 0 as c_long) };
}

/// A processor has something to do; the first time, QEMU has made what it needs.
extern "C" fn resumes(_id: PluginId, _processor: c_uint) {
    if !BEGUN.swap(true, Relaxed) {
        large_pages(true);
    }
}

fn decimal(digits: &[u8]) -> i32 {
    digits
        .iter()
        .fold(0, |number: i32, digit| number.wrapping_mul(10).wrapping_add(i32::from(digit.wrapping_sub(b'0'))))
}

/// Nanoseconds of a clock.
fn now(clock: c_int) -> i64 {
    let mut time = Timespec { seconds: 0, nanos: 0 };
    // SAFETY: the place lives through the call.
    unsafe { clock_gettime(clock, &raw mut time) };
    time.seconds * NANOS + time.nanos
}

/// A processor has nothing to do.
extern "C" fn idles(id: PluginId, _processor: c_uint) {
    let now_is = now(CLOCK_MONOTONIC);
    let lasted = now_is - BEGAN.load(Relaxed);
    if lasted < WINDOW_NOW.load(Relaxed) {
        return;
    }
    let used_now = now(CLOCK_PROCESS_CPUTIME_ID);
    let used = used_now - USED.swap(used_now, Relaxed);
    let first = BEGAN.swap(now_is, Relaxed) == 0;
    let held = is_held();
    // What was held until now has just begun what it is for: it has a whole window.
    if !WAS_HELD.swap(held, Relaxed) && !held && !first {
        if used >= lasted / IDLE_PART {
            // As QEMU has it: what executes much is faster with large pages.
            advise(MADV_HUGEPAGE);
        } else if translated() > WORTH {
            // SAFETY: as above.
            unsafe { qemu_plugin_reset(id, forgotten) };
        }
    }
}

/// Whether somebody holds the other end of the pipe.
fn is_held() -> bool {
    let mut held = Poll { fd: HELD.load(Relaxed), events: POLLIN, seen: 0 };
    // SAFETY: one place, which lives through the call, which does not wait.
    held.fd >= 0 && unsafe { poll(&raw mut held, 1, 0) } == 0
}

/// Bytes of memory that translated code takes.
fn translated() -> usize {
    let mut resident = [0_u8; 1024];
    let mut pages = 0;
    for (place, length) in regions() {
        for at in (0..length).step_by(resident.len() * PAGE) {
            let bytes = (length - at).min(resident.len() * PAGE);
            // SAFETY: mapped for good, and there is a byte for each of its pages.
            if unsafe { mincore((place + at) as *mut c_void, bytes, resident.as_mut_ptr()) } == 0 {
                pages += resident[..bytes / PAGE].iter().filter(|byte| **byte & 1 == 1).count();
            }
        }
    }
    pages * PAGE
}

fn regions() -> impl Iterator<Item = (usize, usize)> {
    if FOUND.load(Relaxed) == usize::MAX {
        FOUND.store(find_regions(), Relaxed);
    }
    let all = PLACES.iter().zip(&LENGTHS).take(FOUND.load(Relaxed).min(REGIONS));
    all.map(|(place, length)| (place.load(Relaxed), length.load(Relaxed) as usize))
}

/// Tells the kernel how the regions are used, or that what is in them is not needed: that is done when nothing reads it before it is
/// written again.
fn advise(advice: c_int) {
    for (place, length) in regions() {
        // SAFETY: mapped for good.
        unsafe { madvise(place as *mut c_void, length, advice) };
    }
}

/// No processor executes anything, and nothing translated is known any more.
extern "C" fn forgotten(id: PluginId) {
    advise(MADV_DONTNEED);
    // The little that an idle machine executes would take large pages.
    advise(MADV_NOHUGEPAGE);
    let next = (WINDOW_NOW.load(Relaxed) * 2).min(WINDOW.1 * NANOS);
    WINDOW_NOW.store(next, Relaxed);
    // SAFETY: the first takes an integer; the second as above, since a reset takes all calls out.
    unsafe {
        malloc_trim(0);
        qemu_plugin_register_vcpu_idle_cb(id, idles);
    }
}

/// Reads the process's mappings, a line each: `BEGIN-END rwxp …` in hexadecimal digits. How many regions there are.
fn find_regions() -> usize {
    // SAFETY: a C string and flags.
    let maps = unsafe { open(c"/proc/self/maps".as_ptr(), O_CLOEXEC) };
    let (mut buffer, mut found) = ([0_u8; 4096], 0);
    let mut line = Line::default();
    loop {
        // SAFETY: the buffer lives through the call.
        let count = unsafe { read(maps, buffer.as_mut_ptr().cast(), buffer.len()) };
        let Ok(count @ 1..) = usize::try_from(count) else { break };
        for byte in &buffer[..count] {
            if let Some((place, length)) = line.take(*byte)
                && found < REGIONS
            {
                let kept = if found == 0 { KEPT } else { 0 };
                PLACES[found].store(place + kept, Relaxed);
                LENGTHS[found].store((length - kept) as u64, Relaxed);
                found += 1;
            }
        }
    }
    // SAFETY: an integer.
    unsafe { close(maps) };
    found
}

/// As much of a line as was read.
#[derive(Default)]
struct Line {
    numbers: [usize; 2],
    rights: [u8; 4],
    /// Of the parts of the line, and in that one.
    part: usize,
    at: usize,
}

impl Line {
    /// The region that the line tells of, when it ends.
    fn take(&mut self, byte: u8) -> Option<(usize, usize)> {
        match (byte, self.part) {
            (b'\n', _) => {
                let Self { numbers: [begin, end], rights, .. } = core::mem::take(self);
                let length = end.saturating_sub(begin);
                return (rights == *b"rwxp" && length >= REGION).then_some((begin, length));
            }
            (b'-', 0) | (b' ', _) => (self.part, self.at) = (self.part + 1, 0),
            (_, 0 | 1) => {
                let digit = (byte as char).to_digit(16).unwrap_or(0) as usize;
                self.numbers[self.part] = (self.numbers[self.part] << 4) | digit;
            }
            (_, 2) if self.at < self.rights.len() => {
                self.rights[self.at] = byte;
                self.at += 1;
            }
            _ => {}
        }
        None
    }
}
