//! What the tests play on: daemons with names and ranges of their own, threads inside namespaces, a network outside.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use joey_network::Config;
use nix::sched::{CloneFlags, setns, unshare};

pub const PATIENCE: Duration = Duration::from_secs(5);
/// How long a packet that must not arrive is waited for.
pub const SILENCE: Duration = Duration::from_millis(300);

pub fn config(tag: &str, third: u8, prefix: u8) -> Config {
    let process = std::process::id();
    Config {
        range: format!("10.{}.{third}.0/{prefix}", 200 + process % 50).parse().unwrap(),
        name: format!("t{tag}{process}"),
        prepared: 4,
        run_dir: format!("/run/joey-test-{tag}-{process}").into(),
    }
}

pub fn run(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs `work` on a thread inside the namespace at `netns`.
pub fn inside<T: Send + 'static>(netns: &Path, work: impl FnOnce() -> T + Send + 'static) -> T {
    start_inside(netns, work).join().unwrap()
}

pub fn start_inside<T: Send + 'static>(
    netns: &Path,
    work: impl FnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    let namespace = File::open(netns).unwrap();
    std::thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    })
}

/// A listener made inside `netns` that answers one connection with the address it came from.
pub fn greet(netns: &Path) -> (u16, std::thread::JoinHandle<IpAddr>) {
    let listener = inside(netns, || TcpListener::bind("0.0.0.0:0").unwrap());
    let port = listener.local_addr().unwrap().port();
    let answer = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        stream.write_all(b"hello").unwrap();
        peer.ip()
    });
    (port, answer)
}

/// Whether a connection from here brings the greeting.
pub fn is_greeted(address: IpAddr, port: u16, patience: Duration) -> bool {
    let Ok(mut stream) = TcpStream::connect_timeout(&SocketAddr::new(address, port), patience) else { return false };
    let mut text = String::new();
    stream.read_to_string(&mut text).is_ok() && text == "hello"
}

/// Sends `text` from `source` and says nothing of whether it arrives.
pub fn send_from(source: IpAddr, to: SocketAddr, text: &'static str) {
    UdpSocket::bind(SocketAddr::new(source, 0)).unwrap().send_to(text.as_bytes(), to).unwrap();
}

pub fn heard(socket: &UdpSocket, patience: Duration) -> Option<String> {
    socket.set_read_timeout(Some(patience)).unwrap();
    let mut buffer = [0; 64];
    let length = socket.recv(&mut buffer).ok()?;
    Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// Bits per second that arrive at `listener` from a sender that never pauses, measured for `period` after a start of 1 s.
pub fn rate(listener: TcpListener, period: Duration, send: impl FnOnce(SocketAddr) + Send + 'static) -> f64 {
    let address = listener.local_addr().unwrap();
    let sender = std::thread::spawn(move || send(address));
    let (mut stream, _) = listener.accept().unwrap();
    let mut buffer = vec![0; 1 << 16];
    let mut count = |period: Duration| {
        let (begin, mut bytes) = (Instant::now(), 0);
        while begin.elapsed() < period {
            bytes += stream.read(&mut buffer).unwrap();
        }
        bytes as f64 * 8.0 / begin.elapsed().as_secs_f64()
    };
    count(Duration::from_secs(1));
    let rate = count(period);
    drop(stream);
    sender.join().unwrap();
    rate
}

/// Sends until the other side has had enough.
pub fn pour(to: SocketAddr) {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
    while stream.write_all(&[7; 1 << 14]).is_ok() {}
}

/// What of this daemon is on the host now; `interface` is one of its interfaces.
pub fn traces(config: &Config, interface: &str) -> Vec<String> {
    let (own, ifb) = (&interface[..6], format!("jb{}", &interface[2..6]));
    let links =
        std::fs::read_dir("/sys/class/net").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut found: Vec<_> = links.filter(|name| name.starts_with(own) || name.starts_with(&ifb)).collect();
    let rules = run("nft list ruleset");
    found.extend(rules.lines().filter(|line| line.contains(&config.name) || line.contains(own)).map(str::to_owned));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let place = config.run_dir.display().to_string();
    found.extend(mounts.lines().filter(|line| line.contains(&place)).map(str::to_owned));
    found.extend(config.run_dir.exists().then_some(place));
    found
}

/// A network that is neither the host's nor ours: a namespace with one link to the host, kept by a thread.
pub struct Outside {
    pub address: IpAddr,
    pub host: IpAddr,
    pub netns: std::path::PathBuf,
    pub link: String,
    _end: mpsc::Sender<()>,
}

impl Outside {
    pub fn new(tag: &str, third: u8) -> Self {
        let process = std::process::id();
        let (link, net) = (format!("o{tag}{process}"), format!("198.18.{third}"));
        let (end, ended) = mpsc::channel::<()>();
        let (told, thread) = mpsc::channel();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            told.send(nix::unistd::gettid()).unwrap();
            let _ = ended.recv();
        });
        let netns = format!("/proc/{process}/task/{}/ns/net", thread.recv().unwrap());
        let task = netns.split('/').nth(4).unwrap();
        run(&format!(
            "ip link add {link} type veth peer name out0 netns {task} && ip addr add {net}.1/24 dev {link} && ip link set {link} up"
        ));
        let outside = Self {
            address: format!("{net}.2").parse().unwrap(),
            host: format!("{net}.1").parse().unwrap(),
            netns: netns.into(),
            link,
            _end: end,
        };
        outside.run(format!("ip link set lo up && ip addr add {net}.2/24 dev out0 && ip link set out0 up"));
        outside
    }

    pub fn run(&self, line: String) {
        inside(&self.netns, move || run(&line));
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.link]).output();
    }
}
