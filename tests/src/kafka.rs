//! A real Kafka as a fixture: one broker of Apache's, in KRaft mode, behind SASL PLAIN on loopback, and its own consumer. Dropped, it ends.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::program::{Outcome, Program, run};
use crate::registry::free_address;
use crate::{holds, repository, seconds, wait_until};

/// The user that the broker knows, and that user's password.
pub const USER: &str = "kanga";
pub const PASSWORD: &str = "honey";

/// A broker that runs.
#[derive(Debug)]
pub struct Kafka {
    dir: TempDir,
    address: SocketAddr,
    program: Option<Program>,
}

impl Kafka {
    /// Starts one; `None`, and a loud word, where it was not fetched.
    pub fn start() -> Option<Self> {
        if !jars().join(".pom").exists() {
            eprintln!("SKIPPED: {} is not there; it needs Java, Maven and scripts/kafka.sh", jars().display());
            return None;
        }
        let dir = TempDir::with_prefix("joey-kafka-").expect("a temporary folder");
        let (address, controller) = (free_address(), free_address());
        let module = "org.apache.kafka.common.security.plain.PlainLoginModule required";
        let login = format!("{module} username=\"{USER}\" password=\"{PASSWORD}\"");
        let server = format!(
            "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@{controller}\n\
             listeners=SASL_PLAINTEXT://{address},CONTROLLER://{controller}\nadvertised.listeners=SASL_PLAINTEXT://{address}\n\
             controller.listener.names=CONTROLLER\ninter.broker.listener.name=SASL_PLAINTEXT\n\
             listener.security.protocol.map=SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT\n\
             sasl.enabled.mechanisms=PLAIN\nsasl.mechanism.inter.broker.protocol=PLAIN\n\
             listener.name.sasl_plaintext.plain.sasl.jaas.config={login} user_{USER}=\"{PASSWORD}\";\n\
             log.dirs={}\noffsets.topic.replication.factor=1\nauto.create.topics.enable=false\n",
            dir.path().join("data").display()
        );
        let client = format!("security.protocol=SASL_PLAINTEXT\nsasl.mechanism=PLAIN\nsasl.jaas.config={login};\n");
        std::fs::write(dir.path().join("server.properties"), server).expect("a fresh folder is writable");
        std::fs::write(dir.path().join("client.properties"), client).expect("a fresh folder is writable");
        let mut kafka = Self { dir, address, program: None };
        let server = kafka.path("server.properties");
        run(&mut java("kafka.tools.StorageTool", &["format", "-t", "MkU3OEVBNTcwNTJENDM2Qg", "-c", &server])).ok();
        kafka.up();
        Some(kafka)
    }

    /// Starts it (again), on the same data, and waits until it answers.
    pub fn up(&mut self) {
        let mut command = java("kafka.Kafka", &[&self.path("server.properties")]);
        self.program = Some(Program::start(&mut command, &self.dir.path().join("log")));
        wait_until("the broker answers", seconds(90), || {
            let listed = self.tool("TopicCommand", "--command-config", &["--list"]);
            holds(listed.code == 0, listed.stderr)
        });
    }

    /// Ends it as a loss of power would.
    pub fn kill(&mut self) {
        self.program = None;
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn make_topic(&self, topic: &str, partitions: u32) {
        let arguments = ["--create", "--topic", topic, "--partitions", &partitions.to_string()];
        self.tool("TopicCommand", "--command-config", &arguments).ok();
    }

    /// All records of a topic, read by Kafka's own consumer until for some seconds no more came.
    pub fn records(&self, topic: &str) -> Vec<String> {
        let arguments = ["--topic", topic, "--from-beginning", "--timeout-ms", "5000"];
        let read = self.tool("consumer.ConsoleConsumer", "--consumer.config", &arguments);
        read.stdout.lines().map(str::to_owned).collect()
    }

    fn tool(&self, name: &str, configuration: &str, arguments: &[&str]) -> Outcome {
        let (server, client) = (self.address.to_string(), self.path("client.properties"));
        let mut all = vec!["--bootstrap-server", &server, configuration, &client];
        all.extend(arguments);
        run(&mut java(&format!("org.apache.kafka.tools.{name}"), &all))
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }
}

fn jars() -> PathBuf {
    repository().join(".tools/kafka")
}

fn java(class: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("java");
    command.args(["-Xmx256m", "-cp"]).arg(Path::join(&jars(), "*")).arg(class).args(arguments);
    command
}
