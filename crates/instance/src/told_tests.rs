//! States that an agent which was taken over may tell, by the thousand: nothing breaks, and what comes of them is of bounded size.

use std::collections::BTreeMap;

use jiff::ToSpan;
use joey_api::instance::InstanceStatus;
use joey_model::InstanceId;
use serde_json::{Map, Value, json};

use super::*;
use crate::persist::Record;
use crate::status;

/// Bytes of a status that comes of a specification with two containers, whatever the agent says.
const MOST: usize = 128 << 10;

/// A generator of numbers that need not be good: xorshift64.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % below.max(1) as u64).unwrap()
    }

    fn of<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())].clone()
    }

    /// Runs so often with a seed of its own, which a failure prints.
    fn rounds(first: u64, count: u64, mut round: impl FnMut(&mut Self)) {
        for seed in first..first + count {
            println!("seed {seed}");
            round(&mut Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1));
        }
    }
}

fn text(numbers: &mut Numbers) -> Value {
    let short = ["", "a", "b", "Error", "Completed", "joey://x", "../../..", "\0", "\u{202e}", "a\nb\r\n", "\u{1b}[2J"];
    match numbers.below(6) {
        0 => "ü".repeat(numbers.below(100_000)).into(),
        1 => "x".repeat(numbers.of(&[127, 128, 129, 1023, 1025, 4095, 4097])).into(),
        _ => numbers.of(&short).into(),
    }
}

fn time(numbers: &mut Numbers) -> Value {
    let near = Timestamp::now() + (numbers.below(7200) as i64 - 3600).seconds();
    let far =
        ["-009999-01-02T01:59:59Z", "9999-12-30T22:00:00.999999999Z", "1970-01-01T00:00:00Z", "0000-01-01T00:00:00Z"];
    if numbers.below(2) == 0 { near.to_string().into() } else { numbers.of(&far).into() }
}

fn number(numbers: &mut Numbers) -> Value {
    numbers.of(&[
        json!(0),
        json!(1),
        json!(137),
        json!(i32::MAX),
        json!(u32::MAX),
        json!(u64::MAX),
        json!(-1),
        json!(1.5),
    ])
}

fn end(numbers: &mut Numbers) -> Value {
    json!({"exitCode": numbers.of(&[0, 1, 137, i32::MAX, i32::MIN]), "signal": numbers.of(&[json!(null), json!(9), json!(-7)]),
        "reason": text(numbers), "message": text(numbers), "startedAt": time(numbers), "finishedAt": time(numbers)})
}

fn container(numbers: &mut Numbers) -> Value {
    let state = match numbers.below(3) {
        0 => json!({"waiting": {"reason": text(numbers), "message": text(numbers)}}),
        1 => json!({"running": {"startedAt": time(numbers), "pid": numbers.of(&[0, 1, u32::MAX])}}),
        _ => json!({"terminated": end(numbers)}),
    };
    let last = if numbers.below(2) == 0 { end(numbers) } else { Value::Null };
    json!({"name": text(numbers), "state": state, "lastTermination": last, "restartCount": numbers.of(&[0, 3, u32::MAX]),
        "runningSince": time(numbers), "started": numbers.below(2) == 0, "ready": numbers.below(2) == 0,
        "imageId": text(numbers), "image": text(numbers),
        "resources": {"memoryBytes": numbers.of(&[0, u64::MAX]), "cpuMilli": numbers.of(&[0, u64::MAX])}})
}

/// A state of the right structure with wrong contents.
fn state(numbers: &mut Numbers) -> Value {
    let many = numbers.of(&[0, 1, 2, 5, 40, 3000]);
    let mut whole = 0;
    let mut list = |numbers: &mut Numbers, count: usize, one: &dyn Fn(&mut Numbers) -> Value| -> Vec<Value> {
        let made = (0..count).map(|_| one(numbers));
        made.take_while(|one| {
            whole += one.to_string().len();
            whole < 2 << 20
        })
        .collect()
    };
    let event = |numbers: &mut Numbers| json!({"at": time(numbers), "warning": true, "reason": text(numbers), "message": text(numbers), "container": text(numbers)});
    let containers = list(numbers, many, &container);
    let count = numbers.of(&[0, 31, 33, 5000]);
    let events = list(numbers, count, &event);
    let mut state = json!({"version": numbers.of(&[0, 1, 2]), "sequence": numbers.of(&[0, 7, u64::MAX]),
        "containers": containers, "events": events, "stopping": numbers.below(4) == 0});
    if numbers.below(3) == 0 {
        state["failed"] = json!({"reason": text(numbers), "message": text(numbers)});
    }
    if numbers.below(3) == 0 {
        state["deadline"] = time(numbers);
    }
    state
}

/// Puts something else at a place of a value.
fn mutate(numbers: &mut Numbers, value: &mut Value) {
    let inner: Vec<&mut Value> = match value {
        Value::Array(items) => items.iter_mut().collect(),
        Value::Object(fields) => fields.values_mut().collect(),
        _ => Vec::new(),
    };
    let count = inner.len();
    if count > 0 && numbers.below(5) != 0 {
        let at = numbers.below(count);
        return mutate(numbers, inner.into_iter().nth(at).unwrap());
    }
    *value = match numbers.below(5) {
        0 => Value::Null,
        1 => text(numbers),
        2 => number(numbers),
        3 => Value::Array(vec![json!({}); numbers.below(50)]),
        _ => Value::Object(Map::from_iter([("waiting".to_owned(), text(numbers))])),
    };
}

fn record() -> Record {
    let spec =
        json!({"name": "i", "containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i", "role": "Debug"}]});
    Record::new(serde_json::from_value(spec).unwrap())
}

/// What a status may say whatever it was made of.
#[track_caller]
fn check(status: &InstanceStatus) {
    let whole = serde_json::to_vec(status).unwrap();
    assert!(whole.len() < MOST, "{} bytes", whole.len());
    assert!(status.events.len() <= 32 && status.containers.len() == 2);
    let latest = Timestamp::now() + 2.hours();
    let may = |at: Timestamp| assert!((Timestamp::UNIX_EPOCH..latest).contains(&at), "{at}");
    status.events.iter().for_each(|event| may(event.at));
    for container in &status.containers {
        assert!(i32::try_from(container.restart_count).is_ok());
        let ends = [
            container.last_termination.as_ref(),
            match &container.state {
                ContainerState::Terminated(end) => Some(end),
                _ => None,
            },
        ];
        for end in ends.into_iter().flatten() {
            may(end.finished_at);
            end.started_at.into_iter().for_each(may);
        }
        if let ContainerState::Running { started_at, .. } = &container.state {
            may(*started_at);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn states_of_any_kind_are_no_harm() {
    let (record, mut understood, id) = (record(), 0, InstanceId::from_bits(7));
    let mut status = status::waiting(&record, "h", "ContainerCreating", "");
    let mut listener = Listener::new();
    let before = BTreeMap::from([("a".to_owned(), u32::MAX), ("b".to_owned(), 1)]);
    Numbers::rounds(1, 150, |numbers| {
        let mut told = state(numbers);
        for _ in 0..numbers.of(&[0, 0, 1, 3]) {
            mutate(numbers, &mut told);
        }
        let mut bytes = serde_json::to_vec(&told).unwrap();
        if numbers.below(8) == 0 && !bytes.is_empty() {
            let at = numbers.below(bytes.len());
            bytes[at] ^= 1 << numbers.below(8);
        }
        let Ok(told) = serde_json::from_slice::<AgentState>(&bytes) else { return };
        understood += 1;
        let heard = listener.hear(told);
        status::apply(&mut status, "i-0", &record.spec, &before, &heard);
        status.events = status::events(&[], &heard.events);
        check(&status);
        status::lost(&mut status.clone(), &status::fault_of(&id, None));
    });
    assert!(understood > 50, "{understood} of 150 were states at all");
}

fn event(at: Timestamp, message: &str) -> InstanceEvent {
    InstanceEvent { at, warning: true, reason: "R".to_owned(), message: message.to_owned(), container: None }
}

fn with_events(events: Vec<InstanceEvent>) -> AgentState {
    let state = json!({"version": 1, "sequence": 1, "containers": [], "events": [], "stopping": false});
    AgentState { events, ..serde_json::from_value(state).unwrap() }
}

#[test]
fn what_the_host_tells_is_not_pushed_out() {
    let now = Timestamp::now();
    let ours: Vec<_> = (0..20).map(|number| event(now, &format!("host {number}"))).collect();
    let theirs: Vec<_> = (0..5000).map(|number| event(now + 30.minutes(), &format!("agent {number}"))).collect();
    let all = status::events(&ours, &bounded(with_events(theirs)).events);
    let of = |who: &str| all.iter().filter(|event| event.message.starts_with(who)).count();
    assert_eq!((of("host"), of("agent"), all.len()), (16, 16, 32));
    assert!(
        all.iter().any(|event| event.message == "host 19") && all.iter().any(|event| event.message == "agent 4999")
    );
    assert_eq!(status::events(&ours, &[]).len(), 20);
    // What has not happened yet would be the last event for ever.
    assert!(bounded(with_events(vec![event(now + 48.hours(), "later")])).events.is_empty());
}

#[tokio::test(start_paused = true)]
async fn who_says_too_much_is_heard_later() {
    let mut listener = Listener::new();
    let mut states = futures::stream::iter((0..2000_u32).map(|number| {
        with_events((0..32).map(|one| event(Timestamp::UNIX_EPOCH, &format!("{number} {one}"))).collect())
    }));
    let (began, mut heard, mut news) = (Instant::now(), 0, 0);
    while let Some(state) = listener.next(&mut states).await {
        news += listener.hear(state).events.len();
        heard += 1;
        if heard == 256 {
            assert_eq!(began.elapsed(), Duration::ZERO, "a start is not slowed down");
        }
    }
    assert!(heard == 2000 && began.elapsed() > Duration::from_secs(80), "{heard} after {:?}", began.elapsed());
    assert!((128..400).contains(&news), "{news} new events");
    // After a rest it is heard at once again, as the honest are.
    tokio::time::sleep(Duration::from_secs(60)).await;
    let rested = Instant::now();
    for number in 0..200 {
        let mut states = futures::stream::iter([with_events(vec![event(Timestamp::UNIX_EPOCH, &number.to_string())])]);
        let state = listener.next(&mut states).await.unwrap();
        listener.hear(state);
    }
    assert_eq!(rested.elapsed(), Duration::ZERO);
}
