//! Stands in for the disassembler that QEMU is linked with and that no machine of Joey's has it call (`libcapstone`): a MiB and a half of
//! tables that every monitor's process would have for itself once their addresses are filled in.
//!
//! QEMU's process is started with this library loaded before its others, under the same name, so that the dynamic linker takes it for the
//! one that it looks for (ld.so(8)). Opening a disassembler fails; QEMU then prints bytes.

// As QEMU is under the GPL: SPDX-License-Identifier: Apache-2.0 OR MIT

#![no_std]

use core::ffi::{c_int, c_void};

/// Capstone's `CS_ERR_ARCH`, which says that it has no disassembler for this kind of processor.
const NONE: c_int = 2;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

macro_rules! answer {
    ($($name:ident -> $type:ty = $answer:expr;)*) => {$(
        // SAFETY: the name is that library's, in whose place this one is. What it is called with it does not look at.
        #[unsafe(no_mangle)]
        pub extern "C" fn $name() -> $type {
            $answer
        }
    )*};
}

answer! {
    cs_open -> c_int = NONE;
    cs_close -> c_int = NONE;
    cs_option -> c_int = NONE;
    cs_malloc -> *mut c_void = core::ptr::null_mut();
    cs_disasm_iter -> bool = false;
}
