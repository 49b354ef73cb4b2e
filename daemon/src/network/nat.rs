//! Address translation and the firewall between guests and the rest, as one nftables table of our own.
//!
//! What the table does, and no more:
//! - guests reach everything that the host reaches, with the host's address (masquerade);
//! - guests of one network reach each other; from outside the host only answers come in; another network of
//!   Catalyst's on the same host counts as outside;
//! - a guest that sends with an address outside its subnet is not heard;
//! - TCP connections through a narrower link (VPN, cloud networks) are told its segment size, since path MTU
//!   discovery is broken in many places.
//!
//! Guests reach the host on the bridge's address like any machine of its local network: what the host offers there
//! is the host's own firewall's business, which we neither open nor close. The daemon's REST port is on loopback,
//! where nothing from the bridge arrives. A base chain of ours can accept only for itself: a `drop` in somebody
//! else's chain stays one. [`super::beside`] opens those that document a place for that, [`obstacles`] names the others.

use std::fs::File;
use std::io;
use std::path::Path;

use rtnetlink::sys::{Socket, SocketAddr, protocols};
use serde::Deserialize;

use super::address::Subnet;
use super::beside::Found;
use super::error::NetworkError;
use super::program::run_nft;

/// Sets the table up, replacing what it held, in one transaction. Waits.
pub(crate) fn apply(
    nft: &Path,
    bridge: &str,
    subnet: Subnet,
    lock: Option<&File>,
) -> Result<(), NetworkError> {
    let task = format!("load the table {}", table(bridge));
    run_nft(nft, &["-f", "-"], &ruleset(bridge, subnet), &task, lock).map(drop)
}

/// Removes the table; none is no error. Waits.
pub(crate) fn remove(nft: &Path, bridge: &str, lock: Option<&File>) -> Result<(), NetworkError> {
    let table = table(bridge);
    // Added first: nft 1.0.6 has no `destroy`, and deleting what is not there is an error.
    let input = format!("add table inet {table}\ndelete table inet {table}\n");
    run_nft(nft, &["-f", "-"], &input, &format!("remove the table {table}"), lock).map(drop)
}

/// Whether the table is there, whatever it holds. Waits.
pub(crate) fn is_there(nft: &Path, bridge: &str) -> Result<bool, NetworkError> {
    let json = run_nft(nft, &["-j", "list", "tables"], "", "list its tables", None)?;
    Ok(json.contains(&format!("\"{}\"", table(bridge))))
}

/// The generation of this namespace's nftables rules: a number that each change of any table counts up. Lets a table
/// be known for unchanged without listing it, which takes a process.
pub(crate) fn generation() -> io::Result<u32> {
    // <linux/netfilter/nfnetlink.h> and nf_tables.h: subsystem 10, NFT_MSG_NEWGEN 15, NFT_MSG_GETGEN 16.
    const NEW: u16 = 10 << 8 | 15;
    const GET: u16 = 10 << 8 | 16;
    // An nlmsghdr of 16 octets (length, type, NLM_F_REQUEST, sequence, port) and an nfgenmsg of 4, all zero.
    let mut request = [0_u8; 20];
    request[0] = 20;
    request[4..6].copy_from_slice(&GET.to_ne_bytes());
    request[6] = 1;
    let socket = Socket::new(protocols::NETLINK_NETFILTER)?;
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
    let (reply, _) = socket.recv_from_full()?;
    parse_generation(&reply, NEW)
        .ok_or_else(|| io::Error::other("no generation of nftables rules in the answer"))
}

/// The attribute NFTA_GEN_ID (1, a number in network order) of a netlink message of that type.
fn parse_generation(message: &[u8], kind: u16) -> Option<u32> {
    if message.get(4..6)? != kind.to_ne_bytes() {
        return None;
    }
    let mut attributes = message.get(20..)?;
    while let Some((header, rest)) = attributes.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = rest.get(..length.checked_sub(4)?)?;
        if u16::from_ne_bytes([header[2], header[3]]) == 1 {
            return Some(u32::from_be_bytes(value.try_into().ok()?));
        }
        attributes = rest.get(value.len().next_multiple_of(4)..)?;
    }
    None
}

/// The table's name.
fn table(bridge: &str) -> String {
    format!("catalyst_{bridge}")
}

fn ruleset(bridge: &str, subnet: Subnet) -> String {
    let table = table(bridge);
    format!(
        r#"add table inet {table}
delete table inet {table}
table inet {table} {{
    chain from_guests {{
        type filter hook prerouting priority raw; policy accept;
        iifname "{bridge}" ip saddr != {{ 0.0.0.0, {subnet} }} drop
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "{bridge}" oifname "{bridge}" accept
        iifname "{bridge}" tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
        iifname "{bridge}" accept
        oifname "{bridge}" ct state established,related accept
        oifname "{bridge}" drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {subnet} oifname != "{bridge}" masquerade
    }}
}}
"#
    )
}

/// Chains of others that may keep guests from the network although all of ours is right, each in words with what
/// to do. Docker and the usual firewalls drop forwarded packets that they do not know. Waits.
/// Those of firewalls that were `found` to let the bridge through are none; one that does not is.
pub(crate) fn obstacles(nft: &Path, bridge: &str, found: &[Found]) -> Result<Vec<String>, NetworkError> {
    let json = run_nft(nft, &["-j", "list", "chains"], "", "list its chains", None)?;
    let closed = found.iter().filter(|found| !found.admits).map(|found| {
        format!(
            "{} does not let the guests of {bridge} through: {}",
            found.firewall.place(),
            found.firewall.remedy()
        )
    });
    Ok(closed.chain(parse_obstacles(&json, bridge, found)).collect())
}

#[derive(Deserialize)]
struct Listing {
    nftables: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    chain: Option<Chain>,
}

#[derive(Deserialize)]
struct Chain {
    family: String,
    table: String,
    name: String,
    hook: Option<String>,
    policy: Option<String>,
}

fn parse_obstacles(json: &str, bridge: &str, found: &[Found]) -> Vec<String> {
    let Ok(listing) = serde_json::from_str::<Listing>(json) else { return Vec::new() };
    let is_known =
        |chain: &Chain| chain.table == "filter" && found.iter().any(|found| found.firewall.owns(&chain.name));
    let dropping = |chain: &Chain| {
        matches!(chain.family.as_str(), "ip" | "inet")
            && chain.policy.as_deref() == Some("drop")
            && !is_known(chain)
    };
    let chains = listing.nftables.into_iter().filter_map(|item| item.chain).filter(dropping);
    chains
        .filter_map(|chain| {
            let (what, remedy) = match chain.hook.as_deref()? {
                "forward" => {
                    ("forwarded packets", format!("accept iifname {bridge} and oifname {bridge} there"))
                }
                "input" => {
                    ("packets to the host", format!("accept udp 53, udp 67 and tcp 53 from {bridge} there"))
                }
                _ => return None,
            };
            let Chain { family, table, name, .. } = chain;
            Some(format!(
                "chain {name} of nftables table {family} {table} drops {what} that it does not know: \
                 if guests get no network, {remedy}"
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::beside::Firewall;
    use super::*;

    #[test]
    fn chains_that_drop_by_policy_are_named() {
        let json = r#"{"nftables":[{"metainfo":{"version":"1.0.6"}},
            {"chain":{"family":"ip","table":"filter","name":"FORWARD","handle":1,"type":"filter","hook":"forward","prio":0,"policy":"drop"}},
            {"chain":{"family":"ip","table":"filter","name":"INPUT","handle":1,"type":"filter","hook":"input","prio":0,"policy":"accept"}},
            {"chain":{"family":"ip6","table":"filter","name":"FORWARD","handle":1,"type":"filter","hook":"forward","prio":0,"policy":"drop"}},
            {"chain":{"family":"ip","table":"filter","name":"DOCKER","handle":2}}]}"#;
        let found = parse_obstacles(json, "catalyst0", &[]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("FORWARD of nftables table ip filter") && found[0].contains("catalyst0"));
        let docker = Found { firewall: Firewall::Docker, admits: true };
        assert!(parse_obstacles(json, "catalyst0", &[docker]).is_empty());
        assert!(parse_obstacles("not json", "catalyst0", &[]).is_empty());
    }

    #[test]
    fn a_generation_is_read_from_a_whole_message_only() {
        let mut message = vec![0_u8; 20];
        message[4..6].copy_from_slice(&7_u16.to_ne_bytes());
        for (kind, value) in [(2_u16, 99_u32), (1, 5)] {
            message.extend(8_u16.to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend(value.to_be_bytes());
        }
        assert_eq!(parse_generation(&message, 7), Some(5));
        assert_eq!(parse_generation(&message, 8), None);
        for length in 0..message.len() {
            assert_eq!(parse_generation(&message[..length], 7), None, "{length}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_parsed_without_a_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..80)) {
            let kind = bytes.get(4..6).map_or(0, |kind| u16::from_ne_bytes([kind[0], kind[1]]));
            parse_generation(&bytes, kind);
            parse_obstacles(&String::from_utf8_lossy(&bytes), "catalyst0", &[]);
        }
    }
}
