//! The command line as it is written. What the values mean is checked elsewhere; each flag is declared once, here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use joey_pool::PoolClient;

use crate::output::Format;

/// Elastic container instances and serverless Kubernetes on one machine.
#[derive(Debug, Parser)]
#[command(name = "joey", version, after_help = EXAMPLES)]
pub struct Arguments {
    /// Where everything is kept
    #[arg(long, global = true, value_name = "D", default_value = "/var/lib/joey", env = "JOEY_DATA_DIR")]
    pub data_dir: PathBuf,
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  joey run nginx                           start an instance and say where it answers
  joey run --bandwidth 5M --cpu 500m nginx the same, with limits
  joey logs -f nginx                       follow what it says
  joey exec -it nginx -- sh                look inside
  joey rm nginx                            end it

Exit codes: 0 done, 1 failed, 2 wrong usage; exec passes on the code of its command.";

impl Arguments {
    /// The client of the service that this data directory belongs to.
    pub fn service(&self) -> PoolClient {
        PoolClient::unix(self.data_dir.join("joey.sock"))
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start an instance; returns when it runs
    Run(Run),
    /// List instances
    Ps(Output),
    /// Show everything about an instance
    Describe(Named),
    /// Show a container's log
    Logs(Logs),
    /// Run a command in a container
    Exec(Exec),
    /// Show what happened to an instance
    Events(Named),
    /// Restart an instance's containers
    Restart(Named),
    /// End instances and remove them
    Rm(Rm),
    /// Images on this host
    #[command(subcommand)]
    Image(Image),
    /// Hosts of the pool
    #[command(subcommand)]
    Host(Host),
    /// Show the version
    Version(Output),
    /// Write a shell's completion script
    Completion { shell: clap_complete::Shell },
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
    /// Variable; repeat for more
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Program instead of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    pub command: Option<String>,
    /// What to do when a container ends
    #[arg(long, value_enum, default_value = "always")]
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
    /// Give it an address reachable from outside
    #[arg(long)]
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
pub struct Rm {
    /// Names or ids
    #[arg(required = true)]
    pub names: Vec<String>,
    /// Kill at once
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

#[derive(Debug, Subcommand)]
pub enum Image {
    /// List images
    Ls(Output),
    /// Pull an image
    Pull { image: String },
    /// Take in an archive: docker save or an OCI layout, as tar
    Import {
        /// The archive
        file: PathBuf,
        /// The name it gets
        image: String,
    },
    /// Remove images
    Rm {
        #[arg(required = true)]
        images: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum Host {
    /// List hosts
    Ls(Output),
}
