//! Users and groups as the files of passwd(5) and group(5) tell them.
//!
//! Not through NSS: the agent is linked statically, and what NSS loads is not.

use std::fs;
use std::path::{Path, PathBuf};

/// A user as a command needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Every group, the primary one first.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

/// Finds a user by name, or by number if no name fits. `root` is where `etc` lies; where it has
/// no passwd, the running system's is read.
pub fn find(root: &Path, name: &str) -> Option<User> {
    let passwd = read(root, "passwd");
    let by_name = passwd.lines().filter_map(parse).find(|user| user.name == name);
    let by_number = || {
        let uid: u32 = name.parse().ok()?;
        passwd.lines().filter_map(parse).find(|user| user.uid == uid)
    };
    let mut user = by_name.or_else(by_number)?;
    user.groups = groups(&read(root, "group"), &user);
    Some(user)
}

/// The user of a number.
pub fn find_number(root: &Path, uid: u32) -> Option<User> {
    read(root, "passwd").lines().filter_map(parse).find(|user| user.uid == uid)
}

/// The number of a group, by its name or by itself.
pub fn find_group(root: &Path, name: &str) -> Option<u32> {
    let text = read(root, "group");
    let named = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then_some(())?;
        fields.nth(1)?.parse().ok()
    });
    named.or_else(|| name.parse().ok())
}

/// The homes of all users, but for those whose home is the root.
pub fn homes(root: &Path) -> Vec<String> {
    let homes = read(root, "passwd").lines().filter_map(parse).map(|user| user.home).collect::<Vec<_>>();
    homes.into_iter().filter(|home| home.len() > 1 && home.starts_with('/')).collect()
}

fn read(root: &Path, name: &str) -> String {
    let of = |root: &Path| -> PathBuf { root.join("etc").join(name) };
    let text = fs::read(of(root)).or_else(|_| fs::read(of(Path::new("/")))).unwrap_or_default();
    String::from_utf8_lossy(&text).into_owned()
}

fn parse(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let or = |field: Option<&str>, default: &str| {
        field.filter(|field| !field.is_empty()).unwrap_or(default).to_owned()
    };
    let home = or(fields.nth(1), "/");
    let shell = or(fields.next(), "/bin/sh");
    Some(User { name, uid, gid, groups: Vec::new(), home, shell })
}

fn groups(text: &str, user: &User) -> Vec<u32> {
    let mut all = vec![user.gid];
    for line in text.lines() {
        let mut fields = line.split(':');
        let Some(gid) = fields.nth(2).and_then(|gid| gid.parse().ok()) else { continue };
        let member = fields.next().is_some_and(|list| list.split(',').any(|name| name == user.name));
        if member && !all.contains(&gid) {
            all.push(gid);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_no_users_are_passed_over() {
        assert_eq!(parse(""), None);
        assert_eq!(parse("+::::::"), None);
        assert_eq!(parse("x:y:z"), None);
        let user = parse("catalyst:x:1000:1001:Catalyst:/home/catalyst:/bin/bash").unwrap();
        assert_eq!((user.uid, user.gid), (1000, 1001));
        assert_eq!((user.home.as_str(), user.shell.as_str()), ("/home/catalyst", "/bin/bash"));
        assert_eq!(parse("a:x:1:2:::").unwrap().home, "/");
    }

    #[test]
    fn groups_are_those_that_name_the_user() {
        let user = parse("u:x:1:2::/:").unwrap();
        let text = "docker:x:99:a,u\nu:x:2:\nsudo:x:27:uu,b\nbad\nwheel:x:10:u\n";
        assert_eq!(groups(text, &user), [2, 99, 10]);
    }
}
