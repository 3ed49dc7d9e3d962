//! A monitor that is none: it starts a process that does nothing, and plays its API as the document has it. What a request names must be
//! in the jail; what it asks for is noted, and done as far as a host sees it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::chown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use joey_api::vmm::{Interface, Jail, SENT};
use joey_hypervisor::{Started, Starter};
use joey_process::Process;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

use crate::document::{Document, Named};

/// What comes of a request.
#[derive(Clone)]
pub enum Act {
    Refuse(u16, Value),
    /// No answer; who waits for this is told.
    Hang(Arc<tokio::sync::Notify>),
    /// It ends, after these words.
    Die(&'static str),
}

/// What a monitor does for a request, beside answering: it is given the body and the descriptor, and gives the answer's body.
pub type Effect = fn(&Played, &str, Option<&Value>, Option<OwnedFd>) -> Result<Value, String>;

/// Starts monitors that are none.
pub struct Stage {
    pub document: &'static str,
    pub effect: Effect,
    /// By requests, `PUT /vsock`.
    pub acts: BTreeMap<&'static str, Act>,
    /// How many connections with the machine's inside nobody takes.
    pub deaf: usize,
    /// All requests that were answered as asked, of all monitors.
    pub heard: Arc<Mutex<Vec<String>>>,
    /// Why a request was refused that nobody wanted refused.
    pub wrong: Arc<Mutex<Vec<String>>>,
}

impl Stage {
    pub fn new(document: &'static str, effect: Effect) -> Self {
        let (acts, heard, wrong) = (BTreeMap::new(), Arc::default(), Arc::default());
        Self { document, effect, acts, deaf: 0, heard, wrong }
    }
}

/// One that runs.
pub struct Played {
    pub jail: Jail,
    pub descriptors: Vec<OwnedFd>,
    /// What it was told, by the path of the request.
    pub told: Mutex<BTreeMap<String, Value>>,
    state: Mutex<String>,
    document: Document,
    effect: Effect,
    acts: BTreeMap<&'static str, Act>,
    deaf: usize,
    heard: Arc<Mutex<Vec<String>>>,
    wrong: Arc<Mutex<Vec<String>>>,
    errors: PathBuf,
    child: Mutex<Child>,
}

impl Played {
    /// What a path in the jail is on the host, and whether it may be written there.
    pub fn place(&self, path: &str) -> Result<(PathBuf, bool), String> {
        if let Some(number) = path.strip_prefix("/proc/self/fd/") {
            let number: RawFd = number.parse().map_err(|_| format!("{path} is no descriptor"))?;
            let passed = usize::try_from(number - SENT).ok().and_then(|at| self.descriptors.get(at));
            let passed = passed.ok_or_else(|| format!("{path} was not passed"))?;
            return Ok((PathBuf::from(format!("/proc/self/fd/{}", passed.as_raw_fd())), false));
        }
        let path = Path::new(path);
        let mut binds = self.jail.files.iter();
        let bind = binds.find(|bind| path.starts_with(&bind.to));
        let bind = bind.ok_or_else(|| format!("{} is not in the jail", path.display()))?;
        let inside = path.strip_prefix(&bind.to).unwrap_or(Path::new(""));
        let place = if inside.as_os_str().is_empty() { bind.from.clone() } else { bind.from.join(inside) };
        Ok((place, bind.writable))
    }

    fn exists(&self, named: Named<'_>) -> Result<(), String> {
        let (path, disk, written) = match named {
            Named::File(path) => (path, false, false),
            Named::Disk(path, written) => (path, true, written),
        };
        let (place, writable) = self.place(path)?;
        let found = std::fs::metadata(&place).map_err(|error| format!("{path}: {error}"))?;
        if written && !writable {
            return Err(format!("{path} cannot be written"));
        }
        match disk && (found.len() == 0 || found.len() % 512 != 0) {
            true => Err(format!("{path} of {} bytes is no disk", found.len())),
            false => Ok(()),
        }
    }

    /// Makes a file of the monitor's own.
    pub fn write(&self, path: &str, bytes: &[u8]) -> Result<(), String> {
        let (place, writable) = self.place(path)?;
        if !writable {
            return Err(format!("{path} cannot be written"));
        }
        let user = Some(self.jail.user);
        std::fs::write(&place, bytes)
            .and_then(|()| chown(place, user, user))
            .map_err(|error| format!("{path}: {error}"))
    }

    /// The answer to a request; `None`: there is none.
    fn answer(&self, request: &str, body: Option<&Value>, descriptor: Option<OwnedFd>) -> Option<(u16, Value)> {
        match self.acts.get(request) {
            Some(Act::Refuse(status, words)) => return Some((*status, words.clone())),
            Some(Act::Hang(reached)) => {
                reached.notify_one();
                return None;
            }
            Some(Act::Die(words)) => {
                std::fs::write(&self.errors, words).expect("its words are written");
                let mut child = self.child.lock().unwrap();
                child.kill().expect("it runs");
                return None;
            }
            None => {}
        }
        match self.done(request, body, descriptor) {
            Ok(answer) => {
                self.heard.lock().unwrap().push(request.to_owned());
                Some(answer)
            }
            Err(why) => {
                self.wrong.lock().unwrap().push(format!("{request}: {why}"));
                Some((400, json!({ "fault_message": why })))
            }
        }
    }

    fn done(&self, request: &str, body: Option<&Value>, descriptor: Option<OwnedFd>) -> Result<(u16, Value), String> {
        let mut state = self.state.lock().unwrap();
        let call = self.document.call(request, &state)?;
        self.document.check(call, body, &|named| self.exists(named))?;
        if call.descriptor != descriptor.is_some() {
            return Err(format!("a descriptor goes along: {}", descriptor.is_some()));
        }
        if let Some(body) = body {
            self.told.lock().unwrap().insert(request.to_owned(), body.clone());
        }
        let said = (self.effect)(self, request, body, descriptor)?;
        let cold = ["none", "created"].contains(&state.as_str());
        let status = call.cold.filter(|_| cold).unwrap_or(call.success);
        if let Some(then) = &call.then {
            state.clone_from(then);
        }
        Ok((status, if status == 204 { Value::Null } else { said }))
    }

    pub fn check_config(&self, config: &Value) -> Result<(), String> {
        let config = config.as_object().ok_or("it is no object")?;
        self.document.object("VmConfig", config, &|named| self.exists(named))
    }

    /// Listens for who wants to speak with the machine's inside, which says everything back.
    pub fn listen(&self, path: &str) -> Result<(), String> {
        let listener = self.bind(path).map_err(|error| format!("{path}: {error}"))?;
        let deaf = self.deaf;
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().flatten().enumerate() {
                if number >= deaf {
                    std::thread::spawn(move || inside(stream));
                }
            }
        });
        Ok(())
    }

    fn bind(&self, path: &str) -> io::Result<UnixListener> {
        let (place, _) = self.place(path).map_err(io::Error::other)?;
        let listener = UnixListener::bind(&place)?;
        chown(place, Some(self.jail.user), Some(self.jail.user))?;
        Ok(listener)
    }
}

impl Drop for Played {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn inside(mut stream: UnixStream) {
    let mut line = [0; 13];
    if stream.read_exact(&mut line).is_err() || &line != b"CONNECT 1024\n" {
        return;
    }
    let _ = stream.write_all(b"OK 1073741824\n");
    let mut buffer = [0; 1000];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

#[async_trait]
impl Starter for Stage {
    async fn start(&self, jail: Jail, descriptors: &[BorrowedFd<'_>], errors: &Path) -> io::Result<Started> {
        for bind in &jail.files {
            assert!(bind.from.exists() && bind.to.is_absolute(), "{bind:?}");
        }
        let mut command = Command::new("sleep");
        command.arg("1000").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn()?;
        let process = Process::open(child.id())?;
        let tap = jail.interface == Interface::Returned && jail.netns.is_some();
        let document = Document::read(self.document);
        let played = Arc::new(Played {
            jail: jail.clone(),
            descriptors: descriptors.iter().map(|fd| fd.try_clone_to_owned()).collect::<io::Result<_>>()?,
            told: Mutex::default(),
            state: Mutex::new(document.begin.clone()),
            document,
            effect: self.effect,
            acts: self.acts.clone(),
            deaf: self.deaf,
            heard: self.heard.clone(),
            wrong: self.wrong.clone(),
            errors: errors.to_owned(),
            child: Mutex::new(child),
        });
        let socket = jail.args.iter().map(|arg| arg.trim_start_matches("path=")).find(|arg| arg.ends_with(".sock"));
        let listener = played.bind(socket.expect("the monitor is told its socket"))?;
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let played = played.clone();
                std::thread::spawn(move || serve(&played, &stream));
            }
        });
        Ok(Started { process, tap: tap.then(|| File::open("/dev/zero")).transpose()?.map(OwnedFd::from) })
    }
}

/// Requests of one connection, until there are no more.
fn serve(played: &Played, stream: &UnixStream) {
    while let Some((request, body, descriptor)) = read(stream) {
        let Some((status, answer)) = played.answer(&request, body.as_ref(), descriptor) else {
            // Nothing more is said; the connection stays.
            let _ = stream.set_read_timeout(None);
            let _ = io::copy(&mut &*stream, &mut io::sink());
            return;
        };
        let text = if answer.is_null() { String::new() } else { answer.to_string() };
        let head = format!("HTTP/1.1 {status} Said\r\nServer: played\r\nContent-Length: {}\r\n\r\n", text.len());
        if (&*stream).write_all((head + &text).as_bytes()).is_err() {
            return;
        }
    }
}

/// The next request: method and path, body, and a descriptor that went along.
fn read(stream: &UnixStream) -> Option<(String, Option<Value>, Option<OwnedFd>)> {
    let (mut bytes, mut descriptor) = (Vec::new(), None);
    let head = loop {
        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break at;
        }
        more(stream, &mut bytes, &mut descriptor)?;
    };
    let text = String::from_utf8(bytes[..head].to_vec()).expect("a head is text");
    let mut lines = text.lines();
    let first = lines.next().expect("there is a first line");
    let request = first.strip_suffix(" HTTP/1.1").expect("HTTP/1.1").to_owned();
    let fields: BTreeMap<String, &str> =
        lines.filter_map(|line| line.split_once(": ")).map(|(name, value)| (name.to_lowercase(), value)).collect();
    assert!(fields.contains_key("host"), "{text}");
    let length: usize = fields.get("content-length").map_or(0, |length| length.parse().expect("a number"));
    while bytes.len() < head + 4 + length {
        more(stream, &mut bytes, &mut descriptor)?;
    }
    assert_eq!(bytes.len(), head + 4 + length, "one request at a time");
    if length == 0 {
        return Some((request, None, descriptor));
    }
    assert_eq!(fields.get("content-type"), Some(&"application/json"));
    Some((request, Some(serde_json::from_slice(&bytes[head + 4..]).expect("a body is JSON")), descriptor))
}

fn more(stream: &UnixStream, bytes: &mut Vec<u8>, descriptor: &mut Option<OwnedFd>) -> Option<()> {
    let (mut buffer, mut control) = ([0; 4096], nix::cmsg_space!([RawFd; 1]));
    let mut parts = [io::IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty()).ok()?;
    for control in message.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            // SAFETY: the descriptor has just arrived and belongs to nobody else.
            *descriptor = descriptors.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    let count = message.bytes;
    bytes.extend_from_slice(&buffer[..count]);
    (count > 0).then_some(())
}
