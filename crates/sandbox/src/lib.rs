//! The Sandbox trait, its states, a fake and the classes.
