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
    fn number<'a>(rest: &mut &'a [u8]) -> Option<usize> {
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

    #[test]
    fn the_dictionary_is_the_drafts() {
        let mut inflate = Codec::new().unwrap();
        assert_eq!(dictionary().len(), 1423);
        // Adler-32 of the draft's dictionary stands in the zlib head of the first compressed block.
        let reply = inflate.accept(1).unwrap();
        assert_eq!(reply[14..18], 0xe3c6_a7c2_u32.to_be_bytes());
    }
}
