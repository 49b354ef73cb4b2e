//! Who the guest is: checked as a whole, then applied.

pub mod clock;
mod cloned;
pub mod host_keys;
pub mod netlink;
mod network;
pub mod random;

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use catalyst_agent_protocol::{Identity, Problem, ProblemKind, is_label};

use self::host_keys::Restarting;
use crate::files::{Put, overwrite, replace};
use crate::session::Config;
use crate::users;

/// The user whose `authorized_keys` are written.
pub const USER: &str = "catalyst";

/// What was being done when it failed.
type Step<T> = Result<T, Problem>;

fn doing<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Problem {
    move |error| Problem { kind: ProblemKind::Failed, message: format!("{what} failed: {error}") }
}

/// What of an identity is not text.
struct Checked {
    mac: [u8; 6],
    gateway_mac: Option<[u8; 6]>,
    seed: [u8; random::SEED],
}

/// Checks an identity and applies it. Doing so again changes nothing that is so already. An sshd that was given other keys
/// and comes back has yet to listen.
pub fn apply(config: &Config, identity: &Identity) -> Result<Option<Restarting>, Problem> {
    let checked = check(identity)
        .map_err(|message| Problem { kind: ProblemKind::Invalid, message: message.to_owned() })?;
    clock::set(config, identity.unix_ns).map_err(doing("setting the clock"))?;
    if !config.files_only() {
        random::seed(checked.seed).map_err(doing("seeding the random generator"))?;
    }
    let put: Put = if identity.clone { overwrite } else { replace };
    names(config, identity, put)?;
    let mut sshd = host_keys::apply(config, identity, put)?;
    authorized_keys(config, identity, put)?;
    if config.network && !config.files_only() {
        // One that still listens would answer at the new address with the keys of the original.
        if sshd.as_mut().is_some_and(|sshd| sshd.has_old_keys() && sshd.wait()) {
            sshd = None;
        }
        network::apply(identity, checked.mac, checked.gateway_mac)
            .map_err(doing("setting up the network"))?;
    }
    if identity.clone {
        cloned::apply(config).map_err(doing("telling the clone from its original"))?;
        cloned::run_hooks(config, identity)
            .map_err(|message| Problem { kind: ProblemKind::Failed, message })?;
    }
    Ok(sshd)
}

/// Sets the clock after the guest stood still, and mixes a seed in if one is given.
pub fn go_on(config: &Config, unix_ns: u64, seed: &str) -> Result<(), Problem> {
    clock::set(config, unix_ns).map_err(doing("setting the clock"))?;
    if seed.is_empty() || config.files_only() {
        return Ok(());
    }
    let seed = random::from_hex(seed).ok_or("the seed is not 64 hexadecimal digits");
    let seed = seed.map_err(|message| Problem { kind: ProblemKind::Invalid, message: message.to_owned() })?;
    random::seed(seed).map_err(doing("seeding the random generator"))
}

fn check(identity: &Identity) -> Result<Checked, &'static str> {
    let require = |holds: bool, otherwise: &'static str| if holds { Ok(()) } else { Err(otherwise) };
    require(is_label(&identity.hostname), "the host name is no label of letters, digits and '-'")?;
    let domain = &identity.domain;
    let is_domain = domain.len() <= 253 && domain.split('.').all(is_label);
    require(domain.is_empty() || is_domain, "the domain is no DNS name")?;
    require((1..=32).contains(&identity.prefix), "the prefix's length is not within 1 to 32")?;
    let unusable = |address: Ipv4Addr| {
        address.is_unspecified() || address.is_multicast() || address.is_broadcast() || address.is_loopback()
    };
    let addresses = [identity.address, identity.gateway];
    require(!addresses.into_iter().any(unusable), "the address or the gateway is no host's")?;
    let machine_id = random::from_hex::<16>(&identity.machine_id);
    require(machine_id.is_some_and(|id| id != [0; 16]), "the machine id is not 32 hexadecimal digits")?;
    require(identity.host_keys.len() <= 3, "there are more host keys than kinds")?;
    for key in &identity.host_keys {
        let kind = matches!(key.kind.as_str(), "ed25519" | "ecdsa" | "rsa");
        require(kind, "a host key is none of ed25519, ecdsa, rsa")?;
        let sized = |text: &str| !text.is_empty() && text.len() <= 16 * 1024 && !text.contains('\0');
        require(sized(&key.private) && sized(&key.public), "a host key is empty or too long")?;
        require(!key.public.trim_end().contains('\n'), "a public host key is more than a line")?;
    }
    let lines = &identity.authorized_keys;
    let is_line = |line: &String| line.len() <= 16 * 1024 && !line.contains(['\n', '\r', '\0']);
    require(lines.len() <= 64 && lines.iter().all(is_line), "the authorized keys are no lines, or too many")?;
    let mac = parse_mac(&identity.mac).ok_or("the MAC address is not that of a host")?;
    let gateway_mac = match identity.gateway_mac.as_str() {
        "" => None,
        text => Some(parse_mac(text).ok_or("the gateway's MAC address is not that of a host")?),
    };
    let seed = random::from_hex(&identity.seed).ok_or("the seed is not 64 hexadecimal digits")?;
    Ok(Checked { mac, gateway_mac, seed })
}

/// A host's MAC address, as `52:54:00:…`.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let separated = text.len() == 17 && text.bytes().skip(2).step_by(3).all(|byte| byte == b':');
    let digits: String = text.split(':').collect();
    let mac: [u8; 6] = random::from_hex(&digits).filter(|_| separated)?;
    (mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

/// Host name, hosts(5), resolv.conf(5), machine-id(5).
fn names(config: &Config, identity: &Identity, put: Put) -> Step<()> {
    let Identity { hostname, domain, .. } = identity;
    if !config.files_only() {
        nix::unistd::sethostname(hostname).map_err(doing("setting the host name"))?;
    }
    let etc = config.root.join("etc");
    let write = |name: &str, text: String, mode: u32| put(&etc.join(name), text.as_bytes(), mode, None);
    write("hostname", format!("{hostname}\n"), 0o644).map_err(doing("writing /etc/hostname"))?;
    let (full, search) = if domain.is_empty() {
        (hostname.clone(), String::new())
    } else {
        (format!("{hostname}.{domain} {hostname}"), format!("search {domain}\n"))
    };
    let before = fs::read_to_string(etc.join("hosts")).unwrap_or_default();
    write("hosts", hosts(&before, &full), 0o644).map_err(doing("writing /etc/hosts"))?;
    let resolv = format!("nameserver {}\n{search}", identity.dns);
    write("resolv.conf", resolv, 0o644).map_err(doing("writing /etc/resolv.conf"))?;
    let machine_id = format!("{}\n", identity.machine_id.to_ascii_lowercase());
    match write("machine-id", machine_id.clone(), 0o444) {
        // On a first boot systemd mounts a passing one over it (machine-id(5), "First Boot
        // Semantics"); without the mount it will not commit that one either.
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            nix::mount::umount2(&etc.join("machine-id"), nix::mount::MntFlags::MNT_DETACH)
                .map_err(io::Error::from)
                .and_then(|()| write("machine-id", machine_id.clone(), 0o444))
        }
        other => other,
    }
    .map_err(doing("writing /etc/machine-id"))?;
    let dbus = config.root.join("var/lib/dbus/machine-id");
    // Elsewhere it is a link to the other, or D-Bus is not there.
    if fs::symlink_metadata(&dbus).is_ok_and(|meta| meta.is_file()) {
        put(&dbus, machine_id.as_bytes(), 0o444, None).map_err(doing("writing /var/lib/dbus/machine-id"))?;
    }
    Ok(())
}

/// hosts(5) with the guest's own name in it; what else stands there is its user's.
fn hosts(before: &str, names: &str) -> String {
    let own = format!("127.0.1.1 {names}");
    let is_own = |line: &&str| line.split_whitespace().next() == Some("127.0.1.1");
    let mut lines: Vec<&str> = before.lines().filter(|line| !is_own(line)).collect();
    if lines.iter().all(|line| line.trim().is_empty()) {
        lines = vec!["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"];
    }
    let at = before.lines().position(|line| is_own(&line)).unwrap_or(1).min(lines.len());
    lines.insert(at, &own);
    lines.join("\n") + "\n"
}

fn authorized_keys(config: &Config, identity: &Identity, put: Put) -> Step<()> {
    let Some(user) = users::find(&config.root, USER) else {
        eprintln!("catalyst-agent: no authorized_keys are written: there is no user {USER}");
        return Ok(());
    };
    let home = config.root.join(user.home.trim_start_matches('/'));
    if !home.is_dir() {
        eprintln!("catalyst-agent: no authorized_keys are written: {USER} has no home");
        return Ok(());
    }
    let text: String = identity.authorized_keys.iter().flat_map(|line| [line, "\n"]).collect();
    let owner = (user.uid, user.gid);
    owned_folder(&home.join(".ssh"), owner)
        .and_then(|()| put(&home.join(".ssh/authorized_keys"), text.as_bytes(), 0o600, Some(owner)))
        .map_err(doing("writing the authorized keys"))
}

/// The user owns the home, so what stands there may be a link to anywhere: that is refused.
pub fn owned_folder(path: &Path, (uid, gid): (u32, u32)) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    if !fs::symlink_metadata(path)?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
    chown(path, Some(uid), Some(gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_those_of_host_names() {
        for good in ["a", "vm-1", "X9", &"a".repeat(63)] {
            assert!(is_label(good), "{good}");
        }
        for bad in ["", "-a", "a-", "a.b", "a b", "ä", "a\n", &"a".repeat(64)] {
            assert!(!is_label(bad), "{bad}");
        }
    }

    #[test]
    fn what_a_user_wrote_into_hosts_stays() {
        let fresh = hosts("", "web1.catalyst web1");
        assert_eq!(
            fresh,
            "127.0.0.1 localhost\n127.0.1.1 web1.catalyst web1\n::1 localhost ip6-localhost ip6-loopback\n"
        );
        let edited = fresh.clone() + "10.0.0.9 db\n";
        assert_eq!(hosts(&edited, "web2"), edited.replace("web1.catalyst web1", "web2"));
    }

    #[test]
    fn mac_addresses_are_those_of_hosts() {
        assert_eq!(parse_mac("52:54:00:aB:0c:ff"), Some([0x52, 0x54, 0, 0xab, 0x0c, 0xff]));
        for bad in [
            "",
            "52:54:00:ab:0c",
            "525400ab0cff",
            "5:254:00:ab:0c:ff",
            "01:00:00:00:00:01",
            "00:00:00:00:00:00",
        ] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}
