//! Flags of `joey guest`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Output;

/// What virtual machines boot, for instances of class rund
#[derive(Debug, Subcommand)]
pub enum Guest {
    /// Make one of a kernel and the agent; what was made of the same is found again
    Build(GuestBuild),
    /// Make one as `build` does and have the instances that run take it up, one after another
    Upgrade(GuestUpgrade),
    /// List guests
    Ls(Output),
    /// Remove guests that are not the current one
    Rm {
        /// Their ids
        #[arg(required = true)]
        guests: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub struct GuestUpgrade {
    /// Only tell which instances would begin anew
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub build: GuestBuild,
}

#[derive(Debug, Args)]
pub struct GuestBuild {
    /// Debian package of a kernel for virtual machines; fetched with apt-get when neither this nor --kernel is given
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    pub package: Option<PathBuf>,
    /// A kernel of your own: bzImage or vmlinux
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The directory of its modules (lib/modules/RELEASE); all is taken to be built in when not given
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub modules: Option<PathBuf>,
    /// The program joey-agent; looked for beside joey when not given
    #[arg(long, value_name = "FILE")]
    pub agent: Option<PathBuf>,
    #[command(flatten)]
    pub output: Output,
}
