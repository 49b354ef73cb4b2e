//! The NIC, on a tap in a network namespace of its own.

#![no_main]
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, LazyLock};

use catalyst_vmm::devices::net::Net;
use catalyst_vmm_fuzz::{Act, All, Guest, Op, Plain, threads};
use libfuzzer_sys::fuzz_target;

/// The tap, and a packet socket at its other end.
struct World {
    tap: File,
    peer: File,
}

fn check(what: &str, result: libc::c_int) -> io::Result<libc::c_int> {
    if result >= 0 {
        return Ok(result);
    }
    let error = io::Error::last_os_error();
    Err(io::Error::new(error.kind(), format!("{what}: {error}")))
}

fn world() -> io::Result<World> {
    // SAFETY: no memory is involved, and there is one thread.
    check("no network namespace", unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    let tap = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: zero bytes are an ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: the kernel reads and writes an ifreq.
    check("no tap", unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    // What the host's IPv6 says by itself would come between.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "1");
    let all = u16::to_be(libc::ETH_P_ALL as u16);
    // SAFETY: no memory is involved.
    let peer = check("no packet socket", unsafe {
        libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, all.into())
    })?;
    // SAFETY: the descriptor is new and nobody else's.
    let peer = unsafe { OwnedFd::from_raw_fd(peer) };
    request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
    // SAFETY: the kernel reads an ifreq.
    check("tap0 not up", unsafe { libc::ioctl(peer.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) })?;
    // SAFETY: zero bytes are an address, and the name is a string.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = all;
    // SAFETY: the name is a string.
    address.sll_ifindex = unsafe { libc::if_nametoindex(c"tap0".as_ptr()) }.cast_signed();
    // SAFETY: the kernel reads an address of this length.
    check("not bound", unsafe {
        libc::bind(peer.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32)
    })?;
    Ok(World { tap, peer: peer.into() })
}

fuzz_target!(|ops: All<Op<Plain>>| {
    static WORLD: LazyLock<World> = LazyLock::new(|| {
        world().unwrap_or_else(|error| {
            // Not by `exit`, which libFuzzer takes for a crash.
            println!("SKIPPED: {error}");
            let _ = io::stdout().flush();
            // SAFETY: the process ends, whatever is left.
            unsafe { libc::_exit(0) }
        })
    });
    let World { tap, peer } = &*WORLD;
    let mac = [2, 0, 0, 0, 0, 1];
    let device = Net::new(tap.try_clone().unwrap(), mac, Arc::clone(&threads().reactor)).unwrap();
    Guest::new(device).run(&ops.0, |device, which, act| {
        match act {
            // A frame that is too short or too long is refused.
            Act::Send(bytes) => {
                let frame = [&mac[..], &[2, 0, 0, 0, 0, 2, 0x88, 0xb5], &bytes.0]
                    .concat()
                    .repeat(1 + usize::from(which % 8));
                let _ = (&*peer).write(&frame);
            }
            Act::Connect => device.set_link(true),
            Act::Close => device.set_link(false),
            _ => {}
        }
        threads().settle();
    });
});
