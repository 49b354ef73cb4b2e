//! Ports of guests that are published on the host (`/v1/vms/{id}/ports`).

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a port is of.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Connections.
    #[default]
    Tcp,
    /// Datagrams.
    Udp,
}

impl Protocol {
    /// The word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            _ => Err(format!("{word:?} is no protocol of ports: tcp and udp are")),
        }
    }
}

/// Where a published port is on the host; `localhost` or one address on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum HostAddress {
    /// 127.0.0.1 and, where the host has IPv6, ::1.
    #[default]
    Localhost,
    /// One address, or all of one family (0.0.0.0, ::).
    Ip(IpAddr),
}

impl HostAddress {
    /// Whether only this machine reaches it.
    pub fn is_loopback(self) -> bool {
        match self {
            Self::Localhost => true,
            Self::Ip(ip) => ip.is_loopback(),
        }
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Localhost => f.write_str("localhost"),
            Self::Ip(ip) => ip.fmt(f),
        }
    }
}

impl FromStr for HostAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "localhost" {
            return Ok(Self::Localhost);
        }
        let shown: String = text.chars().take(80).collect();
        let ip: IpAddr = text
            .parse()
            .map_err(|_| format!("{shown:?} is no address of a host: give localhost or an IP address"))?;
        let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
        if ip.is_multicast() || broadcast || ip.to_canonical() != ip {
            return Err(format!("{ip} is no address that a port can be published on"));
        }
        Ok(Self::Ip(ip))
    }
}

impl TryFrom<String> for HostAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<HostAddress> for String {
    fn from(address: HostAddress) -> Self {
        address.to_string()
    }
}

/// Body of `POST /v1/vms/{id}/ports`: a port of the guest, and where it is to be on the host. As text
/// `[ADDRESS:]HOST:GUEST[/tcp|/udp]`, an IPv6 address in brackets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishPort {
    /// The port of the host; 0 lets the daemon choose one.
    pub host_port: u16,
    /// The port of the guest, 1 to 65535.
    #[schema(minimum = 1)]
    pub guest_port: u16,
    /// By default tcp.
    #[serde(default)]
    pub protocol: Protocol,
    /// By default `localhost`: 127.0.0.1 and ::1.
    #[serde(default)]
    #[schema(value_type = String, pattern = r"^(localhost|[0-9]{1,3}(\.[0-9]{1,3}){3}|[0-9a-fA-F:.]{2,45})$")]
    pub host_address: HostAddress,
}

impl fmt::Display for PublishPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_address {
            HostAddress::Localhost => {}
            HostAddress::Ip(IpAddr::V4(ip)) => write!(f, "{ip}:")?,
            HostAddress::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]:")?,
        }
        write!(f, "{}:{}/{}", self.host_port, self.guest_port, self.protocol)
    }
}

impl FromStr for PublishPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shown: String = text.chars().take(80).collect();
        let form = || format!("{shown:?} is no port: give [ADDRESS:]HOST-PORT:GUEST-PORT[/tcp|/udp]");
        let (ports, protocol) = match text.split_once('/') {
            Some((ports, protocol)) => (ports, protocol.parse()?),
            None => (text, Protocol::default()),
        };
        let (host, guest) = ports.rsplit_once(':').ok_or_else(form)?;
        let (host_address, host_port) = address_and_port(host, form)?;
        let guest_port = number(guest).ok_or_else(form)?;
        if guest_port == 0 {
            return Err("a guest's port is 1 to 65535".to_owned());
        }
        let host_address = host_address.unwrap_or_default();
        Ok(Self { host_port, guest_port, protocol, host_address })
    }
}

/// Names a published port: `[ADDRESS:]PORT[-tcp|-udp]`, or with `/` before the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortName {
    /// Where it is; only needed where there are several of that number.
    pub host_address: Option<HostAddress>,
    /// The port of the host.
    pub host_port: u16,
    /// By default tcp.
    pub protocol: Protocol,
}

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_address {
            None => {}
            Some(HostAddress::Ip(IpAddr::V6(ip))) => write!(f, "[{ip}]:")?,
            Some(address) => write!(f, "{address}:")?,
        }
        write!(f, "{}-{}", self.host_port, self.protocol)
    }
}

impl FromStr for PortName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shown: String = text.chars().take(80).collect();
        let form = || format!("{shown:?} names no port of the host: give [ADDRESS:]PORT[/tcp|/udp]");
        let (host, protocol) = match text.rsplit_once(['/', '-']) {
            Some((host, protocol)) => (host, protocol.parse().map_err(|_| form())?),
            None => (text, Protocol::default()),
        };
        let (host_address, host_port) = address_and_port(host, form)?;
        Ok(Self { host_address, host_port, protocol })
    }
}

fn address_and_port(text: &str, form: impl Fn() -> String) -> Result<(Option<HostAddress>, u16), String> {
    let (address, port) = match text.rsplit_once(':') {
        None => (None, text),
        Some((address, port)) => {
            let six = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
            // Without brackets nobody can say where an IPv6 address ends.
            if six.is_none() && address.contains(':') {
                return Err(form());
            }
            (Some(six.unwrap_or(address).parse()?), port)
        }
    };
    Ok((address, number(port).ok_or_else(form)?))
}

/// Digits alone: the standard library takes a sign too.
fn number(text: &str) -> Option<u16> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// Whether a published port can be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PortState {
    /// The daemon listens there.
    #[default]
    Listening,
    /// It is not to be had; the daemon tries again when it is asked for the ports, and at the VM's next power-on.
    Waiting,
}

impl PortState {
    /// The word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Listening => "listening",
            Self::Waiting => "waiting",
        }
    }
}

/// A port of a guest that is published on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Port {
    /// `localhost` (127.0.0.1 and ::1) or one address.
    #[schema(value_type = String)]
    pub host_address: HostAddress,
    /// The port of the host.
    pub host_port: u16,
    /// The port of the guest.
    pub guest_port: u16,
    /// What it is of.
    pub protocol: Protocol,
    /// Whether it can be used.
    pub state: PortState,
    /// Why it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_and_written_alike() {
        for (text, canonical) in [
            ("8080:80", "8080:80/tcp"),
            ("0:80/tcp", "0:80/tcp"),
            ("53:53/udp", "53:53/udp"),
            ("localhost:8080:80", "8080:80/tcp"),
            ("127.0.0.1:8080:80", "127.0.0.1:8080:80/tcp"),
            ("[::1]:8080:80/udp", "[::1]:8080:80/udp"),
            ("0.0.0.0:65535:65535", "0.0.0.0:65535:65535/tcp"),
        ] {
            let port: PublishPort = text.parse().unwrap();
            assert_eq!(port.to_string(), canonical, "{text}");
            assert_eq!(canonical.parse(), Ok(port));
            let json = serde_json::to_string(&port).unwrap();
            assert_eq!(serde_json::from_str::<PublishPort>(&json).unwrap(), port);
        }
    }

    #[test]
    fn what_is_no_port_is_refused_with_what_is() {
        for text in [
            "",
            "80",
            ":80",
            "80:",
            "a:80",
            "80:b",
            "80:0",
            "-1:80",
            "+1:80",
            "65536:80",
            "80:65536",
            "80:80/",
            "80:80/sctp",
            "80:80/TCP",
            "8000-8010:80",
            "::1:80:80",
            "[::1:80:80",
            "1.2.3:80:80",
            "host:80:80",
            "224.0.0.1:80:80",
            "255.255.255.255:80:80",
            "[::ffff:127.0.0.1]:80:80",
            "1:2:3:4",
            "80:80/tcp/udp",
            " 80:80",
        ] {
            let error = text.parse::<PublishPort>().unwrap_err();
            assert!(error.len() > 20, "{text}: {error}");
        }
    }

    #[test]
    fn names_of_ports_are_read() {
        for (text, canonical) in [
            ("8080", "8080-tcp"),
            ("8080/udp", "8080-udp"),
            ("8080-udp", "8080-udp"),
            ("127.0.0.1:8080", "127.0.0.1:8080-tcp"),
            ("[::1]:8080-udp", "[::1]:8080-udp"),
            ("localhost:8080", "localhost:8080-tcp"),
        ] {
            let name: PortName = text.parse().unwrap();
            assert_eq!(name.to_string(), canonical);
            assert_eq!(canonical.parse(), Ok(name));
        }
        for text in ["", "x", "8080-", "8080-sctp", "-udp", "8080:80", "::1:80", "70000", "80/80"] {
            assert!(text.parse::<PortName>().is_err(), "{text}");
        }
    }
}
