//! A record as a sink gets it: one line of JSON, from one line of a segment (`TIME STREAM P|F TEXT`, the CRI's).

use std::collections::BTreeMap;

use serde::Serialize;

use crate::plan::{Plan, Stream};

#[derive(Serialize)]
struct Record<'a> {
    time: &'a str,
    instance: &'a str,
    #[serde(flatten)]
    fields: &'a BTreeMap<String, String>,
    container: &'a str,
    source: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream: Option<&'a str>,
    /// The file, and where in it the line begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    tags: &'a BTreeMap<String, String>,
    message: &'a str,
    /// The line goes on in the next record of the same stream or file.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    partial: bool,
    /// So many records before this one are lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    lost: Option<u64>,
}

/// Appends the record of a segment's line; nothing for one that is not asked for.
pub(crate) fn write(out: &mut Vec<u8>, plan: &Plan, stream: &Stream, line: &[u8]) {
    let mut words = line.strip_suffix(b"\n").unwrap_or(line).splitn(4, |byte| *byte == b' ');
    let (Some(time), Some(word), Some(flag), Some(text)) = (words.next(), words.next(), words.next(), words.next())
    else {
        return;
    };
    let (time, word, text) =
        (String::from_utf8_lossy(time), String::from_utf8_lossy(word), String::from_utf8_lossy(text));
    if stream.only.as_ref().is_some_and(|only| *only != word) {
        return;
    }
    let mut record = plain(plan, stream, &time, &text);
    record.partial = flag == b"P";
    if stream.files.is_some() {
        // INODE:OFFSET:PATH
        let mut parts = word.splitn(3, ':').skip(1);
        record.offset = parts.next().and_then(|offset| offset.parse().ok());
        record.path = parts.next().map(unescaped);
    } else {
        record.stream = Some(&word);
    }
    push(out, &record);
}

/// Appends the record that says how many before it are lost.
pub(crate) fn write_lost(out: &mut Vec<u8>, plan: &Plan, stream: &Stream, lost: u64, why: &str) {
    let (time, text) = (format!("{:.9}", jiff::Timestamp::now()), format!("{lost} records are lost: {why}"));
    let mut record = plain(plan, stream, &time, &text);
    record.lost = Some(lost);
    push(out, &record);
}

fn plain<'a>(plan: &'a Plan, stream: &'a Stream, time: &'a str, message: &'a str) -> Record<'a> {
    Record {
        time,
        instance: &plan.instance,
        fields: &plan.fields,
        container: &stream.container,
        source: &stream.name,
        stream: None,
        path: None,
        offset: None,
        tags: &stream.tags,
        message,
        partial: false,
        lost: None,
    }
}

fn push(out: &mut Vec<u8>, record: &Record<'_>) {
    let begin = out.len();
    match serde_json::to_writer(&mut *out, record) {
        Ok(()) => out.push(b'\n'),
        // A map with text for keys always has a form.
        Err(error) => {
            out.truncate(begin);
            tracing::error!(%error, "record cannot be written");
        }
    }
}

/// `%XX` as the byte it stands for.
fn unescaped(word: &str) -> String {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let byte = after.get(..2).and_then(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok());
        match (first, byte) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use joey_api::logs::{LogSource, Logs};
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn records_in_json() {
        let source = |name: &str, from: &str| LogSource {
            name: name.to_owned(),
            from: from.to_owned(),
            tags: BTreeMap::from([("team".to_owned(), "a".to_owned())]),
            ..LogSource::default()
        };
        let fields = BTreeMap::from([("pod".to_owned(), "web-1".to_owned())]);
        let logs = Logs { sink: None, sources: vec![source("o", "stderr-only"), source("f", "/l/*")], fields };
        let (plan, _) = Plan::new("i-1", &logs, &[("web".to_owned(), Vec::new())], |_| Ok("s".to_owned()));
        let mut out = Vec::new();
        write(&mut out, &plan, &plan.streams[0], b"2026-01-01T00:00:00.000000001Z stdout F not asked for\n");
        write(&mut out, &plan, &plan.streams[0], b"no record\n");
        write(&mut out, &plan, &plan.streams[0], b"2026-01-01T00:00:00.000000001Z stderr P a \"b\" \xff\n");
        write(&mut out, &plan, &plan.streams[1], b"2026-01-01T00:00:00.000000002Z 77:12:/l/a%20b:c F x\n");
        write_lost(&mut out, &plan, &plan.streams[1], 3, "because");
        let text = String::from_utf8(out).unwrap();
        let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let base = json!({"instance": "i-1", "pod": "web-1", "container": "web", "tags": {"team": "a"}});
        let with = |more: Value| {
            let mut all = base.clone();
            all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            all
        };
        let first = json!({"time": "2026-01-01T00:00:00.000000001Z", "source": "o", "stream": "stderr", "message": "a \"b\" \u{fffd}", "partial": true});
        assert_eq!(lines[0], with(first));
        let second = json!({"time": "2026-01-01T00:00:00.000000002Z", "source": "f", "path": "/l/a b:c", "offset": 12, "message": "x"});
        assert_eq!(lines[1], with(second));
        lines[2].as_object_mut().unwrap().remove("time");
        assert_eq!(lines[2], with(json!({"source": "f", "message": "3 records are lost: because", "lost": 3})));
        assert_eq!(lines.len(), 3);
    }
}
