//! Frames of an interactive stream (exec, attach): what travels in the request and response bodies, both ways at once.
//!
//! A frame is one byte of channel, four bytes of payload length (big-endian, at most [`MAX_PAYLOAD`]) and the payload. The
//! caller sends [`STDIN`], [`RESIZE`] and [`CLOSE`]; the other side sends [`STDOUT`], [`STDERR`] and, last, one [`STATUS`].

use serde::{Deserialize, Serialize};

pub const STDIN: u8 = 0;
pub const STDOUT: u8 = 1;
pub const STDERR: u8 = 2;
/// Payload: [`ExecStatus`] as JSON; nothing follows it.
pub const STATUS: u8 = 3;
/// Payload: [`TerminalSize`] as JSON.
pub const RESIZE: u8 = 4;
/// No payload: the caller's standard input ended.
pub const CLOSE: u8 = 5;

/// The largest payload of one frame, in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// How a command in a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExecStatus {
    /// The exit code; 128 plus the signal's number where a signal ended it. Of a command that could not be started: 127 when its
    /// program is not there, 126 when that cannot be executed, `None` when something else was in the way.
    pub exit_code: Option<i32>,
    /// Why it could not be started; given only then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    #[serde(rename = "Width", alias = "width")]
    pub width: u16,
    #[serde(rename = "Height", alias = "height")]
    pub height: u16,
}

/// One frame as bytes. Payloads beyond [`MAX_PAYLOAD`] are the caller's to split; this cuts nothing.
pub fn encode(channel: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(channel);
    frame.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// A frame longer than [`MAX_PAYLOAD`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("frame of {0} bytes is longer than {MAX_PAYLOAD}")]
pub struct FrameTooLong(pub usize);

/// Collects bytes as they arrive and gives out whole frames.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 && self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        } else if self.start > MAX_PAYLOAD {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, if there is one: channel and payload.
    pub fn next_frame(&mut self) -> Result<Option<(u8, Vec<u8>)>, FrameTooLong> {
        let Some(head) = self.buffer.get(self.start..self.start + 5) else { return Ok(None) };
        let (channel, length) = (head[0], u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize);
        if length > MAX_PAYLOAD {
            return Err(FrameTooLong(length));
        }
        let Some(payload) = self.buffer.get(self.start + 5..self.start + 5 + length) else { return Ok(None) };
        let frame = (channel, payload.to_vec());
        self.start += 5 + length;
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_any_split() {
        let mut bytes = encode(STDIN, b"hello");
        bytes.extend(encode(CLOSE, b""));
        bytes.extend(encode(STDOUT, &vec![7; MAX_PAYLOAD]));
        for step in [1, 3, 5, 1000, bytes.len()] {
            let mut decoder = Decoder::default();
            let mut frames = Vec::new();
            for chunk in bytes.chunks(step) {
                decoder.push(chunk);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    frames.push((frame.0, frame.1.len()));
                }
            }
            assert_eq!(frames, [(STDIN, 5), (CLOSE, 0), (STDOUT, MAX_PAYLOAD)], "chunks of {step}");
        }
        let mut decoder = Decoder::default();
        decoder.push(&[STDIN, 0xff, 0xff, 0xff, 0xff]);
        assert!(decoder.next_frame().is_err());
    }
}
