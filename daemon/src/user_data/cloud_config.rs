//! The part of `#cloud-config` that is understood (cloud-init's module reference: users and groups, write files, runcmd,
//! set hostname). A key that is not is an error: it would be missed in silence.

use std::fmt;
use std::io::Read;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use catalyst_agent_protocol::set_up::{Content, NewFile, NewUser};
use catalyst_agent_protocol::{SetUp, is_label};
use flate2::read::MultiGzDecoder;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::{MAX_CONTENT, UserData, UserDataError};

/// Permission bits of a file for which none are given.
const MODE: u32 = 0o644;
/// Longest line: a key, a rule, a name.
const MAX_LINE: usize = 16 * 1024;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Document {
    users: Option<Vec<UserEntry>>,
    ssh_authorized_keys: Option<Many>,
    write_files: Option<Vec<FileEntry>>,
    runcmd: Option<Vec<CommandEntry>>,
    hostname: Option<Hostname>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct User {
    name: Name,
    #[serde(default)]
    gecos: Option<Line>,
    #[serde(default)]
    groups: Option<Groups>,
    #[serde(default)]
    shell: Option<Line>,
    #[serde(default)]
    sudo: Option<Rules>,
    #[serde(default)]
    ssh_authorized_keys: Option<Many>,
    #[serde(default)]
    lock_passwd: Option<bool>,
    #[serde(default)]
    passwd: Option<Hash>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileEntry {
    path: Path,
    #[serde(default)]
    content: String,
    #[serde(default)]
    encoding: Encoding,
    #[serde(default)]
    owner: Option<Owner>,
    #[serde(default)]
    permissions: Option<Mode>,
    #[serde(default)]
    append: bool,
}

/// Makes a type of texts of which some are refused, with the place told where they stand.
macro_rules! texts {
    ($($(#[$doc:meta])* $name:ident, $wanted:literal, $good:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Deserialize)]
        #[serde(try_from = "String")]
        struct $name(String);

        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                let good: fn(&str) -> bool = $good;
                if good(&text) { Ok(Self(text)) } else { Err(format!("'{}' is not {}", shown(&text), $wanted)) }
            }
        }
    )*};
}

texts! {
    /// Of a user or group.
    Name, "a name of a user or group: a-z, 0-9, '_' and '-', at most 32, beginning with a letter or '_'", is_name;
    /// Of the guest.
    Hostname, "a host name: letters, digits and '-', at most 63, without a domain", is_label;
    /// Without a line break.
    Line, "one line without ':'", |text| is_line(text) && !text.contains(':');
    /// As in shadow(5).
    Hash, "the hash of a password, as of: openssl passwd -6", |text| text.starts_with('$') && is_line(text) && !text.contains([':', ' ']);
    /// In the guest.
    Path, "an absolute path of a file", |text| text.starts_with('/') && !text.ends_with('/') && text.len() <= 4095 && !text.contains('\0');
}

fn is_name(text: &str) -> bool {
    let first = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
    let later = |byte: u8| first(byte) || byte.is_ascii_digit() || byte == b'-';
    text.len() <= 32 && text.bytes().next().is_some_and(first) && text.bytes().all(later)
}

fn is_line(text: &str) -> bool {
    text.len() <= MAX_LINE && !text.chars().any(char::is_control)
}

/// What of a text is shown in an error.
fn shown(text: &str) -> String {
    text.chars().take(60).collect::<String>().escape_debug().to_string()
}

/// A line, or several.
#[derive(Debug, Default)]
struct Many(Vec<String>);

/// Names with commas between, or a list of them.
#[derive(Debug)]
struct Groups(Vec<String>);

/// Rules of sudoers(5), or none.
#[derive(Debug)]
struct Rules(Vec<String>);

/// `default`, a name, or a user with all that is said of it.
#[derive(Debug)]
enum UserEntry {
    Default,
    User(Box<User>),
}

/// A line for the shell, or a program and its arguments.
#[derive(Debug)]
struct CommandEntry(String);

#[derive(Clone, Copy, Debug, Default)]
enum Encoding {
    #[default]
    Plain,
    Base64,
    Gzip,
}

#[derive(Debug)]
struct Owner(String, String);

#[derive(Debug)]
struct Mode(u32);

/// What takes a text, a list of texts, and in one case `false`.
struct Texts {
    wanted: &'static str,
    or_false: bool,
}

impl<'de> Visitor<'de> for Texts {
    type Value = Vec<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.wanted)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<String>, E> {
        Ok(vec![text.to_owned()])
    }

    fn visit_bool<E: de::Error>(self, yes: bool) -> Result<Vec<String>, E> {
        if self.or_false && !yes {
            Ok(Vec::new())
        } else {
            Err(E::invalid_type(de::Unexpected::Bool(yes), &self))
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<String>, A::Error> {
        let mut all = Vec::new();
        while let Some(item) = items.next_element::<String>()? {
            all.push(item);
        }
        Ok(all)
    }
}

fn lines<E: de::Error>(lines: &[String]) -> Result<Vec<String>, E> {
    match lines.iter().find(|line| !is_line(line.trim_end())) {
        None => Ok(lines.iter().map(|line| line.trim_end().to_owned()).collect()),
        Some(line) => {
            Err(E::custom(format!("'{}' is not one line of at most {MAX_LINE} bytes", shown(line))))
        }
    }
}

impl<'de> Deserialize<'de> for Many {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wanted = Texts { wanted: "a text or a list of texts", or_false: false };
        lines(&deserializer.deserialize_any(wanted)?).map(Self)
    }
}

impl<'de> Deserialize<'de> for Rules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wanted = Texts { wanted: "a rule of sudoers(5), a list of them, or false", or_false: true };
        lines(&deserializer.deserialize_any(wanted)?).map(Self)
    }
}

impl<'de> Deserialize<'de> for Groups {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wanted = Texts { wanted: "groups with commas between, or a list of them", or_false: false };
        let texts = deserializer.deserialize_any(wanted)?;
        let names = texts.iter().flat_map(|text| text.split(',')).map(|name| name.trim().to_owned());
        let names = names.filter(|name| !name.is_empty()).map(|name| Name::try_from(name).map(|name| name.0));
        names.collect::<Result<_, _>>().map(Self).map_err(de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for UserEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entry;

        impl<'de> Visitor<'de> for Entry {
            type Value = UserEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("'default', or what there is to say of a user, its 'name' first")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<UserEntry, E> {
                if name == "default" {
                    return Ok(UserEntry::Default);
                }
                let name = Name::try_from(name.to_owned()).map_err(E::custom)?;
                Ok(UserEntry::User(Box::new(User::named(name))))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<UserEntry, A::Error> {
                User::deserialize(MapAccessDeserializer::new(map)).map(|user| UserEntry::User(Box::new(user)))
            }
        }

        deserializer.deserialize_any(Entry)
    }
}

impl<'de> Deserialize<'de> for CommandEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Command;

        impl<'de> Visitor<'de> for Command {
            type Value = CommandEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a command: a text in quotes, or a list of texts")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<CommandEntry, E> {
                whole(text.to_owned())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<CommandEntry, A::Error> {
                let texts = Texts { wanted: "a list of texts", or_false: false }.visit_seq(items)?;
                whole(texts.iter().map(|text| quoted(text)).collect::<Vec<_>>().join(" "))
            }
        }

        fn whole<E: de::Error>(text: String) -> Result<CommandEntry, E> {
            if text.trim().is_empty() || text.contains('\0') {
                Err(E::custom("a command is empty, or has a NUL in it"))
            } else {
                Ok(CommandEntry(text))
            }
        }

        deserializer.deserialize_any(Command)
    }
}

/// A word as the shell takes it for itself.
fn quoted(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./=:@%+,".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

impl<'de> Deserialize<'de> for Encoding {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.to_ascii_lowercase().as_str() {
            "" | "text/plain" => Ok(Self::Plain),
            "b64" | "base64" => Ok(Self::Base64),
            "gz+b64" | "gz+base64" | "gzip+b64" | "gzip+base64" => Ok(Self::Gzip),
            _ => Err(de::Error::custom(format!(
                "the encoding '{}' is not known: there are 'b64', 'gz+b64' and 'text/plain'",
                shown(&text)
            ))),
        }
    }
}

impl<'de> Deserialize<'de> for Owner {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (user, group) = text.split_once(':').unwrap_or((&text, "root"));
        if is_name(user) && is_name(group) {
            Ok(Self(user.to_owned(), group.to_owned()))
        } else {
            Err(de::Error::custom(format!("the owner '{}' is not as in 'user:group'", shown(&text))))
        }
    }
}

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.strip_prefix("0o").unwrap_or(&text);
        match u32::from_str_radix(digits, 8) {
            Ok(mode) if mode <= 0o7777 => Ok(Self(mode)),
            _ => Err(de::Error::custom(format!("the permissions '{}' are not as '0644'", shown(&text)))),
        }
    }
}

impl User {
    fn named(name: Name) -> Self {
        Self {
            name,
            gecos: None,
            groups: None,
            shell: None,
            sudo: None,
            ssh_authorized_keys: None,
            lock_passwd: None,
            passwd: None,
        }
    }

    fn into_new(self) -> NewUser {
        let locked = self.lock_passwd.unwrap_or(true);
        NewUser {
            name: self.name.0,
            gecos: self.gecos.map(|line| line.0).unwrap_or_default(),
            groups: self.groups.map(|groups| groups.0).unwrap_or_default(),
            shell: self.shell.map(|line| line.0),
            password: self.passwd.filter(|_| !locked).map(|hash| hash.0),
            sudo: self.sudo.map(|rules| rules.0).unwrap_or_default(),
            authorized_keys: self.ssh_authorized_keys.map(|keys| keys.0).unwrap_or_default(),
        }
    }
}

impl FileEntry {
    fn into_new(self) -> Result<NewFile, UserDataError> {
        let wrong = |why: &str| UserDataError::Whole(format!("the content of {} {why}", self.path.0));
        let decoded = || {
            let packed: String = self.content.split_whitespace().collect();
            STANDARD.decode(packed).map_err(|_| wrong("is not base64"))
        };
        let content = match self.encoding {
            Encoding::Plain => self.content.clone().into_bytes(),
            Encoding::Base64 => decoded()?,
            Encoding::Gzip => {
                let mut bytes = Vec::new();
                let most = MAX_CONTENT as u64 + 1;
                let packed = decoded()?;
                let unpacked = MultiGzDecoder::new(packed.as_slice()).take(most).read_to_end(&mut bytes);
                unpacked.map_err(|_| wrong("is not gzip"))?;
                if bytes.len() > MAX_CONTENT {
                    return Err(wrong("is too long when it is unpacked"));
                }
                bytes
            }
        };
        let owner =
            self.owner.map_or_else(|| ("root".to_owned(), "root".to_owned()), |owner| (owner.0, owner.1));
        let mode = self.permissions.map_or(MODE, |mode| mode.0);
        Ok(NewFile { path: self.path.0, content: Content(content), owner, mode, append: self.append })
    }
}

/// Reads a `#cloud-config`.
pub fn parse(text: &str) -> Result<UserData, UserDataError> {
    let document: Document = serde_saphyr::from_str(text).map_err(|error| told(text, &error))?;
    let users = document.users.unwrap_or_default().into_iter().filter_map(|entry| match entry {
        UserEntry::Default => None,
        UserEntry::User(user) => Some(user.into_new()),
    });
    let files = document.write_files.unwrap_or_default().into_iter().map(FileEntry::into_new);
    let set_up = SetUp {
        instance: String::new(),
        users: users.collect(),
        authorized_keys: document.ssh_authorized_keys.unwrap_or_default().0,
        files: files.collect::<Result<_, _>>()?,
        preparation: Vec::new(),
        commands: document.runcmd.unwrap_or_default().into_iter().map(|command| command.0).collect(),
    };
    Ok(UserData { hostname: document.hostname.map(|name| name.0), set_up })
}

/// What is wrong, in one line, with the key that it is about.
fn told(text: &str, error: &serde_saphyr::Error) -> UserDataError {
    let error = error.without_snippet();
    let words = error.to_string();
    let Some(place) = error.location() else { return UserDataError::Whole(one_line(&words)) };
    let at = format!(" at line {}, column {}", place.line(), place.column());
    let what = one_line(&words).replace(&at, "").replace('`', "'");
    let what = match key(text, place.line()) {
        Some(key) if !what.contains(key) => format!("'{key}': {what}"),
        _ => what,
    };
    UserDataError::Line { line: place.line(), what }
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}

/// The key that a line belongs to: its own, or the nearest before it that is not further in.
fn key(text: &str, line: u64) -> Option<&str> {
    let indent = |line: &str| line.len() - line.trim_start().len();
    let own = |line: &'_ str| {
        let (key, _) = line.trim_start().trim_start_matches("- ").trim_start().split_once(':')?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
        let begin = line.find(key)?;
        (!key.is_empty() && key.bytes().all(plain)).then_some((begin, begin + key.len()))
    };
    let count = usize::try_from(line).ok()?;
    let mut before = text.lines().take(count).collect::<Vec<_>>().into_iter().rev();
    let last = before.next()?;
    if let Some((from, to)) = own(last) {
        return last.get(from..to);
    }
    let deepest = indent(last);
    before
        .filter(|line| indent(line) <= deepest)
        .find_map(|line| own(line).and_then(|(from, to)| line.get(from..to)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = r"#cloud-config
hostname: db
users:
  - default
  - bob
  - name: ann
    gecos: Ann Other
    groups: adm, docker
    sudo: ALL=(ALL) NOPASSWD:ALL
    shell: /bin/sh
    lock_passwd: false
    passwd: $6$salt$hash
    ssh_authorized_keys:
      - ssh-ed25519 AAAA ann
  - name: eve
    groups: [adm]
    sudo: false
    passwd: $6$salt$hash
ssh_authorized_keys:
  - ssh-ed25519 BBBB me
write_files:
  - path: /etc/motd
    content: |
      hello
    permissions: 0600
    owner: ann:adm
  - path: /srv/binary
    encoding: b64
    content: AP8=
    append: true
  - path: /srv/packed
    encoding: gz+b64
    content: !!str H4sIAAAAAAAAA8tIzcnJBwCGphA2BQAAAA==
runcmd:
  - cd /srv && pwd
  - [sleep, 5, it's]
  - |
    if true; then
      echo yes
    fi
";

    #[test]
    fn a_document_with_all_that_is_known_is_read() {
        let text = FULL.replace("H4sIAAAAAAAAA8tIzcnJBwCGphA2BQAAAA==", &gzipped(b"hello"));
        let UserData { hostname, set_up } = parse(&text).unwrap();
        assert_eq!(hostname.as_deref(), Some("db"));
        let [bob, ann, eve] = set_up.users.as_slice() else { panic!("{set_up:?}") };
        assert_eq!((bob.name.as_str(), bob.groups.len()), ("bob", 0));
        assert_eq!(ann.groups, ["adm", "docker"]);
        assert_eq!((ann.password.as_deref(), ann.shell.as_deref()), (Some("$6$salt$hash"), Some("/bin/sh")));
        assert_eq!(
            (ann.sudo.len(), ann.authorized_keys.as_slice()),
            (1, ["ssh-ed25519 AAAA ann".to_owned()].as_slice())
        );
        // Locked is what a user is where nothing else is said.
        assert_eq!((eve.password.as_deref(), eve.sudo.len()), (None, 0));
        assert_eq!(set_up.authorized_keys, ["ssh-ed25519 BBBB me"]);
        let [motd, binary, packed] = set_up.files.as_slice() else { panic!("{set_up:?}") };
        assert_eq!((motd.mode, motd.content.0.as_slice()), (0o600, b"hello\n".as_slice()));
        assert_eq!(motd.owner, ("ann".to_owned(), "adm".to_owned()));
        assert_eq!(
            (binary.content.0.as_slice(), binary.append, binary.mode),
            ([0, 255].as_slice(), true, 0o644)
        );
        assert_eq!(packed.content.0, b"hello");
        assert_eq!(set_up.commands[..2], ["cd /srv && pwd".to_owned(), r"sleep 5 'it'\''s'".to_owned()]);
        assert!(set_up.commands[2].starts_with("if true; then\n"));
        assert_eq!(parse("#cloud-config\n").unwrap(), UserData::default());
        assert_eq!(parse("#cloud-config\nruncmd:\n").unwrap(), UserData::default());
    }

    fn gzipped(bytes: &[u8]) -> String {
        let mut packed = Vec::new();
        let mut reader = flate2::read::GzEncoder::new(bytes, flate2::Compression::fast());
        reader.read_to_end(&mut packed).unwrap();
        STANDARD.encode(packed)
    }

    #[test]
    fn what_is_wrong_is_named_with_its_key_and_line() {
        for (text, line, words) in [
            ("packages: [nginx]\n", 2, &["'", "packages", "write_files"][..]),
            ("package_update: true\n", 2, &["package_update"]),
            ("users:\n  - name: ann\n    uid: 5\n", 4, &["uid", "lock_passwd"]),
            ("users:\n  - name: Ann!\n", 3, &["Ann!", "a-z"]),
            ("users:\n  - 7\n", 3, &["users", "7"]),
            ("users: ann\n", 2, &["users"]),
            ("users:\n  - gecos: x\n", 3, &["name"]),
            ("users:\n  - name: ann\n    passwd: hunter2\n", 4, &["hunter2", "openssl"]),
            ("users:\n  - name: ann\n    gecos: \"a:b\"\n", 4, &["gecos", "one line"]),
            ("users:\n  - name: ann\n    sudo: true\n", 4, &["sudo"]),
            ("users:\n  - name: ann\n    lock_passwd: maybe\n", 4, &["lock_passwd"]),
            ("hostname: a.b\n", 2, &["a.b", "host name"]),
            ("hostname: [a]\n", 2, &["hostname"]),
            ("hostname: a\nhostname: b\n", 3, &["duplicate", "hostname"]),
            ("write_files:\n  - path: etc/motd\n", 3, &["etc/motd", "absolute"]),
            ("write_files:\n  - path: /x\n    permissions: rw\n", 4, &["permissions", "0644"]),
            ("write_files:\n  - path: /x\n    owner: 'a b'\n", 4, &["owner", "user:group"]),
            ("write_files:\n  - path: /x\n    encoding: rot13\n", 4, &["rot13", "gz+b64"]),
            ("write_files:\n  - path: /x\n    append: 3\n", 4, &["append"]),
            ("runcmd:\n  - {a: b}\n", 3, &["runcmd", "list of texts"]),
            ("runcmd:\n  - ''\n", 3, &["empty"]),
            ("runcmd: echo\n", 2, &["runcmd"]),
            ("hostname: a\n\tusers: []\n", 2, &["tab"]),
            ("hostname: *nothing\n", 2, &["hostname", "anchor"]),
        ] {
            let error = parse(&format!("#cloud-config\n{text}")).unwrap_err();
            let told = error.to_string();
            assert!(matches!(error, UserDataError::Line { line: at, .. } if at == line), "{text}: {told}");
            assert!(words.iter().all(|word| told.contains(word)), "{text}: {told}");
            assert!(!told.contains('\n'), "{told}");
        }
        let file = |rest: &str| format!("#cloud-config\nwrite_files:\n  - path: /x\n    {rest}\n");
        for (rest, words) in
            [("encoding: b64\n    content: '*'", "base64"), ("encoding: gz+b64\n    content: AP8=", "gzip")]
        {
            let told = parse(&file(rest)).unwrap_err().to_string();
            assert!(told.contains("/x") && told.contains(words), "{told}");
        }
    }

    #[test]
    fn what_unfolds_without_end_is_refused() {
        let bomb = gzipped(&vec![0; MAX_CONTENT + 1]);
        let text =
            format!("#cloud-config\nwrite_files:\n  - path: /x\n    encoding: gz+b64\n    content: {bomb}\n");
        assert!(parse(&text).unwrap_err().to_string().contains("too long"));
        let mut text = "#cloud-config\na0: &a0 [x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..20 {
            let before = format!("*a{}, ", level - 1).repeat(8);
            text.extend([format!("a{level}: &a{level} [{before}]\n")]);
        }
        parse(&text).unwrap_err();
        parse(&format!("#cloud-config\nruncmd: {}", "[".repeat(100_000))).unwrap_err();
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(#cloud-config\n)?[ -~\n\t:*&!|>-]{0,200}") {
            let _ = UserData::parse(&text);
        }
    }
}
