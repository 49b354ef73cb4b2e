//! Tap interfaces, the cables of virtual machines (Documentation/networking/tuntap.rst).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::error::NetworkError;
use super::lease::Lease;
use crate::privilege::as_root;

const TUN: &str = "/dev/net/tun";

/// What the kernel makes names from: it puts the lowest free number for `%d`.
const PATTERN: &[u8] = b"cattap%d";

nix::ioctl_write_ptr_bad!(
    /// `TUNSETIFF`: gives the open descriptor an interface. Declared with the size of an int, takes an ifreq.
    tun_set_iff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

/// One end of a virtual machine's cable; the other is a port of the bridge.
#[derive(Debug)]
pub struct Tap {
    /// Ethernet frames, each behind a `virtio_net_hdr` (`IFF_VNET_HDR`, 10 bytes until `TUNSETVNETHDRSZ`). Not
    /// blocking, close on exec. The interface vanishes with the last copy of it.
    pub fd: OwnedFd,
    /// The interface's name.
    pub name: String,
}

/// Makes a tap, not yet up and on no bridge.
pub(crate) fn create(lease: &Lease) -> Result<Tap, NetworkError> {
    let file = open().map_err(NetworkError::NoTun)?;
    match with_interface(file) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(NetworkError::NotRoot { task: format!("make a tap interface for {}", lease.address) })
        }
        made => made.map_err(|source| NetworkError::Tap { address: lease.address, source }),
    }
}

/// The same in the network namespace of the calling thread, whatever network that has.
pub(crate) fn in_this_namespace() -> io::Result<Tap> {
    with_interface(open()?)
}

fn open() -> io::Result<File> {
    as_root(|| {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(TUN)
    })
}

fn with_interface(file: File) -> io::Result<Tap> {
    // SAFETY: ifreq is plain data, for which zero bytes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(PATTERN) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = u16::try_from(flags).unwrap_or_default().cast_signed();
    // SAFETY: the descriptor is open and the request is an ifreq, which the kernel reads and writes.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw const request) }?;
    let name: Vec<u8> = request.ifr_name.iter().take_while(|c| **c != 0).map(|c| c.cast_unsigned()).collect();
    Ok(Tap { fd: file.into(), name: String::from_utf8_lossy(&name).into_owned() })
}

/// The name of the tap that the process holds (proc(5), `/proc/PID/fdinfo`).
pub(crate) fn held_by(pid: u32) -> io::Result<String> {
    let process = Path::new("/proc").join(pid.to_string());
    for entry in std::fs::read_dir(process.join("fd"))? {
        let entry = entry?;
        if std::fs::read_link(entry.path()).is_ok_and(|target| target == Path::new(TUN)) {
            let info = std::fs::read_to_string(process.join("fdinfo").join(entry.file_name()))?;
            if let Some(name) = info.lines().find_map(|line| line.strip_prefix("iff:")) {
                return Ok(name.trim().to_owned());
            }
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("process {pid} holds none")))
}

/// Switches IPv6 off on an interface; a kernel without IPv6 is fine.
///
/// On the bridge, because a guest could otherwise send router advertisements and become the host's IPv6 router; on
/// taps, because the host's own chatter (neighbour and group discovery) would wake each guest.
pub(crate) fn disable_ipv6(interface: &str) -> Result<(), NetworkError> {
    let path = Path::new("/proc/sys/net/ipv6/conf").join(interface).join("disable_ipv6");
    match as_root(|| std::fs::write(&path, "1")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(NetworkError::File { verb: "write", path, source: error })
        }
        _ => Ok(()),
    }
}
