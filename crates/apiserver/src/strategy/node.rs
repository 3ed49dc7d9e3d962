//! Nodes: they register themselves with their status.

use super::Strategy;

pub struct Node;

impl Strategy for Node {
    fn clears_status(&self) -> bool {
        false
    }
}
