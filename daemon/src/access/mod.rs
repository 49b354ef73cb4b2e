//! Who may speak to the daemon: its owner and root, from this machine, and no web page.
//!
//! The daemon asks for no password, since its oldest clients send none. Instead it listens on loopback addresses and
//! on a Unix socket only ([`listen`]), asks the kernel whose the other end of each connection is ([`peer`]), and
//! refuses requests that a browser made for a foreign page ([`origin`]). A connection is looked up when it is accepted
//! ([`listener`]) and again before each request is acted on ([`guard`]).
//!
//! ```no_run
//! # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
//! use catalyst_daemon::access::{guard::protect, listen::ListenOptions, owner::Owner, peer::Peer};
//!
//! let owner = Owner::resolve(None)?;
//! let address = "localhost:8080".parse()?;
//! let listener = ListenOptions { tcp: &address, unix: None, owner: &owner }.bind()?;
//! let app = protect(axum::Router::new(), listener.policy());
//! axum::serve(listener, app.into_make_service_with_connect_info::<Peer>()).await?;
//! # Ok(()) }
//! ```

pub mod guard;
pub mod listen;
pub mod listener;
pub mod origin;
pub mod owner;
pub mod peer;
pub(crate) mod port_holder;
mod refusal;
mod sock_diag;
pub(crate) mod unix_socket;
