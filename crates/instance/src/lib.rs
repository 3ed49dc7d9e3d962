//! One instance on one host: creation, recovery, removal.
