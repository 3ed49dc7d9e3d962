//! Networks on the real kernel, as root, with names and ranges of their own. Needs `nft`, `tc` and `ip`.

mod killed;
mod scene;
mod speed;

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use futures::StreamExt;
use joey_model::{ErrorKind, Fault, InstanceId};
use joey_network::{Bandwidth, Config, Networks};
use scene::{Outside, PATIENCE, SILENCE, config, greet, heard, inside, is_greeted, run, send_from, traces};

const UNLIMITED: Bandwidth = Bandwidth { ingress: None, egress: None, ingress_packets: None, egress_packets: None };

fn id(bits: u64) -> InstanceId {
    InstanceId::from_bits(bits)
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_reach_each_other_and_nothing_stays() {
    let config = config("a", 0, 24);
    let networks = Networks::open(config.clone()).await.unwrap();
    let a = networks.attach(&id(1), UNLIMITED).await.unwrap();
    let capped = Bandwidth { ingress: Some(50_000_000), egress: Some(50_000_000), ..UNLIMITED };
    let b = networks.attach(&id(2), capped).await.unwrap();
    assert_eq!(networks.attach(&id(1), UNLIMITED).await.unwrap(), a, "attach is idempotent");
    let (port, from) = greet(&b.netns);
    assert!(inside(&a.netns, move || is_greeted(b.address, port, PATIENCE)), "instance to instance");
    assert_eq!(from.join().unwrap(), a.address);
    let (port, _from) = greet(&a.netns);
    assert!(is_greeted(a.address, port, PATIENCE), "host to instance");
    let (received, sent) = networks.counters(&id(1)).await.unwrap();
    assert!((100..10_000).contains(&received) && (100..10_000).contains(&sent), "{received} {sent}");
    assert!(!traces(&config, &a.interface).is_empty());
    let held = traces(&config, &a.interface).iter().filter(|line| line.contains("/run/")).count();
    assert_eq!(held, 3, "the run directory, the holder in it and nothing else is mounted");
    networks.down().await.unwrap();
    assert_eq!(traces(&config, &a.interface), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_outside_sees_the_host_and_metadata_is_nobodys() {
    let config = config("c", 2, 24);
    let networks = Networks::open(config.clone()).await.unwrap();
    let outside = Outside::new("c", 2);
    let a = networks.attach(&id(1), UNLIMITED).await.unwrap();
    let (port, from) = greet(&outside.netns);
    let address = outside.address;
    assert!(inside(&a.netns, move || is_greeted(address, port, PATIENCE)), "instance to outside");
    assert_eq!(from.join().unwrap(), outside.host, "the source is the host's address");

    let metadata = "169.254.169.254";
    outside.run(format!("ip addr add {metadata}/32 dev out0"));
    run(&format!("ip route add {metadata}/32 dev {} src {}", outside.link, outside.host));
    let (port, _from) = greet(&outside.netns);
    let metadata = metadata.parse().unwrap();
    assert!(!inside(&a.netns, move || is_greeted(metadata, port, SILENCE)), "metadata is reached");
    assert!(is_greeted(metadata, port, PATIENCE), "control: it is there for the host");

    // Somebody outside who knows the way opens no connection into the range.
    outside.run(format!("ip route add {} via {}", config.range, outside.host));
    let (port, _from) = greet(&a.netns);
    assert!(!inside(&outside.netns, move || is_greeted(a.address, port, SILENCE)), "outside to instance");
    networks.down().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_false_source_is_dropped() {
    let networks = Networks::open(config("s", 3, 24)).await.unwrap();
    let a = networks.attach(&id(1), UNLIMITED).await.unwrap();
    let b = networks.attach(&id(2), UNLIMITED).await.unwrap();
    let victim = networks.attach(&id(3), UNLIMITED).await.unwrap();
    let socket = inside(&b.netns, || UdpSocket::bind("0.0.0.0:0").unwrap());
    let to = (b.address, socket.local_addr().unwrap().port()).into();
    let honest = a.address;
    inside(&a.netns, move || send_from(honest, to, "before"));
    assert_eq!(heard(&socket, PATIENCE).as_deref(), Some("before"), "control");
    for source in ["10.99.99.99".parse().unwrap(), victim.address, "192.0.2.77".parse().unwrap()] {
        inside(&a.netns, move || {
            run(&format!("ip addr add {source}/32 dev lo"));
            send_from(source, to, "false");
        });
        assert_eq!(heard(&socket, SILENCE), None, "{source}");
    }
    inside(&a.netns, move || send_from(honest, to, "after"));
    assert_eq!(heard(&socket, PATIENCE).as_deref(), Some("after"), "control");
    networks.down().await.unwrap();
}

/// Each instance is made while others are, and says its first word as soon as it is attached; each word is sent once.
#[tokio::test(flavor = "multi_thread")]
async fn no_first_packet_is_lost() {
    let networks = Networks::open(Config { prepared: 0, ..config("f", 10, 24) }).await.unwrap();
    let other = networks.attach(&id(0), UNLIMITED).await.unwrap();
    let host = UdpSocket::bind("0.0.0.0:0").unwrap();
    let listener = inside(&other.netns, || UdpSocket::bind("0.0.0.0:0").unwrap());
    let to = SocketAddr::new(other.address, listener.local_addr().unwrap().port());
    let fresh = futures::stream::iter(1..=100).map(async |bits| {
        let instance = networks.attach(&id(bits), UNLIMITED).await.unwrap();
        let (address, netns, other) = (instance.address, instance.netns.clone(), other.netns.clone());
        let host = host.try_clone().unwrap();
        let exchange = move || {
            let socket = inside(&netns, move || {
                let socket = UdpSocket::bind((address, 0)).unwrap();
                socket.send_to(b"out", to).unwrap();
                socket
            });
            let own = socket.local_addr().unwrap();
            host.send_to(b"host", own).unwrap();
            inside(&other, move || UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"peer", own).unwrap());
            [heard(&socket, PATIENCE), heard(&socket, PATIENCE)]
        };
        (address, tokio::task::spawn_blocking(exchange).await.unwrap())
    });
    let told: Vec<_> = fresh.buffer_unordered(8).collect().await;
    for (address, words) in &told {
        assert!(
            words.contains(&Some("host".to_owned())) && words.contains(&Some("peer".to_owned())),
            "into {address}: {words:?}"
        );
    }
    let mut silent: std::collections::HashSet<_> = told.iter().map(|(address, _)| *address).collect();
    let mut buffer = [0; 8];
    listener.set_read_timeout(Some(PATIENCE)).unwrap();
    while !silent.is_empty() {
        let (_, from) = listener.recv_from(&mut buffer).unwrap_or_else(|_| panic!("not heard of: {silent:?}"));
        silent.remove(&from.ip());
    }
    networks.down().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_range_says_so() {
    let config = config("b", 1, 29);
    let networks = Networks::open(config.clone()).await.unwrap();
    for bits in 0..5 {
        networks.attach(&id(bits), UNLIMITED).await.unwrap();
    }
    assert_eq!(networks.free(), 0);
    let fault: Fault = networks.attach(&id(9), UNLIMITED).await.unwrap_err().into();
    assert_eq!((fault.kind, fault.reason.as_str()), (ErrorKind::Exhausted, "AddressesExhausted"));
    assert!(fault.message.contains(&config.range.to_string()), "{}", fault.message);
    networks.release(&id(0)).await.unwrap();
    networks.release(&id(0)).await.unwrap();
    networks.attach(&id(9), UNLIMITED).await.unwrap();
    networks.down().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_the_host_routes_is_refused() {
    let outside = Outside::new("r", 4);
    let taken = Config { range: "198.18.4.128/25".parse().unwrap(), ..config("r", 4, 24) };
    let fault: Fault = Networks::open(taken.clone()).await.err().unwrap().into();
    assert_eq!(fault.kind, ErrorKind::Invalid);
    assert!(fault.message.contains("198.18.4.128/25 overlaps 198.18.4.0/24"), "{}", fault.message);
    assert!(!taken.run_dir.exists(), "nothing was set up");
    drop(outside);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_instance_attached_many_times_at_once_is_attached_once() {
    let networks = Networks::open(Config { prepared: 0, ..config("m", 5, 24) }).await.unwrap();
    let (one, free) = (id(1), networks.free());
    let all = futures::future::join_all((0..8).map(|_| networks.attach(&one, UNLIMITED))).await;
    let first = all[0].as_ref().unwrap();
    assert!(all.iter().all(|attachment| attachment.as_ref().unwrap() == first));
    assert_eq!(networks.free(), free - 1);
    let waiting = tokio::time::timeout(Duration::from_micros(50), networks.attach(&id(2), UNLIMITED)).await;
    assert!(waiting.is_err(), "the caller gave up");
    networks.attach(&id(2), UNLIMITED).await.unwrap();
    assert_eq!(networks.free(), free - 2);
    networks.down().await.unwrap();
}
