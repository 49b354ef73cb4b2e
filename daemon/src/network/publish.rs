//! What dnsmasq is told of each guest: one file with its name and one with its fixed lease, named by the address.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use super::dnsmasq::{Files, parse_acknowledged};
use super::error::NetworkError;
use super::lease::{DOMAIN, HOST_NAME, Lease};
use super::state::{absent_is_fine, read_bounded, read_small, write_public};

/// Name of the file with the host's own name.
const GATEWAY: &str = "gateway";

/// The largest list of acknowledged leases that is read, in bytes: some 100 for each of 65,536.
const ACKNOWLEDGED_LIMIT: u64 = 8 << 20;

/// Makes the files be those of `leases` and of no other. Whether anything changed.
pub(crate) fn publish_all(files: &Files, gateway: Ipv4Addr, leases: &[Lease]) -> Result<bool, NetworkError> {
    let names = leases.iter().map(|lease| (lease.address.to_string(), name_line(lease)));
    let names: HashMap<_, _> =
        names.chain([(GATEWAY.to_owned(), format!("{gateway} {HOST_NAME}.{DOMAIN}\n"))]).collect();
    let former = former_macs(files);
    let hosts: HashMap<_, _> =
        leases.iter().map(|lease| (lease.address.to_string(), host_line(lease, &former))).collect();
    let work = |folder: &Path, wanted: &HashMap<String, String>| {
        make_equal(folder, wanted).map_err(NetworkError::file("write", folder))
    };
    // Both, whatever the first one says.
    let changed = [work(&files.names(), &names)?, work(&files.hosts(), &hosts)?];
    Ok(changed.contains(&true))
}

/// Writes the files of one guest. Whether anything changed.
pub(crate) fn publish(files: &Files, lease: &Lease) -> Result<bool, NetworkError> {
    let address = lease.address.to_string();
    let former = former_macs(files);
    let mut changed = false;
    for (path, text) in [
        (files.names().join(&address), name_line(lease)),
        (files.hosts().join(&address), host_line(lease, &former)),
    ] {
        changed |= write_changed(&path, &text).map_err(NetworkError::file("write", &path))?;
    }
    Ok(changed)
}

/// Removes the files of the guest at `address`. Whether there were any.
pub(crate) fn withdraw(files: &Files, address: Ipv4Addr) -> Result<bool, NetworkError> {
    let mut changed = false;
    for folder in [files.names(), files.hosts()] {
        let path = folder.join(address.to_string());
        changed |= path.exists();
        absent_is_fine(fs::remove_file(&path)).map_err(NetworkError::file("remove", &path))?;
    }
    Ok(changed)
}

fn name_line(lease: &Lease) -> String {
    format!("{} {}.{DOMAIN}\n", lease.address, lease.name)
}

/// The fixed lease in dnsmasq's words. `id:*`: by the MAC alone, since a clone of a disk keeps its client id.
/// A MAC that had the address before is named too: dnsmasq then takes its lease away when the new owner asks
/// (dnsmasq(8), `--dhcp-host` with several addresses), instead of keeping the address until that lease runs out.
fn host_line(lease: &Lease, former: &HashMap<Ipv4Addr, String>) -> String {
    let mac = lease.mac.to_string();
    let before = former.get(&lease.address).filter(|before| **before != mac);
    let before = before.map_or_else(String::new, |before| format!("{before},"));
    format!("{mac},{before}id:*,{}\n", lease.address)
}

fn former_macs(files: &Files) -> HashMap<Ipv4Addr, String> {
    // What cannot be read is as if nobody had asked yet.
    let text = read_bounded(&files.acknowledged(), ACKNOWLEDGED_LIMIT).ok().flatten();
    text.map(|text| parse_acknowledged(&text).into_iter().collect()).unwrap_or_default()
}

fn make_equal(folder: &Path, wanted: &HashMap<String, String>) -> io::Result<bool> {
    let mut changed = false;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if !entry.file_name().to_str().is_some_and(|name| wanted.contains_key(name)) {
            fs::remove_file(entry.path())?;
            changed = true;
        }
    }
    for (name, text) in wanted {
        changed |= write_changed(&folder.join(name), text)?;
    }
    Ok(changed)
}

fn write_changed(path: &Path, text: &str) -> io::Result<bool> {
    if read_small(path)?.as_deref() == Some(text) {
        return Ok(false);
    }
    write_public(path, text)?;
    Ok(true)
}
