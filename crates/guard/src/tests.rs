//! Tests of the guard on a clock that jumps to whatever is waited for next.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// A service that fails while `sick` is not 0, and counts.
#[derive(Default)]
struct Peer {
    asked: AtomicUsize,
    under_way: AtomicUsize,
    most: AtomicUsize,
    sick: AtomicUsize,
}

impl Peer {
    async fn answer(&self, after: Option<Duration>) -> Result<(), Failed<String>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.most.fetch_max(self.under_way.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(10)).await;
        self.under_way.fetch_sub(1, Ordering::Relaxed);
        let sick = self.sick.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        match sick {
            Ok(_) => Err(Failed::Again { error: "it answered 503".to_owned(), after }),
            Err(_) => Ok(()),
        }
    }

    fn asked(&self) -> usize {
        self.asked.swap(0, Ordering::Relaxed)
    }
}

/// So many calls at once: how many had a result.
async fn calls(guard: &Arc<Guard>, peer: &Arc<Peer>, count: usize, after: Option<Duration>) -> usize {
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..count {
        let (guard, peer) = (guard.clone(), peer.clone());
        all.spawn(async move { guard.call("app", || peer.answer(after)).await.is_ok() });
    }
    all.join_all().await.into_iter().filter(|good| *good).count()
}

fn pair(limits: Limits) -> (Arc<Guard>, Arc<Peer>) {
    (Arc::new(Guard::new(limits)), Arc::default())
}

#[tokio::test(start_paused = true)]
async fn turns_come_at_a_rate_and_few_at_a_time() {
    let (guard, peer) = pair(Limits { patience: Duration::from_secs(60), ..Limits::default() });
    let began = Instant::now();
    assert_eq!(calls(&guard, &peer, 200, None).await, 200);
    let took = began.elapsed().as_secs_f64();
    // 40 at once, then 20 a second.
    assert!((7.9..9.0).contains(&took), "{took}");
    assert_eq!((peer.asked(), peer.most.load(Ordering::Relaxed)), (200, 4));
    // Others have a guard of their own.
    let began = Instant::now();
    guard.call("other", || peer.answer(None)).await.unwrap();
    assert!(began.elapsed() < Duration::from_millis(50));
}

#[tokio::test(start_paused = true)]
async fn who_would_wait_too_long_is_told_when() {
    let (guard, peer) = pair(Limits { patience: Duration::from_secs(1), ..Limits::default() });
    // 40 at once and 20 in the second after.
    assert_eq!(calls(&guard, &peer, 200, None).await, 60);
    let (guard, peer) = pair(Limits { patience: Duration::ZERO, burst: 1, ..Limits::default() });
    guard.call("app", || peer.answer(None)).await.unwrap();
    let Err(Refused::Held(held)) = guard.call("app", || peer.answer(None)).await else { panic!("it was called") };
    assert!(held.to_string().contains("more than 20 calls a second") && held.until > Timestamp::now(), "{held}");
}

#[tokio::test(start_paused = true)]
async fn a_failing_service_is_tried_again_and_then_left_alone() {
    let (guard, peer) = pair(Limits::default());
    peer.sick.store(2, Ordering::Relaxed);
    assert_eq!(calls(&guard, &peer, 1, None).await, 1, "the third try is good");
    assert_eq!(peer.asked(), 3);

    peer.sick.store(usize::MAX, Ordering::Relaxed);
    assert_eq!(calls(&guard, &peer, 200, None).await, 0);
    let asked = peer.asked();
    // Those that were under way already when the last of three failed are the only ones more.
    let limits = Limits::default();
    assert!((3..3 + limits.at_once).contains(&asked), "{asked}");
    // Whoever comes now is told what is wrong and when to come again.
    let Err(Refused::Held(held)) = guard.call("app", || peer.answer(None)).await else { panic!("it was called") };
    assert!(held.to_string().starts_with("it answered 503; its call guard lets the next call through at 2"), "{held}");
    assert_eq!(peer.asked(), 0);

    // One tries when the rest is over; each rest is longer.
    for rest in [40, 80, 160] {
        tokio::time::sleep(Duration::from_secs(rest)).await;
        assert_eq!(calls(&guard, &peer, 50, None).await, 0);
        assert_eq!(peer.asked(), 1);
    }
    peer.sick.store(0, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(calls(&guard, &peer, 30, None).await, 30, "it is well again");
}

#[tokio::test(start_paused = true)]
async fn a_named_time_is_heeded() {
    let (guard, peer) = pair(Limits::default());
    peer.sick.store(1, Ordering::Relaxed);
    let began = Instant::now();
    assert_eq!(calls(&guard, &peer, 1, Some(Duration::from_secs(7))).await, 1);
    assert!(began.elapsed() >= Duration::from_secs(7), "{:?}", began.elapsed());
    assert_eq!(peer.asked(), 2);

    // Nobody waits for longer than they have patience.
    peer.sick.store(1, Ordering::Relaxed);
    let began = Instant::now();
    assert_eq!(calls(&guard, &peer, 1, Some(Duration::from_secs(60))).await, 0);
    assert!(began.elapsed() < Duration::from_secs(1));
    tokio::time::sleep(Duration::from_secs(59)).await;
    assert_eq!((calls(&guard, &peer, 1, None).await, peer.asked()), (0, 1));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(calls(&guard, &peer, 1, None).await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_asks_for_no_rest_is_left_alone_all_the_same() {
    let (guard, peer) = pair(Limits::default());
    peer.sick.store(usize::MAX, Ordering::Relaxed);
    for _ in 0..20 {
        assert_eq!(calls(&guard, &peer, 1, Some(Duration::ZERO)).await, 0);
    }
    assert_eq!(peer.asked(), 3, "three in a row, and then none");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_stands_is_given_at_once_and_is_no_failure() {
    let (guard, _) = pair(Limits::default());
    for _ in 0..20 {
        let refused = guard.call("app", async || Err::<(), _>(Failed::Final("no".to_owned()))).await;
        assert_eq!(refused, Err(Refused::Failed("no".to_owned())));
    }
}

#[tokio::test(start_paused = true)]
async fn who_goes_away_while_trying_alone_is_in_nobodys_way() {
    let (guard, peer) = pair(Limits::default());
    peer.sick.store(3, Ordering::Relaxed);
    assert_eq!(calls(&guard, &peer, 1, None).await, 0);
    tokio::time::sleep(Duration::from_secs(6)).await;
    let given_up = guard.call("app", std::future::pending::<Result<(), Failed<String>>>);
    assert!(tokio::time::timeout(Duration::from_secs(1), given_up).await.is_err());
    assert_eq!(calls(&guard, &peer, 5, None).await, 5);
}

#[tokio::test(start_paused = true)]
async fn quiet_guards_are_forgotten() {
    let (guard, peer) = pair(Limits::default());
    for number in 0..2 * REMEMBERED {
        guard.call(&number.to_string(), || peer.answer(None)).await.unwrap();
    }
    assert!(lock(&guard.services).len() <= REMEMBERED);
}
