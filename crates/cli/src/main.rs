//! The binary joey: flags, composition of roles, output.

fn main() {}
