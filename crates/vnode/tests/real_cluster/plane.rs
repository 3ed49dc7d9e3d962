//! A real control plane on loopback: etcd, kube-apiserver, kube-controller-manager. Data and keys are in a folder of its own; all
//! of it ends when dropped. Knows nothing of the virtual node.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use serde_json::json;
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

/// Names the folder with kube-apiserver and kube-controller-manager, perhaps etcd.
const PROGRAMS: &str = "JOEY_KUBE_BIN";
const TOKEN: &str = "a-token-for-one-test";

pub struct Plane {
    dir: TempDir,
    programs: Vec<Child>,
}

/// How a program ended and what it wrote.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    listener.local_addr().expect("a listener has an address").port()
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.exists())
}

/// Asks until `condition` holds; fails the test with what it said last.
pub async fn eventually<F: Future<Output = Result<T, String>>, T>(
    what: &str,
    limit: Duration,
    condition: impl Fn() -> F,
) -> T {
    let end = Instant::now() + limit;
    loop {
        match condition().await {
            Ok(value) => return value,
            Err(last) if Instant::now() >= end => panic!("{what}: not within {limit:?}; last: {last}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

impl Plane {
    /// Starts one; `None`, and a loud word, when its programs are not there.
    pub async fn start() -> Option<Self> {
        let Some(bin) = std::env::var_os(PROGRAMS).map(PathBuf::from) else {
            eprintln!("SKIPPED: {PROGRAMS} does not name the folder of kube-apiserver and kube-controller-manager");
            return None;
        };
        let local = Some(bin.join("etcd")).filter(|file| file.exists());
        let Some(etcd) = local.or_else(|| on_path("etcd")) else {
            eprintln!("SKIPPED: etcd is neither in {} nor in PATH", bin.display());
            return None;
        };
        let mut plane = Self { dir: TempDir::with_prefix("joey-vnode-").expect("a folder"), programs: Vec::new() };
        plane.make_keys();
        let (store, peer, port) = (free_port(), free_port(), free_port());
        plane.run(
            &etcd,
            &[
                format!("--data-dir={}", plane.path("etcd")),
                format!("--listen-client-urls=http://127.0.0.1:{store}"),
                format!("--advertise-client-urls=http://127.0.0.1:{store}"),
                format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
                format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"),
                format!("--initial-cluster=default=http://127.0.0.1:{peer}"),
            ],
        );
        plane.run_apiserver(&bin, store, port);
        plane.write_kubeconfig(port);
        eventually("kube-apiserver is ready", Duration::from_secs(40), || async {
            let answer = plane.client().await.request_text(request("/readyz")).await;
            answer.map(drop).map_err(|error| format!("{error}\n{}", plane.last_words("kube-apiserver")))
        })
        .await;
        plane.run(
            &bin.join("kube-controller-manager"),
            &[
                format!("--kubeconfig={}", plane.kubeconfig()),
                format!("--service-account-private-key-file={}", plane.path("accounts.key")),
                format!("--root-ca-file={}", plane.path("serving/apiserver.crt")),
                "--leader-elect=false".to_owned(),
                "--secure-port=0".to_owned(),
            ],
        );
        Some(plane)
    }

    /// The end of a program's log.
    fn last_words(&self, program: &str) -> String {
        let log = std::fs::read_to_string(self.path(&format!("{program}.log"))).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }

    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    pub fn kubeconfig(&self) -> String {
        self.path("kubeconfig")
    }

    /// An authority for client certificates, the API server's own with which it comes to kubelets, the key of tokens.
    fn make_keys(&self) {
        let write = |name: &str, text: &str| std::fs::write(self.path(name), text).expect("the folder is writable");
        let authority_key = KeyPair::generate().expect("a key");
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "test-authority");
        let certificate = authority.self_signed(&authority_key).expect("a certificate");
        write("ca.crt", &certificate.pem());
        let issuer = Issuer::new(authority, authority_key);
        let key = KeyPair::generate().expect("a key");
        let mut caller = CertificateParams::default();
        caller.distinguished_name.push(DnType::CommonName, "kube-apiserver-kubelet-client");
        caller.distinguished_name.push(DnType::OrganizationName, "system:masters");
        caller.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        write("kubelet.crt", &caller.signed_by(&key, &issuer).expect("a certificate").pem());
        write("kubelet.key", &key.serialize_pem());
        let accounts = KeyPair::generate().expect("a key");
        write("accounts.key", &accounts.serialize_pem());
        write("accounts.pub", &accounts.public_key_pem());
        write("tokens.csv", &format!("{TOKEN},admin,admin,system:masters\nnobodys-token,nobody,nobody,nobodies\n"));
    }

    fn run(&mut self, program: &Path, arguments: &[String]) {
        let name = program.file_name().expect("a program has a name").to_string_lossy().into_owned();
        let log = std::fs::File::create(self.path(&format!("{name}.log"))).expect("the folder is writable");
        let second = log.try_clone().expect("a file can be shared");
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(second)
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("{name} cannot be started: {error}"));
        self.programs.push(child);
    }

    fn run_apiserver(&mut self, bin: &Path, store: u16, port: u16) {
        let arguments = [
            format!("--etcd-servers=http://127.0.0.1:{store}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={port}"),
            format!("--cert-dir={}", self.path("serving")),
            format!("--token-auth-file={}", self.path("tokens.csv")),
            "--authorization-mode=Node,RBAC".to_owned(),
            format!("--service-account-key-file={}", self.path("accounts.pub")),
            format!("--service-account-signing-key-file={}", self.path("accounts.key")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            format!("--client-ca-file={}", self.path("ca.crt")),
            format!("--kubelet-client-certificate={}", self.path("kubelet.crt")),
            format!("--kubelet-client-key={}", self.path("kubelet.key")),
            "--kubelet-preferred-address-types=InternalIP,Hostname".to_owned(),
        ];
        self.run(&bin.join("kube-apiserver"), &arguments);
    }

    fn write_kubeconfig(&self, port: u16) {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://127.0.0.1:{port}"), "insecure-skip-tls-verify": true,
            }}],
            "users": [{"name": "admin", "user": {"token": TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        });
        std::fs::write(self.kubeconfig(), config.to_string()).expect("the folder is writable");
    }

    /// The administrator's client.
    pub async fn client(&self) -> kube::Client {
        let file = kube::config::Kubeconfig::read_from(self.kubeconfig()).expect("a kubeconfig");
        let config = kube::Config::from_custom_kubeconfig(file, &Default::default()).await.expect("a configuration");
        kube::Client::try_from(config).expect("a client")
    }

    /// Runs a kubectl as the administrator, giving it `input`.
    pub async fn kubectl(&self, program: &Path, arguments: &[&str], input: &[u8]) -> Outcome {
        let mut child = Command::new(program)
            .arg(format!("--kubeconfig={}", self.kubeconfig()))
            .args(arguments)
            .env("HOME", self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("kubectl starts");
        let mut stdin = child.stdin.take().expect("stdin is piped");
        let input = input.to_owned();
        // It need not read all it is given.
        let feeder = tokio::spawn(async move { drop(stdin.write_all(&input).await) });
        let ended = tokio::time::timeout(Duration::from_secs(60), child.wait_with_output()).await;
        feeder.abort();
        let output = ended.unwrap_or_else(|_| panic!("kubectl {arguments:?} does not end")).expect("kubectl ends");
        Outcome {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Every kubectl there is: the one of PATH, and one beside the control plane's programs.
    pub fn kubectls() -> Vec<PathBuf> {
        let beside = std::env::var_os(PROGRAMS).map(|dir| Path::new(&dir).join("kubectl")).filter(|file| file.exists());
        let found: Vec<PathBuf> = beside.into_iter().chain(on_path("kubectl")).collect();
        if found.is_empty() {
            eprintln!("SKIPPED: what needs kubectl; there is none in PATH nor in {PROGRAMS}");
        }
        found
    }
}

fn request(path: &str) -> http::Request<Vec<u8>> {
    http::Request::get(path).body(Vec::new()).expect("a request")
}
