//! SPDY/3.1 framing, the part that remote commands need: streams, data, ping. No server push, no flow control (kube-apiserver's
//! library neither sends nor honours windows). Frames are bounded by [`MAX_FRAME`], headers by [`MAX_HEADERS`].

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};

/// The longest payload that is taken, bytes.
pub const MAX_FRAME: usize = 1 << 20;
/// The longest header block after decompression, bytes.
pub const MAX_HEADERS: usize = 64 << 10;

const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow authorization cache-control connection content-base content-encoding content-language content-length content-location content-md5 content-range content-type date etag expect expires from host if-match if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie keep-alive origin";
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

/// The dictionary of header compression (SPDY protocol draft 3, section 2.6.10.1).
fn dictionary() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1423);
    for word in WORDS.split(' ') {
        bytes.extend_from_slice(&(word.len() as u32).to_be_bytes());
        bytes.extend_from_slice(word.replace('_', " ").as_bytes());
    }
    bytes.extend_from_slice(TAIL.as_bytes());
    bytes
}

/// A frame as it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    Open {
        stream: u32,
        headers: Vec<(String, String)>,
        last: bool,
    },
    Data {
        stream: u32,
        bytes: Vec<u8>,
        last: bool,
    },
    Reset {
        stream: u32,
    },
    Ping {
        id: u32,
    },
    GoAway,
    /// SETTINGS, WINDOW_UPDATE, HEADERS and what is not known: nothing to do.
    Other,
}

/// Bytes that are not SPDY/3.1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("spdy frame is not valid: {0}")]
pub struct Malformed(pub &'static str);

/// Both directions' state of one connection.
pub struct Codec {
    buffer: Vec<u8>,
    inflate: Decompress,
    deflate: Compress,
}

impl Codec {
    pub fn new() -> Result<Self, Malformed> {
        let mut deflate = Compress::new(Compression::fast(), true);
        deflate.set_dictionary(&dictionary()).map_err(|_| Malformed("no dictionary"))?;
        Ok(Self { buffer: Vec::new(), inflate: Decompress::new(true), deflate })
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, if there is one.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Malformed> {
        let Some(head) = self.buffer.first_chunk::<8>().copied() else { return Ok(None) };
        let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let length = (word(4) & 0xff_ffff) as usize;
        if length > MAX_FRAME {
            return Err(Malformed("too long"));
        }
        if self.buffer.len() < 8 + length {
            return Ok(None);
        }
        let payload: Vec<u8> = self.buffer.drain(..8 + length).skip(8).collect();
        let last = head[4] & 1 == 1;
        if word(0) >> 31 == 0 {
            return Ok(Some(Frame::Data { stream: word(0), bytes: payload, last }));
        }
        let first = payload.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes) & 0x7fff_ffff);
        match (word(0) & 0xffff, first) {
            (1, Some(stream)) => {
                let block = payload.get(10..).ok_or(Malformed("short SYN_STREAM"))?;
                Ok(Some(Frame::Open { stream, headers: self.headers(block)?, last }))
            }
            // Every header block moves the shared compression state.
            (2 | 8, Some(_)) => self.headers(payload.get(4..).unwrap_or_default()).map(|_| Some(Frame::Other)),
            (3, Some(stream)) => Ok(Some(Frame::Reset { stream })),
            (6, Some(_)) => Ok(payload.first_chunk::<4>().map(|id| Frame::Ping { id: u32::from_be_bytes(*id) })),
            (7, _) => Ok(Some(Frame::GoAway)),
            (1 | 2 | 3 | 6 | 8, None) => Err(Malformed("short control frame")),
            _ => Ok(Some(Frame::Other)),
        }
    }

    fn headers(&mut self, block: &[u8]) -> Result<Vec<(String, String)>, Malformed> {
        let mut plain = Vec::with_capacity(MAX_HEADERS);
        let mut read = 0;
        loop {
            let before = (self.inflate.total_in(), self.inflate.total_out());
            let result = self.inflate.decompress_vec(&block[read..], &mut plain, FlushDecompress::Sync);
            read += usize::try_from(self.inflate.total_in() - before.0).unwrap_or_default();
            match result {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.inflate.set_dictionary(&dictionary()).map_err(|_| Malformed("other dictionary"))?;
                    continue;
                }
                Err(_) => return Err(Malformed("headers are not compressed as they must be")),
                Ok(_) => {}
            }
            if plain.len() == plain.capacity() {
                return Err(Malformed("headers are too long"));
            }
            if read >= block.len() || (self.inflate.total_in(), self.inflate.total_out()) == before {
                break;
            }
        }
        parse(&plain).ok_or(Malformed("headers are cut off"))
    }

    /// SYN_REPLY with no headers: the stream is taken.
    pub fn accept(&mut self, stream: u32) -> Result<Vec<u8>, Malformed> {
        let mut block = Vec::with_capacity(256);
        self.deflate
            .compress_vec(&0_u32.to_be_bytes(), &mut block, FlushCompress::Sync)
            .map_err(|_| Malformed("headers could not be compressed"))?;
        let mut payload = stream.to_be_bytes().to_vec();
        payload.extend(block);
        Ok(control(2, &payload))
    }
}

fn parse(plain: &[u8]) -> Option<Vec<(String, String)>> {
    fn number(rest: &mut &[u8]) -> Option<usize> {
        let (head, tail) = rest.split_first_chunk::<4>()?;
        *rest = tail;
        Some(u32::from_be_bytes(*head) as usize)
    }
    fn text(rest: &mut &[u8]) -> Option<String> {
        let length = number(rest)?;
        let (head, tail) = rest.split_at_checked(length)?;
        *rest = tail;
        Some(String::from_utf8_lossy(head).into_owned())
    }
    let mut rest = plain;
    let count = number(&mut rest)?;
    (0..count).map(|_| Some((text(&mut rest)?, text(&mut rest)?))).collect()
}

fn control(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80, 3];
    frame.extend_from_slice(&kind.to_be_bytes());
    frame.extend_from_slice(&(payload.len() as u32 & 0xff_ffff).to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// A data frame; `last` ends this side of the stream. At most [`MAX_FRAME`] bytes.
pub fn data(stream: u32, bytes: &[u8], last: bool) -> Vec<u8> {
    let mut frame = (stream & 0x7fff_ffff).to_be_bytes().to_vec();
    frame.extend_from_slice(&((bytes.len() as u32 & 0xff_ffff) | (u32::from(last) << 24)).to_be_bytes());
    frame.extend_from_slice(bytes);
    frame
}

/// The answer to a ping.
pub fn pong(id: u32) -> Vec<u8> {
    control(6, &id.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The client's side: SYN_STREAM and SYN_REPLY with compressed headers.
    struct Client {
        deflate: Compress,
    }

    impl Client {
        fn new() -> Self {
            let mut deflate = Compress::new(Compression::best(), true);
            deflate.set_dictionary(&dictionary()).unwrap();
            Self { deflate }
        }

        fn block(&mut self, plain: &[u8]) -> Vec<u8> {
            let mut block = Vec::with_capacity(plain.len() + 1024);
            self.deflate.compress_vec(plain, &mut block, FlushCompress::Sync).unwrap();
            block
        }

        fn open(&mut self, stream: u32, headers: &[(&str, &str)]) -> Vec<u8> {
            let mut plain = (headers.len() as u32).to_be_bytes().to_vec();
            for text in headers.iter().flat_map(|(name, value)| [name, value]) {
                plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
                plain.extend_from_slice(text.as_bytes());
            }
            self.open_plain(stream, &plain)
        }

        fn open_plain(&mut self, stream: u32, plain: &[u8]) -> Vec<u8> {
            let mut payload = stream.to_be_bytes().to_vec();
            payload.extend_from_slice(&[0; 6]);
            payload.extend(self.block(plain));
            control(1, &payload)
        }
    }

    /// Every frame of `bytes`, handed in by `step` bytes.
    fn frames(codec: &mut Codec, bytes: &[u8], step: usize) -> Result<Vec<Frame>, Malformed> {
        let mut frames = Vec::new();
        for part in bytes.chunks(step) {
            codec.push(part);
            while let Some(frame) = codec.next_frame()? {
                frames.push(frame);
            }
        }
        Ok(frames)
    }

    fn opened(stream: u32, headers: &[(&str, &str)]) -> Frame {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Frame::Open { stream, headers, last: false }
    }

    #[test]
    fn the_dictionary_is_the_drafts() {
        let mut codec = Codec::new().unwrap();
        assert_eq!(dictionary().len(), 1423);
        // Adler-32 of the draft's dictionary stands in the zlib head of the first compressed block.
        let reply = codec.accept(1).unwrap();
        assert_eq!(reply[14..18], 0xe3c6_a7c2_u32.to_be_bytes());
    }

    #[test]
    fn what_a_client_sends_comes_out_however_it_is_cut() {
        let (stdin, error) = ([("streamtype", "stdin"), ("content-length", "0")], [("streamtype", "error")]);
        let mut client = Client::new();
        let mut bytes = client.open(1, &stdin);
        bytes.extend(client.open(3, &error));
        bytes.extend(control(4, &[0; 4]));
        bytes.extend(control(6, &7_u32.to_be_bytes()));
        bytes.extend(data(1, b"hello", false));
        bytes.extend(data(1, b"", true));
        bytes.extend(control(3, &[0, 0, 0, 3, 0, 0, 0, 5]));
        bytes.extend(control(7, &[0; 8]));
        let wanted = vec![
            opened(1, &stdin),
            opened(3, &error),
            Frame::Other,
            Frame::Ping { id: 7 },
            Frame::Data { stream: 1, bytes: b"hello".to_vec(), last: false },
            Frame::Data { stream: 1, bytes: Vec::new(), last: true },
            Frame::Reset { stream: 3 },
            Frame::GoAway,
        ];
        for step in [1, 3, 8, 64, bytes.len()] {
            assert_eq!(frames(&mut Codec::new().unwrap(), &bytes, step).unwrap(), wanted, "by {step}");
        }
    }

    #[test]
    fn what_is_written_can_be_read() {
        let mut bytes = Vec::new();
        let mut writer = Codec::new().unwrap();
        for stream in [1, 3, 5] {
            bytes.extend(writer.accept(stream).unwrap());
        }
        bytes.extend(pong(u32::MAX));
        bytes.extend(data(5, &[9; 70_000], false));
        let read = frames(&mut Codec::new().unwrap(), &bytes, 1000).unwrap();
        assert_eq!(read[..4], [Frame::Other, Frame::Other, Frame::Other, Frame::Ping { id: u32::MAX }]);
        assert_eq!(read[4..], [Frame::Data { stream: 5, bytes: vec![9; 70_000], last: false }]);
    }

    #[test]
    fn headers_are_bounded() {
        let long = "x".repeat(MAX_HEADERS - 64);
        let frame = Client::new().open(1, &[("a", &long)]);
        assert_eq!(frames(&mut Codec::new().unwrap(), &frame, 4096).unwrap(), [opened(1, &[("a", &long)])]);
        // Small when compressed, large afterwards.
        let frame = Client::new().open(1, &[("a", &"x".repeat(8 * MAX_HEADERS))]);
        assert!(frame.len() < MAX_HEADERS / 8, "{}", frame.len());
        let refused = frames(&mut Codec::new().unwrap(), &frame, 4096);
        assert_eq!(refused, Err(Malformed("headers are too long")));
    }

    #[test]
    fn malformed_frames_are_refused() {
        let refused = |bytes: &[u8]| frames(&mut Codec::new().unwrap(), bytes, bytes.len()).unwrap_err().0;
        assert_eq!(refused(&[0, 0, 0, 1, 0, 0xff, 0xff, 0xff]), "too long");
        for kind in [1, 2, 3, 6, 8] {
            assert_eq!(refused(&control(kind, &[0; 3])), "short control frame", "{kind}");
        }
        assert_eq!(refused(&control(1, &[0; 9])), "short SYN_STREAM");
        assert_eq!(refused(&control(1, &[0; 10])), "headers are cut off");
        assert_eq!(refused(&control(1, &[0xaa; 40])), "headers are not compressed as they must be");
        // Counts and lengths beyond what is there, up to the largest.
        for plain in [&[][..], &[0, 0, 0, 1], &[0xff; 4], &[0xff; 12], &[0, 0, 0, 1, 0, 0, 0, 9, b'x']] {
            assert_eq!(refused(&Client::new().open_plain(1, plain)), "headers are cut off", "{plain:?}");
        }
        // Another dictionary than the draft's.
        let mut other = Compress::new(Compression::fast(), true);
        other.set_dictionary(b"another").unwrap();
        let mut block = Vec::with_capacity(256);
        other.compress_vec(&[0; 4], &mut block, FlushCompress::Sync).unwrap();
        let payload: Vec<u8> = [0; 10].into_iter().chain(block).collect();
        assert_eq!(refused(&control(1, &payload)), "other dictionary");
    }

    #[test]
    fn no_bytes_make_it_panic() {
        // A small generator of its own: the same bytes in every run (Marsaglia's xorshift).
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut client = Client::new();
        let mut valid = client.open(1, &[("streamtype", "stdin")]);
        valid.extend(client.open(3, &[("streamtype", "error"), ("a", "b")]));
        valid.extend(data(1, b"some input", true));
        for _ in 0..4000 {
            let mut bytes = valid.clone();
            for _ in 0..1 + random() % 4 {
                let at = random() as usize % bytes.len();
                bytes[at] = random() as u8;
            }
            bytes.truncate(1 + random() as usize % bytes.len());
            let step = 1 + random() as usize % bytes.len();
            let _ = frames(&mut Codec::new().unwrap(), &bytes, step);
            let noise: Vec<u8> = (0..random() % 64).map(|_| random() as u8).collect();
            let _ = frames(&mut Codec::new().unwrap(), &control(random() as u16 % 10, &noise), 16);
        }
    }
}
