//! Numbers: what caps let through, and what attaching and releasing cost.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use joey_network::{Attachment, Bandwidth, Config, Networks};
use nix::sys::resource::{UsageWho, getrusage};

use crate::scene::{config, inside, pour, rate, start_inside};
use crate::{UNLIMITED, id};

/// Each way alone, then both at once: between nine and eleven tenths of the cap, headers not counted.
#[tokio::test(flavor = "multi_thread")]
async fn caps_let_through_what_they_say() {
    for (bits, cap) in [(1, 5_000_000), (3, 100_000_000), (5, 1_000_000_000)] {
        let networks = Networks::open(config("w", 8, 24)).await.unwrap();
        let caps = Bandwidth { ingress: Some(cap), egress: Some(cap), ..Bandwidth::default() };
        let a = networks.attach(&id(bits), caps).await.unwrap();
        let b = networks.attach(&id(bits + 1), UNLIMITED).await.unwrap();
        let start = |from: &Attachment, to: &Attachment| {
            let (address, from) = (to.address, from.netns.clone());
            let listener = inside(&to.netns, move || TcpListener::bind((address, 0)).unwrap());
            let send = move |to| start_inside(&from, move || pour(to)).join().unwrap();
            std::thread::spawn(move || rate(listener, Duration::from_secs(3), send) / cap as f64)
        };
        let alone = [start(&b, &a).join().unwrap(), start(&a, &b).join().unwrap()];
        let both = [start(&b, &a), start(&a, &b)].map(|one| one.join().unwrap());
        for (when, [into, out_of]) in [("alone", alone), ("both at once", both)] {
            println!("{} Mbit/s, {when}: into {into:.3}, out of {out_of:.3} of the cap", cap / 1_000_000);
            for share in [into, out_of] {
                assert!((0.9..=1.1).contains(&share), "{cap} bit/s, {when}: into {into}, out of {out_of}");
            }
        }
        networks.down().await.unwrap();
    }
}

fn cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let time = |value: nix::sys::time::TimeVal| Duration::new(value.tv_sec() as u64, value.tv_usec() as u32 * 1000);
    time(usage.user_time()) + time(usage.system_time())
}

/// Alone: `cargo test -p joey-network --test real_kernel -- --ignored --nocapture cost`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures, and wants the machine for itself"]
async fn cost() {
    const COUNT: u32 = 100;
    let prepared = Config { prepared: COUNT as usize, ..config("p", 9, 24) };
    let (start, used) = (Instant::now(), cpu());
    let networks = Networks::open(prepared).await.unwrap();
    while networks.ready() < COUNT as usize {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    println!("prepare: {:?}, cpu {:?}", start.elapsed() / COUNT, (cpu() - used) / COUNT);
    let used = cpu();
    let mut times = Vec::new();
    for bits in 0..20 {
        let start = Instant::now();
        networks.attach(&id(bits), UNLIMITED).await.unwrap();
        times.push(start.elapsed());
    }
    times.sort();
    println!("attach from prepared: median {:?}, worst {:?}, cpu {:?}", times[10], times[19], (cpu() - used) / 20);
    let caps = Bandwidth { ingress: Some(5_000_000), egress: Some(5_000_000), ..Bandwidth::default() };
    let start = Instant::now();
    networks.attach(&id(0), caps).await.unwrap();
    println!("caps both ways: {:?}", start.elapsed());
    for bits in 20..u64::from(COUNT) {
        networks.attach(&id(bits), UNLIMITED).await.unwrap();
    }
    let (start, used) = (Instant::now(), cpu());
    networks.adopt(&[]).await.unwrap();
    println!("release of {COUNT}: {:?}, cpu {:?}", start.elapsed(), cpu() - used);
    while networks.ready() < COUNT as usize {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (start, used) = (Instant::now(), cpu());
    for bits in 0..400 {
        networks.attach(&id(1000 + bits), UNLIMITED).await.unwrap();
        networks.release(&id(1000 + bits)).await.unwrap();
    }
    println!("attach and release, 400 in a row: {:?} each, cpu {:?}", start.elapsed() / 400, (cpu() - used) / 400);
    networks.down().await.unwrap();
}
