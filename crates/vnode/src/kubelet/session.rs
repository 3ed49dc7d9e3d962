//! Between the provider's frames and the channels of Kubernetes' remote command protocol, whatever carries them.

use bytes::Bytes;
use futures::StreamExt;
use joey_api::frame::{self, Decoder, ExecStatus};
use serde_json::json;
use tokio::sync::mpsc;

use super::{Call, frames};

/// Channels as `v4.channel.k8s.io` numbers them.
pub(super) const STDIN: u8 = 0;
pub(super) const STDOUT: u8 = 1;
pub(super) const STDERR: u8 = 2;
pub(super) const ERROR: u8 = 3;
pub(super) const RESIZE: u8 = 4;

/// Runs a call: `input` are frames for the provider, `output` gets channel and bytes, the error channel last.
pub(super) async fn run(call: Call, input: mpsc::Receiver<Bytes>, output: mpsc::Sender<(u8, Vec<u8>)>) {
    let attach = call.attach;
    let status = match call.begin(frames(input)).await {
        Err(fault) => internal(&fault.message),
        Ok(mut bytes) => {
            let mut decoder = Decoder::default();
            let mut status = None;
            'stream: while let Some(chunk) = bytes.next().await {
                let Ok(chunk) = chunk else { break };
                decoder.push(&chunk);
                loop {
                    match decoder.next_frame() {
                        Ok(Some((frame::STATUS, payload))) => {
                            status = serde_json::from_slice::<ExecStatus>(&payload).ok();
                            break 'stream;
                        }
                        Ok(Some((channel @ (frame::STDOUT | frame::STDERR), payload))) => {
                            if output.send((channel, payload)).await.is_err() {
                                return;
                            }
                        }
                        Ok(Some(_)) => {}
                        Ok(None) => break,
                        Err(_) => break 'stream,
                    }
                }
            }
            status.map_or_else(|| internal("the stream to the container broke off"), |status| exit(&status, attach))
        }
    };
    let _ = output.send((ERROR, status.to_string().into_bytes())).await;
}

/// The Status object that tells how a command ended. One that never began is an internal error, as kubelets tell it.
fn exit(status: &ExecStatus, attach: bool) -> serde_json::Value {
    match (status.exit_code, &status.message) {
        (_, Some(message)) => internal(message),
        (None, None) => internal("the command could not be started"),
        // Who looked on sees that it ended; how, the Pod tells.
        (Some(_), None) if attach => json!({ "metadata": {}, "status": "Success" }),
        (Some(0), None) => json!({ "metadata": {}, "status": "Success" }),
        (Some(code), None) => json!({
            "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
        }),
    }
}

fn internal(message: &str) -> serde_json::Value {
    json!({ "metadata": {}, "status": "Failure", "reason": "InternalError", "message": message, "code": 500 })
}

/// Bytes from the client as frames for the provider; false: the provider no longer listens.
pub(super) async fn forward(input: &mpsc::Sender<Bytes>, channel: u8, bytes: &[u8]) -> bool {
    let channel = match channel {
        STDIN => frame::STDIN,
        RESIZE => frame::RESIZE,
        _ => return true,
    };
    for part in bytes.chunks(frame::MAX_PAYLOAD) {
        if input.send(Bytes::from(frame::encode(channel, part))).await.is_err() {
            return false;
        }
    }
    true
}

/// Says that the client's standard input ended.
pub(super) async fn close(input: &mpsc::Sender<Bytes>) {
    let _ = input.send(Bytes::from(frame::encode(frame::CLOSE, &[]))).await;
}
