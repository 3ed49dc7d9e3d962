//! The walls of class `rund`: what root in a Pod finds of its machine's devices, of other machines and of the host, and what the host has
//! given to a machine's monitor. That the monitor has no rights is looked at in `crates/agent/tests/rund.rs`.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use joey_tests::arena::{Arena, Class};
use joey_tests::run;
use serde_json::json;

/// Places where root in a container may make files, each on a mount of another kind.
const PLACES: &str = "/tmp /dev /dev/shm /disk /memory";

/// The process of a Pod's monitor, and the directory of its instance.
fn monitor(arena: &Arena, pod: &str) -> (u32, PathBuf) {
    let instance = arena.joey.instance_of(pod)["id"].as_str().expect("an id").to_owned();
    let dir = arena.joey.data().join("instances").join(instance);
    let record = std::fs::read_to_string(dir.join("vm/vmm.pid")).expect("a record");
    (record.split(' ').next().and_then(|pid| pid.parse().ok()).expect("a process"), dir)
}

/// A Pod that sleeps, with a volume on its disk and one in memory.
fn sleeps(arena: &Arena, name: &str, image: &str) {
    let mut object = arena.pod(name, image, &["sleep", "1000"]);
    object["spec"]["volumes"] =
        json!([{"name": "disk", "emptyDir": {}}, {"name": "memory", "emptyDir": {"medium": "Memory"}}]);
    let main = &mut object["spec"]["containers"][0];
    main["volumeMounts"] = json!([{"name": "disk", "mountPath": "/disk"}, {"name": "memory", "mountPath": "/memory"}]);
    // A small disk, so that all of it can be read.
    main["resources"] = json!({"limits": {"ephemeral-storage": "128Mi", "memory": "128Mi"}});
    arena.joey.apply(&object);
    arena.joey.wait_for(name, "Ready", arena.patience());
}

/// Whether a file has these bytes in it.
fn holds_bytes(path: &Path, wanted: &[u8]) -> bool {
    let mut file = std::fs::File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (mut buffer, mut kept) = (vec![0; 1 << 20], 0);
    loop {
        let count = file.read(&mut buffer[kept..]).expect("it can be read");
        if buffer[..kept + count].windows(wanted.len()).any(|window| window == wanted) {
            return true;
        }
        if count == 0 {
            return false;
        }
        // The end of what was read may be the beginning of what is looked for.
        let end = kept + count;
        let rest = end.min(wanted.len() - 1);
        buffer.copy_within(end - rest..end, 0);
        kept = rest;
    }
}

/// Files that a process has open, and those in the directories that it can write: the place and whether it may write there.
fn files_of(pid: u32) -> Vec<(PathBuf, bool)> {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs");
    let open = descriptors.flatten().filter(|entry| {
        std::fs::metadata(entry.path()).is_ok_and(|meta| meta.is_file()) // Not pipes, sockets, devices.
    });
    let mut files: Vec<_> = open
        .map(|entry| {
            let info = entry.path().to_string_lossy().replace("/fd/", "/fdinfo/");
            let info = std::fs::read_to_string(info).expect("it is open");
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).expect("flags").trim().to_owned();
            let access = u32::from_str_radix(&flags, 8).expect("octal") & 3;
            (entry.path(), access != 0)
        })
        .collect();
    let run = std::fs::read_dir(format!("/proc/{pid}/root/run")).into_iter().flatten().flatten();
    files.extend(
        run.filter(|entry| entry.metadata().is_ok_and(|meta| meta.is_file())).map(|entry| (entry.path(), true)),
    );
    files
}

#[test]
fn devices_lead_to_nobody_else() {
    let Some(arena) = Arena::new(Class::Rund) else { return };
    let image = arena.image("devices", &[], json!({}));
    sleeps(&arena, "victim", &image);
    sleeps(&arena, "attacker", &image);
    // Written in two parts: it is in no argument of a process, and in no log.
    let (half, other) = (joey_tests::unique("marker"), joey_tests::unique("rest"));
    let marker = format!("{half}{other}");
    let script = format!("m={half}; for f in /disk/m /m; do echo ${{m}}{other} > $f; done; busybox sync");
    arena.inside("victim", &script).ok();

    // Every block device and every port of the machine, by its number, at every place: none can be opened.
    let script = format!(
        "for at in /sys/class/block/* /sys/class/virtio-ports/* /sys/class/misc/hw_random; do test -e $at/dev || continue; \
         kind=c; test -e $at/size && kind=b; n=$(busybox tr : ' ' < $at/dev); echo seen $at; \
         for place in {PLACES}; do busybox rm -f $place/d; busybox mknod $place/d $kind $n || continue; echo made; \
         for try in 'busybox head -c 1' 'busybox dd count=1 of=/dev/null if='; do \
         case $try in *=) $try$place/d;; *) $try $place/d;; esac >/dev/null 2>&1 && echo OPENED $at $place; done; \
         (echo x > $place/d) 2>/dev/null && echo OPENED $at $place; busybox rm -f $place/d; done; done; \
         ls -d /dev/vport* /dev/virtio-ports /dev/vd* /dev/vsock /dev/kvm /dev/mem 2>/dev/null && echo OPENED; true"
    );
    let tried = arena.inside("attacker", &script).ok();
    assert!(tried.contains("seen /sys/class/block/vd") && tried.contains("seen /sys/class/virtio-ports/"), "{tried}");
    assert!(tried.contains("made") && !tried.contains("OPENED"), "{tried}");
    // One disk may be written by the machine at all; the others are the layers'.
    let disks = arena.inside("attacker", "for d in /sys/block/vd*; do test $(cat $d/size) = 0 || cat $d/ro; done").ok();
    assert_eq!(disks.matches('0').count(), 1, "{disks}");
    assert!(disks.matches('1').count() >= 1, "{disks}");

    // The monitor, on whose side a machine that is taken over stands: what it has and what it sees.
    let (pid, dir) = monitor(&arena, "attacker");
    let (_, victims) = monitor(&arena, "victim");
    assert!(holds_bytes(&victims.join("vm/disk"), marker.as_bytes()), "the marker is on its own Pod's disk");
    let own = std::fs::metadata(dir.join("vm/disk")).expect("a disk").ino();
    let foreign = std::fs::metadata(victims.join("vm/disk")).expect("a disk").ino();
    let files = files_of(pid);
    assert!(files.len() > 2, "{files:?}");
    for (path, writable) in &files {
        let place = std::fs::read_link(path).unwrap_or_else(|_| path.clone());
        let meta = std::fs::metadata(path).expect("it is there");
        assert_ne!(meta.ino(), foreign, "{}", place.display());
        assert!(!holds_bytes(path, marker.as_bytes()), "{}", place.display());
        let layer = place.to_string_lossy().ends_with(".erofs") || place.to_string_lossy().contains("/layers/");
        assert!(!(layer && *writable), "{} may be written", place.display());
    }
    assert!(files.iter().any(|(path, _)| std::fs::metadata(path).is_ok_and(|meta| meta.ino() == own)), "{files:?}");
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    for hidden in ["var", "root", "home", "opt", "srv", "sys", "etc/shadow", "run/joey", "run/netns"] {
        assert!(!root.join(hidden).exists(), "/{hidden} is seen");
    }
    for path in [arena.joey.data(), victims] {
        let seen = root.join(path.strip_prefix("/").expect("absolute"));
        assert!(!seen.exists(), "{} is seen", path.display());
    }
}

#[test]
fn no_agent_can_be_reached_from_inside() {
    let Some(arena) = Arena::new(Class::Rund) else { return };
    let image = arena.image("agents", &[], json!({}));
    let ready = arena.run_pod("other", &image, &[]);
    let address = ready["status"]["podIP"].as_str().expect("an address").to_owned();
    arena.run_pod("attacker", &image, &[]);
    // In a machine the agent is in the Pod's network: whatever listened there could be connected to. It has sockets joined in pairs,
    // without names (unix(7): the flag of those that accept, and the path at the end).
    let tables = "for t in tcp tcp6 udp udp6 raw raw6 packet; do cat /proc/net/$t 2>/dev/null | busybox sed 1d; done; \
                  cat /proc/net/unix | busybox sed 1d | busybox grep -v ' 00000000 0001 03 *[0-9]*$'; true";
    let sockets = arena.inside("attacker", tables).ok();
    assert_eq!(sockets.trim(), "", "sockets of somebody else's");
    // And from the next machine nothing answers, at ports that agents of others have been found at.
    let script = format!(
        "for port in 22 80 443 1024 1234 2375 10000 10250 50051 52 8080; do \
         busybox timeout 1 busybox nc -z -w 1 {address} $port && echo OPEN $port; done; true"
    );
    assert_eq!(arena.inside("attacker", &script).ok().trim(), "");
    // No process of the machine is seen but the container's own, so nobody to take descriptors from.
    let processes = arena.inside("attacker", "for p in /proc/[0-9]*; do readlink $p/exe; done; true").ok();
    assert!(processes.lines().all(|program| program.contains("busybox")), "{processes}");
}

/// An interface of the host's own with an ordinary address and one of those that clouds tell secrets at.
struct Beside {
    name: String,
    ordinary: Ipv4Addr,
    metadata: Ipv4Addr,
}

impl Beside {
    fn new() -> Self {
        let (name, [a, b]) = (joey_tests::unique("mw"), rand::random::<[u8; 2]>());
        let beside = Self {
            name,
            ordinary: Ipv4Addr::new(203, 0, 113, a.clamp(1, 254)),
            metadata: Ipv4Addr::new(169, 254, a.clamp(2, 250), b.clamp(1, 254)),
        };
        let ip = |arguments: String| run(Command::new("ip").args(arguments.split(' '))).ok();
        ip(format!("link add {0} type veth peer name {0}p", beside.name));
        ip(format!("addr add {}/32 dev {}", beside.ordinary, beside.name));
        ip(format!("addr add {}/32 dev {}", beside.metadata, beside.name));
        ip(format!("link set {} up", beside.name));
        ip(format!("link set {}p up", beside.name));
        beside
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.name]).status();
    }
}

/// The host as both classes see it: an ordinary address is reached, so that the others' silence means something.
fn the_hosts_own_services_are_not_reached(class: Class) {
    let Some(arena) = Arena::new(class) else { return };
    let beside = Beside::new();
    let listener = TcpListener::bind("0.0.0.0:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let mut connection = connection;
            let _ = connection.write_all(b"the host's own\n");
        }
    });
    let image = arena.image("reaches", &[], json!({}));
    arena.run_pod("reaches", &image, &[]);
    let ask = |address: &str, port: u16| {
        arena.inside("reaches", &format!("busybox timeout 4 busybox nc -w 3 {address} {port} < /dev/null; true")).ok()
    };
    let gateway =
        arena.inside("reaches", "busybox ip route | busybox sed -n 's/^default via \\([^ ]*\\).*/\\1/p'").ok();
    let gateway = gateway.trim().to_owned();
    assert!(gateway.parse::<Ipv4Addr>().is_ok(), "{gateway}");
    assert_eq!(ask(&beside.ordinary.to_string(), port).trim(), "the host's own");
    assert!(std::net::TcpStream::connect((beside.metadata, port)).is_ok(), "the host reaches it");
    for address in [beside.metadata.to_string(), "169.254.169.254".to_owned(), gateway, "127.0.0.1".to_owned()] {
        for port in [port, 80, arena.joey.listen().port()] {
            assert_eq!(ask(&address, port), "", "{address}:{port}");
        }
    }
    // With another's address as the sender, and by a route past the gateway.
    let script = format!(
        "busybox ip route add {0} dev eth0 2>/dev/null; busybox ip addr add 169.254.7.7/16 dev eth0 2>/dev/null; \
         busybox timeout 4 busybox nc -w 3 {0} {port} < /dev/null; true",
        beside.metadata
    );
    assert_eq!(arena.inside("reaches", &script).ok(), "");
}

#[test]
fn the_hosts_own_services_are_not_reached_in_runc() {
    the_hosts_own_services_are_not_reached(Class::Runc);
}

#[test]
fn the_hosts_own_services_are_not_reached_in_rund() {
    the_hosts_own_services_are_not_reached(Class::Rund);
}
