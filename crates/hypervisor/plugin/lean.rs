//! A plugin of QEMU's that gives memory back to the host when its machine idles: that of translated code, and pages that are as they
//! would be without (`pages.rs`).
//!
//! An emulated machine translates far more while it starts than it executes afterwards, and QEMU keeps all of it. A plugin that is reset
//! has QEMU forget what it translated (`qemu_plugin_reset`, while no processor executes anything), but the pages stay; they are let go of
//! here, and what is executed again is translated again.
//!
//! ```text
//! a processor idles ─► long enough, little used, much translated? ─► pages, reset ─► code, free heap ─► longer before the next
//! ```
//!
//! What QEMU makes for itself before a processor executes anything has no large pages: of two MiB that it asks for, a few KiB may be all
//! that it writes.
//!
//! For machines with one processor alone: QEMU lets go of a plugin's calls while another processor may be in one. Built by `build.rs` and
//! loaded by QEMU, so it has neither the standard library nor anything of this workspace. Arguments: `held=N`, a pipe, as long as whose
//! other end is held nothing is given back; `memory=N`, the file that the machine's memory begins with, for a QEMU whose threads are known;
//! `probe=on` has QEMU end with [`PROBED`]. Written to QEMU's description of version 1 of its interface for plugins
//! (docs/devel/tcg-plugins.rst).

// As QEMU is under the GPL: SPDX-License-Identifier: Apache-2.0 OR MIT

#![no_std]

mod host;
mod maps;
mod pages;

use core::ffi::{CStr, c_char, c_int, c_long, c_uint, c_void};
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU64, AtomicUsize, Ordering::Relaxed};

use host::{
    CLOCK_MONOTONIC, CLOCK_PROCESS_CPUTIME_ID, MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, NANOS, PAGE,
    PR_SET_THP_DISABLE, PluginId, abort, malloc_trim, mincore, now, prctl, qemu_plugin_register_vcpu_idle_cb,
    qemu_plugin_register_vcpu_resume_cb, qemu_plugin_reset,
};

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
/// Seconds until the pages are looked through that could not be the last time.
const AGAIN: i64 = 2;
/// From this size on a mapping may be given large pages.
const LARGE: usize = 2 << 20;

/// Version of the interface that this is written to; QEMU reads it.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static qemu_plugin_version: c_int = 1;

static HELD: AtomicI32 = AtomicI32::new(-1);
static MEMORY: AtomicI32 = AtomicI32::new(-1);
static WINDOW_NOW: AtomicI64 = AtomicI64::new(WINDOW.0 * NANOS);
/// When the window began, and what time of processors had been used then.
static BEGAN: AtomicI64 = AtomicI64::new(0);
static USED: AtomicI64 = AtomicI64::new(0);
/// Whether what was translated has been forgotten before.
static FORGOT: AtomicBool = AtomicBool::new(false);
/// Whether a processor has executed anything.
static BEGUN: AtomicBool = AtomicBool::new(false);
/// Whether it was held when it was last looked at.
static WAS_HELD: AtomicBool = AtomicBool::new(false);
/// Whether the pages could not be looked through the last time, when that was, and what time of processors had been used then.
static UNSEEN: AtomicBool = AtomicBool::new(false);
static TRIED: AtomicI64 = AtomicI64::new(0);
static TRIED_USED: AtomicI64 = AtomicI64::new(0);
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
        if argument == b"probe=on" {
            return PROBED;
        }
        for (name, number) in [(&b"held="[..], &HELD), (b"memory=", &MEMORY)] {
            if let Some(digits) = argument.strip_prefix(name) {
                number.store(decimal(digits), Relaxed);
            }
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
        // QEMU asks for them also where it writes next to nothing, and the kernel gives them later.
        maps::each(|mapping| {
            pages::let_go_of_tree(&mapping);
            if mapping.is_memory() && mapping.length() >= LARGE {
                // SAFETY: it changes nothing that is read.
                unsafe { host::advise(mapping.begin, mapping.length(), MADV_NOHUGEPAGE) };
            }
        });
        large_pages(true);
    }
}

fn decimal(digits: &[u8]) -> i32 {
    digits
        .iter()
        .fold(0, |number: i32, digit| number.wrapping_mul(10).wrapping_add(i32::from(digit.wrapping_sub(b'0'))))
}

/// A processor has nothing to do.
extern "C" fn idles(id: PluginId, _processor: c_uint) {
    let now_is = now(CLOCK_MONOTONIC);
    let (lasted, since_tried) = (now_is - BEGAN.load(Relaxed), now_is - TRIED.load(Relaxed));
    let again = UNSEEN.load(Relaxed) && since_tried > AGAIN * NANOS;
    if lasted < WINDOW_NOW.load(Relaxed) && !again {
        return;
    }
    let used_now = now(CLOCK_PROCESS_CPUTIME_ID);
    if again {
        TRIED.store(now_is, Relaxed);
        if used_now - TRIED_USED.swap(used_now, Relaxed) < since_tried / IDLE_PART {
            look_through();
        }
        return;
    }
    let used = used_now - USED.swap(used_now, Relaxed);
    let first = BEGAN.swap(now_is, Relaxed) == 0;
    let held = host::is_held(HELD.load(Relaxed));
    // What was held until now has just begun what it is for: it has a whole window.
    if !WAS_HELD.swap(held, Relaxed) && !held && !first {
        if used >= lasted / IDLE_PART {
            // As QEMU has it: what executes much is faster with large pages.
            advise(MADV_HUGEPAGE);
            return;
        }
        if translated() > WORTH {
            TRIED.store(now_is, Relaxed);
            TRIED_USED.store(used_now, Relaxed);
            look_through();
            // SAFETY: as at the installation.
            unsafe { qemu_plugin_reset(id, forgotten) };
        }
    }
}

/// Lets go of pages, or leaves it for another time.
fn look_through() {
    UNSEEN.store(!pages::let_go(MEMORY.load(Relaxed)), Relaxed);
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
        // SAFETY: mapped for good, and read by nobody who did not write it since.
        unsafe { host::advise(place, length, advice) };
    }
}

/// No processor executes anything, and nothing translated is known any more.
extern "C" fn forgotten(id: PluginId) {
    advise(MADV_DONTNEED);
    // The little that an idle machine executes would take large pages.
    advise(MADV_NOHUGEPAGE);
    // After the first time comes what the guest does about its own memory, once.
    if FORGOT.swap(true, Relaxed) {
        WINDOW_NOW.store((WINDOW_NOW.load(Relaxed) * 2).min(WINDOW.1 * NANOS), Relaxed);
    }
    // SAFETY: the first takes an integer; the second as above, since a reset takes all calls out.
    unsafe {
        malloc_trim(0);
        qemu_plugin_register_vcpu_idle_cb(id, idles);
    }
}

/// How many regions there are.
fn find_regions() -> usize {
    let mut found = 0;
    maps::each(|mapping| {
        if mapping.rights == *b"rwxp" && mapping.length() >= REGION && found < REGIONS {
            let kept = if found == 0 { KEPT } else { 0 };
            PLACES[found].store(mapping.begin + kept, Relaxed);
            LENGTHS[found].store((mapping.length() - kept) as u64, Relaxed);
            found += 1;
        }
    });
    found
}
