//! Pages that are as they would be if they were let go of: what the guest wrote and is as in the template again, and what QEMU copied of
//! a device tree that is empty but for its first pages.
//!
//! While they are compared nobody writes them. The guest's only processor idles; QEMU's lock is held, which all threads take that write a
//! machine's memory but those that read disks; and none of these is there (`USUAL` threads are, as QEMU 7.2 has them). The device tree is
//! written once, before the guest executes anything; it is looked for in memory that is read as a file, since others may take some of
//! that away meanwhile.

use core::ffi::c_int;

use crate::host::{self, File, MADV_DONTNEED, PAGE};
use crate::maps::{self, Mapping};

/// Threads without those that read disks: the main loop, the monitor's, the one that frees what was read, and the processor.
const USUAL: u32 = 4;
/// The largest memory of a machine that is looked through, and the most pages of it, since QEMU does nothing else meanwhile.
const MOST: usize = 8 << 30;
const MOST_PAGES: usize = 32 << 10;
/// Sizes of a mapping that may hold a device tree, which begins on a page after the allocator's words for it, with a word of its own and
/// its size (Devicetree Specification, 5.2).
const WITH_TREE: core::ops::Range<usize> = 1 << 20..4 << 20;
const TREE_AT: usize = 16;
const TREE: u32 = 0xd00d_feed;
/// QEMU's are of this size, whatever is in them.
const TREE_SIZE: u32 = 1 << 20;
/// Of what the kernel tells of a page (Documentation/admin-guide/mm/pagemap.rst): it is there, and it is a file's.
const IS_THERE: u64 = 1 << 63;
const OF_FILE: u64 = 1 << 61;
/// Pages that are asked about at once.
const AT_ONCE: usize = 256;

/// Lets go of the pages of a machine with this memory file, if there is one, unless somebody could write them meanwhile: then it says so.
pub fn let_go(memory: c_int) -> bool {
    let Some(file) = host::status(memory, c"").map(|file| file.identity()) else { return true };
    if host::status(0, c"/proc/self/task").is_none_or(|tasks| tasks.links != USUAL + 2) {
        return false;
    }
    let (pages, mut below) = (File::open(c"/proc/self/pagemap"), [0; PAGE]);
    maps::each(|mapping| {
        if mapping.is_private() && mapping.file == file && mapping.length() <= MOST {
            each_own(&mapping, &pages, |place| {
                if host::read_at(memory, &mut below, mapping.offset + place - mapping.begin) && *bytes(place) == below {
                    again(place);
                }
            });
        }
    });
    true
}

/// Lets go of the pages of a mapping in which QEMU keeps a device tree and nothing of it, before the guest executes anything.
pub fn let_go_of_tree(mapping: &Mapping) {
    if !mapping.is_memory() || !WITH_TREE.contains(&mapping.length()) {
        return;
    }
    let (pages, memory) = (File::open(c"/proc/self/pagemap"), File::open(c"/proc/self/mem"));
    let (mut tree, mut words, mut page) = (0..0, [0_u32; 2], [0_u8; PAGE]);
    each_own(mapping, &pages, |place| {
        if tree.contains(&(place + PAGE - 1)) {
            if memory.read_at(&mut page, place) && page == [0; PAGE] {
                again(place);
            }
        } else if memory.read_at(&mut words, place + TREE_AT) && words.map(u32::from_be) == [TREE, TREE_SIZE] {
            tree = place + PAGE..place + TREE_SIZE as usize;
        }
    });
}

/// Tells of each page of a mapping that is the process's own.
fn each_own(mapping: &Mapping, pages: &File, mut tell: impl FnMut(usize)) {
    let (mut told, mut left) = ([0_u64; AT_ONCE], MOST_PAGES);
    for at in (mapping.begin..mapping.end).step_by(AT_ONCE * PAGE) {
        let told = &mut told[..((mapping.end - at) / PAGE).min(AT_ONCE)];
        if !pages.read_at(told, at / PAGE * size_of::<u64>()) {
            return;
        }
        for (number, told) in told.iter().enumerate() {
            if told & (IS_THERE | OF_FILE) == IS_THERE {
                tell(at + number * PAGE);
                left -= 1;
                if left == 0 {
                    return;
                }
            }
        }
    }
}

/// A page of the machine's memory.
fn bytes(place: usize) -> &'static [u8; PAGE] {
    // SAFETY: it is mapped for good, and nobody writes it while it is looked at (above).
    unsafe { &*(place as *const [u8; PAGE]) }
}

/// Lets go of a page that has what it gets next.
fn again(place: usize) {
    // SAFETY: nobody writes it meanwhile.
    unsafe { host::advise(place, PAGE, MADV_DONTNEED) };
}
