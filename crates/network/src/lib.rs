//! Interfaces, addresses, routes and bandwidth of instances.
