//! Running other programs: to their end with a deadline, or in the background until dropped.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::unistd::Pid;

/// How a program ended and what it wrote.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub command: String,
    /// The exit code; 128 plus the signal's number where a signal ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// Its standard output; fails the test when the program failed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{} failed:\n{}\n{}", self.command, self.stdout, self.stderr);
        self.stdout
    }

    /// Its standard output as JSON; fails the test when the program failed.
    #[track_caller]
    pub fn json(self) -> serde_json::Value {
        let command = self.command.clone();
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{command} wrote no JSON ({error}):\n{text}"))
    }

    /// Its standard error; fails the test when the program did not end with `code`.
    #[track_caller]
    pub fn fails(self, code: i32) -> String {
        assert_eq!(self.code, code, "{}:\n{}\n{}", self.command, self.stdout, self.stderr);
        self.stderr
    }
}

/// The longest that any single command of a test may take.
const LONGEST: Duration = Duration::from_secs(180);

/// Runs `command` to its end without standard input. A command that outlives its deadline is killed and fails the test.
#[track_caller]
pub fn run(command: &mut Command) -> Outcome {
    run_with_input(command, b"")
}

/// Runs `command` to its end, giving it `input`.
#[track_caller]
pub fn run_with_input(command: &mut Command, input: &[u8]) -> Outcome {
    let text = describe(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{text} cannot be started: {error}"));
    let stdout = collect(child.stdout.take().expect("stdout is piped"));
    let stderr = collect(child.stderr.take().expect("stderr is piped"));
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let input = input.to_owned();
    let feeder = std::thread::spawn(move || {
        // A program need not read all it is given.
        let _ = stdin.write_all(&input);
    });
    let status = wait(&mut child, LONGEST).unwrap_or_else(|| {
        let _ = child.kill();
        let _ = child.wait();
        panic!("{text} did not end within {LONGEST:?}")
    });
    let _ = feeder.join();
    Outcome {
        command: text,
        code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()),
        stdout: stdout.join().expect("a reader does not panic"),
        stderr: stderr.join().expect("a reader does not panic"),
    }
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

fn collect(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn wait(child: &mut Child, deadline: Duration) -> Option<std::process::ExitStatus> {
    let end = Instant::now() + deadline;
    while Instant::now() < end {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    None
}

/// A program in the background, its output in a file. Dropped, it is killed.
#[derive(Debug)]
pub struct Program {
    child: Child,
    text: String,
    log: PathBuf,
}

impl Program {
    /// Starts `command` in a session of its own, with standard output and error appended to `log`.
    #[track_caller]
    pub fn start(command: &mut Command, log: &Path) -> Self {
        let text = describe(command);
        let file = File::options().create(true).append(true).open(log).expect("a log in a fresh folder can be written");
        let error = file.try_clone().expect("a file can be shared");
        // What was started in the background of a script ignores interrupts, and so would its children.
        let heeds_interrupts = || {
            // SAFETY: the default disposition has no handler that could be unsound, and signal(2) may be called after a fork.
            unsafe { signal(Signal::SIGINT, SigHandler::SigDfl) }.map(drop).map_err(std::io::Error::from)
        };
        // SAFETY: it calls nothing but signal(2).
        unsafe { command.pre_exec(heeds_interrupts) };
        let child = command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(error)
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{text} cannot be started: {error}"));
        Self { child, text, log: log.to_owned() }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All it has written so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// `None` while it runs, then its exit code (128 plus the signal's number).
    pub fn ended(&mut self) -> Option<i32> {
        let status = self.child.try_wait().ok()??;
        Some(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("process ids fit");
        let _ = kill(Pid::from_raw(pid), signal);
    }

    /// Waits for its end; its exit code.
    #[track_caller]
    pub fn wait(&mut self, deadline: Duration) -> i32 {
        match wait(&mut self.child, deadline) {
            Some(status) => status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()),
            None => panic!("{} did not end within {deadline:?}:\n{}", self.text, self.output()),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.ended().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
