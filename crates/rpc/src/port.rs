//! Connections over one pair of bytes streams that is always there, such as a virtio port: its two ends come and go without the other
//! one being told in order, and what was under way arrives at whoever comes next.
//!
//! What travels is frames: COBS (Cheshire and Baker, 1999), so that a zero byte ends a frame and is nowhere else, of
//!
//! ```text
//! kind (1 byte) │ connection (8 bytes, little endian) │ bytes of the connection, at most 16 KiB
//! ```
//!
//! One end calls: it draws a number and sends `HELLO` with it until the other end, which answers, says the same back. What bears
//! another number belongs to a connection that is gone, and so does what is no frame: both are skipped, whatever is in them. Whose
//! connection is over says `BYE`, and who called says it back: then everything before it was heard.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

const HELLO: u8 = 1;
const DATA: u8 = 2;
const BYE: u8 = 3;

/// Bytes before those of the connection.
const HEAD: usize = 9;
/// Bytes of a connection in one frame.
const MOST: usize = 16 << 10;
/// A longer frame is none.
const LONGEST: usize = HEAD + MOST;
/// Bytes under way that nobody has read.
const WINDOW: usize = 64 << 10;
/// Between two attempts to be heard: the other end may not have been there for the first one.
const AGAIN: Duration = Duration::from_millis(500);

/// Calls the other end: resolves when it has answered. The caller sets the bound.
pub async fn call<S>(stream: S) -> io::Result<DuplexStream>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let id = u64::from_ne_bytes(random()?);
    let (reader, writer) = tokio::io::split(stream);
    let (mut frames, mut out) = (Frames::new(reader), Out::new(writer));
    // Ends what an earlier caller left half said.
    out.writer.write_all(&[0]).await?;
    loop {
        out.send(HELLO, id, &[]).await?;
        let heard = async {
            loop {
                match frames.next().await? {
                    Some((HELLO, heard, _)) if heard == id => return Ok(()),
                    Some(_) => {}
                    None => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                }
            }
        };
        if let Ok(heard) = tokio::time::timeout(AGAIN, heard).await {
            break heard?;
        }
    }
    let (near, far) = tokio::io::duplex(WINDOW);
    tokio::spawn(carry(frames, out, far, id));
    Ok(near)
}

/// The caller's end of a connection: both ways until one of them is over.
async fn carry<S: AsyncRead + AsyncWrite + Send + 'static>(
    mut frames: Frames<ReadHalf<S>>,
    mut out: Out<WriteHalf<S>>,
    far: DuplexStream,
    id: u64,
) {
    let (mut from, mut to) = tokio::io::split(far);
    let inward = async {
        while let Ok(Some((kind, number, bytes))) = frames.next().await {
            let over = match kind {
                DATA if number == id => to.write_all(bytes).await.is_err(),
                BYE => number == id,
                _ => false,
            };
            if over {
                return kind == BYE;
            }
        }
        false
    };
    let outward = async {
        let mut buffer = vec![0; MOST];
        while let Ok(count) = from.read(&mut buffer).await {
            if count == 0 || out.send(DATA, id, &buffer[..count]).await.is_err() {
                break;
            }
        }
        let _ = out.send(BYE, id, &[]).await;
    };
    let told = tokio::select! {
        told = inward => told,
        () = outward => false,
    };
    if told {
        // The other end may wait for it, or be gone.
        let _ = out.send(BYE, id, &[]).await;
    }
}

/// The end that answers: gives a connection for each call, the one before it being over. Ends with the stream.
pub struct Listener {
    calls: mpsc::Receiver<DuplexStream>,
    task: JoinHandle<()>,
}

impl Listener {
    /// Listens at a stream that stays for ever: its end of file means that nobody is at the other end now.
    pub fn new<R, W>(reader: R, writer: W) -> Self
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let (to, calls) = mpsc::channel(1);
        let task = tokio::spawn(answer(reader, writer, to));
        Self { calls, task }
    }

    /// The next connection.
    pub async fn accept(&mut self) -> Option<DuplexStream> {
        self.calls.recv().await
    }

    /// Takes no further call. Resolves when the connection that is open is over, and the other end has heard all of it; the caller
    /// sets the bound.
    pub async fn end(self) {
        let Self { calls, task } = self;
        drop(calls);
        // It ends in order, or with its stream.
        let _ = task.await;
    }
}

/// What is being said on the connection that is open.
struct Open {
    id: u64,
    to: WriteHalf<DuplexStream>,
    from: ReadHalf<DuplexStream>,
}

async fn answer<R, W>(reader: R, writer: W, calls: mpsc::Sender<DuplexStream>)
where
    R: AsyncRead + Send + Unpin,
    W: AsyncWrite + Send + Unpin,
{
    let (mut frames, mut out) = (Frames::new(reader), Out::new(writer));
    let mut open: Option<Open> = None;
    let mut buffer = vec![0; MOST];
    // What a frame holds waits here while the connection takes it, so that both ways go on.
    let mut pending: Vec<u8> = Vec::new();
    // The connection whose end was not heard yet.
    let mut unheard: Option<u64> = None;
    loop {
        let last = calls.is_closed();
        if last && open.is_none() && unheard.is_none() {
            return;
        }
        let taken = match open.as_mut() {
            None => tokio::select! {
                frame = frames.next() => Step::Frame(frame),
                () = calls.closed(), if !last => continue,
            },
            Some(open) if pending.is_empty() => tokio::select! {
                frame = frames.next() => Step::Frame(frame),
                read = open.from.read(&mut buffer) => Step::Said(read),
            },
            Some(open) => tokio::select! {
                written = open.to.write(&pending) => Step::Taken(written),
                read = open.from.read(&mut buffer) => Step::Said(read),
            },
        };
        match (taken, open.as_mut()) {
            (Step::Frame(Ok(Some((HELLO, id, _)))), _) => {
                // Who calls anew has heard what was said to the one before, or never will.
                unheard = None;
                let known = open.as_ref().is_some_and(|open| open.id == id);
                if out.send(HELLO, id, &[]).await.is_err() {
                    return;
                }
                if !known {
                    let (near, far) = tokio::io::duplex(WINDOW);
                    let (from, to) = tokio::io::split(far);
                    open = Some(Open { id, to, from });
                    pending.clear();
                    if calls.send(near).await.is_err() {
                        return;
                    }
                }
            }
            (Step::Frame(Ok(Some((DATA, id, bytes)))), Some(now)) if id == now.id => pending.extend_from_slice(bytes),
            (Step::Frame(Ok(Some((BYE, id, _)))), Some(now)) if id == now.id => open = None,
            (Step::Frame(Ok(Some((BYE, id, _)))), _) if unheard == Some(id) => unheard = None,
            (Step::Frame(Ok(Some(_))), _) => {}
            // The other end is gone, and may come back.
            (Step::Frame(Ok(None)), _) => (open, unheard) = (None, None),
            (Step::Frame(Err(_)), _) => return,
            (Step::Taken(Ok(count)), _) if count > 0 => drop(pending.drain(..count)),
            (Step::Said(Ok(count)), Some(now)) if count > 0 => {
                if out.send(DATA, now.id, &buffer[..count]).await.is_err() {
                    return;
                }
            }
            (Step::Taken(_) | Step::Said(_), Some(now)) => {
                let id = now.id;
                (open, pending, unheard) = (None, Vec::new(), Some(id));
                if out.send(BYE, id, &[]).await.is_err() {
                    return;
                }
            }
            (Step::Taken(_) | Step::Said(_), None) => {}
        }
    }
}

enum Step<'a> {
    Frame(io::Result<Option<(u8, u64, &'a [u8])>>),
    Taken(io::Result<usize>),
    Said(io::Result<usize>),
}

/// Frames out of a stream of bytes.
struct Frames<R> {
    reader: R,
    raw: Vec<u8>,
    /// So many bytes of `raw` hold no end of a frame.
    seen: usize,
    frame: Vec<u8>,
    /// In the middle of what is too long to be one.
    lost: bool,
}

impl<R: AsyncRead + Unpin> Frames<R> {
    fn new(reader: R) -> Self {
        Self { reader, raw: Vec::new(), seen: 0, frame: Vec::new(), lost: false }
    }

    /// The next frame that is one; `None` at the end of the stream. Nothing is lost when it is dropped while it waits.
    async fn next(&mut self) -> io::Result<Option<(u8, u64, &[u8])>> {
        loop {
            while let Some(at) = self.raw[self.seen..].iter().position(|&byte| byte == 0) {
                let end = self.seen + at;
                self.frame.clear();
                let whole = !self.lost && decode(&self.raw[..end], &mut self.frame);
                self.raw.drain(..=end);
                (self.seen, self.lost) = (0, false);
                if whole && (HEAD..=LONGEST).contains(&self.frame.len()) {
                    let id = self.frame[1..HEAD].try_into().map_or(0, u64::from_le_bytes);
                    return Ok(Some((self.frame[0], id, &self.frame[HEAD..])));
                }
            }
            self.seen = self.raw.len();
            if self.raw.len() > encoded(LONGEST) {
                (self.lost, self.seen) = (true, 0);
                self.raw.clear();
            }
            self.raw.reserve(MOST);
            if self.reader.read_buf(&mut self.raw).await? == 0 {
                return Ok(None);
            }
        }
    }
}

/// Frames into a stream of bytes.
struct Out<W> {
    writer: W,
    raw: Vec<u8>,
}

impl<W: AsyncWrite + Unpin> Out<W> {
    fn new(writer: W) -> Self {
        Self { writer, raw: Vec::new() }
    }

    async fn send(&mut self, kind: u8, id: u64, bytes: &[u8]) -> io::Result<()> {
        let mut frame = Vec::with_capacity(HEAD + bytes.len());
        frame.push(kind);
        frame.extend_from_slice(&id.to_le_bytes());
        frame.extend_from_slice(bytes);
        self.raw.clear();
        encode(&frame, &mut self.raw);
        self.raw.push(0);
        self.writer.write_all(&self.raw).await?;
        self.writer.flush().await
    }
}

/// The most bytes that so many become.
const fn encoded(bytes: usize) -> usize {
    bytes + bytes / 254 + 1
}

/// Without zeros: each run of bytes that are not zero, 254 at most, after its length and one.
fn encode(bytes: &[u8], out: &mut Vec<u8>) {
    out.reserve(encoded(bytes.len()));
    let mut runs = bytes.split(|&byte| byte == 0).peekable();
    while let Some(mut run) = runs.next() {
        while run.len() >= 254 {
            out.push(255);
            out.extend_from_slice(&run[..254]);
            run = &run[254..];
            if run.is_empty() && runs.peek().is_none() {
                return;
            }
        }
        out.push(u8::try_from(run.len() + 1).unwrap_or(255));
        out.extend_from_slice(run);
    }
}

/// The other way; false for what was never encoded.
fn decode(mut raw: &[u8], out: &mut Vec<u8>) -> bool {
    while let Some((&code, rest)) = raw.split_first() {
        let length = usize::from(code).wrapping_sub(1);
        let Some(run) = rest.get(..length) else { return false };
        out.extend_from_slice(run);
        raw = &rest[length..];
        if code != 255 && !raw.is_empty() {
            out.push(0);
        }
    }
    true
}

fn random() -> io::Result<[u8; 8]> {
    use std::io::Read;
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A generator of numbers that need not be good: xorshift64.
    fn numbers(mut seed: u64) -> impl FnMut(usize) -> usize {
        move |below| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed % below.max(1) as u64) as usize
        }
    }

    #[test]
    fn what_is_encoded_has_no_zeros_and_comes_back() {
        let mut number = numbers(7);
        for length in (0..600).chain([LONGEST]) {
            let bytes: Vec<u8> = (0..length).map(|_| number(3) as u8 * 100).collect();
            for bytes in [bytes, vec![0; length], vec![9; length]] {
                let (mut raw, mut back) = (Vec::new(), Vec::new());
                encode(&bytes, &mut raw);
                assert!(!raw.contains(&0) && raw.len() <= encoded(length), "{length}");
                assert!(decode(&raw, &mut back) && back == bytes, "{length}");
            }
        }
    }

    async fn echo(mut connection: DuplexStream) {
        let mut buffer = vec![0; 1000];
        while let Ok(count) = connection.read(&mut buffer).await {
            if count == 0 || connection.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    }

    async fn asked(connection: &mut DuplexStream, bytes: &[u8]) {
        let (mut back, (mut from, mut to)) = (vec![0; bytes.len()], tokio::io::split(connection));
        let both = async { tokio::join!(to.write_all(bytes), from.read_exact(&mut back)) };
        let (sent, heard) = tokio::time::timeout(Duration::from_secs(20), both).await.expect("an answer");
        assert!(sent.is_ok() && heard.is_ok());
        assert_eq!(back, bytes);
    }

    #[tokio::test]
    async fn a_caller_after_one_that_broke_off_is_heard() {
        let (host, guest) = tokio::io::duplex(4096);
        let (reader, writer) = tokio::io::split(guest);
        let mut listener = Listener::new(reader, writer);
        tokio::spawn(async move {
            while let Some(connection) = listener.accept().await {
                tokio::spawn(echo(connection));
            }
        });
        // Callers share the one stream, as daemons after each other do; each leaves in the middle of something.
        let host = std::sync::Arc::new(tokio::sync::Mutex::new(host));
        let mut number = numbers(11);
        for round in 0..20 {
            let (near, far) = tokio::io::duplex(4096);
            let host = host.clone();
            let bridge = tokio::spawn(async move {
                let mut far = far;
                let mut host = host.lock().await;
                let _ = tokio::io::copy_bidirectional(&mut far, &mut *host).await;
            });
            let mut connection = tokio::time::timeout(Duration::from_secs(20), call(near)).await.unwrap().unwrap();
            let bytes: Vec<u8> = (0..200_000).map(|_| number(256) as u8).collect();
            asked(&mut connection, &bytes).await;
            let _ = connection.write_all(&bytes[..number(50_000)]).await;
            bridge.abort();
            let _ = bridge.await;
            drop((round, connection));
        }
    }

    #[tokio::test]
    async fn bytes_of_any_kind_are_no_harm() {
        let mut number = numbers(13);
        for _ in 0..50 {
            let (mut host, guest) = tokio::io::duplex(1 << 20);
            let (reader, writer) = tokio::io::split(guest);
            let mut listener = Listener::new(reader, writer);
            let noise: Vec<u8> = (0..100_000).map(|_| if number(40) == 0 { 0 } else { number(5) as u8 }).collect();
            host.write_all(&noise).await.unwrap();
            let accept = tokio::spawn(async move {
                while let Some(connection) = listener.accept().await {
                    tokio::spawn(echo(connection));
                }
            });
            let mut connection = tokio::time::timeout(Duration::from_secs(20), call(host)).await.unwrap().unwrap();
            asked(&mut connection, b"still here").await;
            accept.abort();
        }
    }

    #[tokio::test]
    async fn the_caller_takes_no_noise_for_an_answer() {
        let (host, mut guest) = tokio::io::duplex(1 << 20);
        let calling = tokio::spawn(call(host));
        let mut number = numbers(17);
        let noise: Vec<u8> = (0..500_000).map(|_| number(256) as u8).collect();
        guest.write_all(&noise).await.unwrap();
        drop(guest);
        let ended = tokio::time::timeout(Duration::from_secs(20), calling).await.unwrap().unwrap();
        assert!(ended.is_err());
    }

    #[tokio::test]
    async fn an_end_is_waited_for_until_all_of_it_is_heard() {
        let limit = Duration::from_secs(20);
        for gone in [false, true] {
            let (host, guest) = tokio::io::duplex(4096);
            let (reader, writer) = tokio::io::split(guest);
            let mut listener = Listener::new(reader, writer);
            let calling = tokio::spawn(call(host));
            let mut connection = listener.accept().await.unwrap();
            let mut near = calling.await.unwrap().unwrap();
            let said = tokio::spawn(async move { connection.write_all(&[7; 300_000]).await });
            let ending = tokio::spawn(listener.end());
            for _ in 0..1000 {
                tokio::task::yield_now().await;
            }
            assert!(!ending.is_finished(), "nobody has heard it");
            if gone {
                drop(near);
            } else {
                let mut heard = Vec::new();
                tokio::time::timeout(limit, near.read_to_end(&mut heard)).await.unwrap().unwrap();
                assert_eq!(heard.len(), 300_000);
                said.await.unwrap().unwrap();
            }
            tokio::time::timeout(limit, ending).await.expect("an end").unwrap();
        }
    }
}
