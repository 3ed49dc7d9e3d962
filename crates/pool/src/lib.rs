//! The instance service: records, placement, REST server.
