//! What an instance may use as a whole, and sizes for that: by name, as a host is configured, or written out as `CPU-MEMORY`.

use std::collections::BTreeMap;

use joey_model::quantity::{parse_milli, parse_units};
use joey_model::{ErrorKind, Fault};
use serde::{Deserialize, Serialize};

use crate::instance::{InstanceSpec, Resources};
use crate::lifecycle::Role;

/// Limits on an instance as a whole, enforced besides those of its containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Limits {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_milli: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids: Option<u64>,
    /// Bytes a second read from the host's disk, and written to it; each way on its own. On hosts with version 1 of cgroups this
    /// holds for direct I/O and for reads, not for what the kernel writes back later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes_per_second: Option<u64>,
    /// The same in operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_operations_per_second: Option<u64>,
}

impl Limits {
    /// What of the limits a container can have too.
    pub fn resources(&self) -> Resources {
        Resources {
            cpu_milli: self.cpu_milli,
            memory_bytes: self.memory_bytes,
            pids: self.pids,
            ..Resources::default()
        }
    }

    /// Whether the disk is limited.
    pub fn has_disk(&self) -> bool {
        self.disk_bytes_per_second.is_some() || self.disk_operations_per_second.is_some()
    }
}

/// What an instance of a size has in all. Rates hold for each way on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Size {
    pub limits: Limits,
    pub bits_per_second: Option<u64>,
    pub packets_per_second: Option<u64>,
}

/// Sizes by name.
pub type Sizes = BTreeMap<String, Size>;

/// What a host can hold, and what an instance asks for: thousandths of a core, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Amount {
    pub cpu_milli: u64,
    pub memory_bytes: u64,
}

/// Reads `2-4Gi` (two cores, four GiB) or `2c4g`; `None`: it is neither.
pub fn written_out(text: &str) -> Option<Size> {
    let (cpu, memory) = match text.split_once('-') {
        Some((cpu, memory)) => (parse_milli(cpu).ok()?, parse_units(memory).ok()?),
        None => {
            let (cpu, memory) = text.split_once('c')?;
            let plain = |text: &str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit() || c == b'.');
            let memory = memory.strip_suffix('g').filter(|text| plain(text))?;
            let cpu = Some(cpu).filter(|text| plain(text))?;
            (parse_milli(cpu).ok()?, parse_units(&format!("{memory}Gi")).ok()?)
        }
    };
    let limits = Limits { cpu_milli: Some(cpu), memory_bytes: Some(memory), ..Limits::default() };
    Some(Size { limits, ..Size::default() })
}

/// Gives an instance the first size of its list that is known, holds what its containers ask for, and that the host has.
pub fn choose(spec: &mut InstanceSpec, known: &Sizes, host: Amount) -> Result<(), Fault> {
    if spec.use_specs.is_empty() {
        return Ok(());
    }
    let asked = asked(spec);
    let mut why = Vec::new();
    for name in &spec.use_specs {
        let Some(size) = known.get(name).copied().or_else(|| written_out(name)) else {
            why.push(format!("\"{name}\" is not known"));
            continue;
        };
        let (cpu, memory) = (size.limits.cpu_milli, size.limits.memory_bytes);
        if cpu.is_some_and(|cpu| cpu > host.cpu_milli) || memory.is_some_and(|bytes| bytes > host.memory_bytes) {
            why.push(format!("\"{name}\" is more than this host has"));
        } else if cpu.is_some_and(|cpu| cpu < asked.cpu_milli) || memory.is_some_and(|bytes| bytes < asked.memory_bytes)
        {
            why.push(format!("\"{name}\" is less than its containers ask for"));
        } else {
            take(spec, &size);
            return Ok(());
        }
    }
    let message = format!("instance \"{}\": no spec of its list can be had: {}", spec.name, why.join("; "));
    let names: Vec<&str> = known.keys().map(String::as_str).collect();
    let named = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    Err(Fault::new(ErrorKind::Invalid, "NoSuchSpec", message)
        .with_hint(format!("specs known by name: {named}; any other is written as CPU-MEMORY, such as 2-4Gi")))
}

/// What the instance says itself stays.
fn take(spec: &mut InstanceSpec, size: &Size) {
    let (own, sized) = (spec.limits, size.limits);
    spec.limits = Limits {
        cpu_milli: own.cpu_milli.or(sized.cpu_milli),
        memory_bytes: own.memory_bytes.or(sized.memory_bytes),
        pids: own.pids.or(sized.pids),
        disk_bytes_per_second: own.disk_bytes_per_second.or(sized.disk_bytes_per_second),
        disk_operations_per_second: own.disk_operations_per_second.or(sized.disk_operations_per_second),
    };
    let network = &mut spec.network;
    for rate in [&mut network.ingress_bits_per_second, &mut network.egress_bits_per_second] {
        *rate = rate.or(size.bits_per_second);
    }
    for rate in [&mut network.ingress_packets_per_second, &mut network.egress_packets_per_second] {
        *rate = rate.or(size.packets_per_second);
    }
}

/// What runs at the same time, added up; an init container runs beside sidecars alone.
fn asked(spec: &InstanceSpec) -> Amount {
    let of = |take: fn(&crate::instance::Resources) -> Option<u64>| {
        let sum = |roles: &[Role]| -> u64 {
            let counted = spec.containers.iter().filter(|container| roles.contains(&container.role));
            counted.filter_map(|container| take(&container.resources)).sum()
        };
        let inits = spec.containers.iter().filter(|container| container.role == Role::Init);
        let largest = inits.filter_map(|container| take(&container.resources)).max().unwrap_or(0);
        sum(&[Role::Main, Role::Sidecar]).max(largest + sum(&[Role::Sidecar]))
    };
    Amount { cpu_milli: of(|r| r.cpu_milli), memory_bytes: of(|r| r.memory_bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::ContainerSpec;

    const HOST: Amount = Amount { cpu_milli: 4000, memory_bytes: 8 << 30 };

    fn sized(specs: &[&str], cpu: Option<u64>) -> Result<InstanceSpec, Fault> {
        let mut container = ContainerSpec::new("c", "app");
        container.resources = Resources { cpu_milli: cpu, ..Resources::default() };
        let mut spec = InstanceSpec::new("web", vec![container]);
        spec.use_specs = specs.iter().map(|&name| name.to_owned()).collect();
        spec.limits.pids = Some(9);
        let small = Limits { cpu_milli: Some(500), pids: Some(5), ..Limits::default() };
        let known =
            Sizes::from([("small".to_owned(), Size { limits: small, packets_per_second: Some(7), ..Size::default() })]);
        choose(&mut spec, &known, HOST).map(|()| spec)
    }

    #[test]
    fn written_sizes() {
        for (text, cpu, memory) in [("2-4Gi", 2000, 4 << 30), ("0.5-512Mi", 500, 512 << 20), ("2c4g", 2000, 4 << 30)] {
            let found = written_out(text).unwrap().limits;
            assert_eq!((found.cpu_milli, found.memory_bytes), (Some(cpu), Some(memory)), "{text}");
        }
        for text in ["ecs.c6.large", "2", "2-", "c4g", "2c4", "-4Gi", "x-y"] {
            assert_eq!(written_out(text), None, "{text}");
        }
    }

    #[test]
    fn the_first_that_fits() {
        let limits = |specs: &[&str], cpu| sized(specs, cpu).unwrap().limits;
        assert_eq!(limits(&["ecs.none", "64-256Gi", "2-4Gi", "1-1Gi"], None).cpu_milli, Some(2000));
        assert_eq!(limits(&["1-1Gi", "2-4Gi"], Some(1500)).memory_bytes, Some(4 << 30));
        assert_eq!(limits(&[], None).cpu_milli, None);
        let small = sized(&["small"], None).unwrap();
        // What the instance says itself stays.
        assert_eq!((small.limits.cpu_milli, small.limits.pids), (Some(500), Some(9)));
        assert_eq!(small.network.egress_packets_per_second, Some(7));
        let fault = sized(&["ecs.none", "64-256Gi", "1-1Gi"], Some(1500)).unwrap_err();
        for part in ["\"ecs.none\" is not known", "more than this host", "less than its containers"] {
            assert!(fault.message.contains(part), "{}", fault.message);
        }
        assert!(fault.hint.is_some_and(|hint| hint.contains("small")));
    }
}
