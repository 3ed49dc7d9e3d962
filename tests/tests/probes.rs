//! Probes and hooks in all their ways, as the kubelet has them: by gRPC, HTTPS, HTTP, TCP and sleep; the signals and the order in
//! which a Pod ends; and what is left alone while somebody debugs it.

use std::net::TcpStream;
use std::sync::mpsc;
use std::thread::JoinHandle;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use joey_tests::image::{Image, Layer};
use joey_tests::joey::pod;
use joey_tests::served::Served;
use joey_tests::{Joey, Program, Registry, holds, pause, seconds, wait_until};
use nix::libc;
use serde_json::{Value, json};

/// One server with the health protocol of gRPC, whose answer is a file, and one with TLS.
const NGINX: &str = "worker_processes 1;
pid /run/nginx.pid;
error_log /dev/stderr warn;
events { worker_connections 64; }
http {
    access_log off;
    client_body_temp_path /tmp/body;
    server {
        listen 9000 http2;
        location = /grpc.health.v1.Health/Check {
            # Nothing is posted to a file: instead of that refusal the file is sent.
            error_page 405 =200 $uri;
            default_type application/grpc;
            alias /conf/check;
        }
    }
    server {
        listen 443 ssl;
        ssl_certificate /pair/tls.crt;
        ssl_certificate_key /pair/tls.key;
        location / { return 200 ok; }
    }
}
";

/// Goes on whatever it is asked.
const DEAF: &str = "trap '' TERM QUIT; while :; do sleep 0.1; done";

/// What the health protocol answers, in base64: a message of seven bytes whose only field is the status.
fn health(status: u8) -> String {
    STANDARD.encode([0, 0, 0, 0, 2, 8, status])
}

fn container(name: &str, image: &str, script: &str) -> Value {
    json!({"name": name, "image": image, "command": ["sh", "-c", script]})
}

/// A Pod of these containers.
fn group(name: &str, policy: &str, containers: &[Value]) -> Value {
    let mut object = pod(name, "", &[]);
    object["spec"]["containers"] = containers.into();
    object["spec"]["restartPolicy"] = policy.into();
    object
}

/// A probe that asks every second.
fn often(mut probe: Value, failures: u32) -> Value {
    probe["periodSeconds"] = 1.into();
    probe["failureThreshold"] = failures.into();
    probe
}

fn apply_all(joey: &Joey, objects: &[Value]) {
    joey.apply(&json!({"apiVersion": "v1", "kind": "List", "items": objects}));
}

fn inside(joey: &Joey, pod: &str, script: &str) {
    joey.kubectl(&["exec", pod, "-c", "main", "--", "sh", "-c", script]).ok();
}

fn told(joey: &Joey, pod: &str, container: &str) -> Value {
    let all = joey.get("pod", pod)["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
    all.into_iter().find(|status| status["name"] == container).unwrap_or_default()
}

/// Waits until what is told of a container is so.
#[track_caller]
fn until(joey: &Joey, pod: &str, container: &str, what: &str, so: impl Fn(&Value) -> bool) -> Value {
    wait_until(&format!("{container} of {pod} {what}"), seconds(30), || {
        let status = told(joey, pod, container);
        if so(&status) { Ok(status) } else { Err(status.to_string()) }
    })
}

/// Waits until the Pod's events say all of this.
#[track_caller]
fn said(joey: &Joey, pod: &str, parts: &[&str]) {
    let field = format!("involvedObject.name={pod}");
    wait_until(&format!("{pod} has events with {parts:?}"), seconds(20), || {
        let events = joey.kubectl(&["get", "events", "--field-selector", &field]).ok();
        holds(parts.iter().all(|part| events.contains(part)), events)
    });
}

/// The objects of a Pod whose first container serves what all three are asked by.
fn serving(image: &str) -> [Value; 3] {
    let key = rcgen::KeyPair::generate().expect("a key can be made");
    let parameters = rcgen::CertificateParams::new(vec!["nobody.test".to_owned()]).expect("the name is one");
    let certificate = parameters.self_signed(&key).expect("the key signs");
    let conf = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "conf"},
        "data": {"nginx.conf": NGINX}, "binaryData": {"check": health(1)}});
    let pair = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "pair"},
        "stringData": {"tls.crt": certificate.pem(), "tls.key": key.serialize_pem()}});
    let web = json!({"name": "main", "image": image,
        "command": ["nginx", "-g", "daemon off;", "-c", "/conf/nginx.conf"],
        "readinessProbe": often(json!({"httpGet": {"scheme": "HTTPS", "port": 443}}), 1),
        "volumeMounts": [{"name": "conf", "mountPath": "/conf"}, {"name": "pair", "mountPath": "/pair"}]});
    let mut grpc = container("grpc", image, "sleep 1000");
    grpc["readinessProbe"] = often(json!({"grpc": {"port": 9000, "service": "kanga"}}), 1);
    let mut plain = container("plain", image, "sleep 1000");
    plain["readinessProbe"] = often(json!({"httpGet": {"port": 443}}), 1);
    let mut object = group("serves", "Always", &[web, grpc, plain]);
    object["spec"]["volumes"] = json!([
        {"name": "conf", "configMap": {"name": "conf"}}, {"name": "pair", "secret": {"secretName": "pair"}}]);
    [conf, pair, object]
}

/// Two Pods that have started when they answer, by HTTP and by TCP, and live as long as they answer, by the other one.
fn answering(image: &str) -> [Value; 2] {
    let tcp = json!({"tcpSocket": {"port": 8080}});
    let get = |path: &str| json!({"httpGet": {"port": 8080, "path": path}});
    let script = "mkdir -p /tmp/www; httpd -f -p 8080 -h /tmp/www & echo $! > /tmp/pid; while :; do sleep 0.1; done";
    let mut by_http = container("main", image, script);
    by_http["startupProbe"] = often(get("/up"), 100);
    by_http["livenessProbe"] = often(tcp.clone(), 1);
    let script = "mkdir -p /tmp/www; touch /tmp/www/well; until test -e /tmp/up; do sleep 0.1; done; \
                  httpd -f -p 8080 -h /tmp/www";
    let mut by_tcp = container("main", image, script);
    by_tcp["startupProbe"] = often(tcp, 100);
    by_tcp["livenessProbe"] = often(get("/well"), 1);
    [group("by-http", "Always", &[by_http]), group("by-tcp", "Always", &[by_tcp])]
}

/// A Pod of a minute's grace with probes that never hold and give a second.
fn impatient(image: &str) -> Value {
    let mut probe = often(json!({"tcpSocket": {"port": 9}}), 2);
    probe["terminationGracePeriodSeconds"] = 1.into();
    let (mut ill, mut late) = (container("ill", image, DEAF), container("late", image, DEAF));
    ill["livenessProbe"] = probe.clone();
    late["startupProbe"] = probe;
    let mut object = group("impatient", "Always", &[ill, late]);
    object["spec"]["terminationGracePeriodSeconds"] = 60.into();
    object
}

#[test]
fn probes_ask_in_every_way() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    apply_all(&joey, &[&serving(&image)[..], &answering(&image)[..], &[impatient(&image)][..]].concat());

    // Who has not started is not asked whether it lives.
    said(&joey, "by-http", &["Startup probe failed: HTTP probe failed with statuscode: 404"]);
    said(&joey, "by-tcp", &["Startup probe failed: dial tcp", "connect: connection refused"]);
    for (name, script) in [("by-http", "touch /tmp/www/up"), ("by-tcp", "touch /tmp/up")] {
        let status = told(&joey, name, "main");
        assert_eq!((&status["started"], &status["restartCount"]), (&json!(false), &json!(0)), "{name}: {status}");
        inside(&joey, name, script);
    }
    for (name, script) in [("by-http", "kill $(cat /tmp/pid)"), ("by-tcp", "rm /tmp/www/well")] {
        let started = until(&joey, name, "main", "has started", |status| status["started"] == true);
        assert_eq!((&started["ready"], &started["restartCount"]), (&json!(true), &json!(0)), "{name}: {started}");
        inside(&joey, name, script);
    }
    for (name, words) in [
        ("by-http", "Liveness probe failed: dial tcp"),
        ("by-tcp", "Liveness probe failed: HTTP probe failed with statuscode: 404"),
    ] {
        until(&joey, name, "main", "was started again", |status| status["restartCount"] == 1);
        said(&joey, name, &[words, "Container main failed liveness probe, will be restarted"]);
    }

    // A probe's own grace counts, not the Pod's: within a minute there is no other way to a second run.
    for (name, probe) in [("ill", "liveness"), ("late", "startup")] {
        let status = until(&joey, "impatient", name, "was killed and started again", |status| {
            status["restartCount"].as_u64().is_some_and(|count| count > 0)
        });
        let end = &status["lastState"]["terminated"];
        assert_eq!((&end["exitCode"], &end["reason"]), (&json!(137), &json!("Error")), "{status}");
        said(&joey, "impatient", &[&format!("Container {name} failed {probe} probe, will be restarted")]);
    }

    // An encrypted answer is one whoever signed the certificate, and one in the clear is none.
    until(&joey, "serves", "main", "answers encrypted", |status| status["ready"] == true);
    said(&joey, "serves", &["Readiness probe failed: HTTP probe failed with statuscode: 400"]);
    assert_eq!(told(&joey, "serves", "plain")["ready"], false);
    until(&joey, "serves", "grpc", "answers that it serves", |status| status["ready"] == true);
    let change = json!({"binaryData": {"check": health(2)}}).to_string();
    joey.kubectl(&["patch", "configmap", "conf", "--type=merge", "-p", &change]).ok();
    until(&joey, "serves", "grpc", "answers that it does not serve", |status| status["ready"] == false);
    said(&joey, "serves", &["Readiness probe failed: service unhealthy", "NOT_SERVING"]);
    for name in ["main", "grpc"] {
        let status = told(&joey, "serves", name);
        assert_eq!((&status["ready"], &status["restartCount"]), (&json!(name == "main"), &json!(0)), "{status}");
    }
}

/// Calls the server beside it after its start and before its end; the server ends after it.
fn calling(image: &str) -> Value {
    let mut main = container("main", image, "trap 'exit 0' TERM QUIT; while :; do sleep 0.1; done");
    main["lifecycle"] = json!({
        "postStart": {"httpGet": {"port": 80, "path": "/absent?began"}},
        "preStop": {"httpGet": {
            "port": 80, "path": "/?ends", "httpHeaders": [{"name": "User-Agent", "value": "kanga"}]}},
    });
    let mut object = group("calls", "Never", &[main]);
    object["spec"]["initContainers"] = json!([{"name": "web", "image": image, "restartPolicy": "Always",
        "startupProbe": often(json!({"httpGet": {"port": 80, "path": "/healthz"}}), 100)}]);
    object
}

/// Its first container sleeps after its start and before its end; both say when they start and when they are asked to end.
fn napping(image: &str) -> Value {
    let script = "now() { read up rest < /proc/uptime; echo $1 $up; }; now begins; \
                  trap 'now asked; exit 0' TERM QUIT; while :; do sleep 0.1; done";
    let mut first = container("first", image, script);
    let nap = json!({"sleep": {"seconds": 2}});
    first["lifecycle"] = json!({"postStart": nap, "preStop": nap});
    group("naps", "Never", &[first, container("second", image, script)])
}

/// Containers that say by which signal they are asked to end; `bare` is an image that names none.
fn signalled(image: &str, bare: &str) -> Value {
    let script = "for name in TERM QUIT USR1; do trap \"echo got $name; exit 0\" $name; done; echo begins; \
                  while :; do sleep 0.1; done";
    let mut named = container("named", image, script);
    named["lifecycle"] = json!({"stopSignal": "SIGUSR1"});
    let mut object =
        group("signals", "Never", &[named, container("image", image, script), container("bare", bare, script)]);
    object["spec"]["os"] = json!({"name": "linux"});
    object
}

/// Two sidecars and who they serve, all of whom take their time and note their end. The first sidecar shows the notes.
fn ordered(image: &str) -> Value {
    let takes = |end: &str| format!("trap '{end}; exit 0' TERM QUIT; echo begins; while :; do sleep 0.1; done");
    let sidecar = |name: &str, end: &str| {
        let mut made = container(name, image, &takes(end));
        made["restartPolicy"] = "Always".into();
        made
    };
    let main = container("main", image, &takes("sleep 1; echo main >> /all/ends"));
    let mut object = group("order", "Never", &[main]);
    let second = sidecar("second", "sleep 0.5; echo second >> /all/ends");
    object["spec"]["initContainers"] = json!([sidecar("first", "cat /all/ends"), second]);
    object["spec"]["volumes"] = json!([{"name": "all", "emptyDir": {}}]);
    for kind in ["containers", "initContainers"] {
        for container in object["spec"][kind].as_array_mut().into_iter().flatten() {
            container["volumeMounts"] = json!([{"name": "all", "mountPath": "/all"}]);
        }
    }
    object
}

/// Follows a Pod's log; it has shown `mark` so many times.
#[track_caller]
fn follow(joey: &Joey, pod: &str, which: &[&str], mark: &str, times: usize) -> Program {
    let mut command = joey.kubectl_command(&[&["logs", "-f", pod][..], which].concat());
    let program = Program::start(&mut command, &joey.scratch().join(format!("log-of-{pod}")));
    wait_until(&format!("the log of {pod} is followed"), seconds(20), || {
        let text = program.output();
        holds(text.matches(mark).count() >= times, text)
    });
    program
}

/// The number at the end of the line that has these words.
#[track_caller]
fn moment(log: &str, of: &str, what: &str) -> f64 {
    let line = log.lines().find(|line| line.contains(of) && line.contains(what));
    let number = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    number.unwrap_or_else(|| panic!("{of} does not say when it {what}: {log}"))
}

#[test]
fn hooks_signals_and_the_order_of_the_end() {
    let (registry, served) = (Registry::with_demo_image(), Served::start());
    let joey = Joey::start();
    let image = registry.demo();
    let bare = served.add("bare:1", &Image::new(vec![Layer::shell()], json!({"Env": ["PATH=/bin"]})));
    apply_all(&joey, &[calling(&image), napping(&image), signalled(&image, &bare), ordered(&image)]);
    let pods = ["calls", "naps", "signals", "order"];
    for name in pods {
        joey.wait_for(name, "Ready", seconds(40));
    }
    let all = ["--all-containers", "--prefix"];
    let mut follows = [
        follow(&joey, "calls", &["-c", "web"], "GET /absent?began", 1),
        follow(&joey, "naps", &all, "begins", 2),
        follow(&joey, "signals", &all, "begins", 3),
        follow(&joey, "order", &["-c", "first"], "begins", 1),
    ];
    // Long enough that nobody is killed.
    joey.kubectl(&[&["delete", "pod", "--grace-period=20", "--timeout=60s"][..], &pods[..]].concat()).ok();
    let [calls, naps, signals, order] = follows.each_mut().map(|follow| {
        follow.wait(seconds(20));
        follow.output()
    });

    let line = |path: &str| calls.lines().find(|line| line.contains(path)).unwrap_or_default();
    // Any answer is an answer, also that there is nothing.
    assert!(line("\"GET /absent?began HTTP/1.1\" 404 ").ends_with("\"kube-lifecycle/1.36\""), "{calls}");
    assert!(line("\"GET /?ends ").ends_with("\"kanga\""), "{calls}");

    // The second starts when the first one's hook is done, and is asked to end while the first one's other hook still sleeps.
    let between = |what: &str| moment(&naps, "/second]", what) - moment(&naps, "/first]", what);
    assert!(between("begins") >= 1.5, "{naps}");
    assert!(between("asked") <= -1.5, "{naps}");

    for (name, signal) in [("named", "USR1"), ("image", "QUIT"), ("bare", "TERM")] {
        assert!(signals.contains(&format!("/{name}] got {signal}\n")), "{name}, {signal}: {signals}");
    }
    assert_eq!(order, "begins\nmain\nsecond\n", "sidecars end last, the last one first");
}

/// Traces a process as a debugger does, without stopping it, until there is no sender any more. The kernel lets go of what a
/// thread has traced when that ends.
fn trace(pid: u32, until: mpsc::Receiver<()>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let pid = libc::pid_t::try_from(pid).expect("process ids fit");
        let nothing = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: PTRACE_SEIZE takes a process id and two words that are zero, and touches no memory of this process.
        let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, nothing, nothing) };
        assert_eq!(seized, 0, "cannot trace {pid}: {}", std::io::Error::last_os_error());
        // It says nothing: it ends.
        let _ = until.recv();
    })
}

#[test]
fn liveness_does_not_count_while_somebody_debugs() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    let probe = often(json!({"exec": {"command": ["test", "!", "-e", "/tmp/ill"]}}), 1);
    let web = json!({"name": "main", "image": image, "livenessProbe": probe});
    let mut connected = group("connected", "Always", &[web]);
    connected["metadata"]["annotations"] = json!({"joey.dev/debug-ports": "5005, 80"});
    // It gets no signal, on which it would wait for its tracer.
    let mut sleeps = container("main", &image, "exec sleep 1000");
    sleeps["livenessProbe"] = probe;
    apply_all(&joey, &[connected, group("traced", "Always", &[sleeps])]);
    let address = joey.wait_for("connected", "Ready", seconds(40))["status"]["podIP"].clone();
    joey.wait_for("traced", "Ready", seconds(40));

    let address = format!("{}:80", address.as_str().expect("it has an address"));
    let connection = wait_until("it listens", seconds(10), || {
        TcpStream::connect(&address).map_err(|error| format!("{address}: {error}"))
    });
    let traced = joey.pid_of("traced.default");
    let (traces, until_dropped) = mpsc::channel();
    let tracer = trace(traced, until_dropped);
    for name in ["connected", "traced"] {
        inside(&joey, name, "touch /tmp/ill");
    }
    let ignored = "Liveness probe failed, and does not count while";
    said(&joey, "connected", &[&format!("{ignored} a debugger is connected to port 80")]);
    said(&joey, "traced", &[&format!("{ignored} process {traced} is traced")]);
    // Several times that each would have been its end.
    pause(seconds(4));
    for name in ["connected", "traced"] {
        assert_eq!(told(&joey, name, "main")["restartCount"], 0, "{name}");
    }
    assert_eq!(joey.pid_of("traced.default"), traced);

    drop((connection, traces));
    tracer.join().expect("it could trace");
    for name in ["connected", "traced"] {
        until(&joey, name, "main", "was started again", |status| status["restartCount"] == 1);
        said(&joey, name, &["Container main failed liveness probe, will be restarted"]);
    }
}
