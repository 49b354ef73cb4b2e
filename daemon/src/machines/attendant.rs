//! Who speaks with the agent of a running VM: gives it its identity, hears how the guest is.

use std::sync::Arc;
use std::time::Duration;

use catalyst_api::GuestStatus;

use super::Context;
use super::shared::Shared;
use crate::agent::{AgentLink, AgentStatus};
use crate::engine::sockets;

/// A link that fails at once, again and again, costs no more than this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Attends to the agent until the task is aborted, which is when the process ends.
pub(super) async fn attend(context: Arc<Context>, shared: Arc<Shared>) {
    let mut pause = Duration::from_millis(250);
    loop {
        let id = shared.dir().id();
        let link = match sockets::connect(&shared.dir().run(), sockets::AGENT).await {
            Ok(stream) => AgentLink::connect(stream).await,
            Err(error) => Err(error.into()),
        };
        match link {
            Ok(link) => {
                shared.facts().agent = Some(link.clone());
                follow(&context, &shared, &link).await;
                tracing::warn!(vm = %id, "the agent's link ended; connecting again");
            }
            Err(error) => tracing::warn!(vm = %id, %error, "cannot connect to the agent's port"),
        }
        shared.facts().agent = None;
        shared.set_guest(GuestStatus::default());
        // A VM process gives no sign that it takes the next connection.
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn follow(context: &Context, shared: &Shared, link: &AgentLink) {
    let mut status = link.status();
    let mut told = None;
    loop {
        let now = status.borrow_and_update().clone();
        if !now.connected {
            return;
        }
        if let Some(hello) = &now.hello
            && !now.identity
            && told.as_ref() != Some(&hello.epoch)
        {
            told = Some(hello.epoch);
            identify(context, shared, link).await;
        }
        shared.set_guest(guest_status(&now));
        if status.changed().await.is_err() {
            return;
        }
    }
}

async fn identify(context: &Context, shared: &Shared, link: &AgentLink) {
    let id = shared.dir().id();
    let identity = match super::start::guest_identity(context, shared) {
        Ok(identity) => identity,
        Err(error) => {
            let reason = crate::http::error::chain(&error).join(": ");
            tracing::error!(vm = %id, %reason, "no identity for the guest");
            shared.facts().reason = Some(reason);
            return;
        }
    };
    if let Err(error) = link.identify(&identity).await {
        let reason = crate::http::error::chain(&error).join(": ");
        tracing::error!(vm = %id, %reason, "the guest did not take its identity");
        shared.facts().reason = Some(format!("the guest did not take its identity: {reason}"));
    }
}

fn guest_status(status: &AgentStatus) -> GuestStatus {
    GuestStatus {
        agent: status.hello.is_some(),
        identity: status.identity,
        ssh: status.ssh,
        docker: status.docker,
        agent_version: status.hello.as_ref().map(|hello| hello.agent_version.clone()),
    }
}
