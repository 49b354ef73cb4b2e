//! dnsmasq, the DHCP and DNS server of the guests: its configuration, its start, its end, and finding it again.
//!
//! It is a process of its own that outlives the daemon, since running guests need names. It goes into the background
//! by itself, which also tells when it is ready: the process that we start ends with status 0 once the sockets are
//! open, and with an error otherwise. It is recognized by what only it has: our log file open (the descriptor that it
//! inherited as standard error) and our configuration on its command line, looked at after a pidfd holds it fast.
//! Its pid file alone proves nothing: pids come again, and the file is dnsmasq's own.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::net::Ipv4Addr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::User;

use super::address::Subnet;
use super::error::NetworkError;
use super::lease::{DOMAIN, gateway};
use super::process::Process;
use super::program::{command, finish, last_lines};
use super::state::{make_folder, read_small, write_public};

/// Bytes of log after which dnsmasq may write no more to it, so that a noisy guest cannot fill memory.
const LOG_LIMIT: u64 = 8 << 20;

/// Bytes of log after which the next start begins a new one.
const LOG_KEPT: u64 = 1 << 20;

/// How long dnsmasq has to end, before and after it is killed.
const END_PATIENCE: Duration = Duration::from_secs(3);

/// The files of one network's dnsmasq.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    folder: PathBuf,
}

impl Files {
    /// Those in `folder`, which is [`super::state::RunDir::network`].
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The folder of files with the guests' names.
    pub fn names(&self) -> PathBuf {
        self.folder.join("names")
    }

    /// The folder of files with the guests' fixed leases.
    pub fn hosts(&self) -> PathBuf {
        self.folder.join("hosts")
    }

    /// dnsmasq's list of the leases that it has acknowledged.
    pub fn acknowledged(&self) -> PathBuf {
        self.folder.join("acknowledged")
    }

    fn config(&self) -> PathBuf {
        self.folder.join("dnsmasq.conf")
    }

    fn pid(&self) -> PathBuf {
        self.folder.join("dnsmasq.pid")
    }

    /// What dnsmasq says.
    pub fn log(&self) -> PathBuf {
        self.folder.join("dnsmasq.log")
    }
}

/// The configuration of the dnsmasq that serves `bridge`.
///
/// Names come only from our files, never from what a guest calls itself, and only under our domain. `domain=` is
/// absent on purpose: with it, dnsmasq ties names of its own to acknowledged leases, and they outlive the guest.
pub(crate) fn config(files: &Files, bridge: &str, subnet: Subnet) -> String {
    let user = match User::from_name("dnsmasq") {
        Ok(Some(_)) => "dnsmasq",
        _ => "nobody",
    };
    let gateway = gateway(subnet);
    let (network, netmask) = (subnet.network(), subnet.netmask());
    let path = |path: PathBuf| path.display().to_string();
    [
        "# Written by catalyst-daemon at each start of the network; changes here are lost.".to_owned(),
        format!("user={user}"),
        format!("pid-file={}", path(files.pid())),
        "log-facility=-".to_owned(),
        "quiet-dhcp".to_owned(),
        format!("interface={bridge}"),
        "except-interface=lo".to_owned(),
        "bind-interfaces".to_owned(),
        "no-hosts".to_owned(),
        format!("addn-hosts={}", path(files.names())),
        format!("local=/{DOMAIN}/"),
        "domain-needed".to_owned(),
        "cache-size=1000".to_owned(),
        format!("dhcp-range={network},static,{netmask},1h"),
        format!("dhcp-hostsfile={}", path(files.hosts())),
        format!("dhcp-leasefile={}", path(files.acknowledged())),
        "dhcp-lease-max=65536".to_owned(),
        "dhcp-authoritative".to_owned(),
        "dhcp-ignore-names".to_owned(),
        "dhcp-no-override".to_owned(),
        "no-ping".to_owned(),
        format!("dhcp-option=option:router,{gateway}"),
        format!("dhcp-option=option:dns-server,{gateway}"),
        format!("dhcp-option=option:domain-name,{DOMAIN}"),
        format!("dhcp-option=option:domain-search,{DOMAIN}"),
        String::new(),
    ]
    .join("\n")
}

/// A dnsmasq of ours that runs.
#[derive(Debug)]
pub(crate) struct Server {
    process: Process,
}

impl Server {
    /// The running dnsmasq of these files, if there is one. As root.
    pub fn find(files: &Files) -> Option<Self> {
        let log = fs::metadata(files.log()).ok()?;
        let named = read_small(&files.pid()).ok().flatten().and_then(|text| text.trim().parse().ok());
        if let Some(server) = named.and_then(|pid| Self::verified(pid, files, &log)) {
            return Some(server);
        }
        // The pid file may be missing after a crash between start and its writing, or be wrong.
        let pids = fs::read_dir("/proc")
            .ok()?
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| has_our_config(*pid, files)).find_map(|pid| Self::verified(pid, files, &log))
    }

    fn verified(pid: i32, files: &Files, log: &fs::Metadata) -> Option<Self> {
        let process = Process::open(pid).ok()?;
        if is_ending_dnsmasq(pid) {
            // It shows neither files nor arguments any more, and may still hold the sockets: a successor must wait.
            process.ended_within(END_PATIENCE);
            return None;
        }
        let ours = has_our_config(pid, files) && has_open(pid, log);
        // Only after the look at /proc: alive now means that what was looked at was this process.
        (ours && !process.ended_within(Duration::ZERO)).then_some(Self { process })
    }

    /// The process.
    pub fn into_process(self) -> Process {
        self.process
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.process.pid
    }

    /// Makes it read the files of names and leases again.
    pub fn reload(&self) {
        self.process.signal(Signal::SIGHUP);
    }

    /// Ends it and waits for its end. As root.
    pub fn stop(&self, bridge: &str) -> Result<(), NetworkError> {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            self.process.signal(signal);
            if self.process.ended_within(END_PATIENCE) {
                return Ok(());
            }
        }
        Err(NetworkError::Unkillable { pid: self.pid(), bridge: bridge.to_owned() })
    }
}

/// Starts dnsmasq with that configuration and waits until it serves. As root.
///
/// `lock` is what keeps other daemons from changing the network. dnsmasq's first process has it too until it ends:
/// if this daemon is killed meanwhile, the next one comes in when there is a dnsmasq to find.
pub(crate) fn start(
    program: &Path,
    files: &Files,
    config: &str,
    lock: Option<File>,
) -> Result<Server, NetworkError> {
    for folder in [files.names(), files.hosts()] {
        make_folder(&folder).map_err(NetworkError::file("make", folder))?;
    }
    write_public(&files.config(), config).map_err(NetworkError::file("write", files.config()))?;
    let (log, start) = open_log(files)?;
    let mut command = command(program);
    command
        .arg(config_argument(files))
        // As standard input, since dnsmasq closes every other descriptor that it inherits.
        .stdin(lock.map_or_else(Stdio::null, Stdio::from))
        .stdout(Stdio::null())
        .stderr(log.try_clone().map_err(NetworkError::file("open", files.log()))?);
    // SAFETY: between fork and exec only setrlimit and signal are called, both async-signal-safe (signal-safety(7)).
    unsafe {
        command.pre_exec(|| {
            // A write beyond the limit then fails with EFBIG, and dnsmasq goes on with syslog.
            let limit = libc::rlimit { rlim_cur: LOG_LIMIT, rlim_max: LOG_LIMIT };
            if libc::signal(libc::SIGXFSZ, libc::SIG_IGN) == libc::SIG_ERR
                || libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) != 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let status = finish(&mut command, program)?.status;
    let refused = |output: String| NetworkError::Program {
        program: "dnsmasq",
        task: "serve DHCP and DNS".to_owned(),
        output,
    };
    if !status.success() {
        return Err(refused(last_lines(&read_from(log, start), 1)));
    }
    Server::find(files)
        .ok_or_else(|| refused(format!("it ended again: {}", last_lines(&read_from(log, start), 2))))
}

/// Whether dnsmasq was last started with that configuration.
pub(crate) fn is_configured_as(files: &Files, config: &str) -> bool {
    read_small(&files.config()).is_ok_and(|text| text.as_deref() == Some(config))
}

/// One line of dnsmasq's list of acknowledged leases that matters here: who has which address.
pub(crate) fn parse_acknowledged(text: &str) -> Vec<(Ipv4Addr, String)> {
    // "EXPIRY MAC ADDRESS NAME CLIENT-ID", written by dnsmasq, which runs unprivileged: taken as hostile.
    text.lines()
        .take(65536)
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace().skip(1);
            let mac: super::address::Mac = words.next()?.parse().ok()?;
            Some((words.next()?.parse().ok()?, mac.to_string()))
        })
        .collect()
}

fn config_argument(files: &Files) -> String {
    format!("--conf-file={}", files.config().display())
}

fn open_log(files: &Files) -> Result<(File, u64), NetworkError> {
    let path = files.log();
    let work = || {
        let log = OpenOptions::new().read(true).append(true).create(true).mode(0o644).open(&path)?;
        if log.metadata()?.len() > LOG_KEPT {
            log.set_len(0)?;
        }
        let length = log.metadata()?.len();
        Ok((log, length))
    };
    work().map_err(NetworkError::file("open", &path))
}

fn read_from(mut log: File, start: u64) -> String {
    let mut said = Vec::new();
    // What cannot be read is left out of the message.
    let _ = log.seek(SeekFrom::Start(start)).and_then(|_| log.take(16 * 1024).read_to_end(&mut said));
    String::from_utf8_lossy(&said).into_owned()
}

fn has_our_config(pid: i32, files: &Files) -> bool {
    let argument = config_argument(files);
    fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line.split(|byte| *byte == 0).any(|word| word == argument.as_bytes()))
}

/// Whether the process is some dnsmasq on its way out (`PF_EXITING` among the flags of proc_pid_stat(5)).
fn is_ending_dnsmasq(pid: i32) -> bool {
    const EXITING: u32 = 4;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((_, rest)) = stat.split_once("(dnsmasq) ") else { return false };
    // State, five ids, and then the flags.
    let flags: Option<u32> = rest.split(' ').nth(6).and_then(|flags| flags.parse().ok());
    flags.is_some_and(|flags| flags & EXITING != 0)
}

fn has_open(pid: i32, file: &fs::Metadata) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    entries
        .flatten()
        .filter_map(|entry| fs::metadata(entry.path()).ok())
        .any(|open| (open.dev(), open.ino()) == (file.dev(), file.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledged_leases_are_parsed_and_garbage_is_passed_over() {
        let text = "1700000000 02:ca:00:00:00:01 10.208.0.10 web1 *\nduid 00:01\n\n1 2\n\
                    9 02:ca:00:00:00:02 10.208.0.11 * 01:02:ca:00:00:00:02\n9 zz 10.208.0.12 * *\n";
        let expected = [(10, "02:ca:00:00:00:01"), (11, "02:ca:00:00:00:02")]
            .map(|(last, mac)| (Ipv4Addr::new(10, 208, 0, last), mac.to_owned()));
        assert_eq!(parse_acknowledged(text), expected);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_parsed_without_a_panic(text in "(.{0,30}[ \n]){0,20}") {
            parse_acknowledged(&text);
        }
    }
}
