//! Stands in for the library by which QEMU writes persistent memory (`libpmem`), of which no machine of Joey's has any: what it needs
//! itself, another four libraries, would take half a MiB of every monitor's own. `capstone.rs` tells how.

// As QEMU is under the GPL: SPDX-License-Identifier: Apache-2.0 OR MIT

#![no_std]

// SAFETY: as the C library declares it.
unsafe extern "C" {
    safe fn abort() -> !;
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    abort()
}

// SAFETY: the name is that library's. What is not written is not said to be.
#[unsafe(no_mangle)]
pub extern "C" fn pmem_persist() {
    abort()
}

// SAFETY: as above.
#[unsafe(no_mangle)]
pub extern "C" fn pmem_memcpy_persist() {
    abort()
}
