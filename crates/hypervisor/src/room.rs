//! Where layers go in a machine: how many disks a monitor has for them, and how many files one disk takes.

use std::ops::Range;

/// Places for layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// The slots of layers; before them is that of the machine's own disk.
    pub slots: Range<u32>,
    /// How many of them take something before the machine starts.
    pub at_start: usize,
    /// Files that the disk in a slot holds one behind the other, at most.
    pub files: usize,
}

impl Room {
    /// Puts layers into the slots of a machine that is to start, as [`Room::spread`] does.
    pub fn spread_at_start<T>(&self, layers: Vec<T>) -> Option<Vec<(u32, Vec<T>)>> {
        self.spread(layers, std::iter::empty()).filter(|placed| placed.len() <= self.at_start)
    }

    /// Puts layers into as few slots as may be, from the first on that has none before it in `taken`. `None`: they do not fit.
    pub fn spread<T>(&self, layers: Vec<T>, taken: impl Iterator<Item = u32>) -> Option<Vec<(u32, Vec<T>)>> {
        // One that was given up in the middle is not used again, and neither are gaps: slots are filled in their order.
        let mut slots = taken.map(|slot| slot + 1).max().unwrap_or(0).max(self.slots.start)..self.slots.end;
        let mut layers = layers.into_iter().peekable();
        let mut placed = Vec::new();
        while layers.peek().is_some() {
            placed.push((slots.next()?, layers.by_ref().take(self.files.max(1)).collect()));
        }
        Some(placed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_fill_slots_in_their_order() {
        let many = Room { slots: 1..4, at_start: 1, files: 255 };
        let none = || std::iter::empty();
        assert_eq!(many.spread(vec!['a', 'b'], none()), Some(vec![(1, vec!['a', 'b'])]));
        assert_eq!(many.spread(vec!['c'], [1, 2].into_iter()), Some(vec![(3, vec!['c'])]));
        assert_eq!(many.spread(vec!['c'], [1, 2, 3].into_iter()), None);
        let single = Room { slots: 1..4, at_start: 3, files: 1 };
        assert_eq!(single.spread(vec!['a', 'b'], none()), Some(vec![(1, vec!['a']), (2, vec!['b'])]));
        assert_eq!(single.spread(vec!['a', 'b'], [2].into_iter()), None);
        assert_eq!(single.spread(Vec::<char>::new(), [3].into_iter()), Some(Vec::new()));
        assert_eq!(single.spread_at_start(vec!['a', 'b']), Some(vec![(1, vec!['a']), (2, vec!['b'])]));
        assert_eq!(many.spread_at_start(vec!['a'; 255]).map(|placed| placed.len()), Some(1));
        assert_eq!(many.spread_at_start(vec!['a'; 256]), None, "the second disk is put in while the machine runs");
    }
}
