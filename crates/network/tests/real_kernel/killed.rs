//! Daemons that end without a word, at every durable step, and what the next life makes of what they left.

use std::process::Command;

use joey_model::checkpoint;
use joey_network::{Bandwidth, CHECKPOINTS, Config, Networks};

use crate::scene::{PATIENCE, config, greet, inside, is_greeted, run, traces};
use crate::{UNLIMITED, id};

const CAPS: Bandwidth = Bandwidth {
    ingress: Some(5_000_000),
    egress: Some(5_000_000),
    ingress_packets: None,
    egress_packets: Some(100_000),
};

#[tokio::test(flavor = "multi_thread")]
async fn a_later_life_finds_what_was_attached() {
    let config = config("k", 6, 24);
    let networks = Networks::open(config.clone()).await.unwrap();
    let a = networks.attach(&id(1), UNLIMITED).await.unwrap();
    let b = networks.attach(&id(2), CAPS).await.unwrap();
    drop(networks);
    let networks = Networks::open(config.clone()).await.unwrap();
    assert_eq!(networks.find(&id(1)).as_ref(), Some(&a), "same path, same address");
    assert_eq!(networks.find(&id(2)).as_ref(), Some(&b));
    let (port, _from) = greet(&a.netns);
    assert!(inside(&b.netns, move || is_greeted(a.address, port, PATIENCE)));
    networks.adopt(&[id(1)]).await.unwrap();
    assert_eq!(networks.find(&id(2)), None, "not in use");
    assert!(networks.find(&id(1)).is_some());
    networks.down().await.unwrap();
    assert_eq!(traces(&config, &a.interface), Vec::<String>::new());
}

/// The daemon that is killed: this same program, run again for this test alone.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by the test below, in a process of its own"]
async fn victim() {
    let variable = |name: &str| std::env::var(name).unwrap();
    let (name, range) = (variable("VICTIM_NAME"), variable("VICTIM_RANGE").parse().unwrap());
    let config = Config { range, name, prepared: 1, run_dir: variable("VICTIM_DIR").into() };
    let networks = Networks::open(config).await.unwrap();
    networks.attach(&id(1), UNLIMITED).await.unwrap();
    checkpoint::arm(variable("VICTIM_STEP"));
    for bits in 2..5 {
        networks.attach(&id(bits), CAPS).await.unwrap();
        networks.release(&id(bits)).await.unwrap();
    }
    panic!("the step was not reached");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step() {
    for step in CHECKPOINTS {
        let config = config("v", 7, 24);
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "killed::victim"])
            .env("VICTIM_NAME", &config.name)
            .env("VICTIM_RANGE", config.range.to_string())
            .env("VICTIM_DIR", &config.run_dir)
            .env("VICTIM_STEP", step)
            .output()
            .unwrap();
        assert!(output.status.code().is_none(), "{step}: {}", String::from_utf8_lossy(&output.stdout));
        let networks = Networks::open(config.clone()).await.unwrap();
        let survivor = networks.find(&id(1)).expect("what was attached stays");
        for bits in 2..5 {
            let Some(attachment) = networks.find(&id(bits)) else { continue };
            // Found means whole, caps included, although nobody asked for them again.
            let queues = run(&format!("tc qdisc show dev {}", attachment.interface));
            assert!(queues.contains("tbf") && queues.contains("ingress"), "{step}: {queues}");
        }
        let b = networks.attach(&id(2), CAPS).await.unwrap();
        let (port, _from) = greet(&b.netns);
        assert!(inside(&survivor.netns, move || is_greeted(b.address, port, PATIENCE)), "{step}");
        networks.adopt(&[id(1)]).await.unwrap();
        networks.down().await.unwrap();
        assert_eq!(traces(&config, &survivor.interface), Vec::<String>::new(), "{step}");
    }
}
