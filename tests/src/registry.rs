//! Debian's docker-registry as a fixture, with the demo image in it, with or without a password.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::tokens::{ISSUER, SERVICE, Tokens};
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
        let registry = Self::start(false, |_| String::new());
        registry.push(&demo_layout(), "joey/hello:1");
        registry
    }

    /// The same behind [`USER`] and [`PASSWORD`].
    pub fn with_password() -> Self {
        let registry = Self::start(true, |dir| {
            let file = dir.join("htpasswd");
            std::fs::write(&file, HTPASSWD).expect("a fresh folder is writable");
            format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", file.display())
        });
        registry.push(&demo_layout(), "joey/hello:1");
        registry
    }

    /// The same with tokens of a service, which knows [`USER`] and [`PASSWORD`]; also as `public/hello:1`, which needs neither.
    pub fn with_tokens(tokens: &Tokens) -> Self {
        let registry = Self::start(true, |dir| {
            let file = dir.join("tokens.pem");
            std::fs::write(&file, &tokens.certificate).expect("a fresh folder is writable");
            format!(
                "auth: {{token: {{realm: \"{}\", service: {SERVICE}, issuer: {ISSUER}, rootcertbundle: {}}}}}\n",
                tokens.realm(),
                file.display()
            )
        });
        registry.push(&demo_layout(), "joey/hello:1");
        registry.push(&demo_layout(), "public/hello:1");
        registry
    }

    fn start(guarded: bool, auth: impl FnOnce(&Path) -> String) -> Self {
        let dir = TempDir::with_prefix("joey-registry-").expect("a temporary folder");
        let address = free_address();
        let auth = auth(dir.path());
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
        self.push_as(layout, name, "oci");
    }

    /// The same in a format of skopeo's: `oci`, or `v2s2` for Docker's.
    pub fn push_as(&self, layout: &str, name: &str, format: &str) {
        let mut command = Command::new("skopeo");
        command.args(["copy", "-q", "--dest-tls-verify=false", "--format", format]);
        if self.guarded {
            command.arg(format!("--dest-creds={USER}:{PASSWORD}"));
        }
        run(command.arg(format!("oci:{layout}")).arg(format!("docker://{}", self.image(name)))).ok();
    }

    /// Puts a manifest or an index here as `REPOSITORY:TAG`.
    pub fn put_manifest(&self, name: &str, kind: &str, bytes: &[u8]) {
        let (repository, tag) = name.split_once(':').expect("the name has a tag");
        let answer = self.request("PUT", &format!("/v2/{repository}/manifests/{tag}"), kind, bytes);
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    }

    /// The manifest or index that a tag names, as it is.
    pub fn manifest(&self, name: &str, kind: &str) -> String {
        let (repository, tag) = name.split_once(':').expect("the name has a tag");
        let answer = self.request("GET", &format!("/v2/{repository}/manifests/{tag}"), kind, b"");
        answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).expect("an answer has a body")
    }

    fn request(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).expect("the registry listens");
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nAccept: {kind}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).expect("the registry reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("the registry answers");
        answer
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
