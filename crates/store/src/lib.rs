//! Revisioned keys, transactions and watch; memory and redb engines.
