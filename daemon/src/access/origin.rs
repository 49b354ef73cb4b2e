//! Requests that a browser made for a foreign page.
//!
//! A page on the internet can make its visitor's browser speak to localhost. What it cannot do is lie about it: the
//! `Host` header holds the name it used (a foreign one where DNS was rebound to loopback), `Origin` the page's own
//! address, `Sec-Fetch-Site` how the two are related (Fetch standard; W3C Fetch Metadata).

use std::net::{Ipv4Addr, Ipv6Addr};

use axum::http::{HeaderMap, HeaderValue, Uri, header};

/// Why a request is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OriginError {
    /// No name that means this machine.
    #[error("the Host header must be localhost, 127.0.0.1 or [::1], with or without a port")]
    Host,
    /// HTTP/1.0 without a Host, or several of them.
    #[error("exactly one Host header is needed: localhost, 127.0.0.1 or [::1], with or without a port")]
    HostCount,
    /// A page of another origin.
    #[error("requests of web pages are taken from the daemon's own pages only, not from another Origin")]
    Origin,
    /// A page of another site, by `Sec-Fetch-Site`.
    #[error("requests of web pages are taken from the daemon's own pages only (Sec-Fetch-Site)")]
    FetchSite,
}

/// Judges a request that came by TCP to the daemon's `own_port`.
///
/// A missing `Host` is refused too: every client of the last decades sends one. A page may come from the daemon's own
/// port, or from the port in `Host` (a forwarded port, where the browser knows no other).
pub fn check(headers: &HeaderMap, uri: &Uri, own_port: u16) -> Result<(), OriginError> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return Err(OriginError::HostCount) };
    let host = text(host).and_then(local_host).ok_or(OriginError::Host)?;
    // The absolute form names a host of its own, which then leads (RFC 9112, 3.2.2).
    if let Some(authority) = uri.authority() {
        local_host(authority.as_str()).ok_or(OriginError::Host)?;
    }
    for origin in headers.get_all(header::ORIGIN) {
        let port = text(origin).and_then(local_origin).ok_or(OriginError::Origin)?;
        if port != own_port && Some(port) != host.port {
            return Err(OriginError::Origin);
        }
    }
    for site in headers.get_all("sec-fetch-site") {
        // "same-site" is not enough: it means any port of localhost.
        if !matches!(text(site), Some("same-origin" | "none")) {
            return Err(OriginError::FetchSite);
        }
    }
    Ok(())
}

fn text(value: &HeaderValue) -> Option<&str> {
    value.to_str().ok()
}

struct LocalHost {
    port: Option<u16>,
}

/// The port of `http://NAME[:PORT]`, where NAME means this machine.
fn local_origin(origin: &str) -> Option<u16> {
    const HTTP: u16 = 80;
    local_host(origin.strip_prefix("http://")?).map(|host| host.port.unwrap_or(HTTP))
}

/// `NAME[:PORT]`, where NAME is localhost or a loopback address in digits.
fn local_host(host: &str) -> Option<LocalHost> {
    let (name, port) = match host.rfind(':') {
        Some(colon) if !host.ends_with(']') => (&host[..colon], Some(port(&host[colon + 1..])?)),
        _ => (host, None),
    };
    let is_local = match name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
        Some(six) => six.parse::<Ipv6Addr>().is_ok_and(|ip| ip.is_loopback()),
        None => {
            name.eq_ignore_ascii_case("localhost")
                || name.parse::<Ipv4Addr>().is_ok_and(|ip| ip.is_loopback())
        }
    };
    is_local.then_some(LocalHost { port })
}

/// Digits only: `parse` would take a sign.
fn port(text: &str) -> Option<u16> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(headers: &[(&'static str, &str)]) -> Result<(), OriginError> {
        judge_uri("/api/vms", headers)
    }

    fn judge_uri(uri: &str, headers: &[(&'static str, &str)]) -> Result<(), OriginError> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        check(&map, &uri.parse().unwrap(), 8080)
    }

    #[test]
    fn local_names_are_taken_with_any_port() {
        for host in [
            "localhost",
            "LocalHost:8080",
            "localhost:9000",
            "127.0.0.1",
            "127.0.0.1:8080",
            "127.0.0.2:1",
            "[::1]",
            "[::1]:8080",
        ] {
            assert_eq!(judge(&[("host", host)]), Ok(()), "{host}");
        }
    }

    #[test]
    fn foreign_names_are_refused() {
        for host in [
            "",
            "evil.example",
            "evil.example:8080",
            "localhost.evil.example",
            "localhost.",
            "localhost:",
            ":8080",
            "localhost:+80",
            "localhost:99999",
            "user@localhost",
            "localhost/x",
            "127.1",
            "0x7f000001",
            "2130706433",
            "0.0.0.0",
            "192.168.1.1",
            "::1",
            "[::]",
            "[::1",
            "[::ffff:127.0.0.1]",
            "[::1]evil",
            "localh\u{f6}st",
        ] {
            assert_eq!(judge(&[("host", host)]), Err(OriginError::Host), "{host}");
        }
    }

    #[test]
    fn exactly_one_host_is_needed() {
        assert_eq!(judge(&[]), Err(OriginError::HostCount));
        let two = [("host", "localhost"), ("host", "localhost")];
        assert_eq!(judge(&two), Err(OriginError::HostCount));
    }

    #[test]
    fn the_absolute_form_is_judged_too() {
        let host = [("host", "localhost:8080")];
        assert_eq!(judge_uri("http://evil.example/api/vms", &host), Err(OriginError::Host));
        assert_eq!(judge_uri("http://localhost:8080/api/vms", &host), Ok(()));
    }

    #[test]
    fn own_pages_are_taken() {
        for (host, origin) in [
            ("localhost:8080", "http://localhost:8080"),
            ("127.0.0.1:8080", "http://localhost:8080"),
            ("[::1]:8080", "http://[::1]:8080"),
            // A forwarded port: the browser knows only that one.
            ("localhost:9000", "http://localhost:9000"),
        ] {
            assert_eq!(judge(&[("host", host), ("origin", origin)]), Ok(()), "{origin}");
        }
    }

    #[test]
    fn foreign_pages_are_refused() {
        for origin in [
            "",
            "null",
            "http://evil.example",
            "http://evil.example:8080",
            "https://localhost:8080",
            "http://localhost",
            "http://localhost:3000",
            "http://localhost:8080.evil.example",
            "http://localhost:8080/",
            "file://",
            "http://localhost:8080 http://evil.example",
        ] {
            let headers = [("host", "localhost:8080"), ("origin", origin)];
            assert_eq!(judge(&headers), Err(OriginError::Origin), "{origin}");
        }
        let second = [("host", "localhost:8080"), ("origin", "http://localhost:8080"), ("origin", "null")];
        assert_eq!(judge(&second), Err(OriginError::Origin));
    }

    #[test]
    fn foreign_sites_are_refused_and_own_ones_taken() {
        for (site, result) in [
            ("same-origin", Ok(())),
            ("none", Ok(())),
            ("same-site", Err(OriginError::FetchSite)),
            ("cross-site", Err(OriginError::FetchSite)),
            ("what", Err(OriginError::FetchSite)),
        ] {
            assert_eq!(judge(&[("host", "localhost:8080"), ("sec-fetch-site", site)]), result, "{site}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_host_is_judged_without_panic(host in "\\PC{0,60}") {
            let _ = local_host(&host);
            let _ = local_origin(&host);
        }
    }
}
