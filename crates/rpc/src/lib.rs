//! HTTP/2 over any byte stream, with bidirectional frames.
