//! What can go wrong with the network, in words for the user.

use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use super::address::Subnet;

/// A text is no address.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// Not a hardware address.
    #[error("{0:?} is no MAC address: six pairs of hexadecimal digits with colons between are one")]
    Mac(String),
    /// Not a subnet.
    #[error(
        "{0:?} is no IPv4 subnet: write it as its first address, a slash and the prefix length, like 10.213.0.0/20"
    )]
    Subnet(String),
}

/// An operation on the network failed. Every message names what was tried, on what, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A file could not be read, written or removed.
    #[error("cannot {verb} {}", path.display())]
    File {
        /// "read", "write"...
        verb: &'static str,
        /// Which file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The saved choice of bridge and subnet cannot be used.
    #[error(
        "{} holds no network settings that can be used ({reason}): delete it to have others chosen; \
         virtual machines outside the new subnet then get new addresses", path.display()
    )]
    BadState {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        reason: String,
    },
    /// The asked-for bridge name is none.
    #[error("{0:?} is no name for a bridge: 1 to 15 letters, digits, '-' and '_', a letter first")]
    BadBridge(String),
    /// The asked-for subnet is unfit.
    #[error("{subnet} cannot be the network of virtual machines: {reason}")]
    BadSubnet {
        /// What was asked for.
        subnet: Subnet,
        /// Why not.
        reason: &'static str,
    },
    /// Bridge or subnet were asked to change under a network that is up.
    #[error(
        "the network is up as bridge {bridge} with {subnet}: stop its virtual machines and run \
         `catalyst network down` before changing either"
    )]
    ChangeWhileUp {
        /// The bridge that is up.
        bridge: String,
        /// Its subnet.
        subnet: Subnet,
    },
    /// Every candidate collides with the host.
    #[error("every private subnet that was tried is in use on this machine: name a free one with --subnet")]
    NoSubnet,
    /// A collision that came after the choice.
    #[error(
        "the network of virtual machines, {subnet}, overlaps the {user}: remove that, \
         or choose another with --subnet (virtual machines then get new addresses)"
    )]
    Collision {
        /// Ours.
        subnet: Subnet,
        /// Theirs, as "route 10.213.0.0/16 on tun0".
        user: String,
    },
    /// All addresses are given away.
    #[error(
        "all {count} addresses of {subnet} are taken: delete virtual machines, or choose a larger --subnet"
    )]
    Full {
        /// The subnet.
        subnet: Subnet,
        /// How many addresses it has for virtual machines.
        count: u32,
    },
    /// A link of the bridge's name exists and is not ours.
    #[error(
        "a network link {bridge} exists and is not this daemon's: \
         remove it (`ip link delete {bridge}`) or choose another with --bridge"
    )]
    ForeignLink {
        /// The name.
        bridge: String,
    },
    /// Another daemon has the bridge.
    #[error("bridge {bridge} belongs to the daemon with the state folder {}: choose another with --bridge", owner.display())]
    Claimed {
        /// The name.
        bridge: String,
        /// The other daemon's state folder.
        owner: PathBuf,
    },
    /// The lease was released, or never given.
    #[error("{id} has no lease of {address}: it was released; ask for one before powering on")]
    NoLease {
        /// The virtual machine.
        id: String,
        /// The address.
        address: Ipv4Addr,
    },
    /// The bridge is not there.
    #[error("bridge {bridge} is not there: power a virtual machine on to have it made again")]
    NoBridge {
        /// The name.
        bridge: String,
    },
    /// `down` with virtual machines attached.
    #[error("{} still on bridge {bridge}: power the virtual machines off first", ports_text(ports))]
    InUse {
        /// The bridge.
        bridge: String,
        /// Names of the interfaces on it.
        ports: Vec<String>,
    },
    /// A program is missing.
    #[error("{program} is not installed: run `sudo apt install {package}`")]
    MissingProgram {
        /// The program.
        program: &'static str,
        /// Debian's package.
        package: &'static str,
    },
    /// A program did not start.
    #[error("cannot start {}", program.display())]
    Spawn {
        /// Its path.
        program: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A program answered with an error.
    #[error("{program} refused to {task}: {output}")]
    Program {
        /// The program.
        program: &'static str,
        /// What it was to do.
        task: String,
        /// The last lines it printed.
        output: String,
    },
    /// dnsmasq does not end.
    #[error("dnsmasq (process {pid}) of bridge {bridge} does not end, even killed")]
    Unkillable {
        /// Its process id.
        pid: i32,
        /// Its bridge.
        bridge: String,
    },
    /// Another daemon does not let go of the lock.
    #[error("another daemon has been changing the network for 30 s: `fuser -v {}` shows which", path.display())]
    Busy {
        /// The lock.
        path: PathBuf,
    },
    /// The kernel refused a change of links, addresses or routes.
    #[error("cannot {task}")]
    Netlink {
        /// What was tried, on what.
        task: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Not root.
    #[error("cannot {task} without root: start the daemon with sudo, or its systemd unit catalyst@USER")]
    NotRoot {
        /// What was tried.
        task: String,
    },
    /// No TUN device.
    #[error("cannot open /dev/net/tun: load the driver with `sudo modprobe tun`")]
    NoTun(#[source] io::Error),
    /// A tap could not be made.
    #[error("cannot make a tap interface for {address}")]
    Tap {
        /// The address of the virtual machine that it is for.
        address: Ipv4Addr,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl NetworkError {
    /// A failed file operation, for `map_err`.
    pub(crate) fn file(verb: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { verb, path, source }
    }
}

fn ports_text(ports: &[String]) -> String {
    const SHOWN: usize = 8;
    let listed = ports.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    match ports.len() {
        0..=SHOWN => format!("{listed} {}", if ports.len() == 1 { "is" } else { "are" }),
        more => format!("{listed} and {} more are", more - SHOWN),
    }
}
