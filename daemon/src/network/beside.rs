//! The firewalls of others that this host may have, where forwarded packets that they do not know are dropped.
//!
//! An `accept` in our own table helps nothing there, since each base chain has its say. So the bridge is let through at
//! the place that each of them documents for that, marked as ours, and taken out again with the network:
//! - Docker: its chain `DOCKER-USER`, which it leaves alone ("Packet filtering and firewalls" in its documentation);
//! - ufw: `ufw route allow` (ufw(8)), and what guests need of the host itself, names and leases;
//! - firewalld: a zone of its own (`firewalld`).
//!
//! One that comes up later is met when it does (`watch`).
//!
//! One that fails keeps no VM from starting: it is logged, and `doctor` says what drops.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use catalyst_images::digest::hex;

use super::firewalld;
use super::program::{command, find, finish_within, last_lines};

/// A chain that ufw has while it is on.
const UFW_CHAIN: &str = "ufw-user-forward";
/// The system's bus (D-Bus Specification, "System message bus").
const BUS: &str = "/run/dbus/system_bus_socket";
const UFW_RULES: &str = "/etc/ufw/user.rules";
/// How long one of their programs may take: ufw and firewalld are in Python, wait for each other's changes, and may be
/// just coming up on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// A firewall of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Firewall {
    Docker,
    Ufw,
    Firewalld,
}

/// One that is at work here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub firewall: Firewall,
    /// Whether it lets our bridge through.
    pub admits: bool,
}

impl Firewall {
    const ALL: [Self; 3] = [Self::Docker, Self::Ufw, Self::Firewalld];

    /// Where the bridge is let through, in words.
    pub const fn place(self) -> &'static str {
        match self {
            Self::Docker => "Docker's chain DOCKER-USER",
            Self::Ufw => "ufw",
            Self::Firewalld => "firewalld",
        }
    }

    /// What to do where it does not let the bridge through.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::Docker | Self::Ufw => "power a VM on, and see the daemon's log if that stays",
            Self::Firewalld => "sudo firewall-cmd --reload, and see the daemon's log if that stays",
        }
    }

    /// Whether its rules are those of that chain of `ip filter`.
    pub fn owns(self, chain: &str) -> bool {
        match self {
            Self::Docker => chain == "FORWARD",
            Self::Ufw => chain == "FORWARD" || chain == "INPUT",
            Self::Firewalld => false,
        }
    }

    fn look(self, bridge: &str) -> Option<Found> {
        let admits = match self {
            Self::Docker => {
                let chain = docker_chain()?;
                docker_rules(bridge).iter().all(|rule| chain.lines().any(|line| is_rule(line, rule)))
            }
            Self::Ufw => {
                program("ufw")?;
                ask(&program("iptables")?, &["-w", "-S", UFW_CHAIN]).ok()?;
                let rules = fs::read_to_string(UFW_RULES).unwrap_or_default();
                ufw_count(&rules, bridge) == ufw_rules(bridge).len()
            }
            Self::Firewalld => firewalld::look(bridge)?,
        };
        Some(Found { firewall: self, admits })
    }

    fn admit(self, bridge: &str) -> Result<(), String> {
        match self {
            Self::Docker => {
                self.withdraw(bridge)?;
                let iptables = program("iptables").ok_or("there is no iptables")?;
                docker_rules(bridge)
                    .iter()
                    .try_for_each(|rule| with(&iptables, &["-w", "-I", "DOCKER-USER"], rule).map(drop))
            }
            Self::Ufw => {
                let ufw = program("ufw").ok_or("there is no ufw")?;
                let mark = mark(bridge);
                ufw_rules(bridge).iter().try_for_each(|(route, rule)| {
                    let words: Vec<&str> = rule.split(' ').chain(["comment", &mark]).collect();
                    ask(&ufw, &[route_word(*route), &words].concat()).map(drop)
                })
            }
            Self::Firewalld => firewalld::admit(bridge),
        }
    }

    fn withdraw(self, bridge: &str) -> Result<(), String> {
        match self {
            Self::Docker => {
                let (Some(iptables), Some(chain)) = (program("iptables"), docker_chain()) else {
                    return Ok(());
                };
                for rule in docker_rules(bridge) {
                    for _ in chain.lines().filter(|line| is_rule(line, &rule)) {
                        with(&iptables, &["-w", "-D", "DOCKER-USER"], &rule)?;
                    }
                }
                Ok(())
            }
            Self::Ufw => {
                let Some(iptables) = program("iptables") else { return Ok(()) };
                // The rules are in its file also while it is off; the file may be another namespace's.
                if !is_of_the_machine() && ask(&iptables, &["-w", "-S", UFW_CHAIN]).is_err() {
                    return Ok(());
                }
                let rules = fs::read_to_string(UFW_RULES).unwrap_or_default();
                let Some(ufw) = program("ufw").filter(|_| ufw_count(&rules, bridge) > 0) else {
                    return Ok(());
                };
                ufw_rules(bridge).iter().try_for_each(|(route, rule)| {
                    let words: Vec<&str> = ["delete"].into_iter().chain(rule.split(' ')).collect();
                    ask(&ufw, &[&["--force"], route_word(*route), &words].concat()).map(drop)
                })
            }
            Self::Firewalld => firewalld::withdraw(bridge),
        }
    }
}

/// The firewalls of others that are at work here. Waits.
pub(crate) fn found(bridge: &str) -> Vec<Found> {
    Firewall::ALL.into_iter().filter_map(|firewall| firewall.look(bridge)).collect()
}

/// Lets the bridge through each of them that does not let it yet; whether there was one. Waits.
pub(crate) fn admit(bridge: &str) -> bool {
    let mut any = false;
    for Found { firewall, .. } in found(bridge).into_iter().filter(|found| !found.admits) {
        any = true;
        match firewall.admit(bridge) {
            Ok(()) => tracing::info!(bridge, "guests are let through {}", firewall.place()),
            Err(said) => tracing::warn!(bridge, %said, "guests are not let through {}", firewall.place()),
        }
    }
    any
}

/// Takes out what `admit` has put in, whatever there is of it. Waits.
pub(crate) fn withdraw(bridge: &str) {
    for firewall in Firewall::ALL {
        if let Err(said) = firewall.withdraw(bridge) {
            tracing::warn!(bridge, %said, "the bridge could not be taken out of {}", firewall.place());
        }
    }
}

/// Whether somebody else here forwards packets: Docker's daemon switches forwarding on when it starts, where we had not done
/// that before, and its containers would lose their network with it. Waits.
pub(crate) fn others_forward() -> bool {
    docker_chain().is_some()
}

/// The rules of Docker's chain for users, where Docker's daemon is or was.
fn docker_chain() -> Option<String> {
    ask(&program("iptables")?, &["-w", "-S", "DOCKER-USER"]).ok()
}

/// What says that a rule is ours.
pub(super) fn mark(bridge: &str) -> String {
    format!("Catalyst {bridge}")
}

/// Our rules of DOCKER-USER as `iptables -S` writes them, without the comment: what our own table drops stays dropped.
fn docker_rules(bridge: &str) -> [Vec<String>; 2] {
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let mark = mark(bridge);
    let rule = |head: &str| {
        let comment = ["-m", "comment", "--comment", &mark, "-j", "ACCEPT"].map(str::to_owned);
        [words(head), comment.to_vec()].concat()
    };
    [rule(&format!("-i {bridge}")), rule(&format!("-o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED"))]
}

/// Whether a line of `iptables -S` is that rule; there the comment is quoted.
fn is_rule(line: &str, rule: &[String]) -> bool {
    let quoted = |word: &String| if word.contains(' ') { format!("\"{word}\"") } else { word.clone() };
    let rule: Vec<String> = rule.iter().map(quoted).collect();
    line.trim() == format!("-A DOCKER-USER {}", rule.join(" "))
}

/// Our rules of ufw, and whether they are for what is forwarded. `0.0.0.0/0`: for IPv4 alone, which is all there is.
fn ufw_rules(bridge: &str) -> [(bool, String); 3] {
    [
        (true, format!("allow in on {bridge} from 0.0.0.0/0")),
        (false, format!("allow in on {bridge} from 0.0.0.0/0 to any port 53")),
        (false, format!("allow in on {bridge} proto udp from 0.0.0.0/0 port 68 to 0.0.0.0/0 port 67")),
    ]
}

const fn route_word(route: bool) -> &'static [&'static str] {
    if route { &["route"] } else { &[] }
}

/// How many of our rules the file of ufw's rules has; comments are hexadecimal there.
fn ufw_count(rules: &str, bridge: &str) -> usize {
    let mark = hex(mark(bridge).as_bytes());
    let ours = format!("in_{bridge} comment={mark}");
    rules.lines().filter(|line| line.starts_with("### tuple ###") && line.ends_with(&ours)).count()
}

/// Whether this network namespace is that of the machine's first process.
fn is_of_the_machine() -> bool {
    let own = fs::read_link("/proc/self/ns/net").ok();
    own.is_some() && own == fs::read_link("/proc/1/ns/net").ok()
}

/// Whether the system's bus is of this network namespace: a daemon in another namespace than the machine's must not have
/// the machine's services do its bidding.
pub(super) fn owns_the_system() -> bool {
    let Ok(bus) = UnixStream::connect(BUS) else { return is_of_the_machine() };
    let Ok(peer) = rustix::net::sockopt::socket_peercred(&bus) else { return false };
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    // Who listens there: the bus, or systemd for it; or one that has become the bus by a fork, and is gone.
    let theirs = namespace(&peer.pid.as_raw_nonzero().to_string());
    theirs.map_or_else(is_of_the_machine, |theirs| namespace("self").is_some_and(|own| own == theirs))
}

pub(super) fn program(name: &'static str) -> Option<PathBuf> {
    find(name, name).ok()
}

fn with(program: &Path, words: &[&str], more: &[String]) -> Result<String, String> {
    let words: Vec<&str> = words.iter().copied().chain(more.iter().map(String::as_str)).collect();
    ask(program, &words)
}

/// What a program says, or its complaint.
pub(super) fn ask(program: &Path, words: &[&str]) -> Result<String, String> {
    let mut command = command(program);
    command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = finish_within(&mut command, program, PATIENCE).map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(format!("{}: {}", program.display(), last_lines(&said, 3)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_known_by_all_their_words() {
        let [guests, answers] = docker_rules("catalyst0");
        let line = "-A DOCKER-USER -i catalyst0 -m comment --comment \"Catalyst catalyst0\" -j ACCEPT";
        assert!(is_rule(line, &guests) && !is_rule(line, &answers));
        assert!(!is_rule(&line.replace("-i catalyst0", "-i catalyst01"), &guests));
        assert!(!is_rule("-A DOCKER-USER -i catalyst0 -j ACCEPT", &guests), "it is the user's own");
    }

    #[test]
    fn rules_of_ufw_are_counted_by_their_mark() {
        let mark = "436174616c79737420636174616c79737430";
        let rules = format!(
            "### tuple ### route:allow any any 0.0.0.0/0 any 0.0.0.0/0 in_catalyst0 comment={mark}\n\
             -A ufw-user-forward -i catalyst0 -j ACCEPT\n\
             ### tuple ### allow any 53 0.0.0.0/0 any 0.0.0.0/0 in_catalyst0\n"
        );
        assert_eq!((ufw_count(&rules, "catalyst0"), ufw_count(&rules, "catalyst")), (1, 0));
    }
}
