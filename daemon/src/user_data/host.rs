//! What a guest gets of the host's settings: proxies, and certificates of authorities. They become files and commands of what it
//! is set up with.

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use catalyst_agent_protocol::SetUp;
use catalyst_agent_protocol::set_up::{Content, NewFile};
use catalyst_api::Proxy;
use thiserror::Error;

/// Longest setting, in bytes.
const MAX_SETTING: usize = 2048;
/// Most certificates, and most bytes of one.
const MAX_CERTIFICATES: usize = 64;
const MAX_CERTIFICATE: usize = 64 * 1024;
/// What is reached without a proxy in any case: the guest itself, and its neighbours by name.
const ALWAYS_DIRECT: &str = "localhost,127.0.0.1,::1,.catalyst";
const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";
/// Where programs without settings of their own look.
const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Why a guest cannot have a setting of the host's.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum HostError {
    /// No address of a proxy.
    #[error("The proxy '{0}' is not as in http://NAME:PORT")]
    Proxy(String),
    /// It is the host's loopback, where guests reach nothing.
    #[error(
        "The proxy {proxy} listens on this machine's loopback alone, which guests do not reach; let it listen on \
         {gateway}:{port} or on all addresses, or name another"
    )]
    Loopback {
        /// The proxy.
        proxy: String,
        /// The host as guests reach it.
        gateway: Ipv4Addr,
        /// The port.
        port: u16,
    },
    /// There is no proxy.
    #[error("There is no proxy to pass on: HTTP_PROXY and HTTPS_PROXY are not set")]
    NoProxy,
    /// No list of names.
    #[error("NO_PROXY has characters that it cannot have, or is longer than {MAX_SETTING}")]
    NoProxyList,
    /// No certificate.
    #[error("Certificate {number} cannot be used: {why}")]
    Certificate {
        /// Which, from 1.
        number: usize,
        /// Why not.
        why: &'static str,
    },
    /// Too many.
    #[error("{0} certificates are too many: at most {MAX_CERTIFICATES} are possible")]
    TooMany(usize),
}

/// A proxy as what is behind the `gateway` reaches it.
pub(crate) fn proxy_behind(gateway: Ipv4Addr, proxy: &str) -> Result<String, HostError> {
    reachable(proxy, gateway, listens)
}

/// Adds proxies. Those of the host's loopback become those of the `gateway`, if they listen there too.
pub fn add_proxy(set_up: &mut SetUp, proxy: &Proxy, gateway: Ipv4Addr) -> Result<(), HostError> {
    let reached =
        |text: &Option<String>| text.as_deref().map(|text| reachable(text, gateway, listens)).transpose();
    let (http, https) = (reached(&proxy.http)?, reached(&proxy.https)?);
    if http.is_none() && https.is_none() {
        return Err(HostError::NoProxy);
    }
    let given = proxy.no_proxy.as_deref().unwrap_or_default().trim_matches(',');
    let plain = |c: char| c.is_ascii_alphanumeric() || ".,:*-_/[] ".contains(c);
    if given.len() > MAX_SETTING || !given.chars().all(plain) {
        return Err(HostError::NoProxyList);
    }
    let direct: String = format!("{given},{ALWAYS_DIRECT}").replace(' ', "").trim_matches(',').to_owned();
    let mut settings: Vec<(String, String)> = Vec::new();
    for (name, value) in [("http_proxy", http), ("https_proxy", https), ("no_proxy", Some(direct))] {
        if let Some(value) = value {
            settings.push((name.to_ascii_uppercase(), value.clone()));
            settings.push((name.to_owned(), value));
        }
    }
    let lines = |line: &dyn Fn(&str, &str) -> String| {
        settings.iter().map(|(name, value)| line(name, value)).collect::<String>()
    };
    let plain = lines(&|name, value| format!("{name}={value}\n"));
    let exports = lines(&|name, value| format!("export {name}='{value}'\n"));
    // The service manager takes '%' for the beginning of a specifier.
    let manager =
        lines(&|name, value| format!("DefaultEnvironment=\"{name}={}\"\n", value.replace('%', "%%")));
    let names: Vec<&str> = settings.iter().map(|(name, _)| name.as_str()).collect();
    let keep = format!("Defaults env_keep += \"{}\"\n", names.join(" "));
    let mut apt = String::new();
    for (name, value) in settings.iter().filter(|(name, _)| name.ends_with("s_proxy") || name == "http_proxy")
    {
        let kind = name.trim_end_matches("_proxy");
        // Writing to a String does not fail.
        let _ = writeln!(apt, "Acquire::{kind}::Proxy \"{value}\";");
    }
    set_up.files.extend([
        // Read by logins, and by dockerd when it starts.
        file("/etc/environment", &plain, 0o644, true),
        file("/etc/default/docker", &plain, 0o644, true),
        file("/etc/profile.d/catalyst-proxy.sh", &exports, 0o644, false),
        file(
            "/etc/systemd/system.conf.d/catalyst-proxy.conf",
            &format!("[Manager]\n{manager}"),
            0o644,
            false,
        ),
        file("/etc/sudoers.d/91-catalyst-proxy", &keep, 0o440, false),
        file("/etc/apt/apt.conf.d/95catalyst-proxy", &apt, 0o644, false),
    ]);
    let arguments: String = settings.iter().map(|(name, value)| format!(" '{name}={value}'")).collect();
    set_up.preparation.push(format!("{exports}systemctl set-environment{arguments}"));
    // One that started before, in a template, has not read it.
    set_up.preparation.push(restart_docker("! tr '\\0' '\\n' </proc/$pid/environ | grep -q '^NO_PROXY='"));
    Ok(())
}

/// Adds certificates of authorities, each text one or several in PEM.
pub fn add_certificates(set_up: &mut SetUp, texts: &[String]) -> Result<(), HostError> {
    let mut all = Vec::new();
    for (number, text) in (1..).zip(texts) {
        all.extend(certificates(text).map_err(|why| HostError::Certificate { number, why })?);
    }
    if all.len() > MAX_CERTIFICATES {
        return Err(HostError::TooMany(all.len()));
    }
    if all.is_empty() {
        return Ok(());
    }
    let path = |number: usize| format!("/usr/local/share/ca-certificates/catalyst-{number}.crt");
    let paths: Vec<String> = (1..=all.len()).map(path).collect();
    set_up.files.extend(paths.iter().zip(&all).map(|(path, text)| file(path, text, 0o644, false)));
    let list = paths.join(" ");
    set_up.preparation.push(format!(
        "if command -v update-ca-certificates >/dev/null; then update-ca-certificates; else cat {list} >>{BUNDLE}; fi"
    ));
    // A program reads them once.
    set_up.preparation.push(restart_docker("true"));
    Ok(())
}

/// A command that starts dockerd anew if it runs and `condition` holds.
fn restart_docker(condition: &str) -> String {
    format!(
        "pid=$(systemctl show --property MainPID --value docker.service); if [ \"${{pid:-0}}\" != 0 ] && {condition}; \
         then systemctl restart docker.service; fi"
    )
}

fn file(path: &str, text: &str, mode: u32, append: bool) -> NewFile {
    let owner = ("root".to_owned(), "root".to_owned());
    NewFile { path: path.to_owned(), content: Content(text.as_bytes().to_vec()), owner, mode, append }
}

/// The certificates of a text, each as it was written.
fn certificates(text: &str) -> Result<Vec<String>, &'static str> {
    if text.contains("PRIVATE KEY-----") {
        return Err("there is a private key in it, which no guest needs");
    }
    let mut all = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(BEGIN) {
        let body = &rest[at + BEGIN.len()..];
        let end = body.find(END).ok_or("it is cut short")?;
        let packed: String = body[..end].split_whitespace().collect();
        let der = STANDARD.decode(packed).map_err(|_| "it is not PEM")?;
        // A certificate is an ASN.1 SEQUENCE (RFC 5280, 4.1).
        if der.first() != Some(&0x30) || der.len() > MAX_CERTIFICATE {
            return Err("it is no certificate");
        }
        all.push(format!("{BEGIN}{}{END}\n", &body[..end]));
        rest = &body[end + END.len()..];
    }
    if all.is_empty() { Err("there is no certificate in PEM in it") } else { Ok(all) }
}

/// The address of a proxy as a guest reaches it.
fn reachable(
    text: &str,
    gateway: Ipv4Addr,
    listens: impl Fn(Ipv4Addr, u16) -> bool,
) -> Result<String, HostError> {
    let wrong = || HostError::Proxy(text.chars().take(100).collect::<String>().escape_debug().to_string());
    let plain = |c: char| c.is_ascii_graphic() && !"'\"\\$`#<>".contains(c);
    if text.len() > MAX_SETTING || !text.chars().all(plain) {
        return Err(wrong());
    }
    let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
    if !["http", "https"].contains(&scheme) {
        return Err(wrong());
    }
    let rest = rest.trim_end_matches('/');
    let (login, place) = rest.rsplit_once('@').map_or(("", rest), |(login, place)| (login, place));
    let usual = if scheme == "https" { 443 } else { 80 };
    let (host, port) = match place.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().map_err(|_| wrong())?),
        _ => (place, usual),
    };
    if host.is_empty() || host.contains('/') || port == 0 {
        return Err(wrong());
    }
    let bare = host.trim_matches(['[', ']']);
    let loopback = bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    if !loopback {
        return Ok(format!("{scheme}://{rest}"));
    }
    if !listens(gateway, port) {
        // Without the login, which is a secret.
        let proxy = format!("{scheme}://{place}");
        return Err(HostError::Loopback { proxy, gateway, port });
    }
    let login = if login.is_empty() { String::new() } else { format!("{login}@") };
    Ok(format!("{scheme}://{login}{gateway}:{port}"))
}

/// Whether a program of this machine listens on that port of the address, or of all (proc_net(5), `tcp`).
fn listens(address: Ipv4Addr, port: u16) -> bool {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let own = format!("{:08X}:{port:04X}", u32::from_le_bytes(address.octets()));
    let (all, all6) = (format!("{:08X}:{port:04X}", 0), format!("{:032X}:{port:04X}", 0));
    let heard = |text: &str| {
        text.lines().skip(1).any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let (local, state) = (fields.next().unwrap_or_default(), fields.nth(1).unwrap_or_default());
            state == "0A" && [&own, &all, &all6].iter().any(|wanted| *wanted == local)
        })
    };
    heard(&read("/proc/thread-self/net/tcp")) || heard(&read("/proc/thread-self/net/tcp6"))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 208, 0, 1);

    #[test]
    fn a_proxy_of_the_loopback_is_that_of_the_gateway_or_refused() {
        let at = |text: &str, listens: bool| reachable(text, GATEWAY, |_, _| listens);
        assert_eq!(at("http://proxy.example:3128/", false).unwrap(), "http://proxy.example:3128");
        assert_eq!(at("proxy:8080", false).unwrap(), "http://proxy:8080");
        for own in ["http://127.0.0.1:3128", "localhost:3128", "http://[::1]:3128/", "http://127.1.2.3:3128"]
        {
            assert_eq!(at(own, true).unwrap(), "http://10.208.0.1:3128", "{own}");
            let told = at(own, false).unwrap_err().to_string();
            assert!(told.contains("10.208.0.1:3128") && told.contains("loopback alone"), "{told}");
        }
        assert_eq!(at("http://me:pw@localhost:1", true).unwrap(), "http://me:pw@10.208.0.1:1");
        assert!(!at("http://me:secret@localhost:1", false).unwrap_err().to_string().contains("secret"));
        for bad in [
            "",
            "ftp://x:1",
            "http://",
            "http://x:y",
            "http://x:0",
            "http://a b:1",
            "http://x:1'; rm -rf /",
            "http://$x:1",
            "socks5://x:1",
            "http://x\n:1",
        ] {
            assert!(matches!(at(bad, true), Err(HostError::Proxy(_))), "{bad:?}");
        }
    }

    #[test]
    fn who_listens_is_known() {
        let all = TcpListener::bind("0.0.0.0:0").unwrap();
        let own = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        assert!(listens(GATEWAY, port(&all)));
        assert!(!listens(GATEWAY, port(&own)));
        assert!(listens(Ipv4Addr::LOCALHOST, port(&own)));
    }

    #[test]
    fn settings_go_to_shells_services_and_dockerd() {
        let mut set_up = SetUp::default();
        let proxy =
            Proxy { http: Some("http://p:1".into()), https: None, no_proxy: Some("a.b, 10.0.0.0/8".into()) };
        add_proxy(&mut set_up, &proxy, GATEWAY).unwrap();
        let text = |path: &str| {
            let file = set_up.files.iter().find(|file| file.path == path).unwrap();
            String::from_utf8(file.content.0.clone()).unwrap()
        };
        assert!(
            text("/etc/environment")
                .contains("HTTP_PROXY=http://p:1\nhttp_proxy=http://p:1\nNO_PROXY=a.b,10.0.0.0/8,localhost")
        );
        assert_eq!(text("/etc/apt/apt.conf.d/95catalyst-proxy"), "Acquire::http::Proxy \"http://p:1\";\n");
        assert!(
            text("/etc/systemd/system.conf.d/catalyst-proxy.conf")
                .starts_with("[Manager]\nDefaultEnvironment=\"HTTP_PROXY=")
        );
        assert!(set_up.preparation[0].contains("systemctl set-environment 'HTTP_PROXY=http://p:1'"));
        assert_eq!(add_proxy(&mut SetUp::default(), &Proxy::default(), GATEWAY), Err(HostError::NoProxy));
        let bad = Proxy { no_proxy: Some("a'b".into()), ..proxy };
        assert_eq!(add_proxy(&mut SetUp::default(), &bad, GATEWAY), Err(HostError::NoProxyList));
    }

    #[test]
    fn certificates_alone_are_taken() {
        let der = STANDARD.encode([0x30, 3, 2, 1, 5]);
        let pem = format!("a comment\n{BEGIN}\n{der}\n{END}\nmore\n{BEGIN}\n{der}\n{END}\n");
        let mut set_up = SetUp::default();
        add_certificates(&mut set_up, &[pem]).unwrap();
        let paths: Vec<_> = set_up.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "/usr/local/share/ca-certificates/catalyst-1.crt",
                "/usr/local/share/ca-certificates/catalyst-2.crt"
            ]
        );
        for (bad, word) in [
            ("hello".to_owned(), "no certificate in PEM"),
            (format!("{BEGIN}\n{der}"), "cut short"),
            (format!("{BEGIN}\n***\n{END}"), "not PEM"),
            (format!("{BEGIN}\naGVsbG8=\n{END}"), "no certificate"),
            ("-----BEGIN PRIVATE KEY-----".to_owned(), "private key"),
        ] {
            let told = add_certificates(&mut SetUp::default(), &[bad]).unwrap_err().to_string();
            assert!(told.contains(word), "{told}");
        }
    }
}
