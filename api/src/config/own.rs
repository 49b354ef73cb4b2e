//! `config.toml`: of TOML (v1.0) what seven settings need, which are texts: comments, and lines `key = "text"` or
//! `key = 'text'`.

use super::{Config, lines};

/// Reads the text of a file.
pub(super) fn parse(text: &str) -> Result<Config, String> {
    let mut config = Config::default();
    for (number, line) in lines(text) {
        let malformed = || format!("line {number} is not KEY = \"TEXT\"");
        let (key, rest) = line.split_once('=').ok_or_else(malformed)?;
        let value = value(rest.trim()).ok_or_else(malformed)?;
        let key = key.trim();
        let text = match key {
            "listen" => &mut config.listen,
            "engine" => &mut config.engine,
            "parent" => &mut config.parent,
            "url" => &mut config.url,
            "proxy" => &mut config.proxy,
            "vm_dir" | "log_dir" => {
                let path = if key == "vm_dir" { &mut config.vm_dir } else { &mut config.log_dir };
                if path.replace(value.into()).is_some() {
                    return Err(twice(key, number));
                }
                continue;
            }
            _ => {
                let known = "listen, vm_dir, log_dir, engine, parent, url and proxy";
                let key: String = key.chars().take(80).collect();
                return Err(format!("there is no setting '{key}' on line {number}; there are {known}"));
            }
        };
        if text.replace(value).is_some() {
            return Err(twice(key, number));
        }
    }
    Ok(config)
}

fn twice(key: &str, number: usize) -> String {
    format!("'{key}' stands there twice, the second time on line {number}")
}

/// A basic or literal string, with nothing but a comment behind it.
fn value(text: &str) -> Option<String> {
    let mut chars = text.chars();
    let quote = chars.next().filter(|c| matches!(c, '"' | '\''))?;
    let mut value = String::new();
    loop {
        match chars.next()? {
            c if c == quote => break,
            '\\' if quote == '"' => match chars.next()? {
                c @ ('"' | '\\') => value.push(c),
                _ => return None,
            },
            c if c.is_control() && c != '\t' => return None,
            c => value.push(c),
        }
    }
    let rest = chars.as_str().trim_start();
    (!value.is_empty() && (rest.is_empty() || rest.starts_with('#'))).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_is_read_with_comments_and_both_quotes() {
        let text = "# mine\nlisten = \"localhost:9000\" # there\nvm_dir='/v # m'\nlog_dir = \"/l\"\n\
                    engine = \"kvm\"\nparent = \"a\\\"b\\\\\"\nurl = \"http://x:1\"\nproxy = \"host\"\n";
        let config = parse(text).unwrap();
        assert_eq!(config.listen.as_deref(), Some("localhost:9000"));
        assert_eq!((config.vm_dir, config.log_dir), (Some("/v # m".into()), Some("/l".into())));
        assert_eq!(config.parent.as_deref(), Some("a\"b\\"));
        assert_eq!(config.url.as_deref(), Some("http://x:1"));
        assert_eq!(config.proxy.as_deref(), Some("host"));
    }

    #[test]
    fn what_is_no_such_line_is_named_by_its_number() {
        for bad in [
            "listen",
            "listen =",
            "listen = \"",
            "listen = \"\"",
            "listen = \"a\" b",
            "listen = \"\\n\"",
            "[daemon]",
            "listen = 'a\"",
            "Listen = \"a\"",
            "engine = \"a\"\nengine = \"b\"",
        ] {
            assert!(parse(&format!("\n{bad}\n")).unwrap_err().contains("line "), "{bad}");
        }
    }
}
