//! Which daemon to speak to.

use std::fmt;

use catalyst_api::DEFAULT_PORT;
use catalyst_api::config::Config;

/// Why a `--host` cannot be one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// TLS was asked for.
    #[error(
        "cannot speak to '{0}': the daemon serves plain HTTP; to reach another machine forward its port by ssh"
    )]
    Tls(String),
    /// Not a host.
    #[error("'{0}' is no daemon's address; write http://HOST:PORT, HOST:PORT or HOST")]
    Malformed(String),
}

/// Where a daemon listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Name or address, IPv6 without brackets.
    pub name: String,
    /// TCP port.
    pub port: u16,
    /// Whether the user chose it; only where nobody did is a daemon started.
    pub explicit: bool,
}

impl Host {
    /// Where a daemon listens by default.
    pub fn local() -> Self {
        Self { name: "localhost".to_owned(), port: DEFAULT_PORT, explicit: false }
    }

    /// The host that `--host` or CATALYST_HOST names, else the one that the user has set, else where a daemon listens by
    /// what is set; an empty text is none.
    pub fn choose(given: Option<&str>, config: &Config) -> Result<Self, HostError> {
        let named = |text: Option<&str>| text.map(str::trim).filter(|text| !text.is_empty()).map(Self::parse);
        if let Some(host) = named(given).or_else(|| named(config.url.as_deref())) {
            return host;
        }
        // A daemon that is started there finds the same settings.
        let set = named(config.listen.as_deref()).transpose()?;
        Ok(set.map_or_else(Self::local, |host| Self { explicit: false, ..host }))
    }

    /// Reads `http://HOST:PORT`, `HOST:PORT`, `HOST` or `:PORT`; a path of `/` is tolerated.
    pub fn parse(text: &str) -> Result<Self, HostError> {
        let malformed = || HostError::Malformed(text.to_owned());
        let authority = match text.split_once("://") {
            Some((scheme, _)) if scheme.eq_ignore_ascii_case("https") => {
                return Err(HostError::Tls(text.to_owned()));
            }
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some(_) => return Err(malformed()),
            None => text,
        };
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let (name, port) = split_port(authority).ok_or_else(malformed)?;
        let port = match port {
            None => DEFAULT_PORT,
            Some(digits) => digits.parse().ok().filter(|&port| port != 0).ok_or_else(malformed)?,
        };
        let name = if name.is_empty() { "localhost" } else { name };
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-._:%".contains(c);
        if authority.is_empty() || !name.chars().all(allowed) {
            return Err(malformed());
        }
        Ok(Self { name: name.to_owned(), port, explicit: true })
    }

    /// `http://HOST:PORT`, without a slash at the end.
    pub fn base(&self) -> String {
        format!("http://{self}")
    }

    /// Whether it is this machine by name or loopback address.
    pub fn is_loopback(&self) -> bool {
        self.name == "localhost"
            || self.name.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.contains(':') {
            write!(f, "[{}]:{}", self.name, self.port)
        } else {
            write!(f, "{}:{}", self.name, self.port)
        }
    }
}

/// `[v6]:port`, `v6`, `name:port` or `name` as name and port.
fn split_port(authority: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = authority.strip_prefix('[') {
        let (name, after) = rest.split_once(']')?;
        return match after {
            "" => Some((name, None)),
            _ => Some((name, Some(after.strip_prefix(':')?))),
        };
    }
    match authority.matches(':').count() {
        0 => Some((authority, None)),
        1 => authority.split_once(':').map(|(name, port)| (name, Some(port))),
        _ => authority.parse::<std::net::Ipv6Addr>().ok().map(|_| (authority, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_host_is_read() {
        for (text, shown) in [
            ("localhost:9000", "localhost:9000"),
            ("http://localhost:9000/", "localhost:9000"),
            ("HTTP://10.0.0.7", "10.0.0.7:8080"),
            ("box", "box:8080"),
            (":9000", "localhost:9000"),
            ("[::1]:81", "[::1]:81"),
            ("::1", "[::1]:8080"),
            ("http://[fe80::1]", "[fe80::1]:8080"),
        ] {
            let host = Host::parse(text).unwrap();
            assert_eq!(host.to_string(), shown, "{text}");
            assert!(host.explicit);
        }
    }

    #[test]
    fn what_is_no_host_is_refused() {
        for text in ["a:b", "a:0", "a:70000", "ftp://a", "a/b", "user@a", "[::1", "a b", "http://", "1:2:3"] {
            assert_eq!(Host::parse(text), Err(HostError::Malformed(text.to_owned())), "{text}");
        }
        assert!(matches!(Host::parse("https://a"), Err(HostError::Tls(_))));
    }

    #[test]
    fn only_no_choice_is_no_choice() {
        let mut config = Config::default();
        assert_eq!(Host::choose(None, &config), Ok(Host::local()));
        assert_eq!(Host::choose(Some(" "), &config), Ok(Host::local()));
        assert!(Host::choose(Some("localhost:8080"), &config).unwrap().explicit);
        config.listen = Some("localhost:8081".to_owned());
        let set = Host::choose(None, &config).unwrap();
        assert_eq!((set.port, set.explicit), (8081, false));
        config.url = Some("http://box:81".to_owned());
        assert_eq!(Host::choose(None, &config).unwrap().to_string(), "box:81");
        assert_eq!(Host::choose(Some(":1"), &config).unwrap().port, 1);
        config.url = Some("https://box".to_owned());
        assert!(Host::choose(None, &config).is_err());
        assert!(Host::local().is_loopback() && Host::parse("[::1]:1").unwrap().is_loopback());
        assert!(!Host::parse("box").unwrap().is_loopback());
    }
}
