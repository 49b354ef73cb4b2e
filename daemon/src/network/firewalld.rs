//! firewalld: the bridge gets a zone of its own there (firewalld.zone(5)), which lets through what guests send and takes
//! names and leases from them, as libvirt's and NetworkManager's zones do. Masquerading stays our own table's.
//!
//! Zones cannot be made while it runs but by a file and a reload, after which it also finds the zone when it starts again.
//! A reload forgets what was set "for now" alone, such as the bans of others: where there is any of that, the file
//! waits for the next reload that somebody else wants, and `doctor` says so.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::beside::{ask, mark, owns_the_system, program};
use super::state::{absent_is_fine, read_small};

const ZONES: &str = "/etc/firewalld/zones";
/// What it is asked most is asked on the bus: `firewall-cmd` takes a good part of a second.
const NAME: &str = "org.fedoraproject.FirewallD1";
const PATH: &str = "/org/fedoraproject/FirewallD1";
/// The one of its own zones that lets everything through.
const TRUSTED: &str = "trusted";
/// What is set for now and what stays are compared by these lists.
const LISTS: [&[&str]; 3] =
    [&["--list-all-zones"], &["--list-all-policies"], &["--direct", "--get-all-rules"]];

/// Whether firewalld lets the bridge through; `None` where it does not run. Waits.
pub(super) fn look(bridge: &str) -> Option<bool> {
    program("firewall-cmd").filter(|_| owns_the_system())?;
    let zone = zone_of(bridge).ok()?;
    Some(zone == bridge || zone == TRUSTED)
}

/// Makes the zone. Waits.
pub(super) fn admit(bridge: &str) -> Result<(), String> {
    let zone = zone_of(bridge)?;
    if !zone.is_empty() && zone != bridge {
        return Err(format!("somebody has put {bridge} into the zone {zone}"));
    }
    let path = file(bridge);
    let failed = |error: io::Error| format!("{}: {error}", path.display());
    match read_small(&path).map_err(failed)? {
        Some(text) if !is_ours(&text, bridge) => {
            return Err(format!("{} is somebody else's", path.display()));
        }
        Some(_) => {}
        None => write(&path, &zone_text(bridge)).map_err(failed)?,
    }
    reload(bridge)
}

/// Takes the zone away, also while firewalld does not run. Waits.
pub(super) fn withdraw(bridge: &str) -> Result<(), String> {
    if !owns_the_system() {
        return Ok(());
    }
    let path = file(bridge);
    // It keeps the last version of a file that it writes itself.
    for path in [path.with_extension("xml.old"), path] {
        let removed = match read_small(&path) {
            Ok(Some(text)) if is_ours(&text, bridge) => absent_is_fine(fs::remove_file(&path)),
            Ok(_) => Ok(()),
            Err(error) => absent_is_fine(Err(error)),
        };
        removed.map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let Some(tool) = program("firewall-cmd") else { return Ok(()) };
    if zone_of(bridge).is_ok_and(|zone| zone == bridge) {
        ask(&tool, &[&format!("--zone={bridge}"), &format!("--remove-interface={bridge}")])?;
        // Without an interface it does nothing: an empty zone may stay until somebody reloads.
        if let Err(said) = reload(bridge) {
            tracing::info!(bridge, %said, "an empty zone stays in firewalld until its next reload");
        }
    }
    Ok(())
}

fn file(bridge: &str) -> PathBuf {
    Path::new(ZONES).join(format!("{bridge}.xml"))
}

fn is_ours(text: &str, bridge: &str) -> bool {
    text.contains(&format!("<short>{}</short>", mark(bridge)))
}

/// All but names, leases and ICMP is refused to guests on the host itself, by a rule that comes after all others; the
/// zone's target is then what is forwarded. Our own table drops what comes in from outside.
fn zone_text(bridge: &str) -> String {
    format!(
        r#"<?xml version="1.0" encoding="utf-8"?>
<zone target="ACCEPT">
  <short>{mark}</short>
  <description>Virtual machines of Catalyst. Made with their network, and removed by: catalyst network down</description>
  <interface name="{bridge}"/>
  <service name="dhcp"/>
  <service name="dns"/>
  <protocol value="icmp"/>
  <rule priority="32767">
    <reject/>
  </rule>
</zone>
"#,
        mark = mark(bridge)
    )
}

/// Whole or not at all: firewalld watches the folder, for names that end in `.xml`.
fn write(path: &Path, text: &str) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)
}

/// The zone that the bridge is in, empty for none. A system without systemd has no `busctl`.
fn zone_of(bridge: &str) -> Result<String, String> {
    let Some(busctl) = program("busctl") else {
        let tool = program("firewall-cmd").ok_or("there is no firewall-cmd")?;
        return told_zone(ask(&tool, &[&format!("--get-zone-of-interface={bridge}")]));
    };
    let interface = format!("{NAME}.zone");
    let head = ["--system", "--auto-start=no", "call", NAME, PATH, &interface];
    let said = ask(&busctl, &[&head[..], &["getZoneOfInterface", "s", bridge]].concat())?;
    let zone = said.trim().strip_prefix("s \"").and_then(|zone| zone.strip_suffix('"'));
    zone.map(str::to_owned).ok_or_else(|| format!("busctl: {said}"))
}

/// What `firewall-cmd` says of a zone; that there is none is an error of it.
fn told_zone(said: Result<String, String>) -> Result<String, String> {
    match said {
        Ok(zone) => Ok(zone.trim().to_owned()),
        Err(said) if said.ends_with("no zone") => Ok(String::new()),
        Err(said) => Err(said),
    }
}

/// Reloads, unless something is set for now alone.
fn reload(bridge: &str) -> Result<(), String> {
    let tool = program("firewall-cmd").ok_or("there is no firewall-cmd")?;
    // A machine that is very busy may keep it, the bus or firewalld from answering in time, once.
    let ask = |words: &[&str]| {
        ask(&tool, words).or_else(|said| {
            tracing::info!(bridge, %said, "firewalld is asked again");
            ask(&tool, words)
        })
    };
    for list in LISTS {
        let now = ask(list)?;
        let stays = ask(&[&["--permanent"], list].concat())?;
        if settings(&now, bridge) != settings(&stays, bridge) {
            return Err(format!(
                "'firewall-cmd {}' has what is not permanent and would be lost by the reload that is needed",
                list.join(" ")
            ));
        }
    }
    ask(&["--reload"]).map(drop)
}

/// What a list of zones or policies sets, without our own zone, and without interfaces, which a reload keeps.
fn settings<'a>(list: &'a str, bridge: &str) -> Vec<&'a str> {
    let mut name = "";
    let mut found: Vec<&str> = Vec::new();
    for line in list.lines().map(str::trim_end).filter(|line| !line.is_empty()) {
        if !line.starts_with(char::is_whitespace) {
            // "public (active)"
            name = line.split(" (").next().unwrap_or_default();
            found.extend(Some(name).filter(|name| *name != bridge));
        } else if name != bridge && !line.trim_start().starts_with("interfaces:") {
            found.push(line);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_for_now_alone_is_seen_and_our_own_zone_is_not() {
        let stays =
            "block\n  target: %%REJECT%%\n  interfaces: \n  ports: \n\npublic (default)\n  ports: 22/tcp\n";
        let now = "catalyst0 (active)\n  target: ACCEPT\n\nblock\n  target: %%REJECT%%\n  interfaces: \n  ports: \n\n\
                   public (default, active)\n  interfaces: eth0\n  ports: 22/tcp\n";
        let stays_without = stays.replace("  interfaces: \n", "");
        assert_eq!(settings(now, "catalyst0"), settings(&stays_without, "catalyst0"));
        assert_ne!(settings(now, "catalyst1"), settings(stays, "catalyst1"));
        assert_ne!(
            settings(&now.replace("22/tcp", "22/tcp 80/tcp"), "catalyst0"),
            settings(stays, "catalyst0")
        );
    }

    #[test]
    fn a_zone_that_firewall_cmd_does_not_know_is_none_and_no_firewalld_is_an_error() {
        let tool = |said: &str| told_zone(Err(format!("/usr/bin/firewall-cmd: {said}")));
        assert_eq!(told_zone(Ok("catalyst0\n".to_owned())), Ok("catalyst0".to_owned()));
        assert_eq!(tool("no zone"), Ok(String::new()));
        assert!(tool("FirewallD is not running").is_err());
    }

    #[test]
    fn a_zone_is_ours_by_its_mark() {
        let text = zone_text("catalyst0");
        assert!(is_ours(&text, "catalyst0") && !is_ours(&text, "catalyst"));
        assert!(!is_ours(&text.replace("Catalyst", "My"), "catalyst0"));
    }
}
