//! The choice of a subnet that collides with nothing of the host's.

use std::net::Ipv4Addr;

use super::address::Subnet;

/// A range of addresses that the host uses, and what uses it, in words for a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRange {
    /// The addresses.
    pub subnet: Subnet,
    /// Who uses them, as "route 10.8.0.0/16 on tun0".
    pub user: String,
}

impl HostRange {
    /// Whether it stands in the way of a network of guests.
    ///
    /// Prefixes below 8 bits do not: they are default routes, whole (`0.0.0.0/0`) or in halves and quarters, as VPNs
    /// add them to win over the real one. No network of private addresses is larger than 10.0.0.0/8.
    fn is_specific(&self) -> bool {
        self.subnet.prefix() >= 8
    }
}

/// The range of the host's that `subnet` collides with, if any.
pub fn collision(subnet: Subnet, used: &[HostRange]) -> Option<&HostRange> {
    used.iter().find(|range| range.is_specific() && range.subnet.overlaps(subnet))
}

/// The first candidate that collides with nothing in `used`.
pub fn choose(used: &[HostRange]) -> Option<Subnet> {
    candidates().find(|candidate| collision(*candidate, used).is_none())
}

/// The subnets that are tried, in order: 4,096 addresses each, in parts of the private ranges that few networks use,
/// then 256 addresses each, for a host on which those are all taken.
///
/// 4,096 because a VM holds its address for life, powered on or not, and a store of thousands is normal.
fn candidates() -> impl Iterator<Item = Subnet> {
    let ten = (208..224).flat_map(|b| (0..16).map(move |c| (Ipv4Addr::new(10, b, c * 16, 0), 20)));
    let twelve = (0..16).map(|c| (Ipv4Addr::new(172, 29, c * 16, 0), 20));
    let sixteen = (13..15).map(|c| (Ipv4Addr::new(192, 168, c * 16, 0), 20));
    let small = [(10, 231), (172, 30), (192, 168)]
        .into_iter()
        .flat_map(|(a, b)| (150..200).map(move |c| (Ipv4Addr::new(a, b, c, 0), 24)));
    let shared = (64..128).map(|b| (Ipv4Addr::new(100, b, 208, 0), 20));
    ten.chain(twelve)
        .chain(sixteen)
        .chain(small)
        .chain(shared)
        .map(|(address, prefix)| Subnet::containing(address, prefix))
}

/// Why `subnet` cannot be a network of guests on any host, if it cannot.
///
/// Only private ranges (RFC 1918) and the shared one (RFC 6598) are taken: a route for public addresses to a bridge
/// would turn the host's own traffic away from the machines that have them.
pub fn unfit(subnet: Subnet) -> Option<&'static str> {
    const RANGES: [(Ipv4Addr, u8); 4] = [
        (Ipv4Addr::new(10, 0, 0, 0), 8),
        (Ipv4Addr::new(172, 16, 0, 0), 12),
        (Ipv4Addr::new(192, 168, 0, 0), 16),
        (Ipv4Addr::new(100, 64, 0, 0), 10),
    ];
    if !(8..=27).contains(&subnet.prefix()) {
        return Some("its prefix is not between 8 and 27 bits");
    }
    let private = RANGES.iter().any(|(network, prefix)| {
        subnet.prefix() >= *prefix && Subnet::containing(*network, *prefix).contains(subnet.network())
    });
    (!private).then_some("it is not inside 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16 or 100.64.0.0/10")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> HostRange {
        HostRange { subnet: text.parse().unwrap(), user: format!("route {text} on test0") }
    }

    #[test]
    fn every_candidate_is_fit_and_overlaps_no_other() {
        let all: Vec<Subnet> = candidates().collect();
        for (index, candidate) in all.iter().enumerate() {
            assert_eq!(unfit(*candidate), None, "{candidate}");
            assert!(all[index + 1..].iter().all(|other| !other.overlaps(*candidate)), "{candidate}");
        }
    }

    #[test]
    fn the_choice_is_the_same_each_time_and_steps_around_what_the_host_has() {
        assert_eq!(choose(&[]), choose(&[]));
        let first = choose(&[]).unwrap();
        let inside =
            HostRange { subnet: Subnet::containing(first.nth(300).unwrap(), 32), user: String::new() };
        assert_ne!(choose(&[inside]).unwrap(), first);
        let ten = range("10.0.0.0/8");
        assert_eq!(choose(std::slice::from_ref(&ten)).unwrap().to_string(), "172.29.0.0/20");
        assert_eq!(choose(&[ten, range("172.16.0.0/12")]).unwrap().to_string(), "192.168.208.0/20");
    }

    #[test]
    fn default_routes_whole_or_split_stand_in_nobodys_way() {
        let used = ["0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1", "8.0.0.0/5"].map(range);
        assert_eq!(choose(&used), choose(&[]));
    }

    #[test]
    fn a_host_that_uses_every_private_range_gets_none() {
        let used = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"].map(range);
        assert_eq!(choose(&used), None);
    }

    #[test]
    fn public_and_odd_subnets_are_refused() {
        for text in
            ["8.8.8.0/24", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/8", "172.0.0.0/8", "10.0.0.0/28"]
        {
            assert!(unfit(text.parse().unwrap()).is_some(), "{text}");
        }
        for text in ["10.0.0.0/8", "172.31.0.0/16", "192.168.1.0/24", "100.100.0.0/16", "192.168.1.32/27"] {
            assert!(unfit(text.parse().unwrap()).is_none(), "{text}");
        }
    }
}
