//! The counter that machines tell the time by, measured: in an emulated machine there is nothing else to measure it against.

use std::time::Duration;

/// Longer, and it is known better: a microsecond in these is ten millionths.
const WHILE: Duration = Duration::from_millis(100);

/// Thousands of cycles a second of this processor's time stamp counter.
pub(super) async fn tsc_khz() -> u64 {
    let (began, first) = now();
    tokio::time::sleep(WHILE).await;
    let (ended, last) = now();
    let nanoseconds = ended.saturating_sub(began).max(1);
    (u128::from(last.saturating_sub(first)) * 1_000_000 / u128::from(nanoseconds)) as u64
}

/// The clock in nanoseconds and the counter, as near to each other as can be had.
fn now() -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..8 {
        let (before, counter, after) = (clock(), counter(), clock());
        best = best.min((after - before, before, counter));
    }
    (best.1 + best.0 / 2, best.2)
}

fn clock() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the structure, which lives through the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_RAW, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(target_arch = "x86_64")]
fn counter() -> u64 {
    // SAFETY: every processor of this kind has the instruction, and it touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> u64 {
    clock()
}
