//! The command line as it is written. What the values mean is checked elsewhere; each flag is declared once, here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use joey_pool::PoolClient;

use crate::output::Format;

mod diagnosis;
mod guest;

pub use diagnosis::{Core, Diagnose, Tcpdump};
pub use guest::{Guest, GuestBuild, GuestUpgrade};

/// Elastic container instances and serverless Kubernetes on one machine.
#[derive(Debug, Parser)]
#[command(name = "joey", version, help_template = HELP, after_help = EXAMPLES)]
pub struct Arguments {
    /// Where everything is kept
    #[arg(long, global = true, value_name = "D", default_value = "/var/lib/joey", env = "JOEY_DATA_DIR")]
    pub data_dir: PathBuf,
    #[command(subcommand)]
    pub command: Command,
}

/// The commands by what they are for; a test holds that each is named.
const HELP: &str = "\
{about}

{usage-heading} {usage}

Run the platform:
  up          Run everything on this machine: API server, scheduler, virtual node, instances
  down        End everything that runs; Pods come back with the next joey up
  vnode       Join a Kubernetes cluster as a virtual node

Instances:
  run         Start an instance; returns when it runs
  ps          List instances
  describe    Show everything about an instance
  logs        Show a container's log
  exec        Run a command in a container
  attach      Join a container's main process
  cp          Copy files out of a container and into it
  port-forward Lead ports of this machine to ports of an instance
  debug       Look at a running instance from a further container
  diagnose    Get core dumps and captures of packets from an instance
  top         Show what instances use
  events      Show what happened to an instance
  restart     Restart an instance's containers; returns when they run again
  rm          End instances and remove them

Images:
  image       List, pull, import and remove images of this host
  guest       Make what virtual machines boot, have it taken up, list and remove it

Hosts and clusters:
  host        List the hosts of the pool

Other:
  bench       Measure how fast Pods start and what each costs
  version     Show the version, and what executes virtual machines
  completion  Write a shell's completion script
  help        Explain a command

Options:
{options}{after-help}";

const EXAMPLES: &str = "\
Examples:
  joey up                                  run the platform; kubectl uses /var/lib/joey/kubeconfig
  joey run nginx --name web                start an instance and say where it answers
  joey run nginx --bandwidth 5M --cpu 500m another one, with limits
  joey logs -f web                         follow what it says
  joey exec -it web -- sh                  look inside
  joey rm web                              end it
  joey down                                end everything

Exit codes: 0 done, 1 failed, 2 wrong usage; exec, attach, debug and run --rm pass on the code of what they ran.";

impl Arguments {
    /// The client of the service that this data directory belongs to.
    pub fn service(&self) -> PoolClient {
        PoolClient::unix(self.data_dir.join("joey.sock"))
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run everything on this machine: API server, scheduler, virtual node, instances
    Up(Box<Up>),
    /// End everything that runs; Pods come back with the next joey up
    Down(Down),
    /// Join a Kubernetes cluster as a virtual node
    Vnode(Box<Vnode>),
    /// Start an instance; returns when it runs
    Run(Box<Run>),
    /// List instances
    Ps(Output),
    /// Show everything about an instance
    Describe(Shown),
    /// Show a container's log
    Logs(Logs),
    /// Run a command in a container
    Exec(Exec),
    /// Join a container's main process: see what it says, pass on input
    Attach(Attach),
    /// Copy files out of a container and into it
    Cp(Cp),
    /// Lead ports of this machine to ports of an instance
    PortForward(PortForward),
    /// Look at a running instance from a further container
    Debug(Debug),
    /// Get core dumps and captures of packets from an instance
    #[command(subcommand)]
    Diagnose(Diagnose),
    /// Show what instances use
    Top(Top),
    /// Show what happened to an instance
    Events(Shown),
    /// Restart an instance's containers; returns when they run again
    Restart(Anew),
    /// End instances and remove them
    Rm(Rm),
    /// Images on this host
    #[command(subcommand)]
    Image(Image),
    /// What virtual machines boot
    #[command(subcommand)]
    Guest(Guest),
    /// Hosts of the pool
    #[command(subcommand)]
    Host(Host),
    /// Measure this installation
    #[command(subcommand)]
    Bench(Bench),
    /// Show the version, and what executes virtual machines
    Version(Output),
    /// Write a shell's completion script
    Completion {
        /// The shell; for bash: source <(joey completion bash)
        shell: clap_complete::Shell,
    },
}

/// What a host of instances is told; shared by `up` and `vnode`.
#[derive(Debug, Args)]
pub struct HostFlags {
    /// Addresses of instances
    #[arg(long, value_name = "CIDR", default_value = "10.244.0.0/16")]
    pub pod_range: String,
    /// Network interfaces kept ready
    #[arg(long, value_name = "COUNT", default_value_t = 16)]
    pub prepared: usize,
    /// Registry spoken to in plain http, as HOST[:PORT]; repeat for more (those on loopback always are)
    #[arg(long, value_name = "REGISTRY")]
    pub plain_http: Vec<String>,
    /// Docker configuration file with credentials for registries
    #[arg(long, value_name = "FILE")]
    pub docker_config: Option<PathBuf>,
    /// Largest layer accepted, unpacked
    #[arg(long, value_name = "AMOUNT", default_value = "16Gi")]
    pub max_layer_bytes: String,
    /// Configuration file (YAML or JSON): sizes of instances by name, guards of calls to others, sinks of logs
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Take over kernel.core_pattern, so that instances may have core dumps of at most this size each, such as 1Gi; crashes of
    /// all else are passed on to what was there before, which joey down restores
    #[arg(long, value_name = "SIZE")]
    pub core_dumps: Option<String>,
    /// The program joey-agent; looked for beside joey when not given
    #[arg(long, value_name = "FILE")]
    pub agent: Option<PathBuf>,
    /// What to log to standard error: error, warn, info, debug, or by module
    #[arg(long, value_name = "LEVEL", default_value = "warn", env = "JOEY_LOG")]
    pub log: String,
    /// Ends the process at a durable step; for tests of recovery
    #[arg(long, value_name = "STEP", hide = true)]
    pub crash_at: Option<String>,
}

#[derive(Debug, Args)]
pub struct Up {
    /// Where the Kubernetes API listens; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:6443")]
    pub listen: String,
    /// Name of the virtual node
    #[arg(long, value_name = "NAME", default_value = "joey")]
    pub node_name: String,
    #[command(flatten)]
    pub host: HostFlags,
}

#[derive(Debug, Args)]
pub struct Down {
    /// Remove images, state and keys as well
    #[arg(long)]
    pub purge: bool,
}

#[derive(Debug, Args)]
pub struct Vnode {
    /// How to reach the cluster
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: PathBuf,
    /// Name of the virtual node; joey- and this machine's name when not given
    #[arg(long, value_name = "NAME")]
    pub node_name: Option<String>,
    /// Address the cluster's API server reaches this node at; the one that faces the cluster when not given
    #[arg(long, value_name = "ADDRESS")]
    pub address: Option<std::net::IpAddr>,
    /// Socket of a running joey whose pool is used, instead of a host in this process
    #[arg(long, value_name = "SOCKET")]
    pub pool: Option<PathBuf>,
    /// Do not taint the node
    #[arg(long)]
    pub no_taint: bool,
    #[command(flatten)]
    pub host: HostFlags,
}

#[derive(Debug, Args)]
pub struct Output {
    /// How to print
    #[arg(short, long, value_enum)]
    pub output: Option<Format>,
}

impl Output {
    pub fn format(&self) -> Format {
        self.output.unwrap_or_default()
    }
}

#[derive(Debug, Args)]
pub struct Named {
    /// Name or id of the instance
    pub name: String,
}

#[derive(Debug, Args)]
pub struct Shown {
    #[command(flatten)]
    pub instance: Named,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct Run {
    /// Image to run
    pub image: String,
    /// Name; made from the image's when not given
    #[arg(long)]
    pub name: Option<String>,
    /// Sandbox class
    #[arg(long, default_value = "runc")]
    pub class: String,
    /// CPU limit, such as 500m or 2
    #[arg(long, value_name = "AMOUNT")]
    pub cpu: Option<String>,
    /// Memory limit, such as 64Mi
    #[arg(long, value_name = "AMOUNT")]
    pub memory: Option<String>,
    /// Bandwidth cap each way in bits per second, such as 5M
    #[arg(long, value_name = "AMOUNT")]
    pub bandwidth: Option<String>,
    /// Packet cap each way in packets a second, such as 10k
    #[arg(long, value_name = "AMOUNT")]
    pub packets: Option<String>,
    /// Size: a name of the configuration or CPU-MEMORY, such as 2-4Gi; repeat for others to take where one cannot be had
    #[arg(long, value_name = "SPEC")]
    pub spec: Vec<String>,
    /// Most processes
    #[arg(long, value_name = "COUNT")]
    pub pids: Option<u64>,
    /// Cap of disk reads and of writes, in bytes a second each, such as 50M
    #[arg(long, value_name = "AMOUNT")]
    pub disk_bytes: Option<String>,
    /// The same in operations a second
    #[arg(long, value_name = "AMOUNT")]
    pub disk_operations: Option<String>,
    /// Most that it may leave on the disk, such as 1Gi: more does not fit
    #[arg(long, value_name = "AMOUNT")]
    pub disk: Option<String>,
    /// Variable; repeat for more
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Directory to start in, instead of the image's
    #[arg(short, long, value_name = "PATH")]
    pub workdir: Option<String>,
    /// Pass on standard input to it, and show what it says until it ends; it is started once then, unless --restart says more
    #[arg(short = 'i', long, conflicts_with = "detach")]
    pub stdin: bool,
    /// Give it a terminal, and join it
    #[arg(short, long, conflicts_with = "detach")]
    pub tty: bool,
    /// Where cores of processes that crash are written inside, such as /data/core-%e-%p (core(5))
    #[arg(long, value_name = "PATTERN")]
    pub core_pattern: Option<String>,
    /// Program instead of the image's entrypoint. As in a Pod, $(NAME) stands for a variable, here and in arguments, and $$ for $
    #[arg(long, value_name = "PROGRAM")]
    pub command: Option<String>,
    /// What to do when a container ends
    #[arg(long, value_enum, default_value = "always", default_value_ifs([("stdin", "true", "never"), ("tty", "true", "never")]))]
    pub restart: Restart,
    /// When to pull the image
    #[arg(long, value_enum, default_value = "missing")]
    pub pull: Pull,
    /// Wait for the end, show the log meanwhile, then remove it; exits with its code
    #[arg(long)]
    pub rm: bool,
    /// Return when the instance is accepted, before it runs
    #[arg(short, long, conflicts_with = "rm")]
    pub detach: bool,
    /// Give it an address reachable from outside: not there yet
    #[arg(long, hide = true)]
    pub public: bool,
    #[command(flatten)]
    pub output: Output,
    /// Arguments instead of the image's
    #[arg(last = true)]
    pub args: Vec<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Restart {
    Always,
    OnFailure,
    Never,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Pull {
    Always,
    Missing,
    Never,
}

#[derive(Debug, Args)]
pub struct Anew {
    /// Name or id of the instance
    pub name: String,
    /// Do not wait until they run again
    #[arg(long)]
    pub no_wait: bool,
}

#[derive(Debug, Args)]
pub struct Rm {
    /// Names or ids
    #[arg(required = true)]
    pub names: Vec<String>,
    /// Kill at once, also the instance of a Pod
    #[arg(short, long, conflicts_with = "grace")]
    pub force: bool,
    /// Seconds between SIGTERM and SIGKILL
    #[arg(long, value_name = "SECONDS")]
    pub grace: Option<u32>,
}

#[derive(Debug, Args)]
pub struct Logs {
    /// Name or id of the instance
    pub name: String,
    /// Container; the first when not given
    #[arg(short, long)]
    pub container: Option<String>,
    /// Go on with what is written from now on
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last so many lines
    #[arg(long, value_name = "LINES")]
    pub tail: Option<u64>,
    /// Only what is younger than this, such as 10m, or than a time (RFC 3339)
    #[arg(long, value_name = "AGE|TIME")]
    pub since: Option<String>,
    /// Begin each line with its time
    #[arg(long)]
    pub timestamps: bool,
    /// The run before the present one
    #[arg(short, long)]
    pub previous: bool,
    /// Stop after so many bytes
    #[arg(long, value_name = "BYTES")]
    pub limit_bytes: Option<u64>,
    /// Of every container; each line begins with its container
    #[arg(long, conflicts_with = "container")]
    pub all_containers: bool,
}

#[derive(Debug, Args)]
pub struct Exec {
    /// Name or id of the instance
    pub name: String,
    /// Container; the first when not given
    #[arg(short, long)]
    pub container: Option<String>,
    /// Pass on standard input
    #[arg(short = 'i', long)]
    pub stdin: bool,
    /// Give it a terminal
    #[arg(short = 't', long)]
    pub tty: bool,
    /// Program and arguments
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Attach {
    /// Name or id of the instance
    pub name: String,
    /// Container; the first when not given
    #[arg(short, long)]
    pub container: Option<String>,
    /// Pass on standard input; the container must have been made to read it
    #[arg(short = 'i', long)]
    pub stdin: bool,
    /// Use its terminal; the container must have been made with one
    #[arg(short = 't', long)]
    pub tty: bool,
}

#[derive(Debug, Args)]
pub struct Cp {
    /// What to copy: a path here, or NAME:PATH in an instance
    pub from: String,
    /// Where to: NAME:PATH or a path here; into it where it is a directory
    pub to: String,
    /// Container; the first when not given
    #[arg(short, long)]
    pub container: Option<String>,
}

#[derive(Debug, Args)]
pub struct PortForward {
    /// Name or id of the instance
    pub name: String,
    /// Ports here and in the instance; one alone is both
    #[arg(required = true, value_name = "LOCAL:REMOTE")]
    pub ports: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Debug {
    /// Name or id of the instance
    pub name: String,
    /// Image with the tools to look with
    #[arg(long)]
    pub image: String,
    /// Name of the further container; made when not given
    #[arg(short, long)]
    pub container: Option<String>,
    /// The container whose processes it sees
    #[arg(long, value_name = "CONTAINER")]
    pub target: Option<String>,
    /// Pass on standard input
    #[arg(short = 'i', long)]
    pub stdin: bool,
    /// Give it a terminal
    #[arg(short = 't', long)]
    pub tty: bool,
    /// Program and arguments instead of the image's
    #[arg(last = true)]
    pub args: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Top {
    /// Name or id of an instance; all that run when not given
    pub name: Option<String>,
    /// Each container by itself
    #[arg(long)]
    pub containers: bool,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Subcommand)]
pub enum Image {
    /// List images
    Ls(Output),
    /// Pull an image
    Pull {
        /// Image, such as nginx:1.29 or registry.example/team/app@sha256:…
        image: String,
        #[command(flatten)]
        output: Output,
    },
    /// Take in an archive: docker save or an OCI layout, as tar
    Import {
        /// The archive
        file: PathBuf,
        /// The name it gets
        image: String,
        #[command(flatten)]
        output: Output,
    },
    /// Remove images
    Rm {
        /// Names or ids
        #[arg(required = true)]
        images: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum Host {
    /// List hosts
    Ls(Output),
}

#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Start Pods through the Kubernetes API and tell how long it took and what it cost; they are removed afterwards
    Start(BenchStart),
    /// Start Pods that are probed every second and tell what that costs the platform; they are removed afterwards
    Probes(BenchProbes),
}

/// How Pods are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ProbeKind {
    Http,
    Tcp,
    Exec,
    None,
}

#[derive(Debug, Args)]
pub struct BenchProbes {
    /// Pods, each with a readiness and a liveness probe
    #[arg(long, value_name = "COUNT", default_value_t = 200)]
    pub count: u32,
    /// How long they are watched
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub seconds: u32,
    /// How they are asked; http and tcp at port 80
    #[arg(long, value_enum, default_value_t = ProbeKind::Http)]
    pub probe: ProbeKind,
    /// Sandbox class
    #[arg(long, default_value = "runc")]
    pub class: String,
    /// Image to start; pulled beforehand. The default is the one `make run` provides
    #[arg(long, default_value = "127.0.0.1:5055/joey/hello:1")]
    pub image: String,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct BenchStart {
    /// Pods to start
    #[arg(long, value_name = "COUNT", default_value_t = 100)]
    pub count: u32,
    /// Pods on their way at a time, each until its process runs
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    pub parallel: u32,
    /// Rest before each Pod but the first
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub pause: u32,
    /// How long all have run when their memory is measured
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub settle: u32,
    /// Port that the Pods are asked on over HTTP until they answer
    #[arg(long, value_name = "PORT")]
    pub http: Option<u16>,
    /// Sandbox class
    #[arg(long, default_value = "runc")]
    pub class: String,
    /// Image to start; pulled beforehand. The default is the one `make run` provides
    #[arg(long, default_value = "127.0.0.1:5055/joey/hello:1")]
    pub image: String,
    #[command(flatten)]
    pub output: Output,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn help_names_every_command() {
        let command = super::Arguments::command();
        for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
            let line = format!("\n  {:<12}", format!("{} ", verb.get_name()));
            assert!(super::HELP.contains(&line), "{} is not in the help", verb.get_name());
        }
    }
}
