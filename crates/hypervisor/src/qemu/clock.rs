//! The counter that machines tell the time by, measured: in an emulated machine there is nothing else to measure it against. And the
//! processor that has it.

use std::time::Duration;

use sha2::{Digest, Sha256};

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

/// What tells one kind of processor from another in the text of `/proc/cpuinfo`, and one pace of the counter from another by MHz: its
/// measure differs by a hundredth of that from one time to the next.
pub(super) fn processor(cpuinfo: &str, tsc_khz: u64) -> String {
    let line = |name: &str| cpuinfo.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    let kind = Sha256::digest([line("model name"), line("flags")].concat());
    format!("{:x} {}MHz", u64::from_be_bytes(std::array::from_fn(|at| kind[at])), (tsc_khz + 500) / 1000)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_processors_are_told_apart() {
        let text = |model: &str, flags: &str, mhz: &str| {
            format!("processor\t: 0\nmodel name\t: {model}\ncpu MHz\t\t: {mhz}\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
        };
        let one = processor(&text("A 1", "fpu sse", "2500.1"), 2_499_990);
        assert_eq!(processor(&text("A 1", "fpu sse", "800.0"), 2_500_010), one, "what it runs at now says nothing");
        assert_ne!(processor(&text("A 2", "fpu sse", "2500.1"), 2_499_990), one);
        assert_ne!(processor(&text("A 1", "fpu", "2500.1"), 2_499_990), one);
        assert_ne!(processor(&text("A 1", "fpu sse", "2500.1"), 2_900_000), one);
    }
}
