//! Sinks: what takes batches of records. The file is here, HTTP and Kafka have files of their own.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::http::Http;
use crate::kafka::Kafka;

/// A sink as the host's owner configures it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SinkSettings {
    File(FileSettings),
    Http(HttpSettings),
    Kafka(KafkaSettings),
}

/// `joey.ndjson` in a directory, and those before it as `joey.ndjson.1` …
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSettings {
    pub directory: PathBuf,
    pub max_bytes: u64,
    pub max_files: u32,
}

/// POST of batches, a record a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpSettings {
    pub url: String,
    /// Holds a bearer token; read for each request.
    pub token_file: Option<PathBuf>,
    /// Authorities for the server's certificate, in place of the host's.
    pub ca_file: Option<PathBuf>,
}

/// A topic; records of one source are in one partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KafkaSettings {
    pub brokers: Vec<String>,
    pub topic: String,
    /// For SASL PLAIN, and the file that holds the password.
    pub user: Option<(String, PathBuf)>,
    /// Authorities for the brokers' certificates; without it there is no TLS.
    pub ca_file: Option<PathBuf>,
}

/// Why a batch was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The sink is not there or not well: the same again, later.
    Later(String),
    /// It answers, and does not take this now: it is not well, or does not bear this.
    NotNow(String),
    /// It will never take this.
    Never(String),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::Later(error.to_string())
    }
}

/// Records as lines of JSON, and which source each is of.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) body: Vec<u8>,
    /// The end of each record and the number of its key.
    lines: Vec<(usize, usize)>,
    keys: Vec<String>,
}

impl Batch {
    /// What `write` appends is of the source `key`.
    pub(crate) fn of(&mut self, key: &str, write: impl FnOnce(&mut Vec<u8>)) {
        let begin = self.body.len();
        write(&mut self.body);
        if self.body.len() == begin {
            return;
        }
        if self.keys.last().is_none_or(|last| last != key) {
            self.keys.push(key.to_owned());
        }
        let ends = self.body[begin..].iter().enumerate().filter(|(_, byte)| **byte == b'\n');
        self.lines.extend(ends.map(|(at, _)| (begin + at + 1, self.keys.len() - 1)));
    }

    /// How many records there are.
    pub(crate) fn len(&self) -> usize {
        self.lines.len()
    }

    pub(crate) fn key(&self, record: usize) -> &str {
        &self.keys[self.lines[record].1]
    }

    fn bounds(&self, records: &Range<usize>) -> Range<usize> {
        let end = |record: usize| record.checked_sub(1).map_or(0, |before| self.lines[before].0);
        end(records.start)..end(records.end)
    }

    /// These records, each with its line's end.
    pub(crate) fn text(&self, records: &Range<usize>) -> &[u8] {
        &self.body[self.bounds(records)]
    }
}

pub(crate) enum Sink {
    File(ToFile),
    Http(Http),
    Kafka(Kafka),
}

impl Sink {
    /// Nothing is reached yet: a sink that is down is no fault of the configuration.
    pub(crate) fn open(settings: &SinkSettings) -> Result<Self, String> {
        match settings {
            SinkSettings::File(settings) => Ok(Self::File(ToFile { settings: settings.clone() })),
            SinkSettings::Http(settings) => Http::open(settings).map(Self::Http),
            SinkSettings::Kafka(settings) => Kafka::open(settings).map(Self::Kafka),
        }
    }

    /// Returns when the sink answers for these records.
    pub(crate) async fn deliver(&mut self, batch: &Batch, records: Range<usize>) -> Result<(), Refused> {
        match self {
            Self::File(file) => {
                let (file, text) = (file.clone(), Bytes::copy_from_slice(batch.text(&records)));
                let written = tokio::task::spawn_blocking(move || file.append(&text)).await;
                Ok(written.map_err(io::Error::other)??)
            }
            Self::Http(http) => http.post(Bytes::copy_from_slice(batch.text(&records))).await,
            Self::Kafka(kafka) => kafka.produce(batch, records).await,
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct ToFile {
    settings: FileSettings,
}

impl ToFile {
    fn path(&self, number: u32) -> PathBuf {
        let name = if number == 0 { "joey.ndjson".to_owned() } else { format!("joey.ndjson.{number}") };
        self.settings.directory.join(name)
    }

    /// On the disk when it returns.
    fn append(&self, text: &[u8]) -> io::Result<()> {
        let mut file = match open(&self.path(0)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.settings.directory)?;
                open(&self.path(0))?
            }
            opened => opened?,
        };
        let mut length = file.seek(SeekFrom::End(0))?;
        if length > 0 && length + text.len() as u64 > self.settings.max_bytes {
            for number in (0..self.settings.max_files.saturating_sub(1)).rev() {
                match std::fs::rename(self.path(number), self.path(number + 1)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            if self.settings.max_files <= 1 {
                std::fs::remove_file(self.path(0))?;
            }
            (file, length) = (open(&self.path(0))?, 0);
        }
        if length > 0 && !ends_a_line(&mut file, length)? {
            // Half a record of a joey that was killed: it was not taken, and comes again.
            file.write_all(b"\n")?;
        }
        let written = file.write_all(text).and_then(|()| file.sync_data());
        if written.is_err() {
            let _ = file.set_len(length);
        }
        written
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path)
}

fn ends_a_line(file: &mut File, length: u64) -> io::Result<bool> {
    let mut last = [0];
    file.seek(SeekFrom::Start(length - 1))?;
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_appended_to_mended_and_rotated() {
        let dir = tempfile::tempdir().unwrap();
        let settings = FileSettings { directory: dir.path().join("logs"), max_bytes: 20, max_files: 2 };
        let file = ToFile { settings };
        file.append(b"{\"a\":1}\n").unwrap();
        open(&file.path(0)).unwrap().write_all(b"{\"tor").unwrap();
        file.append(b"{}\n").unwrap();
        assert_eq!(std::fs::read_to_string(file.path(0)).unwrap(), "{\"a\":1}\n{\"tor\n{}\n");
        file.append(b"{\"b\":2}\n").unwrap();
        file.append(b"{\"c\":333333333333}\n").unwrap();
        assert_eq!(std::fs::read_to_string(file.path(0)).unwrap(), "{\"c\":333333333333}\n");
        assert_eq!(std::fs::read_to_string(file.path(1)).unwrap(), "{\"b\":2}\n");
        assert!(!file.path(2).exists(), "no more than two");
    }

    #[test]
    fn a_batch_knows_its_records() {
        let mut batch = Batch::default();
        batch.of("i/a/x", |body| body.extend_from_slice(b"1\n22\n"));
        batch.of("i/a/y", |_| {});
        batch.of("i/b/z", |body| body.extend_from_slice(b"333\n"));
        assert_eq!((batch.len(), batch.key(1), batch.key(2)), (3, "i/a/x", "i/b/z"));
        assert_eq!((batch.text(&(1..3)), batch.text(&(0..1))), (&b"22\n333\n"[..], &b"1\n"[..]));
    }
}
