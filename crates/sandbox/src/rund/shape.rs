//! How large a machine is: what its containers may use, and what its kernel needs beside that, in few sizes so that machines share
//! templates.

use joey_api::agent::AgentConfig;
use joey_api::lifecycle::Role;
use joey_hypervisor::{Acceleration, Shape};

/// Bytes for the kernel and the agent.
const KERNEL: u64 = 64 << 20;
const LEAST: u64 = 256 << 20;
/// What containers without a limit get.
const UNLIMITED: u64 = 2 << 30;
/// Thousandths of a processor that a machine has at least, whatever its containers may use inside: less would not start it in time.
const LEAST_CPU: u64 = 250;
/// Processors of a machine whose containers have no limit, where the processor executes it.
const MOST_UNASKED: u32 = 4;
const MOST: u32 = 64;

/// The shape of a machine for these containers.
pub(super) fn of(config: &AgentConfig, acceleration: Acceleration) -> Shape {
    let memory = memory_limit(config).map_or(UNLIMITED, |bytes| bytes.saturating_add(KERNEL));
    let memory = within(stepped(memory), host_memory());
    let host = std::thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(MOST));
    let cpus = match (cpu_limit(config), acceleration) {
        (Some(milli), _) => u32::try_from(milli.div_ceil(1000)).unwrap_or(MOST),
        // Each one costs, also while nothing runs on it.
        (None, Acceleration::Emulated) => 1,
        (None, Acceleration::Kvm) => host.min(MOST_UNASKED),
    };
    Shape { cpus: cpus.clamp(1, host), memory_bytes: memory }
}

/// A limit may be above what the host has, as on any node; a machine that is larger than its host is not made.
fn within(memory: u64, host: u64) -> u64 {
    const PART: u64 = 2 << 20;
    memory.min((host / PART * PART).max(LEAST))
}

/// Bytes of memory of this host.
fn host_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib << 10)
}

/// The next size at or above: four between a power of two and the next one.
fn stepped(bytes: u64) -> u64 {
    if bytes <= LEAST {
        return LEAST;
    }
    let step = (bytes.next_power_of_two() / 8).max(LEAST / 2);
    bytes.checked_next_multiple_of(step).unwrap_or(bytes)
}

/// What all containers may use together; nothing where one of them may use all there is.
fn memory_limit(config: &AgentConfig) -> Option<u64> {
    limit(config, config.limits.memory_bytes, |container| container.resources.memory_bytes)
}

/// Thousandths of a processor that a machine may use.
pub(super) fn cpu_limit_of_machine(config: &AgentConfig) -> Option<u64> {
    cpu_limit(config).map(|milli| milli.max(LEAST_CPU))
}

/// Thousandths of a processor that all containers may use together.
fn cpu_limit(config: &AgentConfig) -> Option<u64> {
    limit(config, config.limits.cpu_milli, |container| container.resources.cpu_milli)
}

/// Containers that run together add up; those before them run alone.
fn limit(
    config: &AgentConfig,
    whole: Option<u64>,
    of: impl Fn(&joey_api::agent::AgentContainer) -> Option<u64>,
) -> Option<u64> {
    if whole.is_some() {
        return whole;
    }
    let together = |role: Role| matches!(role, Role::Main | Role::Sidecar);
    let sum = config.containers.iter().filter(|container| together(container.role)).map(&of).sum::<Option<u64>>()?;
    let alone = config.containers.iter().filter(|container| container.role == Role::Init).map(&of);
    alone.chain([Some(sum)]).try_fold(0, |most, limit| limit.map(|limit| most.max(limit)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_few() {
        let mib = |bytes: u64| bytes >> 20;
        let sizes: Vec<_> = [1, 256, 257, 385, 700, 1024, 1100, 2048, 5000].map(|size| mib(stepped(size << 20))).into();
        assert_eq!(sizes, [256, 256, 384, 512, 768, 1024, 1280, 2048, 5120]);
    }

    #[test]
    fn no_machine_is_larger_than_its_host() {
        assert_eq!(within(2 << 30, 8 << 30), 2 << 30);
        assert_eq!(within(500 << 30, (8 << 30) + 12_345), 8 << 30);
        assert!(host_memory() >= LEAST);
    }
}
