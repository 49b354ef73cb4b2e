//! Sockets between host and guest, with clients on the host and somebody upstream.

#![no_main]
#![allow(clippy::unwrap_used)]

use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;

use catalyst_vmm::devices::vsock::Vsock;
use catalyst_vmm_fuzz::{Act, All, Data, Door, Guest, Message, Number, Op, act_on, seqpacket, threads};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const CID: u64 = 42;

/// A packet: the header, and data.
#[derive(Arbitrary, Debug)]
enum Packet {
    Good { op: u8, guest: u8, host: Number, flags: u8, buf_alloc: u32, fwd_cnt: u32, data: Data },
    Odd { cids: (u64, u64), ports: (u32, u32), len: u32, kind: u16, op: u16, flags: u32, data: Data },
}

impl Message for Packet {
    fn queue(&self) -> u8 {
        1
    }
    fn bytes(&self, known: &[u64]) -> Vec<u8> {
        let (cids, ports, len, kind, op, flags, credit, data) = match self {
            Self::Good { op, guest, host, flags, buf_alloc, fwd_cnt, data } => {
                // In what came from the device its own port is the lower half, and the guest's the upper.
                let host = host.of(known);
                let (ours, theirs) = if host >> 32 == 0 {
                    (u64::from(*guest), host)
                } else {
                    (host >> 32, host & 0xffff_ffff)
                };
                let ports = (ours as u32, theirs as u32);
                let credit = (*buf_alloc, *fwd_cnt);
                (
                    (CID, 2),
                    ports,
                    data.0.len() as u32,
                    1,
                    u16::from(op % 9),
                    u32::from(flags % 4),
                    credit,
                    data,
                )
            }
            Self::Odd { cids, ports, len, kind, op, flags, data } => {
                (*cids, *ports, *len, *kind, *op, *flags, (0, 0), data)
            }
        };
        [
            &cids.0.to_le_bytes()[..],
            &cids.1.to_le_bytes(),
            &ports.0.to_le_bytes(),
            &ports.1.to_le_bytes(),
            &len.to_le_bytes(),
            &kind.to_le_bytes(),
            &op.to_le_bytes(),
            &flags.to_le_bytes(),
            &credit.0.to_le_bytes(),
            &credit.1.to_le_bytes(),
            &data.0,
        ]
        .concat()
    }
}

/// A connection that the guest made.
fn accept(upstream: &UnixDatagram) -> Option<UnixStream> {
    let mut port = [0_u8; 4];
    let mut fds = [-1];
    let mut buffers = [libc::iovec { iov_base: port.as_mut_ptr().cast(), iov_len: port.len() }];
    // SAFETY: the buffer is `port`, which lives longer than the call.
    let (_, count) = unsafe { upstream.recv_with_fds(&mut buffers, &mut fds) }.ok()?;
    assert_eq!(count, 1);
    // SAFETY: the kernel has just made the descriptor for us.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fds[0]) });
    stream.set_nonblocking(true).unwrap();
    Some(stream)
}

fuzz_target!(|ops: All<Op<Packet>>| {
    let (listener, mut door) = Door::new();
    let (upstream, other) = seqpacket();
    let mut accepted: Vec<UnixStream> = Vec::new();
    let device = Vsock::new(CID as u32, Some(listener), Some(other), Arc::clone(&threads().reactor));
    Guest::new(device).run(&ops.0, |device, which, act| {
        let upper = usize::from(which / 2);
        match act {
            Act::Other(0) => device.transport_reset(),
            Act::Other(port) => {
                door.act(which, &Act::Connect);
                let last = u8::try_from(door.clients.len() - 1).unwrap();
                door.act(last, &Act::Send(Data(format!("CONNECT {port}\n").into_bytes())));
            }
            act if which % 2 == 0 => door.act(which / 2, act),
            Act::Connect => accepted.extend(accept(&upstream)),
            act if !accepted.is_empty() => {
                let at = upper % accepted.len();
                if !act_on(&accepted[at], act) {
                    accepted.remove(at);
                }
                threads().settle();
            }
            _ => {}
        }
    });
});
