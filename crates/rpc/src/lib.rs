//! HTTP/2 with prior knowledge (and HTTP/1.1 for curl) over any byte stream: unix sockets, in-process pipes, virtio ports.
//!
//! Holds the client, the serving of a connection, answers in JSON and streams, and query strings. Must never depend on
//! what travels: no instance, agent or Kubernetes semantics live here. Works on a `current_thread` runtime.

pub mod answer;
pub mod body;
pub mod client;
pub mod error;
pub mod port;
pub mod query;
pub mod server;
pub mod socket;

pub use answer::{created, empty_answer, fault_answer, json_answer, lines_answer, read_json, stream_answer};
pub use body::{Body, empty, full, into_stream, stream};
pub use client::Client;
pub use error::RpcError;
pub use query::{parse_query, query};
pub use server::{serve, serve_unix, serve_until};
pub use socket::{bind_unix, connect_unix, listen_unix};

/// The largest JSON body that is read unless the caller says otherwise, in bytes: an instance with 16 MiB of files in
/// base64 and its specification fit.
pub const BODY_LIMIT: usize = 24 << 20;

/// Bytes of one stream that may be under way unread. Slow readers stop their writer after this much.
pub(crate) const STREAM_WINDOW: u32 = 64 << 10;

/// Bytes of a whole connection that may be under way unread: large, so that slow streams do not stop the others.
pub(crate) const CONNECTION_WINDOW: u32 = 16 << 20;

/// Requests that may be open at once on a connection: watches, logs and execs are requests that stay open.
pub(crate) const MAX_STREAMS: u32 = 8192;
