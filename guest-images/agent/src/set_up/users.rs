//! Users that a guest is set up with, made by Debian's own programs, which keep its files in order.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use catalyst_agent_protocol::SetUp;
use catalyst_agent_protocol::set_up::NewUser;

use super::STEP_SECONDS;
use crate::files::replace;
use crate::identity::{USER, owned_folder};
use crate::notify;
use crate::session::Config;
use crate::spawn::with_ordinary_priority;
use crate::users;

/// What the user's rules of sudoers(5) are called, below the root.
const SUDOERS: &str = "etc/sudoers.d/90-catalyst-users";
/// A file of keys that the agent itself leaves alone; sshd reads it as well.
pub const FURTHER_KEYS: &str = "authorized_keys2";
const KEYS: &str = "authorized_keys";
const SHELL: &str = "/bin/bash";

/// Makes the users of a document, with their keys. What fails is put to `problems`; the others are made.
pub fn make(config: &Config, document: &SetUp, problems: &mut Vec<String>) {
    for user in &document.users {
        notify::more_time(STEP_SECONDS);
        let made = account(config, user).and_then(|()| keys(config, &user.name, &user.authorized_keys));
        if let Err(why) = made {
            problems.push(format!("the user '{}' is not as it was to be: {why}", user.name));
        }
    }
    if let Err(why) = keys(config, USER, &document.authorized_keys) {
        problems.push(format!("the keys of '{USER}' were not written: {why}"));
    }
    if let Err(why) = sudoers(config, &document.users) {
        problems.push(format!("/{SUDOERS} was not written: {why}"));
    }
}

fn account(config: &Config, user: &NewUser) -> Result<(), String> {
    for group in user.groups.iter().filter(|group| users::find_group(&config.root, group).is_none()) {
        run(config, "groupadd", &[group])?;
    }
    let groups = user.groups.join(",");
    let password = user.password.as_deref().unwrap_or("*");
    let shell = user.shell.as_deref();
    let mut words: Vec<&str> = Vec::new();
    let program = if users::find(&config.root, &user.name).is_some() {
        if !groups.is_empty() {
            words.extend(["--append", "--groups", &groups]);
        }
        words.extend(user.password.iter().flat_map(|hash| ["--password", hash]));
        words.extend(shell.iter().flat_map(|shell| ["--shell", shell]));
        if words.is_empty() {
            return Ok(());
        }
        "usermod"
    } else {
        words.extend(["--create-home", "--shell", shell.unwrap_or(SHELL), "--password", password]);
        words.extend(["--comment", &user.gecos]);
        if !groups.is_empty() {
            words.extend(["--groups", &groups]);
        }
        // Else a group of the user's name is made.
        if users::find_group(&config.root, &user.name).is_some() {
            words.extend(["--gid", &user.name]);
        }
        "useradd"
    };
    words.extend(["--", &user.name]);
    run(config, program, &words)
}

/// Runs a program of the passwd package, and gives what it said if it failed.
fn run(config: &Config, program: &str, words: &[&str]) -> Result<(), String> {
    let mut command = Command::new(program);
    if config.files_only() {
        command.arg("--prefix").arg(&config.root);
    }
    let ran = with_ordinary_priority(&mut command).args(words).stdin(Stdio::null()).output();
    let output = ran.map_err(|error| format!("{program} cannot be run: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(said.lines().next().unwrap_or(program).chars().take(200).collect())
}

/// Adds keys to those that a user has.
fn keys(config: &Config, name: &str, keys: &[String]) -> Result<(), String> {
    if keys.is_empty() {
        return Ok(());
    }
    let user = users::find(&config.root, name).ok_or("there is no such user")?;
    let home = config.root.join(user.home.trim_start_matches('/'));
    let ssh = home.join(".ssh");
    let file = ssh.join(if name == USER { FURTHER_KEYS } else { KEYS });
    let owner = (user.uid, user.gid);
    let written = owned_folder(&ssh, owner).and_then(|()| {
        let text = with_lines(&read_own(&file)?, keys);
        replace(&file, text.as_bytes(), 0o600, Some(owner))
    });
    written.map_err(|error| format!("{}: {error}", file.display()))
}

/// The file's text; a link, which its user may have made, is none.
fn read_own(file: &Path) -> io::Result<String> {
    match fs::symlink_metadata(file) {
        Ok(about) if about.is_file() => Ok(String::from_utf8_lossy(&fs::read(file)?).into_owned()),
        Ok(_) => Err(io::Error::other("it is not a plain file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
    }
}

/// `text` with those lines that it has not.
fn with_lines(text: &str, lines: &[String]) -> String {
    let mut all: Vec<&str> = text.lines().collect();
    for line in lines {
        if !all.contains(&line.as_str()) {
            all.push(line);
        }
    }
    all.iter().flat_map(|line| [line, "\n"]).collect()
}

/// Writes the rules of all users, if sudo takes them: a file that it does not would keep everybody from it.
fn sudoers(config: &Config, users: &[NewUser]) -> Result<(), String> {
    let rules: String = users
        .iter()
        .flat_map(|user| user.sudo.iter().map(move |rule| format!("{} {rule}\n", user.name)))
        .collect();
    if rules.is_empty() {
        return Ok(());
    }
    let failed = |error: io::Error| error.to_string();
    let aside = config.root.join("run/catalyst-sudoers");
    replace(&aside, rules.as_bytes(), 0o440, Some((0, 0))).map_err(failed)?;
    let checked = Command::new("visudo").args(["-c", "-q", "-f"]).arg(&aside).stdin(Stdio::null()).output();
    let _ = fs::remove_file(&aside);
    let checked = checked.map_err(|error| format!("visudo cannot be run: {error}"))?;
    if !checked.status.success() {
        let said =
            String::from_utf8_lossy(&checked.stderr).trim().replace("run/catalyst-sudoers", "the rules");
        return Err(said.chars().take(300).collect());
    }
    replace(&config.root.join(SUDOERS), rules.as_bytes(), 0o440, Some((0, 0))).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_added_once_and_after_those_that_are_there() {
        let keys = ["a".to_owned(), "b".to_owned()];
        assert_eq!(with_lines("", &keys), "a\nb\n");
        assert_eq!(with_lines("old\na", &keys), "old\na\nb\n");
    }
}
