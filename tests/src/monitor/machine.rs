//! A machine of the benchmarks, by our monitor or by QEMU: started, heard on its serial line, looked into, ended.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::guest;
use crate::world::programs;

/// Whose machine it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// `catalyst-vmm`.
    Ours,
    /// QEMU's microvm with KVM.
    Qemu,
}

/// What it has besides a processor, memory and a serial port.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extras<'a> {
    /// What the guest does (`guest.do=`).
    pub work: &'a str,
    /// QEMU only: that there is no PCI, which our machines are always told, as the daemon does.
    pub told_no_pci: bool,
    /// A qcow2 and the raw base below it.
    pub disk: Option<(&'a Path, &'a Path)>,
    /// The name of a tap.
    pub tap: Option<&'a str>,
    /// Ours only: every other device that it can have.
    pub everything: bool,
    /// Ours only: the file of its RAM.
    pub memory: Option<&'a File>,
    /// Ours only: what was saved of it besides RAM, from which it goes on.
    pub restore: Option<&'a Path>,
    /// Ours only: it stands until it is told to go on.
    pub paused: bool,
    /// Ours only: somebody is at its serial line, and typed this before it started.
    pub typed: Option<&'a str>,
}

/// A running machine. Dropping it ends it.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    begun: Instant,
    lines: Receiver<(Instant, String)>,
    control: Option<std::path::PathBuf>,
    /// Who types on the serial line.
    terminal: Option<UnixStream>,
}

/// A line that does not come within this is a failure.
const LIMIT: Duration = Duration::from_mins(3);

impl Machine {
    /// Starts one with one CPU and 256 MiB.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(which: Which, folder: &Path, initrd: &Path, extras: Extras<'_>) -> Self {
        let pci = if which == Which::Ours || extras.told_no_pci { "pci=off " } else { "" };
        let line = format!("console=ttyS0 quiet panic=-1 tsc=reliable {pci}guest.do={}", extras.work);
        match which {
            Which::Ours => ours(folder, initrd, &line, extras),
            Which::Qemu => qemu(initrd, &line, extras),
        }
    }

    /// Waits for a line with `text` in it: the seconds since the start, and the line.
    ///
    /// # Panics
    /// If the machine ends before, or takes too long.
    pub fn wait_for(&mut self, text: &str) -> (f64, String) {
        loop {
            match self.lines.recv_timeout(LIMIT) {
                Ok((at, line)) if line.contains(text) => return ((at - self.begun).as_secs_f64(), line),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => panic!("no line '{text}' within {LIMIT:?}"),
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("the machine ended before '{text}': {:?}", self.child.wait())
                }
            }
        }
    }

    /// Types on its serial line.
    ///
    /// # Panics
    /// If nobody is there ([`Extras::typed`]).
    pub fn type_in(&mut self, text: &str) {
        self.terminal.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Our control socket's answer to a command.
    ///
    /// # Panics
    /// If there is none.
    pub fn ask(&self, command: &str) -> Value {
        let mut stream = UnixStream::connect(self.control.as_ref().unwrap()).unwrap();
        writeln!(stream, "{}", json!({ "id": 1, "command": command })).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        let reply: Value = serde_json::from_str(&line).unwrap();
        reply["ok"].clone()
    }

    /// Resident memory in KiB that is not the guest's RAM: all mappings but the one of `ram` bytes.
    ///
    /// # Panics
    /// If /proc does not tell.
    pub fn overhead_kib(&self, ram: u64) -> u64 {
        self.smaps("Rss:", |length| length != ram)
    }

    /// Pages, in KiB, of the guest's RAM of `ram` bytes that are this process's own and nobody else's.
    ///
    /// # Panics
    /// If /proc does not tell.
    pub fn private_kib(&self, ram: u64) -> u64 {
        self.smaps("Anonymous:", |length| length == ram)
    }

    /// The sum of a field of /proc/PID/smaps over the mappings whose length is `counted`.
    fn smaps(&self, field: &str, counted: impl Fn(u64) -> bool) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/smaps", self.pid())).unwrap();
        let (mut within, mut sum) = (false, 0);
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if let Some((start, end)) = first.split_once('-')
                && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
            {
                within = counted(end - start);
            } else if first == field && within {
                sum += words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap();
            }
        }
        sum
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The serial line: whoever writes to the returned descriptor is heard line by line.
fn heard() -> (OwnedFd, Receiver<(Instant, String)>) {
    let (reader, writer) = std::io::pipe().unwrap();
    let (tell, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if tell.send((Instant::now(), line)).is_err() {
                return;
            }
        }
    });
    (writer.into(), lines)
}

fn ours(folder: &Path, initrd: &Path, line: &str, extras: Extras<'_>) -> Machine {
    let (serial, lines) = heard();
    let mut kept: Vec<OwnedFd> = Vec::new();
    let mut keep = |fd: OwnedFd| -> RawFd {
        kept.push(fd);
        kept[kept.len() - 1].as_raw_fd()
    };
    let open = |path: &Path, write: bool| -> OwnedFd {
        OpenOptions::new().read(true).write(write).open(path).unwrap().into()
    };
    let listen = |name: &str| -> OwnedFd {
        let path = folder.join(name);
        let _ = fs::remove_file(&path);
        UnixListener::bind(path).unwrap().into()
    };
    let mut description = json!({
        "version": 1, "name": "bench", "cpus": 1, "memory_mib": 256, "huge_pages": true,
        "kvm": keep(open(Path::new("/dev/kvm"), true)),
        "control": keep(listen("control")),
        "boot": {
            "kernel": keep(open(&guest::kernel(), false)),
            "initrd": keep(open(initrd, false)),
            "command_line": line,
        },
        "uart": { "log": keep(serial), "listener": keep(listen("uart")) },
        "paused": extras.paused,
    });
    if let Some(memory) = extras.memory {
        description["memory"] = json!(keep(memory.try_clone().unwrap().into()));
    }
    if let Some(saved) = extras.restore {
        description["restore"] = json!(keep(open(saved, false)));
        description["boot"] = Value::Null;
    }
    if let Some((overlay, base)) = extras.disk {
        description["disks"] = json!([{ "layers": [
            { "fd": keep(open(overlay, true)), "format": "qcow2" },
            { "fd": keep(open(base, false)), "format": "raw" },
        ] }]);
    }
    if let Some(tap) = extras.tap {
        description["nics"] = json!([{ "tap": keep(open_tap(tap)), "mac": [2, 0, 0, 0, 0, 1] }]);
    }
    if extras.everything {
        let port = json!([{ "name": "org.catalyst.agent.0", "listener": keep(listen("agent")) }]);
        description["serial"] = json!({ "ports": port });
        description["vsock"] = json!({ "cid": 3, "listener": keep(listen("vsock")) });
        description["share"] = json!({ "tag": "share" });
        description["rng"] = json!(true);
        description["balloon"] = json!(true);
    }
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(description.to_string().as_bytes()).unwrap();
    file.rewind().unwrap();
    let fd = keep(file.into());
    let terminal = extras.typed.map(|typed| {
        let mut terminal = UnixStream::connect(folder.join("uart")).unwrap();
        terminal.write_all(typed.as_bytes()).unwrap();
        terminal
    });
    let mut command = Command::new(programs().join("catalyst-vmm"));
    command.args(["run", "--description-fd", &fd.to_string()]).stdin(Stdio::null());
    let mut machine = spawn(command, kept, lines, Some(folder.join("control")));
    machine.terminal = terminal;
    machine
}

/// As who wants a quick QEMU would write it: microvm, PVH, nothing that is not asked for.
fn qemu(initrd: &Path, line: &str, extras: Extras<'_>) -> Machine {
    let (serial, lines) = heard();
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm", "-cpu", "host"]);
    command.args(["-M", "microvm,x-option-roms=off,pit=off,pic=off,rtc=on,isa-serial=on"]);
    command.args(["-global", "virtio-mmio.force-legacy=false", "-smp", "1", "-m", "256M"]);
    command.arg("-kernel").arg(guest::kernel()).arg("-initrd").arg(initrd);
    command.args(["-append", line, "-serial", "stdio"]);
    if let Some((overlay, _)) = extras.disk {
        command.arg("-drive").arg(format!("if=none,id=d,format=qcow2,file={}", overlay.display()));
        command.args(["-device", "virtio-blk-device,drive=d"]);
    }
    if let Some(tap) = extras.tap {
        command.args(["-netdev", &format!("tap,id=n,ifname={tap},script=no,downscript=no,vhost=off")]);
        command.args(["-device", "virtio-net-device,netdev=n"]);
    }
    command.stdin(Stdio::null()).stdout(File::from(serial));
    spawn(command, Vec::new(), lines, None)
}

fn spawn(
    mut command: Command,
    kept: Vec<OwnedFd>,
    lines: Receiver<(Instant, String)>,
    control: Option<std::path::PathBuf>,
) -> Machine {
    let fds: Vec<RawFd> = kept.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: between fork and exec only fcntl is called, on descriptors that are open.
    unsafe {
        command.pre_exec(move || {
            for &fd in &fds {
                libc::fcntl(fd, libc::F_SETFD, 0);
            }
            Ok(())
        });
    }
    let begun = Instant::now();
    let child = command.spawn().unwrap();
    // Ours are the child's now; the serial line ends when it does.
    drop((kept, command));
    Machine { child, begun, lines, control, terminal: None }
}

/// Attaches to a tap (tun(4)) with the header of virtio-net.
fn open_tap(name: &str) -> OwnedFd {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    // IFF_TAP, IFF_NO_PI, IFF_VNET_HDR.
    request[16..18].copy_from_slice(&(2_u16 | 0x1000 | 0x4000).to_ne_bytes());
    // SAFETY: the request is as long as struct ifreq.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) }, 0, "tap {name}");
    file.into()
}
