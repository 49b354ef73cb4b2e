//! Asking a guest for its address over the wire (RFC 826).

use std::io;
use std::mem::size_of;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::address::Mac;

/// How long an answer may take, and how often is asked in that time.
const PATIENCE: Duration = Duration::from_millis(300);
const TRIES: usize = 3;

/// Length of an ARP packet for IPv4 over Ethernet, in octets.
const LENGTH: usize = 28;

/// Who asks: the bridge.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asker {
    pub index: u32,
    pub mac: Mac,
    pub address: Ipv4Addr,
}

/// Whether the machine with `mac` says that it has `address`. Asks up to three times, 300 ms apart.
pub(crate) async fn answers(asker: Asker, address: Ipv4Addr, mac: Mac) -> io::Result<bool> {
    let socket = open(asker.index)?;
    // SAFETY: an OwnedFd is open, and the same descriptor, until the AsyncFd drops it.
    let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
    for _ in 0..TRIES {
        send(socket.get_ref(), asker, &request(asker, address))?;
        if tokio::time::timeout(PATIENCE, wait_for(&socket, address, mac)).await.is_ok_and(|got| got.is_ok())
        {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn wait_for(socket: &AsyncFd<OwnedFd>, address: Ipv4Addr, mac: Mac) -> io::Result<()> {
    loop {
        let mut ready = socket.readable().await?;
        let mut packet = [0_u8; 64];
        let received = ready.try_io(|socket| {
            // SAFETY: the buffer is ours and of the length given.
            let length =
                unsafe { libc::recv(socket.as_raw_fd(), packet.as_mut_ptr().cast(), packet.len(), 0) };
            usize::try_from(length).map_err(|_| io::Error::last_os_error())
        });
        match received {
            Ok(Ok(length)) if is_answer(&packet[..length.min(64)], address, mac) => return Ok(()),
            Ok(Err(error)) => return Err(error),
            // Not the one, or nothing there after all.
            Ok(Ok(_)) | Err(_) => {}
        }
    }
}

fn request(asker: Asker, address: Ipv4Addr) -> [u8; LENGTH] {
    let mut packet = [0; LENGTH];
    // Ethernet, IPv4, their lengths, "request".
    packet[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    packet[8..14].copy_from_slice(&asker.mac.0);
    packet[14..18].copy_from_slice(&asker.address.octets());
    packet[24..28].copy_from_slice(&address.octets());
    packet
}

/// Whether the packet says that `mac` has `address`; a request of the guest's own says so as well.
fn is_answer(packet: &[u8], address: Ipv4Addr, mac: Mac) -> bool {
    packet.len() >= LENGTH
        && packet[..7] == [0, 1, 8, 0, 6, 4, 0]
        && matches!(packet[7], 1 | 2)
        && packet[8..14] == mac.0
        && packet[14..18] == address.octets()
}

fn link_address(index: u32) -> io::Result<libc::sockaddr_ll> {
    // SAFETY: sockaddr_ll is plain data, for which zero bytes are a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::sa_family_t::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
    address.sll_protocol = ARP.to_be();
    address.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
    address.sll_halen = 6;
    address.sll_addr[..6].copy_from_slice(&[0xff; 6]);
    Ok(address)
}

const ARP: u16 = 0x0806;

/// A packet socket (`packet(7)`) that hears the ARP packets of the link with that index.
fn open(index: u32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: plain system call; a descriptor that it returns is new and nobody else's. Protocol 0 hears nothing
    // before the bind below.
    let socket = unsafe {
        match libc::socket(libc::AF_PACKET, kind, 0) {
            fd if fd >= 0 => OwnedFd::from_raw_fd(fd),
            _ => return Err(io::Error::last_os_error()),
        }
    };
    let address = link_address(index)?;
    // SAFETY: the address is a sockaddr_ll of the length given.
    let status = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length_of(&address)) };
    if status == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
}

fn send(socket: &OwnedFd, asker: Asker, packet: &[u8]) -> io::Result<()> {
    let to = link_address(asker.index)?;
    // SAFETY: packet and address are ours and of the lengths given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const to).cast(),
            length_of(&to),
        )
    };
    if sent >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn length_of(_: &libc::sockaddr_ll) -> libc::socklen_t {
    const LENGTH: usize = size_of::<libc::sockaddr_ll>();
    // Twenty; the cast is of a constant that fits.
    #[allow(clippy::cast_possible_truncation)]
    const RESULT: libc::socklen_t = LENGTH as libc::socklen_t;
    RESULT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_machine_at_the_right_address_is_an_answer() {
        let guest = Mac([2, 0xca, 0, 0, 0, 1]);
        let address = Ipv4Addr::new(10, 208, 0, 10);
        let mut answer = request(Asker { index: 1, mac: guest, address }, Ipv4Addr::new(10, 208, 0, 1));
        answer[7] = 2;
        assert!(is_answer(&answer, address, guest));
        assert!(!is_answer(&answer, Ipv4Addr::new(10, 208, 0, 11), guest));
        assert!(!is_answer(&answer, address, Mac([2, 0xca, 0, 0, 0, 2])));
        assert!(!is_answer(&answer[..27], address, guest), "cut short");
        answer[7] = 3;
        assert!(!is_answer(&answer, address, guest), "neither request nor answer");
        assert!(!is_answer(&[], address, guest));
    }
}
