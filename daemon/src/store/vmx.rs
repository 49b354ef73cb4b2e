//! The VM's own file: `key = "value"` lines, as AppCatalyst's clients read and rewrite them.
//!
//! Clients sort the lines, lower-case the keys and drop whatever is not `key = "value"`
//! (AppCatalyst reference section 3.2), so everything that matters is such a line with a
//! lower-case key. Keys are case-insensitive. Lines that are not ours are kept as they are.

use std::fmt::Write;

use thiserror::Error;

/// Largest VMX file that is read, in bytes.
pub const MAX_SIZE: usize = 64 * 1024;

/// Why a text is no VMX, or a value in it is unusable.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum VmxError {
    /// Too large.
    #[error("it has {0} bytes; a VMX has at most {MAX_SIZE}")]
    TooLarge(usize),
    /// Not text.
    #[error("it is not UTF-8 text")]
    NotText,
    /// A control character where none belongs.
    #[error("line {0} has a control character")]
    Control(usize),
    /// A value that is not the number it should be.
    #[error("'{key}' is \"{value}\"; it must be a whole number")]
    NotANumber {
        /// The key.
        key: String,
        /// Its value.
        value: String,
    },
}

/// A VMX file in memory, line by line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vmx {
    lines: Vec<Line>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Line {
    Pair { key: String, value: String },
    Other(String),
}

impl Vmx {
    /// Reads the text of a file. Lines that are not pairs are kept but mean nothing.
    pub fn parse(bytes: &[u8]) -> Result<Self, VmxError> {
        if bytes.len() > MAX_SIZE {
            return Err(VmxError::TooLarge(bytes.len()));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| VmxError::NotText)?;
        let mut lines = Vec::new();
        for (number, line) in text.lines().enumerate() {
            if line.chars().any(|c| c.is_control() && c != '\t') {
                return Err(VmxError::Control(number + 1));
            }
            lines.push(parse_pair(line).unwrap_or_else(|| Line::Other(line.to_owned())));
        }
        Ok(Self { lines })
    }

    /// The value of `key`, the last one if it stands there twice.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.lines.iter().rev().find_map(|line| match line {
            Line::Pair { key: k, value } if k.eq_ignore_ascii_case(key) => Some(value.as_str()),
            _ => None,
        })
    }

    /// The value of `key` as a number; `None` if it is absent or blank.
    pub fn number(&self, key: &str) -> Result<Option<u64>, VmxError> {
        match self.get(key).map(str::trim) {
            None | Some("") => Ok(None),
            Some(text) => text
                .parse()
                .map(Some)
                .map_err(|_| VmxError::NotANumber { key: key.to_owned(), value: text.to_owned() }),
        }
    }

    /// Sets `key`, in the place where it stands or at the end.
    pub fn set(&mut self, key: &str, value: impl Into<String>) {
        let value = value.into();
        let found = self.lines.iter_mut().rev().find_map(|line| match line {
            Line::Pair { key: k, value } if k.eq_ignore_ascii_case(key) => Some(value),
            _ => None,
        });
        match found {
            Some(slot) => *slot = value,
            None => self.lines.push(Line::Pair { key: key.to_owned(), value }),
        }
    }

    /// The text of the file.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for line in &self.lines {
            match line {
                // Writing to a String cannot fail.
                Line::Pair { key, value } => drop(writeln!(text, "{key} = \"{}\"", escape(value))),
                Line::Other(other) => drop(writeln!(text, "{other}")),
            }
        }
        text
    }
}

fn parse_pair(line: &str) -> Option<Line> {
    let (key, rest) = line.split_once('=')?;
    let key = key.trim();
    let value = rest.trim().strip_prefix('"')?.strip_suffix('"')?;
    let key_char = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '-');
    (!key.is_empty() && key.chars().all(key_char) && !value.contains('"'))
        .then(|| Line::Pair { key: key.to_owned(), value: unescape(value) })
}

/// VMX writes what would end a value or a line as `|` and two hexadecimal digits.
fn escape(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for c in value.chars() {
        if matches!(c, '"' | '|') || c.is_ascii_control() {
            // Writing to a String cannot fail.
            let _ = write!(text, "|{:02X}", u32::from(c));
        } else {
            text.push(c);
        }
    }
    text
}

fn unescape(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    let mut rest = value;
    while let Some(at) = rest.find('|') {
        text.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        if let Some(byte) = code.filter(u8::is_ascii) {
            text.push(char::from(byte));
            rest = &rest[at + 3..];
        } else {
            text.push('|');
            rest = &rest[at + 1..];
        }
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_client_that_sorts_lowercases_and_drops_lines_changes_no_meaning() {
        let mut vmx = Vmx::default();
        vmx.set("displayName", "Web \"one\" | two");
        vmx.set("memsize", "2048");
        vmx.set("catalyst.template", "lumen");
        let mut lines: Vec<String> = vmx
            .to_text()
            .lines()
            .map(|line| {
                let (key, value) = line.split_once(" = ").unwrap();
                format!("{} = {value}", key.to_lowercase())
            })
            .collect();
        lines.sort();
        let back = Vmx::parse(lines.join("\n").as_bytes()).unwrap();
        assert_eq!(back.get("displayname"), Some("Web \"one\" | two"));
        assert_eq!(back.number("MEMSIZE"), Ok(Some(2048)));
        assert_eq!(back.get("catalyst.template"), Some("lumen"));
    }

    #[test]
    fn foreign_lines_survive_a_change() {
        let text = ".encoding = \"UTF-8\"\n# a remark\nfoo bar\nMemSize = \"512\"\n";
        let mut vmx = Vmx::parse(text.as_bytes()).unwrap();
        vmx.set("memsize", "1024");
        assert_eq!(vmx.to_text(), text.replace("512", "1024"));
    }

    #[test]
    fn garbage_is_named() {
        assert_eq!(Vmx::parse(&[0xff, 0xfe]), Err(VmxError::NotText));
        assert_eq!(Vmx::parse(b"a = \"b\"\n\x01"), Err(VmxError::Control(2)));
        assert_eq!(Vmx::parse(&vec![b' '; MAX_SIZE + 1]), Err(VmxError::TooLarge(MAX_SIZE + 1)));
        let vmx = Vmx::parse(b"memsize = \"lots\"").unwrap();
        assert!(vmx.number("memsize").unwrap_err().to_string().contains("\"lots\""));
    }

    proptest! {
        #[test]
        fn any_value_comes_back(value in any::<String>()) {
            let mut vmx = Vmx::default();
            vmx.set("k", value.chars().filter(|c| !c.is_control() || c.is_ascii()).collect::<String>());
            let back = Vmx::parse(vmx.to_text().as_bytes()).unwrap();
            prop_assert_eq!(back.get("k"), vmx.get("k"));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            if let Ok(vmx) = Vmx::parse(&bytes) {
                prop_assert!(Vmx::parse(vmx.to_text().as_bytes()).is_ok());
            }
        }
    }
}
