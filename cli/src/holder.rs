//! Who holds a TCP port of this machine, from `/proc` (proc_pid_fd(5), proc(5) on
//! `/proc/net/tcp`), so that a port in use can be named.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use crate::host::Host;
use crate::text::clean;

/// State word of a listening socket in `/proc/net/tcp`.
const LISTEN: &str = "0A";

/// What can be said of the program behind `host`: name and pid where it runs here and may be
/// looked at, else what its `Server` header says, else a general word.
pub fn describe(host: &Host, server: Option<&str>) -> String {
    let local = host.is_loopback().then(|| local_program(host.port)).flatten();
    let server = server.map(|name| format!("'{}'", clean(&name.chars().take(60).collect::<String>())));
    local.or(server).unwrap_or_else(|| "another program".to_owned())
}

fn local_program(port: u16) -> Option<String> {
    let inodes: HashSet<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| listening_inodes(&table, port))
        .collect();
    if inodes.is_empty() {
        return None;
    }
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let holder = processes
        .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()))
        .find(|entry| holds(&entry.path(), &inodes))?;
    let name = fs::read_to_string(holder.path().join("comm")).ok()?;
    Some(format!("'{}' (pid {})", clean(name.trim()), holder.file_name().to_string_lossy()))
}

/// Inodes of the sockets that listen on `port`, from the text of `/proc/net/tcp`.
fn listening_inodes(table: &str, port: u16) -> Vec<String> {
    let suffix = format!(":{port:04X}");
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|fields| fields.len() > 9 && fields[1].ends_with(&suffix) && fields[3] == LISTEN)
        .map(|fields| format!("socket:[{}]", fields[9]))
        .collect()
}

fn holds(process: &Path, inodes: &HashSet<String>) -> bool {
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else { return false };
    descriptors.flatten().any(|descriptor| {
        fs::read_link(descriptor.path())
            .is_ok_and(|target| inodes.contains(target.to_string_lossy().as_ref()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listening_sockets_of_the_port_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
             0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0\n\
             1: 0100007F:1F90 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 222 1 0\n\
             2: 0100007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 333 1 0\n";
        assert_eq!(listening_inodes(table, 8080), ["socket:[111]"]);
        assert!(listening_inodes("", 8080).is_empty());
    }

    #[test]
    fn this_process_is_found_by_its_listener() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let found = local_program(port).unwrap();
        assert!(found.contains(&format!("(pid {})", std::process::id())), "{found}");
    }

    #[test]
    fn the_header_serves_where_the_process_does_not() {
        let elsewhere = Host::parse("example.test:1").unwrap();
        assert_eq!(describe(&elsewhere, Some("nginx")), "'nginx'");
        assert_eq!(describe(&elsewhere, None), "another program");
    }
}
