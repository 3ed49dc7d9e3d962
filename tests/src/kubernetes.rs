//! A real Kubernetes control plane as a fixture: etcd, kube-apiserver, kube-controller-manager and kube-scheduler of
//! tests/kubernetes, on loopback, with data and keys in a folder of its own. Dropped, it ends.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use tempfile::TempDir;

use crate::joey::kubectl;
use crate::program::{Outcome, Program, run, run_with_input};
use crate::registry::free_address;
use crate::{holds, repository, seconds, wait_until};

/// The administrator's token, in the API server's token file.
const TOKEN: &str = "a-token-for-one-test";

/// The token of a user who may do nothing.
pub const NOBODY: &str = "the-token-of-a-stranger";

/// A control plane that runs.
#[derive(Debug)]
pub struct ControlPlane {
    dir: TempDir,
    programs: Vec<Program>,
}

impl ControlPlane {
    /// Starts one; `None`, and a loud word, when its programs were not built.
    pub fn start() -> Option<Self> {
        let bin = repository().join("tests/kubernetes/bin");
        if !bin.join("kube-apiserver").exists() {
            eprintln!("SKIPPED: {} is not built; it needs Go and `make test-kubernetes`", bin.display());
            return None;
        }
        let dir = TempDir::with_prefix("joey-kubernetes-").expect("a temporary folder");
        let mut plane = Self { dir, programs: Vec::new() };
        plane.make_keys();
        let etcd = plane.start_etcd(&bin);
        let server = plane.start_apiserver(&bin, &etcd);
        plane.write_kubeconfig(&server);
        wait_until("kube-apiserver is ready", seconds(90), || {
            let outcome = plane.kubectl(&["get", "--raw", "/readyz"]);
            holds(outcome.code == 0, format!("{} {}", outcome.stderr, plane.programs[1].output().lines().count()))
        });
        plane.start_reconcilers(&bin);
        wait_until("the default service account is there", seconds(60), || {
            let outcome = plane.kubectl(&["get", "serviceaccount", "default"]);
            holds(outcome.code == 0, outcome.stderr)
        });
        Some(plane)
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// The key that signs service accounts' tokens, and an authority for client certificates with one for the API server, which
    /// it shows to kubelets.
    fn make_keys(&self) {
        let openssl =
            |arguments: &str| run(Command::new("openssl").current_dir(self.dir.path()).args(arguments.split(' '))).ok();
        openssl("genrsa -out serviceaccounts.key 2048");
        openssl("req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test-authority -keyout ca.key -out ca.crt");
        openssl(
            "req -newkey rsa:2048 -nodes -subj /O=system:masters/CN=kube-apiserver -keyout kubelet.key -out kubelet.csr",
        );
        std::fs::write(self.path("extensions"), "extendedKeyUsage = clientAuth\n").expect("a fresh folder is writable");
        openssl(
            "x509 -req -in kubelet.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile extensions -out kubelet.crt",
        );
        std::fs::write(
            self.path("tokens.csv"),
            format!("{TOKEN},admin,admin,system:masters\n{NOBODY},nobody,nobody,nobodies\n"),
        )
        .expect("a fresh folder is writable");
    }

    fn run_program(&mut self, program: PathBuf, arguments: &[String]) {
        let name = program.file_name().expect("a program has a name").to_string_lossy().into_owned();
        let log = self.dir.path().join(format!("{name}.log"));
        self.programs.push(Program::start(Command::new(program).args(arguments), &log));
    }

    fn start_etcd(&mut self, bin: &Path) -> String {
        let (client, peer) = (free_address(), free_address());
        let arguments = [
            format!("--data-dir={}", self.path("etcd")),
            format!("--listen-client-urls=http://{client}"),
            format!("--advertise-client-urls=http://{client}"),
            format!("--listen-peer-urls=http://{peer}"),
            format!("--initial-advertise-peer-urls=http://{peer}"),
            format!("--initial-cluster=default=http://{peer}"),
            "--unsafe-no-fsync=true".to_owned(),
        ];
        self.run_program(bin.join("etcd"), &arguments);
        format!("http://{client}")
    }

    fn start_apiserver(&mut self, bin: &Path, etcd: &str) -> String {
        let address = free_address();
        let arguments = [
            format!("--etcd-servers={etcd}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", address.port()),
            format!("--cert-dir={}", self.path("serving")),
            format!("--token-auth-file={}", self.path("tokens.csv")),
            "--authorization-mode=Node,RBAC".to_owned(),
            format!("--service-account-key-file={}", self.path("serviceaccounts.key")),
            format!("--service-account-signing-key-file={}", self.path("serviceaccounts.key")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            format!("--client-ca-file={}", self.path("ca.crt")),
            format!("--kubelet-client-certificate={}", self.path("kubelet.crt")),
            format!("--kubelet-client-key={}", self.path("kubelet.key")),
            "--kubelet-preferred-address-types=InternalIP,Hostname".to_owned(),
        ];
        self.run_program(bin.join("kube-apiserver"), &arguments);
        format!("https://{address}")
    }

    fn write_kubeconfig(&self, server: &str) {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": server, "certificate-authority": self.path("serving/apiserver.crt"),
                "tls-server-name": "kubernetes",
            }}],
            "users": [{"name": "admin", "user": {"token": TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        });
        std::fs::write(self.kubeconfig(), config.to_string()).expect("a fresh folder is writable");
    }

    fn start_reconcilers(&mut self, bin: &Path) {
        let kubeconfig = format!("--kubeconfig={}", self.kubeconfig().display());
        let arguments = [
            kubeconfig.clone(),
            format!("--service-account-private-key-file={}", self.path("serviceaccounts.key")),
            format!("--root-ca-file={}", self.path("serving/apiserver.crt")),
            "--use-service-account-credentials=false".to_owned(),
            "--leader-elect=false".to_owned(),
            "--secure-port=0".to_owned(),
        ];
        self.run_program(bin.join("kube-controller-manager"), &arguments);
        let arguments = [kubeconfig, "--leader-elect=false".to_owned(), "--secure-port=0".to_owned()];
        self.run_program(bin.join("kube-scheduler"), &arguments);
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    /// A folder for the test's files.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    #[track_caller]
    pub fn kubectl(&self, arguments: &[&str]) -> Outcome {
        run(&mut self.kubectl_command(arguments))
    }

    #[track_caller]
    pub fn kubectl_with_input(&self, arguments: &[&str], input: &str) -> Outcome {
        run_with_input(&mut self.kubectl_command(arguments), input.as_bytes())
    }

    fn kubectl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(kubectl());
        command.arg("--kubeconfig").arg(self.kubeconfig()).args(arguments);
        command.env("HOME", self.dir.path()).env_remove("KUBECONFIG");
        command
    }

    /// The last lines each of its programs wrote.
    pub fn last_words(&self) -> String {
        let tail = |text: String| text.lines().rev().take(15).map(|line| format!("{line}\n")).collect::<String>();
        self.programs.iter().map(|program| tail(program.output())).collect::<Vec<_>>().join("---\n")
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the control plane's last words, latest first:\n{}", self.last_words());
        }
    }
}
