//! Setting new guests up: what is kept for it when a VM is made, and telling the guest's agent.

use catalyst_agent_protocol::{SetUpReport, SetUpState};
use catalyst_api::{CreateVm, SetUpInfo, SetUpStage};

use super::Context;
use super::error::CreateError;
use super::shared::Shared;
use crate::store::set_up::Kept;
use crate::user_data::{UserData, host};
use catalyst_agent_link::{AgentError, AgentLink, ProblemKind};

/// What a request asks to set up in the new guest.
pub(super) fn asked(context: &Context, request: &CreateVm) -> Result<Option<Kept>, CreateError> {
    let CreateVm { user_data, proxy, ca_certificates, .. } = request;
    if user_data.is_none() && proxy.is_none() && ca_certificates.is_empty() {
        return Ok(None);
    }
    let UserData { hostname, mut set_up } =
        user_data.as_deref().map(UserData::parse).transpose()?.unwrap_or_default();
    if let Some(proxy) = proxy {
        host::add_proxy(&mut set_up, proxy, context.network.gateway())?;
    }
    host::add_certificates(&mut set_up, ca_certificates)?;
    // Each VM is an instance of its own, whatever disk it begins with.
    set_up.instance = uuid::Uuid::new_v4().simple().to_string();
    Ok(Some(Kept { hostname, document: set_up }))
}

/// As the API tells it.
pub(super) fn info(report: &SetUpReport) -> SetUpInfo {
    let state = match report.state {
        SetUpState::Absent => SetUpStage::Pending,
        SetUpState::Commands => SetUpStage::Running,
        SetUpState::Done => SetUpStage::Done,
        SetUpState::Failed => SetUpStage::Failed,
    };
    SetUpInfo { state, message: Some(report.message.clone()).filter(|message| !message.is_empty()) }
}

/// Has the guest set itself up, if there is something to set up and it has not done so. Returns when users and files are
/// there; the commands come later, and nobody waits for them.
pub(super) async fn begin(shared: &Shared, link: &AgentLink) {
    let id = shared.dir().id();
    let kept = match shared.dir().set_up() {
        Ok(None) => return,
        Ok(Some(kept)) => kept,
        Err(error) => {
            let message = crate::http::error::chain(&error).join(": ");
            return shared.set_set_up(&SetUpReport { state: SetUpState::Failed, message });
        }
    };
    match link.set_up(&kept.document).await {
        Ok(report) => shared.set_set_up(&report),
        Err(AgentError::Refused { kind: ProblemKind::Unsupported, .. }) => {
            let message =
                "the agent in the VM's template does not know how; make the VM from a newer template";
            shared.set_set_up(&SetUpReport { state: SetUpState::Failed, message: message.to_owned() });
        }
        Err(AgentError::Refused { message, .. }) => {
            shared.set_set_up(&SetUpReport { state: SetUpState::Failed, message });
        }
        // The next greeting tries again.
        Err(error) => tracing::warn!(vm = %id, %error, "the guest was not set up"),
    }
}
