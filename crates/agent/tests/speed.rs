//! How long a container takes from the agent's start to its process, and how much memory agents take when many run. Run by
//! hand, with the agent that `JOEY_AGENT` names where it is set: `cargo test -p joey-agent --test speed -- --ignored --nocapture`

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use joey_sandbox::conformance::{Bench, running};
use joey_sandbox::{AgentClient, Layer, Network, RuncConfig, runc};

const AGENTS: u64 = 20;

fn pss_kib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find(|line| line.starts_with("Pss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
#[ignore = "a measurement: needs root, busybox-static and a quiet host"]
async fn start_and_memory() {
    let unique = format!("joey-speed-{}", std::process::id());
    let dir = std::env::temp_dir().join(&unique);
    let layer = dir.join("layer");
    std::fs::create_dir_all(layer.join("bin")).unwrap();
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists()).unwrap();
    std::fs::copy(busybox, layer.join("bin/sh")).unwrap();
    let agent_binary = std::env::var_os("JOEY_AGENT").map_or(env!("CARGO_BIN_EXE_joey-agent").into(), PathBuf::from);
    let cgroup_root = format!("/{unique}");
    let class = runc(RuncConfig { agent_binary, cgroup_root: cgroup_root.clone() });
    let bench = Bench {
        class,
        dir: dir.clone(),
        layers: vec![Layer { image: layer.clone(), path: layer }],
        further: Vec::new(),
        on_linux: true,
        cgroup_root: cgroup_root.clone(),
    };
    let (mut made, mut began, mut requests, mut sandboxes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for number in 0..AGENTS {
        let mut request = bench.request(number, "exec sleep 1000");
        // A namespace that is there already; which one does not matter here.
        request.network = Some(Network {
            netns: PathBuf::from("/proc/self/ns/net"),
            address: std::net::Ipv4Addr::LOCALHOST,
            mac: [0; 6],
            gateway: std::net::Ipv4Addr::LOCALHOST,
            gateway_mac: [0; 6],
        });
        let (at, clock) = (Timestamp::now(), Instant::now());
        let sandbox = bench.create(&request).await;
        made.push(clock.elapsed());
        let state = running(&AgentClient::new(sandbox.agent().clone())).await;
        let since = state.containers[0].running_since.unwrap();
        began.push(Duration::try_from(since.duration_since(at)).unwrap());
        requests.push(request);
        sandboxes.push(sandbox);
    }
    made.sort();
    began.sort();
    let pss: u64 = sandboxes.iter().filter_map(|sandbox| sandbox.pid()).map(pss_kib).sum();
    let clock = Instant::now();
    for request in &requests {
        bench.destroy(request).await;
    }
    let (middle, last) = (requests.len() / 2, requests.len() - 1);
    println!("agent ready: median {:?}, longest {:?}", made[middle], made[last]);
    println!("process runs: median {:?}, longest {:?}", began[middle], began[last]);
    println!("memory of an agent (PSS): {} KiB", pss / AGENTS);
    println!("destroyed: {:?} each", clock.elapsed() / u32::try_from(AGENTS).unwrap());
    for controller in ["memory", "cpu", "cpuacct", "pids", ""] {
        let root = Path::new("/sys/fs/cgroup").join(controller);
        let _ = std::fs::remove_dir(root.join(cgroup_root.trim_start_matches('/')));
    }
    std::fs::remove_dir_all(dir).unwrap();
}
