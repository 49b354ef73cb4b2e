//! The tap, as the device uses it (Documentation/networking/tuntap.rst). None of it needs a capability: the
//! kernel asks for one only to attach an interface.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use super::{HEADER, NetError};

/// A tap whose frames stand behind [`HEADER`] bytes each. It does not block.
#[derive(Debug)]
pub(super) struct Tap(File);

impl Tap {
    /// Takes a tap and sets it up; offloads are off.
    pub(super) fn new(file: File) -> Result<Self, NetError> {
        let fd = file.as_raw_fd();
        // SAFETY: zero bytes are an ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open; the kernel writes an ifreq, and there is one.
        check(unsafe { libc::ioctl(fd, libc::TUNGETIFF, &raw mut request) })
            .map_err(|source| NetError::NoTap { fd, source })?;
        // SAFETY: TUNGETIFF has filled this part of the union in, and any bits are a short.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & wanted != wanted || flags & libc::IFF_TUN != 0 {
            return Err(NetError::Flags { fd, flags });
        }
        let io = |what| move |source| NetError::Io { what, fd, source };
        #[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "12")]
        let header = HEADER as libc::c_int;
        // SAFETY: the descriptor is a tap; the kernel reads an int, and there is one.
        check(unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const header) })
            .map_err(io("set the length of headers of"))?;
        // SAFETY: the descriptor is open; flags are read and written as ints.
        let status = check(unsafe { libc::fcntl(fd, libc::F_GETFL) }).map_err(io("read the flags of"))?;
        // SAFETY: as before.
        check(unsafe { libc::fcntl(fd, libc::F_SETFL, status | libc::O_NONBLOCK) })
            .map_err(io("set non-blocking"))?;
        let tap = Self(file);
        tap.set_offloads(0).map_err(io("switch offloads off at"))?;
        Ok(tap)
    }

    /// Something else that takes and gives whole frames, which can be full at will.
    #[cfg(test)]
    pub(super) fn stand_in(file: File) -> Self {
        Self(file)
    }

    /// Lets the kernel pass frames as the driver with these features takes them: without checksum, and longer than
    /// the MTU (section 5.1.3.1, which lets a driver take the latter only with the former).
    pub(super) fn set_offloads(&self, features: u64) -> io::Result<()> {
        let taken = |bit: u32| features & 1 << bit != 0;
        let mut offloads = 0;
        if taken(VIRTIO_NET_F_GUEST_CSUM) {
            offloads |= libc::TUN_F_CSUM;
            for (feature, offload) in
                [(VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4), (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6)]
            {
                offloads |= if taken(feature) { offload } else { 0 };
            }
            let segments = offloads != libc::TUN_F_CSUM;
            offloads |= if segments && taken(VIRTIO_NET_F_GUEST_ECN) { libc::TUN_F_TSO_ECN } else { 0 };
        }
        // SAFETY: the descriptor is a tap; the kernel takes the number itself.
        check(unsafe {
            libc::ioctl(self.0.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads))
        })?;
        Ok(())
    }

    /// Throws away what waits in the tap: at most `most` frames.
    pub(super) fn discard(&self, most: usize) {
        // A frame that is longer than the buffer is cut.
        let mut buffer = [0; 64];
        for _ in 0..most {
            if io::Read::read(&mut &self.0, &mut buffer).is_err() {
                return;
            }
        }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
