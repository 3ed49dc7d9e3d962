//! A server of NFS, version 4: Debian's nfs-ganesha in a network namespace of the test's own, which Pods reach through the host.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::program::{Program, run};
use crate::{repository, seconds, unique, wait_until};

/// The server, until it is dropped.
#[derive(Debug)]
pub struct NfsServer {
    dir: TempDir,
    netns: String,
    pub address: Ipv4Addr,
    program: Option<Program>,
}

impl NfsServer {
    /// Serves an empty directory as `/export`; `None`, and says so, where the program cannot be had.
    pub fn start() -> Option<Self> {
        let packages =
            run(Command::new(repository().join("scripts/packages.sh")).args(["nfs-ganesha", "nfs-ganesha-vfs"]));
        if packages.code != 0 {
            eprintln!("SKIPPED: needs Debian's nfs-ganesha, which cannot be installed: {}", packages.stderr);
            return None;
        }
        let [high, low]: [u8; 2] = rand::random();
        let (host, address) =
            (Ipv4Addr::new(10, 215, high, low & 0xfc | 1), Ipv4Addr::new(10, 215, high, low & 0xfc | 2));
        let netns = unique("nfs");
        let near = format!("nfs{high:02x}{low:02x}");
        for line in [
            format!("netns add {netns}"),
            format!("link add {near} type veth peer name eth0 netns {netns}"),
            format!("address add {host}/30 dev {near}"),
            format!("link set {near} up"),
            format!("-n {netns} address add {address}/30 dev eth0"),
            format!("-n {netns} link set eth0 up"),
            format!("-n {netns} link set lo up"),
            format!("-n {netns} route add default via {host}"),
        ] {
            run(Command::new("ip").args(line.split(' '))).ok();
        }
        let dir = tempfile::tempdir().expect("a temporary folder");
        for name in ["export", "recovery"] {
            std::fs::create_dir(dir.path().join(name)).expect("a fresh folder is writable");
        }
        let mut server = Self { dir, netns, address, program: None };
        server.launch();
        Some(server)
    }

    fn launch(&mut self) {
        let place = |name: &str| self.dir.path().join(name).display().to_string();
        let text = format!(
            "NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = 2049; Enable_NLM = false; Enable_RQUOTA = false; }}\n\
             NFSV4 {{ Graceless = true; Only_Numeric_Owners = true; RecoveryRoot = \"{}\"; }}\n\
             EXPORT {{ Export_Id = 1; Path = \"{}\"; Pseudo = \"/export\"; Access_Type = RW; Squash = No_Root_Squash; \
             SecType = sys; FSAL {{ Name = VFS; }} }}\n",
            place("recovery"),
            place("export")
        );
        std::fs::write(place("conf"), text).expect("a fresh folder is writable");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.netns, "ganesha.nfsd", "-F", "-f", &place("conf")]);
        command.args(["-L", &place("log"), "-p", &place("pid")]);
        self.program = Some(Program::start(&mut command, Path::new(&place("out"))));
        let address = (self.address, 2049).into();
        wait_until("the server of NFS listens", seconds(30), || {
            std::net::TcpStream::connect_timeout(&address, seconds(1)).map_err(|error| error.to_string())
        });
    }

    /// What it serves, on this host.
    pub fn export(&self) -> PathBuf {
        self.dir.path().join("export")
    }

    /// Ends the program, as if its host had lost it.
    pub fn end(&mut self) {
        self.program = None;
    }

    /// How many connections it has.
    pub fn connections(&self) -> usize {
        let found =
            run(Command::new("ip").args(["netns", "exec", &self.netns, "cat", "/proc/net/tcp", "/proc/net/tcp6"])).ok();
        // 0801 is its port, and 01 an established connection.
        found.lines().filter(|line| line.contains(":0801 ") && line.contains(" 01 ")).count()
    }
}

impl Drop for NfsServer {
    fn drop(&mut self) {
        self.end();
        let _ = Command::new("ip").args(["netns", "del", &self.netns]).status();
    }
}
