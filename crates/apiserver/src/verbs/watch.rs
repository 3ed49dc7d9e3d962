//! Watch: the changes of a collection as a stream of JSON lines.
//!
//! ```text
//!   start ──► initial objects (no version, or asked for) ──► changes … ──► end
//!                                    │                          │  time is up, the server drains, history is lost,
//!                              bookmark "initial-events-end"    │  the client goes
//! ```
//! A change is judged by the selector before and after: an object that begins to match is added, one that ceases is deleted.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Call;
use super::list;
use crate::cache::{Cache, Change};
use crate::kinds::Resource;
use crate::object::Object;
use crate::selector::Selector;
use crate::status::{ApiError, ApiResult, FieldFault, bytes_response};
use crate::table::{self, Form};
use crate::{Body, State};

/// How often a watcher that asked for bookmarks hears of progress when nothing changes.
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// Bytes of changes put into one piece of the body.
const CHUNK: usize = 256 << 10;

struct Watcher {
    cache: Arc<Cache>,
    resource: &'static Resource,
    selector: Selector,
    prefix: String,
    name: String,
    form: Form,
    bookmarks: bool,
    /// Everything up to this revision is sent.
    after: u64,
    initial: VecDeque<Arc<Object>>,
    /// The mark that ends the initial objects is still to be sent.
    end_mark: bool,
    /// Column definitions go out with the first row only.
    headers_sent: bool,
    deadline: Instant,
    next_bookmark: Instant,
    progress: tokio::sync::watch::Receiver<u64>,
    draining: CancellationToken,
    ended: bool,
}

pub async fn watch(state: &State, call: &Call<'_>, draining: CancellationToken) -> ApiResult<Response<Body>> {
    let form = table::form(call.headers, call.query)?;
    let selector = list::selector(call)?;
    let resource = call.target.resource;
    let bookmarks = call.query.flag("allowWatchBookmarks");
    let number = list::number(call.query.get("resourceVersion").unwrap_or_default())?;
    let send_initial = initial_events(call)?;
    let (initial, after) = if send_initial.unwrap_or(number == 0) {
        let snapshot = list::snapshot(call, &selector, number).await?;
        (snapshot.objects.into(), snapshot.revision)
    } else {
        let after = if number == 0 { state.cache.caught_up(0).await? } else { number };
        // Too old: said at once, as a response of its own.
        state.cache.changes(resource, after)?;
        (VecDeque::new(), after)
    };
    let now = Instant::now();
    // Half an hour to an hour when the client names no time, so that watches do not all end at once.
    let seconds = call
        .query
        .number::<u64>("timeoutSeconds")?
        .filter(|s| *s > 0)
        .unwrap_or_else(|| 1800 + rand::random_range(0..1800));
    let watcher = Watcher {
        cache: state.cache.clone(),
        resource,
        prefix: match (resource.namespaced, call.target.namespace.as_str()) {
            (true, "") | (false, _) => resource.prefix(),
            (true, namespace) => resource.key(namespace, ""),
        },
        name: call.target.name.clone(),
        selector,
        form,
        bookmarks,
        after,
        initial,
        end_mark: send_initial == Some(true) && bookmarks,
        headers_sent: false,
        deadline: now + Duration::from_secs(seconds.min(24 * 3600)),
        next_bookmark: now + BOOKMARK_EVERY,
        progress: state.cache.progress(),
        draining,
        ended: false,
    };
    let stream = futures::stream::unfold(watcher, |mut watcher| async move {
        let chunk = watcher.next().await?;
        Some((Ok::<_, std::io::Error>(Frame::data(chunk)), watcher))
    });
    let mut response = bytes_response(StatusCode::OK, form.watch_media_type(), Bytes::new());
    *response.body_mut() = StreamBody::new(stream).boxed_unsync();
    Ok(response)
}

/// `sendInitialEvents`, with the rules that Kubernetes puts on it.
fn initial_events(call: &Call<'_>) -> ApiResult<Option<bool>> {
    let asked = call.query.get("sendInitialEvents");
    let rule = call.query.get("resourceVersionMatch").unwrap_or_default();
    let field = "resourceVersionMatch";
    let mut faults = Vec::new();
    if asked.is_none() && !rule.is_empty() {
        let why = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
        faults.push(FieldFault::forbidden(field, why));
    }
    if asked.is_some() && rule != "NotOlderThan" {
        let why = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
        faults.push(FieldFault::forbidden(field, why));
        if !rule.is_empty() {
            faults.push(FieldFault::unsupported(field, rule, &["NotOlderThan"]));
        }
    }
    match faults.is_empty() {
        true => Ok(asked.map(|text| !matches!(text, "false" | "0"))),
        false => Err(ApiError::invalid_options("watch", &faults)),
    }
}

impl Watcher {
    /// The next piece of the body; nothing when the watch is over.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if self.ended {
                return None;
            }
            let mut out = Vec::new();
            self.initial_objects(&mut out);
            if out.is_empty() {
                self.changes(&mut out);
            }
            if !out.is_empty() {
                return Some(out.into());
            }
            let wait_until = if self.bookmarks { self.deadline.min(self.next_bookmark) } else { self.deadline };
            tokio::select! {
                changed = self.progress.changed() => if changed.is_err() { return None },
                () = self.draining.cancelled() => return None,
                () = tokio::time::sleep_until(wait_until) => {
                    let now = Instant::now();
                    self.ended = now >= self.deadline;
                    if self.bookmarks {
                        self.next_bookmark = now + BOOKMARK_EVERY;
                        self.bookmark(&mut out, false);
                        return Some(out.into());
                    }
                }
            }
        }
    }

    fn initial_objects(&mut self, out: &mut Vec<u8>) {
        while out.len() < CHUNK {
            let Some(object) = self.initial.pop_front() else { break };
            self.event(out, "ADDED", &object, object.revision);
        }
        if self.initial.is_empty() && self.end_mark {
            self.end_mark = false;
            self.bookmark(out, true);
        }
    }

    fn changes(&mut self, out: &mut Vec<u8>) {
        // Marked before the look, so that what comes in between wakes the wait.
        self.progress.borrow_and_update();
        match self.cache.changes(self.resource, self.after) {
            Ok((changes, reached)) => {
                for change in &changes {
                    self.change(out, change);
                }
                self.after = reached;
            }
            Err(error) => {
                line(out, &json!({"type": "ERROR", "object": error.status()}));
                self.ended = true;
            }
        }
    }

    fn change(&mut self, out: &mut Vec<u8>, change: &Change) {
        let matches = |object: &&Arc<Object>| {
            object.key.starts_with(&self.prefix)
                && (self.name.is_empty() || object.name() == self.name)
                && self.selector.matches(self.resource, object)
        };
        let before = change.before.as_ref().filter(matches).cloned();
        let after = change.after.as_ref().filter(matches).cloned();
        match (before, after) {
            (None, None) => {}
            (None, Some(object)) => self.event(out, "ADDED", &object, change.revision),
            (Some(_), Some(object)) => self.event(out, "MODIFIED", &object, change.revision),
            (Some(object), None) => self.event(out, "DELETED", &object, change.revision),
        }
    }

    fn event(&mut self, out: &mut Vec<u8>, kind: &str, object: &Object, revision: u64) {
        if self.form == Form::Plain && self.resource.stored_as.is_none() {
            out.extend_from_slice(format!("{{\"type\":\"{kind}\",\"object\":").as_bytes());
            object.write(out, revision);
            out.extend_from_slice(b"}\n");
            return;
        }
        let value = crate::convert::outgoing(self.resource, object.value(revision));
        let shown = self.shown(value, revision);
        line(out, &json!({"type": kind, "object": shown}));
    }

    fn shown(&mut self, value: Value, revision: u64) -> Value {
        match self.form {
            Form::Plain => value,
            Form::Metadata => table::metadata_only(&value, true),
            Form::Table(include) => {
                let row = table::row(self.resource, &value, include);
                let headers = !std::mem::replace(&mut self.headers_sent, true);
                table::table(self.resource, json!({"resourceVersion": revision.to_string()}), vec![row], headers)
            }
        }
    }

    fn bookmark(&mut self, out: &mut Vec<u8>, initial_end: bool) {
        let mut metadata = json!({"resourceVersion": self.after.to_string()});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = match self.form {
            Form::Plain => json!({"kind": self.resource.kind, "apiVersion": self.resource.api_version(),
                "metadata": metadata}),
            Form::Metadata => json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
                "metadata": metadata}),
            Form::Table(_) => table::table(self.resource, metadata, Vec::new(), false),
        };
        line(out, &json!({"type": "BOOKMARK", "object": object}));
    }
}

fn line(out: &mut Vec<u8>, value: &Value) {
    out.extend_from_slice(value.to_string().as_bytes());
    out.push(b'\n');
}
