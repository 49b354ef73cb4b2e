use std::fs;
use std::process::Command;

use super::*;

const OWN: &str =
    "ServerAliveInterval 7\r\n# mine\nHost *\n  User me\n  ProxyJump bastion\n  IdentityFile /mine";

struct Home {
    temp: tempfile::TempDir,
    files: SshFiles,
}

impl Home {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path().join(".ssh");
        Self { files: SshFiles { folder, of: "/state/vms".to_owned() }, temp }
    }

    fn other_daemon(&self) -> SshFiles {
        SshFiles { folder: self.files.folder.clone(), of: "/other/vms".to_owned() }
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.files.folder.join(name)).unwrap()
    }

    /// What OpenSSH makes of it.
    fn ssh(&self, host: &str) -> Option<String> {
        let config = self.files.folder.join("config");
        match Command::new("ssh").arg("-F").arg(config).args(["-G", host]).output() {
            Ok(output) => Some(String::from_utf8(output.stdout).unwrap()),
            Err(error) => {
                println!("SKIPPED: no ssh to ask ({error})");
                None
            }
        }
    }
}

fn login(id: &str, address: &str) -> Login {
    let info = SshInfo {
        address: address.to_owned(),
        port: 22,
        user: "catalyst".to_owned(),
        key_file: "/keys of mine/id".to_owned(),
        known_hosts: vec![format!("{address} ssh-ed25519 AAAA{id} web"), format!("{address} ecdsa-x BBBB")],
    };
    Login { id: id.to_owned(), info }
}

fn ids(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

#[test]
fn ssh_takes_ours_for_vms_and_the_users_for_all_else() {
    let home = Home::new();
    fs::create_dir(&home.files.folder).unwrap();
    fs::write(home.files.folder.join("config"), OWN).unwrap();
    let before = home.ssh("elsewhere");
    let logins = [login("Web1", "10.0.0.1"), login("web2", "10.0.0.2")];
    assert!(home.files.write(&logins, &ids(&["Web1", "web2"])).unwrap());
    assert!(!home.files.write(&logins, &ids(&["Web1", "web2"])).unwrap(), "nothing is another");
    assert_eq!(home.ssh("elsewhere"), before);
    for host in ["Web1.catalyst", "web1.catalyst", "10.0.0.1"] {
        let Some(said) = home.ssh(host) else { break };
        for line in ["hostname 10.0.0.1\n", "user catalyst\n", "identityfile /keys of mine/id\n", "port 22\n"]
        {
            assert!(said.contains(line), "{host}, {line}: {said}");
        }
        assert!(!said.contains("bastion") && said.contains("serveraliveinterval 7\n"), "{said}");
    }
    let keys = home.read("known_hosts");
    assert!(keys.contains("\nweb2.catalyst,10.0.0.2 ssh-ed25519 AAAAweb2\n"), "{keys}");
    assert!(keys.contains("\nWeb1.catalyst,web1.catalyst,10.0.0.1 ecdsa-x BBBB\n"), "{keys}");
    assert!(home.files.remove_named(&[]).unwrap());
    assert_eq!((home.read("config").as_str(), home.read("known_hosts").as_str()), (OWN, ""));
}

#[test]
fn vms_that_are_gone_and_addresses_that_are_anothers_leave_no_block() {
    let home = Home::new();
    home.files.write(&[login("a", "10.0.0.1"), login("b", "10.0.0.2")], &ids(&["a", "b"])).unwrap();
    home.other_daemon().write(&[login("z", "10.9.0.1")], &ids(&["z"])).unwrap();
    // `a` was deleted by somebody else, and `c` has its address.
    home.files.write(&[login("c", "10.0.0.1")], &ids(&["a", "b", "c"])).unwrap();
    let config = home.read("config");
    assert_eq!(config.matches("10.0.0.1\n  HostName 10.0.0.1").count(), 1, "{config}");
    assert!(
        !config.contains("VM a of") && config.contains("VM b of") && config.contains("VM z of /other/vms")
    );
    home.files.write(&[], &ids(&["c"])).unwrap();
    let keys = home.read("known_hosts");
    assert!(
        !keys.contains("b.catalyst") && keys.contains("c.catalyst") && keys.contains("z.catalyst"),
        "{keys}"
    );
    assert!(!home.files.forget(&ids(&["z"])).unwrap(), "it is another daemon's");
    assert!(home.files.forget(&ids(&["c"])).unwrap());
    // A name has one VM: the last one that was asked for.
    home.files.write(&[login("z", "10.0.0.7")], &ids(&["z"])).unwrap();
    assert!(!home.read("config").contains("/other/vms"));
}

#[test]
fn an_address_that_changes_is_changed_everywhere() {
    let home = Home::new();
    assert!(!home.files.moved("a", "10.0.0.3").unwrap(), "there are no files");
    home.files.write(&[login("a", "10.0.0.1"), login("b", "10.0.0.11")], &ids(&["a", "b"])).unwrap();
    let before = home.read("config");
    assert!(!home.files.moved("a", "10.0.0.1").unwrap() && !home.files.moved("c", "10.0.0.1").unwrap());
    assert!(home.files.moved("a", "10.1.0.1").unwrap());
    assert_eq!(home.read("config"), before.replace("10.0.0.1\n", "10.1.0.1\n"));
    assert!(home.read("known_hosts").contains("a.catalyst,10.1.0.1 ssh"));
    assert!(home.read("known_hosts").contains("b.catalyst,10.0.0.11 ssh"));
}

#[test]
fn what_cannot_be_written_is_refused_before_anything_is() {
    let home = Home::new();
    let mut odd = login("a", "10.0.0.1");
    for path in ["/a\"b", "/a\nHost *", "/50%", "relative", "/$HOME"] {
        path.clone_into(&mut odd.info.key_file);
        let good = login("b", "10.0.0.2");
        assert!(
            home.files.write(&[good, Login { id: "a".to_owned(), info: odd.info.clone() }], &[]).is_err()
        );
    }
    let mut odd = login("a", "10.0.0.1");
    odd.info.known_hosts = vec!["10.0.0.1 ssh-rsa \u{1b}[2J".to_owned()];
    assert!(home.files.write(&[odd], &[]).is_err());
    assert!(!home.files.folder.exists());
    drop(home.temp);
}

#[test]
fn damaged_marks_change_nothing_and_are_told() {
    let home = Home::new();
    home.files.write(&[login("a", "10.0.0.1")], &ids(&["a"])).unwrap();
    let text = home.read("config").replace("# <<< catalyst <<<\n", "Host mine\n");
    fs::write(home.files.folder.join("config"), &text).unwrap();
    let error = crate::error::chain(&home.files.forget(&ids(&["a"])).unwrap_err());
    assert!(error.contains("/.ssh/config") && error.contains("line 1"), "{error}");
    assert_eq!(home.read("config"), text);
}
