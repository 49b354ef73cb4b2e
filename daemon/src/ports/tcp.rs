//! Connections: what comes at a published port goes to the guest, and back, until both have said their last.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{Shutdown, sockopt};
use tokio::net::{TcpListener, TcpStream};

use super::guest::Target;

/// What one direction of a connection holds at most, and only while its receiver is slower than its sender.
const BUFFER: usize = 64 << 10;
/// A client on another machine that vanishes says nothing; after so long it is asked.
const KEEPALIVE: Duration = Duration::from_mins(2);
/// How long to leave a listener alone that cannot accept, for want of memory say: nothing tells when it can again.
const PAUSE: Duration = Duration::from_millis(200);

/// Serves one listener until the task is aborted.
pub(super) async fn serve(listener: TcpListener, target: Arc<Target>) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => accept(client, &target),
            // That client is gone already (accept(2)).
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept at a published port");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn accept(client: TcpStream, target: &Arc<Target>) {
    // A reader takes a plain end for an answer that is empty, or whole: what does not end well is reset, also where the
    // daemon is killed.
    if client.set_zero_linger().is_err() {
        return;
    }
    let Some(room) = target.room(2) else {
        tracing::debug!("a published port has no room for another connection");
        return;
    };
    let Some(life) = target.life() else { return };
    let target = Arc::clone(target);
    tokio::spawn(async move {
        let relayed = tokio::select! {
            relayed = relay(client, &target) => relayed,
            () = target.over(life) => Ok(()),
        };
        if let Err(error) = relayed {
            tracing::debug!(%error, "a connection of a published port ended");
        }
        drop(room);
    });
}

async fn relay(client: TcpStream, target: &Target) -> io::Result<()> {
    client.set_nodelay(true)?;
    sockopt::set_socket_keepalive(&client, true)?;
    sockopt::set_tcp_keepidle(&client, KEEPALIVE)?;
    let guest = target.connect().await?;
    guest.set_nodelay(true)?;
    tokio::try_join!(pass(&client, &guest), pass(&guest, &client))?;
    for end in [&client, &guest] {
        sockopt::set_socket_linger(end, None)?;
    }
    Ok(())
}

/// Passes on what comes, and then that nothing more does. The buffer is only there while there is something to pass.
async fn pass(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    loop {
        from.readable().await?;
        let mut buffer = vec![0; BUFFER];
        loop {
            match from.try_read(&mut buffer) {
                Ok(0) => return Ok(rustix::net::shutdown(to, Shutdown::Write)?),
                Ok(length) => write_all(to, &buffer[..length]).await?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
            // Two that are never slow would keep others from this thread.
            tokio::task::coop::consume_budget().await;
        }
    }
}

async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.try_write(bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
