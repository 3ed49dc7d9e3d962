//! A virtual machine with Debian 12's kernel and cgroup v2 alone, under QEMU's emulation: joey runs in it, is tried from every
//! side by `tests/guest/checks.sh`, and what that saw comes out over a serial port. Made by `scripts/guest.sh`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;
use tempfile::TempDir;

use crate::program::{Program, run};
use crate::{repository, seconds, wait_until};

/// The longest the machine may run. It takes a minute on two idle cores.
const LONGEST: u64 = 300;

/// What was seen in the machine.
#[derive(Debug)]
pub struct Guest {
    seen: BTreeMap<String, String>,
    console: String,
}

impl Guest {
    /// Runs the machine, once for all tests of a process; `None` where there is no QEMU, which `scripts/guest.sh` says loudly.
    pub fn seen() -> Option<&'static Self> {
        static SEEN: OnceLock<Option<Guest>> = OnceLock::new();
        SEEN.get_or_init(|| files().map(|files| Self::boot(&files))).as_ref()
    }

    fn boot(files: &Path) -> Self {
        let scratch = TempDir::with_prefix("joey-guest-").expect("a temporary folder");
        let (console, lines) = (scratch.path().join("console"), scratch.path().join("lines"));
        let file = |path: &Path| format!("file:{}", path.display());
        let mut command = Command::new("qemu-system-x86_64");
        // What is slow under emulation and not what is tested is left out.
        let kernel = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check random.trust_cpu=on";
        let parts =
            "-machine q35 -accel tcg,thread=multi -cpu max,la57=off -smp 2 -m 1G -nodefaults -display none -no-reboot";
        command.args(parts.split(' '));
        command.arg("-kernel").arg(files.join("vmlinuz")).arg("-initrd").arg(files.join("initrd"));
        command.args(["-append", kernel]);
        // Written to a temporary file: the disk stays as it was made.
        let disk = format!("file={},if=virtio,format=raw,snapshot=on", files.join("disk.ext4").display());
        command.args(["-drive", &disk, "-serial", &file(&console), "-serial", &file(&lines)]);
        let mut machine = Program::start(&mut command, &scratch.path().join("qemu"));
        let read = |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
        wait_until("the virtual machine ends by itself", seconds(LONGEST), || match machine.ended() {
            Some(0) => Ok(()),
            Some(code) => panic!("QEMU ended with {code}: {}", machine.output()),
            None => Err(format!("{}\n{}", last(&read(&console), 40), read(&lines))),
        });
        let pairs = read(&lines).lines().filter_map(|line| line.trim().split_once('=').map(owned)).collect();
        Self { seen: pairs, console: read(&console) }
    }

    /// What was seen under a name.
    #[track_caller]
    pub fn text(&self, name: &str) -> &str {
        self.seen.get(name).map_or_else(
            || panic!("nothing was said of {name}; the console's end:\n{}", last(&self.console, 60)),
            |text| text.trim(),
        )
    }

    #[track_caller]
    pub fn json(&self, name: &str) -> Value {
        let text = self.text(name);
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{name} is no JSON ({error}): {text}"))
    }

    /// The number after a word, as in the kernel's flat files: `usage_usec 12 user_usec 7`.
    #[track_caller]
    pub fn number(&self, name: &str, word: &str) -> u64 {
        let text = self.text(name);
        let mut words = text.split_whitespace().skip_while(|found| *found != word).skip(1);
        words.next().and_then(|found| found.parse().ok()).unwrap_or_else(|| panic!("no {word} in {name}: {text}"))
    }

    /// All of it, for the messages of failing tests.
    pub fn console(&self) -> &str {
        &self.console
    }
}

fn owned((name, text): (&str, &str)) -> (String, String) {
    (name.to_owned(), text.to_owned())
}

fn last(text: &str, lines: usize) -> String {
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// The folder of the machine's files, made anew: joey in it is the one just built.
fn files() -> Option<PathBuf> {
    let outcome = run(&mut Command::new(repository().join("scripts/guest.sh")));
    // Not by a macro, which would be shown for failing tests only.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), outcome.stderr.as_bytes());
    let folder = outcome.ok();
    Some(PathBuf::from(folder.trim())).filter(|folder| folder.is_absolute())
}
