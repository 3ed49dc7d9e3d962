//! `joey top`: what instances use now.

use std::process::ExitCode;
use std::time::Duration;

use futures::StreamExt;
use joey_api::instance::{Instance, Usage, WirePhase};
use joey_model::quantity::human_bytes;
use joey_pool::PoolClient;
use serde::Serialize;
use tokio::time::Instant;

use crate::args::Top;
use crate::failure::Failure;
use crate::output;

/// The span that CPU is averaged over.
const SPAN: Duration = Duration::from_secs(1);
/// Instances asked at the same time.
const PARALLEL: usize = 16;

/// One line: an instance, or a container of it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    container: Option<String>,
    cpu_milli: u64,
    memory_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    received_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sent_bytes: Option<u64>,
}

pub async fn top(service: &PoolClient, top: Top) -> Result<ExitCode, Failure> {
    let instances: Vec<Instance> = match &top.name {
        Some(name) => vec![service.get(name).await?],
        None => service.list().await?.into_iter().filter(|one| one.status.phase == WirePhase::Running).collect(),
    };
    let before = measure(service, &instances).await;
    tokio::time::sleep(SPAN).await;
    let now = measure(service, &instances).await;
    let mut lines = Vec::new();
    for (instance, (before, now)) in instances.iter().zip(before.into_iter().zip(now)) {
        if let (Some((begun, before)), Some((ended, now))) = (before, now) {
            let span = u64::try_from(ended.duration_since(begun).as_nanos()).unwrap_or(u64::MAX);
            lines.extend(lines_of(&instance.spec.name, &before, &now, span, top.containers));
        }
    }
    output::print(top.output.format(), &lines, |_| {
        let mut heads = vec!["NAME", "CPU", "MEMORY"];
        match top.containers {
            true => heads.insert(1, "CONTAINER"),
            false => heads.extend(["RECEIVED", "SENT"]),
        }
        let mut rows = vec![heads.into_iter().map(str::to_owned).collect::<Vec<_>>()];
        rows.extend(lines.iter().map(|line| {
            let traffic = [line.received_bytes, line.sent_bytes].into_iter().flatten().map(human_bytes);
            let mut row = vec![line.name.clone()];
            row.extend(line.container.clone());
            row.extend([format!("{}m", line.cpu_milli), human_bytes(line.memory_bytes)]);
            row.extend(traffic);
            row
        }));
        rows
    })
}

/// What each uses, and when that was; nothing of those that went away.
async fn measure(service: &PoolClient, instances: &[Instance]) -> Vec<Option<(Instant, Usage)>> {
    let asked = instances.iter().map(|one| async move {
        let usage = service.usage(&one.id).await.ok()?;
        Some((Instant::now(), usage))
    });
    futures::stream::iter(asked).buffered(PARALLEL).collect().await
}

fn lines_of(name: &str, before: &Usage, now: &Usage, span: u64, containers: bool) -> Vec<Line> {
    // Nanoseconds of CPU over nanoseconds, in thousandths.
    let milli = |before: u64, now: u64| now.saturating_sub(before).saturating_mul(1000) / span.max(1);
    if !containers {
        return vec![Line {
            name: name.to_owned(),
            container: None,
            cpu_milli: milli(before.cpu_nanoseconds, now.cpu_nanoseconds),
            memory_bytes: now.memory_working_set_bytes,
            received_bytes: Some(now.received_bytes),
            sent_bytes: Some(now.sent_bytes),
        }];
    }
    let of = |own: &joey_api::instance::ContainerUsage| {
        let first = before.containers.iter().find(|first| first.name == own.name);
        Line {
            name: name.to_owned(),
            container: Some(own.name.clone()),
            cpu_milli: milli(first.map_or(0, |first| first.cpu_nanoseconds), own.cpu_nanoseconds),
            memory_bytes: own.memory_working_set_bytes,
            received_bytes: None,
            sent_bytes: None,
        }
    };
    now.containers.iter().map(of).collect()
}
