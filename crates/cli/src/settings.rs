//! Settings of the roles, checked: what the flags mean. All bad values are told together.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;
use joey_model::{id, quantity};

use crate::args::{HostFlags, Up, Vnode};
use crate::configuration::Configuration;
use crate::failure::Failure;

/// The data directory of a system-wide joey: its names carry no suffix.
const USUAL: &str = "/var/lib/joey";
/// Smallest limit of core dumps, in bytes: less holds no program's stacks.
const LEAST_CORE: u64 = 1 << 20;

/// Where things are. Names outside the directory are derived from it, so that several can live side by side.
#[derive(Debug, Clone)]
pub struct Place {
    pub data_dir: PathBuf,
    /// `joey`, or `joey-` and a digest of the directory.
    pub name: String,
}

impl Place {
    /// The place a data directory stands for; the directory need not exist.
    pub fn of(data_dir: &Path) -> Result<Self, Failure> {
        let data_dir = std::path::absolute(data_dir)?;
        // FNV-1a: stable over releases.
        let digest = data_dir.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |digest, &byte| {
            (digest ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let name = match data_dir == Path::new(USUAL) {
            true => "joey".to_owned(),
            false => format!("joey-{:08x}", (digest >> 32) ^ (digest & 0xffff_ffff)),
        };
        Ok(Self { data_dir, name })
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.data_dir.join(name)
    }

    /// Below every controller's root.
    pub fn cgroup_root(&self) -> String {
        format!("/{}", self.name)
    }

    /// What holds without a configuration file. Logs of instances that are gone stay on the instances' own disk: they are moved.
    fn configuration(&self) -> Configuration {
        Configuration::usual(self.left_logs())
    }

    fn left_logs(&self) -> PathBuf {
        self.file("instances").join("left-logs")
    }

    pub fn run_dir(&self) -> PathBuf {
        Path::new("/run/joey").join(&self.name)
    }
}

#[derive(Debug, Clone)]
pub struct HostSettings {
    pub place: Place,
    /// Name of the host in statuses and of the machine in nodes.
    pub host_name: String,
    pub pod_range: Ipv4Net,
    pub prepared: usize,
    pub plain_http: Vec<String>,
    pub docker_config: Option<PathBuf>,
    pub max_layer_bytes: u64,
    pub agent: PathBuf,
    pub configuration: Configuration,
    /// Most bytes of a core dump of an instance; `None`: the host keeps its crashes to itself.
    pub core_dumps: Option<u64>,
}

#[derive(Debug, Clone)]
pub struct UpSettings {
    pub host: HostSettings,
    pub listen: SocketAddr,
    pub node_name: String,
}

#[derive(Debug, Clone)]
pub struct VnodeSettings {
    pub host: HostSettings,
    pub kubeconfig: PathBuf,
    pub node_name: String,
    pub address: Option<std::net::IpAddr>,
    pub pool: Option<PathBuf>,
    pub taint: bool,
}

/// Collects what is wrong.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn take<T, E: std::fmt::Display>(&mut self, flag: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.0.push(format!("{flag}: {error}"))).ok()
    }

    fn end<T>(self, settings: Option<T>) -> Result<T, Failure> {
        match settings {
            Some(settings) if self.0.is_empty() => Ok(settings),
            _ => Err(Failure::usage(self.0.join("\nerror: "))),
        }
    }
}

impl Up {
    pub fn validate(&self, data_dir: &Path) -> Result<UpSettings, Failure> {
        let place = Place::of(data_dir)?;
        let mut faults = Faults::default();
        let listen: Option<SocketAddr> = faults.take(
            "--listen",
            self.listen.parse().map_err(|_| format!("\"{}\" is not ADDRESS:PORT, such as 127.0.0.1:6443", self.listen)),
        );
        faults.take("--node-name", id::check_subdomain("node name", &self.node_name));
        let host = host(&self.host, place, &mut faults);
        let settings =
            host.zip(listen).map(|(host, listen)| UpSettings { host, listen, node_name: self.node_name.clone() });
        faults.end(settings)
    }
}

impl Vnode {
    pub fn validate(&self, data_dir: &Path) -> Result<VnodeSettings, Failure> {
        let place = Place::of(data_dir)?;
        let mut faults = Faults::default();
        let node_name = self.node_name.clone().unwrap_or_else(|| format!("joey-{}", machine_name()));
        faults.take("--node-name", id::check_subdomain("node name", &node_name));
        if !self.kubeconfig.is_file() {
            faults.0.push(format!("--kubeconfig: there is no file {}", self.kubeconfig.display()));
        }
        let host = host(&self.host, place, &mut faults);
        faults.end(host.map(|host| VnodeSettings {
            host,
            kubeconfig: self.kubeconfig.clone(),
            node_name,
            address: self.address,
            pool: self.pool.clone(),
            taint: !self.no_taint,
        }))
    }
}

fn host(flags: &HostFlags, place: Place, faults: &mut Faults) -> Option<HostSettings> {
    let range = flags
        .pod_range
        .parse::<Ipv4Net>()
        .map_err(|_| format!("\"{}\" is not a range of IPv4 addresses, such as 10.244.0.0/16", flags.pod_range));
    let range = faults.take("--pod-range", range);
    let layer = faults.take("--max-layer-bytes", quantity::parse_units(&flags.max_layer_bytes));
    if let Some(file) = flags.docker_config.as_ref().filter(|file| !file.is_file()) {
        faults.0.push(format!("--docker-config: there is no file {}", file.display()));
    }
    let agent = faults.take("--agent", agent(flags.agent.as_deref()));
    let configuration = match flags.config.as_deref() {
        Some(file) => faults.take("--config", place.configuration().read(file)),
        None => Some(place.configuration()),
    };
    let core_dumps = flags.core_dumps.as_deref().and_then(|amount| {
        let bytes = quantity::parse_units(amount).map_err(|error| error.to_string());
        let enough =
            |bytes: u64| if bytes < LEAST_CORE { Err("it must be at least 1Mi".to_owned()) } else { Ok(bytes) };
        faults.take("--core-dumps", bytes.and_then(enough))
    });
    Some(HostSettings {
        place,
        host_name: machine_name(),
        pod_range: range?,
        prepared: flags.prepared,
        plain_http: flags.plain_http.clone(),
        docker_config: flags.docker_config.clone(),
        max_layer_bytes: layer?,
        agent: agent?,
        configuration: configuration?,
        core_dumps,
    })
}

/// The agent's program: the one named, or the one beside this program.
pub fn agent(named: Option<&Path>) -> Result<PathBuf, String> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => std::env::current_exe().map_err(|error| error.to_string())?.with_file_name("joey-agent"),
    };
    match path.is_file() {
        true => Ok(path),
        false => Err(format!("there is no program {}; build it with make build", path.display())),
    }
}

/// This machine's name as a DNS label.
pub fn machine_name() -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    let name = name.split('.').next().unwrap_or_default().to_ascii_lowercase();
    match id::check_label("machine name", &name) {
        Ok(()) => name,
        Err(_) => "host".to_owned(),
    }
}

/// What `down` needs of a host: it removes what is there, so the range and the agent do not matter. The range is one that no
/// host routes (RFC 1112, class E), so that it never meets the range of another joey.
pub fn for_down(data_dir: &Path) -> Result<HostSettings, Failure> {
    let place = Place::of(data_dir)?;
    Ok(HostSettings {
        // Nothing is given up only because all else goes.
        configuration: Configuration { logs: joey_hidecar::Settings::new(place.left_logs()), ..place.configuration() },
        place,
        host_name: machine_name(),
        pod_range: Ipv4Net::new_assert(std::net::Ipv4Addr::new(240, 0, 0, 0), 29),
        prepared: 0,
        plain_http: Vec::new(),
        docker_config: None,
        max_layer_bytes: 1,
        agent: PathBuf::from("joey-agent"),
        core_dumps: None,
    })
}
