//! `joey bench start`: how fast Pods start and what the platform adds for each, measured from outside through its interfaces.
//!
//! A Pod's times begin just before its create call is sent to the Kubernetes API. It *runs* at the time its container's process
//! was started, as the instance service tells it to the microsecond (the same machine, the same clock); it is *ready* when a
//! watch of Pods in this process has shown the condition. `parallel` Pods are on their way at a time: a Pod takes its place
//! with its create call and gives it back when the service has shown that it runs. Pods a minute are the Pods divided by the
//! time from the first create call to the start of the last process. It has *answered* ([`answers`]) when it did so over HTTP. Memory
//! for each Pod is the proportional memory of its sandbox and its share of what `joey up` has grown by: of the agent where the
//! containers' processes are this kernel's, and else of all that makes the sandbox, the containers in it. What probes cost is
//! measured in [`probes`].

mod answers;
pub mod probes;

use std::collections::{HashMap, HashSet};
use std::io::IsTerminal;
use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use joey_api::image::{PullEvent, PullRequest};
use joey_api::instance::{ContainerState, Instance, WatchEvent};
use joey_model::{ImageRef, id};
use joey_pool::PoolClient;
use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use kube::api::{Api, DeleteParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::runtime::watcher;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc};

use answers::Answers;

use crate::args::BenchStart;
use crate::failure::Failure;
use crate::measure;
use crate::output::{self, Format};
use crate::roles::Lock;
use crate::settings::Place;

/// How long `joey up` is watched while nothing happens.
const IDLE: Duration = Duration::from_secs(5);
/// Longest time without any step forward before the round is given up.
const STALL: Duration = Duration::from_secs(60);
/// Longest time for everything to be gone again.
const CLEAR: Duration = Duration::from_secs(120);
/// The class whose containers' processes are this kernel's.
const RUNC: &str = "runc";
/// More Pods than a node may have cannot all be there at once.
const MOST: u32 = 5000;

/// A round whose values are all good.
pub struct Round {
    count: u32,
    parallel: u32,
    pause: Duration,
    settle: Duration,
    http: Option<u16>,
    class: String,
    image: String,
    /// Fields of the Pods' container beyond the usual ones.
    more: Value,
    format: Format,
    place: Place,
}

impl BenchStart {
    /// Checks every value and tells all that are wrong together.
    pub fn validate(self, data_dir: &Path) -> Result<Round, Failure> {
        let mut faults = Vec::new();
        if !(1..=MOST).contains(&self.count) {
            faults.push(format!("--count: {} is not between 1 and {MOST}", self.count));
        }
        if !(1..=MOST).contains(&self.parallel) {
            faults.push(format!("--parallel: {} is not between 1 and {MOST}", self.parallel));
        }
        if let Err(error) = id::check_label("class", &self.class) {
            faults.push(format!("--class: {error}"));
        }
        if let Err(error) = ImageRef::parse(&self.image) {
            faults.push(format!("--image: {error}"));
        }
        if !faults.is_empty() {
            return Err(Failure::usage(faults.join("\nerror: ")));
        }
        Ok(Round {
            count: self.count,
            parallel: self.parallel,
            pause: Duration::from_secs(self.pause.into()),
            settle: Duration::from_secs(self.settle.into()),
            http: self.http,
            class: self.class,
            image: self.image,
            more: json!({}),
            format: self.output.format(),
            place: Place::of(data_dir)?,
        })
    }
}

/// What was found; the keys are promised.
#[derive(Debug, Serialize)]
struct Figures {
    class: String,
    count: u32,
    parallel: u32,
    running_ms: Percentiles,
    ready_ms: Percentiles,
    #[serde(skip_serializing_if = "Option::is_none")]
    http_ms: Option<Percentiles>,
    pods_per_minute: f64,
    memory_per_pod_kib: f64,
    idle_memory_kib: u64,
    idle_cpu_percent: f64,
}

/// Nearest-rank percentiles of milliseconds.
#[derive(Debug, Serialize, PartialEq)]
struct Percentiles {
    p50: f64,
    p90: f64,
    p99: f64,
}

impl Percentiles {
    /// Of at least one time in microseconds.
    fn of(mut times: Vec<i64>) -> Self {
        times.sort_unstable();
        let at = |percent: usize| {
            let rank = (times.len() * percent).div_ceil(100).max(1);
            times.get(rank - 1).copied().unwrap_or_default() as f64 / 1000.0
        };
        Self { p50: at(50), p90: at(90), p99: at(99) }
    }
}

pub async fn start(service: &PoolClient, round: Round) -> Result<ExitCode, Failure> {
    let pid = Lock::holder(&round.place).ok_or_else(|| {
        Failure::new(format!("no joey runs on {}", round.place.data_dir.display()))
            .with_hint("start it with `joey up`, or name its data directory with --data-dir")
    })?;
    let client = client(&round.place.file("kubeconfig")).await?;
    have_class(service, &round.class).await?;
    have_image(service, &round.image).await?;
    let bar = progress(round.count);
    bar.set_message("watching joey idle");
    let idle = idle(pid).await?;

    let namespace = format!("joey-bench-{:08x}", rand::random::<u32>());
    let mut asked = signal(SignalKind::terminate())?;
    let measured = tokio::select! {
        measured = measure(service, &client, &namespace, &round, &bar) => measured.map(Some),
        interrupted = tokio::signal::ctrl_c() => interrupted.map(|()| None).map_err(Failure::from),
        _ = asked.recv() => Ok(None),
    };
    // While the Pods are still there.
    let grown = measure::memory_kib(pid).unwrap_or_default().saturating_sub(idle.memory_kib);
    bar.set_message("deleting");
    let deletion = clear(service, &client, &namespace).await;
    bar.finish_and_clear();
    let Some(measured) = measured? else { return Ok(ExitCode::from(130)) };
    let deletion = deletion?;

    let figures = Figures {
        class: round.class,
        count: round.count,
        parallel: round.parallel,
        running_ms: Percentiles::of(measured.running),
        ready_ms: Percentiles::of(measured.ready),
        http_ms: round.http.map(|_| Percentiles::of(measured.answered)),
        pods_per_minute: rounded(f64::from(round.count) * 60e6 / measured.whole.max(1) as f64),
        memory_per_pod_kib: rounded((measured.sandboxes_kib + grown) as f64 / f64::from(round.count)),
        idle_memory_kib: idle.memory_kib,
        idle_cpu_percent: rounded(idle.cpu_percent),
    };
    tell(&figures, measured.sandboxes_kib, grown, deletion, round.format)
}

/// A tenth is as fine as memory and rates can be told apart.
fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

async fn client(kubeconfig: &Path) -> Result<kube::Client, Failure> {
    // Fails when a provider is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let unusable = |error: &dyn std::error::Error| {
        Failure::new(format!("kubeconfig {} cannot be used: {error}", kubeconfig.display()))
            .with_hint("joey up writes it when it is ready")
    };
    let file = kube::config::Kubeconfig::read_from(kubeconfig).map_err(|error| unusable(&error))?;
    let config = kube::Config::from_custom_kubeconfig(file, &Default::default()).await;
    kube::Client::try_from(config.map_err(|error| unusable(&error))?).map_err(|error| unusable(&error))
}

async fn have_class(service: &PoolClient, class: &str) -> Result<(), Failure> {
    let hosts = service.hosts().await?;
    if hosts.iter().flat_map(|host| &host.classes).any(|known| known == class) {
        return Ok(());
    }
    let why = hosts.iter().find_map(|host| host.classes_missing.get(class)).map_or("it is not known", String::as_str);
    Err(Failure::new(format!("no host makes sandboxes of class \"{class}\": {why}"))
        .with_hint("`joey host ls` lists the classes of each host"))
}

/// Pulls the image where it is missing, so that no Pod's time has a download in it.
async fn have_image(service: &PoolClient, image: &str) -> Result<(), Failure> {
    let reference = ImageRef::parse(image).map_err(|error| Failure::usage(error.to_string()))?.to_string();
    if service.images().await?.iter().any(|image| image.references.contains(&reference)) {
        return Ok(());
    }
    let mut events = service.pull(&PullRequest { image: image.to_owned(), credentials: Vec::new() }).await?;
    while let Some(event) = events.try_next().await? {
        match event {
            PullEvent::Failed { fault } => {
                return Err(joey_model::Fault::from(joey_api::error::ErrorBody { error: fault }).into());
            }
            PullEvent::Done { .. } => return Ok(()),
            _ => {}
        }
    }
    Err(Failure::new(format!("the pull of image {image} broke off")))
}

fn progress(count: u32) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos:>5} of {len} ready  {msg}");
    ProgressBar::new(count.into()).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

struct Idle {
    memory_kib: u64,
    cpu_percent: f64,
}

async fn idle(pid: i32) -> Result<Idle, Failure> {
    let gone = || Failure::new(format!("joey up (pid {pid}) cannot be looked at")).with_hint("run this as root");
    let (began, before) = (Instant::now(), measure::cpu_time(pid).ok_or_else(gone)?);
    tokio::time::sleep(IDLE).await;
    let used = measure::cpu_time(pid).ok_or_else(gone)?.saturating_sub(before);
    let cpu_percent = used.as_secs_f64() / began.elapsed().as_secs_f64() * 100.0;
    Ok(Idle { memory_kib: measure::memory_kib(pid).ok_or_else(gone)?, cpu_percent })
}

/// A step of a Pod, seen on one of the watches.
enum Step {
    Running { pod: String, instance: String, address: Option<IpAddr>, at: Timestamp },
    Ready { pod: String, at: Timestamp },
    Answered { pod: String, at: Timestamp },
    Stuck { pod: String, why: String },
}

/// What a round's Pods took, in microseconds, and the memory of their sandboxes.
struct Measured {
    running: Vec<i64>,
    ready: Vec<i64>,
    answered: Vec<i64>,
    whole: i64,
    agents: Vec<i32>,
    sandboxes_kib: u64,
}

async fn measure(
    service: &PoolClient,
    client: &kube::Client,
    namespace: &str,
    round: &Round,
    bar: &ProgressBar,
) -> Result<Measured, Failure> {
    open_namespace(client, namespace).await?;
    let (sender, steps) = mpsc::channel(1024);
    let watches = async {
        tokio::try_join!(
            watch_instances(service, namespace, sender.clone()),
            watch_pods(Api::namespaced(client.clone(), namespace), sender)
        )
    };
    bar.set_message("starting");
    let places = Semaphore::new(round.parallel as usize);
    let sent = std::cell::RefCell::new(HashMap::new());
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let creations = async {
        let all = futures::stream::iter(0..round.count).map(Ok::<_, Failure>);
        all.try_for_each_concurrent(round.parallel as usize, |number| {
            let (pods, places, sent) = (&pods, &places, &sent);
            async move {
                // Given back by the step that shows the Pod running.
                places.acquire().await.map_err(|_| Failure::new("the round has ended"))?.forget();
                if number > 0 {
                    tokio::time::sleep(round.pause).await;
                }
                let pod = pod(number, round)?;
                sent.borrow_mut().insert(format!("bench-{number}"), Timestamp::now());
                pods.create(&PostParams::default(), &pod)
                    .await
                    .map(drop)
                    .map_err(|error| Failure::caused(&format!("Pod bench-{number} cannot be created"), &error))
            }
        })
        .await
    };
    let marks = async {
        let marks = follow(steps, round, &places, bar);
        tokio::pin!(marks);
        tokio::select! {
            done = async { tokio::try_join!(creations, &mut marks) } => done.map(|((), marks)| marks),
            ended = watches => match ended {
                Err(failure) => Err(failure),
                Ok(_) => Err(Failure::new("a watch of the Pods ended")),
            },
        }
    };
    let marks = marks.await?;
    let sent = sent.into_inner();
    bar.set_message("letting them idle");
    tokio::time::sleep(round.settle).await;
    summed(&marks, &sent, round)
}

fn summed(marks: &Marks, sent: &HashMap<String, Timestamp>, round: &Round) -> Result<Measured, Failure> {
    let since = |times: &HashMap<String, Timestamp>| -> Vec<i64> {
        times.iter().filter_map(|(pod, at)| Some(micros(*sent.get(pod)?, *at))).collect()
    };
    let (first, last) = (sent.values().min(), marks.running.values().max());
    let (first, last) = first.zip(last).ok_or_else(|| Failure::new("no Pod was started"))?;
    let cgroups: HashSet<String> = marks.instances.iter().map(|id| cgroup(&round.place, id)).collect();
    let agents = measure::processes("joey-agent", |name| cgroups.contains(name));
    let sandboxes = match round.class == RUNC {
        true => agents.clone(),
        false => measure::all_processes(|name| cgroups.contains(name)),
    };
    Ok(Measured {
        running: since(&marks.running),
        ready: since(&marks.ready),
        answered: since(&marks.answered),
        whole: micros(*first, *last),
        sandboxes_kib: sandboxes.iter().filter_map(|process| measure::memory_kib(*process)).sum(),
        agents,
    })
}

/// The last part of the name of an instance's cgroup: its id, but where its machine was made before it.
fn cgroup(place: &Place, id: &str) -> String {
    let told = std::fs::read_to_string(place.file("instances").join(id).join("vm/cgroup")).unwrap_or_default();
    told.rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or(id).to_owned()
}

fn micros(from: Timestamp, to: Timestamp) -> i64 {
    i64::try_from(to.duration_since(from).as_micros()).unwrap_or(i64::MAX)
}

/// The round's own namespace, complete with the account its Pods run as.
async fn open_namespace(client: &kube::Client, name: &str) -> Result<(), Failure> {
    let namespace: Namespace = serde_json::from_value(json!({ "metadata": { "name": name } }))
        .map_err(|error| Failure::new(error.to_string()))?;
    let all: Api<Namespace> = Api::all(client.clone());
    all.create(&PostParams::default(), &namespace)
        .await
        .map_err(|error| Failure::caused(&format!("namespace {name} cannot be created"), &error))?;
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), name);
    let there = await_condition(accounts, "default", |account: Option<&ServiceAccount>| account.is_some());
    match tokio::time::timeout(STALL, there).await {
        Ok(there) => there.map(drop).map_err(|error| Failure::caused("the service account cannot be read", &error)),
        Err(_) => Err(Failure::new(format!("namespace {name} got no service account"))),
    }
}

fn pod(number: u32, round: &Round) -> Result<Pod, Failure> {
    let class = (round.class != RUNC).then_some(&round.class);
    let mut container = json!({ "name": "main", "image": round.image, "imagePullPolicy": "IfNotPresent" });
    for (name, value) in round.more.as_object().into_iter().flatten() {
        container[name] = value.clone();
    }
    serde_json::from_value(json!({
        "metadata": { "name": format!("bench-{number}"), "labels": { "app": "joey-bench" } },
        "spec": {
            "runtimeClassName": class,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "terminationGracePeriodSeconds": 1,
            "tolerations": [{ "operator": "Exists" }],
            "containers": [container],
        },
    }))
    .map_err(|error| Failure::new(error.to_string()))
}

/// Tells when processes were started, until the service goes away.
async fn watch_instances(service: &PoolClient, namespace: &str, steps: mpsc::Sender<Step>) -> Result<(), Failure> {
    let suffix = format!(".{namespace}");
    loop {
        // The service ends the watch of a reader that was too slow; what was missed is in the next one's first lines.
        let mut changes = service.watch().await?;
        while let Some(change) = changes.try_next().await? {
            let WatchEvent::Set { instance } = change else { continue };
            let Some(pod) = instance.spec.name.strip_suffix(&suffix) else { continue };
            if let Some(step) = step_of(pod, &instance)
                && steps.send(step).await.is_err()
            {
                return Ok(());
            }
        }
    }
}

fn step_of(pod: &str, instance: &Instance) -> Option<Step> {
    instance.status.containers.iter().find_map(|container| match &container.state {
        ContainerState::Running { started_at, .. } => {
            let (pod, id, address) = (pod.to_owned(), instance.id.clone(), instance.status.address);
            Some(Step::Running { pod, instance: id, address, at: *started_at })
        }
        ContainerState::Waiting { reason, .. } if reason == "ContainerCreating" => None,
        ContainerState::Waiting { reason, message } => {
            Some(Step::Stuck { pod: pod.to_owned(), why: format!("{reason}: {message}") })
        }
        ContainerState::Terminated(end) => {
            Some(Step::Stuck { pod: pod.to_owned(), why: format!("its container ended with {}", end.exit_code) })
        }
    })
}

/// Tells when Pods are seen ready.
async fn watch_pods(pods: Api<Pod>, steps: mpsc::Sender<Step>) -> Result<(), Failure> {
    let mut changes = watcher(pods, watcher::Config::default()).boxed();
    while let Some(change) = changes.next().await {
        let (watcher::Event::Apply(pod) | watcher::Event::InitApply(pod)) =
            change.map_err(|error| Failure::caused("the Pods cannot be watched", &error))?
        else {
            continue;
        };
        let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
        let ready = conditions.is_some_and(|all| all.iter().any(|one| one.type_ == "Ready" && one.status == "True"));
        if let Some(name) = pod.metadata.name.filter(|_| ready)
            && steps.send(Step::Ready { pod: name, at: Timestamp::now() }).await.is_err()
        {
            return Ok(());
        }
    }
    Ok(())
}

/// The first time of each step, by Pod.
#[derive(Default)]
struct Marks {
    running: HashMap<String, Timestamp>,
    ready: HashMap<String, Timestamp>,
    answered: HashMap<String, Timestamp>,
    instances: HashSet<String>,
}

/// Collects steps until every Pod has run, been ready and answered, where it is asked.
async fn follow(
    mut steps: mpsc::Receiver<Step>,
    round: &Round,
    places: &Semaphore,
    bar: &ProgressBar,
) -> Result<Marks, Failure> {
    let (mut marks, mut answers, count) = (Marks::default(), Answers::default(), round.count as usize);
    let left = |marks: &Marks| {
        let unasked = round.http.is_some() && marks.answered.len() < count;
        marks.running.len() < count || marks.ready.len() < count || unasked
    };
    while left(&marks) {
        let next = async {
            tokio::select! {
                step = steps.recv() => step,
                (pod, at) = answers.next() => Some(Step::Answered { pod, at }),
            }
        };
        let step = tokio::time::timeout(STALL, next).await.map_err(|_| {
            Failure::new(format!(
                "nothing went on for {} s: of {count} Pods {} run and {} are ready",
                STALL.as_secs(),
                marks.running.len(),
                marks.ready.len()
            ))
        })?;
        match step {
            Some(Step::Running { pod, instance, address, at }) => {
                if marks.running.insert(pod.clone(), at).is_none() {
                    marks.instances.insert(instance);
                    places.add_permits(1);
                    if let (Some(address), Some(port)) = (address, round.http) {
                        answers.ask(pod, address, port);
                    }
                }
            }
            Some(Step::Answered { pod, at }) => drop(marks.answered.insert(pod, at)),
            Some(Step::Ready { pod, at }) => {
                marks.ready.entry(pod).or_insert(at);
                bar.set_position(marks.ready.len() as u64);
            }
            Some(Step::Stuck { pod, why }) => return Err(Failure::new(format!("Pod {pod} does not start: {why}"))),
            None => return Err(Failure::new("the watches of the Pods ended")),
        }
    }
    Ok(marks)
}

/// Deletes the namespace with all its Pods and waits until they are gone; how long that took.
async fn clear(service: &PoolClient, client: &kube::Client, namespace: &str) -> Result<Duration, Failure> {
    let began = Instant::now();
    let all: Api<Namespace> = Api::all(client.clone());
    let still = || {
        Failure::new(format!("namespace {namespace} is still there"))
            .with_hint(format!("delete it with kubectl delete namespace {namespace}"))
    };
    match all.delete(namespace, &DeleteParams::default()).await {
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(began.elapsed()),
        outcome => outcome
            .map(drop)
            .map_err(|error| Failure::caused(&format!("namespace {namespace} cannot be deleted"), &error))?,
    }
    let gone = await_condition(all, namespace, |namespace: Option<&Namespace>| namespace.is_none());
    match tokio::time::timeout(CLEAR, gone).await {
        Ok(gone) => gone.map(drop).map_err(|_| still())?,
        Err(_) => return Err(still()),
    }
    let suffix = format!(".{namespace}");
    let left = service.list().await?.iter().filter(|instance| instance.spec.name.ends_with(&suffix)).count();
    match left {
        0 => Ok(began.elapsed()),
        _ => Err(Failure::new(format!("{left} instances of namespace {namespace} are still there"))),
    }
}

fn tell(
    figures: &Figures,
    sandboxes_kib: u64,
    grown_kib: u64,
    deletion: Duration,
    format: Format,
) -> Result<ExitCode, Failure> {
    if !matches!(format, Format::Table | Format::Wide) {
        eprintln!("{} Pods deleted in {:.1} s", figures.count, deletion.as_secs_f64());
    }
    output::print(format, figures, |_| {
        let row = |cells: [String; 4]| cells.to_vec();
        let times = |name: &str, times: &Percentiles| {
            row([name.to_owned(), whole(times.p50), whole(times.p90), whole(times.p99)])
        };
        let value = |name: &str, value: String| vec![name.to_owned(), value];
        let each = f64::from(figures.count);
        let head = format!("{} PODS, {} AT A TIME ({})", figures.count, figures.parallel, figures.class);
        let answers = figures.http_ms.iter().map(|answered| times("create call to first HTTP answer, ms", answered));
        let rows = vec![
            row([head, "P50".to_owned(), "P90".to_owned(), "P99".to_owned()]),
            times("create call to process running, ms", &figures.running_ms),
            times("create call to Ready, ms", &figures.ready_ms),
            value("Pods a minute, first create to last running", format!("{:.0}", figures.pods_per_minute)),
            value("memory added for each Pod, KiB", format!("{:.0}", figures.memory_per_pod_kib)),
            value("  of it the Pod's sandbox", format!("{:.0}", sandboxes_kib as f64 / each)),
            value("  of it growth of joey up", format!("{:.0}", grown_kib as f64 / each)),
            value("joey up idle: memory, KiB", figures.idle_memory_kib.to_string()),
            value("joey up idle: CPU, % of a core", format!("{:.1}", figures.idle_cpu_percent)),
            value("deletion of all, s", format!("{:.1}", deletion.as_secs_f64())),
        ];
        rows.into_iter().chain(answers).collect()
    })
}

fn whole(milliseconds: f64) -> String {
    format!("{milliseconds:.1}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let hundred = Percentiles::of((1..=100).rev().map(|n| n * 1000).collect());
        assert_eq!(hundred, Percentiles { p50: 50.0, p90: 90.0, p99: 99.0 });
        assert_eq!(Percentiles::of(vec![1500]), Percentiles { p50: 1.5, p90: 1.5, p99: 1.5 });
    }

    #[test]
    fn every_wrong_value_is_told() {
        let wrong = BenchStart {
            count: 0,
            parallel: 0,
            pause: 0,
            settle: 0,
            http: None,
            class: "No".to_owned(),
            image: "A B".to_owned(),
            output: crate::args::Output { output: None },
        };
        let message = format!("{:?}", wrong.validate(Path::new("/tmp")).err().expect("all is wrong"));
        assert!(["--count", "--parallel", "--class", "--image"].iter().all(|flag| message.contains(flag)), "{message}");
    }
}
