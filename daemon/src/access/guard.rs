//! The middleware before every handler.

use std::error::Error;

use axum::Router;
use axum::extract::{ConnectInfo, Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;

use super::origin;
use super::peer::{Peer, Policy};
use super::refusal;

/// Puts the guard before all routes and the fallback that `router` has by now.
///
/// The result is to be served with `into_make_service_with_connect_info::<Peer>()`; without that, every request is
/// refused.
pub fn protect<S>(router: Router<S>, policy: Policy) -> Router<S>
where
    S: Clone + Send + Sync + 'static,
{
    router.layer(middleware::from_fn_with_state(policy, guard))
}

/// Refuses a request whose connection is not, or no longer, one of the policy's users, or that a browser made for a
/// foreign page.
pub async fn guard(State(policy): State<Policy>, request: Request, next: Next) -> Response {
    match judge(policy, &request) {
        Ok(()) => next.run(request).await,
        Err(reason) => {
            tracing::debug!(%reason, "request refused");
            refusal::response(&*reason)
        }
    }
}

/// The router is served without the addresses of its connections.
#[derive(Debug, thiserror::Error)]
#[error("the daemon does not know whose this connection is")]
struct NoPeer;

fn judge(policy: Policy, request: &Request) -> Result<(), Box<dyn Error + Send + Sync>> {
    let ConnectInfo(peer) = request.extensions().get::<ConnectInfo<Peer>>().ok_or(NoPeer)?;
    policy.verify(peer)?;
    match peer {
        // A browser cannot speak to a Unix socket, and its clients have no host to name.
        Peer::Unix { .. } => Ok(()),
        Peer::Tcp { local, .. } => Ok(origin::check(request.headers(), request.uri(), local.port())?),
    }
}
