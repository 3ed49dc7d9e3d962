//! Which addresses of the range are free. Pure bookkeeping: what is durable about it is in `place`.
//!
//! Fresh addresses are given out first, then freed ones in the order they were freed: an address rests as long as possible, so
//! that late packets for the instance that had it do not reach a newcomer.

use std::collections::{HashSet, VecDeque};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

#[derive(Debug)]
pub(crate) struct Addresses {
    last: u32,
    next: u32,
    freed: VecDeque<u32>,
}

impl Addresses {
    /// The range without its network address, its first address (kept for the platform) and its broadcast address.
    ///
    /// `used` is never given out; fresh addresses begin at `cursor`, where an earlier life of the daemon stopped.
    pub(crate) fn new(range: Ipv4Net, cursor: Option<Ipv4Addr>, used: &HashSet<Ipv4Addr>) -> Self {
        let first = u32::from(range.network()).saturating_add(2);
        let last = u32::from(range.broadcast()).saturating_sub(1);
        let highest = used.iter().map(|&address| u32::from(address) + 1).max();
        let next = cursor.map(u32::from).into_iter().chain(highest).max().unwrap_or(first).clamp(first, last + 1);
        let freed = (first..next).filter(|&address| !used.contains(&Ipv4Addr::from(address))).collect();
        Self { last, next, freed }
    }

    pub(crate) fn take(&mut self) -> Option<Ipv4Addr> {
        if self.next <= self.last {
            self.next += 1;
            return Some((self.next - 1).into());
        }
        self.freed.pop_front().map(Ipv4Addr::from)
    }

    pub(crate) fn give_back(&mut self, address: Ipv4Addr) {
        self.freed.push_back(address.into());
    }

    pub(crate) fn free(&self) -> u64 {
        u64::from((self.last + 1).saturating_sub(self.next)) + self.freed.len() as u64
    }

    /// The first address never given out.
    pub(crate) fn cursor(&self) -> Ipv4Addr {
        self.next.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_last_is_reused_last() {
        let range = "10.9.0.0/29".parse().unwrap();
        let mut addresses = Addresses::new(range, None, &HashSet::new());
        assert_eq!(addresses.free(), 5);
        let given: Vec<_> = std::iter::from_fn(|| addresses.take()).collect();
        assert_eq!(given.first().unwrap().to_string(), "10.9.0.2");
        assert_eq!(given.last().unwrap().to_string(), "10.9.0.6");
        addresses.give_back(given[3]);
        addresses.give_back(given[0]);
        assert_eq!(addresses.take(), Some(given[3]));
        assert_eq!(addresses.take(), Some(given[0]));
        assert_eq!(addresses.take(), None);
    }

    #[test]
    fn a_later_life_goes_on_where_the_earlier_stopped() {
        let range = "10.9.0.0/29".parse().unwrap();
        let used = HashSet::from(["10.9.0.3".parse().unwrap()]);
        let mut addresses = Addresses::new(range, Some("10.9.0.5".parse().unwrap()), &used);
        let given: Vec<_> = std::iter::from_fn(|| addresses.take()).map(|a| a.octets()[3]).collect();
        assert_eq!(given, [5, 6, 2, 4]);
    }
}
