//! joey-agent: the process beside or inside each sandbox.

fn main() {}
