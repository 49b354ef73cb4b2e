//! Hardware addresses and IPv4 subnets, as text and as numbers.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use rand::Rng;
use serde::{Deserialize, Serialize};

use super::error::AddressError;

/// The first two octets of every MAC that Catalyst hands out: locally administered, unicast (IEEE 802, 48-bit EUI).
const OWN_PREFIX: [u8; 2] = [0x02, 0xca];

/// An Ethernet hardware address; text form `02:ca:00:11:22:33`, lower case.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A new address under Catalyst's prefix with 32 random bits.
    pub fn random() -> Self {
        Self::with_tail(rand::rng().random())
    }

    /// The address under Catalyst's prefix with the given tail.
    pub(crate) fn with_tail(tail: [u8; 4]) -> Self {
        let [p0, p1] = OWN_PREFIX;
        let [t0, t1, t2, t3] = tail;
        Self([p0, p1, t0, t1, t2, t3])
    }

    /// Whether one network card may have it: neither a group address nor all zero.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let octets = self.0.map(|octet| format!("{octet:02x}"));
        f.write_str(&octets.join(":"))
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let mut octets = [0_u8; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().filter(|part| part.len() == 2 && part.is_ascii());
            // from_str_radix takes a sign, which two hexadecimal digits do not have.
            *octet = part
                .filter(|part| !part.starts_with(['+', '-']))
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(|| AddressError::Mac(text.chars().take(40).collect()))?;
        }
        match parts.next() {
            None => Ok(Self(octets)),
            Some(_) => Err(AddressError::Mac(text.chars().take(40).collect())),
        }
    }
}

impl TryFrom<String> for Mac {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

/// An IPv4 network, host bits zero; text form `10.213.64.0/20`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    network: u32,
    prefix: u8,
}

impl Subnet {
    /// The network of `prefix` bits (0 to 32) that `address` lies in.
    pub fn containing(address: Ipv4Addr, prefix: u8) -> Self {
        let prefix = prefix.min(32);
        Self { network: u32::from(address) & mask(prefix), prefix }
    }

    /// The network's number, its lowest address.
    pub fn network(self) -> Ipv4Addr {
        self.network.into()
    }

    /// Length of the prefix in bits.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The netmask.
    pub fn netmask(self) -> Ipv4Addr {
        mask(self.prefix).into()
    }

    /// The highest address, broadcast in a network of guests.
    pub fn broadcast(self) -> Ipv4Addr {
        (self.network | !mask(self.prefix)).into()
    }

    /// The address `offset` above the network's number, if it is inside.
    pub fn nth(self, offset: u32) -> Option<Ipv4Addr> {
        let address = Ipv4Addr::from(self.network.checked_add(offset)?);
        self.contains(address).then_some(address)
    }

    /// Whether `address` lies in it.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & mask(self.prefix) == self.network
    }

    /// Whether the two share an address.
    pub fn overlaps(self, other: Self) -> bool {
        let shorter = mask(self.prefix.min(other.prefix));
        self.network & shorter == other.network & shorter
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.prefix)
    }
}

impl fmt::Debug for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Subnet {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let bad = || AddressError::Subnet(text.chars().take(40).collect());
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let address: Ipv4Addr = address.parse().map_err(|_| bad())?;
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        let subnet = Self::containing(address, prefix);
        if prefix > 32 || subnet.network() != address {
            return Err(bad());
        }
        Ok(subnet)
    }
}

impl TryFrom<String> for Subnet {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn malformed_text_is_refused() {
        for text in
            ["", "02:ca", "02:ca:00:00:00:0g", "02:ca:00:00:00:00:00", "2:ca:0:0:0:0", "+2:ca:00:00:00:00"]
        {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
        for text in ["", "10.0.0.0", "10.0.0.1/24", "10.0.0.0/33", "10.0.0/8", "0.0.0.0/-1", "10.0.0.0/8/8"] {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
    }

    #[test]
    fn own_macs_are_locally_administered_and_unicast() {
        let mac = Mac::random();
        assert!(mac.is_unicast());
        assert_eq!(mac.0[0] & 2, 2);
        assert!(!Mac([1, 0, 0, 0, 0, 0]).is_unicast());
    }

    #[test]
    fn the_extremes_of_prefix_length_hold() {
        let all: Subnet = "0.0.0.0/0".parse().unwrap();
        let one: Subnet = "255.255.255.255/32".parse().unwrap();
        assert!(all.contains(Ipv4Addr::BROADCAST) && all.overlaps(one));
        assert_eq!(one.broadcast(), Ipv4Addr::BROADCAST);
        assert_eq!(one.nth(1), None);
        assert_eq!("10.0.0.0/20".parse::<Subnet>().unwrap().netmask(), Ipv4Addr::new(255, 255, 240, 0));
    }

    proptest! {
        #[test]
        fn text_goes_there_and_back(octets: [u8; 6], address: u32, prefix in 0_u8..=32) {
            prop_assert_eq!(Mac(octets).to_string().parse::<Mac>().unwrap(), Mac(octets));
            let subnet = Subnet::containing(address.into(), prefix);
            prop_assert_eq!(subnet.to_string().parse::<Subnet>().unwrap(), subnet);
        }

        #[test]
        fn networks_overlap_when_one_contains_the_others_number(a: u32, b: u32, p in 0_u8..=32, q in 0_u8..=32) {
            let (one, two) = (Subnet::containing(a.into(), p), Subnet::containing(b.into(), q));
            let expected = one.contains(two.network()) || two.contains(one.network());
            prop_assert_eq!(one.overlaps(two), expected);
            prop_assert_eq!(two.overlaps(one), expected);
        }

        #[test]
        fn any_text_is_parsed_or_refused_without_a_panic(text in ".{0,60}") {
            let _ = text.parse::<Mac>();
            let _ = text.parse::<Subnet>();
        }
    }
}
