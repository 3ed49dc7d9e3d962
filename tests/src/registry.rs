//! Debian's docker-registry as a fixture, with the demo image in it, with or without a password.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use crate::{Program, repository, run, seconds, wait_until};

/// A registry on a loopback port of its own. Dropped, it ends and its data goes.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
    guarded: bool,
    dir: TempDir,
    _program: Program,
}

/// The user that a registry with a password knows.
pub const USER: &str = "kanga";
/// That user's password.
pub const PASSWORD: &str = "honey";
/// The line of [`USER`] and [`PASSWORD`] in an htpasswd file (bcrypt).
const HTPASSWD: &str = "kanga:$2y$05$iQ5JbCZSxdnFZFZ8dlnm5eO3f6HEy.LS9RPRb3TytE9.WMOGZSZPG";

impl Registry {
    /// A registry open to all, holding the demo image as `joey/hello:1`.
    pub fn with_demo_image() -> Self {
        let registry = Self::start(false);
        registry.push(&demo_layout(), "joey/hello:1");
        registry
    }

    /// The same behind [`USER`] and [`PASSWORD`].
    pub fn with_password() -> Self {
        let registry = Self::start(true);
        registry.push(&demo_layout(), "joey/hello:1");
        registry
    }

    fn start(guarded: bool) -> Self {
        let dir = TempDir::with_prefix("joey-registry-").expect("a temporary folder");
        let address = free_address();
        let mut auth = String::new();
        if guarded {
            let file = dir.path().join("htpasswd");
            std::fs::write(&file, HTPASSWD).expect("a fresh folder is writable");
            auth = format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", file.display());
        }
        let config = dir.path().join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: warn, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n{auth}",
            dir.path().join("data").display()
        );
        std::fs::write(&config, text).expect("a fresh folder is writable");
        let program = repository().join(".tools/docker-registry/root/usr/bin/docker-registry");
        assert!(program.exists(), "{} is missing; `make test` fetches it", program.display());
        let log = dir.path().join("log");
        let program = Program::start(Command::new(program).arg("serve").arg(config), &log);
        wait_until("registry answers", seconds(20), || {
            TcpStream::connect(address).map(drop).map_err(|error| format!("{error}: {}", program.output()))
        });
        Self { address, guarded, dir, _program: program }
    }

    /// `127.0.0.1:PORT`
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// The complete reference of a repository here.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// The demo image's reference.
    pub fn demo(&self) -> String {
        self.image("joey/hello:1")
    }

    /// Copies an image of an OCI layout (`DIR:TAG`) to `name` here.
    pub fn push(&self, layout: &str, name: &str) {
        let mut command = Command::new("skopeo");
        command.args(["copy", "-q", "--dest-tls-verify=false"]);
        if self.guarded {
            command.arg(format!("--dest-creds={USER}:{PASSWORD}"));
        }
        run(command.arg(format!("oci:{layout}")).arg(format!("docker://{}", self.image(name)))).ok();
    }

    /// The digest of the manifest that `name` stands for.
    pub fn digest(&self, name: &str) -> String {
        let mut command = Command::new("skopeo");
        command.args(["inspect", "--tls-verify=false", "--format", "{{.Digest}}"]);
        if self.guarded {
            command.arg(format!("--creds={USER}:{PASSWORD}"));
        }
        run(command.arg(format!("docker://{}", self.image(name)))).ok().trim().to_owned()
    }

    /// A folder that lives as long as the registry.
    pub fn dir(&self) -> PathBuf {
        self.dir.path().to_owned()
    }
}

/// The OCI layout that demo/build.sh makes, with its tag.
pub fn demo_layout() -> String {
    let layout = repository().join(".run/demo");
    assert!(layout.join("index.json").exists(), "{} is missing; `make test` builds it", layout.display());
    format!("{}:hello", layout.display())
}

/// A loopback address whose port is free at this moment.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    listener.local_addr().expect("a bound listener has an address")
}
