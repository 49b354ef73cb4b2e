//! Who has which address: leases, given at creation and kept for life.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::Ipv4Addr;

use catalyst_images::digest::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::address::{Mac, Subnet};
use super::error::NetworkError;

/// The domain under which virtual machines have names: `web1.catalyst`.
pub const DOMAIN: &str = "catalyst";

/// The name under which guests find the host: `host.catalyst`.
pub(crate) const HOST_NAME: &str = "host";

/// The first address for a virtual machine, counted from the subnet's number; below are the gateway's and spare ones.
const FIRST: u32 = 10;

/// What a virtual machine's network card and its guest are set to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The virtual machine.
    pub id: String,
    /// Its name in [`DOMAIN`], one DNS label: the id in lower case where that is a label nobody has.
    pub name: String,
    /// The card's hardware address.
    pub mac: Mac,
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Length of the subnet's prefix in bits.
    pub prefix: u8,
    /// The default router, which is the bridge.
    pub gateway: Ipv4Addr,
    /// The hardware address of the bridge.
    pub gateway_mac: Mac,
    /// The name server, which is the bridge.
    pub dns: Ipv4Addr,
    /// The domain to search: [`DOMAIN`].
    pub domain: String,
    /// Why this is not the MAC and address that were asked for, if it is not; for the log and for `vm show`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<String>,
}

/// The leases of one network, in memory.
#[derive(Debug)]
pub(crate) struct LeaseTable {
    subnet: Subnet,
    bridge_mac: Mac,
    by_id: HashMap<String, Lease>,
    by_address: BTreeMap<Ipv4Addr, String>,
    macs: HashSet<Mac>,
    names: HashSet<String>,
    /// Every assignable address below this one is taken.
    free_from: Ipv4Addr,
}

impl LeaseTable {
    /// An empty table. `bridge_mac` is the gateway's and given to nobody.
    pub fn new(subnet: Subnet, bridge_mac: Mac) -> Self {
        Self {
            subnet,
            bridge_mac,
            by_id: HashMap::new(),
            by_address: BTreeMap::new(),
            macs: HashSet::new(),
            names: HashSet::from([HOST_NAME.to_owned()]),
            free_from: subnet.network(),
        }
    }

    /// The network's subnet.
    pub fn subnet(&self) -> Subnet {
        self.subnet
    }

    /// The bridge's own address, the first of the subnet.
    pub fn gateway(&self) -> Ipv4Addr {
        gateway(self.subnet)
    }

    /// Whether nobody has a lease.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Every lease, in the order of addresses.
    pub fn all(&self) -> Vec<Lease> {
        self.by_address.values().filter_map(|id| self.by_id.get(id)).cloned().collect()
    }

    /// The lease of `id`.
    pub fn get(&self, id: &str) -> Option<&Lease> {
        self.by_id.get(id)
    }

    /// The lease of `id`: the one it has, else the `wanted` one if that can be had, else a new one with the lowest
    /// free address.
    pub fn lease_for(&mut self, id: &str, wanted: Option<(Mac, Ipv4Addr)>) -> Result<Lease, NetworkError> {
        let (mac, address) = wanted.unzip();
        self.lease_with(id, mac, address)
    }

    /// The same where only one of both may be wanted.
    pub fn lease_with(
        &mut self,
        id: &str,
        mac: Option<Mac>,
        address: Option<Ipv4Addr>,
    ) -> Result<Lease, NetworkError> {
        if let Some(lease) = self.by_id.get(id) {
            return Ok(lease.clone());
        }
        let mut changes = Vec::new();
        let address = match address {
            Some(address) => match self.address_problem(address) {
                None => address,
                Some(problem) => {
                    let other = self.lowest_free()?;
                    changes.push(format!("address {other} instead of {address}, which {problem}"));
                    other
                }
            },
            None => self.lowest_free()?,
        };
        let mac = match mac {
            Some(mac) if mac.is_unicast() && mac != self.bridge_mac && !self.macs.contains(&mac) => mac,
            Some(mac) => {
                let other = self.unused_mac();
                changes.push(format!("MAC {other} instead of {mac}, which is taken or no card's"));
                other
            }
            None => self.unused_mac(),
        };
        let lease = Lease {
            id: id.to_owned(),
            name: self.name_for(id),
            mac,
            address,
            prefix: self.subnet.prefix(),
            gateway: self.gateway(),
            gateway_mac: self.bridge_mac,
            dns: self.gateway(),
            domain: DOMAIN.to_owned(),
            changed: (!changes.is_empty()).then(|| changes.join("; ")),
        };
        self.macs.insert(mac);
        self.names.insert(lease.name.clone());
        self.by_address.insert(address, id.to_owned());
        self.by_id.insert(id.to_owned(), lease.clone());
        Ok(lease)
    }

    /// Takes the lease of `id` back.
    pub fn release(&mut self, id: &str) -> Option<Lease> {
        let lease = self.by_id.remove(id)?;
        self.by_address.remove(&lease.address);
        self.free_from = self.free_from.min(lease.address);
        self.macs.remove(&lease.mac);
        self.names.remove(&lease.name);
        Some(lease)
    }

    fn address_problem(&self, address: Ipv4Addr) -> Option<String> {
        if !self.subnet.contains(address) {
            return Some(format!("is outside the network's {}", self.subnet));
        }
        if [self.subnet.network(), self.gateway(), self.subnet.broadcast()].contains(&address) {
            return Some("is the network's own".to_owned());
        }
        self.by_address.get(&address).map(|owner| format!("{owner} has"))
    }

    fn lowest_free(&mut self) -> Result<Ipv4Addr, NetworkError> {
        let free = assignable(self.subnet, self.free_from)
            .find(|address| !self.by_address.contains_key(address))
            .ok_or_else(|| NetworkError::Full { subnet: self.subnet, count: count(self.subnet) })?;
        self.free_from = free;
        Ok(free)
    }

    fn unused_mac(&self) -> Mac {
        // Ends: 2^32 addresses under the prefix and a few thousand taken.
        loop {
            let mac = Mac::random();
            if mac != self.bridge_mac && !self.macs.contains(&mac) {
                return mac;
            }
        }
    }

    /// A label for `id` that no other has. Two ids that differ only in what DNS does not tell apart share the label
    /// up to six digits of a hash, which the later one carries.
    fn name_for(&self, id: &str) -> String {
        let label = label(id, 63);
        if !label.is_empty() && !self.names.contains(&label) {
            return label;
        }
        let digest = Sha256::digest(id.as_bytes());
        let stem = match self::label(id, 46) {
            stem if stem.is_empty() => "vm".to_owned(),
            stem => stem,
        };
        // Longer and longer parts of the hash: another machine may be named like the first ones on purpose.
        (3..=8)
            .map(|bytes| format!("{stem}-{}", hex(&digest[..bytes])))
            .find(|name| !self.names.contains(name))
            .unwrap_or_else(|| format!("vm-{}", hex(&digest[..30])))
    }
}

/// The bridge's address in `subnet`.
pub(crate) fn gateway(subnet: Subnet) -> Ipv4Addr {
    subnet.nth(1).unwrap_or_else(|| subnet.network())
}

/// The addresses that virtual machines can have, lowest first. Those that end in .0 or .255 are left out: in a
/// subnet larger than /24 they are ordinary, and some software still refuses them. Those below `from` are left out too.
fn assignable(subnet: Subnet, from: Ipv4Addr) -> impl Iterator<Item = Ipv4Addr> {
    let first = u32::from(subnet.network()).saturating_add(FIRST).max(from.into());
    (first..u32::from(subnet.broadcast()))
        .filter(|address| !matches!(address & 0xff, 0 | 0xff))
        .map(Ipv4Addr::from)
}

fn count(subnet: Subnet) -> u32 {
    u32::try_from(assignable(subnet, subnet.network()).count()).unwrap_or(u32::MAX)
}

/// `id` as a DNS label of at most `length` octets (RFC 1123, and `_`, which dnsmasq and resolvers take): lower case,
/// anything else a '-', none at either end. May be empty.
fn label(id: &str, length: usize) -> String {
    let text: String = id
        .chars()
        .map(|c| c.to_ascii_lowercase())
        .map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' })
        .skip_while(|c| !c.is_ascii_alphanumeric())
        .take(length)
        .collect();
    text.trim_end_matches(['-', '_']).to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(subnet: &str) -> LeaseTable {
        LeaseTable::new(subnet.parse().unwrap(), Mac::with_tail([0; 4]))
    }

    #[test]
    fn addresses_are_the_lowest_free_and_come_back_after_release() {
        let mut leases = table("10.213.0.0/20");
        let ends: Vec<u8> =
            (0..3).map(|n| leases.lease_for(&format!("vm{n}"), None).unwrap().address.octets()[3]).collect();
        assert_eq!(ends, [10, 11, 12]);
        let old = leases.release("vm1").unwrap();
        let new = leases.lease_for("other", None).unwrap();
        assert_eq!(new.address, old.address);
        assert_ne!(new.mac, old.mac);
        assert_eq!(leases.lease_for("other", None).unwrap(), new, "a second call answers the same lease");
        assert_eq!(leases.release("vm1"), None);
        for id in ["vm2", "vm0"] {
            leases.release(id);
        }
        let ends = ["x", "y", "z"].map(|id| leases.lease_for(id, None).unwrap().address.octets()[3]);
        assert_eq!(ends, [10, 12, 13]);
    }

    #[test]
    fn stored_leases_are_kept_and_a_new_machine_avoids_them() {
        let mut leases = table("10.213.0.0/20");
        let mac = Mac::with_tail([1, 2, 3, 4]);
        let kept = leases.lease_for("a", Some((mac, Ipv4Addr::new(10, 213, 0, 10)))).unwrap();
        assert_eq!((kept.mac, kept.address, kept.changed), (mac, Ipv4Addr::new(10, 213, 0, 10), None));
        assert_eq!(leases.lease_for("b", None).unwrap().address, Ipv4Addr::new(10, 213, 0, 11));
    }

    #[test]
    fn a_stored_lease_that_cannot_be_had_is_replaced_and_says_why() {
        let mut leases = table("10.213.0.0/20");
        let mac = Mac::with_tail([1, 2, 3, 4]);
        let first = leases.lease_for("a", Some((mac, Ipv4Addr::new(10, 213, 0, 20)))).unwrap();
        let twin = leases.lease_for("b", Some((mac, first.address))).unwrap();
        assert_ne!(twin.mac, mac);
        assert_eq!(twin.address, Ipv4Addr::new(10, 213, 0, 10));
        assert!(twin.changed.unwrap().contains("which a has"));
        for (id, address) in
            [("c", "192.168.1.9"), ("d", "10.213.0.1"), ("e", "10.213.15.255"), ("f", "10.213.0.0")]
        {
            let lease = leases.lease_for(id, Some((Mac::random(), address.parse().unwrap()))).unwrap();
            assert!(lease.changed.is_some_and(|text| text.contains(address)), "{address}");
        }
        let group = leases.lease_for("g", Some((Mac([0xff; 6]), "10.213.0.77".parse().unwrap()))).unwrap();
        assert!(group.mac.is_unicast() && group.changed.is_some());
    }

    #[test]
    fn a_full_subnet_is_an_error_that_says_how_large_it_is() {
        let mut leases = table("10.213.0.0/27");
        for n in 0..21 {
            leases.lease_for(&format!("vm{n}"), None).unwrap();
        }
        let error = leases.lease_for("one more", None).unwrap_err().to_string();
        assert!(error.contains("all 21 addresses of 10.213.0.0/27"), "{error}");
    }

    #[test]
    fn names_are_the_ids_where_dns_allows() {
        let mut leases = table("10.213.0.0/20");
        let mut name = |id: &str| leases.lease_for(id, None).unwrap().name;
        assert_eq!(name("web1"), "web1");
        assert_eq!(name("My_VM.2"), "my_vm-2");
        let twin = name("WEB1");
        assert!(twin.starts_with("web1-") && twin.len() == 11, "{twin}");
        assert!(name("host").starts_with("host-"), "the host's own name is not a guest's");
        assert!(name("\u{e9}\u{e8}").starts_with("vm-"));
    }

    #[test]
    fn the_last_of_thousands_takes_hardly_longer_than_the_first() {
        let mut leases = table("10.208.0.0/16");
        let mut take = |numbers: std::ops::Range<u32>| {
            let start = std::time::Instant::now();
            numbers.for_each(|n| drop(leases.lease_for(&format!("vm{n}"), None).unwrap()));
            start.elapsed()
        };
        let early = take(0..2000);
        take(2000..30_000);
        let late = take(30_000..32_000);
        println!("2000 leases: {early:?}, with 30000 others: {late:?}");
        assert!(late < early * 20, "{late:?} after {early:?}");
    }

    proptest! {
        #[test]
        fn any_ids_get_distinct_lawful_names_and_addresses(ids in prop::collection::hash_set(".{0,80}", 1..20)) {
            let mut leases = table("10.213.0.0/20");
            let all: Vec<Lease> = ids.iter().map(|id| leases.lease_for(id, None).unwrap()).collect();
            for lease in &all {
                prop_assert!((1..=63).contains(&lease.name.len()), "{}", lease.name);
                prop_assert!(lease.name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b)));
                prop_assert!(lease.name.as_bytes()[0].is_ascii_alphanumeric());
            }
            prop_assert_eq!(all.iter().map(|l| &l.name).collect::<HashSet<_>>().len(), all.len());
            prop_assert_eq!(all.iter().map(|l| l.address).collect::<HashSet<_>>().len(), all.len());
            prop_assert_eq!(all.iter().map(|l| l.mac).collect::<HashSet<_>>().len(), all.len());
        }
    }
}
