//! What the volumes of a running Pod hold, kept as they are to be: changes of ConfigMaps, Secrets and of the Pod's own labels and
//! annotations reach it, and tokens are replaced in time. What a virtual node before this one sent is not known, so that everything
//! is sent once after a start.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use joey_api::change::InstanceChange;
use joey_api::instance::{Instance, Volume, VolumeSource, WirePhase};
use joey_model::{ErrorKind, Fault};
use k8s_openapi::api::core::v1::Pod;

use super::Context;
use super::reconcile::warn;
use super::registry::Entry;
use joey_podspec::{Needs, Objects, TokenWish, Tokens};

use crate::resolve;

/// When a token that could not be replaced is tried again.
const AGAIN: SignedDuration = SignedDuration::from_secs(10);

/// Sends what a Pod's volumes hold, where that is something else than before.
pub(super) async fn renew(context: &Arc<Context>, uid: &str, pod: &Arc<Pod>, instance: &Instance) -> Result<(), Fault> {
    let needs = Needs::shown(pod);
    if matches!(instance.status.phase, WirePhase::Succeeded | WirePhase::Failed | WirePhase::Terminating) {
        context.shown.release(uid);
        return Ok(());
    }
    if needs.objects.is_empty() && needs.tokens.is_empty() && !needs.fields {
        return Ok(());
    }
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let Some(contents) = context.shown.hold(uid, namespace, &needs.objects) else { return Ok(()) };
    let tokens = tokens(context, uid, pod, &needs).await?;
    let made_from = source(pod, contents.revision, &tokens);
    if context.registry.read(uid, |entry| entry.files.made_from) == Some(Some(made_from)) {
        return Ok(());
    }
    let capacity = match needs.fields {
        true => Some(context.provider.capacity().await?),
        false => None,
    };
    let objects = Objects {
        values: contents.values.into_iter().map(|(key, values)| (key, Arc::unwrap_or_clone(values))).collect(),
        tokens,
        node_cpu_milli: capacity.as_ref().map_or(0, |capacity| capacity.cpu_milli),
        node_memory_bytes: capacity.as_ref().map_or(0, |capacity| capacity.memory_bytes),
        ..Objects::default()
    };
    let (volumes, missing) = joey_podspec::files(pod, &objects);
    for (volume, object) in missing {
        // As under the kubelet, what was there before stays.
        let message = format!("MountVolume.SetUp failed for volume \"{volume}\" : {object}");
        warn(context, uid, pod, "FailedMount", &message, Timestamp::now());
    }
    let files = brief(&volumes);
    if context.registry.read(uid, |entry| entry.files.sent) != Some(Some(files)) {
        let change = InstanceChange { volumes, ..InstanceChange::default() };
        match context.provider.change(&instance.id, &change).await {
            Ok(_) => tracing::debug!(uid, "contents of volumes were renewed"),
            // The watch says that it is gone.
            Err(fault) if fault.kind == ErrorKind::NotFound => return Ok(()),
            Err(fault) if fault.kind == ErrorKind::Invalid => {
                warn(context, uid, pod, "FailedMount", &fault.message, Timestamp::now());
            }
            Err(fault) => return Err(fault),
        }
    }
    context.registry.read(uid, |entry| {
        entry.files.made_from = Some(made_from);
        entry.files.sent = Some(files);
    });
    Ok(())
}

/// Takes note of what an instance was made with, as far as that is known.
pub(super) fn sent(context: &Context, uid: &str, files: Option<u64>) {
    context.registry.read(uid, |entry| {
        entry.files.sent = files;
        entry.files.made_from = None;
    });
}

/// Volumes of files in brief: another number means other contents.
pub(super) fn brief(volumes: &[Volume]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for volume in volumes {
        let VolumeSource::Files(files) = &volume.source else { continue };
        (&volume.name, files.len()).hash(&mut hasher);
        for file in files {
            (&file.path, &file.base64, file.mode, file.user).hash(&mut hasher);
        }
    }
    hasher.finish()
}

/// What a Pod's files are made from, in brief.
fn source(pod: &Pod, revision: u64, tokens: &Tokens) -> u64 {
    let mut hasher = DefaultHasher::new();
    (revision, &pod.metadata.labels, &pod.metadata.annotations).hash(&mut hasher);
    for (wish, token) in tokens {
        (wish, &token.text).hash(&mut hasher);
    }
    hasher.finish()
}

/// The Pod's tokens; those whose time has come are made anew. Where that fails, those that are good still stay, so that nothing
/// else that the Pod shows has to wait, and are tried again.
pub(super) async fn tokens(context: &Arc<Context>, uid: &str, pod: &Arc<Pod>, needs: &Needs) -> Result<Tokens, Fault> {
    let mut tokens = context.registry.read(uid, |entry| entry.files.tokens.clone()).unwrap_or_default();
    let now = Timestamp::now();
    let is_due = |wish: &&TokenWish| tokens.get(*wish).is_none_or(|token| token.due <= now);
    let due = needs.tokens.iter().filter(is_due).cloned().collect::<BTreeSet<_>>();
    if !due.is_empty() {
        match resolve::tokens(&context.client, &context.accounts, pod, &due).await {
            Ok(fresh) => tokens.extend(fresh),
            Err(fault) if put_off(&mut tokens, &due, now) => {
                tracing::warn!(uid, %fault, "tokens could not be renewed yet, those from before stay");
            }
            Err(fault) => return Err(fault),
        }
        context.registry.read(uid, |entry| entry.files.tokens = tokens.clone());
    }
    if let Some(first) = tokens.values().map(|token| token.due).min() {
        wake_at(context, uid, first);
    }
    Ok(tokens)
}

/// Has these tokens replaced later; false, and nothing is done: one of them is good no more.
fn put_off(tokens: &mut Tokens, due: &BTreeSet<TokenWish>, now: Timestamp) -> bool {
    let good = due.iter().all(|wish| tokens.get(wish).is_some_and(|token| token.expires > now));
    for token in tokens.values_mut().filter(|token| good && token.due <= now) {
        token.due = token.expires.min(now + AGAIN);
    }
    good
}

/// Has the Pod looked at when the first of its tokens is to be replaced.
fn wake_at(context: &Arc<Context>, uid: &str, at: Timestamp) {
    let is_sooner = |entry: &mut Entry| {
        let sooner = entry.files.waking.is_none_or(|known| at < known);
        if sooner {
            entry.files.waking = Some(at);
        }
        sooner
    };
    if context.registry.read(uid, is_sooner) != Some(true) {
        return;
    }
    let left = Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default();
    let (context, uid) = (context.clone(), uid.to_owned());
    tokio::spawn(async move {
        tokio::select! {
            () = context.shutdown.cancelled() => {}
            () = tokio::time::sleep(left) => {
                context.registry.read(&uid, |entry| entry.files.waking = None);
                context.wake(&uid);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_makes_another_content() {
        let volumes = |path: &str, text: &str, mode: u32| -> Vec<Volume> {
            let files = json!([{ "path": path, "base64": text, "mode": mode }]);
            serde_json::from_value(json!([{ "name": "e", "source": { "emptyDir": {} } },
                { "name": "v", "source": { "files": files } }]))
            .unwrap()
        };
        let first = brief(&volumes("a", "MQ==", 0o644));
        assert_eq!(first, brief(&volumes("a", "MQ==", 0o644)));
        for other in [volumes("b", "MQ==", 0o644), volumes("a", "Mg==", 0o644), volumes("a", "MQ==", 0o600), vec![]] {
            assert_ne!(first, brief(&other));
        }
        let mut pod = Pod::default();
        let before = source(&pod, 1, &Tokens::new());
        assert_ne!(before, source(&pod, 2, &Tokens::new()));
        pod.metadata.annotations = Some([("a".to_owned(), "b".to_owned())].into());
        assert_ne!(before, source(&pod, 1, &Tokens::new()));
    }
}
