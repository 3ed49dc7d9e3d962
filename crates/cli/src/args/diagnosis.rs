//! Flags of `joey diagnose`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use joey_api::diagnosis::{Protocol, Range};

use super::{Named, Shown};

#[derive(Debug, Subcommand)]
pub enum Diagnose {
    /// Core dumps of processes that crash
    #[command(subcommand)]
    Core(Core),
    /// Capture packets into a file that Wireshark and tcpdump read
    #[command(after_help = CAPTURES)]
    Tcpdump(Box<Tcpdump>),
}

const CAPTURES: &str = "\
Examples:
  joey diagnose tcpdump web -w web.pcapng --port 80 --duration 30
  joey diagnose tcpdump web --protocol udp --dest-port 53 | tcpdump -nr -

It goes on until a limit is reached or Ctrl-C, and then says how many packets were lost.";

#[derive(Debug, Subcommand)]
pub enum Core {
    /// Keep the cores of processes that crash from now on
    Enable {
        #[command(flatten)]
        instance: Named,
        /// Write them inside the container instead, such as /data/core-%e-%p (core(5))
        #[arg(long)]
        pattern: Option<String>,
    },
    /// Throw cores away from now on; those that are kept stay
    Disable(Named),
    /// List cores that are kept
    Ls(Shown),
    /// Fetch a core that is kept
    Get {
        #[command(flatten)]
        instance: Named,
        /// Name of the core; the newest when not given
        core: Option<String>,
        /// File to write; one of the core's name here when not given, - for standard output
        #[arg(short, long, value_name = "FILE")]
        write: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub struct Tcpdump {
    #[command(flatten)]
    pub instance: Named,
    /// File to write, as pcapng; - for standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    pub write: PathBuf,
    /// Interface of the instance, such as eth0 or lo; all when not given
    #[arg(short, long)]
    pub interface: Option<String>,
    /// tcp, udp or icmp
    #[arg(short, long)]
    pub protocol: Option<Protocol>,
    /// From this address or range, such as 10.0.0.0/8
    #[arg(long, value_name = "ADDRESS")]
    pub source: Option<Range>,
    /// From this port
    #[arg(long, value_name = "PORT")]
    pub source_port: Option<u16>,
    /// To this address or range
    #[arg(long, value_name = "ADDRESS")]
    pub dest: Option<Range>,
    /// To this port
    #[arg(long, value_name = "PORT")]
    pub dest_port: Option<u16>,
    /// From or to this address or range
    #[arg(long, value_name = "ADDRESS")]
    pub host: Option<Range>,
    /// From or to this port
    #[arg(long)]
    pub port: Option<u16>,
    /// End after so many seconds
    #[arg(short, long, value_name = "SECONDS")]
    pub duration: Option<u32>,
    /// End after so many packets
    #[arg(short = 'n', long, value_name = "COUNT")]
    pub packets: Option<u64>,
    /// End before the file is larger
    #[arg(long, value_name = "AMOUNT", default_value = "1Gi")]
    pub size: String,
    /// Keep so many bytes of each packet; all when not given
    #[arg(short, long, value_name = "BYTES")]
    pub snap_length: Option<u32>,
}
