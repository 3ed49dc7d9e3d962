//! `joey up` and agents are killed while Pods are created and deleted: no Pod is lost, none is there twice, nothing stays behind.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use joey_tests::host::{is_first, process_runs};
use joey_tests::joey::pod;
use joey_tests::source::checkpoints;
use joey_tests::{Joey, Registry, holds, pause, seconds, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, IteratorRandom};
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

/// A Pod that runs until it is asked to end, and again when its sandbox was lost.
fn lasting(name: &str, image: &str) -> Value {
    let mut object = pod(name, image, &["sh", "-c", "trap 'exit 0' TERM QUIT; while :; do sleep 0.1; done"]);
    object["spec"]["restartPolicy"] = "Always".into();
    object
}

/// Pods that there shall be, and a Joey that is to keep them.
struct Keeper {
    joey: Joey,
    image: String,
    wanted: BTreeSet<String>,
    serial: usize,
}

impl Keeper {
    fn new(joey: Joey, image: String) -> Self {
        Self { joey, image, wanted: BTreeSet::new(), serial: 0 }
    }

    /// Waits until there are the wanted Pods and nothing else.
    #[track_caller]
    fn settle(&self, when: &str) {
        wait_until(&format!("{when}: exactly {:?} are there", self.wanted), seconds(90), || {
            let wrong = self.wrong();
            holds(wrong.is_empty(), wrong)
        });
    }

    /// What keeps the wanted Pods from being there, each once and whole, and what is there besides.
    fn wrong(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let listed = self.joey.joey(&["ps", "-o", "json"]);
        let Ok(listed) = serde_json::from_str::<Vec<Value>>(&listed.stdout) else { return vec![listed.stderr] };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut names: Vec<_> = listed.iter().map(|instance| text(&instance["spec"]["name"])).collect();
        names.sort();
        let wanted: Vec<_> = self.wanted.iter().map(|name| format!("{name}.default")).collect();
        if names != wanted {
            return vec![format!("instances {names:?}")];
        }
        let ids: BTreeSet<_> = listed.iter().map(|instance| text(&instance["id"])).collect();
        let belongings = self.joey.belongings();
        let running = belongings.running();
        for id in &ids {
            let of = |part: &str| running.get(&(id.clone(), part.to_owned())).cloned().unwrap_or_default();
            let (agents, firsts) = (of("agent").len(), of("main").into_iter().filter(|pid| is_first(*pid)).count());
            if (agents, firsts) != (1, 1) {
                wrong.push(format!("{id} has {agents} agents and {firsts} containers"));
            }
        }
        let folders = std::fs::read_dir(self.joey.data().join("instances")).into_iter().flatten().flatten();
        let folders = folders.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let folders = folders.filter(|name| name != "left-logs");
        let of_processes = running.into_keys().map(|(id, _)| id);
        for left in folders.chain(belongings.with_cgroups()).chain(of_processes).filter(|id| !ids.contains(id)) {
            wrong.push(format!("{left} is left behind"));
        }
        if wrong.is_empty() {
            wrong.extend(self.cluster_disagrees());
        }
        wrong
    }

    fn cluster_disagrees(&self) -> Option<String> {
        let ready = r#"{range .items[*]}{.metadata.name}={.status.conditions[?(@.type=="Ready")].status} {end}"#;
        let pods = self.joey.kubectl(&["get", "pods", "-o", &format!("jsonpath={ready}")]).stdout;
        let wanted: String = self.wanted.iter().map(|name| format!("{name}=True ")).collect();
        (pods != wanted).then(|| format!("Pods {pods}"))
    }

    /// Asks for the wanted Pods and for the end of others; what is refused meanwhile is asked for again later.
    fn ask(&self, gone: &[String]) -> bool {
        let pods: Vec<_> = self.wanted.iter().map(|name| lasting(name, &self.image)).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": pods}).to_string();
        let applied = pods.is_empty()
            || self.joey.kubectl_with_input(&["--request-timeout=3s", "apply", "-f", "-"], &list).code == 0;
        let mut delete = vec!["--request-timeout=3s", "delete", "pod", "--ignore-not-found", "--wait=false"];
        delete.extend(gone.iter().map(String::as_str));
        applied && (gone.is_empty() || self.joey.kubectl(&delete).code == 0)
    }

    /// Up to two more Pods, up to two fewer, six at most; those that shall go.
    fn change_of_mind(&mut self, chance: &mut StdRng) -> Vec<String> {
        let fewer = chance.random_range(0..=self.wanted.len().min(2));
        let gone = self.wanted.iter().cloned().choose_multiple(chance, fewer);
        self.wanted.retain(|name| !gone.contains(name));
        for _ in 0..chance.random_range(u8::from(gone.is_empty())..=2) {
            if self.wanted.len() < 6 {
                self.serial += 1;
                self.wanted.insert(format!("pod-{}", self.serial));
            }
        }
        gone
    }

    /// Kills one agent, if there is one.
    fn kill_agent(&self, chance: &mut StdRng) {
        let running = self.joey.belongings().running();
        let agents = running.iter().filter(|((_, part), _)| part == "agent").flat_map(|(_, pids)| pids);
        if let Some(pid) = agents.choose(chance) {
            let _ = kill(Pid::from_raw(i32::try_from(*pid).expect("process ids fit")), Signal::SIGKILL);
        }
    }

    /// Starts `joey up` anew so that it, or each agent, ends at this step; waits until it can be asked.
    fn arm(&mut self, step: &str) {
        self.joey.kill();
        self.joey.crash_at(Some(step));
        self.joey.launch();
        wait_until("joey up answers or has ended", seconds(30), || {
            let answers = std::net::TcpStream::connect(self.joey.listen()).is_ok();
            holds(answers || self.joey.program().ended().is_some(), "neither")
        });
    }

    /// Kills `joey up`, unless it has ended already, and starts it without any harm in it.
    fn start_anew(&mut self) {
        if self.joey.program().ended().is_none() {
            self.joey.kill();
        }
        self.joey.crash_at(None);
        self.joey.up();
    }

    /// Everything goes, and nothing stays.
    fn end(mut self) {
        self.joey.down().ok();
        assert!(self.joey.traces().is_empty(), "{:?}", self.joey.traces());
    }
}

/// Rounds unless `JOEY_CRASH_ROUNDS` says how many; `make crash` takes 500.
const ROUNDS: usize = 10;

#[test]
fn random_rounds() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let rounds = number("JOEY_CRASH_ROUNDS").map_or(ROUNDS, |count| usize::try_from(count).expect("it fits"));
    let seed = number("JOEY_CRASH_SEED").unwrap_or_else(rand::random);
    eprintln!("{rounds} rounds, JOEY_CRASH_SEED={seed}");
    let mut steps = checkpoints();
    steps.retain(|step| !step.starts_with("machine."));
    let mut chance = StdRng::seed_from_u64(seed);
    let registry = Registry::with_demo_image();
    let mut keeper = Keeper::new(Joey::start(), registry.demo());
    let mut blows: BTreeMap<&str, usize> = BTreeMap::new();
    for round in 1..=rounds {
        let (gone, chance) = (keeper.change_of_mind(&mut chance), &mut chance);
        let armed = chance.random_ratio(1, 3).then(|| steps.choose(chance).expect("there are steps").clone());
        if let Some(step) = &armed {
            keeper.arm(step);
        }
        keeper.ask(&gone);
        pause(Duration::from_millis(chance.random_range(0..400)));
        let blow = match (armed.is_some(), chance.random_range(0..4)) {
            (true, _) => "at a step",
            (false, 0) => "joey up",
            (false, 1) => "an agent",
            (false, 2) => "an agent, then joey up",
            (false, _) => "joey up, then an agent",
        };
        *blows.entry(blow).or_default() += 1;
        match blow {
            "an agent" | "an agent, then joey up" => keeper.kill_agent(chance),
            "joey up, then an agent" => {
                keeper.joey.program().signal(Signal::SIGKILL);
                keeper.kill_agent(chance);
            }
            _ => {}
        }
        if blow != "an agent" {
            keeper.start_anew();
        }
        let when = format!("seed {seed}, round {round}, {blow} {}", armed.as_deref().unwrap_or_default());
        assert!(keeper.ask(&gone), "{when}: it can be asked");
        keeper.settle(&when);
    }
    eprintln!("{rounds} rounds, {} Pods made, killed: {blows:?}", keeper.serial);
    keeper.end();
}

#[test]
fn what_ended_with_its_agent_unseen_is_not_run_again() {
    let registry = Registry::with_demo_image();
    let mut keeper = Keeper::new(Joey::start(), registry.demo());
    let counts = |name: &str, policy: &str, script: &str| {
        let mut object = pod(name, &registry.demo(), &["sh", "-c", script]);
        object["spec"]["restartPolicy"] = policy.into();
        object
    };
    keeper.joey.apply(&counts("done", "OnFailure", "exit 0"));
    keeper.joey.apply(&counts("once", "Never", "sleep 1000"));
    keeper.joey.apply(&counts("again", "Always", "sleep 1000"));
    for (name, phase) in [("done", "Succeeded"), ("once", "Running"), ("again", "Running")] {
        wait_until(&format!("{name} is {phase}"), seconds(30), || {
            let status = keeper.joey.get("pod", name)["status"].clone();
            holds(status["phase"] == phase, status)
        });
    }
    keeper.joey.kill();
    let running = keeper.joey.belongings().running();
    for pid in running.iter().filter(|((_, part), _)| part == "agent").flat_map(|(_, pids)| pids) {
        kill(Pid::from_raw(i32::try_from(*pid).expect("process ids fit")), Signal::SIGKILL).expect("it runs");
    }
    keeper.joey.up();
    wait_until("what may run runs again", seconds(30), || {
        let status = keeper.joey.get("pod", "again")["status"].clone();
        holds(status["phase"] == "Running" && status["containerStatuses"][0]["restartCount"] == 1, status)
    });
    wait_until("what may not has failed", seconds(30), || {
        let status = keeper.joey.get("pod", "once")["status"].clone();
        holds(status["phase"] == "Failed" && status["reason"] == "AgentLost", status)
    });
    // The next one keeps to it.
    let known = |keeper: &Keeper| keeper.joey.get("pod", "once")["status"].clone();
    let before = known(&keeper);
    keeper.start_anew();
    wait_until("all are told of", seconds(30), || {
        let status = keeper.joey.get("pod", "again")["status"].clone();
        holds(status["phase"] == "Running", status)
    });
    let once = keeper.joey.joey(&["ps", "-o", "json"]).json();
    let once = once.as_array().and_then(|all| all.iter().find(|one| one["spec"]["name"] == "once.default")).cloned();
    assert!(once.as_ref().is_none_or(|one| one["status"]["phase"] == "Failed"), "{once:?}");
    assert_eq!(known(&keeper)["phase"], before["phase"]);
    let done = keeper.joey.get("pod", "done")["status"].clone();
    let end = &done["containerStatuses"][0]["state"]["terminated"];
    assert_eq!((&done["phase"], &end["exitCode"]), (&json!("Succeeded"), &json!(0)), "{done}");
    keeper.end();
}

#[test]
fn agents_end_at_each_step() {
    let steps: Vec<_> = checkpoints().into_iter().filter(|step| step.starts_with("agent.")).collect();
    assert!(steps.len() >= 6, "{steps:?}");
    let registry = Registry::with_demo_image();
    let mut keeper = Keeper::new(Joey::start(), registry.demo());
    keeper.wanted.insert("steady".to_owned());
    assert!(keeper.ask(&[]));
    keeper.settle("at first");
    let steady = keeper.joey.pid_of("steady.default");
    for step in &steps {
        let name = step.replace('.', "-");
        keeper.joey.kill();
        keeper.joey.crash_at(Some(step));
        keeper.joey.up();
        keeper.wanted.insert(name.clone());
        assert!(keeper.ask(&[]), "{step}");
        // Steps of creation are reached by themselves, those of the end once the Pod shall go.
        let mut words = Words::default();
        wait_until(&format!("{step} is reached"), seconds(40), || {
            let reached = words.say(&keeper.joey, &format!("crash point {step} is reached"));
            if !reached && keeper.wanted.contains(&name) && keeper.wrong().is_empty() {
                keeper.wanted.remove(&name);
                keeper.ask(std::slice::from_ref(&name));
            }
            holds(reached, keeper.wrong())
        });
        keeper.start_anew();
        keeper.settle(step);
        keeper.wanted.remove(&name);
        assert!(keeper.ask(&[name]), "{step}");
        keeper.settle(step);
        assert!(process_runs(steady), "{step}: another Pod never notices");
    }
    keeper.end();
}

/// What agents wrote to their standard error; an open file is read also when its instance is gone.
#[derive(Default)]
struct Words(BTreeMap<PathBuf, File>);

impl Words {
    fn say(&mut self, joey: &Joey, words: &str) -> bool {
        for entry in std::fs::read_dir(joey.data().join("instances")).into_iter().flatten().flatten() {
            let path = entry.path().join("agent.err");
            if let Ok(file) = File::open(&path) {
                self.0.entry(path).or_insert(file);
            }
        }
        self.0.values().any(|file| {
            let mut bytes = vec![0; 64 << 10];
            let count = file.read_at(&mut bytes, 0).unwrap_or_default();
            String::from_utf8_lossy(&bytes[..count]).contains(words)
        })
    }
}
