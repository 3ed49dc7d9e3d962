//! What the whole-system tests share: starting the real binary, waiting on conditions.
