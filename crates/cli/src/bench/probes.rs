//! `joey bench probes`: what the platform spends on Pods that are asked every second how they are, measured from outside.
//!
//! Each Pod has a readiness and a liveness probe of the same kind, asked once a second. When all are ready, processor time is
//! summed for a while: of every agent, as the scheduler counts it, and of `joey up` beyond what it took before the first Pod. What
//! probes cost the programs that answer them is theirs, and the kernel's work for their packets is nobody's here. Memory is
//! what `joey bench start` counts: the proportional memory of agents and what `joey up` has grown by.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use joey_model::{ImageRef, id};
use joey_pool::PoolClient;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Idle, MOST, Round, clear, client, have_image, idle, measure, progress, rounded};
use crate::args::{BenchProbes, ProbeKind};
use crate::failure::Failure;
use crate::output;
use crate::roles::Lock;
use crate::settings::Place;

/// Pods that are started at a time.
const PARALLEL: u32 = 4;
/// Longest measurement, in seconds.
const LONGEST: u32 = 3600;

/// Probes whose values are all good.
pub struct Probes {
    round: Round,
    kind: ProbeKind,
    length: Duration,
}

impl BenchProbes {
    /// Checks every value and tells all that are wrong together.
    pub fn validate(self, data_dir: &Path) -> Result<Probes, Failure> {
        let mut faults = Vec::new();
        if !(1..=MOST).contains(&self.count) {
            faults.push(format!("--count: {} is not between 1 and {MOST}", self.count));
        }
        if !(1..=LONGEST).contains(&self.seconds) {
            faults.push(format!("--seconds: {} is not between 1 and {LONGEST}", self.seconds));
        }
        faults.extend(id::check_label("class", &self.class).err().map(|error| format!("--class: {error}")));
        faults.extend(ImageRef::parse(&self.image).err().map(|error| format!("--image: {error}")));
        if !faults.is_empty() {
            return Err(Failure::usage(faults.join("\nerror: ")));
        }
        let round = Round {
            count: self.count,
            parallel: PARALLEL,
            pause: Duration::ZERO,
            settle: Duration::ZERO,
            http: None,
            class: self.class,
            image: self.image,
            more: asked(self.probe),
            format: self.output.format(),
            place: Place::of(data_dir)?,
        };
        Ok(Probes { round, kind: self.probe, length: Duration::from_secs(self.seconds.into()) })
    }
}

/// Fields of a container that is asked this way every second.
fn asked(kind: ProbeKind) -> Value {
    let mut probe = match kind {
        ProbeKind::None => return json!({}),
        ProbeKind::Http => json!({ "httpGet": { "path": "/", "port": 80 } }),
        ProbeKind::Tcp => json!({ "tcpSocket": { "port": 80 } }),
        ProbeKind::Exec => json!({ "exec": { "command": ["true"] } }),
    };
    probe["periodSeconds"] = 1.into();
    probe["timeoutSeconds"] = 5.into();
    json!({ "readinessProbe": probe, "livenessProbe": probe })
}

/// What was found; the keys are promised.
#[derive(Debug, Serialize)]
struct Figures {
    class: String,
    count: u32,
    probe: ProbeKind,
    /// Of all Pods together.
    probes_per_second: u32,
    seconds: f64,
    /// Of one core.
    cpu_percent_per_pod: f64,
    agent_cpu_percent_per_pod: f64,
    memory_per_pod_kib: f64,
    agent_memory_per_pod_kib: f64,
}

pub async fn probes(service: &PoolClient, probes: Probes) -> Result<ExitCode, Failure> {
    let Probes { round, kind, length } = probes;
    let pid = Lock::holder(&round.place).ok_or_else(|| {
        Failure::new(format!("no joey runs on {}", round.place.data_dir.display()))
            .with_hint("start it with `joey up`, or name its data directory with --data-dir")
    })?;
    let client = client(&round.place.file("kubeconfig")).await?;
    have_image(service, &round.image).await?;
    let bar = progress(round.count);
    bar.set_message("watching joey idle");
    let idle = idle(pid).await?;
    let namespace = format!("joey-bench-{:08x}", rand::random::<u32>());
    let watched = async {
        let agents = measure(service, &client, &namespace, &round, &bar).await?.agents;
        bar.set_message("watching the probes");
        let spent = spent(pid, &agents, length, &idle).await?;
        all_are_well(&client, &namespace, round.count).await.map(|()| spent)
    };
    let spent = tokio::select! {
        spent = watched => spent.map(Some),
        interrupted = tokio::signal::ctrl_c() => interrupted.map(|()| None).map_err(Failure::from),
    };
    bar.set_message("deleting");
    let deletion = clear(service, &client, &namespace).await;
    bar.finish_and_clear();
    let Some(spent) = spent? else { return Ok(ExitCode::from(130)) };
    deletion?;
    tell(&round, kind, &spent)
}

/// What agents and `joey up` took together.
struct Spent {
    seconds: f64,
    agents: Duration,
    joey: Duration,
    agents_kib: u64,
    grown_kib: u64,
}

async fn spent(pid: i32, agents: &[i32], length: Duration, idle: &Idle) -> Result<Spent, Failure> {
    let gone = || Failure::new("an agent or joey up ended while it was measured");
    let times = || -> Result<(Duration, Duration), Failure> {
        let of_agents = agents.iter().map(|agent| measure::cpu_time_of_one_thread(*agent)).sum::<Option<Duration>>();
        Ok((of_agents.ok_or_else(gone)?, measure::cpu_time(pid).ok_or_else(gone)?))
    };
    let (began, before) = (Instant::now(), times()?);
    tokio::time::sleep(length).await;
    let (after, seconds) = (times()?, began.elapsed().as_secs_f64());
    let usual = Duration::from_secs_f64(idle.cpu_percent / 100.0 * seconds);
    Ok(Spent {
        seconds,
        agents: after.0.saturating_sub(before.0),
        joey: after.1.saturating_sub(before.1).saturating_sub(usual),
        agents_kib: agents.iter().filter_map(|agent| measure::memory_kib(*agent)).sum(),
        grown_kib: measure::memory_kib(pid).unwrap_or_default().saturating_sub(idle.memory_kib),
    })
}

/// Every Pod is ready still and none was started again: what was measured is the cost of probes that were answered.
async fn all_are_well(client: &kube::Client, namespace: &str, count: u32) -> Result<(), Failure> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let listed = pods.list(&ListParams::default()).await;
    let listed = listed.map_err(|error| Failure::caused("the Pods cannot be listed", &error))?;
    let statuses =
        listed.items.iter().flat_map(|pod| pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten()));
    let well = statuses.filter(|status| status.ready && status.restart_count == 0).count();
    match well == count as usize {
        true => Ok(()),
        false => Err(Failure::new(format!("of {count} Pods {well} were ready all the time"))
            .with_hint("the image must serve port 80, and the machine must not be overloaded")),
    }
}

fn tell(round: &Round, kind: ProbeKind, spent: &Spent) -> Result<ExitCode, Failure> {
    let each = f64::from(round.count);
    let percent = |time: Duration| (time.as_secs_f64() / spent.seconds / each * 100.0 * 1e4).round() / 1e4;
    let figures = Figures {
        class: round.class.clone(),
        count: round.count,
        probe: kind,
        probes_per_second: if kind == ProbeKind::None { 0 } else { 2 * round.count },
        seconds: rounded(spent.seconds),
        cpu_percent_per_pod: percent(spent.agents + spent.joey),
        agent_cpu_percent_per_pod: percent(spent.agents),
        memory_per_pod_kib: rounded((spent.agents_kib + spent.grown_kib) as f64 / each),
        agent_memory_per_pod_kib: rounded(spent.agents_kib as f64 / each),
    };
    output::print(round.format, &figures, |_| table(&figures))
}

fn table(figures: &Figures) -> Vec<Vec<String>> {
    let row = |name: &str, value: String| vec![name.to_owned(), value];
    let head = format!("{} PODS, {} PROBES A SECOND ({})", figures.count, figures.probes_per_second, figures.class);
    vec![
        row(&head, format!("OVER {:.0} S", figures.seconds)),
        row("CPU for each Pod, % of a core", format!("{:.4}", figures.cpu_percent_per_pod)),
        row("  of it the Pod's agent", format!("{:.4}", figures.agent_cpu_percent_per_pod)),
        row("memory for each Pod, KiB", format!("{:.0}", figures.memory_per_pod_kib)),
        row("  of it the Pod's agent", format!("{:.0}", figures.agent_memory_per_pod_kib)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_value_is_told() {
        let wrong = BenchProbes {
            count: 0,
            seconds: 0,
            probe: ProbeKind::Http,
            class: "No".to_owned(),
            image: "A B".to_owned(),
            output: crate::args::Output { output: None },
        };
        let message = format!("{:?}", wrong.validate(Path::new("/tmp")).err().expect("all is wrong"));
        assert!(["--count", "--seconds", "--class", "--image"].iter().all(|flag| message.contains(flag)), "{message}");
    }
}
