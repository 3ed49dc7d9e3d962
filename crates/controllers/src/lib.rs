//! Reconcilers and the scheduler.
