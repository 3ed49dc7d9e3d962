//! Networks on the real kernel, as root, with names and ranges of their own.

use std::process::Command;

use joey_model::InstanceId;
use joey_network::{Bandwidth, Config, Networks};

fn config(tag: &str, third: u8, prefix: u8) -> Config {
    let process = std::process::id();
    Config {
        range: format!("10.{}.{third}.0/{prefix}", 200 + process % 50).parse().unwrap(),
        name: format!("t{tag}{process}"),
        prepared: 4,
        run_dir: format!("/run/joey-test-{tag}-{process}").into(),
    }
}

fn shell(line: &str) -> (bool, String) {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_reach_each_other_and_nothing_stays() {
    let config = config("a", 0, 24);
    let networks = Networks::open(config.clone()).await.unwrap();
    let (one, two) = (InstanceId::from_bits(1), InstanceId::from_bits(2));
    let a = networks.attach(&one, Bandwidth::default()).await.unwrap();
    let b = networks.attach(&two, Bandwidth { ingress: Some(5_000_000), egress: Some(5_000_000) }).await.unwrap();
    assert_eq!(networks.attach(&one, Bandwidth::default()).await.unwrap(), a);
    let inside = |netns: &std::path::Path, what: &str| shell(&format!("nsenter --net={} {what}", netns.display()));
    assert!(inside(&a.netns, &format!("ping -c1 -W2 {}", b.address)).0, "instance to instance");
    assert!(shell(&format!("ping -c1 -W2 {}", a.address)).0, "host to instance");
    inside(&a.netns, "ip address add 10.99.99.99/32 dev lo");
    assert!(!inside(&a.netns, &format!("ping -c1 -W1 -I 10.99.99.99 {}", b.address)).0, "a false source passes");
    drop(networks);
    let networks = Networks::open(config.clone()).await.unwrap();
    assert_eq!(networks.find(&one), Some(a), "a later life finds the attachment");
    networks.adopt(std::slice::from_ref(&one)).await.unwrap();
    assert_eq!(networks.find(&two), None);
    networks.down().await.unwrap();
    assert!(!config.run_dir.exists());
    assert!(!shell(&format!("nft list table ip {}", config.name)).0, "the table stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_range_says_so() {
    let networks = Networks::open(config("b", 1, 29)).await.unwrap();
    for bits in 0..5 {
        networks.attach(&InstanceId::from_bits(bits), Bandwidth::default()).await.unwrap();
    }
    let fault: joey_model::Fault =
        networks.attach(&InstanceId::from_bits(9), Bandwidth::default()).await.unwrap_err().into();
    assert_eq!(fault.reason, "AddressesExhausted");
    networks.release(&InstanceId::from_bits(0)).await.unwrap();
    networks.attach(&InstanceId::from_bits(9), Bandwidth::default()).await.unwrap();
    networks.down().await.unwrap();
}
