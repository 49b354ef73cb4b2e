//! Ids and names: what may be one, and how it goes into a URL.

use std::fmt::Write as _;

/// Longest id of a VM, in characters.
const MAX_ID: usize = 63;

/// Checks the id of a VM: letters, digits, `-`, `_` and `.`, starting with a letter or a
/// digit, at most 63 characters. No VM can have another id, so it is refused before it is sent.
pub fn vm_id(text: &str) -> Result<String, String> {
    plain(text, "an id")
}

/// Checks the name of an image, by the same rule.
pub fn image(text: &str) -> Result<String, String> {
    plain(text, "an image's name")
}

/// Checks the name of a snapshot as far as it must go into a path: what is empty, `.` or `..` there
/// is another path. The rest of the rule is the daemon's.
pub fn snapshot(text: &str) -> Result<String, String> {
    if ["", ".", ".."].contains(&text) {
        return Err("a snapshot's name cannot be empty, '.' or '..'".to_owned());
    }
    Ok(text.to_owned())
}

fn plain(text: &str, what: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err(format!("{what} cannot be empty"));
    }
    let length = text.chars().count();
    if length > MAX_ID {
        return Err(format!("{what} has at most {MAX_ID} characters, this has {length}"));
    }
    if !text.starts_with(|first: char| first.is_ascii_alphanumeric()) {
        return Err(format!("{what} starts with a letter (a to z) or a digit"));
    }
    match text.chars().find(|&c| !(c.is_ascii_alphanumeric() || "-_.".contains(c))) {
        Some(odd) => Err(format!(
            "{what} consists of letters (a to z), digits, '-', '_' and '.', not '{}'",
            odd.escape_default()
        )),
        None => Ok(text.to_owned()),
    }
}

/// Checks `NAME=value`.
pub fn variable(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() => Ok(text.to_owned()),
        _ => Err("a variable is given as NAME=value".to_owned()),
    }
}

/// `text` with everything outside RFC 3986's unreserved characters percent-encoded.
pub fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_ids_pass() {
        for id in ["web1", "a", "0", "vagrant-2a1b_c.d", &"x".repeat(63)] {
            assert_eq!(vm_id(id).as_deref(), Ok(id));
        }
    }

    #[test]
    fn bad_ids_are_refused_with_the_reason() {
        for (id, reason) in [
            ("", "empty"),
            ("..", "starts"),
            ("-x", "starts"),
            ("a/b", "'/'"),
            ("a b", "' '"),
            ("a\nb", "'\\n'"),
            ("bär", "'\\u{e4}'"),
            (&"x".repeat(300), "300"),
        ] {
            let message = vm_id(id).unwrap_err();
            assert!(message.contains(reason), "{id:?}: {message}");
            assert!(!message.contains('\n'));
        }
    }

    #[test]
    fn a_snapshots_name_is_no_other_path() {
        for name in ["", ".", ".."] {
            assert!(snapshot(name).is_err(), "{name:?}");
        }
        for name in ["never on", "...", "ä"] {
            assert_eq!(snapshot(name).as_deref(), Ok(name));
        }
    }

    #[test]
    fn odd_characters_are_percent_encoded() {
        assert_eq!(encode("a/b c?d#%ä"), "a%2Fb%20c%3Fd%23%25%C3%A4");
        assert_eq!(encode("web-1_x.y~"), "web-1_x.y~");
    }

    #[test]
    fn variables_need_a_name() {
        assert!(variable("A=").is_ok());
        assert!(variable("A=b=c").is_ok());
        assert!(variable("=x").is_err());
        assert!(variable("A").is_err());
    }
}
