//! A container's termination message: the file it may write, and what is told of it. Limits are those of the Kubernetes API:
//! the last 4096 bytes of the file, the last 2048 bytes or 80 lines of the log.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use joey_api::agent::AgentContainer;

use crate::{log_read, view};

const FROM_FILE: u64 = 4096;
const FROM_LOG: usize = 2048;
const LINES: usize = 80;

/// The file of the run whose writable layer is `upper`. It is in memory: a table of mounts would say where on the host's disk
/// it lies.
pub fn place(upper: &Path) -> PathBuf {
    let mut names = upper.iter().rev().map(|name| name.to_string_lossy());
    let (run, container) = (names.next().unwrap_or_default(), names.next().unwrap_or_default());
    Path::new(view::ETC).join(format!("last-words.{container}.{run}"))
}

/// Makes the file, for every user of the container to write.
pub fn prepare(upper: &Path) -> io::Result<()> {
    let file = File::create(place(upper))?;
    file.set_permissions(std::fs::Permissions::from_mode(0o666))
}

/// What the run left behind.
pub fn read(dir: &Path, container: &AgentContainer, upper: &Path, run: u32, exit_code: i32) -> String {
    // The container never sees the directory, so the file is the one that was made.
    let mut bytes = end_of(&place(upper)).unwrap_or_else(|error| {
        eprintln!("cannot read the last words of {}: {error}", container.name);
        Vec::new()
    });
    let _ = std::fs::remove_file(place(upper));
    if bytes.is_empty() && exit_code != 0 && container.last_words.or_log {
        bytes = log_read::end(dir, &container.name, run, LINES, FROM_LOG);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn end_of(path: &Path) -> io::Result<Vec<u8>> {
    let (mut file, mut bytes) = (File::open(path)?, Vec::new());
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(FROM_FILE)))?;
    file.take(FROM_FILE).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_file_counts() {
        let path = std::env::temp_dir().join(format!("joey-agent-words-{}", std::process::id()));
        for (written, read) in [
            (String::new(), String::new()),
            ("why".to_owned(), "why".to_owned()),
            (format!("{}why", "x".repeat(5000)), format!("{}why", "x".repeat(4093))),
        ] {
            std::fs::write(&path, written).unwrap();
            assert_eq!(end_of(&path).unwrap(), read.into_bytes());
        }
        std::fs::remove_file(path).unwrap();
    }
}
