//! Who speaks with the agent of a running VM: gives it its identity, hears how the guest is.

use std::sync::Arc;
use std::time::Duration;

use catalyst_api::{GuestStatus, VmState};

use super::shared::Shared;
use super::{Context, folders, set_up};
use crate::engine::{VmProcess, sockets};
use catalyst_agent_link::{AgentLink, AgentStatus};

/// A link that fails at once, again and again, costs no more than this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The host's clock is the guest's: how often it is told. Few drift by more than a hundredth of a second meanwhile.
const CLOCK_INTERVAL: Duration = Duration::from_mins(1);

/// A guest may have no sshd, or one that does not start.
const LONGEST_WAIT_FOR_SSH: Duration = Duration::from_secs(5);

/// Attends to the agent until the task is aborted, which is when the process ends. `first` says that nobody has left anything
/// half written on its port.
pub(super) async fn attend(
    context: Arc<Context>,
    shared: Arc<Shared>,
    process: Arc<dyn VmProcess>,
    mut first: bool,
) {
    let mut pause = Duration::from_millis(250);
    loop {
        let id = shared.dir().id();
        let link = match sockets::connect(&shared.dir().run(), sockets::AGENT).await {
            Ok(stream) if std::mem::take(&mut first) => AgentLink::connect_first(stream).await,
            Ok(stream) => AgentLink::connect(stream).await,
            Err(error) => Err(error.into()),
        };
        match link {
            Ok(link) => {
                shared.facts().agent = Some(link.clone());
                follow(&context, &shared, process.as_ref(), &link).await;
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

async fn follow(context: &Context, shared: &Arc<Shared>, process: &dyn VmProcess, link: &AgentLink) {
    let mut status = link.status();
    let mut told = None;
    // A copy believes what its original was told.
    let mut unnamed = shared.dir().unnamed().exists();
    loop {
        let mut now = status.borrow_and_update().clone();
        if !now.connected {
            return;
        }
        if unnamed {
            (now.identity, now.ssh, now.docker) = (false, false, false);
        }
        if shared.container().is_some() {
            // Its engine tells it who it is and what time it is, by another port.
            now.identity = now.hello.is_some();
        } else if let Some(hello) = &now.hello
            && !now.identity
            && told.as_ref() != Some(&hello.epoch)
        {
            told = Some(hello.epoch);
            // Before anybody reaches the guest, and before its services start.
            set_up::begin(shared, link).await;
            if identify(context, shared, process, link, unnamed).await {
                if std::mem::take(&mut unnamed) {
                    // The time that it was told with its identity may have been long on the way.
                    set_clock(shared, link.clone());
                }
                now = status.borrow().clone();
                folders::mount_all(shared, link);
            }
        } else if let Some(hello) = &now.hello
            && told.as_ref() != Some(&hello.epoch)
        {
            // It knows who it is, but may have stood still since, with its clock.
            told = Some(hello.epoch);
            set_clock(shared, link.clone());
            set_up::begin(shared, link).await;
            folders::mount_all(shared, link);
        }
        if let Some(report) = &now.set_up {
            shared.set_set_up(report);
        }
        shared.set_guest(guest_status(&now));
        tokio::select! {
            changed = status.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(CLOCK_INTERVAL), if now.identity => keep_clock(shared, link.clone()),
        }
    }
}

/// Sets the guest's clock; nobody waits for it.
pub(super) fn set_clock(shared: &Shared, link: AgentLink) {
    let id = shared.dir().id().clone();
    tokio::spawn(async move {
        if let Err(error) = link.set_clock().await {
            tracing::warn!(vm = %id, %error, "the guest's clock was not set");
        }
    });
}

/// Keeps a clock right that was right; nobody waits for it. A guest that is paused hears it when it goes on.
fn keep_clock(shared: &Shared, link: AgentLink) {
    if shared.state() != VmState::PoweredOn {
        return;
    }
    let id = shared.dir().id().clone();
    tokio::spawn(async move {
        if let Err(error) = link.keep_clock().await {
            tracing::debug!(vm = %id, %error, "the guest's clock was not kept");
        }
    });
}

/// Tells the guest who it is, and a `copy` that it is another than its original; only then that one's cable is plugged in.
async fn identify(
    context: &Context,
    shared: &Shared,
    process: &dyn VmProcess,
    link: &AgentLink,
    copy: bool,
) -> bool {
    let id = shared.dir().id();
    let failed = |what: &str, error: &dyn std::error::Error| {
        let reason = crate::http::error::chain(error).join(": ");
        tracing::error!(vm = %id, %reason, "{what}");
        shared.facts().reason = Some(format!("{what}: {reason}"));
        false
    };
    let identity = match super::start::guest_identity(context, shared, copy) {
        Ok(identity) => identity,
        Err(error) => return failed("there is no identity for the guest", &error),
    };
    if let Err(error) = link.identify(&identity).await {
        return failed("the guest did not take its identity", &error);
    }
    if copy {
        // It can be spoken with by its agent. Its sshd is given its keys; who comes before it listens would be turned away.
        let mut status = link.status();
        shared.set_guest(guest_status(&status.borrow_and_update()));
        let listens = status.wait_for(|status| status.ssh || !status.connected);
        let _ = tokio::time::timeout(LONGEST_WAIT_FOR_SSH, listens).await;
        if let Err(error) = context.network.plug_in(&shared.lease(), process.pid()).await {
            return failed("the guest has no network", &error);
        }
        if let Err(error) = std::fs::remove_file(shared.dir().unnamed()) {
            return failed("the guest will be told again who it is", &error);
        }
    }
    true
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
